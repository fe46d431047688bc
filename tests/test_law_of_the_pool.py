"""The law of a pool on a Gaussian teacher, whose chain is known: variance and share of slots in every tenth of t."""

import copy
import functools

import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool
from ldm_dkdm.config.schema import DistillConfig, WarmupConfig
from ldm_dkdm.distillation.replay import stream_kind
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.distillation.warmup import Warmup
from ldm_dkdm.records import NoisyBatch
from tests.analytic import GaussianNetwork

T, STD, SLOTS = 200, 0.5, 4000
SCHEDULE = NoiseSchedule("scaled_linear", T, 0.0075, 0.0975)


def teacher() -> DiffusionModel:
    return DiffusionModel(GaussianNetwork(SCHEDULE, 0.0, STD), schedule=SCHEDULE, shape=(3, 8, 8))


def filled(config: WarmupConfig) -> NoisyPool:
    """A pool that a warm-up has filled, for a test to change."""
    return copy.deepcopy(_filled(config))


@functools.cache
def _filled(config: WarmupConfig) -> NoisyPool:
    pool = NoisyPool(SLOTS, (3, 8, 8), torch.float32)
    for _ in Warmup(pool, teacher(), config).run():
        pass
    return pool


def walked(pool: NoisyPool, rounds: int, **method: object) -> NoisyPool:
    """A pool after every slot has been drawn `rounds` times, on average."""
    config = DistillConfig(batch_size=500, rho=SLOTS / 500 / T, **method)
    stream = DistillStream(teacher(), pool, config, 10**6)
    for _ in range(rounds * SLOTS // 500):
        stream.next_batch()
    return pool


def tenths(pool: NoisyPool) -> tuple[list[float], list[float]]:
    """In every tenth of t: mean square of the states over the exact one, and the share of slots over an even one."""
    t = pool.t.long()
    abar = SCHEDULE.alphas_cumprod[t]
    ratio = pool.x.double().square().flatten(1).mean(1) / (abar * STD**2 + 1 - abar)
    tenth = t * 10 // T
    return [ratio[tenth == k].mean().item() for k in range(10)], [
        10 * (tenth == k).double().mean().item() for k in range(10)
    ]


@pytest.mark.parametrize(
    ("mode", "steps", "images"),
    [
        ("ancestral", 1, 1),
        ("harvest", 1, SLOTS // 16),
        ("ddim", 50, SLOTS),
        ("dpm-solver++", 10, SLOTS),
        ("dpm-solver++", 20, SLOTS),
    ],
)
def test_a_warm_up_has_the_variance_of_the_chain_in_every_tenth(mode: str, steps: int, images: int) -> None:
    variance, share = tenths(filled(WarmupConfig(mode=mode, steps=steps, images=images, batch_size=1000)))
    assert variance == pytest.approx([1.0] * 10, abs=0.07)
    assert share == pytest.approx([1.0] * 10, abs=0.2)


@pytest.mark.parametrize(
    ("stride", "cap", "rounds"),
    [(1, None, 40), (5, None, 40), (20, None, 20), (1, 20.0, 40), (4, 20.0, 40), (10, 50.0, 40), (20, 20.0, 20)],
)
def test_walking_keeps_the_variance_and_the_law_of_t(stride: int, cap: float | None, rounds: int) -> None:
    warmup = WarmupConfig(mode="dpm-solver++", steps=20, images=SLOTS, batch_size=1000, t_cap=cap)
    variance, share = tenths(walked(filled(warmup), rounds, stride=stride, warmup=warmup))
    wanted = SCHEDULE.density(cap).view(10, -1).sum(1) / SCHEDULE.density(cap).sum() * 10
    assert variance == pytest.approx([1.0] * 10, abs=0.04)
    assert share == pytest.approx(wanted.tolist(), abs=0.2)  # 4 standard errors


@pytest.mark.parametrize("stride", [1, 5])
def test_stratified_draws_and_a_replay_keep_the_law_of_the_pool_and_show_it(stride: int) -> None:
    warmup = WarmupConfig(mode="dpm-solver++", steps=20, images=SLOTS, batch_size=1000)
    method = DistillConfig(500, rho=SLOTS / 500 / T, draws="stratified", replay=4, stride=stride, warmup=warmup)
    stream = stream_kind(method)(teacher(), filled(warmup), method, 10**6)
    batches = [stream.next_batch() for _ in range(4 * 40 * SLOTS // 500)]  # every slot is drawn 40 times
    seen = NoisyPool(40 * 500, (3, 8, 8), torch.float32)
    for batch in batches[-40:]:
        seen.fill(NoisyBatch(batch.x, batch.t))
    for states in (stream.pool, seen):
        variance, share = tenths(states)
        assert variance == pytest.approx([1.0] * 10, abs=0.04)
        assert share == pytest.approx([1.0] * 10, abs=0.2)


def test_a_long_stride_begins_at_the_last_timestep_no_more_often_than_elsewhere() -> None:
    warmup = WarmupConfig(mode="dpm-solver++", steps=20, images=SLOTS, batch_size=1000)
    pool = walked(filled(warmup), 40, stride=10, warmup=warmup)
    share = (pool.t == T - 1).double().mean().item()  # 10 / T where every chain passes there
    assert share == pytest.approx(1 / T, abs=0.004)
