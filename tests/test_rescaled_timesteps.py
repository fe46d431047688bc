"""Timesteps of improved-diffusion: the network takes t * 1000 / T."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.networks import DiT, UNet
from tests.parts import UNET_PARAMS, randomised
from tests.test_foreign import run_with

GIVEN = {"image_size": 8, "num_head_channels": 32, "use_new_attention_order": False}
PROCESS = {"schedule": "cosine", "num_timesteps": 4000, "space": "pixel"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(randomised(UNet(**UNET_PARAMS)).state_dict(), tmp_path / "x.pt")
    return tmp_path / "x.pt"


def eps_at(model: DiffusionModel, t: int) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.predict(x, torch.full((2,), t)).eps


def test_the_network_takes_t_times_a_thousand_over_the_number_of_steps(file: Path) -> None:
    model = load_model(file, **GIVEN, **PROCESS, rescale_timesteps=True)
    network = randomised(UNet(**UNET_PARAMS)).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right, other = (network(x, torch.full((2,), t)) for t in (999.75, 3999))
    assert torch.equal(eps_at(model, 3999), right) and not torch.allclose(right, other, atol=1e-4)
    config = run_with(file, DiffusionConfig(**PROCESS, rescale_timesteps=True), params=GIVEN)
    assert torch.equal(eps_at(open_teacher(config), 3999), right)


def test_it_stays_with_the_model_in_own_formats_and_students(file: Path, tmp_path: Path) -> None:
    model = load_model(file, **GIVEN, **PROCESS, rescale_timesteps=True)
    assert model.student(model.node).diffusion.rescale_timesteps
    for name, kind in (("folder", "folder"), ("x.safetensors", "safetensors")):
        model.save(tmp_path / name, kind)
        back = load_model(tmp_path / name)
        assert back.diffusion.rescale_timesteps and torch.equal(eps_at(back, 3000), eps_at(model, 3000))


def test_the_key_is_named_where_it_may_matter(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(file, **GIVEN, **{**PROCESS, "num_timesteps": 1000})
    load_model(file, **GIVEN, **PROCESS, rescale_timesteps=True)
    network = DiT(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=1, num_heads=2)
    torch.save(randomised(network).state_dict(), file.with_name("dit.pt"))
    load_model(file.with_name("dit.pt"), num_heads=2, **PROCESS)  # no network of improved-diffusion
    assert not caplog.text
    open_teacher(run_with(file, DiffusionConfig(**PROCESS), params=GIVEN))
    assert "given t = 0 ... 3999" in caplog.text and "diffusion.rescale_timesteps=true" in caplog.text


def test_code_without_it_does_not_get_such_a_model(file: Path, tmp_path: Path) -> None:
    model = load_model(file, **GIVEN, **PROCESS, rescale_timesteps=True)
    for kind in ("compvis", "diffusers"):
        with pytest.raises(
            UserError, match=f"format: .*{'CompVis' if kind == 'compvis' else 'diffusers'}.*rescale_times"
        ):
            model.save(tmp_path / "out.ckpt", kind)


def test_it_and_the_ends_of_sampling_stay_where_the_schedule_changes(file: Path) -> None:
    ends = {"steps_offset": 1, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    model = load_model(file, **GIVEN, **PROCESS, rescale_timesteps=True, **ends)
    changed = model.changed(schedule=NoiseSchedule("cosine", 4000, variance="beta"))
    student = DiffusionModel(model.network, like=model, schedule=model.schedule)
    for other in (changed, student):
        assert torch.equal(eps_at(other, 3000), eps_at(model, 3000))
        assert {key: getattr(other.schedule, key) for key in ends} == ends
    said = model.changed(schedule=NoiseSchedule("cosine", 4000, steps_offset=0, timestep_spacing="leading")).schedule
    assert (said.steps_offset, said.set_alpha_to_one, said.timestep_spacing) == (0, True, "leading")
    alone = DiffusionModel(model.network, space="pixel", schedule=NoiseSchedule("cosine", 20, steps_offset=1))
    assert alone.schedule.steps_offset == 1 and not alone.schedule.set_alpha_to_one
    explicit = model.changed(diffusion=replace(model.diffusion, steps_offset=0, set_alpha_to_one=None))
    for given in (explicit.schedule, NoiseSchedule("cosine", 4000, steps_offset=0)):
        assert DiffusionModel(model.network, like=explicit, schedule=given).diffusion == explicit.diffusion
