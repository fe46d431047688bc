"""Training a diffusion model on images (Alg. 2)."""

import lightning as L
import torch
from torch import nn

from ldm_dkdm.assemble import Codec, check_loss, load_first_stage, load_initial, plain
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionRun, ModelCard
from ldm_dkdm.device import is_first_rank, resolve_precision
from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.distillation.image_data import EncodedStates, ImageSet, States, encode_sets, open_sets
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.errors import UserError
from ldm_dkdm.generate import SamplerConfig
from ldm_dkdm.images import save_grid
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.pixel import SPACES
from ldm_dkdm.sources import Model, check_trainable, make_schedule
from ldm_dkdm.training.export import export_on_save
from ldm_dkdm.training.folder import RunFolder, alone_in, check_run, go_on, open_run
from ldm_dkdm.training.grids import SampleGrid
from ldm_dkdm.training.interrupt import GracefulStop
from ldm_dkdm.training.loop import finished, first_batch, fit, training_device
from ldm_dkdm.training.saving import RunCheckpoint


def train_diffusion(config: DiffusionRun, folder: RunFolder, resumed: bool = False) -> None:
    """Train to `trainer.max_steps` on real or synthetic images; a second call goes on where the first stopped."""
    device = training_device(config.trainer)
    precision = resolve_precision(config.trainer.precision, device)
    network = _network(config)
    model = Model(network, ModelCard("model.safetensors", plain(config.model), config.diffusion), None)
    codec, pointer = load_first_stage(config.first_stage, model, precision)
    sets = open_sets(config.data, config.trainer.seed)
    _check_labels(network, dict(zip([key for key in ("path", "synthetic") if getattr(config.data, key)], sets)))
    found = tuple(codec.to(device).encode(sets[0].take(torch.zeros(1, dtype=torch.long))).shape[1:])
    if found != model.latent_shape:
        raise UserError(f"model.params: states of {model.latent_shape}, but the images make {found}")
    check_run(config, folder, resumed)
    if end := finished(folder, config.trainer):
        print(f"{folder.path}: {end}")
        return
    states = _states(config, sets, codec, network.num_classes is not None)
    schedule = make_schedule(config.diffusion)
    module = StudentModule(
        network, schedule, config.model.parameterization, config.loss, config.trainer, model.denoiser
    )

    def stream_for(trainer: L.Trainer) -> DataStream:
        return DataStream(
            states,
            schedule,
            config.data.batch_size,
            config.trainer.max_steps * config.trainer.accumulate,
            config.trainer.seed,
            trainer.global_rank,
            trainer.strategy.root_device,
            first_batch(folder, config.trainer),
            config.data.t_cap,
        )

    log = config.logging
    samples = folder.path / "samples"
    export = export_on_save(folder.model, model.card, pointer, log.export_dtype)
    with alone_in(folder), GracefulStop() as stop:
        open_run(config, folder, resumed)
        if is_first_rank():
            save_grid(sets[0].take(torch.arange(min(log.sample_count, len(sets[0])))), samples / "data.png")
        sampling = SamplerConfig(log.sample_count, seed=config.trainer.seed, steps=log.sample_steps)
        callbacks = [
            SampleGrid(samples, codec, model.latent_shape, log.sample_every, sampling, model.classes),
            RunCheckpoint(folder.checkpoints, log.save_every, export),
        ]
        fit(module, stream_for, config.trainer, log, folder, callbacks, stop, precision, go_on(config, folder))


def _network(config: DiffusionRun) -> nn.Module:
    check_loss(config.loss, make_schedule(config.diffusion), "loss")
    if config.logging.sample_steps > config.diffusion.num_timesteps:
        raise UserError(f"logging.sample_steps: {config.logging.sample_steps} is more than the diffusion steps")
    torch.manual_seed(config.trainer.seed)  # of the first weights
    network = build(config.model, NETWORKS, "model.params")
    load_initial(network, config.model, "model.init")
    check_trainable(network, config.diffusion, "model.params")
    return network


def _check_labels(network: nn.Module, sets: dict[str, ImageSet]) -> None:
    if network.num_classes is None:
        return
    for key, images in sets.items():
        if images.labels is None:
            raise UserError(
                f"data.{key}: a class-conditional model needs labels: arr_1 of an .npz, or a sub-folder for every class"
            )
        if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < network.num_classes:
            raise UserError(
                f"model.params.num_classes: {network.num_classes}, but data.{key}'s labels go from "
                f"{int(images.labels.min())} to {int(images.labels.max())}"
            )


def _states(config: DiffusionRun, sets: list[ImageSet], codec: Codec, labeled: bool) -> States:
    if config.data.cache and SPACES[config.diffusion.space].encoded:
        return encode_sets(sets, codec, config.data.flip, labeled)
    if config.data.cache:  # pixels need no encoding, but files need reading
        sets = [images.loaded() for images in sets]
    return EncodedStates(sets, codec, config.data.flip, labeled)
