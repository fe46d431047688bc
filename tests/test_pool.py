"""The pool of noisy states: draws, storage, files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from ldm_dkdm import NoisyPool, UserError
from ldm_dkdm.checkpoints.hashes import verifying
from ldm_dkdm.distillation.pool import pool_slots, slot_bytes
from ldm_dkdm.records import NoisyBatch

SHAPE = (2, 3, 3)


def filled_pool(
    slots: int, storage: Path | None = None, dtype: torch.dtype = torch.float16, labeled: bool = False
) -> NoisyPool:
    pool = NoisyPool(slots, SHAPE, dtype, storage, labeled)
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(slots) % 7 if labeled else None
    pool.fill(NoisyBatch(torch.randn(slots, *SHAPE, generator=generator), torch.arange(slots) % 20, label))
    return pool


def _contents(pool: NoisyPool) -> tuple[Tensor, ...]:
    batch = pool.take(torch.arange(len(pool)))
    return (batch.x, batch.t) if batch.label is None else (batch.x, batch.t, batch.label)


@settings(deadline=None)
@given(slots=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_draw_is_without_replacement_and_only_drawn_slots_change(slots: int, share: float, seed: int) -> None:
    pool = filled_pool(slots, labeled=True)
    batch_size = max(1, round(share * slots))
    x, t, label = _contents(pool)
    drawn = pool.draw(batch_size, np.random.default_rng(seed))
    assert len(set(drawn.tolist())) == batch_size
    times, labels = torch.full((batch_size,), 19), torch.full((batch_size,), 3)
    pool.put_back(drawn, NoisyBatch(torch.full((batch_size, *SHAPE), 7.0), times, labels))
    x[drawn], t[drawn], label[drawn] = 7.0, 19, 3
    for after, expected in zip(_contents(pool), (x, t, label), strict=True):
        assert torch.equal(after, expected)


def test_draws_are_uniform() -> None:
    pool, rng = filled_pool(20), np.random.default_rng(0)
    counts = torch.cat([pool.draw(4, rng) for _ in range(2000)]).bincount(minlength=20)
    assert chisquare(counts).pvalue > 0.01


def test_a_batch_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size"):
        filled_pool(3).draw(4, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("rho", "batch_size", "slots"), [(4, 42, 168_000), (4, 48, 192_000), (0.4, 128, 51_200), (0.0004, 8, 0)]
)
def test_pool_size_is_the_papers(rho: float, batch_size: int, slots: int) -> None:
    assert pool_slots(rho, 1000, batch_size) == slots


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(UserError, match="rho"):
        NoisyPool(0, SHAPE)


def test_fill_appends_and_leaves_what_does_not_fit() -> None:
    pool = NoisyPool(5, SHAPE, torch.float32)
    first, second = torch.randn(3, *SHAPE), torch.randn(4, *SHAPE)
    pool.fill(NoisyBatch(first, torch.tensor([1, 2, 3])))
    assert pool.filled == 3
    pool.fill(NoisyBatch(second, torch.tensor([4, 5, 6, 7])))
    x, t = _contents(pool)
    assert pool.filled == 5
    assert torch.equal(x, torch.cat([first, second[:2]]))
    assert t.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_mapped_pool_equals_one_in_memory_and_lies_in_its_file(tmp_path: Path, dtype: torch.dtype) -> None:
    mapped, memory = filled_pool(6, tmp_path / "pool.bin", dtype), filled_pool(6, dtype=dtype)
    for ours, theirs in zip(_contents(mapped), _contents(memory), strict=True):
        assert torch.equal(ours, theirs)
    assert slot_bytes(SHAPE, dtype, labeled=False) * 6 == memory.x.nbytes + memory.t.nbytes + memory.updated.nbytes
    on_disk = torch.frombuffer(bytearray((tmp_path / "pool.bin").read_bytes()), dtype=dtype)
    assert torch.equal(on_disk, memory.x.flatten())


@pytest.mark.parametrize("label", [None, torch.tensor([0, 3, 999, 5])])
def test_a_saved_pool_comes_back_whole(tmp_path: Path, label: Tensor | None) -> None:
    saved = NoisyPool(6, SHAPE, labeled=label is not None)
    loaded = NoisyPool(6, SHAPE, storage=tmp_path / "pool.bin", labeled=label is not None)
    saved.fill(NoisyBatch(torch.randn(4, *SHAPE), torch.tensor([0, 3, 999, 5]), label))
    saved.save(tmp_path / "pool.safetensors", step=12)
    assert loaded.load(tmp_path / "pool.safetensors") == 12
    assert loaded.filled == 4
    for ours, theirs in zip(_contents(loaded), _contents(saved), strict=True):
        assert torch.equal(ours, theirs)


def test_a_load_copies_nothing_from_the_device_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, loaded = filled_pool(6), NoisyPool(6, SHAPE)
    saved.save(tmp_path / "pool", step=3)

    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("copied to the host")

    monkeypatch.setattr(Tensor, "cpu", refuse)
    with verifying(False):  # hashing is done on the host
        assert loaded.load(tmp_path / "pool") == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(_contents(loaded), _contents(saved), strict=True))


@pytest.mark.parametrize(
    "other",
    [
        NoisyPool(7, SHAPE),
        NoisyPool(6, (2, 4, 4)),
        NoisyPool(6, SHAPE, torch.float32),
        NoisyPool(6, SHAPE, labeled=True),
    ],
)
def test_a_pool_of_another_size_or_type_is_refused(tmp_path: Path, other: NoisyPool) -> None:
    filled_pool(6).save(tmp_path / "pool", step=0)
    with pytest.raises(UserError, match="wants"):
        other.load(tmp_path / "pool")


def test_a_damaged_or_missing_pool_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    filled_pool(6).save(path, step=0)
    path.write_bytes(path.read_bytes()[:-40])
    for damaged in (path, tmp_path / "absent"):
        with pytest.raises(UserError, match=damaged.name):
            NoisyPool(6, SHAPE).load(damaged)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pool"
    filled_pool(6).save(path, step=3)
    before = path.read_bytes()

    def fail(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        filled_pool(6).save(path, step=4)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
