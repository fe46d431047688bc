"""Predictions that are shown several times: how often, in which company, and the same after a resume."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool, UserError
from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.distillation.redeal import redeal, share
from ldm_dkdm.distillation.replay import ReplayStream, calls_for, kept_bytes, stream_kind
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.records import DistillBatch, NoisyBatch
from tests.analytic import GaussianNetwork
from tests.cli import distil, write_yaml
from tests.parts import distill_config

SCHEDULE = NoiseSchedule(num_timesteps=20)
SHAPE = (2, 3, 3)
SLOTS, BATCH = 24, 4
several = pytest.mark.parametrize("uses", [2, 3, 5])


class LearnedVariance(GaussianNetwork):
    """With a variance that its state tells."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.cat([super().forward(x, t), x.sin()], 1)


class Labelled(GaussianNetwork):
    """With the label added to its prediction."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t) + label.view(-1, 1, 1, 1)


def new_stream(uses: int, first_step: int = 0, network: nn.Module | None = None, **options: object) -> DistillStream:
    pool = options.pop("pool", None) or NoisyPool(SLOTS, SHAPE)
    if not pool.filled:
        states = torch.randn(len(pool), *SHAPE, generator=torch.Generator().manual_seed(1))
        pool.fill(NoisyBatch(states, torch.arange(len(pool)) % 20))
    network = network or GaussianNetwork(SCHEDULE, 0.3, 0.5)
    teacher = DiffusionModel(network, schedule=SCHEDULE, shape=SHAPE)
    config = DistillConfig(BATCH, replay=uses, **options)
    return stream_kind(config)(teacher, pool, config, 40, 7, 0, "cpu", first_step)


def keys(batch: DistillBatch) -> list[bytes]:
    """What tells each prediction from all others."""
    return [x.numpy().tobytes() for x in batch.x]


def tensors(batch: DistillBatch) -> list[Tensor]:
    found = [batch.x, batch.t, batch.label, batch.target.eps, batch.target.x_0, batch.target.var_fraction]
    return [tensor for tensor in found if tensor is not None]


def test_without_a_replay_the_stream_is_the_plain_one() -> None:
    assert stream_kind(DistillConfig(BATCH)) is DistillStream
    assert stream_kind(DistillConfig(BATCH, replay=2)) is ReplayStream


@several
def test_every_prediction_is_shown_in_as_many_batches_with_one_call_for_as_many(uses: int) -> None:
    stream = new_stream(uses)
    shown, new, last = Counter(), [], {}
    for step in range(40):
        seen = keys(stream.next_batch())
        assert len(set(seen)) == BATCH
        assert stream.teacher.network.calls == calls_for(step + 1, uses)
        new += [key for key in seen if key not in shown]
        shown.update(seen)
        last.update(dict.fromkeys(seen, step))
    assert stream.teacher.network.calls == pytest.approx(40 / uses + (uses - 1) / 2, abs=1)
    done = [key for key in new if last[key] < 40 - 2 * uses]  # none of them comes again
    assert {shown[key] for key in done} == {uses}
    assert len(done) >= BATCH * (40 / uses - 4)


@several
def test_all_kept_predictions_are_shown_once_between_two_calls(uses: int) -> None:
    stream, shares = new_stream(uses), []
    while stream.step < 40 - uses:
        called, before = stream.teacher.network.calls, []
        size = min(called + 1, uses)
        before = [key for _ in range(size) for key in keys(stream.next_batch())]
        assert stream.teacher.network.calls == called + 1
        assert len(set(before)) == size * BATCH
        fresh = set(before) - shares[-1] if shares else set(before)
        assert len(fresh) == BATCH
        shares.append(set(before))
    gone = [len(one - other) for one, other in pairwise(shares)]
    assert gone == [0] * (uses - 1) + [BATCH] * (len(gone) - uses + 1)


@several
def test_a_target_stays_with_its_state(uses: int) -> None:
    stream = new_stream(uses, network=LearnedVariance(SCHEDULE, 0.3, 0.5))
    exact = GaussianNetwork(SCHEDULE, 0.3, 0.5)
    for batch in [stream.next_batch() for _ in range(20)]:
        torch.testing.assert_close(batch.target.eps, exact(batch.x, batch.t))
        torch.testing.assert_close(batch.target.var_fraction, batch.x.sin())
        abar = SCHEDULE.alphas_cumprod[batch.t].view(-1, 1, 1, 1)
        x_0 = (batch.x - (1 - abar).sqrt() * batch.target.eps) / abar.sqrt()
        torch.testing.assert_close(batch.target.x_0, x_0.float(), rtol=1e-3, atol=1e-3)


def test_a_label_stays_with_its_state() -> None:
    pool, schedule = NoisyPool(SLOTS, SHAPE, labeled=True), SCHEDULE
    states = torch.randn(SLOTS, *SHAPE, generator=torch.Generator().manual_seed(1))
    pool.fill(NoisyBatch(states, torch.arange(SLOTS) % 20, torch.arange(SLOTS) % 4))
    teacher = DiffusionModel(Labelled(schedule, 0.3, 0.5), schedule=schedule, shape=SHAPE, num_classes=4)
    stream = ReplayStream(teacher, pool, DistillConfig(BATCH, replay=3), 20)
    for batch in [stream.next_batch() for _ in range(8)]:
        found = batch.target.eps - GaussianNetwork(schedule, 0.3, 0.5)(batch.x, batch.t)
        assert torch.equal(found.mean((1, 2, 3)).round().long(), batch.label)
        assert len(batch.label.unique()) > 1
    kept = sum(tensor.nbytes for tensor in stream.kept.values())
    assert kept == kept_bytes(stream.config, SHAPE, learned=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"draws": "stratified"}, {"discard": 0.4}, {"stride": 2, "input_perturbation": 0.1}],
)
def test_a_stream_resumed_at_any_step_is_the_uninterrupted_one(options: dict[str, object], tmp_path: Path) -> None:
    whole = new_stream(3, **options)
    wanted = [tensors(whole.next_batch()) for _ in range(18)]
    first = new_stream(3, **options)
    for step in range(18):
        first.pool.save(tmp_path / "pool", step)
        pool = NoisyPool(SLOTS, SHAPE)
        second = new_stream(3, pool.load(tmp_path / "pool"), pool=pool, **options)
        for ours in wanted[step : step + 7]:
            assert all(map(torch.equal, tensors(second.next_batch()), ours))
        first.next_batch()
    assert second.step == 18 and torch.equal(second.pool.x, whole.pool.x) and torch.equal(second.pool.t, whole.pool.t)


def test_the_age_of_a_slot_counts_batches_of_the_student() -> None:
    stream = new_stream(3)
    for _ in range(18):
        stream.next_batch()
    assert set(stream.pool.updated.tolist()) <= {0, 1, 2, 4, 7, 10, 13, 16}
    assert stream.pool.updated.max() == 16


def test_pools_that_are_dealt_again_begin_without_kept_predictions(tmp_path: Path) -> None:
    stream = new_stream(3)
    for _ in range(8):
        stream.next_batch()
    stream.pool.save(tmp_path / "pool", 8)
    pool = NoisyPool(share([tmp_path / "pool"], 1, 2), SHAPE)
    redeal(pool, [tmp_path / "pool"], 1, 2)
    later = new_stream(3, 8, pool=pool)
    for batches in (1, 2, 3, 3):
        calls = later.teacher.network.calls
        assert len({key for _ in range(batches) for key in keys(later.next_batch())}) == batches * BATCH
        assert later.teacher.network.calls == calls + 1
    assert later.step == 17


@pytest.mark.parametrize(
    "change",
    [
        {"called": torch.tensor(3)},
        {"called": torch.tensor([1, 2])},
        {"eps": torch.zeros(3, *SHAPE)},
        {"t": torch.zeros(12)},
        {"label": torch.zeros(12, dtype=torch.int64)},
        {"x": None},
    ],
)
def test_predictions_that_do_not_fit_the_run_are_refused(change: dict[str, Tensor | None], tmp_path: Path) -> None:
    stream = new_stream(3)
    for _ in range(8):
        stream.next_batch()
    stream.pool.beside = {k: v for k, v in {**stream.pool.beside, **change}.items() if v is not None}
    stream.pool.save(tmp_path / "pool", 8)
    pool = NoisyPool(SLOTS, SHAPE)
    step = pool.load(tmp_path / "pool")
    with pytest.raises(UserError, match="replay: the predictions in the pool's file do not fit"):
        new_stream(3, step, pool=pool)


def test_a_run_with_both_goes_on_exactly_and_its_plan_counts_the_calls(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"replay": 2, "draws": "stratified"}
    files = {}
    for name, stops in (("whole", (6,)), ("parts", (4, 6))):  # calls at 0, 1, 3 and 5
        logging = {"name": name, "save_every": 100, "sample_every": 100}
        base = write_yaml(
            tmp_path / f"{name}.yaml", distill_config(teacher_folder, tmp_path, distill=method, logging=logging)
        )
        for number, stop in enumerate(stops):
            source = ("--resume", tmp_path / name) if number else ("--base", base)
            assert distil(*source, f"trainer.max_steps={stop}") == 0
        files[name] = (tmp_path / name / "student" / "student.safetensors").read_bytes()
    assert files["whole"] == files["parts"]
    capsys.readouterr()
    monkeypatch.setattr("ldm_dkdm.training.plan.time_needed", lambda parts: {"time": "1 s"})
    assert distil("--base", base, "--plan", "trainer.max_steps=8", "logging.name=new") == 0
    assert "20 samples (5 calls of 4)" in capsys.readouterr().out  # 1 + 2 + 2 + 2 batches, and one more call
    assert distil("--resume", tmp_path / "parts", "--plan", "trainer.max_steps=20") == 0
    assert "28 samples (7 calls of 4)" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["iterative", "shuffled"])
@pytest.mark.parametrize("change", ["replay=2", "draws=stratified"])
def test_batches_that_stay_together_are_neither_replayed_nor_drawn(
    variant: str, change: str, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path))
    assert distil("--base", base, f"distill.variant={variant}", f"distill.{change}") == 2
    key = change.partition("=")[0]
    assert f"distill.{key}: has an effect with variant: dynamic only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
