"""`trainer.compile: graphs` on a host: a graph is simulated by a call whose outputs are always in the same memory."""

from functools import partial
from pathlib import Path

import pytest
import torch

from ldm_dkdm import load_model
from ldm_dkdm.device import require_graphs
from ldm_dkdm.errors import UserError
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.guidance import rows_of
from ldm_dkdm.networks.modes import compiled, replayed
from ldm_dkdm.training import run
from tests import digits
from tests.cli import distil, write_yaml
from tests.conftest import Replays
from tests.parts import distill_config
from tests.streams import BATCH, batches, new_pool, new_teacher


@pytest.mark.parametrize("keys", [{}, {"discard": 0.4}, {"replay": 3, "draws": "stratified"}])
def test_batches_outlive_the_replays_after_them(replays: list[int], keys: dict[str, object]) -> None:
    wanted = batches(new_teacher(4), new_pool(labeled=True), "cpu", **keys)
    teacher = new_teacher(4)
    with replayed(teacher.network, BATCH):
        found = batches(teacher, new_pool(labeled=True), "cpu", **keys)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    assert len(replays) >= 6 and set(replays) == {BATCH}


def test_other_sizes_and_gradients_are_not_replayed(replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    network = new_teacher().network
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: setattr(module, "_compiled_call_impl", plain))
    plain = network._call_impl
    x, t = torch.randn(4, 3, 8, 8), torch.arange(4)
    with compiled([network], compiles=True):
        with replayed(network, 3):
            with torch.no_grad():
                network(x, t)
                assert replays == []
                first = network(x[:3], t[:3])
                kept = first.clone()
                assert not torch.equal(network(x[1:], t[1:]), first) and torch.equal(first, kept)
            network(x[:3].requires_grad_(), t[:3]).sum().backward()
            assert replays == [3, 3]
        assert network._compiled_call_impl is plain
    assert network._compiled_call_impl is None
    with replayed(network, 3, graphs=False):
        assert network._compiled_call_impl is None


def test_more_shapes_are_compiled_than_torch_allows_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(len(inputs[-1]))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    network, limit = torch.nn.Linear(3, 3), torch._dynamo.config.recompile_limit
    with compiled([network], compiles=True), torch.no_grad():
        for rows in range(1, 13):
            network(torch.randn(rows, 3))
    assert seen == list(range(1, 13)) and limit < 12
    assert torch._dynamo.config.recompile_limit == limit


def test_guidance_doubles_the_rows_of_a_call() -> None:
    teacher, seen = new_teacher(4), []
    guided = DiffusionModel(teacher.network, like=teacher, null_label=3, guidance=2.0)
    teacher.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    x, t = torch.randn(5, 3, 8, 8), torch.arange(5)
    for model in (teacher, guided):
        model.predict(x, t, torch.zeros(5, dtype=torch.long))
        assert seen.pop() == rows_of(model, 5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_distillation_with_replays_makes_the_same_student(
    replays: Replays, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, tmp_path: Path, accumulate: int
) -> None:
    """Only where no gradients are accumulated are the student's steps replayed, and their gradients overwritten."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(run, "require_graphs", lambda choice, device: None)
    states = []
    for choice in ("false", "graphs"):
        out = tmp_path / choice
        trainer = {"max_steps": 4, "compile": choice, "precision": "32", "accumulate": accumulate, "grad_clip": 1.0}
        config = distill_config(teacher_folder, out, trainer=trainer)
        assert distil("--base", write_yaml(tmp_path / f"{choice}.yaml", config)) == 0
        (student,) = out.rglob("student")
        states.append(load_model(student).network.state_dict())
        assert bool(replays) is (choice == "graphs")
    assert replays.training == (4 if accumulate == 1 else 0) < len(replays)
    assert list(states[0]) == list(states[1])
    assert all(map(torch.equal, states[0].values(), states[1].values()))


def test_graphs_are_refused_without_an_nvidia_gpu(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path / "logs"))
    assert distil("--base", base, "trainer.compile=graphs", "trainer.accelerator=cpu") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: trainer.compile: graphs are those of CUDA") and line.endswith("on cpu; use auto")
    assert not (tmp_path / "logs").exists()
    require_graphs("graphs", torch.device("cuda"))
    require_graphs("true", torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(UserError, match="trains on an AMD GPU"):
        require_graphs("graphs", torch.device("cuda"))


def test_a_training_on_images_refuses_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "require_graphs", lambda choice, device: None)
    assert digits.train(tmp_path, "run", {"path": "nowhere.npz"}, trainer={"compile": "graphs"}) == 2
    assert "trainer.compile: graphs are for a distillation" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
