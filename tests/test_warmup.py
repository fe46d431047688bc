"""Filling the pool: its marginals, its cost, its exact resume."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool
from ldm_dkdm.config.schema import DistillConfig, WarmupConfig
from ldm_dkdm.distillation.warmup import Warmup, warmup_calls
from ldm_dkdm.training.warmup_shares import PoolWarmup
from tests.analytic import GaussianNetwork

SHORT = NoiseSchedule(num_timesteps=20)
STEEP = NoiseSchedule(num_timesteps=100, beta_start=0.015, beta_end=0.195)  # abar falls to 1e-4 in 100 steps
MODES = {
    "ancestral": WarmupConfig("ancestral", batch_size=16),
    "harvest": WarmupConfig("harvest", images=200, batch_size=16),
    "ddim": WarmupConfig("ddim", steps=5, images=24, batch_size=8),
    "solver": WarmupConfig("dpm-solver++", steps=5, images=24, batch_size=8),
}
every_mode = pytest.mark.parametrize("config", MODES.values(), ids=MODES)


def _warm(
    config: WarmupConfig,
    slots: int,
    schedule: NoiseSchedule = SHORT,
    shape: tuple[int, ...] = (2, 2, 2),
    std: float = 0.5,
    seed: int = 0,
) -> tuple[NoisyPool, GaussianNetwork]:
    pool, network = NoisyPool(slots, shape, torch.float32), GaussianNetwork(schedule, 0.7, std)
    teacher = DiffusionModel(network, schedule=schedule, shape=shape)
    list(Warmup(pool, teacher, config, seed).run())
    return pool, network


@every_mode
def test_all_slots_are_filled_with_distinct_states(config: WarmupConfig) -> None:
    pool, _ = _warm(config, 50)
    assert pool.filled == 50
    assert len(pool.x.flatten(1).unique(dim=0)) == 50
    assert pool.t.min() >= 0
    assert pool.t.max() <= 19


@every_mode
def test_t_is_uniform(config: WarmupConfig) -> None:
    pool, _ = _warm(config, 2000, shape=(1, 1, 1))
    assert chisquare(pool.t.bincount(minlength=20)).pvalue > 0.01


@every_mode
def test_an_interrupted_warm_up_goes_on_exactly(config: WarmupConfig, tmp_path: Path) -> None:
    whole, network = _warm(config, 50)
    teacher = DiffusionModel(network, schedule=SHORT, shape=(2, 2, 2))
    first, second = NoisyPool(50, (2, 2, 2), torch.float32), NoisyPool(50, (2, 2, 2), torch.float32)
    for _ in Warmup(first, teacher, config).run():
        if first.filled:
            break
    assert 0 < first.filled < 50
    first.save(tmp_path / "pool", step=0)
    second.load(tmp_path / "pool")
    list(Warmup(second, teacher, config).run())
    assert torch.equal(second.x, whole.x)
    assert torch.equal(second.t, whole.t)


@every_mode
def test_the_seed_decides_the_pool(config: WarmupConfig) -> None:
    assert torch.equal(_warm(config, 20)[0].x, _warm(config, 20)[0].x)
    assert not torch.equal(_warm(config, 20)[0].x, _warm(config, 20, seed=1)[0].x)


def test_ancestral_cost_is_what_the_plan_says() -> None:
    config = WarmupConfig("ancestral", batch_size=16)
    _, network = _warm(config, 800, STEEP, (1, 1, 1))
    assert network.samples == pytest.approx(warmup_calls(config, 800, STEEP), rel=0.06)


@pytest.mark.parametrize("batch_size", [64, 320])
@pytest.mark.parametrize("mode", ["ancestral", "harvest"])
def test_a_plan_counts_chains_that_walk_on_with_their_batch(mode: str, batch_size: int) -> None:
    config = WarmupConfig(mode, batch_size=batch_size, images=100)
    _, network = _warm(config, 320, SHORT, (1, 1, 1))
    method = DistillConfig(batch_size=8, rho=2.0, warmup=config)
    assert PoolWarmup(0, 1, 320).calls_left(method, SHORT, 0) == network.samples
    assert PoolWarmup(0, 1, 320, 320).calls_left(method, SHORT, 0) == 0


@pytest.mark.parametrize(("slots", "images"), [(40, 8), (8, 40), (10, 8)])
@pytest.mark.parametrize("mode", ["ddim", "dpm-solver++"])
def test_the_cost_of_samples_is_what_the_plan_says(mode: str, slots: int, images: int) -> None:
    config = WarmupConfig(mode, steps=5, images=images, batch_size=3)
    _, network = _warm(config, slots)
    assert network.samples == warmup_calls(config, slots, SHORT)


@pytest.mark.parametrize(
    ("config", "std", "bins"),
    [
        (WarmupConfig("ancestral", batch_size=64), 0.05, [0, 2, 5, 10, 40, 100]),
        (WarmupConfig("harvest", images=250, batch_size=64), 0.05, [0, 2, 5, 10, 40, 100]),
        (WarmupConfig("ddim", steps=100, images=1000, batch_size=100), 0.5, [0, 20, 40, 60, 80, 100]),
        (WarmupConfig("dpm-solver++", steps=30, images=1000, batch_size=100), 0.5, [0, 20, 40, 60, 80, 100]),
    ],
    ids=MODES,
)
def test_states_have_the_moments_of_their_t(config: WarmupConfig, std: float, bins: list[int]) -> None:
    pool, network = _warm(config, 1000, STEEP, (1, 8, 8), std)
    mean, spread = torch.tensor([network.moments(t) for t in pool.t.tolist()]).T.view(2, -1, 1, 1, 1)
    standardised = (pool.x - mean) / spread
    for low, high in pairwise(bins):
        group = standardised[(pool.t >= low) & (pool.t < high)]
        assert group.mean().item() == pytest.approx(0, abs=0.08)
        assert group.std().item() == pytest.approx(1, abs=0.08)
