"""Fixtures: model folders that are made once a session."""

from pathlib import Path

import pytest
import torch

from tests.parts import first_stage_folder, model_folder


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_stage_folder(tmp_path_factory.mktemp("models") / "vq")


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, first_stage: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "teacher", first_stage)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
