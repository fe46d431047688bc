"""The wheel, in a virtual environment of its own and outside a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("ldm_dkdm", "configs", "models", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SHIPPED = ("models/first_stage/vq-f4-emoji64", "models/teachers/emoji64")


def run(*command: object, cwd: Path) -> str:
    """Run a program that must succeed -> its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build folder in the checkout may hold modules that are gone."""
    home = tmp_path_factory.mktemp("wheel")
    tree = home / "tree"
    tree.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        if name != "models":
            copy(ROOT / name, tree / name)
    for name in SHIPPED:
        shutil.copytree(ROOT / name, tree / name)
    (tree / "models/teachers/emoji64-mine").mkdir()
    (tree / "models/teachers/emoji64-mine/model.safetensors").write_bytes(b"not to be shipped")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "-w", home)
    run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=home)
    return next(home.glob("ldm_dkdm-*.whl"))


@pytest.fixture(scope="module")
def dkdm(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed command; the libraries come from the running environment, the package does not."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=home)
    where = run(python, "-c", "import ldm_dkdm; print(ldm_dkdm.__file__)", cwd=home)
    assert where.startswith(str(site))
    return home / "bin" / "dkdm"


def test_the_wheel_holds_recipes_shipped_models_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")]
    models = [path.relative_to(ROOT) for folder in SHIPPED for path in (ROOT / folder).iterdir()]
    expected = {f"ldm_dkdm/recipes/{path}" for path in recipes} | {f"ldm_dkdm/{path}" for path in models}
    data = {name for name in names if name.startswith(("ldm_dkdm/recipes/", "ldm_dkdm/models/"))}
    assert data == expected
    assert {"ldm_dkdm/py.typed", *(f"ldm_dkdm/reports/page.{kind}" for kind in ("css", "html", "js"))} <= names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ldm_dkdm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_installed_package_finds_a_recipe_and_its_teacher_by_name(dkdm: Path, tmp_path: Path) -> None:
    code = "import ldm_dkdm as d; c = d.load_config('quickstart'); print(d.load_model(c.teacher.ckpt).parameters)"
    assert run(dkdm.parent / "python", "-c", code, cwd=tmp_path) == "11116739\n"
    assert "RECIPE" in run(dkdm, "distill", "-h", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


FEWER_SAMPLES = """
from ldm_dkdm.commands import demo
from ldm_dkdm.commands.entry import main

demo.SAMPLING[:4] = ["-n", "2", "-c", "2"]
main()
"""


def test_the_installed_demo_distils_the_shipped_teacher_and_draws_both(dkdm: Path, tmp_path: Path) -> None:
    small = ("trainer.max_steps=1", "distill.rho=0.01", "distill.warmup.images=16", "distill.warmup.steps=2")
    small += ("logging.sample_count=2", "logging.sample_steps=2")
    printed = run(dkdm.parent / "python", "-c", FEWER_SAMPLES, "demo", *small, cwd=tmp_path)
    assert printed.endswith("logs/quickstart/teacher_vs_student.png\n")
    assert (tmp_path / "logs/quickstart/student/config.yaml").is_file()
    assert (tmp_path / "logs/quickstart/report.html").is_file()
    comparison = tmp_path / "logs/quickstart/teacher_vs_student.png"
    drawn = comparison.stat().st_mtime_ns
    run(dkdm, "demo", cwd=tmp_path)  # reuses what is there
    assert comparison.stat().st_mtime_ns == drawn
