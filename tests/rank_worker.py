"""What each process of tests/test_ranks.py does, and torchrun's agent, which starts it."""

import contextlib
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

from ldm_dkdm import load_config, load_model
from ldm_dkdm.commands.main import main
from ldm_dkdm.config.load import parse
from ldm_dkdm.config.schema import DistillRun
from ldm_dkdm.device import started
from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.distillation.batches import BatchStream
from ldm_dkdm.distillation.make_student import make_student
from ldm_dkdm.evaluation import samples
from ldm_dkdm.files import write_text
from ldm_dkdm.records import DistillBatch, Prediction
from ldm_dkdm.training.from_teacher import distill
from ldm_dkdm.training.parts import assemble
from ldm_dkdm.training.run import Run
from ldm_dkdm.training.run_folder import RunFolder
from ldm_dkdm.training.saving import RunCheckpoint

STEPS, GLOBAL_BATCH = 6, 4
EARLY = [f"trainer.early_stop.{key}" for key in ("window=2", "patience=1", "min_delta=1e9")]
NO_SAMPLES = ["logging.sample_every=1000"]
KILLED_AT = 4  # the last checkpoint before it is that of step 3


def digest(network: torch.nn.Module) -> str:
    """A hash of the weights."""
    parts = [tensor.detach().numpy().tobytes() for tensor in network.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run(
    folder: Path,
    name: str,
    strategy: str = "auto",
    die: bool = False,
    extra: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Distil as base.yaml says; every process writes the hash of its weights after each step."""
    config = load_config(folder / "base.yaml", [f"logging.name={name}", f"trainer.strategy={strategy}", *extra])
    teacher = load_model(config.teacher.ckpt)
    student = make_student(config.student, teacher, config.trainer.seed)
    world, seen = started(), []
    rank = world.rank if world else 0

    def watch(what: str, done: int, total: int) -> None:
        if what == "training":
            seen.append(digest(student.network))
            if die and rank == 1 and done == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    with counted_reductions() as calls:
        distill(teacher, student, folder / name, config=config, resume=resume, progress=watch)
    write_text(folder / f"{name}-{rank}.txt", "\n".join(seen))
    write_text(folder / f"{name}-{rank}.reductions", " ".join(calls))


@contextlib.contextmanager
def counted_reductions() -> Iterator[list[str]]:
    """The reductions on devices that callbacks ask Lightning's strategy for; each waits for the device."""
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for kind, name in ((ParallelStrategy, "reduce_boolean_decision"), (DDPStrategy, "reduce")):
            whole = getattr(kind, name)

            def counted(*given, whole=whole, name=name, **named):
                calls.append(name)
                return whole(*given, **named)

            stack.enter_context(patch.object(kind, name, counted))
        yield calls


class FixedBatches(BatchStream):
    """The same global batches for any number of ranks, each of which takes its slice, in as many parts as are asked."""

    def __init__(self, parts, rank: int, ranks: int) -> None:
        self.teacher, self.parts, self.step = parts.teacher, parts.config.trainer.accumulate, 0
        self.rank, self.ranks, self.max_steps = rank, ranks, STEPS * self.parts

    def next_batch(self) -> DistillBatch:
        step, part = divmod(self.step, self.parts)
        generator = torch.Generator().manual_seed(step)
        x_0, eps = torch.randn(2, GLOBAL_BATCH, *self.teacher.shape, generator=generator)
        t = torch.randint(self.teacher.schedule.num_timesteps, (GLOBAL_BATCH,), generator=generator)
        place, places = self.rank * self.parts + part, self.ranks * self.parts
        own = slice(place * GLOBAL_BATCH // places, (place + 1) * GLOBAL_BATCH // places)
        self.step += 1
        x = q_sample(self.teacher.schedule, x_0, t, eps)
        return DistillBatch(x[own], t[own], Prediction(eps[own], x_0[own]), None)


def train_on_fixed_batches(folder: Path, name: str, strategy: str = "auto", accumulate: int = 1) -> None:
    """Train a student on `FixedBatches` and leave the checkpoint."""
    trainer = [f"trainer.strategy={strategy}", f"trainer.accumulate={accumulate}"]
    tree = vars(load_config(folder / "base.yaml", [f"logging.name={name}", f"logging.save_every={STEPS}", *trainer]))
    config = parse(DistillRun, {key: value for key, value in tree.items() if value is not None})
    teacher = load_model(config.teacher.ckpt)
    parts = assemble(teacher, make_student(config.student, teacher, 0), config)
    work = Run(config, RunFolder(folder / name), progress=False)
    saving = RunCheckpoint(work.folder.checkpoints, config.logging, lambda trainer: None)
    with work.open():
        work.fit(parts.module(), lambda t: FixedBatches(parts, t.global_rank, t.world_size), [saving])


def command(*arguments: object) -> None:
    """Run a command; what it writes shows whether it succeeds."""
    with contextlib.suppress(SystemExit):
        main(arguments=list(map(str, arguments)))


@contextlib.contextmanager
def differing_predictions() -> Iterator[None]:
    """Identities of models that differ between ranks, as predictions of other devices do by rounding."""
    world = started()
    rank = world.rank if world else 0
    own = {"is_as_built": lambda network, node: False, "predictions_of": lambda model: f"of rank {rank}"}
    with patch.multiple(samples, **own):
        yield


def sample(folder: Path, name: str = "samples-ranks") -> None:
    """Draw 23 images in batches of 4."""
    drawing = ("-n", 23, "-c", 2, "--batch_size", 4, "--npz", "--latents", "--device", "cpu")
    command("sample", "-r", folder / "teacher", *drawing, "-l", folder / name)


def evaluate(folder: Path) -> None:
    """Measure 70 images against others."""
    reference = ("evaluate", folder / "teacher", folder / "reference.npz", "--metrics", "pixel-frechet")
    options = ("-n", 70, "-c", 1, "--batch_size", 16, "--device", "cpu", "--cache", folder / "cache")
    command(*reference, *options, "--results", folder / "ranks.csv")


def resume_with_a_damaged_pool(folder: Path) -> None:
    """Go on with a run whose newest pool of rank 1 is damaged: refused at first, then from the checkpoint before."""
    world, home = started(), folder / "flipped"
    assert world is not None
    if world.rank == 0:
        shutil.copytree(folder / "ddp", folder / "copied")
        pool = folder / "copied" / "checkpoints" / f"step={STEPS:08d}.pool-rank1.safetensors"
        content = bytearray(pool.read_bytes())
        content[len(content) // 2] ^= 1
        pool.write_bytes(content)
        (folder / "copied").rename(home)
    while not home.exists():
        time.sleep(0.1)
    for number in range(2):
        with (folder / f"flipped-{number}-{world.rank}.txt").open("w") as file, contextlib.redirect_stderr(file):
            command("distill", "--resume", home, f"trainer.max_steps={STEPS + 1}", *NO_SAMPLES)


def resume_a_warm_up(folder: Path) -> None:
    """Go on with the warm-up of three ranks."""
    command("distill", "--resume", folder / "three" / "run")


def stop_and_go_on(folder: Path) -> None:
    """Shards that stop after half of the steps, and go on."""
    run(folder, "halves", "fsdp", extra=[f"trainer.max_steps={STEPS // 2}"])
    run(folder, "halves", "fsdp", resume=True)


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "sample": differing_predictions()(sample),
    "sample-rest": lambda folder: sample(folder, "samples-rest"),
    "halves": stop_and_go_on,
    "evaluate": differing_predictions()(evaluate),
    "ddp": lambda folder: run(folder, "ddp"),
    "fsdp": lambda folder: run(folder, "fsdp", "fsdp"),
    "best": lambda folder: run(folder, "best", "fsdp", extra=[f"trainer.early_stop.window={STEPS}", *NO_SAMPLES]),
    "early": lambda folder: run(folder, "early", extra=["trainer.max_steps=40", *EARLY, *NO_SAMPLES]),
    "split": lambda folder: train_on_fixed_batches(folder, "split"),
    "shards": lambda folder: train_on_fixed_batches(folder, "shards", "fsdp"),
    "split-parts": lambda folder: train_on_fixed_batches(folder, "split-parts", accumulate=2),
    "shards-parts": lambda folder: train_on_fixed_batches(folder, "shards-parts", "fsdp", 2),
    "flipped": resume_with_a_damaged_pool,
    "three": resume_a_warm_up,
    "killed": lambda folder: run(folder, "killed", die=True, extra=["logging.log_every=2"]),
    "resumed": lambda folder: run(folder, "killed", extra=["logging.log_every=2"]),
}


def work(folder: Path, *scenarios: str) -> None:
    """Go through scenarios."""
    for scenario in scenarios:
        SCENARIOS[scenario](folder)


def agent(arguments: Sequence[str], folder: Path, *scenarios: str) -> None:
    """Do as torchrun with these arguments, but fork the processes from this one, which has imported the package."""
    config, _, _ = torchrun.config_from_args(torchrun.parse_args([*arguments, "worker"]))
    elastic_launch(replace(config, start_method="fork"), work)(folder, *scenarios)
