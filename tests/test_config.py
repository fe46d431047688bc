"""Sections that check themselves in Python as in YAML; choices from tables; recipes by name."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from ldm_dkdm.config import recipes
from ldm_dkdm.config.checked import Section, key, names_of, one_of, parse
from ldm_dkdm.config.load import load_config, to_yaml
from ldm_dkdm.config.recipes import find_config, find_shipped, recipe_names, shipped_folder
from ldm_dkdm.config.schema import (
    DiffusionConfig,
    DiffusionRun,
    DistillConfig,
    DistillRun,
    FirstStageRun,
    LossConfig,
    ModelCard,
    NetworkConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
    WarmupConfig,
)
from ldm_dkdm.errors import UserError
from tests.cli import ROOT

TABLES = [
    "ldm_dkdm.distillation.draws:DRAWS",
    "ldm_dkdm.distillation.stream:VARIANTS",
    "ldm_dkdm.distillation.warmup:WARMUPS",
    "ldm_dkdm.diffusion.samplers:SAMPLERS",
    "ldm_dkdm.diffusion.schedule:SCHEDULES",
    "ldm_dkdm.diffusion.process:PARAMETERIZATIONS",
    "ldm_dkdm.diffusion.objectives:LOSS_SPACES",
    "ldm_dkdm.pixel:SPACES",
    "ldm_dkdm.device:PRECISIONS",
]
WITHOUT_PACKAGE_INIT = """
import sys, types
package = types.ModuleType("ldm_dkdm")
package.__path__ = [sys.argv[1]]
sys.modules["ldm_dkdm"] = package
"""


def python(code: str) -> str:
    """Run code in a process that has imported nothing of the package, and return what it printed."""
    command = [sys.executable, "-c", WITHOUT_PACKAGE_INIT + code, str(ROOT / "ldm_dkdm")]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


REFUSED = {
    "range": (lambda: DistillConfig(batch_size=-1), "batch_size: must be at least 1, got -1"),
    "open_range": (lambda: LossConfig(weight_cap=0), "weight_cap: must be above 0, got 0.0"),
    "upper_end": (lambda: SamplingConfig(eta=1.5), "eta: must be at most 1, got 1.5"),
    "bool_for_integer": (lambda: DistillConfig(batch_size=True), "batch_size: expected a whole number, got True"),
    "fraction": (lambda: DistillConfig(batch_size=2.0), "batch_size: expected a whole number, got 2.0"),
    "nan": (lambda: DistillConfig(8, rho=float("nan")), "rho: must be a finite number, got nan"),
    "too_large": (lambda: TrainerConfig(2**63, 1e-3), "max_steps: 9223372036854775808 is too large"),
    "choice": (
        lambda: DistillConfig(8, variant="dynmic"),
        "variant: 'dynmic' is not one of iterative, shuffled, dynamic; did you mean 'dynamic'?",
    ),
    "literal": (lambda: DistillConfig(8, pool_dtype="int8"), "pool_dtype: 'int8' is not one of float16, float32"),
    "nested": (lambda: DistillConfig(8, warmup={"steps": 0}), "warmup.steps: must be at least 1, got 0"),
    "nested_twice": (
        lambda: parse(DistillRun, tree(distill={"batch_size": 8, "loss": {"space": "q"}}), ""),
        "distill.loss.space: 'q' is not one of eps, v, x0",
    ),
    "nested_section_itself": (
        lambda: parse(DistillRun, tree(diffusion={"betas": []}), ""),
        "diffusion.betas: expected one beta per timestep, got an empty list",
    ),
    "nested_unknown": (
        lambda: DistillConfig(8, warmup={"step": 1}),
        "warmup.step: unknown key; did you mean 'steps'?",
    ),
    "other_section": (lambda: DistillConfig(8, warmup=LossConfig()), "warmup: expected a section with keys, got Loss"),
    "entry_type": (lambda: SamplingConfig(labels=[1, 2.5]), r"labels[1]: expected a whole number, got 2.5"),
    "entry_range": (lambda: SamplingConfig(labels=[0, -1]), r"labels[1]: must be at least 0, got -1"),
    "text_for_list": (lambda: SamplingConfig(labels="12"), "labels: expected a list, every entry a whole number"),
    "betas_ends": (lambda: DiffusionConfig(betas=[0.1, 1.0]), "betas[1]: must be below 1, got 1.0"),
    "betas_number": (
        lambda: DiffusionConfig(num_timesteps=3, betas=[0.1, 0.2]),
        "num_timesteps: 3 is not the number of betas, which is 2",
    ),
    "shape": (lambda: card(shape=[3, 8]), "shape: expected 3 entries, got 2"),
}


def tree(**sections: dict) -> dict:
    """A distillation as plain values."""
    return {
        "teacher": {"ckpt": "x"},
        "student": {"budget": "1M"},
        "distill": {"batch_size": 8},
        "trainer": {"max_steps": 1, "learning_rate": 1e-3},
        **sections,
    }


def card(**values: object) -> ModelCard:
    return ModelCard("w", NetworkConfig("t", {}), DiffusionConfig(), **values)


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_value_is_refused_in_python(make, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        make()
    assert str(refusal.value).startswith(message)


def test_python_and_yaml_refuse_with_the_same_words_after_the_section() -> None:
    with pytest.raises(UserError) as here:
        DistillConfig(batch_size=0)
    with pytest.raises(UserError) as there:
        load_config("quickstart", ["distill.batch_size=0"])
    assert str(there.value) == f"distill.{here.value}"


def test_values_of_other_python_types_are_converted() -> None:
    config = DistillConfig(np.int64(8), rho=1, warmup={"steps": 5}, pool_from=Path("a/b"))
    assert (config.rho, type(config.rho), type(config.batch_size)) == (1.0, float, int)
    assert config.warmup == WarmupConfig(steps=5) and config.pool_from == "a/b"
    assert SamplingConfig(labels=np.arange(3)).labels == (0, 1, 2)
    run = DistillRun(TeacherConfig("x"), NetworkConfig("t", {"a": 1}), config, TrainerConfig(1, 1))
    assert run.student == StudentConfig("t", {"a": 1})


def test_replacing_a_value_checks_it() -> None:
    with pytest.raises(UserError, match="batch_size: must be at least 1"):
        dataclasses.replace(DistillConfig(8), batch_size=0)


def test_betas_set_the_number_of_timesteps_and_survive_yaml() -> None:
    diffusion = DiffusionConfig(betas=np.linspace(0.1, 0.3, 3))
    config = ModelCard("w", NetworkConfig("t", {}), diffusion, shape=(3, 8, 8))
    assert diffusion.num_timesteps == 3
    assert parse(ModelCard, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("table", TABLES)
def test_names_in_the_source_are_those_of_the_imported_table(table: str) -> None:
    module, name = table.split(":")
    read = python(f"from ldm_dkdm.config.checked import names_of; print(*names_of({table!r}), 'torch' in sys.modules)")
    table = getattr(__import__(module, fromlist=[name]), name)
    assert read.split() == [*table, "False"]


def test_a_name_added_to_a_table_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_dkdm.diffusion.samplers import SAMPLERS

    with pytest.raises(UserError, match="sampler: 'toy' is not one of ddim"):
        SamplingConfig(sampler="toy")
    monkeypatch.setitem(SAMPLERS, "toy", None)
    assert SamplingConfig(sampler="toy").sampler == "toy"
    assert names_of("ldm_dkdm.diffusion.samplers:SAMPLERS")[-1] == "toy"


def test_a_table_that_is_not_written_out_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Lost(Section):
        name: str = one_of("ldm_dkdm.errors:NOWHERE", "a", help="A name.")
        number: int = key(1, help="A number.")

    with pytest.raises(LookupError, match=r"errors.py: NOWHERE"):
        Lost()


def test_configs_need_no_torch() -> None:
    code = "from ldm_dkdm.config import load_config, keys; load_config('quickstart'); print('torch' in sys.modules)"
    assert python(code) == "False"


def test_every_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = recipe_names()
    assert {"ffhq256", "quickstart", "students/cnn14m"} <= set(names)
    assert [find_config(name) for name in names] == [ROOT / "configs" / f"{name}.yaml" for name in names]
    monkeypatch.chdir(tmp_path)
    for name in ("cnn14m", "students/cnn14m.yaml", "configs/students/cnn14m.yaml"):
        assert find_config(name) == ROOT / "configs" / "students" / "cnn14m.yaml"


def test_recipes_merge_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_config(["cifar10", "cnn14m"], ["trainer.seed=3"])
    files = [ROOT / "configs" / "cifar10.yaml", ROOT / "configs" / "students" / "cnn14m.yaml"]
    assert by_name == load_config(files, ["trainer.seed=3"])


def test_an_existing_file_wins_over_a_recipe_and_a_folder_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "ffhq256").write_text("trainer: {}")
    assert find_config("ffhq256") == Path("ffhq256")
    assert find_config("digits") == ROOT / "configs" / "digits.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ffhq", "did you mean 'ffhq256'?"), ("vit19n.yaml", "did you mean 'vit19m'?"), ("zzz", "recipes: celeba64, ")],
)
def test_an_unknown_recipe_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError) as refusal:
        find_config(name)
    assert str(refusal.value).startswith(f"{name}: no such config file or recipe; {hint}")


def test_shipped_models_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_shipped("models/teachers/emoji64") == ROOT / "models" / "teachers" / "emoji64"
    assert find_shipped("models/teachers/nowhere") == Path("models/teachers/nowhere")
    assert find_shipped("other/emoji64") == Path("other/emoji64")
    (tmp_path / "models" / "teachers" / "emoji64").mkdir(parents=True)
    assert find_shipped("models/teachers/emoji64") == Path("models/teachers/emoji64")


def test_an_installed_package_has_its_recipes_and_models_inside(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text("trainer: {}")
    (tmp_path / "models" / "teachers").mkdir(parents=True)
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path)
    assert find_config("own") == find_config("configs/own.yaml") == tmp_path / "recipes" / "own.yaml"
    assert shipped_folder("models") == tmp_path / "models"


def test_runs_name_their_command_script_and_model_folder() -> None:
    runs = (DistillRun, DiffusionRun, FirstStageRun)
    assert [run.COMMAND for run in runs] == ["distill", "train", "train-first-stage"]
    assert [run.MODEL for run in runs] == ["student", "model", "first_stage"]
    assert all((ROOT / "scripts" / run.SCRIPT).is_file() for run in runs)
