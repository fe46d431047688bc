"""Rank, device and precision of a process: bf16 autocast where the machine multiplies bf16 faster.

Functions import torch themselves, so that a command can query its rank without it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm_dkdm.errors import UserError, pick

if TYPE_CHECKING:
    import torch

WITHOUT_PINNED = ("cpu", "mps")  # devices whose copies need no pinned memory
PRECISIONS = {
    "auto": "bf16 where the device multiplies it faster, else float32",
    "bf16": "bf16 autocast; weights stay float32",
    "32": "float32",
}
COMPILING = {
    "auto": "on a GPU that Triton knows",
    "true": "on every device",
    "graphs": "as true, and the networks' calls of a whole batch replay CUDA graphs; on an NVIDIA GPU",
    "false": "nowhere",
}


def resolve_precision(choice: str, device: "torch.device | str") -> str:
    """`auto` -> `bf16` on a CPU with bf16 instructions or a GPU that supports it, else `32`.

    Raises:
        UserError: an unknown name.
    """
    import torch

    pick(PRECISIONS, choice, "precision")
    if choice != "auto":
        return choice
    kind = torch.device(device).type
    if kind == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "32"


def autocast(precision: str, device: "torch.device | str") -> "torch.autocast":
    """Autocast context for `bf16`; a disabled one for `32`."""
    import torch

    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def compiles(choice: str, device: "torch.device") -> bool:
    """Whether a choice of COMPILING compiles on a device; on a CPU it gains little."""
    from torch.utils._triton import has_triton

    return choice in ("true", "graphs") or (choice == "auto" and device.type == "cuda" and has_triton())


def require_graphs(choice: str, device: "torch.device") -> None:
    """Refuse CUDA graphs where there are none; on AMD's GPUs torch's may compute something else without an error.

    Raises:
        UserError: the device.
    """
    import torch

    kind = "an AMD GPU" if device.type == "cuda" and torch.version.hip else device.type
    if choice == "graphs" and kind != "cuda":
        raise UserError(f"compile: graphs are those of CUDA, on an NVIDIA GPU, and this run trains on {kind}; use auto")


@contextmanager
def usual_tensors() -> Iterator[None]:
    """Within such a block new tensors are float32 and on the CPU, whatever torch's defaults are in this process."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def to_device(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """A small tensor of the host on a device; from pinned memory the copy is under way when this returns."""
    import torch

    if torch.device(device).type in WITHOUT_PINNED:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class World:
    """The processes that a launcher has started, and which of them this is.

    Attributes:
        by: the launcher's name in LAUNCHERS.
        devices: processes on each machine. nodes: machines.
        rank: of this process among all. local_rank: on its machine. node: the machine's number.
    """

    by: str
    devices: int
    nodes: int
    rank: int
    local_rank: int
    node: int

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.devices * self.nodes


# launcher -> (variable that marks it, then those of: processes, machines, rank, local rank, machine's number)
LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "GROUP_WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    "RANK and WORLD_SIZE": ("RANK", "WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "RANK"),  # one on each machine
}
STEP = {"SLURM_NTASKS": "SLURM_STEP_NUM_TASKS", "SLURM_NNODES": "SLURM_STEP_NUM_NODES"}  # srun's own, where they differ
STEP_MARKS = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")  # a batch script has PROCID and NTASKS as well
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs whose shell starts commands without srun
PORTS = 15000  # below the ports of SLURM jobs without MASTER_PORT
UNSUPPORTED = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def started() -> World | None:
    """The world of torchrun, srun, or the variables RANK and WORLD_SIZE; None where nothing has started several.

    Raises:
        UserError: a launcher that is not supported, or machines with different numbers of processes.
    """
    env = os.environ
    for by, (mark, *names) in LAUNCHERS.items():
        if mark not in env or _is_of_others(by, env):
            continue
        ranks, nodes, rank, local, node = (_number(env, STEP.get(name, name), name) for name in names)
        ranks, nodes = max(ranks, 1), max(nodes, 1)
        if ranks % nodes:
            raise UserError(f"devices: {by} started {ranks} processes on {nodes} machines; start as many on each")
        if ranks > 1 or by == "torchrun":
            return World(by, ranks // nodes, nodes, rank, local, node)
    for name, launcher in UNSUPPORTED.items():
        if _number(env, name) > 1:
            raise UserError(f"devices: {launcher} started {env[name]} processes; start them with torchrun or srun")
    return None


def main_address() -> str:
    """The host of rank 0, by MASTER_ADDR or SLURM's list of hosts."""
    if address := os.environ.get("MASTER_ADDR"):
        return address
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # reads node[01-04,7]

    hosts = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    return SLURMEnvironment.resolve_root_node_address(hosts)


def main_port() -> int:
    """The port of rank 0, by MASTER_PORT or SLURM's number of the job."""
    return _number(os.environ, "MASTER_PORT") or PORTS + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])


def _is_of_others(by: str, env: Mapping[str, str]) -> bool:
    """Whether variables are those of a SLURM shell or batch script without srun, or of Lightning's processes."""
    if by == "srun":
        return env.get("SLURM_JOB_NAME") in INTERACTIVE or not any(name in env for name in STEP_MARKS)
    return by != "torchrun" and "NODE_RANK" in env


def _number(env: Mapping[str, str], *names: str) -> int:
    """The first of these variables that is set; 0 without one."""
    value = next((env[name] for name in names if name in env), "0")
    if not value.isdecimal():
        raise UserError(f"devices: {names[-1]}={value} in the environment is not a whole number")
    return int(value)


def world_of(devices: int | None, num_nodes: int | None) -> tuple[int, int]:
    """Devices on each machine and machines; None: those that are started, else 1."""
    world = started() if devices is None or num_nodes is None else None
    per_node, nodes = (world.devices, world.nodes) if world else (1, 1)
    return devices or per_node, num_nodes or nodes


def local_rank() -> int:
    """The rank of this process among a run's processes on the machine."""
    return _number(os.environ, "LOCAL_RANK", "SLURM_LOCALID")


def global_rank(per_node: int) -> int:
    """The rank of this process among all of a run, with so many on each machine."""
    world = started()
    return world.rank if world else _number(os.environ, "NODE_RANK") * per_node + local_rank()


def is_first_rank() -> bool:
    """Whether this is the first of a run's processes, on all machines; it alone writes and reports."""
    try:
        world = started()
        own = local_rank() or _number(os.environ, "NODE_RANK")  # as Lightning sets them
    except UserError:  # a command with ranks refuses it
        return not any(os.environ.get(name, "0") != "0" for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK"))
    return (world.rank if world else own) == 0


def default_device(accelerator: str) -> "torch.device":
    """The device that Lightning will choose for this process.

    Raises:
        UserError: PyTorch finds no such device here, or fewer than processes.
    """
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", _own_gpu(local_rank(), torch.cuda.device_count()))
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if accelerator not in ("auto", "cpu"):
        raise UserError(f"accelerator: PyTorch finds no {accelerator} device here; set it to auto or cpu")
    return torch.device("cpu")


def _own_gpu(own: int, count: int) -> int:
    """The number of a process's GPU, of as many as it sees; a task of srun with --gpus-per-task=1 sees its own alone.

    Raises:
        UserError: there are fewer.
    """
    if own < count:
        return own
    world = started()
    if count == 1 and world is not None and world.by == "srun":
        return 0
    raise UserError(
        f"accelerator: process {own + 1} of this machine has no GPU, PyTorch finds {count}; start as many processes as "
        "there are GPUs, or set it to cpu"
    )


def resolve_device(name: str) -> "torch.device":
    """The device of a PyTorch name, or of `auto`.

    Raises:
        UserError: PyTorch cannot use it here.
    """
    import torch

    if name == "auto":
        return default_device("auto")
    try:
        one = torch.ones(1, device=name)
        one.item()  # the meta device holds no numbers
        return one.device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
