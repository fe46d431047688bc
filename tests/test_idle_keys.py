"""A key that another one leaves without effect is refused or named, unless that one came after it."""

from pathlib import Path

import pytest
import yaml

from ldm_dkdm.config.load import load_config, to_yaml
from ldm_dkdm.config.schema import DiffusionRun
from ldm_dkdm.distillation.warmup import WARMUPS
from ldm_dkdm.errors import UserError
from tests.cli import distil, write_yaml

CASES = {  # what a file says, what is given after it, what is said of that
    "rho": ("variant: shuffled", "distill.rho=2", "distill.rho: has no effect with variant: shuffled"),
    "discard_mode": (
        "variant: dynamic",
        "distill.discard_mode=same_slots",
        "discard_mode: has no effect without discard",
    ),
    "steps": ("warmup: {mode: harvest}", "distill.warmup.steps=9", "warmup.steps: has no effect with mode: harvest"),
    "images": ("warmup: {mode: noise}", "distill.warmup.images=9", "warmup.images: has no effect with mode: noise"),
    "mode": ("variant: iterative", "distill.warmup.mode=ddim", "warmup.mode: has no effect with variant: iterative"),
}
HONOURED = {
    "another variant": ["distill.variant=shuffled"],
    "discard": ["distill.discard=0.5", "distill.discard_mode=same_slots"],
    "samples": ["distill.warmup.mode=ddim", "distill.warmup.steps=9", "distill.warmup.images=9"],
    "chains": ["distill.warmup.mode=harvest", "distill.warmup.images=9"],
    "a default": ["distill.discard_mode=redraw", "distill.warmup.steps=50"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_key_without_effect_is_refused_and_beside_what_stands_in_its_way_named(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after, words = CASES[case]
    (tmp_path / "own.yaml").write_text(f"distill: {{{before}}}")
    with pytest.raises(UserError, match=words):
        load_config(["ffhq256", tmp_path / "own.yaml"], [after])
    key, _, value = after.removeprefix("distill.").rpartition("=")
    own = yaml.safe_load(before)
    inner = own.setdefault("warmup", {}) if key.startswith("warmup.") else own
    inner[key.rpartition(".")[2]] = yaml.safe_load(value)
    caplog.clear()
    if case != "discard_mode":  # `discard` is given nowhere
        load_config(["ffhq256", write_yaml(tmp_path / "both.yaml", {"distill": own})])
        assert words in caplog.text


@pytest.mark.parametrize("case", HONOURED)
def test_what_has_an_effect_or_changes_nothing_passes(case: str) -> None:
    load_config("ffhq256", HONOURED[case])


def test_a_recipe_gives_way_to_what_comes_after_it() -> None:
    found = load_config("quickstart", ["distill.warmup.mode=ancestral", "distill.warmup.t_cap=null"])
    assert found.distill.warmup.images == 1024  # the recipe's, for its own mode
    assert load_config(["quickstart", "improved/latent"], ["distill.variant=iterative"]).distill.rho == 1.6


def test_the_modes_that_read_a_key_are_those_of_the_warm_ups(caplog: pytest.LogCaptureFixture) -> None:
    for key, reads in (("steps", "from_samples"), ("images", "counts_images")):
        for name, mode in WARMUPS.items():
            load_config("ffhq256", [f"distill.warmup.mode={name}", f"distill.warmup.{key}=9"])
            assert (f"{key}: has no effect with mode: {name}" in caplog.text) is not getattr(mode, reads)


def test_a_share_of_no_images_is_refused() -> None:
    given = ["data.fraction=0.05", "data.path=null", "data.synthetic=s.npz"]
    with pytest.raises(UserError, match=r"data.fraction: has no effect without path"):
        load_config("cifar10_data", given, DiffusionRun)
    assert load_config("cifar10_data", given[:1], DiffusionRun).data.fraction == 0.05


def test_the_config_of_a_run_is_a_recipe_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    tree["distill"]["variant"] = "shuffled"
    load_config(write_yaml(tmp_path / "own.yaml", tree))
    assert "distill.rho: has no effect with variant: shuffled" in caplog.text
    caplog.clear()
    whole = load_config("quickstart", ["distill.variant=shuffled"])
    (tmp_path / "config.yaml").write_text(to_yaml(whole))
    assert load_config(tmp_path / "config.yaml") == whole
    older = yaml.safe_load(to_yaml(whole))
    del older["distill"]["draws"], older["distill"]["replay"]  # an older version has no such keys
    assert load_config(write_yaml(tmp_path / "older.yaml", older)) == whole
    assert not caplog.text


def test_the_command_refuses_it_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--base", "quickstart", "distill.discard_mode=same_slots", f"logging.dir={tmp_path / 'logs'}") == 2
    assert capsys.readouterr().err == "error: distill.discard_mode: has no effect without discard; remove it\n"
    assert not (tmp_path / "logs").exists()
