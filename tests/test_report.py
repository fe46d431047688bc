"""What a page about runs is made of, and the command that writes it; test_report_page.py looks at the page."""

import base64
import io
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_dkdm import UserError, distill, write_report
from ldm_dkdm.commands.main import main
from ldm_dkdm.config.load import to_yaml
from ldm_dkdm.reports import tables
from ldm_dkdm.reports.charts import points_of, pool_map, sections_of, time_left
from ldm_dkdm.reports.images import MAX_SIDE, page_image
from ldm_dkdm.reports.run_files import MAX_GRIDS, RunFiles, read_runs
from ldm_dkdm.reports.tables import MAX_POINTS, read_series
from ldm_dkdm.reports.texts import blocks_of, differences_of, facts_of, names_of
from tests.cli import contents, write_yaml
from tests.run_folders import CARD, begun, finished, pool_to, rows_to, write_png, write_table
from tests.test_tables import NUMBERS, pixel_model


def data_in(page: Path) -> dict[str, object]:
    """What the script of a page draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def read_run(run: Path) -> RunFiles:
    """A run without others beside it."""
    return read_runs([run])[0]


def points(series: dict[str, object], name: str) -> tuple[list[int], list[float]]:
    return list(series[name].steps), list(series[name].values)


def test_folders_of_older_versions_are_one_curve(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    old = {"metrics": (9, 19, 29), "metrics-from-20": (29, 39), "metrics-from-100": (109,)}
    for number, (name, steps) in enumerate(old.items()):
        table = [{"epoch": 0, "eps_mse": 0.5, "loss": step + number / 10, "step": step} for step in steps]
        write_table(run / name / "metrics.csv", table)
    write_table(run / "metrics.csv", [{"step": 120, "loss": 7}])  # resumed with this version
    series = read_run(run).series
    assert points(series, "loss") == ([9, 19, 29, 39, 109, 120], [9, 19, 29.1, 39.1, 109.2, 7])
    assert series.keys() == {"loss", "eps_mse"}


def test_steps_that_were_taken_again_count_once(tmp_path: Path) -> None:
    first = write_table(tmp_path / "a.csv", [{"step": s, "loss": s} for s in (10, 20, 30, 40)])
    again = write_table(tmp_path / "b.csv", [{"step": s, "loss": -s} for s in (25, 35)])
    assert points(read_series([first, again]), "loss") == ([10, 20, 25, 35], [10, 20, -25, -35])


def test_cells_that_are_empty_or_not_finite_are_no_points_and_rows_of_one_step_are_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss,psnr\n1,0.5,\n2,nan,\n2,,20\n3,inf,21\n4,0.25,\n")
    series = read_series([file])
    assert points(series, "loss") == ([1, 4], [0.5, 0.25])
    assert points(series, "psnr") == ([2, 3], [20, 21])


def test_a_row_that_is_being_written_waits_for_the_next_page(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    (run / "metrics.csv").write_text("step,loss,eps_mse\n1,0.5,0.4\n2,0.")
    assert points(read_run(run).series, "loss") == ([1], [0.5])
    (run / "metrics.csv").write_text("")
    assert read_run(run).series == {}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("step,loss\n1,high\n", "metrics.csv: step 1, loss: 'high' is not a number"),
        ("step,loss\n1\n2,3\n", "metrics.csv: line 2 has 1 cells, the header 2"),
        ("loss\n1\n", "metrics.csv: has no column step"),
        ("step,loss\n,1\n", "metrics.csv: line 2 has no step"),
        ("step,loss\nnan,1\n", "metrics.csv: line 2 has no step"),
    ],
)
def test_a_damaged_table_is_refused_and_nothing_is_written(tmp_path: Path, table: str, message: str) -> None:
    run = begun(tmp_path / "run")
    (run / "metrics.csv").write_text(table)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(message)}$"):
        write_report([run], run / "report.html")
    assert contents(tmp_path) == before


def test_what_is_not_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_yaml(tmp_path / "student" / "config.yaml", CARD).parent
    other = write_yaml(tmp_path / "other" / "config.yaml", {"x": 1}).parent
    for path, words in (
        (model, "is a model folder; name the run folder that it is in"),
        (other, "its config.yaml is not a run's"),
        (tmp_path / "nowhere", "not a run folder (it has no config.yaml)"),
    ):
        with pytest.raises(SystemExit) as end:
            main("report", [str(path)])
        assert (end.value.code, capsys.readouterr().err) == (2, f"error: {path}: {words}\n")
    begun(tmp_path / "logs" / "first")
    begun(tmp_path / "logs" / "second")
    write_yaml(tmp_path / "logs" / "model" / "config.yaml", CARD)
    with pytest.raises(UserError, match=r"logs: not a run folder .*; it holds the runs \S+/(first|second), \S+: name"):
        write_report(tmp_path / "logs", tmp_path / "report.html")
    with pytest.raises(UserError, match=r"^runs: name at least one"):
        write_report([], tmp_path / "report.html")
    damaged = finished(tmp_path / "damaged")
    for text, words in (('{"a": ', "is damaged"), ("[1]", "is not a file of figures")):
        (damaged / "student" / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match=rf"evaluation\.json: {words}"):
            write_report([damaged], tmp_path / "report.html")
    assert not list(tmp_path.rglob("report.html"))


def test_the_command_writes_one_runs_page_into_its_folder_and_that_of_several_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(begun(Path("logs") / name)) for name in ("a", "b")]
    for arguments in ([runs[0]], runs, [*runs, "-o", "x/page.html"]):
        with pytest.raises(SystemExit) as end:
            main("report", arguments)
        assert end.value.code == 0
    assert capsys.readouterr().out.split() == ["logs/a/report.html", "report.html", "x/page.html"]
    assert len(list(tmp_path.rglob("*.html"))) == 3
    assert [run["name"] for run in data_in(Path("report.html"))["runs"]] == ["a", "b"]


def test_a_run_that_is_named_twice_is_shown_once_and_others_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [begun(tmp_path / "x" / "run"), begun(tmp_path / "y" / "run")]
    page = write_report([*runs, tmp_path / "x" / ".." / "x" / "run"], tmp_path / "report.html")
    assert [run["name"] for run in data_in(page)["runs"]] == ["x/run", "y/run"]
    assert names_of([Path("logs/a"), Path("logs/b")]) == ["a", "b"]
    assert names_of([Path("logs/a")]) == ["a"]


def test_long_runs_are_thinned_to_their_ends(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    write_table(run / "metrics.csv", rows_to(100_000))
    for step in range(1, 61):
        write_png(run / "samples" / f"step={step:08d}.png", step, side=4)
    page = write_report([run], tmp_path / "report.html")
    drawn = data_in(page)["runs"][0]
    assert len(drawn["points"]["loss"]["x"]) == len(set(drawn["points"]["loss"]["x"])) == MAX_POINTS
    assert drawn["points"]["loss"]["x"][:: MAX_POINTS - 1] == [10, 100_000]
    assert len(drawn["points"]["agreement"]["x"]) == MAX_POINTS  # 2000 of 10000 rows: all are kept
    assert drawn["points"]["agreement"]["x"][:3] == [50, 100, 150]
    steps = [grid["step"] for grid in drawn["grids"]]
    assert (len(steps), steps[0], steps[-1]) == (MAX_GRIDS, 1, 60)
    assert f"{MAX_GRIDS} of the 60 grids of run are shown." in page.read_text()


def test_large_images_are_made_smaller_and_small_ones_are_kept(tmp_path: Path) -> None:
    write_png(tmp_path / "small.png", 0)
    assert page_image(tmp_path / "small.png").uri.startswith("data:image/png;base64,")
    shades = np.linspace(0, 255, 1024 * 1536 * 3).reshape(1024, 1536, 3).astype(np.uint8)
    Image.fromarray(shades).save(tmp_path / "large.png")
    large = page_image(tmp_path / "large.png")
    assert (large.width, large.height) == (1536, 1024)
    assert large.uri.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(large.uri.partition(",")[2]))) as image:
        assert image.size == (MAX_SIDE, MAX_SIDE * 2 // 3)


def test_a_damaged_image_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished(tmp_path / "run")
    (run / "samples" / "step=00000050.png").write_bytes(b"\x89PNG")
    with caplog.at_level(logging.WARNING, "ldm_dkdm"):
        assert [grid.step for grid in read_run(run).grids] == [100]
    assert "step=00000050.png: left out" in caplog.text


def test_the_time_left_follows_the_speed_and_ends_with_the_time_limit(tmp_path: Path) -> None:
    rows = [{"step": s, "seconds": 10 * s, "steps_per_second": r} for s, r in ((10, 0.1), (20, 0.5), (30, 0.0))]
    run = begun(tmp_path / "run", trainer={"max_steps": 100})
    write_table(run / "metrics.csv", rows)
    found = time_left(read_run(run))
    assert found is not None and (list(found.steps), list(found.values)) == ([10, 20], [900, 160])
    limited = begun(tmp_path / "limited", trainer={"max_steps": 100, "max_minutes": 4})
    write_table(limited / "metrics.csv", rows)
    found = time_left(read_run(limited))
    assert found is not None and list(found.values) == [140, 40]


def test_the_pools_map_holds_shares(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    assert pool_map(read_run(run)) is None
    write_table(run / "pool.csv", pool_to(30))
    found = pool_map(read_run(run))
    assert found is not None
    np.testing.assert_allclose(np.sum(found["z"], axis=0), 1)
    assert (found["x"], found["y"][0], found["y"][-1]) == ([10, 20, 30], 0.025, 0.975)


def test_columns_that_no_chart_names_get_one(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    write_table(run / "metrics.csv", [{"step": 1, "loss": 1, "dead_codes": 3, "seconds": 1}])
    found = read_run(run)
    sections = sections_of([found], [points_of(found, "seconds")])
    assert {title: [chart.title for chart in charts] for title, charts in sections.items()} == {
        "Loss": ["Loss"],
        "Speed": ["Training time"],
        "Other columns": ["dead_codes"],
    }


def test_an_early_end_counts_the_steps_of_the_saved_model(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", 50)
    write_yaml(run / "student" / "config.yaml", {**CARD, "info": {"step": 57}})
    assert facts_of(read_run(run))["Steps"] == "57 of 100"


def test_values_are_written_as_in_yaml(tmp_path: Path) -> None:
    runs = [begun(tmp_path / name, **config) for name, config in (("a", {"x": {"y": True}}), ("b", {"x": {"y": None}}))]
    assert differences_of([read_run(run) for run in runs]) == [("x.y", ["true", "null"])]


def test_a_card_is_read_without_its_front_matter() -> None:
    card = "---\ntags: [a]\n---\n\n# Title\n\nSome text.\n\n- **key**: value\n- other\n"
    assert blocks_of(card) == [("heading", ["Title"]), ("text", ["Some text."]), ("item", ["key: value", "other"])]


def test_a_run_ends_with_its_page_and_a_page_that_fails_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = pixel_model()
    result = distill(teacher, teacher.narrowed("10M"), tmp_path / "run", **NUMBERS)
    page = tmp_path / "run" / "report.html"
    assert data_in(page)["runs"][0]["name"] == "run"
    assert to_yaml(result.model.node).splitlines()[0] in page.read_text()

    def failing(*arguments: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("ldm_dkdm.reports.page.write_report", failing)
    with caplog.at_level(logging.WARNING, "ldm_dkdm"):
        result = distill(teacher, teacher.narrowed("10M"), tmp_path / "other", **NUMBERS)
    assert result.step == 2
    assert "other/report.html: left out (OSError: no room)" in caplog.text


@pytest.mark.parametrize(("limit", "most", "words"), [("MAX_ROWS", 5, "more than 5 rows"), ("MAX_BYTES", 9, "MB, too")])
def test_a_table_without_end_is_refused_before_it_fills_the_memory(
    limit: str, most: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_table(tmp_path / "metrics.csv", rows_to(60))
    assert len(read_series([file])["loss"].steps) == 6
    monkeypatch.setattr(tables, limit, most)
    with pytest.raises(UserError, match=words):
        read_series([file])
