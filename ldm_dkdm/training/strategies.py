"""How the processes of a run find each other and work together: Lightning's cluster environments and strategies."""

import os
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry

from ldm_dkdm.config.schema import TrainerConfig
from ldm_dkdm.device import World, default_device, main_address, main_port, started
from ldm_dkdm.errors import UserError, pick
from ldm_dkdm.training.sharding import SHARDED, ShardedStrategy

AUTO = "auto"
REFUSED = {
    "spawn": "copies this process, whose run folder is locked; use ddp",
    "fork": "copies this process, whose run folder is locked; use ddp",
    "notebook": "copies this process, whose run folder is locked; use ddp in a script",
    "deepspeed": "writes checkpoints that it alone can read; fsdp shards a student too",
    "xla": "is for TPUs, which are not supported; use ddp or fsdp",
    "tpu": "is for TPUs, which are not supported; use ddp or fsdp",
}  # part of a name -> why it cannot be used


class StartedEnvironment(ClusterEnvironment):
    """The world of torchrun, srun, or RANK and WORLD_SIZE, as it was started.

    Lightning's own classes ask SLURM for one spelling of the number of tasks, and find Kubeflow's jobs not at all.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        """Whether a launcher has started the processes: always."""
        return True

    @property
    def main_address(self) -> str:
        """The host of rank 0."""
        return main_address()

    @property
    def main_port(self) -> int:
        """The port of rank 0."""
        return main_port()

    @staticmethod
    def detect() -> bool:
        """Whether a launcher has started this process."""
        return started() is not None

    def world_size(self) -> int:
        """The number of processes."""
        return self.world.ranks

    def set_world_size(self, size: int) -> None:
        """Nothing: the world has its size."""

    def global_rank(self) -> int:
        """This process's rank among all."""
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the process has its rank."""

    def local_rank(self) -> int:
        """This process's rank on its machine."""
        return self.world.local_rank

    def node_rank(self) -> int:
        """The number of this machine."""
        return self.world.node


def environment() -> ClusterEnvironment:
    """How this process finds the others; without a launcher Lightning starts them."""
    world = started()
    return LightningEnvironment() if world is None else StartedEnvironment(world)


def require_world(config: TrainerConfig) -> None:
    """Refuse devices and machines that are not those that are started.

    Raises:
        UserError: the keys and what was started.
    """
    world = started()
    if world is None:
        if config.nodes > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise UserError(
                f"num_nodes: {config.nodes} machines, and nothing tells this process which it is on; start it with "
                "torchrun or srun, or set NODE_RANK, MASTER_ADDR and MASTER_PORT on each"
            )
        return
    if (config.per_node, config.nodes) != (world.devices, world.nodes):
        key, other = ("devices", "num_nodes") if config.per_node != world.devices else ("num_nodes", "devices")
        asked = {"devices": config.per_node, "num_nodes": config.nodes}
        raise UserError(
            f"{key}: {asked[key]} (and {other}: {asked[other]}), but {world.by} started {world.devices} process"
            f"{'es' * (world.devices > 1)} on each of {world.nodes} machine{'s' * (world.nodes > 1)}; null takes these"
        )


def require_strategy(name: str, ranks: int, compile: str = AUTO) -> None:
    """Refuse a strategy that Lightning does not name, or that a run cannot use or compile.

    Raises:
        UserError: why.
    """
    pick({AUTO: None, **dict.fromkeys(StrategyRegistry.available_strategies())}, name, "strategy")
    for part, why in REFUSED.items():
        if part in name:
            raise UserError(f"strategy: {name} {why}")
    if name == "single_device" and ranks > 1:
        raise UserError(f"strategy: single_device is for one process, and there are {ranks}; use ddp")
    if name in SHARDED and compile in ("true", "graphs"):
        raise UserError(f"compile: {compile} cannot be kept with strategy: {name}, which shards the student; use auto")


def strategy_of(config: TrainerConfig) -> Strategy | str:
    """The strategy of a checked config, with its time limit."""
    timeout = timedelta(minutes=config.timeout)
    if config.strategy in SHARDED:
        return ShardedStrategy(SHARDED[config.strategy], timeout)
    if config.strategy == "single_device" or (config.strategy == AUTO and config.ranks == 1):
        return AUTO
    given: dict[str, Any] = StrategyRegistry["ddp" if config.strategy == AUTO else config.strategy]["init_params"]
    return DDPStrategy(timeout=timeout, **given)


def training_device(config: TrainerConfig) -> torch.device:
    """The device of this process in a training.

    Raises:
        UserError: no such device here, or fewer than `devices`.
    """
    device = default_device(config.accelerator)
    count = {"cuda": torch.cuda.device_count(), "cpu": os.cpu_count() or 1}.get(device.type, 1)
    if config.per_node > count and not (device.type == "cpu" and started()):  # processes may share cores
        bound = "; with srun, --gpus-per-task hides the others" if started() else ""
        raise UserError(f"devices: {config.per_node}, but this machine has {count} ({device.type}){bound}")
    return device
