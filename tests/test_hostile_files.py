"""Checkpoint files that lie, break off, or want to run code."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints import read_tensors


class RunsCode:
    """Unpickling it writes the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_tensors(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def _save(content: object, path: Path, layout: str) -> None:
    if layout == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
def test_a_file_that_wants_to_run_code_is_refused(tmp_path: Path, layout: str, name: str) -> None:
    marker = tmp_path / "marker"
    content = {"state_dict": {"a": torch.zeros(2)}, "callbacks": RunsCode(marker)}
    _save(content, tmp_path / name, layout)
    assert _refusal(tmp_path / name)
    assert not marker.exists()


def test_the_hostile_file_would_run_where_pickle_is_trusted(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html><body>404</body></html>", b"PK\x03\x04 no zip"])
def test_a_download_gone_wrong_is_one_line_that_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert _refusal(tmp_path / name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_a_file_that_breaks_off_is_refused(tmp_path: Path, layout: str, share: float) -> None:
    path = tmp_path / "model.ckpt"
    _save({"a": torch.zeros(500)}, path, layout)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert _refusal(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such" in _refusal(tmp_path / "absent.ckpt")
    assert "no such" in _refusal(tmp_path)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {"state_dict": {"a": 1}}, {"state_dict": [1]}])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    assert _refusal(tmp_path / "model.ckpt")


@settings(deadline=None, max_examples=200, derandomize=True)
@given(content=st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(lambda tail: b"\x80\x02" + tail)))
def test_noise_is_refused_like_any_other_damage(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.ckpt"
    path.write_bytes(content)
    assert _refusal(path)


@pytest.mark.parametrize("layout", ["torch", 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["?", "u1", "<i2", ">i4", "<i8", "<f2", "<f4", ">f8"])
def test_arrays_are_read_as_numpy_would(tmp_path: Path, kind: str, layout: str | int) -> None:
    array = np.random.default_rng(0).integers(0, 2, (3, 1, 4)).astype(kind)
    content = {"c": array, "f": np.asfortranarray(array), "scalar": array[0, 0, 0]}
    path = tmp_path / "cache.pkl"
    if layout == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, layout))
    found = read_tensors(path)
    assert set(found) == {"c", "f"}
    for tensor in found.values():
        assert tensor.numpy().dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("kind", ["O", "U4", "M8[s]", "c8", "f4,i4"])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps({"total_t": np.zeros(2, kind)}))
    assert "not a numeric type" in _refusal(tmp_path / "cache.pkl")
