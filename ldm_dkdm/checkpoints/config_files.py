"""Find the YAML files that CompVis's code keeps beside a checkpoint, and check what they say of a first stage."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.config.load import read_yaml
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage.ddconfig import UNREAD
from ldm_dkdm.reporting import logger

DECIDED = ("in_channels", "out_ch", "double_z")  # further keys of a `ddconfig` that its tensors decide
BESIDE = ("embed_dim", "n_embed")  # such keys beside a `ddconfig`
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
        shown: the parameters that the tensors show; a config of another autoencoder's `ddconfig` is not read.

    Raises:
        UserError: an option that the autoencoders here do not have, or a value that the tensors contradict; names the
            file and the key.
    """
    own = shown["ddconfig"]
    for file in configs_beside(checkpoint):
        for where, params in _first_stages(model_section(file, warn=False)):
            ddconfig = params["ddconfig"]
            if all(key in ddconfig and plain(ddconfig[key]) == plain(own[key]) for key in SHOWN):
                _require_same(ddconfig, own, DECIDED, f"{file}: {where}.ddconfig", checkpoint)
                _require_same(params, shown, BESIDE, f"{file}: {where}", checkpoint)
                for key, usual in UNREAD.items():
                    if ddconfig.get(key, usual) != usual:
                        raise UserError(
                            f"{file}: {where}.ddconfig.{key}: {ddconfig[key]!r} is not supported, only {usual!r}"
                        )
                return


def _require_same(
    given: Mapping[str, Any], shown: Mapping[str, Any], keys: Iterable[str], where: str, checkpoint: Path
) -> None:
    for key in keys:
        if key in given and key in shown and given[key] != shown[key]:
            raise UserError(f"{where}.{key}: {given[key]!r}, but the tensors of {checkpoint} say {shown[key]!r}")


def _first_stages(model: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parameters of a first stage alone, and of a diffusion model's, with their places; they hold a `ddconfig`."""
    for place in ("params", "params.first_stage_config.params"):
        found = model
        for key in place.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and isinstance(found.get("ddconfig"), Mapping):
            yield f"model.{place}", found
