"""Content made to hurt: one line, exit code 2, within 10 s and 2 GB; nothing of it runs or reaches the terminal raw."""

from pathlib import Path

import numpy as np
import pytest

from ldm_dkdm import UserError, npz
from tests import hostile_arrays, hostile_content
from tests.hostile_content import Place
from tests.limited import Outcome, commands, outcomes

CASES = {**hostile_content.CASES, **hostile_arrays.CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    place = Place(tmp_path_factory.mktemp("hostile"))
    lines = [write(place) for write, _ in CASES.values()]
    ended = outcomes(commands, place.path, lines)
    assert not place.marker.exists()
    return dict(zip(CASES, ended, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_each_ends_in_one_line_within_the_limits(name: str, found: dict[str, Outcome]) -> None:
    outcome = found[name]
    assert outcome.kept_the_limits, outcome
    assert outcome.code == 2, outcome.printed[-2000:]
    lines = outcome.printed.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0] == lines[-1], lines
    assert CASES[name][1] in errors[0], errors[0]
    assert len(errors[0]) < 2500 and errors[0].isprintable()


def test_an_array_far_larger_than_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = np.zeros(1 << 20, np.uint8)
    np.savez_compressed(tmp_path / "x.npz", arr_0=zeros)
    assert np.array_equal(npz.read_npz(tmp_path / "x.npz"), zeros)
    monkeypatch.setattr(npz, "SMALL", 1 << 16)
    with pytest.raises(UserError, match=r"a file of \d.* unpacks to 1\.0 MB"):
        npz.read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", [">f4", "<f8", "<f2", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(kind: str, order: str, tmp_path: Path) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 2, (3, 1, 4)), dtype=kind, order=order)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", arr_0=array)
        found = npz.read_npz(tmp_path / "x.npz")
        assert np.array_equal(found, array) and found.dtype.isnative
    assert npz.read_npz(tmp_path / "x.npz", "arr_1") is None
