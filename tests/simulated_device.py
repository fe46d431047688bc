"""A device that does not exist: its tensors are computed on the host, and every wait for it is recorded.

`main` makes a few batches on it, for pools on the device and in host memory, and trains a
student; it prints what the host waited for and how far batches, losses and weights are from those of the host. It runs
in a process of its own, since a device is registered for good.
"""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

if TYPE_CHECKING:
    from ldm_dkdm.model import DiffusionModel

KIND = "simulated"
DEVICE = f"{KIND}:0"
CASES: dict[str, dict[str, object]] = {  # place of the pool -> keys of the method
    "device": {},
    "memory": {},
    "device, replay": {"replay": 3},
    "memory, replay": {"replay": 3},
}
aten = torch.ops.aten
WAITS = {  # what the host cannot know before the device has computed it
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
}


class OnDevice(Tensor):
    """A tensor of the device; `inner` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: outside the simulation")


class Simulation(TorchDispatchMode):
    """While active, `DEVICE` can be used; `waits` has what the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        read = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        result_here = self._result_here(func, args, kwargs, bool(read))
        crosses = bool(read) != result_here and bool(tensors)
        blocks = not kwargs.get("non_blocking", len(args) > 2 and func is aten.copy_.default and args[2])
        if (func in WAITS and read) or (crosses and blocks):
            self.waits.append(f"{func} of {[tuple(tensor.shape) for tensor in tensors]}")
        own = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        found = func(*tree_map(_bare, args), **tree_map(_bare, own))
        if func._schema.name.endswith("_"):
            return args[0] if func._schema.returns else None
        if crosses and any(found is tensor for tensor in tensors):
            found = found.clone()
        return tree_map(lambda leaf: OnDevice(leaf) if result_here and isinstance(leaf, Tensor) else leaf, found)

    def _result_here(self, func: Any, args: Any, kwargs: dict[str, Any], reads: bool) -> bool:
        """Whether the result is on the device."""
        if func is aten.copy_.default:
            return isinstance(args[0], OnDevice)
        wanted = kwargs.get("device")
        return reads if wanted is None else torch.device(wanted).type == KIND


class Backend(_DummyBackendModule):
    """What autocast asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Its formats."""
        return [torch.bfloat16]


class LateLane:
    """Copies that reach the host when it waits for them, and no earlier."""

    def __init__(self, device: torch.device | str) -> None:
        self.device, self.joined = device, True

    def upload(self, tensor: Tensor, indices: Tensor) -> Tensor:
        """The copy of rows; it may not be read before `join`."""
        self.joined = False
        return tensor[indices].clone().to(self.device, non_blocking=True)

    def join(self) -> None:
        """Allow reads."""
        self.joined = True

    def download(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A host tensor without content until the wait."""
        assert self.joined
        host = torch.full(tensor.shape, -7, dtype=tensor.dtype)

        def wait() -> None:
            host.copy_(tensor, non_blocking=True)

        return host, wait


def _bare(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def main() -> None:
    """Distil on the host and on the device; see the module."""
    from ldm_dkdm.distillation import staging, stream
    from ldm_dkdm.rng import torch_generator
    from tests.streams import batches, new_pool, new_teacher

    _setup_privateuseone_for_python_backend(KIND, Backend())
    Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[method-assign]
    Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    staging.CudaLane = LateLane  # type: ignore[assignment, misc]
    stream.torch_generator = lambda *key: torch_generator(*key[:4])  # numbers of the host, so that both are equal
    found: dict[str, dict[str, object]] = {}
    with torch.no_grad():
        for place, keys in CASES.items():
            wanted = batches(new_teacher(), new_pool(), "cpu", **keys)
            with Simulation() as simulation:
                pool = new_pool(DEVICE if place.startswith("device") else "cpu")
                own = batches(moved(new_teacher()), pool, DEVICE, simulation.waits.clear, **keys)
            found[place] = compared(simulation, own, wanted)
    wanted = trained("cpu")
    with Simulation() as simulation:
        own = trained(DEVICE, simulation.waits.clear)
    found["training"] = compared(simulation, own[:-1], wanted[:-1])
    found["training"]["cosine"] = (_bare(own[-1]) @ wanted[-1]).item()
    with Simulation() as simulation:
        trained(DEVICE, simulation.waits.clear, read_gradients=True)
    found["training that reads gradients"] = {"waits": simulation.waits}
    print(json.dumps(found))


def compared(simulation: Simulation, own: list[Tensor], wanted: list[Tensor]) -> dict[str, object]:
    """What a simulation has waited for, and how far its tensors are from the host's."""
    furthest = torch.stack([(_bare(a).float() - b.float()).abs().max() for a, b in zip(own, wanted, strict=True)]).max()
    return {"waits": simulation.waits, "furthest": furthest.item(), "compared": len(own)}


def moved(model: "DiffusionModel") -> "DiffusionModel":
    """A model whose weights are on the device."""
    for module in model.network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(OnDevice(weight.data), weight.requires_grad)
        module._buffers.update({name: OnDevice(t) for name, t in module._buffers.items() if t is not None})
    return model


def read(gradient: Tensor) -> None:
    """Wait for a gradient."""
    gradient.item()


def trained(device: str, after_first: Callable[[], None] = lambda: None, read_gradients: bool = False) -> list[Tensor]:
    """Losses of six steps of the product, and the direction in which they have moved the average of the weights."""
    from ldm_dkdm.config.schema import DistillConfig, LossConfig, TrainerConfig
    from ldm_dkdm.distillation.module import StudentModule
    from ldm_dkdm.distillation.stream import DistillStream
    from ldm_dkdm.training.ema import StudentEMA
    from tests.streams import BATCH, new_pool, new_teacher

    teacher, student = new_teacher(), new_teacher().student(new_teacher().node)
    teacher, student = (moved(it) if device == DEVICE else it.to(device, "32") for it in (teacher, student))
    stream = DistillStream(teacher, new_pool(device), DistillConfig(BATCH, rho=0.3), 20, 3, 0, device)
    config = TrainerConfig(max_steps=20, learning_rate=1e-3, grad_clip=1.0)
    module = StudentModule(student, LossConfig(space="v", weight_cap=10.0), config)
    optimizer, average, losses = module.configure_optimizers()["optimizer"], StudentEMA(0.9), list[Tensor]()
    average._currents = [weight.detach() for weight in module.parameters()]
    average._averages = [weight.clone() for weight in average._currents]
    initial = [weight.clone() for weight in average._averages]
    for step in range(6):
        with torch.no_grad():
            batch = stream.next_batch()
        loss = module.training_step(batch, step)
        if read_gradients:
            loss.register_hook(read)
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        average.on_train_batch_end(SimpleNamespace(global_step=step + 1), module)  # type: ignore[arg-type]
        losses.append(loss.detach())
        if step == 0:
            after_first()
    paths = [now - before for now, before in zip(average._averages, initial, strict=True)]
    path = torch.cat([path.flatten() for path in paths])
    return [*losses, path / path.norm()]
