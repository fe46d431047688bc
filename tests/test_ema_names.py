"""Which weights of a file are averaged (EMA): what names say, and an EMA of some layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints import Hints
from ldm_dkdm.model import open_model
from tests.test_wrapped_weights import HINTS, PIXEL, averaged, loads, raw


def test_parts_that_are_called_not_ema_are_the_raw_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for ema, other in (("ema", "non_ema"), ("model_ema", "model_non_ema"), ("EMA", "noEMA"), ("model", "no_ema")):
        torch.save({ema: averaged(), other: raw()}, tmp_path / "x.pt")
        for wanted in (None, True, False):
            model = load_model(tmp_path / "x.pt", **HINTS, **PIXEL, use_ema=wanted)
            state = raw() if wanted is False else averaged()
            assert torch.equal(model.network.state_dict()["out.2.bias"], state["out.2.bias"])
            assert model.info["weights_kind"] == ("raw" if wanted is False else "EMA")
        assert ("'no_ema' says that it is not the EMA, so 'model' is taken" in caplog.text) == (ema == "model")


EMA_NAMES = ["ema", "model_ema", "ema_model", "ema_0.9999_010000", "params_ema", "unet_ema", "EMA", "modelEMA"]
RAW_NAMES = ["model_without_ema", "no-ema", "non_ema", "model.non_ema", "noEMA", "not-averaged"]


@pytest.mark.parametrize("name", [*EMA_NAMES, "emaonly", *RAW_NAMES, "cinema", "schema", "email", "model010000"])
def test_the_words_of_a_file_s_name_say_which_weights_it_holds(name: str, tmp_path: Path) -> None:
    torch.save(raw(), tmp_path / f"{name}.pt")
    kind = "EMA" if name in (*EMA_NAMES, "emaonly") else "raw" if name in RAW_NAMES else None
    assert load_model(tmp_path / f"{name}.pt", **HINTS, **PIXEL).info.get("weights_kind") == kind
    if kind != "EMA":
        assert loads(tmp_path / f"{name}.pt", raw(), use_ema=False)
        return
    assert loads(tmp_path / f"{name}.pt", raw(), use_ema=True)
    with pytest.raises(UserError, match=r"EMA weights only, as its name says; set use_ema=true, or leave it out$"):
        load_model(tmp_path / f"{name}.pt", **HINTS, **PIXEL, use_ema=False)


def test_a_config_that_asks_for_an_ema_of_an_unknown_form_goes_on_with_the_raw_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": raw(), "ema": {"decay": 0.9}}, tmp_path / "ema_1.pt")
    hints = Hints.of(**HINTS, **PIXEL, use_ema=True)
    found = open_model(tmp_path / "ema_1.pt", replace(hints, sections=True))  # as runs of older versions began
    assert torch.equal(found.network.state_dict()["out.2.bias"], raw()["out.2.bias"])
    assert found.info["weights_kind"] == "raw"
    assert "teacher.use_ema: true, but" in caplog.text and "an EMA of an unknown form; raw weights are" in caplog.text
    with pytest.raises(UserError, match="holds no EMA weights"):
        open_model(tmp_path / "ema_1.pt", hints)


def test_the_other_weights_of_a_step_are_named_where_they_lie_beside(tmp_path: Path) -> None:
    for name in ("ema_0.9999_010000", "model010000", "model020000"):
        torch.save(raw(), tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match=r"raw weights of this step are in .*/model010000.pt$"):
        load_model(tmp_path / "ema_0.9999_010000.pt", **HINTS, **PIXEL, use_ema=False)
    with pytest.raises(UserError, match=r"the EMA weights of this step are in .*/ema_0.9999_010000.pt$"):
        load_model(tmp_path / "model010000.pt", **HINTS, **PIXEL, use_ema=True)
    with pytest.raises(UserError, match=r"leave it out$"):
        load_model(tmp_path / "model020000.pt", **HINTS, **PIXEL, use_ema=True)


@pytest.mark.parametrize("missing", ["out.2.", "middle_block.0.in_layers.2.bias", "time_embed.", "input_blocks.0."])
def test_an_ema_of_some_layers_is_completed_by_the_raw_weights(
    missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = {name: value for name, value in averaged().items() if not name.startswith(missing)}
    left = {name: value for name, value in raw().items() if name.startswith(missing)}
    torch.save({"model": raw(), "ema": part}, tmp_path / "x.pt")
    for wanted in (None, True):
        assert loads(tmp_path / "x.pt", {**part, **left}, use_ema=wanted)
    words = f"EMA weights of {len(part)} of {len(raw())} tensors; the others ({', '.join(list(left)[:4])}) are taken as"
    assert words in caplog.text
    assert loads(tmp_path / "x.pt", raw(), use_ema=False)


def test_an_ema_of_another_network_is_refused(tmp_path: Path) -> None:
    part = {name: torch.zeros(1) for name in averaged() if not name.startswith("out.2.")}
    torch.save({"model": raw(), "ema": part}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: its network is incomplete or of another kind"):
        load_model(tmp_path / "x.pt", **HINTS, **PIXEL)


def test_a_compvis_release_of_the_ema_alone_needs_no_raw_weights(tmp_path: Path) -> None:
    state = {f"model.diffusion_model.{name}": value for name, value in averaged().items()}
    torch.save({"state_dict": state}, tmp_path / "v1-pruned-emaonly.ckpt")
    unet = {"model_channels": 32, "num_head_channels": 32}
    model = {"use_ema": False, "image_size": 8, "timesteps": 20, "unet_config": {"params": unet}}
    (tmp_path / "v1-pruned-emaonly.yaml").write_text(json.dumps({"model": {"params": model}}))
    found = load_model(tmp_path / "v1-pruned-emaonly.ckpt", **HINTS, schedule="scaled_linear", num_timesteps=20)
    assert found.info["weights_kind"] == "EMA"
    assert torch.equal(found.network.state_dict()["out.2.bias"], averaged()["out.2.bias"])
