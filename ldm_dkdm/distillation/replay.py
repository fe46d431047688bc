"""Show every prediction of the teacher in several batches: fewer teacher calls for as many student steps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.device import to_device
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.errors import UserError
from ldm_dkdm.records import DistillBatch, Prediction
from ldm_dkdm.rng import numpy_generator

CALLED = "called"  # name of the step of the last teacher call among the tensors of a pool's file
FIELDS = ("x", "t", "label", "eps", "x_0", "var_fraction")


class ReplayStream(DistillStream):
    """Hands over every prediction in `config.replay` = n batches, with one teacher call for n batches.

    The predictions of the last n calls are kept. After each call all of them are shuffled and dealt, so that k kept
    batches make k batches for the student, each with fresh and older predictions. A prediction is in one batch after
    each of n calls, then it goes. The first calls find less kept: after call k < n only k batches are dealt.

    Predictions are kept as the teacher gives them, float32, on the student's device: they are a few batches beside a
    pool of hundreds, and rounding would add an error to every target. A state that is shown again keeps its input
    perturbation. The pool's file has the kept predictions, so that a resume goes on exactly; pools that are dealt
    again to other ranks begin without.
    """

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        self.kept: dict[str, Tensor] = {}
        self.hand: list[Tensor] = []  # indices (B,) of the batches that are still to come before the next call
        if self.pool.beside:
            self._restore(self.pool.beside)

    def next_batch(self) -> DistillBatch:
        """Deal the next batch; without one, let the teacher predict first."""
        if self.hand:
            self.step += 1
        else:
            self._call()
        rows = self.hand.pop(0)
        return _batch({name: tensor[rows] for name, tensor in self.kept.items()})

    def _call(self) -> None:
        called, room = self.step, (self.config.replay - 1) * self.config.batch_size
        fresh = _tensors(super().next_batch())
        older = self.kept or {name: tensor[:0] for name, tensor in fresh.items()}
        self.kept = {name: torch.cat([older[name][-room:], tensor]) for name, tensor in fresh.items()}
        self.hand = self._dealt(called)
        self.pool.beside = {**self.kept, CALLED: torch.tensor(called, device="cpu")}

    def _dealt(self, called: int) -> list[Tensor]:
        """The batches after the teacher call of a step: each kept prediction once, in random order."""
        order = numpy_generator(self.seed, self.rank, called, "replay").permutation(len(self.kept["t"]))
        return list(to_device(torch.from_numpy(order), self.device).split(self.config.batch_size))

    def _after(self, step: int) -> int:
        """The step of the call after that of `step`, which is not kept yet."""
        return step + min(self._batches + 1, self.config.replay)

    @property
    def _batches(self) -> int:
        return len(self.kept["t"]) // self.config.batch_size if self.kept else 0

    def _restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on in the middle of what was dealt."""
        kept = {name: tensor.to(self.device) for name, tensor in saved.items() if name != CALLED}
        called = int(saved[CALLED]) if saved.get(CALLED, torch.zeros(0, device="cpu")).numel() == 1 else -1
        self._require_fit(kept, called)
        self.kept = kept
        self.hand = self._dealt(called)[self.step - called :]
        self.plans = self._plans(called + self._batches)

    def _require_fit(self, kept: Mapping[str, Tensor], called: int) -> None:
        count = len(kept.get("x", ())) // self.config.batch_size
        rows, shape = count * self.config.batch_size, self.pool.x.shape[1:]
        states = ["x", "eps", "x_0"] + ["var_fraction"] * ("var_fraction" in kept)
        numbers = ["t"] + ["label"] * (self.pool.label is not None)
        wanted = dict.fromkeys(states, ((rows, *shape), torch.float32))
        wanted |= dict.fromkeys(numbers, ((rows,), torch.int64))
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()}
        dealt = 1 <= count <= self.config.replay and 0 <= called < self.step <= called + count
        if found != wanted or not dealt:
            raise UserError("replay: the predictions in the pool's file do not fit this run; start a new one")


def _tensors(batch: DistillBatch) -> dict[str, Tensor]:
    values = (batch.x, batch.t, batch.label, batch.target.eps, batch.target.x_0, batch.target.var_fraction)
    return {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}


def _batch(tensors: Mapping[str, Tensor]) -> DistillBatch:
    target = Prediction(tensors["eps"], tensors["x_0"], tensors.get("var_fraction"))
    return DistillBatch(tensors["x"], tensors["t"], target, tensors.get("label"))


def stream_kind(config: DistillConfig) -> type[DistillStream]:
    """The stream of a configuration."""
    return ReplayStream if config.replay > 1 else DistillStream


def calls_for(batches: int, replay: int) -> int:
    """Number of teacher calls whose predictions are handed over, for the first batches of a run.

    Calls 1 ... n make 1 ... n batches, all others n.
    """
    if batches > replay * (replay + 1) // 2:
        return replay + math.ceil((batches - replay * (replay + 1) // 2) / replay)
    return math.ceil((math.sqrt(8 * batches + 1) - 1) / 2)


def kept_bytes(config: DistillConfig, shape: tuple[int, ...], learned: bool) -> int:
    """Bytes of the kept predictions: x, eps, x_0 and, if it is `learned`, the variance, float32; t and label."""
    if config.replay == 1:
        return 0
    return config.replay * config.batch_size * (4 * (3 + learned) * math.prod(shape) + 16)
