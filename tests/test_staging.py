"""Where slots are kept changes no batch, and no step waits for the device."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ldm_dkdm.device import autocast
from ldm_dkdm.distillation import staging, stream
from ldm_dkdm.networks.modes import compiled, stored_in_bf16
from tests import simulated_device
from tests.cli import distil, write_yaml
from tests.parts import distill_config
from tests.prepared import begin, ended
from tests.simulated_device import LateLane
from tests.streams import batches, new_pool, new_teacher


def test_the_host_waits_for_no_simulated_device(tmp_path: Path) -> None:
    simulation = begin(simulated_device.main, printed=tmp_path / "printed")
    assert ended(simulation) == 0, (tmp_path / "printed").read_text()[-2000:]
    found = json.loads((tmp_path / "printed").read_text().splitlines()[-1])
    training, reading = found.pop("training"), found.pop("training that reads gradients")
    assert training["waits"] == [] and training["compared"] == 6 and training["furthest"] < 1e-3
    assert training["cosine"] > 0.99  # of the ways that the averages of all weights have moved
    assert len(reading["waits"]) == 5  # waits of a backward pass are seen; those of the first step are not counted
    assert set(found) == {"device", "memory", "device, replay", "memory, replay"}
    for place, result in found.items():
        assert result["waits"] == [], place
        assert result["furthest"] < 1e-3 and result["compared"] == 63, place  # a rounding of the float16 pool


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"discard": 0.4},
        {"discard": 0.4, "discard_mode": "same_slots"},
        {"stride": 2},
        {"replay": 3, "draws": "stratified"},
    ],
)
@pytest.mark.parametrize("classes", [None, 4])
def test_slots_that_travel_make_the_same_batches(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], classes: int | None
) -> None:
    wanted = batches(new_teacher(classes), new_pool(labeled=bool(classes)), "cpu", **keys)
    monkeypatch.setattr(stream, "slots_on", lambda pool, device: staging.StagedSlots(pool, LateLane(device)))
    found = batches(new_teacher(classes), new_pool(labeled=bool(classes)), "cpu", **keys)
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))


def test_a_pool_is_saved_with_the_slots_that_travel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stream, "slots_on", lambda pool, device: staging.StagedSlots(pool, LateLane(device)))
    pool = new_pool()
    pool_stream = stream.DistillStream(new_teacher(), pool, stream.DistillConfig(5, rho=0.3), 20, 3)
    for _ in range(7):
        pool_stream.next_batch()
    pool.save(tmp_path / "pool.safetensors", 7)
    copy = new_pool()
    copy.load(tmp_path / "pool.safetensors")
    wanted = new_pool()
    monkeypatch.undo()
    plain = stream.DistillStream(new_teacher(), wanted, stream.DistillConfig(5, rho=0.3), 20, 3)
    for _ in range(7):
        plain.next_batch()
    assert torch.equal(copy.x, wanted.x) and torch.equal(copy.t, wanted.t)


def test_weights_in_bf16_compute_what_autocast_computes() -> None:
    network = new_teacher(4).network
    small = stored_in_bf16(network)
    x, t, label = torch.randn(5, 3, 8, 8), torch.arange(5), torch.arange(5) % 4
    with torch.no_grad(), autocast("bf16", "cpu"):
        assert torch.equal(small(x, t, label), network(x, t, label))
    taken = sum(weight.numel() * weight.element_size() for weight in small.parameters())
    assert taken < 0.6 * 4 * sum(weight.numel() for weight in network.parameters())
    assert all(weight.dtype == torch.float32 for weight in network.parameters())
    assert stored_in_bf16(small) is small


def test_a_shared_weight_keeps_its_format() -> None:
    embedding, linear = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6)
    linear.weight = embedding.weight
    small = stored_in_bf16(torch.nn.Sequential(embedding, linear))
    assert small[0].weight is small[1].weight and small[0].weight.dtype == torch.float32
    assert small[1].bias.dtype == torch.bfloat16


def test_compiled_networks_are_as_before_afterwards() -> None:
    network = new_teacher().network
    names = list(network.state_dict())
    with compiled([network], compiles=True):
        assert network._compiled_call_impl is not None and list(network.state_dict()) == names
    assert network._compiled_call_impl is None


READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}


class Waits(TorchFunctionMode):
    """Counts what reads a tensor's numbers."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


def test_a_training_reads_its_losses_only_where_it_shows_them(
    monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, tmp_path: Path
) -> None:
    counts, next_batch = [], stream.DistillStream.next_batch
    with Waits() as waits:

        def counting(self: stream.DistillStream) -> object:
            counts.append(waits.count)
            return next_batch(self)

        monkeypatch.setattr(stream.DistillStream, "next_batch", counting)
        trainer = {"max_steps": 12, "learning_rate": 1e-3, "max_minutes": 60, "grad_clip": 1.0}
        logging = {"log_every": 6, "save_every": 100, "sample_every": 100}
        config = distill_config(teacher_folder, tmp_path / "logs", trainer=trainer, logging=logging)
        assert distil("--base", write_yaml(tmp_path / "c.yaml", config)) == 0
    steps = [after - before for before, after in pairwise(counts)]
    assert len(steps) == 11
    assert [reads for step, reads in enumerate(steps, 1) if step != 6] == [0] * 10
    assert steps[5] > 0  # the means of a window
