"""Seconds and peak memory of gathering statistics: python benchmarks/evaluation_memory.py --count 10000

Writes random images to an .npz and streams them through an extractor, first a tenth of them, then all. With
`--features pixel-frechet` it is the one of that metric. Prints seconds and peak memory of each; memory must not grow
with the number of images. docs/evaluation.md has the figures.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ldm_dkdm.evaluation.components import pixel_components
from ldm_dkdm.evaluation.features import open_extractor
from ldm_dkdm.evaluation.gathering import gather
from ldm_dkdm.evaluation.processes import Part
from ldm_dkdm.evaluation.sources import ImageSource, NpzImages
from ldm_dkdm.npz import npz_writer

PIXELS = "pixel-frechet"


def write(path: Path, count: int, size: int) -> None:
    """Random images (count,size,size,3), in parts."""
    generator = np.random.default_rng(0)
    with npz_writer(path, count) as writer:
        for start in range(0, count, 100):
            shape = (min(100, count - start), size, size, 3)
            writer.add(torch.from_numpy(generator.integers(0, 256, shape, np.uint8)))


def peak() -> float:
    """Most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Measure some of the images, then all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, help="images of the first measurement; default: a tenth")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--keep", action="store_true", help="keep the features, as KID and precision-recall need")
    options = parser.parse_args()
    extractor = None if options.features == PIXELS else open_extractor(options.features)
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "images.npz", Path(folder) / "cache"
        write(path, options.count, options.size)
        for count in (options.first or options.count // 10, options.count):
            started, worked = time.perf_counter(), time.process_time()
            images: ImageSource = Part(NpzImages(path, "images"), 0, count)
            used = extractor
            if used is None:
                used, images = pixel_components(images, cache, 64)
            gather(images, {used.name: used}, {used.name} if options.keep else set(), cache=cache)
            seconds, cpu = time.perf_counter() - started, time.process_time() - worked
            print(f"{count} images: {seconds:.0f} s, {cpu:.0f} s of CPU time, peak {peak():.0f} MB", flush=True)


if __name__ == "__main__":
    main()
