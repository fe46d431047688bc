"""Print the colour of samples of grey images: python benchmarks/study/colour.py MODEL ... [--sampler S] [-c N] [-n N]

The digits are grey, and what their teacher and its students draw is nearly so. A model's figure is the root mean square
of what is left of the channels, of 0 to 255, without their mean.
"""

import argparse

import torch
from torch import Tensor

import ldm_dkdm as dkdm


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("-c", "--steps", type=int, default=20)
    parser.add_argument("-n", "--count", type=int, default=200)
    options = parser.parse_args()
    for path in options.models:
        model = dkdm.load_model(path)
        labels = [i % (model.num_classes or 1) for i in range(options.count)] if model.num_classes else []
        images = model.sample(
            options.count, sampler=options.sampler, steps=options.steps, labels=labels, seed=5, progress=True
        )
        print(f"{path}: {colour(images):.2f} ({options.sampler}, {options.steps} steps)")


def colour(images: Tensor) -> float:
    """The root mean square of what uint8 images (N,H,W,3) have beside their grey."""
    values = images.double()
    return (values - values.mean(-1, keepdim=True)).square().mean().sqrt().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
