"""Models out of the package and back, and pools in."""

import hashlib
import json
import pickle
import shlex
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ldm_dkdm import NoisyPool, UserError, load_model
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.pools import read_reference_pool
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.distillation.refill import check_supply, refill
from tests.cli import distil, run_script, sample, write_yaml
from tests.parts import UNET_PARAMS, distill_config, first_stage_folder, model_folder
from tests.test_foreign import run_with

GIVEN = {key: UNET_PARAMS[key] for key in ("image_size", "num_head_channels")}
SHAPE, T = (3, 8, 8), 20


def convert(*arguments: object) -> int:
    return run_script("convert.py", *arguments)


def test_help_lists_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--help") == 0
    assert "one of folder, diffusers, safetensors, compvis, adm, dit" in " ".join(capsys.readouterr().out.split())


def test_a_model_comes_back_from_compvis_bit_for_bit(teacher_folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / "first.ckpt", tmp_path / "second.ckpt"]
    assert convert(teacher_folder, files[0], "--to", "compvis") == 0
    ours, back = load_model(teacher_folder), open_teacher(run_with(files[0], params=GIVEN))
    assert back.diffusion == ours.diffusion
    assert all(map(torch.equal, back.network.state_dict().values(), ours.network.state_dict().values()))
    codecs = [model.codec() for model in (ours, back)]
    assert codecs[0].scale_factor == codecs[1].scale_factor == 0.5
    assert all(
        map(torch.equal, codecs[0].autoencoder.state_dict().values(), codecs[1].autoencoder.state_dict().values())
    )
    run = distill_config(files[0], tmp_path / "logs", student={"parameterization": "eps"}, trainer={"max_steps": 1})
    run["teacher"] |= {"params": GIVEN}
    assert distil("--base", write_yaml(tmp_path / "run.yaml", run)) == 0  # a teacher that is named and little more
    assert convert(tmp_path / "logs" / "run", files[1], "--to", "compvis") == 0
    first, second = (read_tensors(file) for file in files)
    assert first.keys() == second.keys()
    same = [name for name in first if name.startswith("first_stage_model.") or "alphas" in name or "posterior" in name]
    assert same and all(torch.equal(first[name], second[name]) for name in same)
    student = load_model(tmp_path / "logs" / "run" / "student").network.state_dict()
    assert all(torch.equal(second[f"model.diffusion_model.{name}"], value) for name, value in student.items())
    config = json.loads((tmp_path / "second.yaml").read_text())["model"]["params"]
    assert config["beta_schedule"] == "linear" and config["scale_by_std"] is True


def test_the_other_layouts_hold_the_same_weights(teacher_folder: Path, tmp_path: Path) -> None:
    ours = load_model(teacher_folder)
    for name, layout in (("x.pt", "adm"), ("x.safetensors", "safetensors")):
        assert convert(teacher_folder, tmp_path / name, "--to", layout) == 0
        found = read_tensors(tmp_path / name)
        assert found.keys() == ours.network.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in ours.network.state_dict().items())
    described = open_teacher(run_with(tmp_path / "x.safetensors"))  # it says itself what no tensor tells
    assert described.node == ours.node and described.diffusion == ours.diffusion
    assert all(map(torch.equal, described.network.state_dict().values(), ours.network.state_dict().values()))
    open_teacher(run_with(tmp_path / "x.safetensors", params=GIVEN))  # says the same
    with pytest.raises(UserError, match=r"teacher\.params\.image_size: .*x\.safetensors describes itself"):
        open_teacher(run_with(tmp_path / "x.safetensors", params={"image_size": 16}))


def printed_hints(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The hints that a shell makes of the printed line."""
    _, hints = capsys.readouterr().out.splitlines()[0].split("whoever opens it says the rest: ")
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in shlex.split(hints))}


def test_printed_hints_survive_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = model_folder(tmp_path / "teacher", first_stage_folder(tmp_path / "a fol'der"))
    card = yaml.safe_load((home / "config.yaml").read_text())
    card["diffusion"] |= {"betas": [0.01 * (step + 1) for step in range(T)], "num_timesteps": T}
    (home / "config.yaml").write_text(yaml.safe_dump(card))
    assert convert(home, tmp_path / "x.pt", "--to", "adm") == 0
    given = printed_hints(capsys)
    assert given["betas"] == card["diffusion"]["betas"] and Path(str(given["first_stage"])).name == "a fol'der"
    assert load_model(tmp_path / "x.pt", **given).diffusion == load_model(home).diffusion


def test_what_weights_alone_do_not_say_is_printed_as_hints(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(teacher_folder, tmp_path / "x.pt", "--to", "adm") == 0
    back = load_model(tmp_path / "x.pt", **printed_hints(capsys))
    ours = load_model(teacher_folder)
    assert back.diffusion == ours.diffusion and back.codec().scale_factor == 0.5
    x, t = torch.randn(2, *SHAPE), torch.tensor([0, T - 1])
    with torch.no_grad():
        assert torch.equal(back.network(x, t), ours.network(x, t))


def test_the_scale_of_the_latents_stays_with_the_model(teacher_folder: Path, tmp_path: Path) -> None:
    model = load_model(teacher_folder)
    model.first_stage = replace(model.first_stage, scale_factor=0.25)
    model.save(tmp_path / "x.safetensors", "safetensors")
    stage = model.first_stage.path
    assert load_model(tmp_path / "x.safetensors", first_stage=stage).codec().scale_factor == 0.25
    assert load_model(tmp_path / "x.safetensors", first_stage=stage, scale_factor=0.125).codec().scale_factor == 0.125
    given = (f"first_stage={stage}", "-n", 2, "-c", 1, "--npz", "--latents", "--no_png", "-l", tmp_path / "drawn")
    assert sample("-r", tmp_path / "x.safetensors", *given) == 0
    latents, words = tmp_path / "drawn" / "latents.safetensors", ("--first_stage", stage, "-o")
    assert run_script("decode_latents.py", latents, *words, tmp_path / "decoded") == 0
    drawn, decoded = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("drawn", "decoded"))
    assert np.array_equal(drawn, decoded)
    assert run_script("decode_latents.py", latents, *words, tmp_path / "other", "--scale_factor", 0.5) == 0
    assert not np.array_equal(drawn, np.load(tmp_path / "other" / "samples.npz")["arr_0"])


@pytest.mark.parametrize("layout", ["adm", "safetensors"])
def test_weights_are_written_where_the_first_stage_is_missing(layout: str, tmp_path: Path) -> None:
    model = load_model(model_folder(tmp_path / "teacher", first_stage_folder(tmp_path / "vq")))
    model.save(tmp_path / "scaled")
    (tmp_path / "vq").rename(tmp_path / "moved")
    assert convert(tmp_path / "scaled", tmp_path / "x", "--to", layout) == 0
    assert (tmp_path / "x").is_file()


def test_a_scale_of_1_is_stated(teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(teacher_folder)
    model.first_stage = replace(model.first_stage, scale_factor=1.0)
    model.save(tmp_path / "x.ckpt", "compvis")
    assert load_model(tmp_path / "x.ckpt").codec().scale_factor == 1 and "no scale_factor" not in caplog.text


def test_the_sampler_takes_what_the_converter_writes(
    teacher_folder: Path, first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(teacher_folder, tmp_path / "pipeline", "--to", "diffusers") == 0
    assert convert(teacher_folder, tmp_path / "model.safetensors", "--to", "safetensors") == 0
    assert sample("-r", tmp_path / "model.safetensors") == 2
    assert "--first_stage" in capsys.readouterr().err
    drawn = []
    named = ("--first_stage", first_stage)  # which a file of one network cannot hold
    for source, more in ((teacher_folder, ()), (tmp_path / "pipeline", ()), (tmp_path / "model.safetensors", named)):
        assert sample("-r", source, "-n", 2, "-c", 4, "--npz", "--no_png", "-l", tmp_path / "out", *more) == 0
        drawn.append(np.load(tmp_path / "out" / "samples.npz")["arr_0"].astype(int))
    assert all(np.abs(other - drawn[0]).max() <= 1 for other in drawn[1:])


@pytest.mark.parametrize("layout", ["compvis", "adm"])
def test_a_network_that_predicts_v_is_refused_where_only_eps_is_known(
    layout: str, first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path / "v", first_stage, "v")
    assert convert(folder, tmp_path / "out.pt", "--to", layout) == 2
    assert "this network predicts v" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
    assert convert(folder, tmp_path / "out.safetensors", "--to", "safetensors") == 0


def test_a_first_level_wider_than_the_base_is_refused_where_compvis_s_code_has_none(
    first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path / "wide", first_stage, channel_mult=[2, 2])
    assert convert(folder, tmp_path / "out.ckpt", "--to", "compvis") == 2
    assert "channel_mult begins with 1" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()


def test_the_config_of_a_compvis_file_has_a_place_of_its_own_and_says_how_many_heads(
    first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path / "model", first_stage, num_head_channels=-1)
    assert convert(folder, tmp_path / "x.yaml", "--to", "compvis") == 2
    assert "is for the config" in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()
    assert convert(folder, tmp_path / "x.ckpt", "--to", "compvis") == 0
    config = json.loads((tmp_path / "x.yaml").read_text())
    assert config["model"]["params"]["unet_config"]["params"]["num_heads"] == 1


def test_nothing_is_written_over(teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("precious")
    assert convert(teacher_folder, tmp_path / "x.pt", "--to", "adm") == 2
    assert (tmp_path / "x.pt").read_text() == "precious"
    (tmp_path / "y.yaml").write_text("precious")
    assert convert(teacher_folder, tmp_path / "y.ckpt", "--to", "compvis") == 2
    assert (tmp_path / "y.yaml").read_text() == "precious" and not (tmp_path / "y.ckpt").exists()


@pytest.mark.parametrize("layout", ["adm", "compvis", "dit"])
def test_a_pytorch_file_is_not_called_safetensors(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path / "not-opened", tmp_path / "x.safetensors", "--to", layout) == 2
    assert "is a PyTorch file, whose name ends in .pt or .ckpt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_versions_in_names_keep_their_configs_apart(teacher_folder: Path, tmp_path: Path) -> None:
    for name in ("model-v1.5", "model-v1.6", "model-v1.7.ckpt"):
        assert convert(teacher_folder, tmp_path / name, "--to", "compvis") == 0
        load_model(tmp_path / name)
    assert {path.name for path in tmp_path.glob("*.yaml")} == {f"model-v1.{number}.yaml" for number in (5, 6, 7)}


def cache(slots: int, **changes: object) -> defaultdict:
    rng = np.random.default_rng(0)
    steps = rng.integers(0, T + 1, slots)
    content = defaultdict(None, total_t=steps, total_x_t_1=rng.standard_normal((slots, *SHAPE)).astype(np.float32))
    content.update(changes)
    return content


def write_cache(path: Path, slots: int, **changes: object) -> Path:
    path.write_bytes(pickle.dumps(cache(slots, **changes)))
    return path


def test_a_reference_pool_is_read_from_a_cache_and_from_a_checkpoint(tmp_path: Path) -> None:
    content = cache(12)
    write_cache(tmp_path / "cache.pkl", 12)
    torch.save({"state_dict": {}, "dynamic_batch": content}, tmp_path / "last.ckpt")
    for name in ("cache.pkl", "last.ckpt"):
        found = read_reference_pool(tmp_path / name, SHAPE, T)
        assert torch.equal(found.t, torch.from_numpy(content["total_t"]) - 1)
        assert torch.equal(found.x, torch.from_numpy(content["total_x_t_1"]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_pool_is_dealt_to_any_number_of_ranks_and_each_state_once(ranks: int, tmp_path: Path) -> None:
    states = read_reference_pool(write_cache(tmp_path / "cache.pkl", 60), SHAPE, T)
    states.x[:, 0, 0, 0] = torch.arange(60) / 64  # a number that half precision keeps
    pools = [NoisyPool(60 // ranks, SHAPE) for _ in range(ranks)]
    for rank, pool in enumerate(pools):
        refill(pool, states, T, seed=0, rank=rank)
        assert pool.filled == len(pool)
    dealt = torch.cat([pool.x[:, 0, 0, 0] for pool in pools]) * 64
    steps = torch.cat([pool.t for pool in pools])
    finished = states.t < 0
    assert finished.any()
    assert (steps[~torch.isin(dealt, torch.arange(60.0))] == T - 1).all()  # fresh noise
    kept = {int(value) for value in dealt if value == value.round() and 0 <= value < 60}
    assert {i for i in range(60) if not finished[i]} <= kept
    assert all(steps[dealt == i] == states.t[i] for i in range(60) if not finished[i])


def test_too_small_a_pool_names_the_rho_that_fits(tmp_path: Path) -> None:
    states = read_reference_pool(write_cache(tmp_path / "cache.pkl", 50), SHAPE, T)
    with pytest.raises(UserError, match=r"holds 50 slots.*needs 40 x 2.*rho=0.3"):
        check_supply(states, 40, 2, 4, T)
    check_supply(states, round(0.3 * T) * 4, 2, 4, T)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"total_t": np.full(50, T + 1)}, "are outside 0 ... 20"),
        ({"total_x_t_1": np.zeros((50, 3, 4, 4), np.float32)}, "the teacher's are (3, 8, 8)"),
        ({"total_x_t_1": np.full((50, *SHAPE), np.nan, np.float32)}, "not finite"),
        ({"total_t": "text"}, "total_t is not an array of numbers"),
    ],
)
def test_a_distillation_starts_from_such_a_pool_and_refuses_a_wrong_one(
    changes: dict[str, object], words: str, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_cache(tmp_path / "good.pkl", 50), write_cache(tmp_path / "bad.pkl", 50, **changes)
    config = distill_config(teacher_folder, tmp_path / "logs", trainer={"max_steps": 1})
    base = write_yaml(tmp_path / "run.yaml", config)
    assert distil("--base", base, f"distill.pool_from={bad}") == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "logs").exists()
    assert distil("--base", base, f"distill.pool_from={good}") == 0
    assert load_model(tmp_path / "logs" / "run" / "student").info["step"] == 1


def test_a_student_s_card_names_its_teacher_by_hash_and_licence(teacher_folder: Path, tmp_path: Path) -> None:
    run = distill_config(teacher_folder, tmp_path / "logs", trainer={"max_steps": 1})
    run["teacher"]["licence"] = "CC-BY-4.0"
    assert distil("--base", write_yaml(tmp_path / "run.yaml", run)) == 0
    folder = tmp_path / "logs" / "run"
    card = (folder / "student" / "README.md").read_text()
    digest = hashlib.sha256((teacher_folder / "model.safetensors").read_bytes()).hexdigest()
    for words in (
        digest,
        "CC-BY-4.0",
        str(teacher_folder),
        "dynamic iterative distillation",
        "**step**: 1",
        "Not measured yet; `dkdm evaluate",
    ):
        assert words in card
    assert run_script("evaluate.py", "-r", folder, "-n", 0, "-c", 1, "--chains", 1, "--pairs", 1) == 0
    assert "agreement_q4" in (folder / "student" / "README.md").read_text()
