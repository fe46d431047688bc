"""The inspector: what it tells of files and folders, and what it refuses."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save

from tests.cli import run_script, write_yaml
from tests.test_corpus import CORPUS, unet, zipped


@pytest.mark.parametrize("name", ["system_zip.ckpt", "half.ckpt", "opt010000.pt", "lora.safetensors", "empty.ckpt"])
def test_the_inspector_refuses_in_one_line_too(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    path.write_bytes(CORPUS[name][0](marker))
    assert run_script("inspect_checkpoint.py", path) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not marker.exists()


def test_the_inspector_tells_a_folder(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("convert.py", teacher_folder, tmp_path / "pipeline", "--to", "diffusers") == 0
    for folder, words in ((teacher_folder, "model folder"), (tmp_path / "pipeline", "diffusers folder")):
        assert run_script("inspect_checkpoint.py", folder) == 0
        assert words in capsys.readouterr().out
    assert run_script("inspect_checkpoint.py", tmp_path) == 2
    assert run_script("inspect_checkpoint.py", tmp_path / "absent") == 2


@pytest.mark.parametrize(
    ("other", "words"), [("image_size=8", "hints are for the commands that open it"), ("b.pt", "one PATH a call")]
)
def test_the_inspector_takes_a_path_alone(
    other: str, words: str, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("inspect_checkpoint.py", teacher_folder, other) == 2
    assert f"{other}: not an argument of inspect; " in (line := capsys.readouterr().err) and words in line


def test_the_inspector_tells_a_run_by_its_student_and_a_first_stage(
    teacher_folder: Path, first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teacher_folder, tmp_path / "run" / "student")
    write_yaml(tmp_path / "run" / "config.yaml", {"trainer": {}})
    found = []
    for folder in (tmp_path / "run", tmp_path / "run" / "student"):
        assert run_script("inspect_checkpoint.py", folder) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert run_script("inspect_checkpoint.py", first_stage) == 0
    report = capsys.readouterr().out
    assert "first-stage folder" in report and "VQModel" in report and "0.5" in report
    assert run_script("inspect_checkpoint.py", first_stage, "--config") == 0
    assert capsys.readouterr().out == f"first_stage:\n  ckpt: {first_stage}\n"


def test_the_inspector_believes_what_describes_itself(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = tmp_path / "model.safetensors"
    assert run_script("convert.py", teacher_folder, described, "--to", "safetensors") == 0
    capsys.readouterr()
    assert run_script("inspect_checkpoint.py", described) == 0
    report = capsys.readouterr().out
    assert "describe themselves" in report and "num_head_channels 32" in report and "latent space" in report
    for path in (described, teacher_folder):
        assert run_script("inspect_checkpoint.py", path, "--config") == 0
        assert capsys.readouterr().out == f"teacher:\n  ckpt: {path}\n"


@pytest.mark.parametrize("damage", ["interpolation", "metadata"])
def test_a_description_is_plain_values(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path
    if damage == "interpolation":
        (tmp_path / "config.yaml").write_text("weights: ${oc.env:HOME}\n")
    else:
        path = tmp_path / "deep.safetensors"
        told = {"target": "ldm_dkdm.networks.UNet", "parameterization": "eps", "params": "[" * 200_000}
        path.write_bytes(save(unet(), metadata=told))
    assert run_script("inspect_checkpoint.py", path) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line and os.environ["HOME"] not in line.replace(str(path), "")


def test_the_inspector_tells_a_good_file_and_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pt").write_bytes(zipped({"state_dict": unet()}))
    assert run_script("inspect_checkpoint.py", tmp_path / "model.pt") == 0
    report = capsys.readouterr().out
    count = sum(value.numel() for value in unet().values())
    for words in (
        "guided-diffusion",
        f"{count / 1e6:.6f} M parameters",
        "model_channels 32",
        "use_new_attention_order",
    ):
        assert words in report
    assert run_script("inspect_checkpoint.py", tmp_path / "model.pt", "--config") == 0
    assert "image_size: ???" in capsys.readouterr().out
