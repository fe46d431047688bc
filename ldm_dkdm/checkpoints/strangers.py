"""Describe files and folders without a diffusion model, or with one that is not supported, for messages."""

from pathlib import Path

from ldm_dkdm.checkpoints.adm import NAME as ADM
from ldm_dkdm.checkpoints.config_files import WEIGHTS
from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.first_stages import has_their_names, is_of_diffusers
from ldm_dkdm.checkpoints.shapes import UPSAMPLER
from ldm_dkdm.checkpoints.source import Source, has_config, is_foreign


def super_resolution(contents: Contents, key: str = "space") -> str:
    """Why a file of guided-diffusion may be one of its super-resolution models; empty for any other.

    Its images are RGB, so that 6 channels in and out are two images, or latents of 6 channels with a fixed variance.

    Args:
        contents: the file's.
        key: how the user writes the key of the space.
    """
    if contents.format != ADM or any(contents.params.get(name) != count for name, count in UPSAMPLER.items()):
        return ""
    return (
        "its network (6 channels in, 6 out) is guided-diffusion's for super-resolution, conditioned on an image that "
        f"is concatenated to its input, which is not supported; for latents of 6 channels set {key}=latent"
    )


def what_else(source: Source) -> str:
    """What a file or folder holds instead, and where it belongs."""
    if source.is_folder:
        if has_config(source.path) and is_foreign(source.path):
            return "its config.yaml belongs to other code; name the checkpoint file itself" + _files_of(source)
        if has_config(source.path) or (source.path / "checkpoints").is_dir():
            return f"the run holds no model; --resume {source.path} goes on, or exports a finished one again"
        if source.holds("model.safetensors") or source.holds("student.safetensors"):
            return "config.yaml is missing; a model folder holds it and the weights"
        return (
            _of_folder(source.path)
            or "is neither a model folder (config.yaml), nor a diffusers folder (model_index.json or config.json)"
        )
    if has_their_names(source.tensors):
        is_of_diffusers(source)  # refuses one without its config.json
    return _of_names(set(source.tensors))


def _of_folder(folder: Path) -> str | None:
    """What a folder of another code is, and what to name in its place."""
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        tool = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        return f"is a checkpoint of torch.distributed.checkpoint; `{tool} {folder} FILE.pt` writes it as one file"
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("*mp_rank_*")) or any(folder.glob("*/mp_rank_*")):
        return f"is a DeepSpeed checkpoint; its zero_to_fp32.py ({folder} FILE) writes the weights as one file"
    if snapshots := sorted(path for path in folder.glob("snapshots/*") if path.is_dir()):
        return f"is a folder of the Hub's cache; name {snapshots[-1]}"
    if pipelines := sorted(
        path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/model_index.json")
    ):
        return f"is not a model folder, but holds a pipeline; name {pipelines[0]}"
    if saved := sorted(path.name for path in folder.glob("step=*.ckpt")):
        whole = f"the run, {folder.absolute().parent}, or " if folder.absolute().name == "checkpoints" else ""
        return f"holds the checkpoints of a run; name {whole}one of them: {', '.join(saved[-4:])}"
    files = [path.name for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS and path.is_file()]
    weights = [name for name in files if not name.startswith("opt")]  # guided-diffusion's optNNNNNN.pt
    if weights:
        weights.sort(key=lambda name: not name.startswith("ema"))
        return f"is not a model folder; name a checkpoint in it: {', '.join(weights[:4])}"
    return None


def _files_of(source: Source) -> str:
    files = sorted(path.name for path in source.path.iterdir() if path.suffix in WEIGHTS)
    return f": {', '.join(files[:4])}" if files else ", such as model.ckpt, which is not beside it"


def _of_names(names: set[str]) -> str:
    def holds(*prefixes: str) -> bool:
        return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)

    if any("lora" in name.lower() for name in names):
        return "is a LoRA adapter, not a model; name the model that it changes"
    if any("_flat_param" in name for name in names):
        return "holds FSDP's flat parameters, not named weights; save a full state dict (StateDictType.FULL_STATE_DICT)"
    if holds("encoder.", "decoder."):
        return "is a first stage, not a diffusion model; it belongs in first_stage.ckpt"
    if holds("down_blocks."):
        return "is a diffusers network without its config.json; name the folder that holds both"
    if holds("total_t", "total_x_t_1") or {"x", "t", "updated"} <= names:
        return "is a pool of noisy states, not a network; it belongs in distill.pool_from"
    return f"holds no known diffusion network (keys: {', '.join(sorted(names)[:4])})"
