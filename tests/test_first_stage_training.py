"""Training of a first stage on images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.config.load import parse
from ldm_dkdm.config.schema import FirstStageRun
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.perceptual import lpips_loss
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.first_stage.discriminator import Discriminator
from ldm_dkdm.first_stage.vqgan import FirstStageModule, as_vectors, held_out_psnr, warmup_cosine
from ldm_dkdm.images import save_image, to_image
from tests.cli import run_script, table, write_yaml
from tests.parts import VQ_PARAMS
from tests.test_config_errors import assert_one_error_line
from tests.training_images import TRAINER, training_images


def first_stage_config(data: Path, logs: Path, **sections: dict[str, object]) -> dict[str, dict]:
    config = {
        "first_stage": {"target": "ldm_dkdm.first_stage.VQModel", "params": VQ_PARAMS},
        "data": {"path": str(data), "held_out": str(data), "image_size": 32, "batch_size": 4},
        "trainer": TRAINER,
        "codebook": {"continuous_steps": 3, "restart_every": 2},
        "logging": {"dir": str(logs), "name": "vq", "save_every": 4},
    }
    return {name: {**config.get(name, {}), **sections.get(name, {})} for name in config | sections}


def test_a_first_stage_trains_with_every_term_and_its_folder_loads(tmp_path: Path) -> None:
    loss = {"adversarial": 0.1, "adversarial_start": 4, "color": 0.5}
    config = first_stage_config(training_images(tmp_path), tmp_path / "logs", loss=loss) | {"hue": 0.25}
    assert run_script("train_first_stage.py", "--base", write_yaml(tmp_path / "vq.yaml", config)) == 0
    run = tmp_path / "logs" / "vq"
    codec = FirstStageSource(run / "first_stage").codec()
    images = torch.from_numpy(np.load(tmp_path / "images.npz")["arr_0"])
    assert codec.encode(images).std().item() == pytest.approx(1.0, abs=1e-3)
    state = torch.load(run / "checkpoints" / "step=00000008.ckpt", weights_only=True)
    critic = state["optimizer_states"][1]["state"].values()
    assert {int(moments["step"]) for moments in critic} == {4}  # the critic trains from step 4 on


def test_the_images_of_folders_are_read_with_a_line_of_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, image in enumerate(np.load(training_images(tmp_path))["arr_0"]):
        save_image(to_image(torch.from_numpy(image)), tmp_path / "folder" / f"{number}.png")
    config = first_stage_config(tmp_path / "folder", tmp_path / "logs", trainer={"max_steps": 1})
    assert run_script("train_first_stage.py", "--base", write_yaml(tmp_path / "vq.yaml", config)) == 0
    assert capsys.readouterr().err.count(f"reading: {number + 1} images\n") == 2  # data.path and data.held_out


def test_a_resume_gives_both_networks_its_learning_rate(tmp_path: Path) -> None:
    loss, steps = {"adversarial": 0.1}, {**TRAINER, "max_steps": 2}
    config = first_stage_config(training_images(tmp_path), tmp_path / "logs", loss=loss, trainer=steps)
    assert run_script("train_first_stage.py", "--base", write_yaml(tmp_path / "vq.yaml", config)) == 0
    run, words = tmp_path / "logs" / "vq", ("trainer.max_steps=3", "trainer.learning_rate=1e-5")
    assert run_script("train_first_stage.py", "--resume", run, *words) == 0
    saved = torch.load(run / "checkpoints" / "step=00000003.ckpt", weights_only=True)
    (stage,), (critic,) = (state["param_groups"] for state in saved["optimizer_states"])
    assert stage["lr"] == pytest.approx(1e-5 * warmup_cosine(2, 3)) and critic["lr"] == 1e-5 / 4


def test_training_a_first_stage_raises_its_psnr(tmp_path: Path) -> None:
    data = training_images(tmp_path)
    sections = {"trainer": {"max_steps": 60, "learning_rate": 2e-3}, "codebook": {"continuous_steps": 20}}
    sections["logging"] = {"save_every": 1000}
    base = write_yaml(tmp_path / "vq.yaml", first_stage_config(data, tmp_path / "logs", **sections))
    assert run_script("train_first_stage.py", "--base", base) == 0
    images = torch.from_numpy(np.load(data)["arr_0"])
    trained = held_out_psnr(FirstStageSource(tmp_path / "logs" / "vq" / "first_stage").codec().autoencoder, images)
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


def test_a_large_codebook_starts_from_more_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {"codebook": {"continuous_steps": 22}, "trainer": {"max_steps": 23}}
    base = write_yaml(
        tmp_path / "vq.yaml", first_stage_config(training_images(tmp_path), tmp_path / "logs", **sections)
    )
    sizes = ("data.batch_size=1", "data.held_out=null")  # 64 latents in a batch
    codes = "first_stage.params.n_embed="
    code = run_script("train_first_stage.py", "--base", base, *sizes, f"{codes}1409")
    assert_one_error_line(capsys, code, ("error: first_stage.params.n_embed: 1409", "have 1408", "to 23 or more"))
    assert run_script("train_first_stage.py", "--base", base, *sizes, f"{codes}1408") == 0  # 16 batches have 1024


def test_what_does_not_begin_within_the_steps_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = {"adversarial": 0.1, "adversarial_start": 3}
    codebook, steps = {"continuous_steps": 3, "restart_every": 8}, {**TRAINER, "max_steps": 3}
    config = first_stage_config(
        training_images(tmp_path), tmp_path / "logs", loss=loss, codebook=codebook, trainer=steps
    )
    base = write_yaml(tmp_path / "vq.yaml", config)
    assert run_script("train_first_stage.py", "--base", base) == 0
    said = capsys.readouterr().err
    for key in (
        "codebook.continuous_steps: the first 3 steps",
        "loss.adversarial_start: 3 is",
        "codebook.restart_every: ",
    ):
        assert said.count(key) == 1
    card = (tmp_path / "logs" / "vq" / "first_stage" / "config.yaml").read_text()
    assert "codebook: not trained" in card
    longer = ("trainer.max_steps=12", "logging.name=longer")
    assert run_script("train_first_stage.py", "--base", base, *longer) == 0
    said = capsys.readouterr().err
    assert "has no effect" not in said and "not quantise" not in said and "restart_every" not in said
    card = (tmp_path / "logs" / "longer" / "first_stage" / "config.yaml").read_text()
    assert "not trained" not in card


def test_unused_codes_are_logged_in_the_rows_of_the_steps_that_count_them(tmp_path: Path) -> None:
    config = first_stage_config(
        training_images(tmp_path),
        tmp_path / "logs",
        trainer={"max_steps": 16},
        codebook={"restart_every": 4},
        logging={"log_every": 1},
    )
    assert run_script("train_first_stage.py", "--base", write_yaml(tmp_path / "vq.yaml", config)) == 0
    rows = table(tmp_path / "logs" / "vq" / "metrics.csv")
    assert [row["step"] for row in rows if row.get("dead_codes")] == ["5", "9"]  # of those that are below 0.7 * 16


def test_unused_codes_move_to_latents_and_used_ones_stay(tmp_path: Path) -> None:
    module, latents = first_stage_module(tmp_path), torch.randn(1, 3, 8, 8)
    codes = module.vq.quantize.embedding.weight
    used = codes[7].clone()
    module._restart_dead_codes(latents, torch.zeros_like(latents), torch.full((64,), 7), step=4)
    assert torch.equal(codes[7], used)
    is_latent = (codes[:, None] == as_vectors(latents)[None]).all(2).any(1)
    assert not is_latent[7] and is_latent.sum() == 63


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


@pytest.mark.parametrize(
    "override",
    [
        "logging.sample_every=1",
        "logging.sample_count=3",
        "logging.sample_steps=3",
        "trainer.weight_decay=0.1",
        "loss.adversarial_start=5",
        "loss.perceptual_backbone=vgg16.pth",
    ],
)
def test_a_key_without_effect_is_refused(override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_yaml(tmp_path / "vq.yaml", first_stage_config(tmp_path / "no-images", tmp_path / "logs"))
    code = run_script("train_first_stage.py", "--base", base, override)
    assert_one_error_line(capsys, code, (f"error: {override.partition('=')[0]}: ", "remove the key"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.image_size=31",), "31 is not a multiple of 4, "),
        (("data.image_size=1",), "; take 4"),
        (("data.image_size=8", "loss.adversarial=0.1"), "8 is too small for loss.adversarial, which takes 12 or more"),
    ],
)
def test_a_side_that_does_not_fit_is_refused_before_images_are_read(
    overrides: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_yaml(tmp_path / "vq.yaml", first_stage_config(tmp_path / "no-images", tmp_path / "logs"))
    code = run_script("train_first_stage.py", "--base", base, *overrides)
    assert_one_error_line(capsys, code, ("error: data.image_size: ", words))


def test_the_smallest_side_of_the_adversarial_term() -> None:
    critic = Discriminator(3)
    assert critic.discriminator_loss(*torch.zeros(2, 2, 3, 12, 12)).isfinite()
    with pytest.raises(RuntimeError):
        critic.discriminator_loss(*torch.zeros(2, 2, 3, 11, 11))
