"""Write the model card: README.md in a model folder."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from ldm_dkdm.checkpoints.weight_files import files_of
from ldm_dkdm.config.load import RUN_KIND, card_kind
from ldm_dkdm.config.schema import ModelCard
from ldm_dkdm.errors import MALFORMED, UserError
from ldm_dkdm.files import JSON_BYTES, read_text, write_text

FIGURES, RECORDS = "evaluation.json", "evaluations"  # file and folder inside a model folder
EARLIER = f"{RECORDS}/earlier"  # folder with figures that FIGURES held before, of other settings
FILE_SHA256 = "student_file_sha256"  # key: hash of the measured weights
MEASURED_WITH = "measured_with"  # key: the call that gave the figures
AGREEMENT_BY = "agreement by"  # the same of the agreement, in a record of two sets
PER_T = "eps_mse_by_t"  # a long list; evaluation.json has it, cards do not
NOT_MEASURED = "Not measured yet; `dkdm evaluate -r RUN` does it."


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of all the shards behind an index, one after the other; hexadecimal."""
    digest = hashlib.sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_readme(folder: Path, card: ModelCard) -> None:
    """Write or renew the card of a model folder, with the figures in its evaluation.json.

    Figures of other weights than the folder's move to evaluations/of-HASH, where no card, table or report shows them.
    """
    info, params = dict(card.info), card.network.params
    _retire_figures(folder, folder / card.weights)
    measured = _measured(folder / FIGURES)
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


def _measured(figures: Path) -> dict[str, object]:
    """The figures in a file; none without one, or in a damaged one, which is named where it is shown."""
    with suppress(UserError, *MALFORMED):
        if figures.is_file():
            return dict(json.loads(read_text(figures, JSON_BYTES)))
    return {}


def _retire_figures(folder: Path, weights: Path) -> None:
    """Move the figures that were measured of another file of weights, by the hash that they name."""
    found = [folder / FIGURES, *sorted((folder / RECORDS).glob("*.json"))]
    files = [file for file in [*found, *sorted((folder / EARLIER).glob("*.json"))] if file.is_file()]
    own = sha256(weights) if files and weights.is_file() else None
    for file in files:
        with suppress(UserError, *MALFORMED):  # a damaged file is named where it is shown
            tree = json.loads(read_text(file, JSON_BYTES))
            measured = tree.get(FILE_SHA256) or (tree.get("samples") or {}).get("opened_from_sha256")
            if own is not None and measured and measured != own:
                place = folder / RECORDS / f"of-{measured[:8]}"
                place.mkdir(parents=True, exist_ok=True)
                file.replace(place / file.name)


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
