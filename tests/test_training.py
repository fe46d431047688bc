"""Training of a teacher on images, the weight average, and what a distillation learns."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from PIL import Image

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model, train
from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.evaluation.held_out import eps_error_by_quarter, eps_errors, held_out_chains
from ldm_dkdm.networks import UNet
from ldm_dkdm.rng import torch_generator
from ldm_dkdm.training.ema import StudentEMA
from tests.cli import distil, run_script, sample, table, write_yaml
from tests.parts import UNET_PARAMS, distill_config
from tests.training_images import LOGGING, TRAINER, training_images

TINY = {"model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [], "channel_mult": [1]}


def ldm_config(data: Path, first_stage: Path, logs: Path, name: str) -> dict[str, dict]:
    params = {**UNET_PARAMS, "dropout": 0.1}
    return {
        "model": {"target": "ldm_dkdm.networks.UNet", "parameterization": "v", "params": params},
        "first_stage": {"ckpt": str(first_stage)},
        "diffusion": {"num_timesteps": 20},
        "data": {"path": str(data), "image_size": 32, "batch_size": 4},
        "trainer": {**TRAINER, "max_steps": 6},
        "logging": {"dir": str(logs), "name": name, **LOGGING},
    }


def test_a_teacher_trains_on_images_and_resumes_exactly(first_stage: Path, tmp_path: Path, monkeypatch) -> None:
    data, logs = training_images(tmp_path), tmp_path / "logs"
    bases = [write_yaml(tmp_path / f"{n}.yaml", ldm_config(data, first_stage, logs, n)) for n in ("whole", "stopped")]
    assert run_script("train_ldm.py", "--base", bases[0]) == 0
    next_batch = DataStream.next_batch

    def stopping(self: DataStream) -> object:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(DataStream, "next_batch", stopping)
        assert run_script("train_ldm.py", "--base", bases[1]) == 130
    assert run_script("train_ldm.py", "--base", bases[1]) == 0
    whole, resumed = (logs / name / "model" / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == resumed.read_bytes()
    monkeypatch.chdir(tmp_path)
    for run in ("last", logs / "whole"):
        assert run_script("train_ldm.py", "--resume", run, "trainer.max_steps=8") == 0
    assert load_model(logs / "stopped" / "model").info["step"] == 8
    assert whole.read_bytes() == resumed.read_bytes()
    assert load_model(logs / "whole" / "model").diffusion.num_timesteps == 20


def test_latents_encoded_in_every_step_give_the_losses_that_latents_encoded_once_do(
    first_stage: Path, tmp_path: Path
) -> None:
    data, rows = training_images(tmp_path), []
    for cache in (True, False):
        config = ldm_config(data, first_stage, tmp_path / "logs", f"cache-{cache}")
        config["data"] |= {"cache": cache, "flip": False}
        config["model"]["params"]["dropout"] = 0.0
        config["trainer"]["learning_rate"] = 1e-12  # Adam would amplify the rounding of other batch sizes
        assert run_script("train_ldm.py", "--base", write_yaml(tmp_path / "base.yaml", config)) == 0
        row = table(tmp_path / "logs" / f"cache-{cache}" / "metrics.csv")[-1]
        rows.append([float(row[name]) for name in ("step", "loss", "eps_mse")])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_file_that_cannot_be_read_ends_a_training_that_is_saved(accumulate: int, tmp_path: Path) -> None:
    seed, steps = 3, 6
    drawn = [int(torch.randint(24, (1,), generator=torch_generator(seed, 0, i, "data"))) for i in range(18)]
    first = next(i for i in range(accumulate, 18) if drawn[i] > 0 and drawn[i] not in drawn[:i])
    for i, pixels in enumerate(torch.randint(256, (24, 8, 8, 3), dtype=torch.uint8)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i:02}.png")
    file = tmp_path / "images" / f"{drawn[first]:02}.png"
    whole, found = file.read_bytes(), []
    numbers = {"batch_size": 1, "steps": steps, "accumulate": accumulate, "cache": False, "seed": seed}
    options = {**numbers, "progress": False, "save_every": 100, "sample_every": 100, "sample_count": 1}

    def run(folder: Path) -> None:
        torch.manual_seed(0)
        network = UNet(image_size=8, in_channels=3, out_channels=3, **TINY)
        model = DiffusionModel(network, schedule=NoiseSchedule(num_timesteps=20), space="pixel")
        found.append(train(model, tmp_path / "images", folder, **options).step)

    run(tmp_path / "whole")
    file.write_bytes(whole[:60])
    saved = f"repair or replace it; stopped and saved at step {first // accumulate}; call it again"
    with pytest.raises(UserError, match=rf"{file.name}: not a readable image: .*; {saved}"):
        run(tmp_path / "run")
    with pytest.raises(UserError, match=rf"{file.name}: not a readable image: .*; repair or replace it$"):
        run(tmp_path / "run")
    assert first // accumulate > 0
    file.write_bytes(whole)
    run(tmp_path / "run")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert found == [steps, steps] and weights[0] == weights[1]


def test_a_latent_model_trains_on_a_teachers_samples_alone(
    teacher_folder: Path, first_stage: Path, tmp_path: Path
) -> None:
    assert sample("-r", teacher_folder, "-n", 6, "-c", 4, "--npz", "--no_png", "-l", tmp_path / "s") == 0
    config = ldm_config(tmp_path / "unused", first_stage, tmp_path / "logs", "free")
    config["data"] |= {"path": None, "synthetic": str(tmp_path / "s" / "samples.npz")}
    assert run_script("train_ldm.py", "--base", write_yaml(tmp_path / "base.yaml", config)) == 0
    assert load_model(tmp_path / "logs" / "free" / "model").info["step"] == 6


@pytest.mark.parametrize("ramp", [True, False])
def test_the_average_is_the_closed_form(ramp: bool) -> None:
    weights = torch.randn(9, 3, dtype=torch.float64)  # the first are the initial ones
    module, ema = L.LightningModule(), StudentEMA(0.3, ramp)
    module.weight = torch.nn.Parameter(weights[0].clone())
    ema.setup(SimpleNamespace(), module, "fit")
    ema.on_train_start(SimpleNamespace(), module)
    wanted = weights[0]
    for step, value in enumerate(weights[1:], 1):
        module.weight.data.copy_(value)
        ema.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, step - 1)
        decay = min(0.3, (1 + step) / (10 + step)) if ramp else 0.3
        wanted = decay * wanted + (1 - decay) * value
        torch.testing.assert_close(ema.module.weight.data, wanted, rtol=1e-12, atol=0)


def test_a_distilled_student_agrees_with_its_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    sections = {
        "trainer": {"max_steps": 60, "learning_rate": 4e-3, "ema_decay": 0.9},
        "logging": {"save_every": 60, "sample_every": 60},
    }
    config = distill_config(teacher_folder, tmp_path / "logs", **sections)
    config["distill"]["batch_size"] = 8
    assert distil("--base", write_yaml(tmp_path / "c.yaml", config)) == 0
    teacher = load_model(teacher_folder)
    states = held_out_chains(teacher, chains=16, seed=99, device="cpu", kept=10)
    student = load_model(tmp_path / "logs" / "run" / "student")
    before, after = (
        eps_error_by_quarter(eps_errors(model.predict, states), states, 20)
        for model in (student.student(student.node), student)
    )
    assert all(a < 0.5 * b for a, b in zip(after, before, strict=True))


def test_a_cap_draws_fewer_states_near_pure_noise() -> None:
    schedule, quantiles = NoiseSchedule(), (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    uniform, capped = (schedule.timesteps_at(quantiles, cap) for cap in (None, 20.0))
    assert torch.bincount(uniform, minlength=1000).eq(100).all()
    counts = torch.bincount(capped, minlength=1000).double()
    density = (20 * schedule.alphas_cumprod).clamp(0.1, 1)
    torch.testing.assert_close(counts, density / density.sum() * 100_000, rtol=0, atol=1.01)
