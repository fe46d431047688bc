"""The scale of a model's latents where no file states it beyond doubt: its own samples decide."""

import json
import logging
from pathlib import Path

import pytest
import torch

from ldm_dkdm import DiffusionModel, UserError, load_model
from ldm_dkdm.commands.inspect import describe
from ldm_dkdm.evaluation import teacher_check
from ldm_dkdm.evaluation.teacher_check import CheckFigures, Row
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.first_stage.scale import scale_figures
from ldm_dkdm.model.sampling import settle_scale

TEACHER = Path("models/teachers/emoji64")
SCALE = 0.655761  # the shipped first stage's


@pytest.fixture(scope="module")
def decoded() -> torch.Tensor:
    """Images that the shipped first stage was made for: what it decodes from its teacher's samples."""
    return load_model(TEACHER).sample(2, sampler="dpm-solver++", steps=6)


@pytest.fixture
def codec() -> LatentCodec:
    found = load_model(TEACHER).codec()
    assert isinstance(found, LatentCodec) and found.scale_factor == pytest.approx(SCALE, rel=1e-5) and not found.doubt
    return found


@pytest.mark.parametrize("true", [1.0, 0.18215, 0.42])
@pytest.mark.parametrize("stated", [1.0, 0.18215])
def test_the_scale_at_which_samples_come_back_is_found(
    true: float, stated: float, codec: LatentCodec, decoded: torch.Tensor
) -> None:
    codec.scale_factor = true
    states = codec.encode(decoded)
    codec.scale_factor = stated
    figures = scale_figures(codec, states)
    assert figures.best == pytest.approx(true, rel=0.05)
    assert codec.scale_factor == stated


def saved(folder: Path, form: str, change: float | None) -> Path:
    """The shipped teacher as a diffusers folder or a CompVis file whose first stage states another scale, or none."""
    model = load_model(TEACHER)
    if form == "compvis":  # whose files hold no v; no prediction is made here
        model = model.changed(parameterization="eps")
    path = folder / ("out" if form == "diffusers" else "out.ckpt")
    model.save(path, form)
    if form == "diffusers":
        config = path / "vqvae" / "config.json"
        tree = {key: value for key, value in json.loads(config.read_text()).items() if key != "scaling_factor"}
        config.write_text(json.dumps(tree | ({} if change is None else {"scaling_factor": change})))
    else:
        content = torch.load(path, weights_only=True)
        del content["state_dict"]["scale_factor"]
        torch.save(content, path)
    return path


def opened(path: Path, form: str, **hints: float) -> DiffusionModel:
    own = {} if form == "diffusers" else {"image_size": 16, "num_head_channels": 32}
    return load_model(path, **own, **hints)


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("diffusers", 0.18215, "scaling_factor 0.18215 is the library's default, meant for an AutoencoderKL"),
        ("diffusers", None, "stores no scaling_factor; 1 is taken"),
        ("compvis", None, "stores no scale_factor; 1 is taken"),
    ],
)
def test_a_doubtful_scale_is_named_asked_for_and_decided(
    form: str,
    change: float | None,
    words: str,
    decoded: torch.Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    path = saved(tmp_path, form, change)
    states = load_model(TEACHER).codec().encode(decoded)
    figures = CheckFigures(
        1.0, (Row(9, 0.01, 0.5, 1.0), Row(1, 0.01, 0.1, 1.0)), 0.1, torch.zeros(2), torch.zeros(2), states
    )
    monkeypatch.setattr(teacher_check, "measure", lambda *args: figures)
    assert words in describe(str(path))["scale factor"]
    model = opened(path, form)
    with pytest.raises(
        UserError, match=r"but its samples fit 0\.6\d+ .*; set scale_factor=0\.6\d+, or scale_factor="
    ) as no:
        model.check()
    assert words in str(no.value) and "\n" not in str(no.value)
    assert words in caplog.text
    told = opened(path, form, scale_factor=SCALE)  # what the message asks for
    assert told.check() is figures and not told.codec().doubt
    settle_scale(model, model.codec(), states)  # as sampling does
    assert model.codec().scale_factor == pytest.approx(SCALE, rel=0.05)
    assert "is taken (relative error of samples" in caplog.text
    model.save(tmp_path / "folder")
    assert load_model(tmp_path / "folder").codec().scale_factor == model.codec().scale_factor


def test_a_right_scale_is_confirmed_and_a_student_in_training_has_no_say(
    codec: LatentCodec, decoded: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    states, codec.doubt = codec.encode(decoded), "stores no scale_factor"
    assert scale_figures(codec, states).best == codec.scale_factor
    student = load_model(TEACHER)
    student.path = None
    settle_scale(student, codec, states * 5)
    assert codec.doubt and caplog.text == ""
