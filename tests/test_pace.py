"""The moves of slots: the wanted density of t is stationary, exactly."""

import pytest
import torch
from torch import Tensor

from ldm_dkdm import NoiseSchedule
from ldm_dkdm.distillation.pace import Pace

SCHEDULE = NoiseSchedule("scaled_linear", 1000)
CASES = [(stride, cap) for stride in (1, 2, 5, 20, 50, 800) for cap in (None, 20.0, 50.0)]


def places_between(cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoints and lengths of the intervals between cuts, without those that rounding makes."""
    cuts = cuts.sort().values
    real = cuts.diff() > 1e-11
    return ((cuts[1:] + cuts[:-1]) / 2)[real], cuts.diff()[real]


def transition(pace: Pace) -> tuple[Tensor, Tensor]:
    """The matrix (T,T) of the moves between timesteps, and the law (T,) of the first ones.

    A move is constant in its place between the cuts where it leaves or reaches another timestep, so that one place from
    each interval and the interval's length give it without sampling.
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), pace.density.cumsum(0)])
    total, count = edges[-1], len(pace.density)
    cuts = torch.cat([edges, edges + pace.stride])
    mass, length = places_between(cuts[cuts <= total])
    t = torch.searchsorted(edges, mass, right=True) - 1
    t_next = pace.next(t, (mass - edges[t]) / pace.density[t])
    assert (t_next < t).all() and t_next.min() >= -1
    flow = torch.zeros(count, count + 1, dtype=torch.float64)  # the last column counts the chains that end
    flow.index_put_((t, t_next), length, accumulate=True)
    span = total.clamp(max=pace.stride)
    place, share = places_between(((edges - total + span) / span).clamp(min=0))
    first = torch.zeros(count, dtype=torch.float64).index_add(0, pace.first(place), share)
    return (flow[:, :-1] + flow[:, -1:] * first) / pace.density[:, None], first


@pytest.mark.parametrize(("stride", "cap"), CASES)
def test_the_density_of_t_is_stationary(stride: int, cap: float | None) -> None:
    density = SCHEDULE.density(cap)
    matrix, _ = transition(Pace(density, stride))
    law = density / density.sum()
    assert (matrix.sum(1) - 1).abs().max() < 1e-9
    assert (law @ matrix - law).abs().max() < 1e-12


def test_an_even_density_advances_by_the_stride_and_begins_within_it() -> None:
    matrix, first = transition(Pace(SCHEDULE.density(), 20))
    assert first[:980].max() == 0 and first[980:] == pytest.approx([1 / 20] * 20, abs=1e-12)
    assert matrix.diagonal(-20) == pytest.approx([1] * 980, abs=1e-9)


def test_a_density_of_a_tenth_is_passed_ten_times_as_fast() -> None:
    matrix, first = transition(Pace(SCHEDULE.density(20.0), 2))
    assert SCHEDULE.density(20.0)[970] == pytest.approx(0.1)
    assert matrix[995, 975] == pytest.approx(1, abs=1e-9)
    assert first[980:] == pytest.approx([1 / 20] * 20, abs=1e-9)


def test_moves_from_random_places_keep_the_law() -> None:
    pace, count = Pace(SCHEDULE.density(20.0), 20), 100_000
    generator = torch.Generator().manual_seed(0)
    t = SCHEDULE.timesteps_at(torch.rand(count, generator=generator, dtype=torch.float64), 20.0)
    for _ in range(40):
        place, begin = torch.rand(2, count, generator=generator, dtype=torch.float64)
        moved = pace.next(t, place)
        t = torch.where(moved < 0, pace.first(begin), moved)
    law = (pace.density / pace.density.sum()).view(50, 20).sum(1)
    errors = (t.bincount(minlength=1000).view(50, 20).sum(1) / count - law) / (law / count).sqrt()
    assert errors.square().mean().sqrt() < 1.4 and errors.abs().max() < 4.5  # in standard errors
