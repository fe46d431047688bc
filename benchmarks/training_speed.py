"""Seconds of 100 iterations on data and without data (Tab. 9): python benchmarks/training_speed.py quickstart digits

Both train the recipe's student. Training on data encodes its images in every iteration, as in the paper, or has
encoded them before (`data.cache`); the distillation calls the teacher. The three take turns in one run.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import Pair, finish, guarded, interleaved, open_pair, plot

from ldm_dkdm.config.schema import TrainerConfig
from ldm_dkdm.device import autocast
from ldm_dkdm.distillation.batches import BatchStream
from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.distillation.image_data import CachedStates, EncodedStates, ImageSet, States
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.records import NoisyBatch

IMAGES = 64  # random images to draw from
BATCHES = 1 << 30  # no stream ends here


class Training:
    """A student, its optimizer, its average and a stream of batches."""

    def __init__(self, pair: Pair, stream: BatchStream) -> None:
        trainer = TrainerConfig(max_steps=1, learning_rate=1e-6)
        self.module = StudentModule(pair.new_student(), pair.config.distill.loss, trainer)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.stream, self.pair = stream, pair
        self.module.network.train()
        self.follow()

    def follow(self) -> None:
        """Begin the average anew, at the weights as they are now."""
        self.weights = [weight.detach() for weight in self.module.network.parameters()]
        self.averages = [weight.clone() for weight in self.weights]

    def iteration(self) -> None:
        """One batch, one update, one of the average."""
        batch = self.stream.next_batch()
        with autocast(self.pair.teacher.precision, self.pair.device):
            loss = self.module.training_step(batch, 0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.averages, self.weights, 1 - self.pair.config.trainer.ema_decay)


def trainings(pair: Pair, batch_size: int) -> dict[str, Training]:
    """The three variants of a recipe."""
    found = {"on data, encoding": DataStream(encoded(pair), **on_data(pair, batch_size))}
    if pair.teacher.space.encoded:
        found["on data, encoded before"] = DataStream(cached(pair), **on_data(pair, batch_size))
    return {name: Training(pair, stream) for name, stream in [*found.items(), ("without data", dkdm(pair, batch_size))]}


def on_data(pair: Pair, batch_size: int) -> dict[str, object]:
    """Arguments of both streams of images."""
    return {
        "schedule": pair.teacher.schedule,
        "batch_size": batch_size,
        "max_steps": BATCHES,
        "device": pair.device,
    }


def encoded(pair: Pair) -> States:
    """Random images that are encoded when they are drawn."""
    side, channels = pair.teacher.shape[-1] * pair.codec.downsampling, pair.codec.channels
    images = torch.randint(256, (IMAGES, side, side, channels), dtype=torch.uint8)
    labels = None if pair.teacher.num_classes is None else torch.zeros(IMAGES, dtype=torch.long)
    return EncodedStates([ImageSet(images, side, labels, channels)], pair.codec, True, labels is not None)


def cached(pair: Pair) -> States:
    """Random states."""
    labels = None if pair.teacher.num_classes is None else torch.zeros(IMAGES, dtype=torch.long)
    return CachedStates(torch.randn(IMAGES, *pair.teacher.shape), labels)


def dkdm(pair: Pair, batch_size: int) -> DistillStream:
    """The distillation's stream on a small pool; its size does not change the time of an iteration."""
    teacher = pair.teacher
    slots = max(IMAGES, 4 * batch_size)
    labels = teacher.draw_labels(slots, torch.Generator(pair.device).manual_seed(0))
    pool = NoisyPool(slots, teacher.shape, labeled=labels is not None)
    pool.fill(NoisyBatch(torch.randn(pool.x.shape), torch.randint(teacher.schedule.num_timesteps, (slots,)), labels))
    config = replace(pair.config.distill, batch_size=batch_size)
    return DistillStream(teacher, pool, config, BATCHES, device=pair.device)


def main() -> None:
    """Time every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["quickstart", "digits"], help="RECIPE or RECIPE+STUDENT")
    parser.add_argument("--batch_size", type=int, help="default: the recipe's")
    parser.add_argument("--rounds", type=int, default=10, help="iterations of each variant")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "32"])
    parser.add_argument("-o", "--out", type=Path, help="JSON file; a plot is written beside it")
    options = parser.parse_args()
    rows = []
    pairs = {recipe: open_pair(recipe, precision=options.precision) for recipe in options.recipes}
    for recipe, pair in pairs.items():
        size = options.batch_size or pair.config.distill.batch_size
        found = {name: training.iteration for name, training in trainings(pair, size).items()}
        seconds = interleaved(found, options.rounds, pair.device)
        row = {"recipe": recipe, "batch": size, "precision": pair.teacher.precision}
        row |= {name: 100 * seconds[name] if name in seconds else "" for name in COLUMNS}
        rows.append({**row, "without / on data": seconds["without data"] / seconds["on data, encoding"]})
    finish(options.out, pair.device, rows, what="seconds per 100 iterations (Tab. 9)", rounds=options.rounds)
    if options.out:
        draw(rows, options.out.with_suffix(".png"))


COLUMNS = ("on data, encoding", "on data, encoded before", "without data")


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Bars of the three variants for every recipe, relative to training on data."""

    def bars(axes: object) -> None:
        for place, name in enumerate(COLUMNS):
            heights = [(row[name] or 0) / row[COLUMNS[0]] for row in rows]
            axes.bar([i + 0.25 * (place - 1) for i in range(len(rows))], heights, 0.24, label=name)
        axes.set_xticks(range(len(rows)), [row["recipe"] for row in rows])

    plot(path, bars, "", "time of an iteration / on data", "Training speed (Tab. 9)")


if __name__ == "__main__":
    guarded(main, "lower --batch_size")
