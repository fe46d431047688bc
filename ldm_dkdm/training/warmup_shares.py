"""The warm-ups of a run before its first checkpoint: which there are, and how many ranks began them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm_dkdm.checkpoints.pools import pool_header
from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distillation.redeal import slots_in
from ldm_dkdm.distillation.warmup import WARMUPS, chains_of, warmup_calls, warmup_of
from ldm_dkdm.errors import UserError
from ldm_dkdm.training.saving import warmup_path

MOST = 10_000_000  # slots whose chains a plan draws, in a second; they have no room in the memory of most machines
_NAME = re.compile(r"warmup\.pool-rank(\d+)\.safetensors")


@dataclass(frozen=True)
class PoolWarmup:
    """The warm-up of one pool.

    Attributes:
        number: of the rank that began it; it decides, with the seed, every random choice.
        ranks: those that shared the samples or chains of the whole warm-up.
        slots: of the pool.
        filled: slots that are filled on the disk.
    """

    number: int
    ranks: int
    slots: int
    filled: int = 0

    def calls_left(self, config: DistillConfig, schedule: NoiseSchedule, seed: int) -> int:
        """Teacher evaluations (of one sample) for the slots that are not filled.

        They are those of the warm-up's own chains, which walk on until all of their batch have ended; of a pool above
        MOST slots the expected number without that.
        """
        own = warmup_of(config, self.ranks)
        if WARMUPS[own.mode].chains is None or self.slots > MOST:
            return warmup_calls(own, self.slots, schedule) * (self.slots - self.filled) // self.slots
        chains = chains_of(own, self.slots, schedule.num_timesteps, seed, self.number)
        return chains.calls(own.batch_size, self.slots) - chains.calls(own.batch_size, self.filled)


def warmups_of(folder: Path, slots: int, ranks: int) -> Sequence[PoolWarmup]:
    """The warm-ups that the ranks of a run make together, in the order of their numbers.

    Those on the disk go on. New ones, with the lowest free numbers, are added until all pools have `ranks * slots`
    slots. Whatever of the new ones another process has begun already, the answer is the same.

    Args:
        folder: checkpoints/ of the run.
        slots: of one rank's pool, by the configuration.
        ranks: their number now.

    Raises:
        UserError: a file on the disk is damaged.
    """
    names = (_NAME.fullmatch(file.name) for file in folder.glob("warmup.pool-rank*"))
    numbers = sorted(int(name[1]) for name in names if name)
    known = {number: _begun(warmup_path(folder, number), number, len(numbers)) for number in numbers}
    missing, number = ranks * slots - sum(one.slots for one in known.values()), 0
    while missing > 0:
        if number not in known:
            known[number] = PoolWarmup(number, ranks, slots)
            missing -= slots
        number += 1
    return [known[number] for number in sorted(known)]


def are_dealt(warmups: Sequence[PoolWarmup], ranks: int) -> bool:
    """Whether the pools are dealt to the ranks; else each rank keeps the pool with its number."""
    return [one.number for one in warmups] != list(range(ranks))


def _begun(file: Path, number: int, files: int) -> PoolWarmup:
    try:
        header, slots = pool_header(file), slots_in(file)
        ranks, filled = header.get("ranks", files), header.get("filled")
        if type(ranks) is not int or type(filled) is not int or ranks < 1 or not 0 <= filled <= slots or not slots:
            numbers = f"{slots} slots, {filled} filled, {ranks} ranks"
            raise UserError(
                f"{file}: not a readable pool file ({numbers}: filled must be 0 to slots, others 1 or more)"
            )
    except UserError as error:
        raise UserError(f"{error}; delete it to start the warm-up again") from error
    return PoolWarmup(number, ranks, slots, filled)
