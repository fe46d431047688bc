"""Where a batch of chains is, on the disk: an interrupted warm-up goes on in the middle of it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm_dkdm.checkpoints.hashes import read_safetensors
from ldm_dkdm.checkpoints.reading import file_kind
from ldm_dkdm.distillation.pool import same_origin
from ldm_dkdm.errors import MALFORMED, UserError, interruptible
from ldm_dkdm.files import write_tensors


@dataclass(frozen=True)
class Walk:
    """Where a batch of chains is, between two steps.

    Attributes:
        first: first slot of the batch.
        t: timestep of the states.
        x: states (B,C,H,W).
        noise: state of the generator of the noise that follows, uint8.
    """

    first: int
    t: int
    x: Tensor
    noise: Tensor

    def save(self, path: Path, origin: str) -> None:
        """Write it to a safetensors file, atomically; `origin` names what walks."""
        facts = {"first": self.first, "t": self.t, "device": self.x.device.type, "origin": origin}
        write_tensors(path, {"x": self.x.cpu(), "noise": self.noise}, {"walk": json.dumps(facts)})


def read_walk(path: Path, origin: str, device: torch.device | str) -> Walk | None:
    """What `Walk.save` wrote; None if it has another origin, or is of another kind of device, whose noise differs.

    Raises:
        UserError: not such a file, or damaged.
    """
    kind = torch.device(device).type
    try:
        file_kind(path)  # refuses a header without end
        with interruptible():
            tensors, text = read_safetensors(path)
        facts = json.loads(text["walk"])
        walk = Walk(int(facts["first"]), int(facts["t"]), tensors["x"], tensors["noise"])
        if not same_origin(facts["origin"], origin) or facts["device"] != kind:
            return None
        torch.Generator(device).set_state(walk.noise)
        if walk.x.ndim != 4:
            raise ValueError(f"states {tuple(walk.x.shape)}")
    except UserError:
        raise
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise UserError(f"{path}: not a readable file of a walk ({error})") from error
    return walk
