"""The paper's pixel recipes and students (Tab. 6, 8, 10) at full size, on the meta device: nothing is computed."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ldm_dkdm import DiffusionModel
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionRun, DistillRun, NetworkConfig
from ldm_dkdm.distillation.pool import pool_slots
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.training.from_images import require_trainable
from tests.cli import ROOT, distil, write_yaml

# Tab. 6: parameters of teacher and student, channels, blocks, head channels, dropout; batch, iterations, early stop
TABLE_6 = {
    "cifar10": ((57_094_662, 128, 3, 32), (14_301_446, 64, 3, 32), 0.3, 128, 200_000, True),
    "celeba64": ((295_136_454, 192, 3, 64), (57_213_606, 96, 2, 32), 0.1, 256, 100_000, True),
    "imagenet32": ((57_094_662, 128, 3, 32), (14_301_446, 64, 3, 32), 0.3, 512, 500_000, False),
}
SIZES = {"cifar10": (32, [1, 2, 2, 2], [16, 8]), "celeba64": (64, [1, 2, 3, 4], [32, 16, 8])}
SIZES["imagenet32"] = SIZES["cifar10"]
STUDENTS = {  # Tab. 8 and 10: a --base file after a recipe
    ("cifar10", "cnn57m"): 57_094_662,
    ("cifar10", "cnn44m"): 44_177_286,
    ("cifar10", "cnn32m"): 32_136_582,
    ("cifar10", "cnn24m"): 24_866_214,
    ("imagenet32", "cnn14m"): 14_301_446,
    ("cifar10", "vit19m"): 19_274_520,
    ("celeba64", "vit19m_64"): 19_569_432,
    ("ffhq256", "vit19m_latent"): 19_564_812,
    ("celebahq256", "vit19m_latent"): 19_564_812,
}


def recipe(*names: str) -> DistillRun:
    files = [ROOT / "configs" / f"{name}.yaml" for name in names]
    return load_config(files)


def on_meta(node: object) -> nn.Module:
    with torch.device("meta"):
        return build(node, {**NETWORKS, **FIRST_STAGES})


def on_data(name: str, *students: str) -> DiffusionRun:
    """The baseline of a recipe that trains on images."""
    files = [ROOT / "configs" / f"{name}_data.yaml", *(ROOT / "configs" / "students" / f"{s}.yaml" for s in students)]
    return load_config(files, schema=DiffusionRun)


def check_trainable(node: NetworkConfig, config: DiffusionRun) -> None:
    """Refuse a network that the images of a baseline cannot train."""
    schedule, space = schedule_of(config.diffusion), config.diffusion.space
    require_trainable(DiffusionModel(on_meta(node), schedule=schedule, space=space, node=node), config)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", TABLE_6)
def test_the_networks_are_those_of_table_6(name: str) -> None:
    config, (teacher, student, dropout, *_) = recipe(name), TABLE_6[name]
    side, mult, resolutions = SIZES[name]
    for node, (count, channels, blocks, head) in ((config.teacher, teacher), (config.student, student)):
        network, params = on_meta(node), node.params
        assert parameters(network) == count
        assert (params["model_channels"], params["num_res_blocks"], params["num_head_channels"]) == (
            channels,
            blocks,
            head,
        )
        assert (params["image_size"], params["channel_mult"], params["dropout"]) == (side, mult, dropout)
        assert [side // factor for factor in params["attention_resolutions"]] == resolutions
        assert params["resblock_updown"] and network.out_channels == 6
        check_trainable(NetworkConfig(node.target, params), on_data(name))


@pytest.mark.parametrize("name", TABLE_6)
def test_the_training_values_are_those_of_table_6(name: str) -> None:
    config, (*_, batch, iterations, early_stop) = recipe(name), TABLE_6[name]
    assert (config.distill.batch_size, config.trainer.max_steps) == (batch, iterations)
    assert config.trainer.learning_rate == 1e-4 and config.trainer.ema_decay == 0.9999
    assert (config.trainer.early_stop is not None) == early_stop
    assert config.distill.rho == 0.4 and config.distill.variant == "dynamic" and config.distill.discard == 0
    assert config.distill.loss.space == "eps" and config.distill.loss.vlb_weight == 1
    assert pool_slots(0.4, 1000, batch) == 400 * batch
    assert config.diffusion.space == "pixel"
    schedule = schedule_of(config.diffusion)
    assert schedule.name == "cosine" and schedule.num_timesteps == 1000


@pytest.mark.parametrize("names", STUDENTS, ids="-".join)
def test_the_students_of_tables_8_and_10_fit_their_recipes(names: tuple[str, str]) -> None:
    base, student = names
    config = recipe(base, f"students/{student}")
    network = on_meta(config.student)
    assert parameters(network) == STUDENTS[names]
    check_trainable(config.student, on_data(base, student))
    teacher = on_meta(config.teacher)
    assert (network.image_size, network.in_channels) == (teacher.image_size, teacher.in_channels)
    baseline = on_data(base, student).model
    assert (baseline.target, baseline.params) == (config.student.target, config.student.params)
    if "dropout" in config.student.params:
        assert config.student.params["dropout"] == 0.3


def test_a_student_file_replaces_the_recipes_student_and_its_values_stay_overridable() -> None:
    files = [ROOT / "configs" / f"{name}.yaml" for name in ("cifar10", "students/vit19m")]
    config = load_config(files, ["student.params.depth=3"])
    assert config.student.params == {**recipe("cifar10", "students/vit19m").student.params, "depth": 3}
    budget = load_config(files[:1], ["student.budget=30M"])
    assert budget.student.target is None and budget.student.params == {}


def test_a_pasted_network_gives_way_to_a_later_file_and_to_overrides(tmp_path: Path) -> None:
    pasted = {"unet_config": {"target": "guided_diffusion.unet.UNetModel", "params": {"model_channels": 32}}}
    base = write_yaml(tmp_path / "pasted.yaml", {**to_plain("cifar10"), "student": pasted})
    assert load_config([base]).student.params == {"model_channels": 32}
    assert load_config([base], ["student.params.model_channels=64"]).student.params == {"model_channels": 64}
    vit = ROOT / "configs" / "students" / "vit19m.yaml"
    assert load_config([base, vit]).student == recipe("cifar10", "students/vit19m").student
    assert load_config([base], ["student.budget=20M"]).student.target is None


def to_plain(name: str) -> dict[str, object]:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


def test_another_target_leaves_budget_and_first_weights_behind(tmp_path: Path) -> None:
    base = write_yaml(tmp_path / "base.yaml", {**to_plain("cifar10"), "student": {"budget": "20M", "init": "teacher"}})
    vit = ROOT / "configs" / "students" / "vit19m.yaml"
    assert load_config([base, vit]).student == recipe("cifar10", "students/vit19m").student


KINDS = [("cifar10", "cnn24m"), ("cifar10", "vit19m"), ("celeba64", "vit19m_64"), ("ffhq256", "vit19m_latent")]
RECIPES = [(name,) for name in (*TABLE_6, "ffhq256", "celebahq256")] + KINDS  # and one student's file of each kind


@pytest.mark.parametrize("names", RECIPES, ids="-".join)
def test_a_plan_counts_parameters_and_operations_of_every_recipe_and_kind_of_student(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no checkpoint is there
    monkeypatch.setattr("ldm_dkdm.training.plan.time_needed", lambda parts: {"time": "not measured"})
    for module in ("model.diffusion_model", "config.registry"):
        monkeypatch.setattr(f"ldm_dkdm.{module}.build", lambda node, *_: on_meta(node))
    bases = [names[0], *(f"students/{name}" for name in names[1:])]
    assert distil("--base", *(ROOT / "configs" / f"{base}.yaml" for base in bases), "--plan") == 0
    config = recipe(*bases)
    lines = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    for subject, node in (("teacher", config.teacher), ("student", config.student)):
        millions = parameters(on_meta(node)) / 1e6
        assert lines[subject].startswith(f"{millions:.6f} M parameters, ")
        assert float(lines[subject].split()[3]) > 1  # GFLOPs


@pytest.mark.parametrize("name", [*TABLE_6, "ffhq256", "celebahq256"])
def test_the_baseline_on_data_trains_the_student_of_the_recipe(name: str) -> None:
    distilled = recipe(name)
    config = on_data(name)
    assert config.model.params == distilled.student.params and config.diffusion == distilled.diffusion
    assert config.trainer == distilled.trainer and config.data.batch_size == distilled.distill.batch_size
    stage = distilled.first_stage
    assert (config.first_stage.target, config.first_stage.params) == (stage.target, stage.params)
    side = stage.params["ddconfig"]["resolution"] if stage.target else config.model.params["image_size"]
    assert config.data.image_size == side
    check_trainable(config.model, config)


def test_a_plan_needs_no_checkpoint_and_says_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base, student = (ROOT / "configs" / name for name in ("cifar10.yaml", "students/vit19m.yaml"))
    assert distil("--base", base, student, "--plan", "trainer.precision=32", "distill.batch_size=1") == 0
    shown = capsys.readouterr().out
    assert "download DDPM-IP's release ADM_cifar10_baseline.pt" in shown
    assert "57.094662 M parameters" in shown and "19.274520 M parameters" in shown and "400 slots" in shown
    assert list(tmp_path.iterdir()) == []
