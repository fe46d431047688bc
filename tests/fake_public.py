"""A clone of the public code as benchmarks/gpu.py sees it: names and arguments of its step, and modules of our own."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ldm_dkdm.networks import UNet

MODULES = {  # file of the clone -> its text
    "latent-diffusion/ldm/models/diffusion/ddpm_dkdm.py": """
import blobfile, torchvision
from mpi4py import MPI
from pytorch_lightning.utilities.distributed import rank_zero_only
from tests import fake_public
dist = None
class LatentDiffusion_Distill(fake_public.Latent):
    @rank_zero_only
    def configure_optimizers(self):
        assert dist.get_world_size() == 1
        return super().configure_optimizers()
""",
    "guided-diffusion/guided_diffusion/dist_util.py": "import blobfile\nfrom mpi4py import MPI\n",
    "guided-diffusion/guided_diffusion/unet.py": "from tests.fake_public import HalfUNet as UNetModel\n",
    "guided-diffusion/guided_diffusion/script_util.py": (
        "from types import SimpleNamespace\ndef create_gaussian_diffusion(**keys): return SimpleNamespace(**keys)\n"
    ),
    "guided-diffusion/guided_diffusion/train_util_kd.py": """
from tests.fake_public import KDTeacherLoader, KDTrainLoop, logger
from . import dist_util
""",
}
MADE: list[Any] = []  # the fakes' objects


def fake_clone(folder: Path) -> Path:
    """Write the modules."""
    for name, text in MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class HalfUNet(UNet):
    """A UNet that takes `use_fp16`."""

    def __init__(self, use_fp16: bool = False, **params: Any) -> None:
        super().__init__(**params)
        assert not use_fp16


class Wrapper(nn.Module):
    """A network below `diffusion_model`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        assert config["target"] == "ldm.modules.diffusionmodules.openaimodel.UNetModel"
        self.diffusion_model = UNet(**config["params"])


class Average(nn.Module):
    """What is averaged first: the weights at the beginning."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.first = [weight.detach().clone() for weight in module.parameters()]


class Latent(nn.Module):
    """The trainer of latents; `calls` has what it did."""

    def __init__(
        self,
        *,
        unet_config: dict[str, Any],
        teacher_config: dict[str, Any],
        first_stage_config: object,
        cond_stage_config: object,
        teacher_layers: list[object],
        student_layers: list[object],
        timesteps: int,
        image_size: int,
        channels: int,
        log_images_kwargs: dict[str, object],
        BATCH: float,  # noqa: N803 - the public code's name
        batch_size: int,
    ) -> None:
        super().__init__()
        self.model, self.teacher_model = Wrapper(unet_config), Wrapper(teacher_config)
        self.model_ema, self.logvar = Average(self.model), torch.zeros(timesteps)
        self.batch, self.slots = batch_size, round(BATCH * timesteps) * batch_size
        self.shape, self.timesteps = (channels, image_size, image_size), timesteps
        self.total_t, self.total_x_t_1 = torch.empty(0), torch.empty(0)
        self.learning_rate = 0.0
        self.calls: list[str] = []
        self.before: Tensor = torch.empty(0)
        MADE.append(self)

    @torch.no_grad()
    def get_input(self) -> tuple[Tensor, Tensor, Tensor]:
        """t, x and the teacher's prediction."""
        assert self.total_x_t_1.shape == (self.slots, *self.shape) and int(self.total_t.min()) >= 1
        assert int(self.total_t.max()) <= self.timesteps
        print("the pool is drawn")
        x, t = self.total_x_t_1[: self.batch], self.total_t[: self.batch] - 1
        self.calls.append("teacher")
        return t, x, self.teacher_model.diffusion_model(x, t)

    def shared_step(self, batch: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the next batch."""
        t, x, target = self.get_input()
        self.calls.append("student")
        self.before = next(self.model.parameters()).detach().clone()
        return (self.model.diffusion_model(x, t) - target).square().mean(), {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the student."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)

    def on_train_batch_end(self) -> None:
        """The average comes after the update."""
        assert not torch.equal(self.before, next(self.model.parameters()))
        self.calls.append("average")


class Logger:
    """Writes nothing."""

    CURRENT: "Logger | None" = None

    def __init__(self, dir: None, output_formats: list[object]) -> None:
        assert dir is None and output_formats == []


logger = SimpleNamespace(Logger=Logger)


class KDTeacherLoader:
    """Batches of pixels, from a pool in a file."""

    def __init__(self, **keys: Any) -> None:
        assert keys["teacher_diffusion"].kd and not keys["student_diffusion"].kd
        self.keys = keys

    @property
    def iter(self) -> Iterator[tuple[Any, ...]]:
        """x_{t-1}, x_t, t, labels and the teacher's prediction."""
        states = pickle.loads(Path(self.keys["tempfile"]).read_bytes())
        size, network = self.keys["batch"], self.keys["teacher_model"]
        x, t = (torch.from_numpy(states[name])[:size] for name in ("total_x_t_1", "total_t"))
        assert len(states["total_t"]) == round(self.keys["BATCH"] * self.keys["teacher_diffusion"].steps) * size
        while True:
            with torch.no_grad():
                yield x, x, t - 1, {}, {"model_output": network(x, t - 1)}


class KDTrainLoop:
    """A trainer that counts its steps."""

    def __init__(self, **keys: Any) -> None:
        self.keys, self.steps = keys, 0
        MADE.append(self)

    def run_step(self, x_t_1: Tensor, x_t: Tensor, t: Tensor, model_kwargs: object, out: dict[str, Tensor]) -> None:
        """Count."""
        assert out["model_output"].shape[0] == len(x_t) == self.keys["batch_size"] and not self.keys["use_fp16"]
        self.steps += 1
