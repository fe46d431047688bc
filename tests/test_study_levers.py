"""The study's levers that the product does not have, and its relations between figures."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool
from ldm_dkdm.config.schema import DistillConfig, LossConfig, TrainerConfig
from ldm_dkdm.diffusion.process import eps_to_x0
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.networks import UNet
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.training import from_teacher
from tests.analytic import GaussianNetwork
from tests.cli import ROOT, table, write_yaml
from tests.parts import distill_config, first_stage_folder, model_folder

SCHEDULE = NoiseSchedule(num_timesteps=100)
SLOTS, SHAPE = 60, (1, 2, 2)
REPLACED = ((UNet, "forward"), (UNet, "_run"), (StudentModule, "training_step"), (StudentModule, "_lr_factor"))


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study's folder in the path; what a lever replaces is put back."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "study")
    for owner, name in REPLACED:
        monkeypatch.setattr(owner, name, vars(owner)[name])
    monkeypatch.setitem(vars(from_teacher), "stream_kind", vars(from_teacher)["stream_kind"])


@pytest.fixture
def tried(study: None) -> ModuleType:
    return importlib.import_module("tried")


def pool(t: int | None = None) -> NoisyPool:
    """Slots at every timestep, or all at one."""
    filled = NoisyPool(SLOTS, SHAPE, torch.float32)
    states = torch.randn(SLOTS, *SHAPE, generator=torch.Generator().manual_seed(0))
    filled.fill(NoisyBatch(states, torch.arange(SLOTS) if t is None else torch.full((SLOTS,), t)))
    return filled


def teacher(std: float = 0.5, **options: object) -> DiffusionModel:
    return DiffusionModel(GaussianNetwork(SCHEDULE, 0.3, std), schedule=SCHEDULE, shape=SHAPE, **options)


def test_the_learning_rate_cools_down_at_the_end(tried: ModuleType) -> None:
    tried.install_cooldown()
    module = StudentModule(teacher(), LossConfig(), TrainerConfig(max_steps=100, learning_rate=1.0, lr_warmup=4))
    assert [module._lr_factor(step) for step in (0, 70, 85, 100)] == pytest.approx([0.2, 1, 0.5, 0])


def test_about_half_of_the_slots_at_low_t_begin_again(tried: ModuleType) -> None:
    for t, least, most in ((5, 15, 45), (50, 0, 0)):
        slots = pool(t)
        tried.Restarts(teacher(), slots, DistillConfig(SLOTS), 1).next_batch()
        moved = slots.t != t - 1
        assert least <= moved.sum() <= most
        assert not moved.any() or slots.t[moved].float().std() > 10
        assert torch.isfinite(slots.x).all()


def test_the_consistent_target_means_its_clipped_sample(tried: ModuleType) -> None:
    wide = teacher(std=3.0, space="pixel")  # its samples leave [-1, 1]
    batch = tried.Consistent(wide, pool(), DistillConfig(SLOTS), 1).next_batch()
    assert batch.target.x_0.abs().max() == 1
    meant = eps_to_x0(SCHEDULE, batch.x, batch.t, batch.target.eps)
    torch.testing.assert_close(meant, batch.target.x_0, atol=1e-4, rtol=0)


def test_draws_follow_the_losses_and_the_weighted_loss_keeps_its_mean(tried: ModuleType) -> None:
    guide, slots, rng = tried.LossAware(SCHEDULE.num_timesteps), pool(), np.random.default_rng(0)
    for _ in range(60):
        t = slots.t[guide.draw(slots, 6, rng)].long()
        assert guide.weigh(t, torch.where(t < 30, 3.0, 1.0)).shape == t.shape
    draws, losses = [], []
    for _ in range(2000):
        t = slots.t[guide.draw(slots, 6, rng)].long()
        weights = guide.weights.popleft()
        draws.append((t < 30).float().mean())
        losses.append((torch.where(t < 30, 3.0, 1.0) * weights).mean())
    assert torch.stack(draws).mean().item() == pytest.approx(0.75, abs=0.06)
    assert torch.stack(losses).mean().item() == pytest.approx(2.0, rel=0.06)  # half of the slots are below 30


def test_features_of_student_and_teacher_are_in_the_loss(tried: ModuleType, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "teacher", first_stage_folder(tmp_path / "stage"), model_channels=64)
    losses, whole = {}, [(owner, name, vars(owner)[name]) for owner, name in REPLACED]
    for weight in (None, 0.0, 0.1):
        base = write_yaml(
            tmp_path / "base.yaml", distill_config(folder, tmp_path / str(weight), trainer={"max_steps": 2})
        )
        for owner, name, value in whole:
            setattr(owner, name, value)
        if weight is not None:
            tried.FEATURE_WEIGHT = weight
            tried.LEVERS["features"]()
        with pytest.raises(SystemExit) as end:
            tried.run_command(arguments=["distill", "--base", str(base)])
        assert end.value.code == 0
        losses[weight] = table(tmp_path / str(weight) / "run" / "metrics.csv")[-1]["eps_mse"]
    assert losses[0.0] == losses[None] != losses[0.1]  # the features alone have moved the weights
    network = UNet(8, 3, 32, 3, 1, [2], (1, 2))
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
    found = {key: features.shape[1] for key, features in tried.features_of(network).items()}
    assert found == {("input", 8): 32, ("input", 4): 64, ("middle", 4): 64, ("output", 8): 32, ("output", 4): 64}


def test_students_are_fitted_to_their_teachers_and_figures_ranked(study: None) -> None:
    relations, plan = importlib.import_module("relations"), importlib.import_module("plan")
    arms = plan.arms_of(plan.read_plan())
    comparison = {"groups": [["digits/teacher100", "digits/dkdm"]]}
    floors = {"digits/teacher100": {"FD-efficientnet": 40.0}, "digits": {"FD-efficientnet": 20.0}}

    def row(data: float, decides: float, agreement: float) -> dict[str, object]:
        return {"figures": {"FD-efficientnet": data, "FD-efficientnet'": decides, "agreement": agreement}}

    rows = {"digits/teacher100": [row(90.0, 5.0, 1.0)], "digits/dkdm": [row(50.0, 5.0, 1.0)]}
    points = relations.teacher_points(comparison, rows, arms, floors)
    assert points == [(40.0, 90.0), (20.0, 50.0)] and relations.fit(points) == pytest.approx((2, 10, 1))
    assert "2 students of 2 teachers" in relations.fitted(points) and not relations.fitted(points[:1])
    rows = {"digits/dkdm": [row(1.0, float(n), 5.0 - n) for n in range(5)], "emoji64/dkdm": [row(1.0, 1.0, 1.0)]}
    text = relations.ranks(rows, arms)
    assert "students of `digits-teacher` (5 runs)" in text and "emoji64" not in text
    assert "| agreement | -1.00 |" in text


def test_the_agreement_is_compared_at_equal_time(study: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relations = importlib.import_module("relations")
    monkeypatch.setattr(relations, "ROOT", tmp_path)
    rates = [{"lever": "plain", "ratio": 1.0}, {"lever": "fast", "ratio": 2.0}]
    (tmp_path / "speeds.json").write_text(json.dumps({"rows": rates}))
    curve = [[100, 1.0], [200, 0.01]]
    rows = {arm: [{"curves": {"agreement": curve}}] for arm in ("a/plain", "a/fast")}
    comparison = {
        "groups": [["a/plain", "a/fast", "a/missing"]],
        "speeds": {"file": "speeds.json", "levers": {"a/plain": "plain", "a/fast": "fast"}},
    }
    text = relations.equal_time(comparison, rows)
    assert "| `a/plain` | 1.00 | 100 | 1 |" in text and "| `a/fast` | 2.00 | 200 | 0.01 |" in text
    assert relations.curve_at(curve, 150) == pytest.approx(0.1) and relations.curve_at(curve, 50) == 1.0
    assert relations.equal_time({"groups": []}, rows) == ""
