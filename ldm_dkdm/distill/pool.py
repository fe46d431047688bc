"""The expanded batch set B+ of dynamic iterative distillation (DKDM, Sec. 3.3)."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.files import replacing


class NoisyPool:
    """Slots (x_t, t) in host memory or in a memory-mapped file.

    A slot at timestep t in [0, T-1] holds the x_t that the teacher sees next.

    Args:
        slots: |B+| = round(rho * T) * batch size.
        shape: (C,H,W) of a state.
        dtype: storage type of the states; half precision by default.
        storage: file to map the states to; None keeps them in memory.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float16,
        storage: Path | None = None,
    ) -> None:
        if slots < 1:
            raise UserError(f"distill.rho: a pool of {slots} slots; rho * T must round to at least 1")
        self.x = _allocate((slots, *shape), dtype, storage)
        self.t = torch.zeros(slots, dtype=torch.int32)
        self.filled = 0  # slots 0 ... filled-1 are prepared

    def __len__(self) -> int:
        return len(self.t)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory (or disk) that the slots take."""
        return self.x.nbytes + self.t.nbytes

    def fill(self, x: Tensor, t: Tensor) -> None:
        """Append prepared states x (n,C,H,W) at timesteps t (n,), as many as there is room for."""
        room = slice(self.filled, min(self.filled + len(x), len(self)))
        count = room.stop - room.start
        self.x[room] = x[:count].to("cpu", self.x.dtype)
        self.t[room] = t[:count].to("cpu", self.t.dtype)
        self.filled = room.stop

    def draw(self, batch_size: int, rng: np.random.Generator) -> Tensor:
        """Indices (batch_size,) of distinct slots, uniformly at random."""
        if batch_size > len(self):
            raise UserError(f"distill.batch_size: {batch_size} is larger than the pool of {len(self)} slots")
        return torch.from_numpy(rng.choice(len(self), batch_size, replace=False))

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """States x (B,C,H,W), float32, and timesteps t (B,), int64, of the slots; the pool keeps them."""
        return self.x[indices].float(), self.t[indices].long()

    def put_back(self, indices: Tensor, x: Tensor, t: Tensor) -> None:
        """Overwrite the slots with states x (B,C,H,W) at timesteps t (B,)."""
        self.x[indices] = x.to("cpu", self.x.dtype)
        self.t[indices] = t.to("cpu", self.t.dtype)

    def save(self, path: Path, step: int, origin: str = "") -> None:
        """Write the slots to a safetensors file, whole or not at all; `origin` names what filled them."""
        metadata = json.dumps({"step": step, "filled": self.filled, "origin": origin})
        with replacing(path) as temporary:
            save_file({"x": self.x, "t": self.t}, temporary, metadata={"pool": metadata})

    def load(self, path: Path, origin: str = "") -> int:
        """Read what `save` wrote; returns its step.

        Args:
            path: the file.
            origin: what must have filled it.

        Raises:
            UserError: not a pool file, or one of another size or origin.
        """
        try:
            with safe_open(path, framework="pt") as file:
                x, t = file.get_tensor("x"), file.get_tensor("t")
                metadata = json.loads(file.metadata()["pool"])
                step, filled, found_origin = metadata["step"], metadata["filled"], metadata["origin"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a readable pool file ({error}); delete it to start a new pool") from error
        if x.shape != self.x.shape or x.dtype != self.x.dtype:
            found, wanted = f"{tuple(x.shape)} {x.dtype}", f"{tuple(self.x.shape)} {self.x.dtype}"
            raise UserError(f"{path}: holds a pool {found}, this configuration wants {wanted}")
        if found_origin != origin:
            raise UserError(f"{path}: was filled with other settings ({found_origin}); delete it to start a new pool")
        if t.shape != self.t.shape or t.dtype != self.t.dtype or t.min() < 0:
            raise UserError(f"{path}: its timesteps do not fit its {len(x)} states; delete it to start a new pool")
        self.x.copy_(x)
        self.t.copy_(t)
        self.filled = filled
        return step


def pool_slots(rho: float, num_timesteps: int, batch_size: int) -> int:
    """|B+| = round(rho * T) * B."""
    return round(rho * num_timesteps) * batch_size


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, storage: Path | None) -> Tensor:
    if storage is None:
        return torch.zeros(shape, dtype=dtype)
    count = int(np.prod(shape))
    return torch.from_file(str(storage), shared=True, size=count, dtype=dtype).view(shape)
