"""Make the quickstart's data: python scripts/prepare_emoji.py ASSETS OUT

ASSETS is the `assets` folder of the npm package @lobehub/fluent-emoji-3d (MIT). OUT receives, as
ADM-style .npz of 64x64 images on white: train.npz and held_out.npz for the first stage (variants of one
emoji are in the same file), teacher.npz for the teacher (faces, animals, food).
"""

from pathlib import Path

import numpy as np
import torch

from ldm_dkdm.commands.main import guarded
from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.errors import UserError
from ldm_dkdm.images import read_image
from ldm_dkdm.npz import save_npz

SIZE = 64
TEACHER_RANGES = (
    (0x1F600, 0x1F644),  # faces
    (0x1F910, 0x1F917),
    (0x1F920, 0x1F925),
    (0x1F927, 0x1F92F),
    (0x1F970, 0x1F97A),
    (0x1FAE0, 0x1FAE8),
    (0x1F400, 0x1F43D),  # animals
    (0x1F980, 0x1F9AE),
    (0x1FAB0, 0x1FABF),
    (0x1F32D, 0x1F37F),  # plants and food
    (0x1F950, 0x1F96F),
    (0x1FAD0, 0x1FADB),
)


def is_teacher_image(name: str) -> bool:
    """Whether a file is a face, an animal, a plant or food without variants."""
    parts = name.split("-")
    code = int(parts[0], 16)
    return parts[1:] in ([], ["fe0f"]) and any(low <= code <= high for low, high in TEACHER_RANGES)


def group_of(name: str) -> str:
    """Variants of one emoji share a group: the first code point; each flag is a group."""
    first = name.split("-", maxsplit=1)[0]
    return name if "1f1e6" <= first <= "1f1ff" else first


def main() -> None:
    """Read every image once, split by group, write the three sets."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.assets.glob("*.webp"))
    if not files:
        raise UserError(f"{arguments.assets}: holds no .webp files; unpack the npm package @lobehub/fluent-emoji-3d")
    images = torch.stack([read_image(file, SIZE) for file in files])
    groups = sorted({group_of(file.stem) for file in files})
    rng = np.random.default_rng(0)
    chosen = set(rng.choice(groups, len(groups) // 20, replace=False).tolist())
    held_out = torch.tensor([group_of(file.stem) in chosen for file in files])
    teacher = torch.tensor([is_teacher_image(file.stem) for file in files])
    for name, mask in (("train", ~held_out), ("held_out", held_out), ("teacher", teacher)):
        save_npz(images[mask], arguments.out / f"{name}.npz")
        print(f"{arguments.out / name}.npz: {int(mask.sum())} images")


if __name__ == "__main__":
    guarded(main)
