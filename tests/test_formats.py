"""Formats: whatever is written opens again, every command takes every format, and one more needs the table alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, load_model
from ldm_dkdm.checkpoints import FORMATS, Contents, Source, read_tensors, reading, source
from ldm_dkdm.checkpoints.writing import SavedModel
from ldm_dkdm.files import write_tensors
from ldm_dkdm.networks import DiT, UNet
from tests.cli import run_script, sample
from tests.parts import UNET_PARAMS, randomised

HEADS = {"image_size": 8, "num_head_channels": 32}
COSINE = {"schedule": "cosine", "num_timesteps": 20}
DIT = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2}
ODD = torch.linspace(0.05, 0.4, 20, dtype=torch.float64).sqrt() ** 3  # betas of no named schedule


def pixel_model(network: torch.nn.Module) -> DiffusionModel:
    return DiffusionModel(network, schedule=NoiseSchedule("cosine", 20), space="pixel")


def written(format: str, latent: Path, folder: Path) -> tuple[DiffusionModel, Path, dict[str, Any]]:
    """A model, the file or folder of a format that holds it, and the hints that this needs."""
    if format == "adm":
        unet = UNet(**UNET_PARAMS, use_new_attention_order=True, num_classes=5)
        model, hints = pixel_model(randomised(unet)), {**HEADS, **COSINE, "use_new_attention_order": True}
    elif format == "dit":
        model, hints = pixel_model(randomised(DiT(**DIT))), {"num_heads": 2, **COSINE}
    else:
        model, hints = load_model(latent), HEADS if format == "compvis" else {}
    return model, model.save(folder / f"model.{format}", format), hints


def same_weights(first: DiffusionModel, second: DiffusionModel) -> bool:
    own, other = first.network.state_dict(), second.network.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def same_tensors(first: Path, second: Path) -> bool:
    own, other = read_tensors(first), read_tensors(second)
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "checkpoint"])
def test_what_is_written_opens_again_with_the_same_weights(format: str, teacher_folder: Path, tmp_path: Path) -> None:
    model, path, hints = written(format, teacher_folder, tmp_path)
    back = load_model(path, **hints)
    assert back.format == FORMATS[format].NAME and same_weights(model, back)
    assert (back.shape, back.parameterization, back.diffusion) == (model.shape, "eps", model.diffusion)
    assert (back.num_classes, back.null_label) == (model.num_classes, model.null_label)
    if model.space.encoded and format != "safetensors":  # which does not say where its first stage lies
        first, second = (one.codec() for one in (model, back))
        stages = [codec.autoencoder.state_dict() for codec in (first, second)]
        assert first.scale_factor == second.scale_factor == 0.5
        assert all(torch.equal(stages[0][name], stages[1][name]) for name in stages[0])


def convert(*arguments: object) -> int:
    return run_script("convert.py", *arguments)


@pytest.mark.parametrize("format", ["diffusers", "folder"])
def test_compvis_to_another_format_and_back_is_bit_for_bit(format: str, teacher_folder: Path, tmp_path: Path) -> None:
    first, folder, second = tmp_path / "first.ckpt", tmp_path / "between", tmp_path / "second.ckpt"
    load_model(teacher_folder).save(first, "compvis")
    assert convert(first, folder, "--to", format, "image_size=8", "num_head_channels=32") == 0
    assert convert(folder, second, "--to", "compvis") == 0
    assert same_tensors(first, second)


@pytest.mark.parametrize("new_order", [True, False])
def test_adm_to_diffusers_and_back_is_bit_for_bit(new_order: bool, tmp_path: Path) -> None:
    first, folder, second = tmp_path / "first.pt", tmp_path / "pipeline", tmp_path / "second.pt"
    unet = randomised(UNet(**UNET_PARAMS, use_new_attention_order=new_order))
    pixel_model(unet).save(first, "adm")
    hints = [*words({**HEADS, **COSINE}), f"use_new_attention_order={new_order}"]
    assert convert(first, folder, *hints, "--to", "diffusers") == 0
    assert convert(folder, second, "--to", "adm") == 0
    assert same_tensors(first, second)
    assert load_model(folder).node.params.get("use_new_attention_order", False) is new_order


@pytest.mark.parametrize("place", range(5))
def test_hints_stand_anywhere_on_the_command_line(place: int, teacher_folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "model.ckpt", tmp_path / "out.safetensors"
    load_model(teacher_folder).save(file, "compvis")
    arguments = [file, out, *words(HEADS)]
    arguments[place:place] = ["--to", "safetensors"]
    assert convert(*arguments) == 0
    assert same_weights(load_model(out), load_model(teacher_folder))


@pytest.mark.parametrize("command", ["convert.py", "evaluate.py"])
def test_a_word_too_many_is_refused(
    command: str, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("-r", teacher_folder) if command == "evaluate.py" else (teacher_folder, tmp_path / "out", "--to", "folder")
    assert run_script(command, *own, "third") == 2
    assert "'third': one argument too many" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def words(hints: dict[str, Any]) -> list[str]:
    """Hints as a command line gives them."""
    return [f"{key}={value}" for key, value in hints.items()]


# A format added to the table


def toy_format() -> SimpleNamespace:
    """One safetensors file that names its kind, with a prefix before every tensor."""

    def recognises(found: Source) -> bool:
        return found.metadata.get("kind") == "toy"

    def read(found: Source) -> Contents:
        return Contents(
            path=found.path,
            file=found.path,
            format="toy",
            target="ldm_dkdm.networks.UNet",
            params={**UNET_PARAMS},
            raw={name.removeprefix("toy."): tensor for name, tensor in found.tensors.items()},
            diffusion=pixel_model(UNet(**UNET_PARAMS)).diffusion,
            described=True,
        )

    def write(model: SavedModel, path: Path) -> None:
        tensors = {f"toy.{name}": tensor for name, tensor in model.network.state_dict().items()}
        write_tensors(path, tensors, {"kind": "toy"})

    return SimpleNamespace(NAME="toy", recognises=recognises, read=read, write=write)


def test_a_format_needs_no_more_than_its_place_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, out = tmp_path / "first.safetensors", tmp_path / "second.toy", tmp_path / "out"
    model = pixel_model(randomised(UNet(**UNET_PARAMS)))
    model.save(first, "safetensors")
    assert convert(first, second, "--to", "toy") == 2
    monkeypatch.setitem(FORMATS, "toy", toy_format())
    assert convert(first, second, "--to", "toy") == 0
    back = load_model(second)
    assert back.format == "toy" and same_weights(model, back)
    assert all(name.startswith("toy.") for name in read_tensors(second))
    assert sample("-r", second, "-n", 2, "-c", 3, "--npz", "-l", out, "--precision", "32") == 0
    assert np.array_equal(np.load(out / "samples.npz")["arr_0"], model.sample(2, steps=3).numpy())
    assert run_script("inspect_checkpoint.py", second) == 0
    assert convert(second, tmp_path / "third.pt", "--to", "adm") == 0
    assert same_tensors(first, tmp_path / "third.pt")


# A schedule without a name


def test_a_schedule_without_a_name_survives_compvis_and_diffusers(teacher_folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.ckpt" for name in ("first", "second")]
    own = load_model(teacher_folder)
    odd = DiffusionModel(own.network, like=own, schedule=NoiseSchedule(betas=ODD))
    odd.save(files[0], "compvis")
    model = load_model(files[0], **HEADS)
    assert model.schedule.name == "betas" and model.schedule.num_timesteps == 20
    torch.testing.assert_close(model.schedule.betas, odd.schedule.betas, rtol=1e-5, atol=0)
    drawn, wanted = (one.sample(2, steps=5).int() for one in (model, odd))
    assert (drawn - wanted).abs().max() <= 1 and drawn.float().std() > 1
    assert sample("-r", files[0], "-n", 1, "-c", 3, "-l", tmp_path / "out", *words(HEADS)) == 0
    assert convert(files[0], tmp_path / "pipeline", "--to", "diffusers", *words(HEADS)) == 0
    scheduler = Source(tmp_path / "pipeline").json("scheduler", "scheduler_config.json")
    assert scheduler["trained_betas"] == model.schedule.betas.tolist() and scheduler["num_train_timesteps"] == 20
    assert convert(tmp_path / "pipeline", files[1], "--to", "compvis") == 0
    first, second = (read_tensors(file) for file in files)
    assert torch.equal(first["alphas_cumprod"], second["alphas_cumprod"])
    assert same_weights(load_model(files[1], **HEADS), own)


@pytest.mark.parametrize("format", ["folder", "safetensors"])
def test_betas_of_one_s_own_come_back_exactly(format: str, tmp_path: Path) -> None:
    network = randomised(UNet(**UNET_PARAMS))
    model = DiffusionModel(network, schedule=NoiseSchedule(betas=ODD), space="pixel")
    back = load_model(model.save(tmp_path / "model", format))
    assert torch.equal(back.schedule.betas, ODD) and torch.equal(back.sample(2, steps=3), model.sample(2, steps=3))


# A file is read once


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose tensors are read, one entry each time."""
    files: list[Path] = []
    read = reading.read_content

    def counted(path: Path) -> Any:
        files.append(path)
        return read(path)

    for module in (reading, source):
        monkeypatch.setattr(module, "read_content", counted)
    return files


def test_a_compvis_file_is_read_once_with_the_first_stage_in_it(
    teacher_folder: Path, tmp_path: Path, opened: list[Path]
) -> None:
    file = load_model(teacher_folder).save(tmp_path / "model.ckpt", "compvis")
    opened.clear()
    model = load_model(file, **HEADS)
    model.sample(1, steps=2)
    assert opened == [file]
    model.save(tmp_path / "pipeline", "diffusers")
    assert opened == [file]


@pytest.mark.parametrize("format", ["folder", "safetensors", "adm", "dit"])
def test_other_files_are_read_once(format: str, teacher_folder: Path, tmp_path: Path, opened: list[Path]) -> None:
    _, path, hints = written(format, teacher_folder, tmp_path)
    opened.clear()
    model = load_model(path, **hints)
    assert opened == [model.file]


def test_a_pipeline_s_components_are_read_once_each(teacher_folder: Path, tmp_path: Path, opened: list[Path]) -> None:
    path = load_model(teacher_folder).save(tmp_path / "pipeline", "diffusers")
    opened.clear()
    load_model(path).sample(1, steps=2)
    assert [file.parent.name for file in opened] == ["unet", "vqvae"]


def test_the_inspector_reads_a_file_once(
    teacher_folder: Path, tmp_path: Path, opened: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = load_model(teacher_folder).save(tmp_path / "model.ckpt", "compvis")
    opened.clear()
    assert run_script("inspect_checkpoint.py", file) == 0
    assert opened == [file] and "scale factor" in capsys.readouterr().out
