"""A distillation from teacher to images, through the scripts."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_dkdm import load_model
from ldm_dkdm.config.load import load_config, to_yaml
from ldm_dkdm.training import ends, plan
from tests.cli import contents, distil, run_script, sample, write_yaml
from tests.parts import UNET_PARAMS, distill_config
from tests.test_config_errors import assert_one_error_line


@pytest.fixture(scope="module")
def base(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    config = distill_config(teacher_folder, folder / "logs", logging={"save_every": 2})
    return write_yaml(folder / "quick.yaml", config)


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    """A finished run of 6 steps that saved at 2, 4 and 6."""
    assert distil("--base", base) == 0
    return base.parent / "logs" / "run"


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def pixels(folder: Path) -> np.ndarray:
    return np.stack([read(file) for file in sorted((folder / "img").iterdir())])


def test_the_student_folder_describes_itself_and_loads_strictly(run: Path) -> None:
    model = load_model(run / "student")
    assert model.node.parameterization == "v" and model.diffusion.num_timesteps == 20
    assert model.info["step"] == model.info["max_steps"] == 6
    assert model.network.image_size == UNET_PARAMS["image_size"]


def test_the_written_config_is_the_config(run: Path, base: Path) -> None:
    assert load_config(run / "config.yaml") == load_config(base)
    assert to_yaml(load_config(run / "config.yaml")) == (run / "config.yaml").read_text()


PARTS = ("ckpt", "ckpt.sha256", "pool-rank0.safetensors")  # of a checkpoint


def test_the_last_two_checkpoints_stay_with_their_pools(run: Path) -> None:
    names = {f.name for f in (run / "checkpoints").iterdir() if not f.name.startswith("warmup")}
    assert names == {f"step=0000000{n}.{part}" for n in (4, 6) for part in PARTS}
    assert (run / "samples" / "step=00000006.png").is_file()


def test_the_checkpoint_holds_the_student_alone_and_runs_no_code(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "step=00000006.ckpt", weights_only=True)
    student = load_model(run / "student").network.state_dict()
    assert set(checkpoint["state_dict"]) == {f"network.{name}" for name in student}
    averaged = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
    assert all(torch.equal(averaged[name], student[name]) for name in student)


def test_the_exported_weights_are_the_average_not_the_last(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "step=00000006.ckpt", weights_only=True)
    last, averaged = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(last[name], averaged[name]) for name in averaged)


def test_a_second_call_says_that_it_is_done_and_changes_no_file(run: Path, base: Path, capsys) -> None:
    before = contents(run), {f: f.stat().st_mtime_ns for f in run.rglob("*")}
    assert distil("--base", base) == 0
    assert "already at step 6" in capsys.readouterr().out
    assert (contents(run), {f: f.stat().st_mtime_ns for f in run.rglob("*")}) == before


def test_run_student_and_checkpoint_sample_the_same(run: Path, tmp_path: Path) -> None:
    sampled = []
    for i, path in enumerate((run, run / "student", run / "checkpoints" / "step=00000006.ckpt")):
        out = tmp_path / str(i)
        assert sample("-r", path, "-n", 3, "-c", 4, "-l", out, "--precision", "32") == 0
        sampled.append(contents(out))
    assert len(sampled[0]) == 4
    assert sampled[0] == sampled[1] == sampled[2]


def latents(run: Path, out: Path, *arguments: object) -> torch.Tensor:
    code = sample("-r", run, "-c", 4, "-l", out, "--latents", "--precision", "32", *arguments)
    assert code == 0
    return load_file(out / "latents.safetensors")["latents"]


@pytest.mark.parametrize("mode", [["-e", 0], ["-e", 1], ["-v"]])
def test_image_i_depends_on_seed_plus_i_only(mode: list, run: Path, tmp_path: Path) -> None:
    whole = latents(run, tmp_path / "a", "-n", 4, "--seed", 5, *mode)
    pairs = latents(run, tmp_path / "b", "-n", 4, "--seed", 5, "--batch_size", 2, *mode)
    shifted = latents(run, tmp_path / "c", "-n", 2, "--seed", 7, *mode)
    torch.testing.assert_close(pairs, whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(shifted, whole[2:], rtol=0, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1
    names = [f"{seed:06d}.png" for seed in (7, 8)]  # batches of the same make-up: equal to the last bit
    assert all((tmp_path / "b" / "img" / n).read_bytes() == (tmp_path / "c" / "img" / n).read_bytes() for n in names)


def test_ddpm_differs_from_ddim(run: Path, tmp_path: Path) -> None:
    plain = latents(run, tmp_path / "ddim", "-n", 1)
    vanilla = latents(run, tmp_path / "ddpm", "-n", 1, "-v")
    assert not torch.allclose(plain, vanilla, atol=1e-2)


def test_images_of_an_earlier_call_are_counted(run: Path, tmp_path: Path, capsys) -> None:
    for count, words in ((3, False), (2, True), (3, False)):
        assert sample("-r", run, "-n", count, "-c", 2, "-l", tmp_path) == 0
        assert ("also holds 1 image of earlier calls" in capsys.readouterr().out) == words


def test_npz_holds_the_images_as_uint8_nhwc(run: Path, tmp_path: Path) -> None:
    assert sample("-r", run, "-n", 3, "-c", 2, "-l", tmp_path, "--npz") == 0
    array = np.load(tmp_path / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (3, 32, 32, 3)
    assert np.array_equal(array, pixels(tmp_path))


def test_latents_decode_to_the_images_that_were_sampled(run: Path, first_stage: Path, tmp_path: Path) -> None:
    latents(run, tmp_path / "sampled", "-n", 3)
    file, out = tmp_path / "sampled" / "latents.safetensors", tmp_path / "decoded"
    decoding = ("decode_latents.py", file, "--first_stage", first_stage, "--batch_size", 3)
    assert run_script(*decoding, "-o", out) == 0
    assert np.array_equal(pixels(out), pixels(tmp_path / "sampled"))
    assert run_script(*decoding, "-o", tmp_path / "bf16", "--precision", "bf16") == 0
    difference = pixels(tmp_path / "bf16").astype(int) - pixels(out)
    assert 0 < abs(difference).max() <= 3


def test_a_scale_that_is_given_replaces_a_wrong_one_of_the_latents(first_stage: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"latents": torch.zeros(1, 3, 8, 8)}, file, {"scale_factor": "much"})
    decoding = ("decode_latents.py", file, "--first_stage", first_stage, "-o", tmp_path / "out")
    assert_one_error_line(capsys, run_script(*decoding), (str(file), "scale_factor in its metadata", "--scale_factor"))
    assert run_script(*decoding, "--scale_factor", 2) == 0


def test_a_comparison_is_one_image_of_all_models(run: Path, teacher_folder: Path, tmp_path: Path) -> None:
    comparison = tmp_path / "both.png"
    models = ("-r", teacher_folder, run)
    assert sample(*models, "-n", 4, "-c", 2, "-l", tmp_path / "out", "--compare", comparison) == 0
    for name in ("teacher", "student"):
        (sampled,) = (tmp_path / "out").glob(f"*-{name}/grid.png")
        assert [places(read(sampled), read(comparison), factor) for factor in range(1, 9)].count(1) == 1


def test_models_whose_paths_end_alike_keep_folders_and_labels_of_their_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "B" / "logs" / "run"
    shutil.copytree(run / "student", other / "student")
    saved = [run / "checkpoints" / f"step=0000000{n}.ckpt" for n in (4, 6)]
    models, hint = (run, run / "student", other, *saved, saved[1]), "6.use_ema=false"
    assert sample("-r", *models, hint, "-n", 1, "-c", 2, "-l", tmp_path / "out", "--no_png") == 0
    labels = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "parameters" in line]
    above = run.parents[1].name
    ends = ("-step=00000004", "-step=00000006", "-step=00000006-raw")
    wanted = [f"{above}/logs/run/student", f"{above}/logs/run/student-2", "B/logs/run/student"]
    assert labels == [*wanted, *(f"run/student{end}" for end in ends)]
    assert {place.name for place in (tmp_path / "out").iterdir()} == {label.replace("/", "-") for label in labels}
    monkeypatch.chdir(tmp_path)
    assert sample("-r", saved[0], "-n", 1, "-c", 2, "--no_png") == 0
    assert Path(f"logs/samples/run-student{ends[0]}/grid.png").is_file()


def places(panel: np.ndarray, sheet: np.ndarray, factor: int) -> int:
    """How often a panel, its pixels magnified by a whole factor, lies on a sheet."""
    panel = panel.repeat(factor, 0).repeat(factor, 1)
    if any(small > large for small, large in zip(panel.shape, sheet.shape, strict=True)):
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(sheet, panel.shape)[..., 0, :, :, :]
    candidates = (windows[..., 0, :, 0] == panel[0, :, 0]).all(-1)  # one row first: whole panels are many numbers
    return sum(
        np.array_equal(sheet[y : y + panel.shape[0], x : x + panel.shape[1]], panel) for y, x in np.argwhere(candidates)
    )


def test_a_plan_counts_parameters_and_slots_and_writes_nothing(
    teacher_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_yaml(tmp_path / "quick.yaml", distill_config(teacher_folder, tmp_path / "logs"))
    before = contents(tmp_path)
    assert distil("--base", base, "--plan") == 0
    printed = capsys.readouterr().out
    count = sum(p.numel() for p in load_model(teacher_folder).network.parameters()) / 1e6
    assert printed.count(f"{count:.6f} M parameters") == 2  # teacher and student are of one size
    assert "40 slots" in printed and "24 samples (6 iterations of 4)" in printed
    assert contents(tmp_path) == before


def test_a_plan_times_the_teacher_as_the_run_stores_it_and_says_that_compiling_is_not_timed(
    teacher_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    monkeypatch.setattr("ldm_dkdm.training.plan.time_needed", lambda parts: timed.append(parts) or {"time": "1 s"})
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path))
    for precision, compiles, dtype in (("bf16", "true", torch.bfloat16), ("32", "false", torch.float32)):
        assert distil("--base", base, "--plan", f"trainer.precision={precision}", f"trainer.compile={compiles}") == 0
        assert {w.dtype for w in timed[-1].teacher.network.parameters() if w.ndim == 4} == {dtype}
        assert {w.dtype for w in timed[-1].student.network.parameters()} == {torch.float32}
        assert ("compiling" in capsys.readouterr().out) is (compiles == "true")


def test_a_plan_of_a_run_that_goes_on_is_of_what_is_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--resume", run, "--plan", "trainer.max_steps=16") == 0
    printed = capsys.readouterr().out
    assert "steps 6 to 16: the calls and the time below are those that are left" in printed
    assert "40 samples (10 iterations of 4)" in printed and printed.count(" 0 samples") == 2


def test_a_plan_of_a_run_that_goes_on_takes_the_used_minutes_off_its_time_limit(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(step=10.0)
    monkeypatch.setattr(ends, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    trainer = {"max_steps": 4, "max_minutes": 60}
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path, trainer=trainer))
    assert distil("--base", base, "logging.sample_every=99", "logging.save_every=99") == 0
    monkeypatch.setattr(plan, "time_iteration", lambda parts, batch, iterations: (10.0, 0.0))
    capsys.readouterr()

    def planned(*limits: str) -> str:
        assert distil("--resume", tmp_path / "run", "--plan", *limits) == 0
        return capsys.readouterr().out

    early = planned("trainer.max_steps=104", "trainer.max_minutes=5")  # 40 s of 300 are used, a step takes 10 s
    assert "about 4 min: 10 s an iteration" in early
    assert "trainer.max_minutes (5) ends the training at about step 30 of 104, 40 s of it are used" in early
    late = planned("trainer.max_steps=104", "trainer.max_minutes=20")
    assert "about 17 min" in late and "max_minutes" not in late
    over = planned("trainer.max_steps=104", "trainer.max_minutes=0.5")
    assert over == f"{tmp_path / 'run'}: at step 4 already; a larger trainer.max_minutes continues it\n"


def test_a_plan_may_be_made_for_more_devices_than_there_are_here(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    base = write_yaml(tmp_path / "quick.yaml", distill_config(teacher_folder, tmp_path / "logs"))
    assert distil("--base", base, "--plan", "trainer.devices=64") == 0
    assert "40 slots (dynamic) on each of 64 devices" in capsys.readouterr().out


def test_a_checkpoints_raw_weights_are_another_choice_than_its_average(run: Path, tmp_path: Path, capsys) -> None:
    checkpoint = run / "checkpoints" / "step=00000006.ckpt"
    for name, flags in (("ema", []), ("raw", ["--raw"]), ("student", [])):
        source = run if name == "student" else checkpoint
        assert sample("-r", source, "-n", 1, "-c", 2, "--latents", "--no_png", "-l", tmp_path / name, *flags) == 0
    ema, raw, student = (load_file(tmp_path / n / "latents.safetensors")["latents"] for n in ("ema", "raw", "student"))
    assert torch.equal(ema, student)
    assert not torch.allclose(ema, raw)
    assert sample("-r", run, "--raw") == 2
    assert "--raw" in capsys.readouterr().err
