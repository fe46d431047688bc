"""The stream of training examples: one teacher call each, and every choice from (seed, rank, step)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool
from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.diffusion.process import eps_to_x0, posterior
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.records import DistillBatch, NoisyBatch
from tests.analytic import GaussianNetwork

SCHEDULE = NoiseSchedule(num_timesteps=20)
SHAPE = (2, 3, 3)


def _pool(t: Tensor, storage: Path | None = None, shape: tuple[int, ...] = SHAPE) -> NoisyPool:
    pool = NoisyPool(len(t), shape, torch.float32, storage)
    pool.fill(NoisyBatch(torch.randn(len(t), *shape, generator=torch.Generator().manual_seed(1)), t))
    return pool


def _stream(pool: NoisyPool, mean: float = 0.3, **options: object) -> DistillStream:
    teacher = DiffusionModel(GaussianNetwork(SCHEDULE, mean, std=0.5), schedule=SCHEDULE, shape=SHAPE)
    keys = {key: options.pop(key) for key in ("batch_size", "stride", "variant") if key in options}
    return DistillStream(teacher, pool, DistillConfig(**{"batch_size": 4, **keys}), **{"max_steps": 6, **options})


def _same(ours: list[DistillBatch], theirs: list[DistillBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.x, b.x) and torch.equal(a.t, b.t) and torch.equal(a.target.eps, b.target.eps)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_an_iteration_calls_the_teacher_exactly_once() -> None:
    stream = _stream(_pool(torch.arange(8)), max_steps=5)
    for done, batch in enumerate(stream, start=1):
        network = stream.teacher.network
        assert (network.calls, network.samples) == (done, 4 * done)
        torch.testing.assert_close(batch.target.eps, GaussianNetwork(SCHEDULE, 0.3, 0.5)(batch.x, batch.t))
    assert done == 5


@pytest.mark.parametrize("stride", [1, 3])
def test_a_drawn_slot_is_put_back_before_the_batch_is_handed_over(stride: int) -> None:
    pool = _pool(torch.arange(20))
    before = pool.take(torch.arange(20))
    batch = next(iter(_stream(pool, stride=stride, batch_size=8)))
    drawn = batch.t  # slot i was at t = i
    assert torch.equal(batch.x, before.x[drawn])
    after = pool.take(torch.arange(20))
    moved = before.t.clone()
    moved[drawn] -= stride
    finished = moved < 0  # these begin again anywhere in the first stride
    assert 20 - stride <= after.t[finished].min() <= after.t[finished].max() <= 19
    assert torch.equal(after.t[~finished], moved[~finished])
    assert (after.x != before.x).flatten(1).all(1).nonzero().flatten().tolist() == sorted(drawn.tolist())


@pytest.mark.parametrize("variant", ["iterative", "dynamic"])
def test_chains_of_a_long_stride_visit_every_timestep_in_turn(variant: str) -> None:
    pool = _pool(torch.full((4,), 19), shape=(1, 1, 1))
    batches = list(_stream(pool, variant=variant, stride=5, max_steps=1000))
    visits = torch.cat([batch.t for batch in batches]).bincount(minlength=20)
    assert visits.min() > 0.5 * visits[:19].float().mean()
    if variant == "iterative":
        assert all(len(batch.t.unique()) == 1 for batch in batches)


@pytest.mark.parametrize("stride", [1, 3])
def test_the_next_state_is_a_posterior_draw_of_the_same_prediction(stride: int) -> None:
    pool = _pool(torch.full((1,), 10), shape=(4, 64, 64))
    batch = _stream(pool, stride=stride, batch_size=1).next_batch()
    x_0 = eps_to_x0(SCHEDULE, batch.x, batch.t, batch.target.eps)
    mean, variance = posterior(SCHEDULE, x_0, batch.x, batch.t, batch.t - stride)
    if stride > 1:  # what eps leaves open of x_0, as it reaches x_{t-stride}
        abar, abar_next = (SCHEDULE.alphas_cumprod[10 - step].item() for step in (0, stride))
        unknown = (1 / abar - 1) * (1 - batch.target.eps.square().mean().item())
        weight = abar_next**0.5 * (1 - abar / abar_next) / (1 - abar)
        variance = variance + weight**2 * min(1.0, max(0.0, unknown))
    noise = (pool.x - mean) / variance.sqrt()
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)


def test_a_finished_slot_restarts_from_noise_that_is_fresh() -> None:
    pools = [_pool(torch.zeros(4), shape=(4, 16, 16)) for _ in range(2)]
    for pool, mean in zip(pools, (0.3, 50.0)):
        stream = _stream(pool, mean)
        stream.next_batch()
        assert pool.t.tolist() == [19] * 4
    restarted = pools[0].x.clone()
    torch.testing.assert_close(pools[1].x, restarted)
    assert restarted.std().item() == pytest.approx(1, abs=0.06)
    assert not torch.equal(restarted[0], restarted[1])
    pools[1].t.zero_()
    stream.next_batch()
    assert not torch.equal(pools[1].x.flatten().sort().values, restarted.flatten().sort().values)


def test_one_seed_gives_one_stream_and_another_rank_another(tmp_path: Path) -> None:
    run = [list(_stream(_pool(torch.arange(8)), seed=5)) for _ in range(2)]
    mapped = list(_stream(_pool(torch.arange(8), tmp_path / "pool.bin"), seed=5))
    assert len(run[0]) == 6
    assert _same(run[0], run[1])
    assert _same(run[0], mapped)
    assert not _same(run[0], list(_stream(_pool(torch.arange(8)), seed=5, rank=1)))
    assert not _same(run[0], list(_stream(_pool(torch.arange(8)), seed=6)))


def test_a_resumed_stream_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole_pool, first_pool, second_pool = (_pool(torch.arange(8)) for _ in range(3))
    whole = list(_stream(whole_pool, stride=2))
    first = list(_stream(first_pool, stride=2, max_steps=3))
    first_pool.save(tmp_path / "pool", step=3)
    second = list(_stream(second_pool, stride=2, first_step=second_pool.load(tmp_path / "pool")))
    assert _same(whole, first + second)
    assert torch.equal(whole_pool.x, second_pool.x)
    assert torch.equal(whole_pool.t, second_pool.t)
