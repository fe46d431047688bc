"""Output folders with files of other calls: what of an interrupted one still counts, what is said of the rest."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.commands import drawing
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.networks import UNet
from ldm_dkdm.npz import read_npz
from tests.cli import contents, run_script, sample
from tests.parts import DIFFUSION, UNET_PARAMS, VQ_PARAMS, randomised, write_compvis_checkpoint
from tests.test_ranks import stopping

FEW = ("-n", 6, "-c", 1, "--batch_size", 2, "--device", "cpu", "-l")


@pytest.mark.parametrize("meanwhile", ["removed", "another call's"])
def test_a_batch_whose_images_are_gone_is_drawn_again(
    meanwhile: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert sample("-r", teacher_folder, *FEW, whole) == 0
    batches = drawing.sample_batches
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "sample_batches", lambda *given: stopping(batches(*given), 2))
        with pytest.raises(ZeroDivisionError):
            sample("-r", teacher_folder, *FEW, out)
    if meanwhile == "removed":
        for file in out.iterdir():  # as `rm -r out/*` does
            if not file.name.startswith("."):
                shutil.rmtree(file)
    else:  # the first batch only
        assert sample("-r", teacher_folder, "-n", 2, "-e", 1, *FEW[2:], out) == 0
    capsys.readouterr()
    assert sample("-r", teacher_folder, *FEW, out) == 0
    assert contents(out) == contents(whole)
    left = {"removed": 2, "another call's": 1}[meanwhile]
    lines = capsys.readouterr().out
    assert f"{left} batch{'es' * (left > 1)} of this call must be drawn again" in lines
    assert ("goes on after 1 of 3 batches" in lines) == (left == 1)


def test_batches_that_an_older_version_kept_are_not_drawn_again(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    batches = drawing.sample_batches
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "sample_batches", lambda *given: stopping(batches(*given), 2))
        with pytest.raises(ZeroDivisionError):
            sample("-r", teacher_folder, *FEW, tmp_path / "out")
    for file in (tmp_path / "out").glob(".parts-*/*.safetensors"):
        save_file(load_file(file), file)  # without the hash of the PNG files
    capsys.readouterr()
    assert sample("-r", teacher_folder, *FEW, tmp_path / "out") == 0
    assert "goes on after 2 of 3 batches" in capsys.readouterr().out


def earlier(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is said of earlier calls: the file or folder, and what follows it."""
    lines = [line for line in capsys.readouterr().out.splitlines() if "earlier call" in line]
    return [line.partition(";")[0].rpartition("/")[2] for line in lines]


def test_a_sampling_names_what_earlier_calls_left(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    few = ("-r", teacher_folder, "-c", 1, "--device", "cpu", "-l", tmp_path, "-n")
    assert sample(*few, 2, "--npz", "--latents") == 0
    assert earlier(capsys) == []
    for words, said in (
        ([1, "--npz"], ["img: also holds 1 image", "latents.safetensors: is"]),
        ([2, "--seed", 7, "--latents"], ["img: also holds 2 images", "samples.npz: is"]),
        ([2, "--no_png", "--npz", "--latents"], ["img: also holds 4 images"]),
    ):
        assert sample(*few, *words) == 0
        assert [line.partition(" of ")[0] for line in earlier(capsys)] == said


@pytest.mark.parametrize(("seed", "code"), [(-1, 2), (2**32 - 1, 2), (2**32 - 2, 0)])
def test_seeds_of_all_images_are_below_two_to_the_32(
    seed: int, code: int, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("-r", teacher_folder, "-n", 2, "-c", 1, "--device", "cpu", "-l", tmp_path / "out")
    assert sample(*few, "--seed", seed) == code
    assert ("error: --seed: must be at least 0" in capsys.readouterr().err) == bool(code)


def test_a_decoding_names_what_earlier_calls_left(first_stage: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    for file, count in ((tmp_path / "a.safetensors", 3), (out / "latents.safetensors", 1)):
        save_file({"latents": torch.zeros(count, 3, 8, 8)}, file)
        assert run_script("decode_latents.py", file, "--first_stage", first_stage, "-o", out) == 0
        left = ["img: also holds 2 images of earlier calls, not in samples.npz and latents.safetensors"]
        assert earlier(capsys) == (left if count == 1 else [])
    assert run_script("decode_latents.py", tmp_path / "a.safetensors", "--first_stage", first_stage, "-o", out) == 0
    assert earlier(capsys) == ["latents.safetensors: is of an earlier call"]


def test_images_of_others_in_an_output_folder_are_named(
    teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, few = tmp_path / "out", ("-r", teacher_folder, "-n", 2, "-c", 1, "--device", "cpu", "-l")
    for _ in range(2):  # what the first call wrote is not another's
        assert sample(*few, out, "--compare", out / "both.png") == 0
    assert "other images" not in caplog.text
    assert not [*out.glob(".parts-*")]
    (out / "cats").mkdir()
    shutil.copy(out / "img" / "000000.png", out / "cats" / "mine.png")
    assert sample(*few, out, "--compare", out / "both.png") == 0
    assert f"-l: {out} also holds other images, such as cats/mine.png" in caplog.text


def test_the_same_call_is_not_made_twice_at_once(teacher_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    few, batches, codes = ("-r", teacher_folder, *FEW, tmp_path / "out"), drawing.sample_batches, []

    def meanwhile(*given: object) -> object:
        if not codes:
            codes.append(sample(*few))
        return batches(*given)

    monkeypatch.setattr(drawing, "sample_batches", meanwhile)
    assert sample(*few) == 0
    assert codes == [2] and "another process draws the same images there" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".*"))


@pytest.fixture
def in_a_file(tmp_path: Path) -> tuple[Path, VQModel]:
    """A first stage in a file of CompVis's layout, and its network; 4 x 4 pixels are one position."""
    unet, vq = UNet(**UNET_PARAMS), randomised(VQModel(**VQ_PARAMS))
    return write_compvis_checkpoint(tmp_path / "model.ckpt", unet, vq, schedule_of(DIFFUSION)), vq


@pytest.mark.parametrize("sides", [(8, 8), (80, 1)])
def test_latents_are_decoded_by_a_first_stage_in_a_file(
    sides: tuple[int, int], in_a_file: tuple[Path, VQModel], tmp_path: Path
) -> None:
    latents = torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    out = tmp_path / "out"
    words = (tmp_path / "latents.safetensors", "--first_stage", in_a_file[0], "-o", out, "--scale_factor", 0.5)
    assert run_script("decode_latents.py", *words) == 0
    assert [path.name for path in sorted(out.iterdir())] == ["grid.png", "img", "samples.npz"]
    images = LatentCodec(in_a_file[1], 0.5).decode(latents)
    assert images.unique().numel() > 10 and torch.equal(torch.from_numpy(read_npz(out / "samples.npz")), images)


def test_latents_far_too_large_for_a_first_stage_in_a_file_are_refused(
    in_a_file: tuple[Path, VQModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"latents": torch.zeros(1, 3, 513, 512)}, tmp_path / "latents.safetensors")
    words = (tmp_path / "latents.safetensors", "--first_stage", in_a_file[0], "-o", tmp_path / "out")
    assert run_script("decode_latents.py", *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "latents of 513 x 512, but" in line and "images of 256 x 256, latents of 64 x 64; at most 64 times" in line
