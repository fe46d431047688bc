"""Run `dkdm` with a lever that the product does not have: python benchmarks/study/tried.py LEVER distill --base ...

The levers are here so that the study can show what they do to plain DKDM. They hold for one process, and a run that is
interrupted goes on without what a lever has learned.
"""

import collections
import sys
import weakref
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

import ldm_dkdm.distillation.module as student_module
import ldm_dkdm.training.from_teacher as training
from ldm_dkdm.commands.main import main as run_command
from ldm_dkdm.diffusion.process import q_sample, x0_to_eps
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import DistillStream, Plan
from ldm_dkdm.networks.unet import UNet
from ldm_dkdm.records import DistillBatch, Prediction
from ldm_dkdm.rng import forked_rng, numpy_generator

COOLDOWN = 0.3  # share of a run, at its end, in which the learning rate falls
RESTARTED = 0.5  # of the slots that are drawn in the lowest tenth of t
BINS = 20  # of t, for the losses that guide draws
FEATURE_WEIGHT = 0.1
Features = dict[tuple[str, int], Tensor]
RECORDED: weakref.WeakKeyDictionary[UNet, list[Tensor]] = weakref.WeakKeyDictionary()  # outputs of blocks


def main() -> None:
    """Install the lever and run the command."""
    LEVERS[sys.argv[1]]()
    run_command(arguments=sys.argv[2:])


class Restarts(DistillStream):
    """Half of the slots that end below T/10 begin again at a uniform t, from the teacher's x_0 with new noise."""

    def _advance(self, plan: Plan, generator: torch.Generator) -> DistillBatch:
        batch = super()._advance(plan, generator)
        rng, steps = numpy_generator(self.seed, self.rank, self.step, "refill"), self.teacher.schedule.num_timesteps
        chosen = (batch.t.cpu() < steps // 10) & torch.from_numpy(rng.random(len(batch.t)) < RESTARTED)
        if chosen.any():
            x_0 = batch.target.x_0[chosen]
            t = torch.from_numpy(rng.integers(steps, size=len(x_0)))
            x = q_sample(self.teacher.schedule, x_0, t.to(x_0.device), self._randn(x_0, generator))
            label = None if batch.label is None else batch.label[chosen]
            self.pool.move(plan.indices[chosen], t, self.step + 1)
            self.slots.put_back(plan.indices[chosen], x, label)
        return batch


class Consistent(DistillStream):
    """The target's eps is the one that its clipped x_0 means, as in sampling that clips."""

    def _advance(self, plan: Plan, generator: torch.Generator) -> DistillBatch:
        batch = super()._advance(plan, generator)
        eps = x0_to_eps(self.teacher.schedule, batch.x, batch.t, batch.target.x_0)
        target = Prediction(eps, batch.target.x_0, batch.target.var_fraction)
        return DistillBatch(batch.x, batch.t, target, batch.label)


class LossAware:
    """Draws slots in proportion to the root mean square of the last losses in their bin of t (Improved DDPM, Sec. 3.3).

    Each loss is divided by its slot's share of the draw, so its expectation is that of uniform draws.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.squares = steps, torch.ones(BINS)
        self.weights: collections.deque[Tensor] = collections.deque()  # of the batches that are drawn and not yet used

    def bins(self, t: Tensor) -> Tensor:
        """Bins (B,) of timesteps."""
        return t.long() * BINS // self.steps

    def draw(self, pool: NoisyPool, batch_size: int, rng: np.random.Generator) -> Tensor:
        """Indices (B,) of distinct slots."""
        share = self.squares.sqrt()[self.bins(pool.t)].double()
        share /= share.sum()
        indices = torch.from_numpy(rng.choice(len(pool), batch_size, replace=False, p=share.numpy()))
        self.weights.append((1 / (len(pool) * share[indices])).float())
        return indices

    def weigh(self, t: Tensor, loss: Tensor) -> Tensor:
        """Losses (B,) with the weights of their draw; they are remembered."""
        bins, squares = self.bins(t.cpu()), loss.detach().square().cpu()
        for place in bins.unique():
            self.squares[place] = 0.9 * self.squares[place] + 0.1 * squares[bins == place].mean()
        return loss * self.weights.popleft().to(loss)


def install_stream(kind: type[DistillStream]) -> None:
    """Let trainings use a stream of another kind."""
    vars(training)["stream_kind"] = lambda config: kind


def install_loss_aware() -> None:
    """Let trainings draw as `LossAware`."""
    space_loss = vars(student_module)["space_loss"]
    guides: list[LossAware] = []

    class Guided(DistillStream):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            guides.append(LossAware(self.teacher.schedule.num_timesteps))
            self.draw = guides[-1].draw

    def weighted(schedule: object, t: Tensor, *rest: object) -> Tensor:
        return guides[-1].weigh(t, space_loss(schedule, t, *rest))

    vars(student_module)["space_loss"] = weighted
    install_stream(Guided)


def install_features() -> None:
    """Add to the loss the distance of the student's features, through 1x1 convolutions, to the teacher's.

    Of each resolution the last features of the encoder and of the decoder correspond, and the middle ones
    (FitNets, Romero et al. 2015).
    """
    record_features()
    kept: dict[int, Features] = {}
    projectors, step = nn.ModuleDict(), StudentModule.training_step
    optimizers: list[torch.optim.Optimizer] = []

    class Watched(DistillStream):
        def _advance(self, plan: Plan, generator: torch.Generator) -> DistillBatch:
            batch = super()._advance(plan, generator)
            kept[id(batch.x)] = features_of(self.teacher.network)
            return batch

    def training_step(self: StudentModule, batch: DistillBatch, batch_idx: int) -> Tensor:
        if optimizers:
            optimizers[0].step()
            optimizers[0].zero_grad()
        loss, wanted = step(self, batch, batch_idx), kept.pop(id(batch.x))
        own = features_of(self.network)
        pairs = {key: (own[key].float(), wanted[key].float()) for key in own.keys() & wanted.keys()}
        if not optimizers:
            with forked_rng(0):  # the training's own draws stay
                for key, (found, target) in pairs.items():
                    projectors[str(key)] = nn.Conv2d(found.shape[1], target.shape[1], 1).to(found.device)
            optimizers.append(torch.optim.AdamW(projectors.parameters(), 1e-3, weight_decay=0.0))
        distances = [(projectors[str(key)](a) - b).square().mean() / b.var() for key, (a, b) in pairs.items()]
        return loss + FEATURE_WEIGHT * torch.stack(distances).mean()

    StudentModule.training_step = training_step  # type: ignore[method-assign]
    install_stream(Watched)


def record_features() -> None:
    """Let every UNet keep the outputs of its blocks from one call to the next."""
    forward, run = UNet.forward, UNet._run

    def recording(self: UNet, *args: Tensor) -> Tensor:
        RECORDED[self] = []
        return forward(self, *args)

    def run_block(self: UNet, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        out = run(self, block, h, emb)
        RECORDED[self].append(out)
        return out

    UNet.forward, UNet._run = recording, run_block  # type: ignore[method-assign, assignment]


def features_of(network: nn.Module) -> Features:
    """The last features of each part and resolution, from the last call of a UNet."""
    assert isinstance(network, UNet)
    encoder = len(network.input_blocks)
    found: Features = {}
    for place, features in enumerate(RECORDED[network]):
        if place == encoder and not len(network.middle_block):
            continue  # the encoder's once more
        part = "input" if place < encoder else "middle" if place == encoder else "output"
        found[part, features.shape[-1]] = features
    return found


def install_cooldown() -> None:
    """The constant learning rate falls to 0, linearly, at the end of the run."""
    constant = StudentModule._lr_factor

    def factor(self: StudentModule, step: int) -> float:
        return constant(self, step) * min(1.0, (1 - min(1.0, step / self.config.max_steps)) / COOLDOWN)

    StudentModule._lr_factor = factor  # type: ignore[method-assign]


LEVERS: Mapping[str, Callable[[], None]] = {
    "cooldown": install_cooldown,
    "restart": lambda: install_stream(Restarts),
    "consistent": lambda: install_stream(Consistent),
    "loss-aware": install_loss_aware,
    "features": install_features,
}


if __name__ == "__main__":
    main()
