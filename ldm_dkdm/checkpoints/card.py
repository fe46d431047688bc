"""Write the model card: README.md in a model folder."""

import hashlib
import json
from pathlib import Path

from ldm_dkdm.checkpoints.weight_files import files_of
from ldm_dkdm.config.load import RUN_KIND, card_kind
from ldm_dkdm.config.schema import ModelCard
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import JSON_BYTES, read_text, write_text

FIGURES = "evaluation.json"
PER_T = "eps_mse_by_t"  # a long list; evaluation.json has it, cards do not
NOT_MEASURED = "Not measured yet (scripts/evaluate.py)."


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of all the shards behind an index, one after the other; hexadecimal."""
    digest = hashlib.sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_readme(folder: Path, card: ModelCard) -> None:
    """Write or renew the card of a model folder, with the figures in its evaluation.json."""
    info, params = dict(card.info), card.network.params
    figures = folder / FIGURES
    measured = json.loads(read_text(figures, JSON_BYTES)) if figures.is_file() else {}
    kind = card.network.target.rpartition(".")[2]
    lines = [
        "---",
        "library_name: ldm_dkdm",
        "tags: [diffusion, distillation, DKDM]",
        "---",
        "",
        f"# {_title(folder.resolve())}",
        "",
        f"{kind}, {card.diffusion.space} space, predicts {card.network.parameterization}; "
        f"{card.diffusion.schedule} schedule, T = {card.diffusion.num_timesteps}.",
        "",
        *[f"- **{key.replace('_', ' ')}**: {_shown(value)}" for key, value in info.items()],
        "",
        "## Architecture",
        "",
        *[f"- {key}: {value}" for key, value in params.items()],
        "",
        "## Figures",
        "",
        *([f"- {key}: {value}" for key, value in measured.items() if key != PER_T] or [NOT_MEASURED]),
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


def _shown(value: object) -> str:
    """A fact as text; the entries of a list, such as the names of classes, are joined by commas."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _title(folder: Path) -> str:
    """The name of the run that a model folder is in; of a folder outside a run its own name."""
    run = folder.parent / "config.yaml"
    try:
        in_run = run.is_file() and card_kind(run) == RUN_KIND
    except UserError:  # another program's file
        in_run = False
    return folder.parent.name if in_run else folder.name
