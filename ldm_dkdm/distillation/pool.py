"""The expanded batch set B+ of dynamic iterative distillation (DKDM, Sec. 3.3)."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm_dkdm.checkpoints.hashes import read_safetensors
from ldm_dkdm.checkpoints.reading import file_kind
from ldm_dkdm.device import to_device
from ldm_dkdm.errors import MALFORMED, UserError, interruptible, unreadable
from ldm_dkdm.files import write_tensors
from ldm_dkdm.records import NoisyBatch

if TYPE_CHECKING:
    from collections.abc import Callable

BESIDE = "beside."  # prefix of names in a pool's file that do not belong to the slots


class NoisyPool:
    """Slots (x_t, t, label) in host memory, in a memory-mapped file, or on a device.

    A slot at timestep t in [0, T-1] holds the x_t that the teacher sees next. Timesteps are always on the host, where
    the moves are decided, so that no draw waits for a device.

    Args:
        slots: |B+| = round(rho * T) * batch size.
        shape: (C,H,W) of a state.
        dtype: storage type of the states; half precision by default.
        storage: file to map the states to; None keeps them in memory.
        labeled: whether a slot has a label, for a class-conditional teacher.
        device: where states and labels are kept.

    Attributes:
        filled: slots 0 ... filled-1 are prepared.
        mapped: whether the states are mapped to a file.
        settle: finishes writes that are under way; `save` calls it.
        updated: (slots,), the number of batches of the training after which each slot was last put back.
        facts: what the states follow from, for the file: teacher, T, schedule.
        beside: tensors that the file has too, such as the predictions of a replay.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float16,
        storage: Path | None = None,
        labeled: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if slots < 1:
            raise UserError(f"rho: a pool of {slots} slots; rho * T must round to at least 1")
        self.x = _allocate((slots, *shape), dtype, storage, device)
        self.t = torch.zeros(slots, dtype=torch.int32, device="cpu")
        self.label = torch.zeros(slots, dtype=torch.int32, device=device) if labeled else None
        self.updated = torch.zeros(slots, dtype=torch.int32, device="cpu")
        self.filled, self.mapped = 0, storage is not None
        self.facts: dict[str, Any] = {}
        self.beside: dict[str, Tensor] = {}
        self.settle: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        """Where states and labels are kept."""
        return self.x.device

    def __len__(self) -> int:
        return len(self.t)

    def fill(self, batch: NoisyBatch) -> None:
        """Append prepared states (n,C,H,W) at timesteps (n,), as many as there is room for."""
        room = torch.arange(self.filled, min(self.filled + len(batch.x), len(self)), device="cpu")
        count = len(room)
        label = None if batch.label is None else batch.label[:count]
        self.put_back(room, NoisyBatch(batch.x[:count], batch.t[:count], label))
        self.filled += count

    def draw(self, batch_size: int, rng: np.random.Generator) -> Tensor:
        """Indices (batch_size,) of distinct slots, uniformly at random."""
        self.require_slots(batch_size)
        return torch.from_numpy(rng.choice(len(self), batch_size, replace=False))

    def require_slots(self, batch_size: int) -> None:
        """Refuse a batch of more slots than there are.

        Raises:
            UserError: names both.
        """
        if batch_size > len(self):
            raise UserError(f"batch_size: {batch_size} is larger than the pool of {len(self)} slots")

    def take(self, indices: Tensor) -> NoisyBatch:
        """A copy of slots: states (B,C,H,W), float32, timesteps (B,) and labels (B,), int64.

        Timesteps are on the host, states and labels on the pool's device.
        """
        own = to_device(indices, self.device)
        label = None if self.label is None else self.label[own].long()
        return NoisyBatch(self.x[own].float(), self.t[indices].long(), label)

    def put_back(self, indices: Tensor, batch: NoisyBatch, batches: int = 0) -> None:
        """Overwrite the slots (B,) with as many states, in the training's batch of this number; 0: before it."""
        self.move(indices, batch.t, batches)
        self.overwrite(indices, batch.x, batch.label)

    def move(self, indices: Tensor, t: Tensor, batches: int = 0) -> None:
        """Set the timesteps (B,) of slots (B,), as `put_back`."""
        self.updated[indices] = batches
        self.t[indices] = t.to("cpu", self.t.dtype)

    def overwrite(self, indices: Tensor, x: Tensor, label: Tensor | None) -> None:
        """Set states (B,C,H,W) and labels (B,) of slots (B,), as `put_back`."""
        own = to_device(indices, self.device)
        self.x[own] = x.to(self.device, self.x.dtype)
        if self.label is not None:
            assert label is not None  # batches of a labelled pool have labels
            self.label[own] = label.to(self.device, self.label.dtype)

    def save(self, path: Path, step: int, origin: str = "") -> None:
        """Write the slots to a safetensors file, atomically; `origin` names what filled them."""
        self.settle()
        metadata = json.dumps({"step": step, "filled": self.filled, "origin": origin, **self.facts})
        beside = {BESIDE + name: tensor.cpu() for name, tensor in self.beside.items()}
        write_tensors(path, {**self.tensors(), **beside}, {"pool": metadata})

    def tensors(self) -> dict[str, Tensor]:
        """What a slot has, by name, for all slots, on the host."""
        return {name: tensor.cpu() for name, tensor in self._slots().items()}

    def _slots(self) -> dict[str, Tensor]:
        """As `tensors`, where they are."""
        label = {} if self.label is None else {"label": self.label}
        return {"x": self.x, "t": self.t, **label, "updated": self.updated}

    def load(self, path: Path, origin: str | None = "") -> int:
        """Read what `save` wrote; returns its step. Where an older version wrote it, `updated` is -1.

        Args:
            path: the file.
            origin: what must have filled the pool; None: anything.

        Raises:
            UserError: not a pool file, or one of another size or origin.
        """
        own = self._slots()
        try:
            file_kind(path)  # refuses a header without end
            with interruptible():
                found, text = read_safetensors(path)
            found.setdefault("updated", torch.full_like(found["t"], -1))
            beside = {name: found.pop(name) for name in list(found) if name.startswith(BESIDE)}
            metadata = json.loads(text["pool"])
            step, filled, found_origin = metadata["step"], metadata["filled"], metadata["origin"]
            layouts = [{k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} for tensors in (found, own)]
            outside = found["t"].min() < 0
        except UserError:
            raise
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise unreadable(path, f"not a readable pool file ({error})", error) from error
        if layouts[0] != layouts[1]:
            raise UserError(f"{path}: holds a pool {_shown(found)}, this configuration wants {_shown(own)}")
        if origin is not None and not same_origin(found_origin, origin):
            raise UserError(f"{path}: was filled with other settings ({found_origin})")
        if outside:
            raise UserError(f"{path}: its timesteps do not fit its states")
        for name, tensor in own.items():
            tensor.copy_(found[name])
        self.beside = {name.removeprefix(BESIDE): tensor for name, tensor in beside.items()}
        self.filled = filled
        return step


def same_origin(found: str, origin: str) -> bool:
    """Whether two origins are one; those of older versions begin with the path of the teacher, which may have moved."""
    return found == origin or (origin != "" and found.endswith(f", {origin}"))


def _shown(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(tensors.items()))


def pool_slots(rho: float, num_timesteps: int, batch_size: int) -> int:
    """|B+| = round(rho * T) * B."""
    return round(rho * num_timesteps) * batch_size


def slot_bytes(shape: tuple[int, ...], dtype: torch.dtype, labeled: bool) -> int:
    """Bytes of host memory (or disk) that one slot takes: state, timestep, time of its last update, label."""
    return math.prod(shape) * dtype.itemsize + torch.int32.itemsize * (2 + labeled)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, storage: Path | None, device: torch.device | str) -> Tensor:
    if storage is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    if hasattr(os, "posix_fallocate"):  # reserved now: a later write to a full disk would kill the process
        with storage.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
    return torch.from_file(str(storage), shared=True, size=count, dtype=dtype).view(shape)
