"""The model card of a student: README.md in its folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.folder import home_of, is_model_folder, read_card_of
from ldm_dkdm.config.schema import DistillRun, ModelCard
from ldm_dkdm.files import write_text

FIGURES = "evaluation.json"
PER_T = "eps_mse_by_t"  # in the file of figures only: too long for people
NOT_MEASURED = "Not measured yet (scripts/evaluate.py)."


def teacher_facts(config: DistillRun) -> dict[str, Any]:
    """Name, SHA-256 and licence (as the user states it) of a teacher, and the recipe, for a card's `info`."""
    path, distill, trainer = home_of(Path(config.teacher.ckpt)), config.distill, config.trainer
    return {
        "teacher": config.teacher.ckpt,
        "teacher_sha256": sha256(_weights(path)),
        "teacher_licence": config.teacher.licence or "not stated (teacher.licence)",
        "method": f"DKDM, {distill.variant} iterative distillation",
        "batch_size": distill.batch_size * trainer.accumulate * trainer.devices,
        "learning_rate": trainer.learning_rate,
        "ema_decay": trainer.ema_decay,
    }


def _weights(path: Path) -> Path:
    if is_model_folder(path):
        return path / read_card_of(path, ModelCard).weights
    return next(iter(sorted((path / "unet").glob("diffusion_pytorch_model*"))), path) if path.is_dir() else path


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_readme(folder: Path, card: ModelCard) -> None:
    """Write or renew the card of a model folder, with the figures that `evaluate.py` left there."""
    info, params = dict(card.info), card.network.params
    figures = folder / FIGURES
    measured = json.loads(figures.read_text()) if figures.is_file() else {}
    kind = card.network.target.rpartition(".")[2]
    lines = [
        "---",
        "library_name: ldm_dkdm",
        "tags: [diffusion, distillation, DKDM]",
        "---",
        "",
        f"# {folder.resolve().parent.name}",
        "",
        f"{kind}, {card.diffusion.space} space, predicts {card.network.parameterization}; "
        f"{card.diffusion.schedule} schedule, T = {card.diffusion.num_timesteps}.",
        "",
        *[f"- **{key.replace('_', ' ')}**: {value}" for key, value in info.items()],
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
