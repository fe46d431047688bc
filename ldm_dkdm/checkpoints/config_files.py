"""Find the YAML files that CompVis's code keeps beside a checkpoint, and check what they say of a first stage."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.config.load import read_yaml
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage.ddconfig import UNREAD
from ldm_dkdm.reporting import logger

SHOWN = ("ch", "ch_mult", "num_res_blocks", "z_channels")  # keys of a `ddconfig` that tell one autoencoder from another
WEIGHTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")  # known endings of weight files


def config_path(checkpoint: Path, ending: str = ".yaml") -> Path:
    """NAME.yaml for NAME.ckpt; a name without a known ending is kept whole, `model-v1.5.yaml` for `model-v1.5`."""
    if checkpoint.suffix.lower() in WEIGHTS:
        return checkpoint.with_suffix(ending)
    return checkpoint.with_name(checkpoint.name + ending)


def configs_beside(checkpoint: Path) -> Iterator[Path]:
    """NAME.yaml beside NAME.ckpt, config.yaml in its folder, configs/*-project.yaml in the folder above."""
    folder = checkpoint.parent
    named = [config_path(checkpoint, ending) for ending in (".yaml", ".yml")]
    if checkpoint.suffix[1:2].isalpha():  # an ending that is not known; that of model-v1.5 belongs to the name
        named += [path for end in (".yaml", ".yml") if (path := checkpoint.with_suffix(end)) not in named]
    projects = sorted((folder.parent / "configs").glob("*-project.yaml"), reverse=True)  # the newest first
    return (file for file in (*named, folder / "config.yaml", *projects) if file.is_file())


def model_section(file: Path, warn: bool = True) -> Any:
    """The `model` section of a YAML file; empty without one. A file that is not YAML is named in a warning."""
    try:
        tree: Any = OmegaConf.to_container(read_yaml(file, {}))
        return tree["model"]
    except UserError as error:
        if warn:
            logger.warning(f"{error}; not used")
    except (OmegaConfBaseException, OSError, KeyError, TypeError):
        pass
    return {}


def require_first_stage(checkpoint: Path, shown: Mapping[str, Any]) -> None:
    """Refuse a first stage whose config beside it means another autoencoder than its tensors can show.

    Args:
        checkpoint: the file of a first stage, or of a model that holds one.
        shown: the `ddconfig` that the tensors show; a config of another autoencoder is not read.

    Raises:
        UserError: an option that the autoencoders here do not have; names the file and the key.
    """
    for file in configs_beside(checkpoint):
        for where, ddconfig in _ddconfigs(model_section(file, warn=False)):
            if all(key in ddconfig and plain(ddconfig[key]) == plain(shown[key]) for key in SHOWN):
                for key, usual in UNREAD.items():
                    if ddconfig.get(key, usual) != usual:
                        raise UserError(
                            f"{file}: {where}.ddconfig.{key}: {ddconfig[key]!r} is not supported, only {usual!r}"
                        )
                return


def _ddconfigs(model: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The `ddconfig` of a first stage alone, and of a diffusion model's, with the places of their parameters."""
    for place in ("params", "params.first_stage_config.params"):
        found = model
        for key in (*place.split("."), "ddconfig"):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            yield f"model.{place}", found
