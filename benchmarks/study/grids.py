"""Samples of a teacher and its students from the same noise: python benchmarks/study/grids.py (Fig. 11 to 15)

Writes docs/evidence/grid-PAIR.png for each of the plan's grids whose runs are there.
"""

from collections.abc import Sequence

from page import PLOTS
from plan import Arm, arms_of, read_plan

import ldm_dkdm as dkdm
from ldm_dkdm.images import grid, save_image, side_by_side

COUNT = 36
STEPS = 50
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
    panels = [
        (name, grid(model.sample(COUNT, steps=STEPS, seed=SEED, progress=True))) for name, model in models.items()
    ]
    path = PLOTS / f"grid-{pair}.png"
    save_image(side_by_side(panels), path)
    print(path)


if __name__ == "__main__":
    main()
