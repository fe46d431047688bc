"""A UNet's width for a budget, and first weights out of a teacher's: every kind of channel lands where it belongs."""

import pytest
import torch
from torch import Tensor, nn

from ldm_dkdm import UserError
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.networks.scaling import parse_budget, slice_teacher, unet_within_budget
from tests.parts import LDM, UNET_PARAMS, randomised

ADM = {"resblock_updown": True, "use_scale_shift_norm": True, "out_channels": 6}
TEACHER = {**LDM, "model_channels": 224}


def unet(width: int, **params: object) -> UNet:
    return randomised(UNet(**{**UNET_PARAMS, "model_channels": width, **params}), seed=width)


def numbered(tensor: nn.Parameter, dim: int) -> None:
    """Give every entry its own index along an axis."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    with torch.no_grad():
        tensor.copy_(torch.arange(tensor.shape[dim], dtype=torch.float).view(shape).expand_as(tensor))


def indices(tensor: Tensor, dim: int) -> list[int]:
    """The teacher's indices that `numbered` left along an axis."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)[:, 0].round().int().tolist()


def sliced_index(name: str, dim: int, **params: object) -> list[int]:
    teacher, student = unet(64, **params), unet(32, **params)
    numbered(dict(teacher.named_parameters())[name], dim)
    slice_teacher(student, teacher)
    return indices(dict(student.named_parameters())[name].detach(), dim)


@pytest.mark.parametrize(
    "params", [{}, ADM, {"num_res_blocks": 2, "num_classes": 5}, {"use_new_attention_order": True}]
)
def test_the_same_architecture_is_copied_bit_for_bit(params: dict[str, object]) -> None:
    teacher, student = unet(64, **params), randomised(unet(64, **params), seed=9)
    report = slice_teacher(student, teacher)
    assert (report.sliced, report.random) == (0, 0)
    assert report.copied == len(list(student.parameters()))
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("params", [{}, ADM, {"num_res_blocks": 2}])
def test_a_student_without_the_middle_block_has_copies_of_all_other_blocks(params: dict[str, object]) -> None:
    teacher, student = unet(64, **params), randomised(unet(64, **params, middle_block=False), seed=9)
    report = slice_teacher(student, teacher)
    assert (report.sliced, report.random) == (0, 0) and report.copied == len(list(student.parameters()))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 9])
    teacher.middle_block = nn.ModuleList()
    assert torch.equal(student(x, t), teacher(x, t))
    assert not any("middle_block" in name for name in student.state_dict())


def test_a_budget_keeps_the_teacher_s_shape_without_a_middle_block() -> None:
    params = unet_within_budget({**TEACHER, "middle_block": False}, parse_budget("50M"))
    whole = unet_within_budget(TEACHER, parse_budget("50M"))
    assert params["middle_block"] is False and params["model_channels"] > whole["model_channels"]


def test_plain_channels_are_the_leading_ones() -> None:
    assert sliced_index("input_blocks.0.0.weight", 0) == list(range(32))
    assert sliced_index("middle_block.0.in_layers.2.weight", 1) == list(range(64))
    assert sliced_index("out.2.weight", 1) == list(range(32))


def test_a_decoder_block_takes_the_leading_channels_of_state_and_skip() -> None:
    # output_blocks.0: 128 of the middle block and 128 of the last encoder block; the student has 64 and 64
    expected = [*range(64), *range(128, 192)]
    for name, dim in (("in_layers.0.weight", 0), ("in_layers.2.weight", 1), ("skip_connection.weight", 1)):
        assert sliced_index(f"output_blocks.0.0.{name}", dim) == expected
    # output_blocks.2: 128 of the level below and 64 of the encoder's level; the student has 64 and 32
    assert sliced_index("output_blocks.2.0.in_layers.2.weight", 1) == [*range(64), *range(128, 160)]


@pytest.mark.parametrize(
    ("new_order", "expected"),
    [(False, [*range(192)]), (True, [*range(64), *range(128, 192), *range(256, 320)])],
)
def test_attention_keeps_whole_heads_with_their_queries_keys_and_values(new_order: bool, expected: list[int]) -> None:
    name = "middle_block.1.qkv.weight"  # 4 heads of 32 in the teacher, 2 in the student
    assert sliced_index(name, 0, use_new_attention_order=new_order) == expected


def test_scale_and_shift_are_cut_each_for_itself() -> None:
    name = "input_blocks.1.0.emb_layers.1.weight"
    assert sliced_index(name, 0, use_scale_shift_norm=True) == [*range(32), *range(64, 96)]


def test_the_timestep_embedding_keeps_the_nearest_frequencies() -> None:
    columns = sliced_index("time_embed.0.weight", 1)
    freqs = {
        width: torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(width // 2) / (width // 2))
        for width in (32, 64)
    }
    for half in (0, 1):
        taken = torch.tensor(columns[16 * half : 16 * half + 16]) - 32 * half
        torch.testing.assert_close(freqs[64][taken], freqs[32])


def test_where_depths_differ_the_outer_blocks_correspond() -> None:
    teacher, student = unet(64, num_res_blocks=2), unet(32, num_res_blocks=1)
    report = slice_teacher(student, teacher)
    assert report.random == 0
    # the decoder has three blocks per level: the innermost (it takes the level below) and the outermost (it upsamples)
    pairs = {"input_blocks.1": "input_blocks.1", "input_blocks.2": "input_blocks.3", "middle_block": "middle_block"}
    pairs |= {f"output_blocks.{k}": f"output_blocks.{n}" for k, n in enumerate((0, 2, 3, 5))}
    for own, other in pairs.items():
        ours, theirs = (dict(net.named_parameters()) for net in (student, teacher))
        name = next(n for n in (".0.out_layers.3.weight", ".0.op.weight") if own + n in ours)
        width = len(ours[own + name])
        assert torch.equal(ours[own + name], theirs[other + name][:width, :width])


def test_blocks_that_the_teacher_lacks_stay_random() -> None:
    teacher, student = unet(64, num_res_blocks=1), unet(32, num_res_blocks=2)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    report = slice_teacher(student, teacher)
    unchanged = sum(torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert report.random == unchanged > 0
    assert report.random + report.sliced + report.copied == len(before)


def test_levels_that_the_teacher_lacks_and_the_middle_below_them_stay_random() -> None:
    teacher, student = unet(64, channel_mult=[1, 2]), unet(32, channel_mult=[1, 2, 2])
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    slice_teacher(student, teacher)
    kept = {".".join(name.split(".")[:2]) for name, value in student.named_parameters() if value.equal(before[name])}
    assert kept == {
        *("input_blocks.4", "input_blocks.5", "middle_block.0", "middle_block.1", "middle_block.2"),  # the third level
        *("output_blocks.0", "output_blocks.1"),
    }


def test_attention_that_the_teacher_lacks_stays_random() -> None:
    teacher, student = unet(64, attention_resolutions=[2]), unet(32, attention_resolutions=[1, 2])
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    slice_teacher(student, teacher)
    kept = {name.rpartition(".")[0] for name, value in student.named_parameters() if value.equal(before[name])}
    layers = ("norm", "qkv", "proj_out")
    assert kept == {
        f"{block}.1.{layer}" for block in ("input_blocks.1", "output_blocks.2", "output_blocks.3") for layer in layers
    }


def test_a_student_with_the_other_order_of_queries_keys_and_values_is_the_same_function() -> None:
    teacher, student = unet(64), unet(64, use_new_attention_order=True)
    slice_teacher(student, teacher)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    torch.testing.assert_close(student(x, t), teacher(x, t))


def test_narrower_heads_keep_the_leading_channels_of_each() -> None:
    heads = {"num_head_channels": -1, "num_heads": 2}  # 128 channels: 64 per head in the teacher, 32 in the student
    starts = [0, 64, 128, 192, 256, 320]  # q, k, v of the first head, then of the second
    assert sliced_index("middle_block.1.qkv.weight", 0, **heads) == [s + c for s in starts for c in range(32)]
    assert sliced_index("middle_block.1.proj_out.weight", 1, **heads) == [*range(32), *range(64, 96)]


def test_a_student_without_the_variance_keeps_eps() -> None:
    teacher, student = unet(64, out_channels=6), unet(32)
    slice_teacher(student, teacher)
    assert torch.equal(student.out[2].weight, teacher.out[2].weight[:3, :32])


def test_only_unets_can_be_sliced() -> None:
    dit = DiT(8, in_channels=3, hidden_size=32, depth=1, num_heads=2, learn_sigma=False)
    with pytest.raises(UserError, match="here DiT and UNet"):
        slice_teacher(dit, unet(32))
    with pytest.raises(UserError, match="here UNet and DiT"):
        slice_teacher(unet(32), dit)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("60M", 60_000_000),
        ("14.5m", 14_500_000),
        ("300k", 300_000),
        (2_000_000, 2_000_000),
        ("1e6", 10**6),
        ("1B", 10**9),
    ],
)
def test_a_budget_is_read(text: str | int, number: int) -> None:
    assert parse_budget(text) == number


@pytest.mark.parametrize("text", ["", "much", "-3M", "60 MB", "0"])
def test_what_is_no_number_of_parameters_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^budget: .*60M"):
        parse_budget(text)


def _count(params: dict[str, object]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**params).parameters())


@pytest.mark.parametrize(("budget", "width"), [(60_000_000, 96), (90_000_000, 128), (10**9, 224)])
def test_the_ldm_teacher_is_narrowed_to_the_largest_width_within_the_budget(budget: int, width: int) -> None:
    params = unet_within_budget(TEACHER, budget)
    assert params == {**TEACHER, "model_channels": width}
    assert _count(params) <= budget
    if width < 224:
        assert _count({**TEACHER, "model_channels": width + 32}) > budget


def test_a_budget_below_the_narrowest_is_refused_with_its_size() -> None:
    smallest = _count({**TEACHER, "model_channels": 32}) / 1e6
    with pytest.raises(UserError, match=rf"narrowest UNet of the teacher's shape has {smallest:.3g}M"):
        unet_within_budget(TEACHER, 1_000_000)
    with pytest.raises(UserError, match=r"^budget: 60 is too small"):  # 60M was meant
        unet_within_budget(TEACHER, 60)


def test_widths_suit_the_norm_groups_and_heads_of_every_level() -> None:
    heads = {**TEACHER, "model_channels": 192, "channel_mult": [1, 2, 3], "num_head_channels": 64}
    widths = {unet_within_budget(heads, budget)["model_channels"] for budget in (20 * 10**6, 80 * 10**6, 10**9)}
    assert widths == {64, 128, 192}
    halves = {**TEACHER, "model_channels": 48, "channel_mult": [2, 4]}
    assert unet_within_budget(halves, _count({**halves, "model_channels": 32}))["model_channels"] == 32
    assert unet_within_budget({**halves, "use_fp16": True}, 10**9) == halves  # a foreign key means nothing here
