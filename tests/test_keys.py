"""The lists of keys: complete, and docs/options.md is the one that the schema gives."""

import pytest
import yaml

from ldm_dkdm.config import schema as schemas
from ldm_dkdm.config.checked import Section
from ldm_dkdm.config.data_sections import DiffusionDataConfig
from ldm_dkdm.config.keys import RUNS, keys_of, keys_text, options_markdown
from ldm_dkdm.config.load import load_config, to_yaml
from ldm_dkdm.config.schema import DiffusionRun, DistillRun, LossConfig, WarmupConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
from tests.cli import ROOT


def dotted(node: dict, prefix: str = "") -> set[str]:
    """Dotted names of a tree's keys; `params` is free."""
    names = set()
    for name, value in node.items():
        names |= {prefix + name}
        if isinstance(value, dict) and name != "params":
            names |= dotted(value, f"{prefix}{name}.")
    return names


def test_every_key_of_a_config_is_listed_with_its_default() -> None:
    config = load_config("quickstart", ["trainer.early_stop={}", "diffusion={}"])
    keys = {key.name: key for key in keys_of(DistillRun)}
    assert set(keys) == dotted(yaml.safe_load(to_yaml(config)))
    assert keys["distill.batch_size"].default == "required"
    assert keys["teacher.check"].default == "true" and keys["distill.rho"].default == "null"
    assert keys["distill.discard"].kind == "number, at least 0, below 1"
    assert keys["distill.variant"].kind == "one of iterative, shuffled, dynamic"
    assert keys["diffusion.betas"].kind == "list of numbers, each above 0, below 1"


def test_every_key_has_a_meaning_of_one_sentence() -> None:
    sections = [kind for name in schemas.__all__ if isinstance(kind := getattr(schemas, name), type)]
    assert all(issubclass(section, Section) for section in sections)
    keys = [(section.__name__, key) for section in sections for key in keys_of(section)]
    wrong = [(name, key.name) for name, key in keys if not key.meaning.endswith(".") or ". " in key.meaning]
    assert wrong == []


def test_the_text_of_a_section_holds_its_keys_alone() -> None:
    text = keys_text(DistillRun, "distill.warmup")
    names = [line.split("  (")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert names[0] == "distill.warmup" and all(name.startswith("distill.warmup.") for name in names[1:])
    assert "distill.warmup.steps  (whole number, at least 1; default: 50)" in text
    assert "distill.batch_size  (whole number, at least 1; required)\n    States" in keys_text(DistillRun)


def test_an_unknown_section_names_the_sections() -> None:
    with pytest.raises(UserError, match=r"'distil' is not a section; did you mean 'distill'\?"):
        keys_text(DistillRun, "distil")
    with pytest.raises(UserError, match="'zzz' is not a section; sections: model, diffusion, data"):
        keys_text(DiffusionRun, "zzz")


def test_the_committed_options_are_those_of_the_schema() -> None:
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == options_markdown(), "docs/options.md is stale: python -m ldm_dkdm.config.keys docs/options.md"


@pytest.mark.parametrize("run", RUNS)
def test_the_options_name_every_key_once_per_section(run: type) -> None:
    text = options_markdown()
    assert all(f"`{key.name}`" in text for key in keys_of(run) if "." in key.name)


def test_the_help_of_a_cap_says_what_it_caps() -> None:
    caps = {kind: kind.__dataclass_fields__ for kind in (WarmupConfig, DiffusionDataConfig, LossConfig)}
    for kind in (WarmupConfig, DiffusionDataConfig):
        assert "density min(1, t_cap * abar_t), 0.1 at least" in caps[kind]["t_cap"].metadata["help"]
    assert NoiseSchedule("cosine", 1000).density(5.0).min() == pytest.approx(0.1)
    assert caps[LossConfig]["weight_cap"].metadata["help"].startswith("Cap on the weight per t")
