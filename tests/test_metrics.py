"""Metrics on given features: equal to torch-fidelity, to closed forms, and to computations of another kind."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ldm_dkdm import UserError
from ldm_dkdm.evaluation import moments
from ldm_dkdm.evaluation.frechet import frechet_distance
from ldm_dkdm.evaluation.metrics import (
    METRICS,
    frechet,
    inception_score,
    kernel_distance,
    pixel_frechet,
    precision_recall,
    spatial_frechet,
)
from ldm_dkdm.evaluation.moments import Moments, SplitScores
from tests.feature_sets import collected, pair


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated positive features (N,D), float64, as those of a network after a ReLU."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(shift, 1, (count, width)) @ np.random.default_rng(9).normal(size=(width, width))
    return np.maximum(mixed, 0) / width**0.5


A, B = features(300, 24, 0), features(260, 24, 1, 0.3)


# torch-fidelity


def test_fid_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    parts = [fid_features_to_statistics(torch.from_numpy(x)) for x in (A, B)]
    wanted = fid_statistics_to_metric(*parts, verbose=False)["frechet_inception_distance"]
    assert frechet(pair(collected(A), collected(B)))["FID"] == pytest.approx(wanted, abs=1e-6)


def test_kid_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    wanted = kid_features_to_metric(*map(torch.from_numpy, (A, B)), kid_subset_size=260, verbose=False)
    found = kernel_distance(pair(collected(A), collected(B)))
    assert found["KID"] == pytest.approx(wanted["kernel_inception_distance_mean"], abs=1e-6)
    assert found["KID std"] == pytest.approx(wanted["kernel_inception_distance_std"], abs=1e-6)


def test_kid_of_small_sets_of_one_size_takes_them_whole() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    wanted = kid_features_to_metric(*map(torch.from_numpy, (A[:90], B[:90])), kid_subset_size=90, verbose=False)
    found = kernel_distance(pair(collected(A[:90]), collected(B[:90])))
    assert found == {"KID": pytest.approx(wanted["kernel_inception_distance_mean"], abs=1e-6)}


def test_precision_and_recall_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    wanted = prc_features_to_metric(*map(torch.from_numpy, (A, B)), verbose=False)
    found = precision_recall(pair(collected(A), collected(B)))
    assert found == pytest.approx({name: wanted[name] for name in ("precision", "recall")}, abs=1e-6)
    assert 0.2 < found["precision"] < found["recall"] < 1


def test_the_inception_score_equals_torch_fidelity_in_splits_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    monkeypatch.setattr(moments, "SPLIT", 50)
    logits = np.random.default_rng(0).normal(size=(200, 9)) * 3
    wanted = isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
    found = inception_score(pair(collected(logits, widths=(0, 0, 9))))
    assert found["IS"] == pytest.approx(wanted["inception_score_mean"], abs=1e-6)
    assert found["IS std"] == pytest.approx(wanted["inception_score_std"], abs=1e-6)


def test_the_last_split_may_be_smaller_as_in_guided_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "SPLIT", 50)
    logits = np.random.default_rng(0).normal(size=(70, 9))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [part * (np.log(part) - np.log(part.mean(0))) for part in (p[:50], p[50:])]
    wanted = np.mean([np.exp(part.sum(1).mean()) for part in parts])
    assert inception_score(pair(collected(logits, widths=(0, 0, 9))))["IS"] == pytest.approx(wanted, abs=1e-12)


# Closed forms and computations of another kind


def test_gaussians_have_a_closed_form_in_float64() -> None:
    generator = np.random.default_rng(3)
    turn = np.linalg.qr(generator.normal(size=(40, 40)))[0]
    a, b, shift = generator.uniform(0.1, 4, 40), generator.uniform(0.1, 4, 40), generator.normal(size=40)
    found = frechet_distance(np.zeros(40), turn @ np.diag(a) @ turn.T, shift, turn @ np.diag(b) @ turn.T)
    assert found == pytest.approx(shift @ shift + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-12)


def test_singular_covariances_have_a_closed_form_too() -> None:
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(200, 200)))[0]
    a, b = (np.concatenate([values, np.zeros(197)]) for values in ([4.0, 1.0, 9.0], [1.0, 0.0, 16.0]))
    found = frechet_distance(np.zeros(200), turn @ np.diag(a) @ turn.T, np.zeros(200), turn @ np.diag(b) @ turn.T)
    assert found == pytest.approx(1 + 1 + 1, abs=1e-10)


def test_sfid_equals_numpy_on_spatial_features() -> None:
    both = [np.concatenate([x, x[:, ::-1] ** 2], 1) for x in (A, B)]
    spatial = [x[:, 24:] for x in both]
    (m, c), (n, d) = ((x.mean(0), np.cov(x, rowvar=False)) for x in spatial)
    wanted = ((m - n) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    sets = [collected(x, widths=(24, 24, 0)) for x in both]
    assert spatial_frechet(pair(*sets))["sFID"] == pytest.approx(wanted, abs=1e-6)


def test_precision_and_recall_equal_guided_diffusions_definition_in_numpy() -> None:
    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        own = ((manifold[:, None] - manifold) ** 2).sum(2)
        radii = np.sort(own, 1)[:, 3]  # the third neighbour; the first entry is the point itself
        return float((((points[:, None] - manifold) ** 2).sum(2) <= radii).any(1).mean())

    found = precision_recall(pair(collected(A), collected(B)))
    assert found == pytest.approx({"precision": covered(A, B), "recall": covered(B, A)}, abs=1e-6)


def test_a_set_is_at_no_distance_from_itself() -> None:
    same = pair(collected(A), collected(A))
    assert frechet(same)["FID"] == pytest.approx(0, abs=1e-8)
    assert precision_recall(same) == {"precision": 1, "recall": 1}


# Sums


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_moments_equal_numpys_for_any_batch_size(batch: int) -> None:
    x = 1e4 + A  # a mean that is large against the deviation
    found = collected(x, batch)
    np.testing.assert_allclose(found.mu, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-10)


def test_parts_that_were_counted_apart_are_joined() -> None:
    whole, scores = Moments(), SplitScores()
    parts = [(Moments(), SplitScores()) for _ in range(3)]
    for number, rows in enumerate(np.array_split(np.arange(300), 3)):
        parts[number][0].add(A[rows])
        parts[number][1].add(A[rows], rows[0])
    for own, other in parts:
        whole.merge(own)
        scores.merge(other)
    np.testing.assert_allclose(whole.covariance, np.cov(A, rowvar=False), rtol=1e-10, atol=1e-14)
    alone = SplitScores()
    alone.add(A, 0)
    np.testing.assert_allclose(scores.scores(), alone.scores(), rtol=1e-12)


# Small sets


def test_fewer_images_than_features_give_finite_figures() -> None:
    few = pair(collected(features(5, 24, 0)), collected(features(4, 24, 1)))
    figures = frechet(few) | kernel_distance(few) | precision_recall(few)
    assert all(np.isfinite(value) for value in figures.values()) and figures["FID"] > 0


def test_equal_images_give_finite_figures() -> None:
    constant = pair(collected(np.ones((5, 4))), collected(np.ones((5, 4)) * 2))
    assert frechet(constant)["FID"] == pytest.approx(4)
    assert inception_score(pair(collected(np.ones((5, 4)), widths=(0, 0, 4))))["IS"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("metric", "count", "reason"),
    [
        (frechet, 1, "one image has no covariance"),
        (kernel_distance, 1, "kid needs 2 images or more"),
        (precision_recall, 3, "precision-recall needs 4 images or more"),
        (pixel_frechet, 64, "pixel-frechet needs 65 images or more"),
    ],
)
def test_too_few_images_are_refused(metric: object, count: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        metric(pair(collected(features(count, 8, 0)), collected(features(70, 8, 1))))


def test_sets_of_different_features_are_refused() -> None:
    with pytest.raises(UserError, match="statistics of 8 and 9 features cannot be compared"):
        frechet(pair(collected(features(9, 8, 0)), collected(features(9, 9, 0))))


# Names


def test_figures_on_other_features_are_never_called_fid() -> None:
    pairs = pair(collected(A), collected(B), "efficientnet")
    named = {**frechet(pairs), **kernel_distance(pairs), **precision_recall(pairs)}
    assert {"FD-efficientnet", "KID-efficientnet", "precision-efficientnet"} <= set(named)
    assert not [name for name in named if name in ("FID", "KID", "precision", "recall")]


def test_every_metric_says_what_it_is_and_where_it_is_defined() -> None:
    assert all(metric.meaning and metric.source for metric in METRICS.values())
    assert {name for name, metric in METRICS.items() if not metric.reference} == {"is"}
