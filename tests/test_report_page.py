"""The page about runs, as a browser shows it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ldm_dkdm import write_report
from tests.browser import DRIVER, Browser, browsing
from tests.run_folders import begun, finished, rows_to, write_json, write_png, write_table

pytestmark = pytest.mark.skipif(not DRIVER.is_file(), reason="needs chromedriver")
HOSTILE = "<img src=x onerror=hacked=1><script>hacked=1</script>"
CLOSING = "</script></pre></title></style><script>hacked=1</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about a run with everything and one without the teacher's samples."""
    home = tmp_path_factory.mktemp("two")
    longer = {"max_steps": 400, "learning_rate": 0.001}
    first, second = finished(home / "first"), finished(home / "second", 200, teacher=None, trainer=longer)
    return write_report([first, second], home / "report.html")


def test_one_run_is_shown_with_all_that_its_folder_holds(browser: Browser, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    browser.open(write_report([run], tmp_path / "report.html"))
    assert browser.complaints() == []
    assert browser.texts("h1") == ["run"]
    assert browser.texts("#samples figcaption") == ["Teacher", "Student, step 100"]
    steps = list(range(10, 101, 10))
    assert browser.curves("loss") == {"": (steps, [float(f"{1 / step:.6g}") for step in steps])}
    assert browser.curves("agreement") == {"": ([50, 100], [0.04, 0.02])}
    assert [browser.curves(f"agreement_q{i}")[""][1] for i in range(1, 5)] == [[i / 50, i / 100] for i in range(1, 5)]
    assert browser.curves("elapsed")[""][1] == [x / 2 for x in range(10, 101, 10)]
    assert browser.curves("left")[""][1] == [(100 - x) / 2 for x in range(10, 101, 10)]
    assert browser.curves("eps_mse_by_t")[""][0] == [0, 25, 50, 75]
    assert list(browser.curves("age_mean")) == ["mean", "median", "90%", "oldest"]
    rows = browser.run("return document.querySelector('.chart[data-chart=t_00]').data[0].z.map(row => [...row])")
    assert rows == [[0.025] * 10] * 10 + [[0.075] * 10] * 10
    assert browser.texts("#figures > .scroll tr") == [
        "eps mse by t quarter0.5, 0.25",
        "student parameters7",
        "emoji · FID12.5",
        "emoji · IS",
    ]
    assert browser.texts("#figures details tr")[:3] == [
        "emoji · samples · sourcerun",
        "emoji · samples · samplerddim",
        "emoji · samples · steps20",
    ]
    assert browser.texts("#figures details tr")[-1] == "emoji · warnings5 samples, JPEG"
    assert browser.texts("#config pre") == [(run / "config.yaml").read_text().strip()]
    assert browser.texts("#card :is(h3, li)") == ["My student", "teacher: models/teacher"]


def test_the_slider_moves_the_samples_of_all_runs_by_keys(browser: Browser, two: Path) -> None:
    browser.open(two)
    files = two.parent
    stored = {step: write_png(files / "again.png", step) for step in (50, 100, 150, 200)}
    slider = browser.driver.find_element(By.ID, "step")
    shown = {}
    for key in ("", Keys.HOME, Keys.ARROW_RIGHT, Keys.END):
        slider.send_keys(key)
        step = int(browser.texts("#step-shown")[0])
        shown[key] = step
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        first, second = browser.pixels("img.student")
        np.testing.assert_array_equal(first, stored[min(step, 100)])
        np.testing.assert_array_equal(second, stored[step])
        assert browser.texts("#samples figcaption span") == [f"step {min(step, 100)}", f"step {step}"]
    assert list(shown.values()) == [200, 50, 100, 200]
    np.testing.assert_array_equal(browser.pixels(".samples img")[0], write_png(files / "again.png", 0))
    assert browser.complaints() == []


def test_runs_are_compared_in_every_chart_and_in_words(browser: Browser, two: Path) -> None:
    browser.open(two)
    assert browser.texts("#overview thead th") == ["first", "second"]
    assert browser.texts("#samples figcaption") == ["Teacher", "first, step 100", "second, step 200"]
    assert browser.texts("#figures > .scroll tr")[-2:] == ["emoji · FID12.512.5", "emoji · IS"]
    assert browser.texts("#card summary") == ["first: README.md", "second: README.md"]
    counts = {name: len(x) for name, (x, _) in browser.curves("loss").items()}
    assert counts == {"first": 10, "second": 20}
    assert [len(browser.curves("age_mean", run)["oldest"][0]) for run in (0, 1)] == [10, 20]
    assert browser.texts("#config table tbody tr")[0] == "trainer.max_steps100400"
    assert "Steps100 of 100200 of 400" in browser.texts("#overview tr")
    assert browser.run("return [...document.images].map(e => e.alt)") == [
        "Samples of the teacher",
        "Samples of first at step 100",
        "Samples of second at step 200",
    ]
    words = browser.run("return [...document.querySelectorAll('.chart')].map(e => e.ariaLabel)")
    assert words[0] == "Loss. first: 0.1 at 10, 0.01 at 100; second: 0.1 at 10, 0.005 at 200"
    assert all(words)


def test_curves_can_be_zoomed_and_drawn_over_the_training_time(browser: Browser, two: Path) -> None:
    browser.open(two)
    ends = "return document.querySelector('.chart[data-chart=loss]').layout.xaxis.range"
    whole = browser.run(ends)
    for button, reached in (
        ("Zoom in", lambda: whole[0] < browser.run(ends)[0] < browser.run(ends)[1] < whole[1]),
        ("Reset axes", lambda: browser.run(ends) == whole),
    ):
        place = f'.chart[data-chart="loss"] [data-title="{button}"]'
        browser.driver.find_element(By.CSS_SELECTOR, place).click()
        browser.wait_for(reached)
    browser.driver.find_element(By.CSS_SELECTOR, "#axis option:last-child").click()
    browser.wait_for(browser.drawn)
    minutes = [float(f"{step / 120:.6g}") for step in range(10, 201, 10)]
    assert browser.curves("loss")["second"][0] == minutes
    assert browser.curves("agreement")["first"][0] == [minutes[4], minutes[9]]
    assert browser.curves("eps_mse_by_t")["first"][0] == [0, 25, 50, 75]
    assert browser.complaints() == []


def test_a_run_that_has_just_begun_and_one_with_a_single_row(browser: Browser, tmp_path: Path) -> None:
    nothing, single = begun(tmp_path / "nothing"), begun(tmp_path / "single")
    write_table(single / "metrics.csv", rows_to(10))
    browser.open(write_report([nothing, single], tmp_path / "report.html"))
    assert browser.complaints() == []
    assert browser.curves("loss") == {"single": ([10], [0.1])}
    assert "Steps0 of 10010 of 100" in browser.texts("#overview tr")
    assert browser.texts("#samples") == browser.texts("#card") == []


def test_texts_of_files_run_nothing(browser: Browser, tmp_path: Path) -> None:
    run = finished(tmp_path / f"<b>{HOSTILE}".replace("/", "\u2215"), teacher=0, note=CLOSING)
    write_table(run / "metrics.csv", [{"step": 1, HOSTILE: 0.5, "loss": 1}])
    (run / "student" / "README.md").write_text(f"# {CLOSING}\n\n- {HOSTILE}\n")
    write_json(run / "student" / "evaluation.json", {HOSTILE: CLOSING})
    browser.open(write_report([run, finished(tmp_path / "other")], tmp_path / "report.html"))
    assert browser.complaints() == []  # the page's own policy, which stops other scripts, had nothing to stop
    assert browser.run("return typeof hacked") == "undefined"
    assert browser.run("return document.querySelectorAll('script, img[src=x]').length") == 4
    assert CLOSING in browser.texts("#config pre")[0] and HOSTILE in browser.texts("#card li")
    assert [HOSTILE.replace("_", " "), CLOSING] == browser.texts("#figures details tbody tr:first-child > *")[:2]
    assert HOSTILE in browser.texts("figcaption")
    assert browser.texts("#overview thead th")[0] == run.name
    assert browser.texts('.chart[data-chart="loss"] .legendtext')[0] == run.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_in_both_schemes_needs_no_sideways_scrolling(browser: Browser, two: Path, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.open(two, width=400)
    assert browser.run("return document.documentElement.scrollWidth") <= 400
    back, font = browser.run(
        "return [getComputedStyle(document.body).backgroundColor, document.querySelector('.chart').layout.font.color]"
    )
    assert (back, font) == {"light": ("rgb(255, 255, 255)", "#5d6570"), "dark": ("rgb(20, 23, 27)", "#a0a8b3")}[scheme]
