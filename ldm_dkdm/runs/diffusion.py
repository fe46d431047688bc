"""Training a latent diffusion model on images (Alg. 2 with L_simple)."""

import lightning as L
import torch

from ldm_dkdm.assemble import Model, check_loss, check_network, load_first_stage, make_schedule
from ldm_dkdm.baselines.stream import DataStream, encode_images
from ldm_dkdm.config import build
from ldm_dkdm.distill.module import StudentModule
from ldm_dkdm.errors import Stopped, UserError
from ldm_dkdm.generate import SamplerConfig
from ldm_dkdm.images import load_images, save_grid
from ldm_dkdm.precision import resolve_precision
from ldm_dkdm.runs.export import export_on_save
from ldm_dkdm.runs.interrupt import GracefulStop
from ldm_dkdm.runs.loop import RunFolder, default_device, fit, open_run, run_folder
from ldm_dkdm.runs.samples import SampleGrid
from ldm_dkdm.runs.saving import RunCheckpoint, step_of
from ldm_dkdm.schema import DiffusionRun, ModelCard


def train_diffusion(config: DiffusionRun, default_name: str) -> RunFolder:
    """Encode the images once, then train to `trainer.max_steps`; a second call goes on where the first stopped."""
    device = default_device(config.trainer.accelerator)
    precision = resolve_precision(config.trainer.precision, device)
    torch.manual_seed(config.trainer.seed)  # of the first weights
    network = build(config.model, "model.params")
    check_network(network, "model.params")
    check_loss(config.loss, "loss")
    if config.logging.sample_steps > config.diffusion.num_timesteps:
        raise UserError(f"logging.sample_steps: {config.logging.sample_steps} is more than the diffusion steps")
    model = Model(network, ModelCard("model.safetensors", config.model, config.diffusion), None)
    codec, pointer = load_first_stage(config.first_stage, model, precision)
    images = load_images(config.data.path, config.data.image_size)
    latents = encode_images(codec.to(device), images, config.data.flip).cpu()
    if latents.shape[1:] != model.latent_shape:
        raise UserError(
            f"model.params: states of {model.latent_shape}, but the first stage makes {tuple(latents.shape[1:])}"
        )
    folder = open_run(config, run_folder(config.logging, default_name))
    schedule = make_schedule(config.diffusion)
    module = StudentModule(network, schedule, config.model.parameterization, config.loss, config.trainer)

    def stream_for(trainer: L.Trainer) -> DataStream:
        latest = folder.latest()
        return DataStream(
            latents,
            schedule,
            config.data.batch_size,
            config.trainer.max_steps,
            config.trainer.seed,
            trainer.global_rank,
            trainer.strategy.root_device,
            step_of(latest) if latest else 0,
            config.data.t_cap,
        )

    log = config.logging
    samples = folder.path / "samples"
    save_grid(images[: log.sample_count], samples / "data.png")
    export = export_on_save(folder.model, model.card, pointer, log.export_dtype)
    with GracefulStop() as stop:
        sampling = SamplerConfig(log.sample_count, seed=config.trainer.seed, steps=log.sample_steps)
        callbacks = [
            SampleGrid(samples, codec, model.latent_shape, log.sample_every, sampling),
            RunCheckpoint(folder.checkpoints, log.save_every, export),
        ]
        trainer = fit(module, stream_for, config.trainer, log, folder, callbacks, stop, precision)
    if trainer.global_step < config.trainer.max_steps:
        raise Stopped(f"stopped and saved at step {trainer.global_step}; the same command goes on")
    return folder
