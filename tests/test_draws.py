"""Draws that are stratified over t: one slot of every stratum, every slot equally often."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool, UserError
from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.distillation.draws import DRAWS, draw_stratified
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.records import NoisyBatch
from tests.analytic import GaussianNetwork

SHAPE = (1, 2, 2)
T = 20


def pool_at(t: Tensor) -> NoisyPool:
    """A pool whose slots are at these timesteps."""
    pool = NoisyPool(len(t), SHAPE, torch.float32)
    pool.fill(NoisyBatch(torch.randn(len(t), *SHAPE, generator=torch.Generator().manual_seed(1)), t))
    return pool


def within_strata(drawn: Tensor, pool_t: Tensor) -> bool:
    """Whether t (B,) of a batch can be one of each of B strata of the pool's sorted t; a remainder may sit out."""
    size, spare = divmod(len(pool_t), len(drawn))
    ordered, drawn = pool_t.sort().values, drawn.sort().values
    first = torch.arange(len(drawn)) * size
    return bool((ordered[first] <= drawn).all() and (drawn <= ordered[first + size - 1 + spare]).all())


@settings(deadline=None)
@given(t=st.lists(st.integers(0, 9), min_size=1, max_size=40), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_draw_has_distinct_slots_one_of_each_stratum(t: list[int], share: float, seed: int) -> None:
    pool, batch_size = pool_at(torch.tensor(t)), max(1, round(share * len(t)))
    drawn = draw_stratified(pool, batch_size, np.random.default_rng(seed))
    assert len(set(drawn.tolist())) == batch_size
    assert within_strata(pool.t[drawn], pool.t)


def test_each_stratum_of_distinct_timesteps_has_one_slot_in_every_batch() -> None:
    order, rng = torch.randperm(60, generator=torch.Generator().manual_seed(2)), np.random.default_rng(0)
    pool = pool_at(order)
    for _ in range(50):
        drawn = draw_stratified(pool, 12, rng)
        assert (pool.t[drawn] // 5).sort().values.tolist() == list(range(12))


@pytest.mark.parametrize("t", [torch.arange(24), torch.arange(24) // 7, torch.arange(27) % 5, torch.zeros(10).long()])
def test_every_slot_is_drawn_equally_often(t: Tensor) -> None:
    pool, rng = pool_at(t), np.random.default_rng(0)
    counts = torch.cat([draw_stratified(pool, 4, rng) for _ in range(4000)]).bincount(minlength=len(t))
    assert chisquare(counts).pvalue > 0.01


def test_slots_of_one_timestep_are_drawn_together_as_often_as_others() -> None:
    pool, rng, together = pool_at(torch.arange(8) // 4), np.random.default_rng(0), torch.zeros(8, 8)
    for _ in range(4000):
        drawn = draw_stratified(pool, 4, rng)  # two of each four
        together[drawn[:, None], drawn] += 1
    pairs = together[:4, :4][torch.ones(4, 4).triu(1).bool()]
    assert chisquare(pairs).pvalue > 0.01


def test_the_mean_t_of_a_batch_varies_far_less_than_with_uniform_draws() -> None:
    pool = pool_at(torch.arange(400) % 100)
    spread = {
        name: torch.stack([pool.t[draw(pool, 16, rng)].double().mean() for _ in range(500)]).var().item()
        for name, draw in DRAWS.items()
        for rng in [np.random.default_rng(0)]
    }
    assert spread["stratified"] == pytest.approx(spread["uniform"] / 16**2, rel=0.5)


def test_a_batch_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size: 4 is larger than the pool of 3 slots"):
        draw_stratified(pool_at(torch.arange(3)), 4, np.random.default_rng(0))


@pytest.mark.parametrize("options", [{}, {"discard": 0.5}, {"stride": 3}])
def test_every_batch_of_a_stream_is_one_of_each_stratum_and_a_resume_draws_the_same(options: dict[str, float]) -> None:
    schedule = NoiseSchedule(num_timesteps=T)
    teacher = DiffusionModel(GaussianNetwork(schedule, 0.3, 0.5), schedule=schedule, shape=SHAPE)
    config = DistillConfig(8, draws="stratified", **options)
    pools = [pool_at(torch.arange(40) % T) for _ in range(2)]
    whole, first = (DistillStream(teacher, pool, config, 30) for pool in pools)
    for step in range(30):
        if step == 13:
            first = DistillStream(teacher, first.pool, config, 30, first_step=13)
        before = whole.pool.t.clone()
        batch, other = whole.next_batch(), first.next_batch()
        if "discard" not in options:
            assert within_strata(batch.t, before)
        assert torch.equal(batch.x, other.x) and torch.equal(batch.t, other.t)
    assert torch.equal(pools[0].x, pools[1].x)
