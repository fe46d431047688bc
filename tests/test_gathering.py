"""Statistics of streams: the same for any batch size, cached, resumed, and in constant memory."""

import logging
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_dkdm import UserError, load_model
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation import moments
from ldm_dkdm.evaluation.collector import Collector
from ldm_dkdm.evaluation.gathering import gather, statistics_cache
from ldm_dkdm.evaluation.partial import stream
from ldm_dkdm.evaluation.processes import Part
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.evaluation.sources import NpzImages, TensorImages
from ldm_dkdm.evaluation.statistics import Statistics
from tests.feature_sets import D, S, Toy, toy_extractor

IMAGES = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Stopped(Exception):
    """The interruption of a test."""


def stop_after(count: int) -> object:
    def progress(what: str, done: int, total: int) -> None:
        if done >= count:
            raise Stopped

    return progress


def assert_same(found: Statistics, wanted: Statistics, tolerance: float = 1e-12) -> None:
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        own, other = getattr(found, name), getattr(wanted, name)
        assert (own is None) == (other is None)
        if own is not None:
            np.testing.assert_allclose(own, other, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(found.scores.scores(), wanted.scores.scores(), atol=tolerance)
    assert found.count == wanted.count


def toy(source: object, keep: bool = True, **options: object) -> Statistics:
    return gather(source, {"toy": toy_extractor()}, {"toy"} if keep else set(), **options)["toy"]


def test_the_sums_are_those_of_all_features_at_once() -> None:
    found = toy(TensorImages(IMAGES), batch_size=7)
    features = Toy()(IMAGES.movedim(-1, 1))
    np.testing.assert_allclose(found.mu, features.pooled.double().mean(0), atol=1e-6)
    np.testing.assert_allclose(found.sigma_s, np.cov(features.spatial.double().numpy(), rowvar=False), atol=1e-6)
    assert found.mu.shape == (D,) and found.mu_s.shape == (S,) and found.features.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_figures_do_not_depend_on_the_batch_size(batch_size: int, teacher_folder: Path) -> None:
    source = sampled(load_model(teacher_folder), SamplingConfig(9, steps=2))
    assert_same(toy(source, batch_size=batch_size), toy(source, batch_size=4), 1e-6)


def test_statistics_are_reused_if_the_content_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = toy(TensorImages(IMAGES), cache=tmp_path)
    Toy.seen = 0
    with caplog.at_level(logging.INFO, "ldm_dkdm"):
        assert_same(toy(TensorImages(IMAGES.clone(), "other name"), cache=tmp_path), first, 0)
    assert Toy.seen == 0 and "other name: statistics of 50 images on toy are reused" in caplog.text
    changed = IMAGES.clone()
    changed[3, 2, 1, 0] += 1
    toy(TensorImages(changed), cache=tmp_path)
    assert Toy.seen == 50
    toy(TensorImages(IMAGES.reshape(50, 4, 16, 3)), cache=tmp_path)  # the same bytes are other images
    assert Toy.seen == 100


def test_other_weights_of_an_extractor_are_not_mixed_up(tmp_path: Path) -> None:
    toy(TensorImages(IMAGES), cache=tmp_path)
    Toy.seen = 0
    other = replace(toy_extractor(), sha256="1" * 64)
    gather(TensorImages(IMAGES), {"toy": other}, set(), cache=tmp_path)
    assert Toy.seen == 50


def test_features_that_were_not_kept_are_gathered_when_they_are_needed(tmp_path: Path) -> None:
    assert toy(TensorImages(IMAGES), keep=False, cache=tmp_path).features is None
    assert toy(TensorImages(IMAGES), keep=True, cache=tmp_path).features.shape == (50, D)


@pytest.mark.parametrize("stop", [8, 30, 45])
def test_an_interrupted_pass_goes_on_where_it_was_saved(
    stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = toy(TensorImages(IMAGES), batch_size=5)
    options = {"batch_size": 5, "cache": tmp_path, "save_seconds": 0.0}
    with pytest.raises(Stopped):
        toy(TensorImages(IMAGES), progress=stop_after(stop), **options)
    Toy.seen = 0
    with caplog.at_level(logging.INFO, "ldm_dkdm"):
        found = toy(TensorImages(IMAGES), **options)
    saved = -(-stop // 5) * 5 - 5  # the last batch before the stop was not saved
    assert Toy.seen == 50 - saved and f"goes on after {saved} of 50 images" in caplog.text
    assert_same(found, whole)
    assert not list(tmp_path.glob("*.partial.npz"))


def test_processes_share_the_images_and_resume_their_parts(tmp_path: Path) -> None:
    from ldm_dkdm.evaluation.features import open_extractor

    images = IMAGES[:9]
    extractors = {name: open_extractor(name) for name in ("efficientnet-lite0", "pixels")}
    alone, shared = (
        gather(TensorImages(images), extractors, set(extractors), processes=n, batch_size=2, cache=tmp_path / str(n))
        for n in (1, 2)
    )
    for name in extractors:
        np.testing.assert_allclose(shared[name].features, alone[name].features, atol=1e-5)
    np.testing.assert_allclose(shared["efficientnet-lite0"].sigma, alone["efficientnet-lite0"].sigma, atol=1e-5)
    assert not list(tmp_path.rglob("*.partial.npz"))


def test_parts_are_the_images_of_their_numbers() -> None:
    source = TensorImages(IMAGES)
    for size in (1, 4, 60):
        part = Part(source, 7, 30)
        assert torch.equal(torch.cat(list(part.batches(0, size))), IMAGES[7:30])
        assert torch.equal(torch.cat(list(part.batches(20, size))), IMAGES[27:30]) and not list(part.batches(23, size))


def test_the_splits_of_the_inception_score_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "SPLIT", 16)
    whole, joined = Collector(toy_extractor()), Collector(toy_extractor())
    stream(TensorImages(IMAGES), {"toy": whole}, None, 7, False, 60)
    for first, last in ((0, 21), (21, 50)):
        part = Collector(toy_extractor())
        stream(Part(TensorImages(IMAGES), first, last), {"toy": part}, None, 7, False, 60, first)
        joined.merge(part)
    assert len(whole.scores.scores()) == 4
    assert_same(joined.statistics(50, {}), whole.statistics(50, {}), 1e-6)


def test_stored_moments_take_the_place_of_those_of_the_images_beside_them(tmp_path: Path) -> None:
    facts = {"features": "toy", "weights_sha256": "0" * 64}
    Statistics(1000, np.ones(D), np.eye(D), np.ones(S), np.eye(S), facts=facts).write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        np.savez(tmp_path / "b.npz", arr_0=IMAGES.numpy(), **archive)
    found = toy(NpzImages(tmp_path / "b.npz", "b"))
    assert np.array_equal(found.mu, np.ones(D)) and found.count == 1000 and len(found.features) == 50
    assert np.array_equal(toy(NpzImages(tmp_path / "a.npz", "a"), keep=False).sigma, np.eye(D))
    with pytest.raises(UserError, match=r"a: holds statistics of toy features .*, not features one by one"):
        toy(NpzImages(tmp_path / "a.npz", "a"))


def test_statistics_on_other_features_are_refused(tmp_path: Path) -> None:
    for name, facts in (("theirs", {}), ("ours", {"features": "toy", "weights_sha256": "1" * 64})):
        Statistics(None, np.ones(D), np.eye(D), facts=facts).write(tmp_path / f"{name}.npz")
        with pytest.raises(UserError, match=f"{name}: holds statistics of .*, not images for toy"):
            toy(NpzImages(tmp_path / f"{name}.npz", name), keep=False)


class Endless:
    """Random images that are made when they are asked for."""

    name = "endless"

    def __init__(self, count: int) -> None:
        self.count = count

    def identity(self) -> dict[str, object]:
        return {"count": self.count}

    def facts(self) -> dict[str, object]:
        return {}

    def stored(self) -> None:
        return None

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        for _ in range(first, self.count, batch_size):
            yield torch.randint(0, 256, (batch_size, 8, 8, 3), dtype=torch.uint8)


def peak(source: object, tmp_path: Path) -> int:
    """Most bytes of NumPy and Python at once while statistics are gathered."""
    tracemalloc.start()
    toy(source, keep=False, batch_size=20, cache=tmp_path, save_seconds=0.0)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peak(Endless(40), tmp_path)  # what is imported and kept
    few, many = peak(Endless(100), tmp_path), peak(Endless(4000), tmp_path)
    assert many < few + 100_000  # 4,000 features or images would be 96 KB or 768 KB


def test_an_npz_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1500, 64, 64, 3), np.uint8)  # 18 MB
    np.savez(tmp_path / "a.npz", images)
    peak(Part(NpzImages(tmp_path / "a.npz", "a"), 0, 100), tmp_path)
    assert peak(NpzImages(tmp_path / "a.npz", "a"), tmp_path) < images.nbytes / 4


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_DKDM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert statistics_cache() == tmp_path / "ldm_dkdm" / "statistics"
    monkeypatch.setenv("LDM_DKDM_CACHE", str(tmp_path / "own"))
    assert statistics_cache() == tmp_path / "own" / "statistics"


def test_images_beside_statistics_are_read_for_what_these_lack(tmp_path: Path) -> None:
    facts = {"features": "toy", "weights_sha256": "0" * 64}
    Statistics(1000, np.ones(D), np.eye(D), facts=facts).write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        np.savez(tmp_path / "b.npz", arr_0=IMAGES.numpy(), **archive)
    source = NpzImages(tmp_path / "b.npz", "b")
    assert toy(source, keep=False, fields={"toy": ["mu", "sigma"]}).scores is None
    found, wanted = toy(source, keep=False, fields={"toy": ["scores", "mu_s"]}), toy(TensorImages(IMAGES))
    np.testing.assert_allclose(found.scores.scores(), wanted.scores.scores())
    np.testing.assert_allclose(found.mu_s, wanted.mu_s)
    assert np.array_equal(found.mu, np.ones(D))


@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-200], lambda content: b"x" + content[9:]]
)
def test_a_damaged_cache_is_computed_again(damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = toy(TensorImages(IMAGES), cache=tmp_path)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(damage(file.read_bytes()))
    assert_same(toy(TensorImages(IMAGES), cache=tmp_path), wanted)
    assert "its statistics are computed again" in caplog.text and Statistics.read(file).count == 50


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-200], None])
def test_damaged_partial_sums_are_removed(damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = toy(TensorImages(IMAGES), batch_size=5)
    with pytest.raises(Stopped):
        toy(TensorImages(IMAGES), batch_size=5, cache=tmp_path, save_seconds=0.0, progress=stop_after(30))
    (file,) = tmp_path.glob("*.partial.npz")
    if damage is None:  # some sums, but no number of images
        with np.load(file) as archive:
            np.savez(file, **{name: archive[name] for name in archive.files if name != "done"})
    else:
        file.write_bytes(damage(file.read_bytes()))
    assert_same(toy(TensorImages(IMAGES), batch_size=5, cache=tmp_path), wanted)
    assert "all images are read again" in caplog.text and not file.exists()
