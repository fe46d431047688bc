"""A network, sampler, schedule, warm-up mode and variant of one's own: an entry in a table, and nothing else."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, distill, load_model
from ldm_dkdm.config.schema import DistillConfig, SamplingConfig, WarmupConfig
from ldm_dkdm.diffusion.objectives import LOSS_SPACES, loss_weight
from ldm_dkdm.diffusion.process import PARAMETERIZATIONS, Parameterization, x0_to_eps
from ldm_dkdm.diffusion.samplers import SAMPLERS, Denoise, Noise, Sampler
from ldm_dkdm.diffusion.schedule import SCHEDULES
from ldm_dkdm.distillation.stream import VARIANTS, Variant
from ldm_dkdm.distillation.warmup import WARMUPS, Mode, Warmup, warmup_calls
from ldm_dkdm.networks import NETWORKS, UNet
from ldm_dkdm.records import NoisyBatch
from tests.cli import distil, sample, write_yaml
from tests.parts import UNET_PARAMS, distill_config, randomised

SCHEDULE = NoiseSchedule(num_timesteps=20)
NUMBERS = {
    "steps": 2,
    "batch_size": 4,
    "rho": 0.5,
    "check": False,
    "progress": False,
    "sample_every": 99,
    "evaluate_every": 0,
}
NUMBERS |= {"accelerator": "cpu", "precision": "32", "sample_steps": 2, "warmup": "noise"}


def pixel_model(**options: object) -> DiffusionModel:
    """A model on 8x8 images with T = 20."""
    return DiffusionModel(randomised(UNet(**UNET_PARAMS)), **{"schedule": SCHEDULE, "space": "pixel", **options})


def timesteps_of_calls(model: DiffusionModel) -> list[list[int]]:
    """The timesteps of every call of a model's network from now on."""
    calls: list[list[int]] = []
    model.network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[1].tolist()))
    return calls


class Scaled(nn.Module):
    """One factor per channel; says nothing of its states."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return x * self.factors


def test_a_network_is_distilled_saved_and_sampled(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "toy.Scaled", Scaled)
    config = distill_config(teacher_folder, tmp_path, trainer={"max_steps": 2})
    config["student"] = {"target": "toy.Scaled", "params": {"channels": 3}}
    assert distil("--base", write_yaml(tmp_path / "base.yaml", config)) == 0
    student = load_model(tmp_path / "run")
    assert isinstance(student.network, Scaled) and not torch.equal(student.network.factors, torch.ones(3, 1, 1))
    assert student.sample(2, steps=2).shape == (2, 32, 32, 3)


def test_a_network_refuses_parameters_that_it_does_not_have(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(NETWORKS, "toy.Scaled", Scaled)
    config = distill_config(teacher_folder, tmp_path)
    config["student"] = {"target": "toy.Scaled", "params": {"chanels": 3}}
    assert distil("--base", write_yaml(tmp_path / "base.yaml", config)) == 2
    assert "student.params.chanels: unknown key of Scaled; did you mean 'channels'?" in capsys.readouterr().err


def one_step(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x: Tensor,
    noise: Noise,
    steps: int,
    label: Tensor | None = None,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """x_0 as it is predicted from x_T."""
    yield denoise(x, torch.full((len(x),), schedule.num_timesteps - 1), label).x_0


def test_a_sampler_draws_in_python_and_from_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "toy", Sampler(one_step, lambda schedule, n: [schedule.num_timesteps - 1]))
    model, noise = pixel_model(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = model.codec().decode(model.predict(noise, torch.tensor([19])).x_0)
    assert torch.equal(model.sample(1, sampler="toy", seed=7), expected)
    assert SamplingConfig(sampler="toy").sampler == "toy"
    model.save(tmp_path / "model")
    out = tmp_path / "out"
    assert sample("-r", tmp_path / "model", "-n", 1, "--seed", 7, "--sampler", "toy", "-l", out, "--npz") == 0
    assert list(out.rglob("*.npz"))


def test_a_sampler_fills_the_pool_under_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SAMPLERS, "toy", Sampler(one_step, lambda schedule, n: [schedule.num_timesteps - 1]))
    monkeypatch.setitem(WARMUPS, "toy", WARMUPS["ddim"])
    teacher = pixel_model()
    calls = timesteps_of_calls(teacher)
    distill(
        teacher,
        teacher.narrowed("10M"),
        tmp_path / "run",
        **NUMBERS | {"warmup": {"mode": "toy", "images": 8, "steps": 1}},
    )
    assert calls[0] == [19] * 8
    assert warmup_calls(WarmupConfig("toy", images=8), 40, SCHEDULE) == 8


def test_a_schedule_is_the_teachers_and_the_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "toy", lambda steps, start, end: torch.full((steps,), 0.1, dtype=torch.float64))
    pixel_model(schedule=NoiseSchedule("toy", 20)).save(tmp_path / "teacher")
    config = distill_config(tmp_path / "teacher", tmp_path, trainer={"max_steps": 2})
    config["diffusion"] = {"schedule": "toy", "num_timesteps": 20, "space": "pixel"}
    assert distil("--base", write_yaml(tmp_path / "base.yaml", config)) == 0
    schedule = load_model(tmp_path / "run").schedule
    assert (schedule.name, schedule.betas.tolist()) == ("toy", [0.1] * 20)


def test_a_warm_up_mode_fills_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def black(warmup: Warmup, generator: torch.Generator) -> Iterator[int]:
        warmup.pool.fill(NoisyBatch(torch.full((8, 3, 8, 8), -1.0), torch.full((8,), 3)))
        yield 0

    monkeypatch.setitem(WARMUPS, "toy", Mode(black, lambda config, slots, schedule: 7))
    teacher = pixel_model()
    calls = timesteps_of_calls(teacher)
    distill(teacher, teacher.narrowed("10M"), tmp_path / "run", **NUMBERS | {"warmup": "toy", "variant": "shuffled"})
    assert calls == [[3] * 4, [2] * 4]
    assert warmup_calls(WarmupConfig("toy"), 40, SCHEDULE) == 7


def test_a_variant_makes_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "toy", Variant(lambda pool, count, rng: torch.arange(count), expands=True))
    teacher = pixel_model()
    calls = timesteps_of_calls(teacher)
    result = distill(teacher, teacher.narrowed("10M"), tmp_path / "run", **NUMBERS | {"variant": "toy"})
    assert calls == [[19] * 4, [18] * 4]  # the first slots, again and again
    assert result.step == 2


def test_a_parameterization_and_a_loss_space_train_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meaning = Parameterization(x0_to_eps, lambda schedule, x_t, t, x_0: x_0)
    monkeypatch.setitem(PARAMETERIZATIONS, "clean", meaning)
    monkeypatch.setitem(LOSS_SPACES, "toy", lambda abar: 2 * torch.ones_like(abar))
    teacher = pixel_model()
    student = teacher.narrowed("10M", parameterization="clean")
    distill(teacher, student, tmp_path / "run", **NUMBERS | {"loss": {"space": "toy", "weight_cap": 3}})
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 19])
    found = load_model(tmp_path / "run")
    torch.testing.assert_close(found.predict(x, t).x_0, found.network(x, t).clamp(-1, 1).detach())
    assert loss_weight(SCHEDULE, t, "toy").tolist() == [2, 2]


REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "sampler": ("sampler: 'ddmp'", lambda out: pixel_model().sample(1, sampler="ddmp")),
    "parameterization": ("parameterization: 'eta'", lambda out: pixel_model(parameterization="eta")),
    "narrowed": ("parameterization: 'eta'", lambda out: pixel_model().narrowed("10M", parameterization="eta")),
    "schedule": ("schedule: 'lin'", lambda out: NoiseSchedule("lin")),
    "space": ("space: 'pixels'", lambda out: pixel_model(space="pixels")),
    "precision": ("precision: 'bfloat16'", lambda out: pixel_model(precision="bfloat16")),
    "changed": ("precision: 'bfloat16'", lambda out: pixel_model().changed(precision="bfloat16")),
    "to": ("precision: 'bfloat16'", lambda out: pixel_model().to("cpu", "bfloat16")),
    "load": ("precision: 'bfloat16'", lambda out: load_model(pixel_model().save(out / "model"), precision="bfloat16")),
    "trainer": ("precision: 'bfloat16'", lambda out: tiny(out, precision="bfloat16")),
    "loss weight": ("space: 'epss'", lambda out: loss_weight(SCHEDULE, torch.tensor([1]), "epss")),
    "loss": ("loss.space: 'epss'", lambda out: tiny(out, loss="epss")),
    "loss keys": ("loss.space: 'epss'", lambda out: tiny(out, loss={"space": "epss"})),
    "variant": ("variant: 'dynmic'", lambda out: tiny(out, variant="dynmic")),
    "stream": ("variant: 'dynmic'", lambda out: DistillConfig(4, variant="dynmic")),
    "warm-up": ("warmup.mode: 'ddmi'", lambda out: tiny(out, warmup="ddmi")),
    "warm-up keys": ("warmup.mode: 'ddmi'", lambda out: tiny(out, warmup={"mode": "ddmi"})),
    "format": ("format: 'onnx'", lambda out: pixel_model().save(out / "model", format="onnx")),
}


def tiny(out: Path, **options: object) -> object:
    """Distil a teacher into a copy of its shape for two steps."""
    teacher = pixel_model()
    return distill(teacher, teacher.narrowed("10M"), out / "run", **NUMBERS | options)


@pytest.mark.parametrize(("words", "call"), REFUSED.values(), ids=REFUSED)
def test_unknown_names_are_refused_in_python_by_the_parameters_name(
    words: str, call: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^{words} is not one of ") as refusal:
        call(tmp_path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()
