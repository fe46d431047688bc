"""Training on pictures (first stage, teacher) and what a distillation learns."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm_dkdm.assemble import Model, load_codec, load_model, make_schedule
from ldm_dkdm.baselines.stream import DataStream
from ldm_dkdm.config import build, parse
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluate.agreement import eps_error_by_quarter, held_out_chains
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.first_stage.losses import Discriminator, lpips_loss
from ldm_dkdm.first_stage.training import FirstStageModule, as_vectors, held_out_psnr
from ldm_dkdm.images import save_npz
from ldm_dkdm.runs.ema import StudentEMA
from ldm_dkdm.schema import FirstStageConfig, FirstStageRun, NetworkConfig
from ldm_dkdm.teacher import Teacher
from tests.cli import distil, run_script, write_yaml
from tests.parts import UNET_PARAMS, VQ_PARAMS, distill_config

TRAINER = {"max_steps": 8, "learning_rate": 1e-3, "precision": "32", "accelerator": "cpu", "ema_decay": 0.5}
LOGGING = {"save_every": 4, "sample_every": 3, "sample_count": 2, "sample_steps": 2}


def pictures(folder: Path, constant: bool = False) -> Path:
    """24 random smooth pictures, or pictures of one colour each, uint8 (24,32,32,3)."""
    coarse = torch.rand(24, 3, *([1, 1] if constant else [4, 4]))
    images = F.interpolate(coarse, size=(32, 32), mode="bilinear").movedim(1, -1)
    save_npz((images * 255).to(torch.uint8), folder / "pictures.npz")
    return folder / "pictures.npz"


def first_stage_config(data: Path, logs: Path, **sections: dict[str, object]) -> dict[str, dict]:
    config = {
        "first_stage": {"target": "ldm_dkdm.first_stage.VQModel", "params": VQ_PARAMS},
        "data": {"path": str(data), "held_out": str(data), "image_size": 32, "batch_size": 8},
        "trainer": TRAINER,
        "codebook": {"continuous_steps": 3, "restart_every": 2},
        "logging": {"dir": str(logs), "name": "vq", **LOGGING},
    }
    return {name: {**config.get(name, {}), **sections.get(name, {})} for name in config | sections}


def test_a_first_stage_trains_with_every_term_and_its_folder_loads(tmp_path: Path) -> None:
    loss = {"adversarial": 0.1, "adversarial_start": 4, "color": 0.5}
    config = first_stage_config(pictures(tmp_path), tmp_path / "logs", loss=loss) | {"hue": 0.25}
    assert run_script("train_first_stage.py", "--base", write_yaml(tmp_path / "vq.yaml", config)) == 0
    run = tmp_path / "logs" / "vq"
    codec = load_codec(run / "student", FirstStageConfig())
    images = torch.from_numpy(np.load(tmp_path / "pictures.npz")["arr_0"])
    assert codec.encode(images).std().item() == pytest.approx(1.0, abs=1e-3)
    state = torch.load(run / "checkpoints" / "step=00000008.ckpt", weights_only=True)
    critic = {k: v for k, v in state["optimizer_states"][1]["state"].items()}
    assert {int(v["step"]) for v in critic.values()} == {4}  # the critic trains from step 4 on


def test_training_a_first_stage_raises_its_psnr(tmp_path: Path) -> None:
    data = pictures(tmp_path, constant=True)
    sections = {"trainer": {"max_steps": 60, "learning_rate": 1e-2}, "codebook": {"continuous_steps": 30}}
    base = write_yaml(tmp_path / "vq.yaml", first_stage_config(data, tmp_path / "logs", **sections))
    assert run_script("train_first_stage.py", "--base", base) == 0
    images = torch.from_numpy(np.load(data)["arr_0"])
    trained = held_out_psnr(load_codec(tmp_path / "logs" / "vq" / "student", FirstStageConfig()).vq, images)
    assert trained > held_out_psnr(VQModel(**VQ_PARAMS).eval(), images) + 3


def first_stage_module(tmp_path: Path, **loss: object) -> FirstStageModule:
    config = parse(FirstStageRun, first_stage_config(tmp_path, tmp_path, loss=loss), "")
    module = FirstStageModule(VQModel(**VQ_PARAMS), config)
    module.log = lambda *args, **kwargs: None
    return module


def test_the_codebook_starts_at_centres_of_the_latents(tmp_path: Path) -> None:
    module, latents = first_stage_module(tmp_path), 5 + torch.randn(4, 3, 8, 8)

    def distance() -> float:
        return (module.vq.quantise(latents)[0] - latents).square().mean().item()

    before = distance()
    module._start_codebook(latents, steps_left=0)
    assert distance() < 0.1 < before


def test_unused_codes_move_to_latents_and_used_ones_stay(tmp_path: Path) -> None:
    module, latents = first_stage_module(tmp_path), torch.randn(1, 3, 8, 8)
    codes = module.vq.quantize.embedding.weight
    used = codes[7].clone()
    module._restart_dead_codes(latents, torch.zeros_like(latents), torch.full((64,), 7), step=4)
    assert torch.equal(codes[7], used)
    distances = torch.cdist(codes, as_vectors(latents)).min(1).values
    assert distances[torch.arange(64) != 7].max() < 1e-3


def test_the_adversarial_gradient_matches_that_of_the_reconstruction() -> None:
    weight = torch.randn(3, 3, 1, 1, requires_grad=True)
    images, critic = torch.rand(2, 3, 32, 32) * 2 - 1, Discriminator(3)
    reconstructions = F.conv2d(images, weight)
    reconstruction_loss = F.l1_loss(reconstructions, images)
    wanted = torch.autograd.grad(reconstruction_loss, weight, retain_graph=True)[0].norm()
    loss = critic.generator_loss(reconstruction_loss, reconstructions, weight)
    found = torch.autograd.grad(loss, weight)[0].norm()
    assert torch.isfinite(loss)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("backbone", [None, "/nowhere/vgg16.pth"])
def test_lpips_without_its_weights_names_the_file(backbone: str | None) -> None:
    with pytest.raises(UserError, match=f"vgg16-397923af.pth.*perceptual_backbone={backbone}"):
        lpips_loss(backbone)


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


def test_a_teacher_trains_on_pictures_and_resumes_exactly(first_stage: Path, tmp_path: Path, monkeypatch) -> None:
    data, logs = pictures(tmp_path), tmp_path / "logs"
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
    whole, resumed = (logs / name / "student" / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert load_model(logs / "whole" / "student").card.diffusion.num_timesteps == 20


def test_the_average_is_the_closed_form() -> None:
    module, ema = L.LightningModule(), StudentEMA(0.3)
    module.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    weights = torch.randn(8, 3, dtype=torch.float64)
    ema.setup(SimpleNamespace(), module, "fit")
    for step, value in enumerate(weights, 1):
        module.weight.data.copy_(value)
        ema.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, step - 1)
    wanted = weights[0]  # the first update copies
    for n, value in enumerate(weights[1:], 1):
        decay = min(0.3, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * value
    torch.testing.assert_close(ema.module.weight.data, wanted, rtol=1e-12, atol=0)


def test_a_distilled_student_agrees_with_its_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    sections = {
        "trainer": {"max_steps": 150, "learning_rate": 3e-3, "ema_decay": 0.9},
        "logging": {"save_every": 150, "sample_every": 150},
    }
    config = distill_config(teacher_folder, tmp_path / "logs", **sections)
    config["distill"]["batch_size"] = 16
    assert distil("--base", write_yaml(tmp_path / "c.yaml", config)) == 0
    teacher_model = load_model(teacher_folder)

    def denoiser(model: Model) -> Teacher:
        return Teacher(model.network, make_schedule(model.card.diffusion), model.card.network.parameterization)

    teacher = denoiser(teacher_model)
    states = held_out_chains(teacher, (3, 8, 8), chains=16, seed=99, device="cpu", every=2)
    student = load_model(tmp_path / "logs" / "run" / "student")
    untrained = Model(build(NetworkConfig("ldm_dkdm.networks.UNet", UNET_PARAMS)), student.card, None)
    before, after = (eps_error_by_quarter(denoiser(m).predict, states, 20) for m in (untrained, student))
    print(before, after)
    assert all(a < 0.5 * b for a, b in zip(after, before, strict=True))
