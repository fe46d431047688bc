"""Exact chains that leave several states each: their t, their joint law on a Gaussian teacher, their cost."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool, UserError
from ldm_dkdm.config.schema import DistillConfig, WarmupConfig
from ldm_dkdm.distillation.chains import Chains, expected_calls, require_states
from ldm_dkdm.distillation.warmup import Warmup, warmup_calls, warmup_of
from ldm_dkdm.rng import numpy_generator
from tests.analytic import GaussianNetwork
from tests.cli import distil, write_yaml
from tests.parts import distill_config

STEEP = NoiseSchedule("scaled_linear", 200, 0.0075, 0.0975)
SHORT = NoiseSchedule(num_timesteps=20)
STD, CHAINS, EACH = 0.5, 400, 10


def warmed(
    config: WarmupConfig, slots: int, schedule: NoiseSchedule, shape: tuple[int, ...] = (1, 1, 1), std: float = STD
) -> tuple[NoisyPool, GaussianNetwork]:
    pool, network = NoisyPool(slots, shape, torch.float32), GaussianNetwork(schedule, 0.0, std)
    list(Warmup(pool, DiffusionModel(network, schedule=schedule, shape=shape), config).run())
    return pool, network


@pytest.fixture(scope="module")
def harvested() -> NoisyPool:
    """4,000 slots of 400 chains, which follow each other."""
    config = WarmupConfig("harvest", images=CHAINS, batch_size=100)
    return warmed(config, CHAINS * EACH, STEEP, (3, 8, 8))[0]


@pytest.mark.parametrize(("steps", "each"), [(20, 1), (20, 3), (20, 20), (7, 7), (12, 5), (1, 1)])
def test_all_offsets_together_give_every_t_equally_often(steps: int, each: int) -> None:
    chains = Chains(np.full(steps, each), np.arange(steps), steps)
    t = chains.batch(0, steps).t
    assert t.bincount(minlength=steps).tolist() == [each] * steps
    gaps = t.view(steps, each).diff()
    assert gaps.numel() == 0 or gaps.min() >= steps // each


def test_a_pool_has_as_many_slots_in_every_tenth_of_t(harvested: NoisyPool) -> None:
    assert (harvested.t * 10 // 200).bincount().tolist() == [CHAINS] * 10
    assert len(harvested.x.flatten(1).unique(dim=0)) == len(harvested)


def covariances() -> torch.Tensor:
    """(T,T): Cov(x_s, x_t) in the ancestral chain, whose steps are linear for Gaussian data; from DDPM, Eq. 6 and 7."""
    abar = STEEP.alphas_cumprod.double()
    steps = len(abar)
    found = torch.zeros(steps, steps, dtype=torch.float64)
    found[-1, -1] = 1
    for t in range(steps - 1, 0, -1):
        alpha, before = abar[t] / abar[t - 1], abar[t - 1]
        of_x_0 = abar[t].sqrt() * STD**2 / (abar[t] * STD**2 + 1 - abar[t])  # E[x_0 | x_t] = of_x_0 * x_t
        slope = before.sqrt() * (1 - alpha) / (1 - abar[t]) * of_x_0 + alpha.sqrt() * (1 - before) / (1 - abar[t])
        found[t - 1, t:] = slope * found[t, t:]
        found[t - 1, t - 1] = slope**2 * found[t, t] + (1 - alpha) * (1 - before) / (1 - abar[t])
    return found + found.triu(1).T


def test_the_states_of_a_chain_have_its_variance_and_covariance(harvested: NoisyPool) -> None:
    exact, t = covariances(), harvested.t.view(CHAINS, EACH).long()
    x = harvested.x.double().view(CHAINS, EACH, -1) / exact.diag().sqrt()[t].unsqueeze(2)
    wanted = exact / exact.diag().sqrt().outer(exact.diag().sqrt())
    wanted = torch.stack([wanted[row][:, row] for row in t]).mean(0)
    found = torch.einsum("cid,cjd->ij", x, x) / (CHAINS * x.shape[2])
    assert wanted.diagonal(1).min() > 0.3 and wanted[0, -1] < 0.02  # neighbours say much, ends say nothing
    assert (found - wanted).abs().max() < 0.02  # 5 standard errors
    others = torch.einsum("cid,cjd->ij", x, x.roll(1, 0)) / (CHAINS * x.shape[2])
    assert others.abs().max() < 0.02


@pytest.mark.parametrize("images", [50, 1000])
def test_a_chain_for_every_slot_is_the_ancestral_warm_up(images: int) -> None:
    ancestral = warmed(WarmupConfig("ancestral", batch_size=16), 50, SHORT, (2, 2, 2))[0]
    pool = warmed(WarmupConfig("harvest", images=images, batch_size=16), 50, SHORT, (2, 2, 2))[0]
    assert torch.equal(pool.x, ancestral.x) and torch.equal(pool.t, ancestral.t)


@pytest.mark.parametrize(("steps", "each"), [(20, 1), (20, 3), (100, 7), (12, 12)])
def test_the_expected_calls_are_the_mean_over_all_offsets(steps: int, each: int) -> None:
    total = sum(steps - 1 - offset // each for offset in range(steps))
    assert expected_calls(steps, steps * each, steps) == total
    assert Chains(np.full(steps, each), np.arange(steps), steps).calls(1, steps * each) == total


@pytest.mark.parametrize("images", [150, 400, 500, 600])
def test_the_cost_is_what_the_plan_says(images: int) -> None:
    config, schedule = WarmupConfig("harvest", images=images, batch_size=16), NoiseSchedule(num_timesteps=50)
    _, network = warmed(config, 500, schedule)
    assert network.samples == pytest.approx(warmup_calls(config, 500, schedule), rel=0.06)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 64])
def test_the_calls_of_a_warm_up_are_counted_exactly(batch_size: int) -> None:
    network = GaussianNetwork(SHORT, 0.0, STD)
    teacher = DiffusionModel(network, schedule=SHORT, shape=(1, 1, 1))
    config = WarmupConfig("harvest", images=23, batch_size=batch_size)
    warmup = Warmup(NoisyPool(100, (1, 1, 1)), teacher, config)
    made = list(warmup.run())
    assert warmup.calls == warmup.done == made[-1] == network.samples
    assert len(made) == network.calls and made == sorted(set(made))


def test_a_plan_counts_its_calls(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = distill_config(teacher_folder, tmp_path)
    config["distill"]["warmup"] = {"mode": "harvest", "images": 8}
    assert distil("--base", write_yaml(tmp_path / "c.yaml", config), "--plan") == 0
    offsets = numpy_generator(config["trainer"].get("seed", 0), 0, 0, "warmup").integers(0, 20, 8)
    calls = 8 * (19 - min(offsets) // 5)  # 40 slots, 5 for each chain; all walk on with the one that ends last
    assert f"{calls} samples (harvest)" in capsys.readouterr().out


def test_the_ranks_share_the_chains() -> None:
    config = DistillConfig(4, rho=1.0, warmup=WarmupConfig("harvest", images=1000))
    assert [warmup_of(config, ranks).images for ranks in (1, 3, 8)] == [1000, 334, 125]


@pytest.mark.parametrize(("ranks", "least"), [(1, 3), (4, 9)])
def test_too_few_chains_for_the_slots_are_refused(ranks: int, least: int) -> None:
    require_states(least, 50, 20, ranks)
    with pytest.raises(UserError, match=f"images: {least - 1} chains of 20 states .* the smallest number is {least}$"):
        require_states(least - 1, 50, 20, ranks)
    with pytest.raises(UserError, match="images: 2 chains"):
        warmed(WarmupConfig("harvest", images=2), 50, SHORT)
