"""The benchmarks run and say what they measured."""

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import yaml

from ldm_dkdm import UserError, load_model, measure
from ldm_dkdm.config.load import load_config
from tests.cli import distil, write_yaml
from tests.parts import UNET_PARAMS, VQ_PARAMS, distill_config

ROOT = Path(__file__).parents[1]


def benchmark(name: str, *words: object) -> str:
    """Run benchmarks/<name> in this process -> what it printed."""
    script, printed, code = ROOT / "benchmarks" / name, io.StringIO(), 0
    line, places = patch.object(sys, "argv", [name, *map(str, words)]), patch.object(sys, "path", [*sys.path])
    with line, places, redirect_stdout(printed):
        sys.path.insert(0, str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    assert code == 0, code
    return printed.getvalue()


def test_training_with_and_without_data_is_timed_in_turns(tmp_path: Path) -> None:
    printed = benchmark(
        "training_speed.py", "quickstart", "--batch_size", 2, "--rounds", 1, "-o", tmp_path / "speed.json"
    )
    found = json.loads((tmp_path / "speed.json").read_text())
    (row,) = found["rows"]
    assert row["batch"] == 2 and found["machine"]["torch"] and found["rounds"] == 1
    ratio = row["without data"] / row["on data, encoding"]
    assert row["without / on data"] == pytest.approx(ratio) and f"{ratio:.3g}" in printed
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_memory_is_measured_for_every_size_of_the_pool(tmp_path: Path) -> None:
    benchmark("memory.py", "quickstart", "--batch_size", 2, "--rho", 0.5, "-o", tmp_path / "memory.json")
    on_data, pool = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert on_data["rho"] == "on data" and on_data["pool GB"] == 0
    assert pool["pool GB"] == pytest.approx(0.5 * 1000 * 2 * 3 * 16 * 16 * 2 / 1e9)  # slots of float16 latents
    assert pool["host GB"] > 0.1


@pytest.fixture(scope="module")
def runs(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        config = distill_config(teacher_folder, home, trainer={"max_steps": 1}, logging={"name": name})
        assert distil("--base", write_yaml(home / f"{name}.yaml", config)) == 0
    return [home / "one", home / "two"]


def test_students_are_timed_and_measured_beside_their_teacher(
    runs: list[Path], teacher_folder: Path, tmp_path: Path
) -> None:
    words = ("-n", 2, "--count", 8, "-c", 2, "--rounds", 1, "-o", tmp_path / "architectures.json")
    benchmark("architectures.py", *runs, *words)
    rows = json.loads((tmp_path / "architectures.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "one", "two"]
    for row, model in zip(rows[1:], runs, strict=True):
        found = measure(
            model, metrics=["fd"], reference=teacher_folder, features="efficientnet-lite0", count=8, steps=2
        )
        assert row["FD-efficientnet"] == pytest.approx(found.figures["FD-efficientnet"], rel=1e-4)
        assert row["M parameters"] == load_model(model).parameters / 1e6 and row["images/s"] > 0


def test_students_are_measured_beside_their_teachers(runs: list[Path], tmp_path: Path) -> None:
    reference = tmp_path / "images.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    words = ("--reference", reference, "--count", 8, "-c", 2, "-o", tmp_path / "teachers.json")
    benchmark("teachers.py", *runs, *words)
    found = json.loads((tmp_path / "teachers.json").read_text())
    assert [row["run"] for row in found["rows"]] == ["one", "two"]
    assert found["rows"][0]["teacher"] == pytest.approx(found["rows"][1]["teacher"])  # one teacher: no line
    assert "slope" not in found and (tmp_path / "teachers.png").is_file()


def test_the_demo_is_measured_beside_its_teacher(runs: list[Path], teacher_folder: Path, tmp_path: Path) -> None:
    words = ("--count", 66, "-c", 2, "--chains", 1, "-n", 2, "--timed_steps", 2, "--rounds", 1)
    benchmark("demo.py", runs[0], *words, "-o", tmp_path / "demo.json")
    rows = {row["figure"]: row for row in json.loads((tmp_path / "demo.json").read_text())["rows"]}
    assert rows["M parameters"]["student"] == load_model(runs[0]).parameters / 1e6
    found = measure(runs[0], metrics=["pixel-frechet"], reference=teacher_folder, count=66, steps=2)
    assert rows["pixel Frechet"]["student"] == pytest.approx(found.figures["pixel Frechet"], rel=1e-4)
    assert rows["pixel Frechet"]["teacher"] > 0 and rows["images/s"]["teacher"] > 0  # other seeds
    assert rows["agreement_q1"]["student"] > 0 and rows["agreement_q1"]["teacher"] == ""


def test_processes_are_timed_by_the_steps_that_count(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from processes import SLOWER, rate_of, row_of, share_of

    recipe = write_yaml(tmp_path / "small.yaml", distill_config(teacher_folder, tmp_path))
    rate = rate_of(str(recipe), 1, 1, tmp_path / "run", steps=4)
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    seconds = [float(row[rows[0].index("seconds")]) for row in rows[1:]]
    assert len(seconds) == SLOWER + 4 and rate == pytest.approx(4 / (seconds[-1] - seconds[-5]))
    row = row_of("small", 2, 1, {1: [2.0, 3.0, 9.0], 2: [6.0]})
    assert row["steps/s"] == 6 and row["ratio"] == 2
    shared = load_config(["quickstart"], share_of("quickstart", 2))
    assert 2 * shared.distill.batch_size == load_config(["quickstart"]).distill.batch_size == 16
    assert shared.trainer.devices == 2
    with pytest.raises(UserError, match="3 do not divide the recipe's batch of 16"):
        share_of("quickstart", 3)
    with pytest.raises(UserError, match="nothing"):
        rate_of("nothing.yaml", 1, 1, tmp_path / "other", steps=4)


def test_the_tables_of_the_documentation_are_those_of_the_figures() -> None:
    benchmark("pages.py", "--check")


def test_the_line_is_the_least_squares_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from teachers import line

    assert line([1.0, 2.0, 3.0], [3.0, 5.0, 7.0]) == pytest.approx({"slope": 2, "intercept": 1, "correlation": 1})


def test_the_measured_agreement_is_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from ranking import agreement_of, rank_correlation

    (tmp_path / "metrics.csv").write_text("step,loss,agreement\n1,2,0.5\n2,1,0.25\n3,1,\n")
    checkpoints = tmp_path / "checkpoints"
    assert agreement_of(tmp_path) == 0.25 and agreement_of(checkpoints / "step=00000001.ckpt") == 0.5
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 9.0, 4.0, 16.0]) == pytest.approx(0.8)
    with pytest.raises(UserError, match="holds no agreement"):
        agreement_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no agreement at step 3"):
        agreement_of(checkpoints / "step=00000003.ckpt")


def test_the_shares_of_a_step_are_those_of_all_its_operations(tmp_path: Path) -> None:
    printed = benchmark("step_profile.py", "quickstart", "--steps", 1, "-o", tmp_path / "shares.json")
    found = json.loads((tmp_path / "shares.json").read_text())
    shares = {row["kind"]: float(row["quickstart"].rstrip("%")) for row in found["rows"]}
    assert sum(shares.values()) == pytest.approx(100, abs=1) and max(shares, key=shares.get) == "convolutions"
    own = list(found["convolutions_ms"]["quickstart"].values())
    assert f"as they are {own[0]:.1f}, in oneDNN's order {own[1]:.1f}" in printed


def test_the_levers_of_a_step_are_compared_with_the_shipped_one(tmp_path: Path) -> None:
    recipe = f"quickstart+{write_yaml(tmp_path / 'small.yaml', {'distill': {'batch_size': 2}})}"
    words = (recipe, "--levers", "twice the batch", "replay: 2", "--rounds", 1, "-o", tmp_path / "levers.json")
    benchmark("cpu_levers.py", *words)
    rows = json.loads((tmp_path / "levers.json").read_text())["rows"]
    assert [row["lever"] for row in rows] == ["as shipped", "twice the batch", "replay: 2"]
    assert [row["batch"] for row in rows] == [2, 4, 2]
    for row in rows:
        assert row["samples/s"] == pytest.approx(1e3 * row["batch"] / row["ms a step"])
        assert row["ratio"] == pytest.approx(row["samples/s"] / rows[0]["samples/s"])
        assert row["of peak"].endswith("%")


def test_two_versions_train_the_same_recipe_in_turns(tmp_path: Path) -> None:
    words = ("--steps", 2, "--rounds", 1, "-o", tmp_path / "versions.json")
    printed = benchmark("versions.py", ROOT, "quickstart=2", *words)
    found = json.loads((tmp_path / "versions.json").read_text())
    (row,) = found["rows"]
    assert row["recipe"] == "quickstart" and row["batch"] == "2" and row["old"] > 0 and row["new"] > 0
    assert row["ratio"] == pytest.approx(row["new"] / row["old"]) and f"{row['ratio']:.3g}" in printed


def test_a_missing_teacher_is_written_as_its_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from versions import teacher_words

    tree = yaml.safe_load((ROOT / "configs" / "ffhq256.yaml").read_text())
    tree["teacher"].update(ckpt="none.ckpt", params=UNET_PARAMS)
    tree["first_stage"].update(params=VQ_PARAMS)
    (word,) = teacher_words(str(write_yaml(tmp_path / "recipe.yaml", tree)), tmp_path)
    teacher = load_model(word.removeprefix("teacher.ckpt="), image_size=8, num_head_channels=32)
    assert teacher.network.model_channels == 32 and teacher.codec().parameters > 0
    assert teacher_words(str(ROOT / "configs" / "quickstart.yaml"), tmp_path) == []
