"""Shard a student, its gradients, its optimizer and its average over the devices (FSDP2, `fully_shard`)."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

SHARDED = {"fsdp": False, "fsdp_cpu_offload": True}  # Lightning's name -> whether shards wait in host memory
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """`fsdp` of Lightning's names, on FSDP2: parameters keep their names, and checkpoints are those of `ddp`.

    Lightning's own strategy of this name refuses CPUs, and its flat parameters have no average.

    Args:
        offload: keep the shards in host memory between their uses.
        timeout: for which a process waits for another.
    """

    def __init__(self, offload: bool, timeout: timedelta) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.offload = offload

    def setup_environment(self) -> None:
        """Lay all devices out as one group that shards."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        offloaded = self.offload and self.root_device.type == "cuda"  # norms of shards in host memory are summed there
        return "cpu:gloo,cuda:nccl" if offloaded else super()._get_process_group_backend()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the student before its optimizer is made."""
        assert self.model is not None and self.accelerator is not None  # Lightning has connected both
        self.accelerator.setup(trainer)
        self.shard(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        for buffer in self.model.buffers():
            buffer.data = buffer.to(self.root_device)  # sharding has put the parameters in their places
        self.barrier()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; whatever Lightning asks for, no code in it is run."""
        return super().load_checkpoint(checkpoint_path, weights_only=True)

    def shard(self, module: nn.Module) -> None:
        """Shard the network of a `StudentModule`, in place."""
        assert isinstance(module.network, nn.Module)
        shard(module.network, self.device_mesh["data_parallel"], self.offload)


def shard(network: nn.Module, mesh: DeviceMesh, offload: bool = False) -> None:
    """Shard the parameters of every block, and of the rest together: one block at a time is whole in memory."""
    policy = CPUOffloadPolicy() if offload and mesh.device_type != "cpu" else OffloadPolicy()
    for child in network.children():
        for block in _blocks(child) if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(network, mesh=mesh, offload_policy=policy)


def _blocks(modules: nn.ModuleList) -> Iterator[nn.Module]:
    """The modules with parameters in a list, and in lists in it."""
    for module in modules:
        if isinstance(module, nn.ModuleList):
            yield from _blocks(module)
        elif any(True for _ in module.parameters()):
            yield module


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> dict[str, Any]:
    """The whole state_dict of a sharded module on rank 0, and nothing on others; all processes must call it."""
    return get_model_state_dict(module, options=FULL)


def load_full_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state_dict, which every process has, into a sharded module."""
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
