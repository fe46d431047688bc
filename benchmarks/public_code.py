"""The distillation step of the paper's public code, timed beside ours: benchmarks/gpu.py --baseline CLONE.

CLONE is a clone of https://github.com/qianlong0502/DKDM, which is imported from there and is no part of this package.

Latent pairs: `LatentDiffusion_Distill` of `latent-diffusion`. Its trainer, an old Lightning's, is not run. Its hooks
are called in that trainer's order: `shared_step` (draw, teacher's prediction, DDPM step, student's forward),
`zero_grad`, backward, the optimizer of `configure_optimizers`, `on_train_batch_end` (EMA); in float32, with
cudnn's benchmark mode, as its configurations say. Losses are not logged. Its first stage takes no part in a step.

Pixel pairs: `KDTeacherLoader` and `KDTrainLoop.run_step` of `guided-diffusion`, with what that step logs; in float16
on a GPU, as its configurations say, and in float32 on a CPU.

Neither is wrapped for several devices. The pool is on the device and as small as ours. The numbers of the schedule
and what a student predicts do not change the time; both networks have our weights and predict eps.
"""

import contextlib
import importlib
import io
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from common import Pair
from torch import nn

from ldm_dkdm.errors import UserError
from ldm_dkdm.networks import UNet

URL = "https://github.com/qianlong0502/DKDM"
LATENT, PIXEL = "latent-diffusion", "guided-diffusion"  # folders of a clone
FILES = (f"{LATENT}/ldm/models/diffusion/ddpm_dkdm.py", f"{PIXEL}/guided_diffusion/train_util_kd.py")
PACKAGES = ("ldm", "guided_diffusion")  # the clone's
STAND_INS = {  # imported by the clone and not used by a step -> names taken from it
    "mpi4py": ("MPI",),
    "blobfile": (),
    "einops": ("rearrange", "repeat"),
    "torchvision": (),
    "torchvision.utils": ("make_grid",),
    "timm.models.vision_transformer": ("PatchEmbed", "Attention", "Mlp"),
    "taming.modules.vqvae.quantize": ("VectorQuantizer2",),
    "pytorch_lightning.utilities.distributed": ("rank_zero_only",),
}
ALONE = SimpleNamespace(  # torch.distributed of one process
    get_rank=lambda: 0, get_world_size=lambda: 1, barrier=lambda: None, broadcast=lambda tensor, source: None
)
BATCHES = 8  # batches in the pool
# Parameters that only our UNet has:
OWN = ("freq_shift", "cosines_first", "downsample_padding", "norm_eps", "norm_groups", "middle_attention")


def require_clone(path: Path) -> None:
    """Refuse a folder that is not a clone of the public code.

    Raises:
        UserError: the file that it lacks.
    """
    for name in FILES:
        if not (path / name).is_file():
            raise UserError(f"--baseline: {path} is not a clone of {URL}; it has no {name}")


@contextlib.contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Let modules be imported from a folder of the clone, with stand-ins; none of them can be imported afterwards."""
    missing = {name: _stand_in(name, names) for name, names in STAND_INS.items() if not _is_there(name)}
    sys.modules.update(missing)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name in missing or name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]


def _is_there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _stand_in(name: str, names: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    for own in names:
        setattr(module, own, lambda decorated: decorated)
    return module


def why_not(pair: Pair) -> str | None:
    """What the public code cannot do for a pair; None if it has its step."""
    if not all(isinstance(model.network, UNet) for model in (pair.teacher, pair.student)):
        return "the pair has networks that are not UNets"
    if any(set(OWN) & set(model.network.arguments) for model in (pair.teacher, pair.student)):
        return "its UNet has no such layers"
    if pair.teacher.num_classes is not None:
        return "it has no class-conditional distillation"
    return None


def public_step(clone: Path, pair: Pair, batch_size: int) -> Callable[[], object]:
    """A function that makes one step of the public code on a pair's networks.

    Raises:
        UserError: the public code has no step for such a pair, the clone cannot be imported, or its networks have other
            weights.
    """
    if reason := why_not(pair):
        raise UserError(f"the public code: {reason}")
    kind, make = (LATENT, _latent) if pair.teacher.space.encoded else (PIXEL, _pixel)
    with importing(clone / kind), contextlib.redirect_stdout(io.StringIO()):
        try:
            return make(pair, batch_size)
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(f"--baseline: {clone / kind} cannot be used: {error}") from error


def _latent(pair: Pair, batch_size: int) -> Callable[[], object]:
    public = importlib.import_module("ldm.models.diffusion.ddpm_dkdm")
    public.dist = ALONE
    teacher, student = pair.teacher, pair.new_student()
    module = public.LatentDiffusion_Distill(
        first_stage_config={"target": "torch.nn.Identity"},
        cond_stage_config="__is_unconditional__",
        teacher_layers=[],
        student_layers=[],
        unet_config=_unet_config(student.network),
        teacher_config=_unet_config(teacher.network),
        timesteps=teacher.schedule.num_timesteps,
        image_size=teacher.shape[-1],
        channels=teacher.shape[0],
        log_images_kwargs={},
        BATCH=BATCHES / teacher.schedule.num_timesteps,
        batch_size=batch_size,
    )
    _load(module.teacher_model.diffusion_model, teacher.network)
    _load(module.model.diffusion_model, student.network)
    module.model_ema = type(module.model_ema)(module.model)  # of these weights
    module.learning_rate = pair.config.trainer.learning_rate
    module.to(pair.device).train()
    module.logvar = module.logvar.to(pair.device)
    module.total_t, module.total_x_t_1 = _states(pair, batch_size)
    module.get_input()  # says how large the pool is
    optimizer = module.configure_optimizers()

    def step() -> None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            loss, _ = module.shared_step(None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.on_train_batch_end()

    return step


def _pixel(pair: Pair, batch_size: int) -> Callable[[], object]:
    training, single = (importlib.import_module(f"guided_diffusion.{name}") for name in ("train_util_kd", "dist_util"))
    training.dist = single.dist = ALONE
    training.DDP = lambda model, **_: model
    single.dev = lambda: pair.device
    training.logger.Logger.CURRENT = training.logger.Logger(dir=None, output_formats=[])  # else it makes a folder
    steps, half = pair.teacher.schedule.num_timesteps, pair.device.type == "cuda"
    networks = [_pixel_network(model.network, half).to(pair.device) for model in (pair.teacher, pair.new_student())]
    diffusions = [_diffusion(model, steps, kd) for model, kd in ((pair.teacher, True), (pair.student, False))]
    if half:
        networks[0].convert_to_fp16()
    networks[0].eval()
    with tempfile.TemporaryDirectory() as folder:
        names = ("total_t", "total_x_t_1")
        states = {name: state.cpu().numpy() for name, state in zip(names, _states(pair, batch_size))}
        (Path(folder) / "pool").write_bytes(pickle.dumps(states))
        shared = {"class_cond": False, "clip_denoised": True, "teacher_image_size": pair.teacher.shape[-1]}
        loader = training.KDTeacherLoader(
            teacher_diffusion=diffusions[0],
            teacher_model=networks[0],
            student_diffusion=diffusions[1],
            batch=batch_size,
            microbatch=-1,
            teacher_batch=batch_size,
            rank=0,
            world_size=1,
            tempfile=f"{folder}/pool",
            BATCH=BATCHES / steps,
            **shared,
        )
        batches = loader.iter
        next(batches)  # reads the file
    loop = training.KDTrainLoop(
        teacher_model=networks[0],
        teacher_diffusion=diffusions[0],
        teacher_batch_size=batch_size,
        student_image_size=pair.student.shape[-1],
        teacher_loader=loader,
        model=networks[1],
        diffusion=diffusions[1],
        batch_size=batch_size,
        microbatch=-1,
        lr=pair.config.trainer.learning_rate,
        ema_rate=str(pair.config.trainer.ema_decay),
        log_interval=10,
        save_interval=10_000,
        resume_checkpoint="",
        use_fp16=half,
        **shared,
    )
    return lambda: loop.run_step(*next(batches))


def _states(pair: Pair, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of a pool as the public code keeps them: t + 1 (slots,) and x_t (slots,C,H,W), on the device."""
    slots = BATCHES * batch_size
    t = torch.randint(1, pair.teacher.schedule.num_timesteps + 1, (slots,), device=pair.device)
    return t, torch.randn(slots, *pair.teacher.shape, device=pair.device)


def _parameters(network: nn.Module) -> dict[str, Any]:
    """The arguments of the public UNets that make a network of ours."""
    arguments: dict[str, Any] = network.arguments
    return arguments


def _unet_config(network: nn.Module) -> dict[str, Any]:
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _parameters(network)}


def _pixel_network(network: nn.Module, half: bool) -> nn.Module:
    unet = importlib.import_module("guided_diffusion.unet")
    made: nn.Module = unet.UNetModel(**_parameters(network), use_fp16=half)
    _load(made, network)
    return made


def _diffusion(model: Any, steps: int, kd: bool) -> Any:
    make = importlib.import_module("guided_diffusion.script_util").create_gaussian_diffusion
    learned = model.network.out_channels == 2 * model.shape[0]
    return make(steps=steps, learn_sigma=learned, noise_schedule="cosine", timestep_respacing=str(steps), kd=kd)


def _load(public: nn.Module, own: nn.Module) -> None:
    try:
        public.load_state_dict(own.state_dict())
    except RuntimeError as error:
        raise UserError(f"--baseline: its network is not ours: {error}") from error
