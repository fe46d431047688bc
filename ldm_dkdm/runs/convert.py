"""Students as other tools load them."""

from pathlib import Path

from ldm_dkdm.assemble import load_first_stage
from ldm_dkdm.checkpoints.export import check_eps_unet, write_adm, write_compvis, write_safetensors
from ldm_dkdm.checkpoints.folder import is_model_folder, read_folder
from ldm_dkdm.errors import UserError
from ldm_dkdm.runs.sample import find_model
from ldm_dkdm.schema import FirstStageCard, FirstStageConfig, FirstStagePointer
from ldm_dkdm.sources import Model, make_schedule


def convert(source: Path, out: Path, to: str) -> None:
    """Write the model at a run, model folder or training checkpoint in another layout; never over a file.

    Raises:
        UserError: no model, a target that exists, or a layout that cannot hold this model.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another name or delete it")
    model, _ = find_model(source)
    if to == "compvis":
        _to_compvis(model, out)
    elif to == "adm":
        write_adm(out, model.network, model.card)
    else:
        write_safetensors(out, model.network, model.card)


def _to_compvis(model: Model, out: Path) -> None:
    if model.card.diffusion.space != "latent":
        raise UserError("--to: CompVis's latent diffusion has no pixel-space models; choose adm or safetensors")
    if model.network.num_classes is not None:
        raise UserError(
            "--to: compvis holds unconditional models only here, and this one takes labels; choose safetensors"
        )
    check_eps_unet(model.network, model.card, "CompVis's code")
    codec, pointer = load_first_stage(FirstStageConfig(), model, "32")
    write_compvis(
        out,
        model.network,
        model.card,
        make_schedule(model.card.diffusion),
        codec.vq,
        _first_stage_params(pointer),
        codec.scale_factor,
    )


def _first_stage_params(pointer: FirstStagePointer) -> dict[str, object]:
    folder = Path(pointer.path)
    return read_folder(folder, FirstStageCard)[0].params if is_model_folder(folder) else pointer.params
