"""Files that are missing, damaged or do not fit: one line that names the file, exit code 2, nothing written."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints.model_folder import write_folder
from ldm_dkdm.config.schema import FirstStageCard
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import UNet
from tests.cli import ROOT, contents, distil, run_script, sample, write_yaml
from tests.parts import UNET_PARAMS, VQ_PARAMS, distill_config
from tests.test_config_errors import assert_one_error_line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1,\n b: }", ("bad.yaml", "not valid YAML")),
        ("- teacher\n- student\n", ("bad.yaml", "mapping of sections")),
        ("a: ${b", ("bad.yaml",)),
        ("only words", ("only words: unknown key",)),
        ("", ("teacher: missing",)),
    ],
)
def test_a_config_file_must_be_a_mapping_of_sections(text: str, words: tuple[str, ...], tmp_path: Path, capsys) -> None:
    base = tmp_path / "bad.yaml"
    base.write_text(text)
    assert_one_error_line(capsys, distil("--base", base), words)


@pytest.mark.parametrize(("name", "release"), [("ffhq256", "ffhq.zip"), ("celebahq256", "celeba.zip")])
def test_a_missing_release_says_what_to_download_and_where_to_put_it(
    name: str, release: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = distil("--base", ROOT / "configs" / f"{name}.yaml")
    assert_one_error_line(capsys, code, ("teacher.ckpt", f"models/ldm/{name}/model.ckpt", release, "download"))
    assert not contents(tmp_path)


def test_a_teacher_that_is_a_text_file_is_refused(tmp_path: Path, capsys) -> None:
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_text("<html>404</html>\n")
    config = distill_config(checkpoint, tmp_path / "logs", diffusion={"num_timesteps": 20})
    config["teacher"] |= {"target": "ldm_dkdm.networks.UNet", "params": UNET_PARAMS}
    code = distil("--base", write_yaml(tmp_path / "c.yaml", config))
    assert_one_error_line(capsys, code, ("teacher.ckpt: ", str(checkpoint)))
    assert not (tmp_path / "logs").exists()


def test_a_folder_of_another_kind_is_named_as_that(
    first_stage: Path, teacher_folder: Path, tmp_path: Path, capsys
) -> None:
    assert_one_error_line(capsys, sample("-r", first_stage), (str(first_stage), "is a first-stage folder"))
    base = write_yaml(tmp_path / "c.yaml", distill_config(first_stage, tmp_path / "logs"))
    assert_one_error_line(capsys, distil("--base", base), (str(first_stage), "is a first-stage folder"))
    wrong = distill_config(teacher_folder, tmp_path / "logs", first_stage={"ckpt": str(teacher_folder)})
    code = distil("--base", write_yaml(tmp_path / "c.yaml", wrong))
    assert_one_error_line(capsys, code, (str(teacher_folder), "not a first-stage folder"))


@pytest.mark.parametrize("what", ["weights", "config.yaml"])
def test_a_teacher_folder_must_be_whole(what: str, teacher_folder: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "half")
    (folder / ("model.safetensors" if what == "weights" else what)).unlink()
    base = write_yaml(tmp_path / "c.yaml", distill_config(folder, tmp_path / "logs"))
    assert_one_error_line(capsys, distil("--base", base), (str(folder), "missing"))
    assert not (tmp_path / "logs").exists()


def test_a_first_stage_of_other_latents_is_refused(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    params = {**VQ_PARAMS, "embed_dim": 4}
    card = FirstStageCard("model.safetensors", "ldm_dkdm.first_stage.VQModel", params)
    write_folder(tmp_path / "vq", card, VQModel(**params).state_dict())
    config = distill_config(teacher_folder, tmp_path / "logs", first_stage={"ckpt": str(tmp_path / "vq")})
    code = distil("--base", write_yaml(tmp_path / "c.yaml", config))
    assert_one_error_line(capsys, code, ("first_stage", "4 latent channels", "3"))
    assert not (tmp_path / "logs").exists()


def test_a_run_folder_of_another_configuration_is_left_alone(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    base = write_yaml(tmp_path / "c.yaml", distill_config(teacher_folder, tmp_path / "logs"))
    write_yaml(tmp_path / "logs" / "run" / "config.yaml", {"made": "by another configuration"})
    before = contents(tmp_path)
    code = distil("--base", base)
    assert_one_error_line(capsys, code, (str(tmp_path / "logs" / "run"), "logging.name", "--resume"))
    assert contents(tmp_path) == before


SAMPLING = {
    "no_images": (["-r", "TEACHER", "-n", "0"], ("--n_samples", "0")),
    "no_steps": (["-r", "TEACHER", "-c", "0"], ("--custom_steps", "0")),
    "steps_beyond_T": (["-r", "TEACHER", "-n", "1", "-c", "21"], ("21", "20")),
    "eta": (["-r", "TEACHER", "-c", "2", "-e", "2"], ("--eta", "2")),
    "eta_not_a_number": (["-r", "TEACHER", "-c", "2", "-e", "nan"], ("--eta", "nan")),
    "seed": (["-r", "TEACHER", "-c", "2", "--seed", "-1"], ("--seed", "-1")),
    "device": (["-r", "TEACHER", "-n", "1", "-c", "2", "--device", "abacus"], ("--device", "abacus")),
    "no_model": (["-r", "nowhere"], ("nowhere",)),
    "no_weights": (["-r", "HALF"], ("half", "no weights")),
    "run_without_student": (["-r", "EMPTY_RUN"], ("empty_run", "--resume")),
}


@pytest.mark.parametrize(("arguments", "words"), SAMPLING.values(), ids=SAMPLING)
def test_bad_sampling_is_named_in_one_line_and_nothing_is_written(
    arguments, words, teacher_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    half = shutil.copytree(teacher_folder, tmp_path / "half")
    (half / "model.safetensors").unlink()
    run = tmp_path / "empty_run"
    write_yaml(run / "config.yaml", distill_config(teacher_folder, tmp_path))
    (run / "checkpoints").mkdir()
    places = {"TEACHER": teacher_folder, "HALF": half, "EMPTY_RUN": run}
    before = contents(tmp_path)
    code = sample(*[places.get(a, a) for a in arguments], "-l", tmp_path / "out")
    assert_one_error_line(capsys, code, words)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def write_latents(name: str, folder: Path) -> Path:
    path = folder / name
    if name == "flat.npz":
        np.savez(path, arr_0=np.zeros((3, 8, 8), np.float32))
    elif name == "channels.safetensors":
        save_file({"latents": torch.zeros(1, 4, 8, 8)}, path)
    elif name == "two.safetensors":
        save_file({"a": torch.zeros(1, 3, 8, 8), "b": torch.zeros(1)}, path)
    elif name == "array.npz":
        with path.open("wb") as file:
            np.save(file, np.zeros((1, 3, 8, 8), np.float32))
    elif name == "text.npz":
        path.write_text("no archive")
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.npz", ("no such file",)),
        ("missing.pt", ("no such",)),
        ("flat.npz", ("(3, 8, 8)",)),
        ("channels.safetensors", ("4 channels", "3")),
        ("two.safetensors", ("a, b",)),
        ("array.npz", ("not an .npz",)),
        ("text.npz", ("not an .npz",)),
    ],
)
def test_bad_latents_are_named_in_one_line_and_nothing_is_written(
    name: str, words: tuple[str, ...], first_stage: Path, tmp_path: Path, capsys
) -> None:
    path, out = write_latents(name, tmp_path), tmp_path / "out"
    code = run_script("decode_latents.py", path, "--first_stage", first_stage, "-o", out)
    assert_one_error_line(capsys, code, (name, *words))
    assert not out.exists()


def test_a_place_for_images_that_is_a_file_is_refused_before_latents_are_read(
    first_stage: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").write_text("kept")
    latents = [tmp_path / "missing.npz", "--first_stage", first_stage]
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/dev/null")):
        code = run_script("decode_latents.py", *latents, "-o", place)
        assert_one_error_line(capsys, code, ("--out: ", "is a file; name a folder"))
    assert (tmp_path / "file").read_text() == "kept"


def state() -> dict[str, torch.Tensor]:
    return UNet(**UNET_PARAMS).state_dict()


def persistent(path: Path) -> None:
    """Write what NVIDIA's code writes: an object that a function of its own would rebuild from source."""
    named = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    path.write_bytes(b"\x80\x02}X\x03\x00\x00\x00ema" + named + b"}\x85Rs.")


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "protocol_4": (
        lambda path: torch.save(state(), path, pickle_protocol=4),
        r"its pickle has protocol 4, and only torch\.save's default, 2, is read; save it again: torch\.save\(",
    ),
    "legacy_protocol_3": (
        lambda path: torch.save(state(), path, pickle_protocol=3, _use_new_zipfile_serialization=False),
        r"legacy format with pickle protocol 3, and only the default, 2, is read; save it again: torch\.save\(",
    ),
    "pickle_dump": (
        lambda path: path.write_bytes(pickle.dumps(state())),
        r"holds PyTorch's tensors, pickled without torch\.save; write it with torch\.save\(",
    ),
    "module": (
        lambda path: torch.save({"model": UNet(**UNET_PARAMS)}, path),
        r"holds an object of .*UNet under 'model', whose code would have to run; save its state_dict\(\)",
    ),
    "edm": (persistent, r"network of NVIDIA's EDM or StyleGAN code .* is not supported either: name a model of"),
}


@pytest.mark.parametrize(("write", "words"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_is_not_read_says_what_to_save(
    write: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt: .*{words}"):
        load_model(tmp_path / "a.pt")


PLACES: dict[str, tuple[tuple[str, ...], str]] = {  # files in a folder, and what its message ends with
    "guided_diffusion": (
        ("model010000.pt", "ema_0.9999_010000.pt", "opt010000.pt"),
        r"name a checkpoint in it: ema_0\.9999_010000\.pt, model010000\.pt$",
    ),
    "checkpoints": (("step=00000008.ckpt", "step=00000008.pool-rank0.safetensors"), "one of them: step=00000008.ckpt$"),
    "deepspeed": (("latest", "global_step9/mp_rank_00_model_states.pt"), "is a DeepSpeed checkpoint; its zero_to_fp32"),
    "dcp": ((".metadata", "__0_0.distcp"), "is a checkpoint of torch.distributed.checkpoint; `python -m torch.dist"),
    "repository": (("README.md", "pipeline/model_index.json"), "but holds a pipeline; name .*place/pipeline$"),
    "cache": (("snapshots/abc/model_index.json",), "is a folder of the Hub's cache; name .*place/snapshots/abc$"),
}


@pytest.mark.parametrize(("files", "words"), PLACES.values(), ids=PLACES)
def test_a_folder_of_another_code_says_what_to_name(files: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / "place" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "place" / name).write_text("{}")
    with pytest.raises(UserError, match=f"place: .*{words}"):
        load_model(tmp_path / "place")


def test_an_address_is_refused_with_how_to_download_it(capsys) -> None:
    for address, advice in (
        ("https://huggingface.co/google/ddpm-cifar10-32/tree/main", "`hf download google/ddpm-cifar10-32`, then name"),
        ("https://example.org/model.ckpt", "download it and name the file"),
    ):
        assert_one_error_line(capsys, sample("-r", address, "-n", 1), (f"{address}: is an address", advice))
        assert_one_error_line(capsys, run_script("inspect_checkpoint.py", address), (address, advice))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xfd7zXZ\0\0\4", "is an xz archive; unpack it first"),
        (b"\x28\xb5\x2f\xfd", "is a zstd archive; unpack it first"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "is a web page saved as a checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(content + bytes(99))
    with pytest.raises(UserError, match=f"a.ckpt: {words}"):
        load_model(tmp_path / "a.ckpt")
