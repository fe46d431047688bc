"""What several devices add to a plan: memory of shards, and traffic between them."""

import torch

from ldm_dkdm.config.schema import TrainerConfig
from ldm_dkdm.reporting import pace, size
from ldm_dkdm.training.room import CHECKPOINT, MODEL
from ldm_dkdm.training.sharding import SHARDED

GIGABITS = (10, 100, 400)  # usual networks between machines


def on_each(trainer: TrainerConfig) -> str:
    """Of how many devices a line of a plan holds, where there are several."""
    if trainer.ranks == 1:
        return ""
    machines = f" on {trainer.nodes} machines" if trainer.nodes > 1 else ""
    return f" on each of {trainer.ranks} devices{machines}"


def training_bytes(parameters: int, trainer: TrainerConfig, device: torch.device) -> float:
    """Float32 on each device: weights, gradients, two Adam moments and the EMA; a part of them where they are sharded.

    Shards that wait in host memory are not on the device, which has one block of the network at a time.
    """
    return 0.0 if _offloaded(trainer, device) else _shard(parameters, trainer)


def sharded_memory(parameters: int, trainer: TrainerConfig, device: torch.device) -> list[str]:
    """Host memory of a machine for what is sharded, for a plan; nothing where nothing is.

    Every process makes the whole model before it shards a copy, and keeps it for the weights at the end. Rank 0 keeps
    the whole average and collects a checkpoint in its memory.
    """
    if trainer.strategy not in SHARDED:
        return []
    here, whole = trainer.per_node, MODEL * parameters
    shards = [f"{size(here * _shard(parameters, trainer))} for the shards, on each machine"]
    return [
        *(shards if _offloaded(trainer, device) else []),
        f"{size(here * whole)} for the whole model of every process, on each machine",
        f"{size(whole)} for the whole average and {size(CHECKPOINT * parameters)} for a checkpoint while it is saved, "
        "on the first machine",
    ]


def _shard(parameters: int, trainer: TrainerConfig) -> float:
    """Bytes of one process: weights, gradients, two Adam moments and the EMA, shared where they are sharded."""
    return 4 * 5 * parameters / (trainer.ranks if trainer.strategy in SHARDED else 1)


def _offloaded(trainer: TrainerConfig, device: torch.device) -> bool:
    """Whether shards wait in host memory; a CPU has no other."""
    return SHARDED.get(trainer.strategy, False) and device.type != "cpu"


def traffic(parameters: int, trainer: TrainerConfig) -> dict[str, str]:
    """What a device sends in a step, where there are several.

    A ring's all-reduce of float32 gradients sends 2 (R-1)/R of them (Patarasu and Yuan 2009); shards send (R-1)/R of
    the weights twice in every batch, forward and backward, and as much of the gradients.
    """
    ranks, batches = trainer.ranks, trainer.accumulate
    if ranks == 1:
        return {}
    times = 3 * batches if trainer.strategy in SHARDED else 2
    sent = 4 * parameters * times * (ranks - 1) / ranks
    shown = ", ".join(f"{pace(8 * sent / (bits * 1e9))} at {bits} Gbit/s" for bits in GIGABITS)
    return {"traffic": f"{size(sent)} a step from each device: {shown}, partly beside the computation"}


def without_traffic(trainer: TrainerConfig) -> str:
    """The end of a plan's line about time, which is measured on one device."""
    return "; the traffic between the devices is not in it" if trainer.ranks > 1 else ""
