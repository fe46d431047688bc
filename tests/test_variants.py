"""The three ways to make batches (Sec. 3.3), random discard, input perturbation."""

import pytest
import torch
from torch import Tensor

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool
from ldm_dkdm.config.schema import DistillConfig, WarmupConfig
from ldm_dkdm.distillation.stream import VARIANTS, DistillStream
from ldm_dkdm.distillation.warmup import Warmup, preparation
from tests.analytic import GaussianNetwork

SCHEDULE = NoiseSchedule(num_timesteps=20)
SHAPE = (2, 3, 3)
every_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def stream_of(
    variant: str, slots: int = 8, batch_size: int = 4, max_steps: int = 50, **options: object
) -> DistillStream:
    """A prepared pool and the stream over it, with a teacher that counts its calls from zero."""
    config = DistillConfig(batch_size, variant=variant, warmup=WarmupConfig("ancestral", batch_size=8), **options)
    pool = NoisyPool(slots if VARIANTS[variant].expands else batch_size, SHAPE, torch.float32)
    teacher = DiffusionModel(GaussianNetwork(SCHEDULE, 0.3, 0.5), schedule=SCHEDULE, shape=SHAPE)
    list(Warmup(pool, teacher, preparation(config)).run())
    teacher.network.calls = 0
    return DistillStream(teacher, pool, config, max_steps)


def times(stream: DistillStream) -> Tensor:
    """t (batches, B) of a whole stream."""
    return torch.stack([batch.t for batch in stream])


def test_iterative_keeps_one_t_per_batch_and_restarts_after_0() -> None:
    found = times(stream_of("iterative"))
    assert (found == found[:, :1]).all()
    assert found[:, 0].tolist() == [19 - i % 20 for i in range(50)]


def test_iterative_begins_with_noise_and_needs_no_teacher_for_it() -> None:
    stream = stream_of("iterative", batch_size=512)
    assert stream.teacher.network.samples == 0
    assert stream.next_batch().x.std().item() == pytest.approx(1, abs=0.03)


def test_shuffled_keeps_its_members_together_at_their_own_t() -> None:
    found = times(stream_of("shuffled", batch_size=16))
    assert len(found[0].unique()) > 4
    assert torch.equal(found, (found[0] - torch.arange(50)[:, None]) % 20)


def test_dynamic_mixes_slots_of_a_larger_pool() -> None:
    stream = stream_of("dynamic", slots=40)
    found = times(stream)
    partners = [frozenset(row.tolist()) for row in found]
    assert len(set(partners)) > 40
    assert not torch.equal(found[1:], (found[:-1] - 1) % 20)


@every_variant
@pytest.mark.parametrize("discard", [0.0, 0.5])
def test_an_iteration_is_one_teacher_call_and_discarded_ones_are_not_seen(variant: str, discard: float) -> None:
    stream = stream_of(variant, max_steps=400, discard=discard)
    batches = list(stream)
    assert len(batches) == 400
    unseen = 1 - 400 / stream.teacher.network.calls
    assert unseen == pytest.approx(discard, abs=0.06) if discard else unseen == 0


def test_a_discarded_iteration_advances_the_chain_all_the_same() -> None:
    found = times(stream_of("iterative", discard=0.5))[:, 0]
    steps = (found[:-1] - found[1:]) % 20
    assert steps.float().mean().item() == pytest.approx(2, abs=0.5)
    assert len(steps.unique()) > 2


@every_variant
@pytest.mark.parametrize("options", [{"discard": 0.4}, {"input_perturbation": 0.1}, {"stride": 2}])
def test_a_resumed_stream_equals_the_uninterrupted_one(variant: str, options: dict[str, float]) -> None:
    whole, first = stream_of(variant, max_steps=6, **options), stream_of(variant, max_steps=3, **options)
    batches = [*first, *DistillStream(first.teacher, first.pool, first.config, 6, first_step=3)]
    for ours, theirs in zip(batches, whole, strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.t, theirs.t)
        assert torch.equal(ours.target.eps, theirs.target.eps)


def test_input_perturbation_changes_what_the_student_sees_and_nothing_else() -> None:
    plain, perturbed = (stream_of("iterative", 4096, 4096, input_perturbation=gamma) for gamma in (0.0, 0.1))
    pairs = list(zip(plain, perturbed, strict=True))
    for clean, noisy in (pairs[0], pairs[7]):
        assert torch.equal(clean.target.eps, noisy.target.eps)
        spread = 0.1 * (1 - SCHEDULE.alphas_cumprod[clean.t[0]]).sqrt().item()
        assert (noisy.x - clean.x).std().item() == pytest.approx(spread, rel=0.02)
    assert torch.equal(plain.pool.x, perturbed.pool.x)
