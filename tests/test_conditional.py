"""Class-conditional teachers: labels in the pool, in the stream, in sampling; classifier-free guidance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool, UserError, distill, load_model, train
from ldm_dkdm.config.schema import DistillConfig, SamplingConfig, WarmupConfig
from ldm_dkdm.diffusion.process import x0_to_eps
from ldm_dkdm.distillation.replay import stream_kind
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.distillation.warmup import Warmup
from ldm_dkdm.model.guidance import learned_guidance
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.records import NoisyBatch
from tests.cli import run_script, sample
from tests.parts import UNET_PARAMS, model_folder, randomised

SCHEDULE = NoiseSchedule(num_timesteps=20)
STEEP = NoiseSchedule(num_timesteps=100, beta_start=0.015, beta_end=0.195)  # abar falls to 1e-4 in 100 steps
SHAPE = (2, 3, 3)


class Labelled(nn.Module):
    """Predicts its label everywhere, and twice that as a variance fraction if `learned`; counts its calls."""

    num_classes = 4

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.learned, self.calls = learned, 0

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        eps = label.view(-1, 1, 1, 1).to(x) * torch.ones_like(x)
        return torch.cat([eps, 2 * eps], 1) if self.learned else eps


def teacher_of(network: nn.Module, schedule: NoiseSchedule = SCHEDULE, **options: object) -> DiffusionModel:
    shape = None if hasattr(network, "image_size") else SHAPE
    return DiffusionModel(network, **{"schedule": schedule, "shape": shape, **options})


def pool_of(teacher: DiffusionModel, config: WarmupConfig, slots: int = 60) -> NoisyPool:
    pool = NoisyPool(slots, SHAPE, torch.float32, labeled=True)
    list(Warmup(pool, teacher, config).run())
    return pool


@pytest.mark.parametrize("mode", ["ancestral", "harvest", "ddim", "noise"])
def test_every_slot_gets_a_label_that_means_a_class(mode: str) -> None:
    teacher = teacher_of(Labelled(), null_label=3)
    pool = pool_of(teacher, WarmupConfig(mode, steps=5, images=30, batch_size=16))
    assert sorted(pool.label.unique().tolist()) == [0, 1, 2]


class OneCanvas(nn.Module):
    """Knows that x_0 equals its label everywhere."""

    num_classes = 4

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x0_to_eps(STEEP, x, t, label.view(-1, 1, 1, 1) * torch.ones_like(x))


@pytest.mark.parametrize("mode", ["ancestral", "harvest", "ddim", "dpm-solver++"])
def test_a_slot_s_state_is_of_its_label(mode: str) -> None:
    pool = NoisyPool(90, (1, 64, 64), torch.float32, labeled=True)
    teacher = teacher_of(OneCanvas(), STEEP, shape=(1, 64, 64))
    list(Warmup(pool, teacher, WarmupConfig(mode, steps=10, images=30, batch_size=16)).run())
    signal = STEEP.alphas_cumprod[pool.t.long()].sqrt()
    seen = signal > 0.25  # the others are noise
    means = pool.x.mean((1, 2, 3)) / signal
    assert seen.sum() > 30 and len(pool.label[seen].unique()) == 4
    assert torch.equal(means[seen].round().int(), pool.label[seen])


@pytest.mark.parametrize(
    "method",
    [{}, {"stride": 20}, {"stride": 60}, {"stride": 60, "replay": 2, "batch_size": 6}, {"stride": 30, "discard": 0.5}],
)
@pytest.mark.parametrize("cap", [None, 4.0])
def test_a_slot_that_begins_again_has_the_label_of_its_state(method: dict[str, object], cap: float | None) -> None:
    config = DistillConfig(**{"batch_size": 9, "warmup": WarmupConfig("ddim", steps=5, images=90, t_cap=cap), **method})
    pool = NoisyPool(90, (1, 48, 48), torch.float32, labeled=True)
    teacher = teacher_of(OneCanvas(), STEEP, shape=(1, 48, 48))
    list(Warmup(pool, teacher, config.warmup).run())
    stream = stream_kind(config)(teacher, pool, config, 150)
    for _ in range(150):
        stream.next_batch()
    pool.settle()
    signal = STEEP.alphas_cumprod[pool.t.long()].sqrt()
    seen = signal > 0.3  # the others are noise
    assert seen.sum() > 15 and len(pool.label[seen].unique()) == 4
    assert torch.equal((pool.x.mean((1, 2, 3)) / signal)[seen].round().int(), pool.label[seen])


def test_the_student_gets_the_label_of_the_teachers_target() -> None:
    teacher = teacher_of(Labelled())
    stream = DistillStream(teacher, pool_of(teacher, WarmupConfig("noise")), DistillConfig(8), 30)
    for batch in stream:
        assert torch.equal(batch.target.eps[:, 0, 0, 0], batch.label.float())


def test_a_label_stays_with_its_slot_until_that_restarts_with_a_new_one() -> None:
    teacher = teacher_of(Labelled())
    pool = pool_of(teacher, WarmupConfig("noise"), 400)
    stream = DistillStream(teacher, pool, DistillConfig(400, variant="iterative"), 21)
    before = pool.label.clone()
    for _ in range(19):
        stream.next_batch()
    assert torch.equal(pool.label, before)
    stream.next_batch()
    assert (pool.label == before).float().mean().item() == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("learned", [False, True])
def test_guidance_extrapolates_from_no_label_in_one_call(learned: bool) -> None:
    teacher = teacher_of(Labelled(learned), guidance=3.0, null_label=0)
    output = teacher.predict(torch.zeros(2, *SHAPE), torch.zeros(2), torch.tensor([1, 2]))
    assert teacher.network.calls == 1
    assert output.eps[:, 0, 0, 0].tolist() == [3, 6]
    if learned:
        assert output.var_fraction[:, -1, 0, 0].tolist() == [2, 4]  # the labelled call's own


def test_the_guided_prediction_is_target_and_step() -> None:
    batch = NoisyBatch(torch.randn(2, *SHAPE), torch.tensor([5, 9]), torch.tensor([1, 2]))
    guided = teacher_of(Labelled(), guidance=2.0, null_label=0)
    plain = teacher_of(Labelled())
    doubled = NoisyBatch(batch.x, batch.t, 2 * batch.label)
    noise = torch.randn(2, *SHAPE)
    for ours, theirs in zip(guided.step(batch, noise), plain.step(doubled, noise), strict=True):
        torch.testing.assert_close(getattr(ours, "eps", ours), getattr(theirs, "eps", theirs))


def test_guidance_needs_labels_and_one_that_means_none() -> None:
    with pytest.raises(UserError, match="takes no labels"):
        teacher_of(UNet(**UNET_PARAMS), guidance=2.0)
    with pytest.raises(UserError, match=r"null_label: .* only a network trained with such a label has; .*at 1"):
        teacher_of(Labelled(), guidance=2.0)


def test_a_student_is_guided_where_it_learned_no_guidance_but_a_null_label(tmp_path: Path) -> None:
    params = {"in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 3, "learn_sigma": False}
    numbers = {"steps": 1, "batch_size": 2, "precision": "32", "accelerator": "cpu", "progress": False}
    schedule = NoiseSchedule("cosine", 20)
    for guidance in (1.0, 2.0):
        teacher = DiffusionModel(DiT(8, **params), schedule=schedule, space="pixel", guidance=guidance)
        student = DiffusionModel(DiT(8, **params), like=teacher, guidance=1.0)
        run = tmp_path / str(guidance)
        distill(teacher, student, run, rho=0.5, warmup="noise", check=False, **numbers)
        assert load_model(run).info["teacher_guidance"] == guidance
        assert f"- **teacher guidance**: {guidance}" in (run / "student" / "README.md").read_text()
        given = ["-r", run, "-n", 1, "-c", 1, "--guidance", 3, "--device", "cpu", "-l", tmp_path / "out"]
        assert sample(*given) == (0 if guidance == 1 else 2)
    plain = load_model(tmp_path / "1.0")
    assert plain.changed(guidance=3.0).guidance == 3
    earlier = {key: value for key, value in plain.info.items() if key != "teacher_guidance"}
    with pytest.raises(UserError, match="is a student, which has learned"):
        plain.changed(info=earlier, guidance=3.0)
    with pytest.raises(UserError, match="is a student, trained on no label for no class"):
        teacher_of(Labelled(), null_label=3, info=plain.info, guidance=3.0)
    assert learned_guidance(plain.changed(guidance=3.0)) == {"teacher_guidance": 3}
    assert learned_guidance(load_model(tmp_path / "2.0")) == {"teacher_guidance": 2}  # a student's student
    assert learned_guidance(plain.changed(info=earlier)) == {}


def test_a_dit_knows_its_own_null_label() -> None:
    dit = DiT(8, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=5, learn_sigma=False)
    assert teacher_of(dit, guidance=2.0).classes == [0, 1, 2, 3, 4]
    seen = []
    dit.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for guidance in (1.0, 2.0):
        teacher_of(dit, guidance=guidance).predict(torch.zeros(3, 3, 8, 8), torch.zeros(3), torch.arange(3))
    assert seen == [3, 6]  # without guidance the network is called as it is


def _labels(config: SamplingConfig) -> list[int]:
    teacher = teacher_of(Labelled(), null_label=3, space="pixel")
    return torch.cat([batch.labels for batch in teacher.sample_batches(config)]).tolist()


def test_labels_are_taken_in_turn_or_follow_from_the_seed() -> None:
    assert _labels(SamplingConfig(5, 2, steps=2, labels=(2, 0))) == [2, 0, 2, 0, 2]
    drawn = _labels(SamplingConfig(12, 5, seed=3, steps=2))
    assert set(drawn) == {0, 1, 2}
    assert drawn[4:] == _labels(SamplingConfig(8, 8, seed=7, steps=2))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
def test_samples_depend_on_their_labels(sampler: str) -> None:
    network = randomised(UNet(**UNET_PARAMS, num_classes=4))
    teacher = teacher_of(network, space="pixel")

    def states(*labels: int) -> Tensor:
        config = SamplingConfig(2, steps=3, sampler=sampler, labels=labels)
        return next(teacher.sample_batches(config)).states

    assert torch.equal(states(1, 2), states(1, 2))
    assert torch.equal(states(1, 2)[0], states(1, 3)[0])
    assert not torch.allclose(states(1, 2)[1], states(1, 3)[1])


def test_the_cards_of_teacher_and_student_name_the_classes_of_the_folders(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    params = {**UNET_PARAMS, "num_classes": 2}
    teacher = DiffusionModel(UNet(**params), schedule=NoiseSchedule("cosine", 20), space="pixel")
    numbers = {"steps": 1, "batch_size": 2, "precision": "32", "accelerator": "cpu", "progress": False}
    train(teacher, tmp_path / "data", tmp_path / "teacher", sample_count=2, **numbers)
    found = load_model(tmp_path / "teacher")
    student = DiffusionModel(UNet(**params), like=found)
    distill(found, student, tmp_path / "student", rho=0.5, warmup="noise", check=False, **numbers)
    for run in (tmp_path / "teacher", tmp_path / "student"):
        model = load_model(run)
        assert model.info["classes"] == ["0 ant", "1 bee"]
        assert model.path is not None
        assert "- **classes**: 0 ant, 1 bee\n" in (model.path / "README.md").read_text()


def test_a_training_does_not_go_on_with_other_labels_than_it_began_with(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    numbers = {"batch_size": 2, "precision": "32", "accelerator": "cpu", "progress": False, "sample_count": 2}

    def go_on(steps: int) -> None:
        network = UNet(**UNET_PARAMS, num_classes=2)
        model = DiffusionModel(network, schedule=NoiseSchedule("cosine", 20), space="pixel")
        train(model, tmp_path / "data", tmp_path / "run", steps=steps, resume=steps > 1, **numbers)

    go_on(1)
    (tmp_path / "data" / "ant").rename(tmp_path / "data" / "wasp")  # bees are label 0 then
    with pytest.raises(UserError, match=r"label 0 is 0 bee now, and \S+ began with 0 ant; give"):
        go_on(2)
    (tmp_path / "data" / "wasp").rename(tmp_path / "data" / "ant")
    go_on(2)
    assert load_model(tmp_path / "run").info["step"] == 2


def test_images_that_name_no_classes_keep_those_of_the_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", np.zeros((2, 8, 8, 3), dtype=np.uint8), np.arange(2))
    numbers = {"batch_size": 2, "precision": "32", "accelerator": "cpu", "progress": False, "sample_count": 2}
    for steps in (1, 2):
        network, schedule = UNet(**UNET_PARAMS, num_classes=2), NoiseSchedule("cosine", 20)
        model = DiffusionModel(network, schedule=schedule, space="pixel", info={"classes": ["0 ant", "1 bee"]})
        train(model, tmp_path / "two.npz", tmp_path / "run", steps=steps, resume=steps > 1, **numbers)
    info = load_model(tmp_path / "run").info
    assert (info["step"], info["classes"]) == (2, ["0 ant", "1 bee"])


def test_labels_stay_with_latents_that_are_decoded(first_stage: Path, tmp_path: Path, capsys) -> None:
    teacher, out = model_folder(tmp_path / "teacher", first_stage, num_classes=4), tmp_path / "out"
    asked = ("-n", 3, "-c", 2, "--labels", 3, 1, "--npz", "--latents", "--batch_size", 2, "--no_png")
    assert sample("-r", teacher, *asked, "-l", out) == 0
    file, images = out / "latents.safetensors", out / "samples.npz"
    decoding = ("--first_stage", first_stage, "-o", out)
    images.unlink()
    for _ in range(2):  # into an empty place, and over its own file
        assert run_script("decode_latents.py", file, *decoding) == 0
        assert np.load(images)["arr_1"].tolist() == [3, 1, 3]
    before, plain = images.read_bytes(), tmp_path / "plain.npz"
    np.savez(plain, load_file(file)["latents"].numpy())
    assert run_script("decode_latents.py", plain, *decoding) == 2
    assert f"--out: {images} exists and holds labels (arr_1), which {plain} does not" in capsys.readouterr().err
    assert images.read_bytes() == before
    np.savez(plain, load_file(file)["latents"].numpy(), np.arange(2))
    assert run_script("decode_latents.py", plain, *decoding) == 2
    assert "labels of 3 latents are as many whole numbers, found torch.int64 (2,)" in capsys.readouterr().err


def test_latents_are_not_written_over_by_their_images(first_stage: Path, tmp_path: Path, capsys) -> None:
    for content, words in (
        ({"arr_0": np.zeros((1, 3, 8, 8), np.float32)}, "is read by this call"),
        ({"mu": np.zeros(3)}, "exists and holds mu; name another folder"),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        file, latents = tmp_path / "out/samples.npz", tmp_path / "x.npz"
        np.savez(latents, np.zeros((1, 3, 8, 8), np.float32))
        np.savez(file, **content)
        before = file.read_bytes()
        path = file if "arr_0" in content else latents
        assert run_script("decode_latents.py", path, "--first_stage", first_stage, "-o", tmp_path / "out") == 2
        assert f"--out: {file} {words}" in capsys.readouterr().err and file.read_bytes() == before
