"""A device that does not exist: its tensors are computed on the host, and every wait for it is recorded.

`python -m tests.simulated_device` distils a few batches on it and prints, for pools on the device and in host memory,
what the host waited for and how far the batches are from those of the host. It runs in a process of its own, since a
device is registered for good.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

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
            return args[0]
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
    found = {}
    with torch.no_grad():
        for place, keys in CASES.items():
            wanted = batches(new_teacher(), new_pool(), "cpu", **keys)
            with Simulation() as simulation:
                teacher = new_teacher()
                for module in teacher.network.modules():
                    for kind in (module._parameters, module._buffers):
                        kind.update({name: OnDevice(t.data) for name, t in kind.items() if t is not None})
                pool = new_pool(DEVICE if place.startswith("device") else "cpu")
                own = batches(teacher, pool, DEVICE, simulation.waits.clear, **keys)
            furthest = max((_bare(a).float() - b.float()).abs().max().item() for a, b in zip(own, wanted, strict=True))
            found[place] = {"waits": simulation.waits, "furthest": furthest, "compared": len(own)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
