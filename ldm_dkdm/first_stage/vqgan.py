"""Training of the first stage: reconstruction + codebook + optional PatchGAN and LPIPS (VQGAN, Eq. 4-7)."""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from kornia.augmentation import AugmentationSequential, ColorJiggle, RandomHorizontalFlip
from kornia.metrics import psnr
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from ldm_dkdm.config.schema import FirstStageRun
from ldm_dkdm.first_stage.discriminator import Discriminator
from ldm_dkdm.first_stage.vq import VQModel
from ldm_dkdm.rng import seed_of

KMEANS_BATCHES = 16  # more where their latents are fewer than the codes
RESTARTING = 0.7  # share of the steps in which unused codes restart


class FirstStageModule(L.LightningModule):
    """Trains a `VQModel` on images uint8 (B,H,W,C).

    The first `codebook.continuous_steps` steps pass latents unquantised; the codebook then starts as the k-means
    centres of the last 16 batches (of as many more as give a latent for each code), and codes that went unused since
    the last check restart as encoder outputs.

    Args:
        vq: the autoencoder.
        config: weights of the loss, learning rate (peak of `warmup_cosine`), steps, augmentation.
        perceptual: frozen LPIPS, if the loss weights it.
    """

    code_uses: Tensor

    def __init__(self, vq: VQModel, config: FirstStageRun, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.vq, self.loss, self.codebook = vq, config.loss, config.codebook
        self.learning_rate, self.max_steps = config.trainer.learning_rate, config.trainer.max_steps
        self.seed = config.trainer.seed
        self.figures: dict[str, Tensor] = {}  # the last batch's losses
        self.recent_latents: list[Tensor] = []
        self.kmeans_batches = max(KMEANS_BATCHES, math.ceil(vq.quantize.n_e / latents_of_a_batch(vq, config)))
        self.register_buffer("code_uses", torch.zeros(vq.quantize.n_e, dtype=torch.long))
        self.discriminator = Discriminator(vq.in_channels) if self.loss.adversarial else None
        self.perceptual = perceptual
        flip = [RandomHorizontalFlip()] if config.data.flip else []
        jitter = [ColorJiggle(hue=config.hue, p=0.3)] if config.hue else []
        self.augment = AugmentationSequential(*flip, *jitter) if flip or jitter else nn.Identity()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.vq.parameters(), self.learning_rate, betas=(0.9, 0.99))
        ]
        if self.discriminator is not None:
            parameters = self.discriminator.parameters()
            optimizers.append(torch.optim.AdamW(parameters, self.critic_learning_rate, betas=(0.5, 0.9)))
        return optimizers

    @property
    def critic_learning_rate(self) -> float:
        """The discriminator's learning rate, which is constant."""
        return self.learning_rate / 4

    def on_train_start(self) -> None:
        """Give the discriminator the configuration's rate: a checkpoint restores the one that it was saved with."""
        for critic in self.trainer.optimizers[1:]:
            for group in critic.param_groups:
                group["lr"] = self.critic_learning_rate

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        torch.manual_seed(seed_of(self.seed, self.global_rank, self.global_step, "network"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recent_latents"] = self.recent_latents

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.recent_latents = checkpoint["recent_latents"]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        images = self.augment(to_unit(batch)) * 2 - 1
        latents = self.vq.encode(images)
        step = self.global_step
        self.figures.pop("dead_codes", None)  # it is of the batch that counted them alone
        codebook_loss = torch.zeros((), device=images.device)
        if step < self.codebook.continuous_steps:
            self._start_codebook(latents, self.codebook.continuous_steps - 1 - step)
        else:
            continuous = latents
            latents, codebook_loss, indices = self.vq.quantise(continuous)
            self._restart_dead_codes(continuous, latents, indices, step)
        reconstructions = self.vq.decode(latents, force_not_quantize=True).float()
        total = self.reconstruction_loss(images, reconstructions) + self.loss.codebook * codebook_loss
        if self.discriminator is not None and step >= self.loss.adversarial_start:
            last_layer = self.vq.decoder.conv_out.weight
            total = total + self.loss.adversarial * self.discriminator.generator_loss(
                total, reconstructions, last_layer
            )
        self._optimise(total, images, reconstructions.detach(), step)
        self.figures["loss"] = total.detach()

    def reconstruction_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Weighted L1, L2, colour and LPIPS distance of images (B,C,H,W) in [-1,1]; a scalar."""
        w = self.loss
        total = w.l1 * F.l1_loss(reconstructions, images) + w.l2 * F.mse_loss(reconstructions, images)
        if w.color:
            total = total + w.color * F.l1_loss(F.avg_pool2d(reconstructions, 8), F.avg_pool2d(images, 8))
        if self.perceptual is not None:
            total = total + w.perceptual * self.perceptual(reconstructions, images).mean()
        return total

    def _optimise(self, total: Tensor, images: Tensor, reconstructions: Tensor, step: int) -> None:
        optimizers = self.optimizers()
        optimizer, *critics = optimizers if isinstance(optimizers, list) else [optimizers]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup_cosine(step, self.max_steps)
        optimizer.zero_grad()
        self.manual_backward(total)
        self.clip_gradients(optimizer.optimizer, 1.0, "norm")
        optimizer.step()
        if self.discriminator is not None and step >= self.loss.adversarial_start:
            critic = critics[0].optimizer  # stepped unwrapped: global_step counts the autoencoder's steps
            critic.zero_grad()
            self.manual_backward(self.discriminator.discriminator_loss(images, reconstructions))
            critic.step()

    @torch.no_grad()
    def _start_codebook(self, latents: Tensor, steps_left: int) -> None:
        """Collect the last batches before quantisation begins; their k-means centres are the codes."""
        if steps_left < self.kmeans_batches:
            self.recent_latents.append(as_vectors(latents).cpu())
        if steps_left == 0:
            codes = self.vq.quantize.embedding.weight
            vectors = torch.cat(self.recent_latents).numpy()
            centres, _ = kmeans2(vectors, len(codes), iter=4, minit="points", rng=0)
            codes.copy_(torch.as_tensor(centres))
            self.recent_latents.clear()

    @torch.no_grad()
    def _restart_dead_codes(self, latents: Tensor, quantised: Tensor, indices: Tensor, step: int) -> None:
        """Move codes unused since the last check to latents (B,C,h,w) that the codebook represents worst."""
        self.code_uses += torch.bincount(indices.flatten(), minlength=len(self.code_uses))
        if step % self.codebook.restart_every or step > RESTARTING * self.max_steps:
            return
        dead = (self.code_uses == 0).nonzero().flatten()
        vectors = as_vectors(latents)
        squared_error = (vectors - as_vectors(quantised)).square().sum(1)
        if len(dead):
            chosen = torch.multinomial(squared_error + 1e-12, len(dead), replacement=True)
            self.vq.quantize.embedding.weight[dead] = vectors[chosen]
        self.figures["dead_codes"] = torch.tensor(float(len(dead)), device="cpu")
        self.code_uses.zero_()


@torch.no_grad()
def held_out_psnr(vq: VQModel, images: Tensor, batch_size: int = 64) -> float:
    """Mean over images uint8 (N,H,W,C) of the PSNR in dB of their quantised reconstruction."""
    device = next(vq.parameters()).device
    each = []
    for batch in images.split(batch_size):
        x = to_unit(batch.to(device))
        decoded = ((vq.decode(vq.encode(x * 2 - 1)) + 1) / 2).clamp(0, 1)
        each += [psnr(d, original, 1.0) for d, original in zip(decoded, x, strict=True)]
    return torch.stack(each).mean().item()


@torch.no_grad()
def latent_scale(vq: VQModel, images: Tensor, batch_size: int = 64) -> float:
    """1 / std of the latents of images uint8 (N,H,W,C) (LDM, Sec. G: component-wise rescaling)."""
    device = next(vq.parameters()).device
    latents = [vq.encode(to_unit(batch.to(device)) * 2 - 1) for batch in images.split(batch_size)]
    return 1 / torch.cat(latents).std().item()


def latents_of_a_batch(vq: VQModel, config: FirstStageRun) -> int:
    """Latent vectors of a training batch."""
    return int(config.data.batch_size * (config.data.image_size // vq.downsampling) ** 2)


def as_vectors(latents: Tensor) -> Tensor:
    """Latents (B,C,h,w) -> float32 (B*h*w,C), detached."""
    return latents.detach().float().movedim(1, -1).flatten(0, -2)


def to_unit(images: Tensor) -> Tensor:
    """Images uint8 (B,H,W,C) -> float (B,C,H,W) in [0,1]."""
    return images.movedim(-1, 1).contiguous().float() / 255


def warmup_cosine(step: int, max_steps: int) -> float:
    """Learning-rate factor in (0,1]: linear warm-up over 200 steps or a tenth of the run, and half a cosine."""
    warmup = max(1, min(200, max_steps // 10))
    decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_steps)))
    return min(1.0, (step + 1) / warmup) * decay
