"""Make the pixel quickstart's data: python scripts/prepare_digits.py OUT.npz

The 1,797 handwritten digits of 8x8 pixels that come inside scikit-learn (UCI, CC BY 4.0), as an
ADM-style .npz with their labels.
"""

from pathlib import Path

import torch

from ldm_dkdm.commands.main import guarded
from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.npz import save_npz


def main() -> None:
    """Read the digits, write them as RGB."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()

    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    save_npz(grey[..., None].repeat(1, 1, 1, 3), arguments.out, torch.from_numpy(digits.target))
    print(f"{arguments.out}: {len(grey)} images")


if __name__ == "__main__":
    guarded(main)
