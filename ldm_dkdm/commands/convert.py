"""Students as other tools load them."""

import shutil
from pathlib import Path

import torch

from ldm_dkdm.assemble import Codec, find_model, load_first_stage
from ldm_dkdm.checkpoints.diffusers_folder import FirstStage, Pipeline, is_pipeline, read_pipeline, write_pipeline
from ldm_dkdm.checkpoints.export import write_adm, write_compvis, write_safetensors
from ldm_dkdm.checkpoints.folder import is_model_folder, read_folder
from ldm_dkdm.config.schema import FirstStageCard, FirstStageConfig, FirstStagePointer
from ldm_dkdm.diffusion.samplers import ddim, last
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.sources import Model, make_schedule

STEPS, TOLERANCE = 10, 1e-4  # of the comparison with diffusers


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
    elif to == "diffusers":
        _to_diffusers(model, out)
    elif to == "adm":
        write_adm(out, model.network, model.card)
    else:
        write_safetensors(out, model.network, model.card)


def _to_compvis(model: Model, out: Path) -> None:
    if not model.space.encoded:
        raise UserError("--to: CompVis's latent diffusion has no pixel-space models; choose adm or safetensors")
    if model.network.num_classes is not None:
        raise UserError(
            "--to: compvis holds unconditional models only here, and this one takes labels; choose safetensors"
        )
    if out.suffix in (".yaml", ".yml"):
        raise UserError(f"{out}: is where the config goes; name the weights, for example {out.with_suffix('.ckpt')}")
    if out.with_suffix(".yaml").exists():
        raise UserError(
            f"{out.with_suffix('.yaml')}: exists, and the config goes there; choose another name or delete it"
        )
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


def _to_diffusers(model: Model, out: Path) -> None:
    codec, pointer = load_first_stage(FirstStageConfig(), model, "32")
    stage = None
    if isinstance(codec, LatentCodec):
        stage = FirstStage(_first_stage_params(pointer), dict(codec.vq.state_dict()), codec.scale_factor)
    tensors = dict(model.network.state_dict())
    write_pipeline(out, Pipeline(model.card.network, tensors, model.card.diffusion, stage))
    if model.network.num_classes is not None:
        print("it takes labels, which DDPMPipeline cannot pass: call its unet with class_labels")
    difference = prove(out, model, codec)
    if difference is None:
        print("diffusers is not installed: the folder is not compared with it")
        return
    print(f"the same noise through diffusers gives the same pictures to {difference:.1e}")
    if not difference <= TOLERANCE:
        shutil.rmtree(out)
        raise UserError(
            f"{out}: diffusers' pictures differ by {difference:.1e}, more than {TOLERANCE}; nothing is kept"
        )


@torch.no_grad()
def prove(folder: Path, model: Model, codec: Codec) -> float | None:
    """Largest difference, of two pictures' states by DDIM-10 and of what is decoded from the same states, here and in
    diffusers; None without that library."""
    try:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel
    except ImportError:
        return None
    noise = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    teacher = model.as_teacher("32")
    classes = model.classes
    label = None if classes is None else torch.tensor([classes[0], classes[-1]])
    steps = min(STEPS, teacher.schedule.num_timesteps)
    ours = last(ddim(teacher.schedule, teacher.predict, noise, lambda: noise, steps, label=label))
    network = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    offset = teacher.schedule.steps_offset
    scheduler = DDIMScheduler.from_pretrained(
        folder, subfolder="scheduler", set_alpha_to_one=offset == 0, steps_offset=offset
    )
    scheduler.set_timesteps(steps)
    x, clips = noise, not model.space.encoded
    for t in scheduler.timesteps:
        output = network(x, t, class_labels=label).sample[:, : x.shape[1]]
        x = scheduler.step(output, t, x, use_clipped_model_output=clips).prev_sample
    difference = (x - ours).abs().max().item()
    if not isinstance(codec, LatentCodec):
        return difference
    kind = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[type(codec.vq).__name__]
    vq = kind.from_pretrained(folder / "vqvae", low_cpu_mem_usage=False).eval()
    z = ours / codec.scale_factor
    if codec.vq.codes:  # a latent between two codes would fall to either side by its last bit
        z = codec.vq.quantise(z)[0]
    theirs = vq.decode(z * codec.scale_factor / vq.config.scaling_factor).sample
    return max(difference, (theirs - codec.vq.decode(z)).abs().max().item())


def _first_stage_params(pointer: FirstStagePointer) -> dict[str, object]:
    folder = Path(pointer.path)
    if is_pipeline(folder):
        return read_pipeline(folder).first_stage.params
    return read_folder(folder, FirstStageCard)[0].params if is_model_folder(folder) else pointer.params
