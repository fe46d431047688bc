"""What results say of their images and models is true, and doubts are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, load_model
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.comparability import doubts
from ldm_dkdm.evaluation.extractor import Extractor
from ldm_dkdm.evaluation.features import FEATURES
from ldm_dkdm.evaluation.gathering import fits
from ldm_dkdm.evaluation.samples import ModelImages, sampled
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.first_stage.codec import TRUNCATED

CONFIG = SamplingConfig(3, 2, 0, 2)


class Half(nn.Module):
    """A network that predicts half of its input."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return x / 2


def on_pixels() -> ModelImages:
    return sampled(DiffusionModel(Half(), schedule=NoiseSchedule(), shape=(3, 8, 8), space="pixel"), CONFIG)


@pytest.mark.parametrize("reference", [{}, {"rounding": None}, {"rounding": TRUNCATED}, {"rounding": "to nearest"}])
def test_samples_that_are_rounded_otherwise_than_adms_are_doubted(reference: dict[str, object]) -> None:
    facts = on_pixels().facts()
    assert facts["rounding"] == "to nearest"
    (doubt,) = doubts(facts, reference, ["kid"])
    assert "8-bit rounding: samples to nearest, published ones truncated, as ADM" in doubt
    assert doubt.endswith(f"reference {reference.get('rounding') or 'unknown'}")


def test_decoded_latents_are_truncated_as_adms(teacher_folder: Path) -> None:
    facts = sampled(load_model(teacher_folder), CONFIG).facts()
    assert facts["rounding"] == TRUNCATED
    assert not doubts(facts, {}, ["kid"]) and not doubts(facts, {"rounding": TRUNCATED}, ["kid"])
    assert doubts(facts, {"rounding": "to nearest"}, ["kid"])


@pytest.mark.parametrize(
    ("name", "sha256", "features", "fitting"),
    [
        ("inception", FEATURES["inception"].pinned, 2048, True),
        ("inception", "1" * 64, 2048, False),
        ("inception", FEATURES["inception"].pinned, 1280, False),
        ("efficientnet-lite0", FEATURES["inception"].pinned, 2048, False),
    ],
)
def test_statistics_without_provenance_are_those_of_the_fids_own_weights(
    name: str, sha256: str, features: int, fitting: bool
) -> None:
    extractor = Extractor(name, "", None, sha256, "none", torch.device("cpu"))
    assert fits(Statistics(None, np.zeros(features), np.zeros((1, 1))), extractor) is fitting
