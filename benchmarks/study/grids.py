"""Samples of a teacher and its students from the same noise: python benchmarks/study/grids.py (Fig. 11 to 15)

Writes docs/evidence/grid-PAIR.png for each of the plan's grids whose runs are there.
"""

from collections.abc import Sequence

from page import PLOTS
from plan import Arm, arms_of, read_plan
from torch import Tensor

import ldm_dkdm as dkdm
from ldm_dkdm.images import grid, save_image, side_by_side

COUNT = 36
STEPS = 50
VISIBLE = 32  # pixels of an image's side
SEED = 20_000  # other noise than that of the figures


def main() -> None:
    """Draw what can be drawn."""
    plan = read_plan()
    arms = arms_of(plan)
    for pair, names in plan["grids"].items():
        own = [arms[name] for name in names]
        if all((arm.run(0) / "study.json").is_file() for arm in own):
            draw(pair, own)


def draw(pair: str, arms: Sequence[Arm]) -> None:
    """One picture: the teacher, then a student of each arm with seed 0."""
    models = {"teacher": dkdm.load_model(arms[0].teacher)}
    models |= {arm.name: dkdm.load_model(arm.run(0)) for arm in arms}
    panels = [(name, grid(magnified(model.sample(COUNT, steps=STEPS, seed=SEED)))) for name, model in models.items()]
    path = PLOTS / f"grid-{pair}.png"
    save_image(side_by_side(panels), path)
    print(path)


def magnified(images: Tensor) -> Tensor:
    """Images uint8 (N,H,W,C) with each pixel as a square, until they are as large as can be seen."""
    factor = max(1, VISIBLE // images.shape[1])
    return images.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


if __name__ == "__main__":
    main()
