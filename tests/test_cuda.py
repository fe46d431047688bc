"""On an NVIDIA GPU, where there is one: what other tests simulate on a host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm_dkdm import load_model
from ldm_dkdm.distillation.stream import DistillConfig, DistillStream
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.networks.modes import compiled, replayed
from tests.cli import distil, sample, write_yaml
from tests.parts import distill_config
from tests.simulated_device import trained
from tests.streams import BATCH, batches, new_pool, new_teacher

WARNINGS = (  # torch's, about what is meant here
    "ignore:.*Synchronization debug mode.*",
    "ignore:.*TensorFloat32.*",
    "ignore:.*CUDA Graph is empty.*",
)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    *map(pytest.mark.filterwarnings, WARNINGS),
]
KEYS: list[dict[str, object]] = [{}, {"discard": 0.4}, {"replay": 3, "draws": "stratified"}]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    torch.cuda.set_sync_debug_mode("default")


def on_the_gpu(classes: int | None = None) -> DiffusionModel:
    """The small teacher, there."""
    return new_teacher(classes).to("cuda", "32")


def refuse_waits() -> None:
    """Let every wait of the host from now on be an error."""
    torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_no_batch_waits_for_the_gpu(place: str) -> None:
    stream = DistillStream(
        on_the_gpu(4), new_pool(place, labeled=True), DistillConfig(BATCH, rho=0.3), 20, 3, 0, "cuda"
    )
    for step in range(12):
        stream.next_batch()
        if step == 1:
            refuse_waits()
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()  # waits are seen


def test_no_step_of_the_student_waits_for_the_gpu() -> None:
    found = trained("cuda", refuse_waits)
    torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 7 and all(value.isfinite().all() for value in found)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("classes", [None, 4])
def test_the_place_of_the_pool_changes_no_batch(classes: int | None, keys: dict[str, object]) -> None:
    on_device, in_memory = (
        batches(on_the_gpu(classes), new_pool(place, labeled=bool(classes)), "cuda", **keys)
        for place in ("cuda", "cpu")
    )
    assert len(on_device) == len(in_memory)
    assert all(torch.equal(own.cpu(), other.cpu()) for own, other in zip(on_device, in_memory, strict=True))


@pytest.mark.parametrize("keys", KEYS)
def test_graphs_make_the_batches_of_compiled_calls(keys: dict[str, object]) -> None:
    found = []
    for graphs in (False, True):
        teacher = on_the_gpu(4)
        with compiled([teacher.network], compiles=True), replayed(teacher.network, BATCH, graphs):
            found.append(batches(teacher, new_pool("cuda", labeled=True), "cuda", **keys))
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own.float(), plain.float(), rtol=0, atol=5e-3)  # a rounding of the float16 pool


@pytest.mark.parametrize("choice", ["auto", "graphs"])
@pytest.mark.parametrize("storage", ["auto", "memory"])
def test_a_distillation_goes_on_as_if_it_had_not_ended(
    storage: str, choice: str, teacher_folder: Path, tmp_path: Path
) -> None:
    trainer = {"accelerator": "auto", "compile": choice, "precision": "bf16", "max_steps": 6}
    config = distill_config(teacher_folder, tmp_path, trainer=trainer, distill={"pool_storage": storage})
    base = write_yaml(tmp_path / "run.yaml", config)
    assert distil("--base", base, "logging.name=whole") == 0
    assert distil("--base", base, "logging.name=parts", "trainer.max_steps=3") == 0
    assert distil("--resume", tmp_path / "parts", "trainer.max_steps=6") == 0
    whole, parts = (load_model(tmp_path / name / "student").network.state_dict() for name in ("whole", "parts"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0.02, atol=2e-3, msg=name)
    assert sample("-r", tmp_path / "whole", "-n", 4, "-c", 3, "--npz", "-l", tmp_path / "samples") == 0
    assert list((tmp_path / "samples").rglob("*.npz"))


def test_graphs_train_the_student_of_compiled_calls(teacher_folder: Path, tmp_path: Path) -> None:
    trainer = {"accelerator": "auto", "precision": "32", "max_steps": 8, "grad_clip": 1.0}
    base = write_yaml(tmp_path / "run.yaml", distill_config(teacher_folder, tmp_path, trainer=trainer))
    torch._dynamo.utils.counters.clear()
    weights = []
    for choice in ("true", "graphs"):
        assert distil("--base", base, f"logging.name={choice}", f"trainer.compile={choice}") == 0
        weights.append(load_model(tmp_path / choice / "student").network.state_dict())
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for name, weight in weights[0].items():  # eight steps with a learning rate of 1e-3
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-3, msg=name)
