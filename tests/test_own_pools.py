"""The pool of a run is reused by other students and seeds, of the same teacher only."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints.pools import read_own_pool
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.refill import refill
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.training.run_folder import RunFolder
from ldm_dkdm.training.same_teacher import pool_facts, refuse_other_teacher
from ldm_dkdm.training.saving import warmup_path
from tests.cli import distil, write_yaml
from tests.parts import distill_config, model_folder
from tests.test_wrapped_weights import HINTS, PIXEL, averaged, raw

POOL = "checkpoints/step=00000006.pool-rank0.safetensors"


@pytest.fixture(scope="module")
def run(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("first")
    assert distil("--base", write_yaml(home / "c.yaml", distill_config(teacher_folder, home))) == 0
    return home / "run"


def pool_of(run: Path, step: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(run / f"checkpoints/step={step:08d}.pool-rank0.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("x", "t")}, json.loads(file.metadata()["pool"])


def test_the_header_says_what_the_states_follow_from(run: Path) -> None:
    header = pool_of(run)[1]
    assert len(header["teacher_sha256"]) == 64
    assert (header["num_timesteps"], header["guidance"]) == (20, 1.0)
    assert header["diffusion"]["schedule"] == "scaled_linear"


@pytest.mark.parametrize("source", [".", POOL])
def test_another_student_and_seed_begin_with_the_states_of_a_run(
    source: str, run: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    config = distill_config(teacher_folder, tmp_path, trainer={"max_steps": 1, "seed": 7})
    config["distill"]["pool_from"] = str(run / source)
    config["student"]["params"]["model_channels"] = 64
    assert distil("--base", write_yaml(tmp_path / "c.yaml", config)) == 0
    before, after = pool_of(run)[0], pool_of(tmp_path / "run", 1)[0]
    same = (before["x"].flatten(1)[:, None] == after["x"].flatten(1)).all(-1)
    assert int(same.any(0).sum()) == len(after["t"]) - 4  # all but the batch that has advanced
    where = same.float().argmax(0)[same.any(0)]
    assert before["t"][where].equal(after["t"][same.any(0)])


def test_a_pool_from_before_a_key_of_the_process_is_reused(run: Path, teacher_folder: Path, tmp_path: Path) -> None:
    tensors, header = pool_of(run)
    assert header["diffusion"].pop("clip_sample") is None
    (tmp_path / "old/checkpoints").mkdir(parents=True)
    save_file(tensors, tmp_path / "old" / POOL, {"pool": json.dumps(header)})
    config = distill_config(teacher_folder, tmp_path, trainer={"max_steps": 1})
    config["distill"]["pool_from"] = str(tmp_path / "old" / POOL)
    assert distil("--base", write_yaml(tmp_path / "c.yaml", config)) == 0


def test_the_pool_of_another_teacher_is_refused(
    run: Path, first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_folder(tmp_path / "other", first_stage, model_channels=64)
    config = distill_config(other, tmp_path)
    config["distill"]["pool_from"] = str(run)
    base = write_yaml(tmp_path / "c.yaml", config)
    for source, words in ((run, "its teacher_sha256 is"), (other, "is not the run folder of a distillation")):
        assert distil("--base", base, f"distill.pool_from={source}") == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: distill.pool_from: ") and words in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_kind_of_weights_that_it_began_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": raw(), "ema": {0.99: averaged()}}, tmp_path / "x.pt")
    kinds = (None, "EMA"), (False, "raw")
    facts = {kind: pool_facts(load_model(tmp_path / "x.pt", **HINTS, **PIXEL, use_ema=ema)) for ema, kind in kinds}
    assert {kind: found["weights_kind"] for kind, found in facts.items()} == {"EMA": "EMA", "raw": "raw"}
    teacher = load_model(tmp_path / "x.pt", **HINTS, **PIXEL)
    run: Any = SimpleNamespace(folder=RunFolder(tmp_path), latest=None)
    file = warmup_path(run.folder.checkpoints, 0)
    file.parent.mkdir()

    def write(header: dict[str, Any]) -> None:
        states = {"x": torch.zeros(1, *teacher.shape), "t": torch.zeros(1)}
        save_file(states, file, {"pool": json.dumps({**header, "filled": 1})})

    write(facts["EMA"])
    refuse_other_teacher(teacher, run)
    assert not caplog.text
    write(facts["raw"])
    with pytest.raises(UserError, match=r"is not the one that .* began with: its kind of weights was raw and is EMA"):
        refuse_other_teacher(teacher, run)
    with pytest.raises(UserError, match="its weights_kind is raw, this run"):
        read_own_pool(file, teacher.shape, facts["EMA"])
    write({key: value for key, value in facts["raw"].items() if key != "weights_kind"})  # of an older version
    refuse_other_teacher(teacher, run)
    assert "whose pool does not say EMA or raw weights; it goes on with the EMA weights of" in caplog.text
    assert len(read_own_pool(file, teacher.shape, facts["EMA"]).t) == 1


def test_a_larger_pool_than_the_run_has_is_refused(
    run: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distill_config(teacher_folder, tmp_path)
    config["distill"] |= {"pool_from": str(run), "rho": 1.0}
    assert distil("--base", write_yaml(tmp_path / "c.yaml", config)) == 2
    assert "set rho=0.5 or less" in capsys.readouterr().err


def test_a_pool_of_other_classes_is_refused(
    first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = model_folder(tmp_path / "labelled", first_stage, num_classes=4)

    def made(name: str, *words: str) -> int:
        config = distill_config(teacher, tmp_path, trainer={"max_steps": 1}, logging={"name": name})
        config["student"]["params"]["num_classes"] = 4
        config["distill"]["warmup"] = {"mode": "noise"}
        return distil("--base", write_yaml(tmp_path / f"{name}.yaml", config), *words)

    assert made("all") == 0
    assert made("fewer", "teacher.null_label=3", f"distill.pool_from={tmp_path / 'all'}") == 2
    assert "its null_label is None, this run's is 3" in capsys.readouterr().err
    file = tmp_path / "all" / "checkpoints/step=00000001.pool-rank0.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["pool"])
    header.pop("null_label")  # as older versions wrote it
    save_file(tensors, file, {"pool": json.dumps(header)})
    assert made("fewer", "teacher.null_label=3", f"distill.pool_from={tmp_path / 'all'}") == 2
    words = f"pool_from: {tmp_path / 'all'}: has slots of label 3, which is not a class of the teacher (null_label)"
    assert words in capsys.readouterr().err
    assert made("fewer", "teacher.null_label=3") == 0
    assert made("other", "teacher.null_label=2", f"distill.pool_from={tmp_path / 'fewer'}") == 2
    assert "its null_label is 3, this run" in capsys.readouterr().err
    assert made("more", f"distill.pool_from={tmp_path / 'fewer'}") == 2
    assert "its null_label is 3, this run's is None" in capsys.readouterr().err
    assert made("again", "teacher.null_label=3", f"distill.pool_from={tmp_path / 'fewer'}") == 0


def test_labels_stay_with_their_states() -> None:
    states = NoisyBatch(torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8), torch.arange(8) * 10)
    pool = NoisyPool(8, (1, 1, 1), torch.float32, labeled=True)
    refill(pool, states, 20, seed=3, rank=0)
    assert pool.label is not None
    assert pool.label.equal(pool.t * 10) and pool.x.flatten().equal(pool.t.float())
    assert not pool.t.equal(torch.arange(8, dtype=torch.int32))
