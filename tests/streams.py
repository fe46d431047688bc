"""Streams of a small teacher, for tests of where their slots are kept."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.replay import stream_kind
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.networks import UNet
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.rng import forked_rng

STEPS, SLOTS, BATCH = 8, 12, 5  # small, so that a slot is often drawn twice in a row


def new_teacher(num_classes: int | None = None) -> DiffusionModel:
    """A UNet with random weights on 8x8 states."""
    with forked_rng(0):
        network = UNet(8, 3, 32, 3, 1, [1], channel_mult=[1], num_head_channels=32, num_classes=num_classes)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.05)
    return DiffusionModel(network, schedule=NoiseSchedule("linear", STEPS), space="pixel").frozen()


def new_pool(device: torch.device | str = "cpu", labeled: bool = False) -> NoisyPool:
    """A full pool of float16 states."""
    pool = NoisyPool(SLOTS, (3, 8, 8), labeled=labeled, device=device)
    numbers = torch.Generator().manual_seed(1)
    label = torch.randint(4, (SLOTS,), generator=numbers) if labeled else None
    pool.fill(NoisyBatch(torch.randn(SLOTS, 3, 8, 8, generator=numbers), torch.arange(SLOTS) % STEPS, label))
    return pool


def batches(
    teacher: DiffusionModel,
    pool: NoisyPool,
    device: torch.device | str,
    after_first: Callable[[], None] = lambda: None,
    **keys: object,
) -> list[Tensor]:
    """x, t and eps of twenty batches, and what the pool then holds; the first of them may fill caches."""
    config = DistillConfig(BATCH, rho=0.3, **keys)  # type: ignore[arg-type]
    stream = stream_kind(config)(teacher, pool, config, 20, 3, 0, device)
    found: list[Tensor] = []
    for step in range(20):
        batch = stream.next_batch()
        found += [batch.x, batch.t, batch.target.eps] + ([] if batch.label is None else [batch.label])
        if step == 0:
            after_first()
    pool.settle()
    return [*found, pool.x, pool.t, pool.updated] + ([] if pool.label is None else [pool.label])
