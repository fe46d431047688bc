"""Images that are read slowly, batch by batch, and work on them that a test can kill."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_dkdm.evaluation.components import pixel_components
from ldm_dkdm.evaluation.features import open_extractor
from ldm_dkdm.evaluation.gathering import gather
from ldm_dkdm.evaluation.sources import TensorImages
from ldm_dkdm.evaluation.statistics import Statistics

BATCH = 3


def images() -> Tensor:
    """Images uint8 (90,6,6,3)."""
    return torch.randint(0, 256, (90, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class SlowImages(TensorImages):
    """Images that take `pause` seconds a batch; the number of every image that is read is a line of `log`."""

    log: Path = Path("log")
    pause: float = 0.0

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Images from number `first` on."""
        for batch in super().batches(first, batch_size):
            time.sleep(self.pause)
            with self.log.open("a") as file:
                file.write("".join(f"{number}\n" for number in range(first, first + len(batch))))
            first += len(batch)
            yield batch


def gathered(folder: Path, processes: int, pause: float = 0.0, batch_size: int = BATCH) -> dict[str, Statistics]:
    """Statistics of the images, with partial sums saved after every batch."""
    components, _ = pixel_components(TensorImages(images()), folder / "cache", 64)  # the same bits after a kill
    extractors = {"pixels": open_extractor("pixels"), "components": components}
    source = SlowImages(images(), "slow", folder / "log", pause)
    options = {"cache": folder / "cache", "batch_size": batch_size, "save_seconds": 0.0, "processes": processes}
    return gather(source, extractors, {"pixels"}, **options)
