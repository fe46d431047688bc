"""What trainings store beside their weights is read as inert stand-ins; nothing of it runs."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import pathlib
import types
import uuid
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.pickles import read_torch_file
from tests.test_corpus import Call, Hostile

WEIGHTS = {"a": torch.arange(3.0)}
RAN: list[object] = []


class Recorder:
    """A class of the user's own code; making one, or filling one, is recorded."""

    def __init__(self, *args: object) -> None:
        RAN.append(args)

    def __setstate__(self, state: object) -> None:
        RAN.append(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, (1,), {"x": 2}


class OwnDict(dict[str, Any]):
    """A dictionary with attributes, as configuration libraries have them."""


@dataclass
class Options:
    rate: float = 1e-4


class Kind(enum.Enum):
    FIRST = "first"


HARMLESS: dict[str, Any] = {
    "partial": functools.partial(torch.optim.Adam, lr=1e-4),
    "namespaces": (types.SimpleNamespace(rate=1e-4), argparse.Namespace(rate=1e-4)),
    "containers": (deque([1, 2], 5), defaultdict(list, a=[1]), frozenset({1}), collections.Counter("ab"), {1, 2}),
    "times": (datetime.datetime(2024, 1, 2), datetime.timedelta(1), datetime.date(2024, 1, 2)),
    "numbers": (decimal.Decimal("0.1"), complex(1, 2), range(3), slice(1, 2), np.float64(1), np.int64(3)),
    "paths": (pathlib.PurePosixPath("a/b"), uuid.uuid4()),
    "types": [int, float, str, dict, list, torch.optim.AdamW, torch.nn.functional.silu],
    "own": (Options(), Kind.FIRST, Recorder(), Options, {Kind.FIRST: 1}),
    "dictionary": OwnDict(a=1, b=OwnDict()),
    "generator": np.random.RandomState(0).get_state(),
    "random state": np.random.RandomState(0),
    "optimizer": torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).state_dict(),
}


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_lies_beside_the_weights_does_not_matter(name: str, layout: str, tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "hyper_parameters": {"x": HARMLESS[name]}}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=layout == "zip")
    RAN.clear()
    assert torch.equal(read_tensors(tmp_path / "x.ckpt")["a"], WEIGHTS["a"])
    assert RAN == []


def test_a_network_beside_the_weights_does_not_matter_in_a_zip(tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "x": (torch.nn.Linear(2, 2), torch.nn.Linear)}
    torch.save(content, tmp_path / "x.ckpt")
    assert torch.equal(read_tensors(tmp_path / "x.ckpt")["a"], WEIGHTS["a"])
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="holds a network with its source; save its state_dict"):
        read_tensors(tmp_path / "x.ckpt")


def test_a_stand_in_is_not_what_it_stands_for(tmp_path: Path) -> None:
    torch.save({"own": Recorder(), "times": datetime.date(2024, 1, 2), "set": deque([1])}, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert [type(found[key]).__module__ for key in ("own", "times")] == ["ldm_dkdm.checkpoints.pickles"] * 2
    assert found["set"] == [1] and not vars(type(found["own"])).get("x")


def test_weights_in_a_dictionary_of_another_class_are_read(tmp_path: Path) -> None:
    torch.save(OwnDict(state_dict=OwnDict(WEIGHTS)), tmp_path / "x.pt")
    assert torch.equal(read_tensors(tmp_path / "x.pt")["a"], WEIGHTS["a"])
    torch.save({"state_dict": OrderedDict(WEIGHTS)}, tmp_path / "y.pt")
    assert torch.equal(read_tensors(tmp_path / "y.pt")["a"], WEIGHTS["a"])


@pytest.mark.parametrize("call", [eval, exec, compile, __import__, getattr, open, print, bytearray])
def test_functions_of_the_standard_library_are_refused_with_advice(call: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "x": Call(call, "1")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"refused, its pickle asks for .*save its weights alone: torch.save\("):
        read_tensors(tmp_path / "x.pt")


def test_a_hostile_call_inside_a_harmless_object_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for x in (types.SimpleNamespace(x=Hostile(marker)), functools.partial(print, Hostile(marker)), [Hostile(marker)]):
        torch.save({"state_dict": WEIGHTS, "x": x}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"posix\.system"):
            read_tensors(tmp_path / "x.pt")
    assert not marker.exists()


def test_a_whole_network_is_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"an object of torch\.nn\.modules\.linear\.Linear.*save its state_dict\(\)"):
        read_tensors(tmp_path / "x.pt")
