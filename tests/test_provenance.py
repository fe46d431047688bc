"""What results say of their images and models is true, and doubts are named."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, load_model
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.comparability import doubts
from ldm_dkdm.evaluation.extractor import Extractor
from ldm_dkdm.evaluation.features import FEATURES
from ldm_dkdm.evaluation.gathering import fits
from ldm_dkdm.evaluation.samples import ModelImages, sampled
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.first_stage.codec import TRUNCATED
from ldm_dkdm.model import sampling

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


def test_weights_that_were_changed_in_memory_have_a_hash_of_their_own(teacher_folder: Path) -> None:
    before, changed = load_model(teacher_folder), load_model(teacher_folder)
    file = sha256(teacher_folder / "model.safetensors")
    with torch.no_grad():
        next(changed.network.parameters()).add_(1)
    first, second = (sampled(model, CONFIG).facts() for model in (before, changed))
    assert first["sha256"] != second["sha256"] and file not in (first["sha256"], second["sha256"])
    assert first["sha256"] == sampled(load_model(teacher_folder), CONFIG).facts()["sha256"]
    assert first["opened_from_sha256"] == second["opened_from_sha256"] == file
    with torch.no_grad():
        next(changed.codec().autoencoder.parameters()).add_(1)
    third = sampled(changed, CONFIG).facts()
    assert third["sha256"] == second["sha256"] and third["first_stage_sha256"] != first["first_stage_sha256"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_doubtful_scale_is_settled_by_the_same_two_samples(batch_size: int, teacher_folder: Path) -> None:
    def doubtful() -> DiffusionModel:
        model = load_model(teacher_folder)
        model.codec().doubt = "a test's"
        return model

    seen: list[torch.Tensor] = []

    def figures(codec: object, states: torch.Tensor) -> SimpleNamespace:
        seen.append(states.clone())
        return SimpleNamespace(best=0.5 + states.abs().mean().item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "scale_figures", figures)
        source = sampled(doubtful(), CONFIG)
        scale = source.identity()["scale_factor"]
        late = torch.cat(list(source.batches(2, batch_size)))
        whole = [batch.images for batch in doubtful().sample_batches(replace(CONFIG, batch_size=batch_size))]
    assert len(seen) == 2 and [len(states) for states in seen] == [2, 2] and torch.equal(*seen)
    assert scale == source.model.codec().scale_factor == pytest.approx(0.5 + seen[0].abs().mean().item())
    assert (torch.cat(whole)[2:].int() - late.int()).abs().max() <= 1
