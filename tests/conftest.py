"""Fixtures: model folders that are made once a session."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch import Tensor

from ldm_dkdm.commands import evaluate
from ldm_dkdm.evaluation import agreement
from tests.cli import run_script
from tests.digits import train
from tests.parts import first_stage_folder, model_folder
from tests.prepared import end_what_is_left

LONGEST = {
    "test_benchmarks",
    "test_distributed",
    "test_docs",
    "test_first_stage_training",
    "test_fuzzed_files",
    "test_hostile_content",
    "test_ranks",
    "test_wheel",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker begins one of them when the others are done."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_stage_folder(tmp_path_factory.mktemp("models") / "vq")


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, first_stage: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "teacher", first_stage)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as an .npz with labels."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    assert run_script("prepare_digits.py", path) == 0
    return path


@pytest.fixture(scope="session")
def digits_teacher(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pixel teacher with a learned variance."""
    home = tmp_path_factory.mktemp("teacher")
    assert train(home, "teacher", {"path": str(digits)}, trainer={"max_steps": 60}) == 0
    return home / "teacher" / "model"


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make measurements of the agreement quick: 3 images of 2 steps."""
    monkeypatch.setattr(agreement, "TRAINING", agreement.Sizes(chains=4, images=3, steps=2))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that are made before a test's own cache is set keep out of the user's too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DKDM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    end_what_is_left()


@pytest.fixture(autouse=True)
def _results(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of `dkdm evaluate` stay out of the working folder, statistics out of the user's cache."""
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path_factory.getbasetemp() / "results.csv")
    monkeypatch.setenv("LDM_DKDM_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid4().hex}"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Replays(list[int]):
    """Rows of every replay; `training`: how many of them had gradients."""

    training = 0


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    """Rows of every replay, once `torch.compile` makes calls that overwrite what all of them have made.

    These are outputs, and the gradients of the networks: torch's graphs share their memory.
    """
    rows = Replays()
    outputs: list[Tensor] = []
    networks: list[torch.nn.Module] = []

    def overwriting(call: Callable[..., Tensor], *, dynamic: bool, mode: str) -> Callable[..., Tensor]:
        assert mode == "reduce-overhead" and not dynamic
        networks.append(call.__self__)  # type: ignore[attr-defined]

        def replay(*args: Any) -> Tensor:
            weights = [weight for network in networks for weight in network.parameters()]
            for tensor in [*outputs, *(weight.grad for weight in weights if weight.grad is not None)]:
                tensor.detach().fill_(torch.nan)
            output = call(*args)
            rows.append(len(output))
            rows.training += torch.is_grad_enabled()
            outputs[:] = [output]
            return output

        return replay

    monkeypatch.setattr(torch, "compile", overwriting)
    return rows
