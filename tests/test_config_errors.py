"""Bad configurations of a distillation: one line that names the mistake, exit code 2, nothing written."""

import copy
import re
from pathlib import Path

import pytest
import torch

from ldm_dkdm.commands.arguments import split_base
from ldm_dkdm.commands.main import parser_of
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.schema import DiffusionRun
from ldm_dkdm.errors import UserError
from tests.cli import distil, run_script, write_yaml
from tests.parts import distill_config

SMALL_DIT = {"in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2, "learn_sigma": False}
GONE = object()  # an edit that removes the key


def edited(config: dict, edits: dict[str, object]) -> dict:
    """A copy of the configuration with dotted keys set, or removed where the value is GONE."""
    config = copy.deepcopy(config)
    for dotted, value in edits.items():
        *parents, key = dotted.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is GONE:
            del section[key]
        else:
            section[key] = value
    return config


PROGRESS = re.compile(r"[\w -]+: [\d,]+ (step|call)|[\w -]+ \d+/\d+, .*(took|ETA)")  # of a training before the error


def assert_one_error_line(capsys: pytest.CaptureFixture, code: int, words: tuple[str, ...]) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if not PROGRESS.match(line)]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]


EDITS = {
    "unknown_section": ({"zzz": {}}, ("zzz: unknown key", "valid keys", "distill")),
    "misspelt_section": ({"studnet": {}}, ("studnet", "'student'")),
    "misspelt_key": ({"trainer.lerning_rate": 1.0}, ("trainer.lerning_rate", "'learning_rate'")),
    "unknown_nested_key": ({"distill.warmup.qqq": 1}, ("distill.warmup.qqq: unknown key",)),
    "fraction_for_whole_number": ({"trainer.max_steps": 2.5}, ("trainer.max_steps", "whole number", "2.5")),
    "bool_for_whole_number": ({"distill.batch_size": True}, ("distill.batch_size", "whole number")),
    "text_for_number": ({"distill.rho": "much"}, ("distill.rho", "number", "much")),
    "text_for_bool": ({"teacher.use_ema": "perhaps"}, ("teacher.use_ema", "true or false")),
    "list_for_text": ({"teacher.ckpt": [7]}, ("teacher.ckpt", "text")),
    "section_for_text": ({"logging.name": {"of": 1}}, ("logging.name", "text")),
    "number_for_section": ({"trainer": 3}, ("trainer", "section")),
    "number_for_params": ({"student.params": 3}, ("student.params", "section")),
    "section_missing": ({"trainer": GONE}, ("trainer: missing",)),
    "key_missing": ({"distill.rho": GONE}, ("distill.rho: missing",)),
    "rho_zero": ({"distill.rho": 0}, ("distill.rho", "above 0")),
    "rho_negative": ({"distill.rho": -0.5}, ("distill.rho", "above 0")),
    "rho_not_a_number": ({"distill.rho": float("nan")}, ("distill.rho",)),
    "rho_infinite": ({"distill.rho": float("inf")}, ("distill.rho",)),
    "pool_smaller_than_batch": ({"distill.rho": 0.02}, ("distill.rho", "fewer than a batch")),
    "batch_size_zero": ({"distill.batch_size": 0}, ("distill.batch_size", "at least 1")),
    "stride_zero": ({"distill.stride": 0}, ("distill.stride", "at least 1")),
    "stride_beyond_T": ({"distill.stride": 21}, ("distill.stride", "20")),
    "warmup_images": ({"distill.warmup.images": 10**12}, ("distill.warmup.images", "at most", "slot of the pool")),
    "warmup_mode": ({"distill.warmup.mode": "dance"}, ("distill.warmup.mode", "dance", "ancestral")),
    "t_cap_without_samples": ({"distill.warmup": {"mode": "noise", "t_cap": 5.0}}, ("distill.warmup.t_cap",)),
    "t_cap_of_chains": (
        {"distill.warmup": {"mode": "harvest", "t_cap": 5.0}},
        ("distill.warmup.t_cap", "mode: ddim or dpm-solver++", "this run has mode: harvest"),
    ),
    "too_few_chains": (
        {"distill.warmup": {"mode": "harvest", "images": 1}},
        ("distill.warmup.images", "1 chain of 20 states", "the smallest number is 2"),
    ),
    "t_cap_of_no_warmup": (
        {
            "distill.variant": "iterative",
            "distill.rho": GONE,
            "distill.warmup": {"t_cap": 5.0},
        },
        ("distill.warmup.t_cap", "iterative"),
    ),
    "warmup_steps_beyond_T": ({"distill.warmup.steps": 21}, ("distill.warmup.steps", "20")),
    "sample_steps_beyond_T": ({"logging.sample_steps": 21}, ("logging.sample_steps", "20")),
    "learning_rate_zero": ({"trainer.learning_rate": 0}, ("trainer.learning_rate", "above 0")),
    "ema_decay": ({"trainer.ema_decay": 2}, ("trainer.ema_decay", "below 1")),
    "precision": ({"trainer.precision": "fp8"}, ("trainer.precision", "fp8", "bf16")),
    "no_such_device": ({"trainer.accelerator": "cuda"}, ("trainer.accelerator", "cuda")),
    "more_devices_than_there_are": ({"trainer.devices": 5000}, ("trainer.devices", "5000", "this machine has")),
    "pool_beyond_memory": ({"distill.rho": 1e18}, ("distill.rho", "of memory here")),
    "pool_beyond_disk": (
        {"distill.rho": 1e9, "distill.pool_storage": "mmap"},
        ("logging.dir", "lower rho", "free on the disk"),
    ),
    "steps_beyond_numbers": ({"trainer.max_steps": 10**26}, ("trainer.max_steps", "too large")),
    "seed_beyond_numbers": ({"trainer.seed": 2**64}, ("trainer.seed", "too large")),
    "student_target": ({"student.target": "os.system"}, ("student", "os.system", "ldm_dkdm.networks.UNet")),
    "student_param_misspelt": ({"student.params.model_chanels": 32}, ("student.params.model_chanels", "'model_ch")),
    "student_param_missing": ({"student.params.num_res_blocks": GONE}, ("student.params.num_res_blocks: missing",)),
    "student_target_of_another_kind": ({"student.target": "ldm_dkdm.first_stage.VQModel"}, ("student.target: ", "DiT")),
    "student_without_width": ({"student.params.model_channels": 0}, ("student.params.model_channels", "no channels")),
    "student_width": ({"student.params.model_channels": 40}, ("student.params.model_channels", "40", "32")),
    "student_mults": ({"student.params.channel_mult": 3}, ("student.params.channel_mult: expected a list", "3")),
    "student_mults_as_text": ({"student.params.channel_mult": "1,2"}, ("got '1,2'; write [1,2]",)),
    "student_mult_of_a_half": (
        {"student.params.channel_mult": [1, 1.5]},
        ("student.params.model_channels", "48", "32"),
    ),
    "student_dropout": ({"student.params.dropout": 2.0}, ("student.params", "dropout")),
    "student_dropout_text": ({"student.params.dropout": "hello"}, ("student.params.dropout", "number", "hello")),
    "student_attends_nowhere": (
        {"student.params.attention_resolutions": [7]},
        ("student.params.attention_resolutions", "[7]", "factors, not sides"),
    ),
    "student_side_of_a_dit": (
        {"student": {"target": "ldm_dkdm.networks.DiT", "params": {**SMALL_DIT, "input_size": 16}}},
        ("student.params.input_size", "16", "teacher"),
    ),
    "student_in_channels": ({"student.params.in_channels": 4}, ("student.params.in_channels", "4", "teacher")),
    "student_image_size": ({"student.params.image_size": 16}, ("student.params.image_size", "16", "teacher")),
    "student_out_channels": ({"student.params.out_channels": 6}, ("student.params.out_channels", "6")),
    "student_with_labels": ({"student.params.num_classes": 10}, ("student.params.num_classes",)),
    "student_parameterization": ({"student.parameterization": "score"}, ("student.parameterization", "score", "eps")),
    "unsupported_compvis_key": (
        {
            "student.target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "student.params.use_spatial_transformer": True,
        },
        ("student.params.use_spatial_transformer", "not supported"),
    ),
    "folder_with_target": ({"teacher.target": "ldm_dkdm.networks.DiT"}, ("teacher.target", "describes itself")),
    "other_diffusion": ({"diffusion": {"num_timesteps": 30}}, ("diffusion", "30", "teacher")),
    "teacher_missing": (
        {"teacher.ckpt": "/nowhere/model.ckpt"},
        ("teacher.ckpt: /nowhere/model.ckpt", "no such", "name a CompVis .ckpt"),
    ),
    "first_stage_missing": ({"first_stage": {"ckpt": "/nowhere/vq"}}, ("first_stage", "/nowhere/vq", "missing")),
    "vlb_weight_without_effect": (
        {"distill.loss": {"vlb_weight": 0.001}},
        ("distill.loss.vlb_weight", "learns no variance", "set 1.0"),
    ),
    "clip_student_without_effect": ({"distill.loss": {"clip_student": True}}, ("distill.loss.clip_student", "false")),
    "weight_cap_without_effect": (
        {"distill.loss": {"space": "eps", "weight_cap": 5.0}},
        ("distill.loss.weight_cap", "eps"),
    ),
}


@pytest.mark.parametrize(("edits", "words"), EDITS.values(), ids=EDITS)
def test_a_bad_value_is_named_in_one_line_and_nothing_is_written(
    edits, words, teacher_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    logs = tmp_path / "logs"
    base = write_yaml(tmp_path / "bad.yaml", edited(distill_config(teacher_folder, logs), edits))
    assert_one_error_line(capsys, distil("--base", base), words)
    assert not logs.exists()


def test_the_unedited_configuration_is_accepted(teacher_folder: Path, tmp_path: Path) -> None:
    base = write_yaml(tmp_path / "good.yaml", distill_config(teacher_folder, tmp_path / "logs"))
    assert distil("--base", base, "--plan") == 0


COMMAND_LINES = {
    "no_base": ([], ("--base",)),
    "base_missing": (["--base", "BASE", "other.yaml"], ("other.yaml", "no such config file")),
    "override_without_equals": (["trainer.max_steps", "--base", "BASE"], ("trainer.max_steps", "key=value")),
    "override_after_an_option": (["--base", "BASE", "--plan", "distill.rho=-1"], ("distill.rho", "above 0")),
    "override_without_key": (["--base", "BASE", "=3"], ("'=3'", "key=value")),
    "override_of_unknown_key": (["--base", "BASE", "trainer.speed=3"], ("trainer.speed: unknown key",)),
    "flag_against_its_key": (
        ["--base", "BASE", "--first_stage", "vq", "first_stage.ckpt=other"],
        ("--first_stage: vq, and first_stage.ckpt=other; give one of them",),
    ),
    "flag_twice": (
        ["--base", "BASE", "--first_stage", "a", "--first_stage=b"],
        ("--first_stage: given as a and as b",),
    ),
    "override_not_yaml": (["--base", "BASE", "distill.rho=[1"], ("distill.rho=[1",)),
    "override_to_nothing": (["--base", "BASE", "distill.rho="], ("distill.rho", "missing")),
    "override_through_a_value": (["--base", "BASE", "distill.rho.x=3"], ("distill.rho", "number")),
    "list_by_its_entries": (["--base", "BASE", "student.params.channel_mult.0=2"], ("channel_mult.0=2", "[1,2]")),
    "list_for_a_section": (["--base", "BASE", "trainer=[1]"], ("trainer=[1]",)),
    "keys_as_options": (["--base", "BASE", "--max_steps", "9"], ("--max_steps", "trainer.max_steps=N")),
    "folder_as_base": (["--base", "."], (".: is a folder",)),
    "name_outside": (["--base", "BASE", "logging.name=../other"], ("logging.name", "../other")),
    "init_of_nothing": (["--base", "BASE", "student.init=nowhere"], ("student.init", "random nor teacher")),
    "pool_from_nothing": (["--base", "BASE", "distill.pool_from=nowhere.pt"], ("distill.pool_from", "nowhere.pt")),
    "interpolation_of_nothing": (["--base", "BASE", "distill.rho=${nowhere}"], ("rho: ${nowhere} names a",)),
    "reference_to_a_default": (["--base", "BASE", "distill.rho=${trainer.seed}"], ("trainer.seed}", "write that")),
    "resume_of_no_run": (["--resume", "nowhere"], ("--resume", "nowhere")),
    "resume_last_without_runs": (["--resume", "last"], ("--resume last", "logs")),
    "resume_and_base": (["--resume", "nowhere", "--base", "BASE"], ("--resume", "--base")),
}


@pytest.mark.parametrize(("arguments", "words"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_bad_command_line_is_named_in_one_line_and_nothing_is_written(
    arguments, words, teacher_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_yaml(tmp_path / "good.yaml", distill_config(teacher_folder, tmp_path / "logs"))
    assert_one_error_line(capsys, distil(*[str(base) if a == "BASE" else a for a in arguments]), words)
    assert not (tmp_path / "logs").exists()


def test_a_config_of_another_script_is_named_as_that(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    base = write_yaml(tmp_path / "run.yaml", distill_config(teacher_folder, tmp_path / "logs"))
    for script in ("train_ldm.py", "train_first_stage.py"):
        code = run_script(script, "--base", base)
        assert_one_error_line(capsys, code, (str(base), "made for scripts/dkdm_ldm.py", script))
    with pytest.raises(UserError, match=r"is a DistillRun, not a DiffusionRun; load_config\(FILE, schema=DistillRun\)"):
        load_config(base, schema=DiffusionRun)


def test_a_model_s_folder_is_no_run_to_resume(teacher_folder: Path, capsys) -> None:
    assert_one_error_line(capsys, distil("--resume", teacher_folder), ("--resume", "a model folder"))


def test_resume_last_passes_damaged_folders_by(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "x").mkdir(parents=True)
    (tmp_path / "logs" / "x" / "config.yaml").write_text("a: [")
    assert_one_error_line(capsys, distil("--resume", "last"), ("no run of dkdm distill",))


def test_base_may_be_repeated_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        write_yaml(tmp_path / name, {})
    for words, files in (
        (["--base", "a.yaml", "a=1", "--base", "b.yaml"], ["a.yaml", "b.yaml"]),
        (["a.yaml", "a=1"], ["a.yaml"]),
    ):
        options = parser_of("distill").parse_args(words)
        assert split_base(options.base, options.overrides) == (files, ["a=1"])
