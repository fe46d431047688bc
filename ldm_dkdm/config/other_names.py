"""Names that guided-diffusion, improved-diffusion and CompVis have for what has another name here."""

import typing
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ldm_dkdm.errors import UserError, nearest


@dataclass(frozen=True)
class OurName:
    """What another code's option is called here.

    Attributes:
        hint: its name as a hint.
        value: what stands for its value in a message.
        place: its key in a config.
    """

    hint: str
    value: str
    place: str

    @property
    def flag(self) -> str:
        """What to write in place of a flag."""
        return f"write {self.hint}={self.value}, in a config {self.place}"


PARAMS = "a key of params"
OUR_NAMES = {
    "noise_schedule": OurName("schedule", "NAME", "diffusion.schedule"),
    "diffusion_steps": OurName("num_timesteps", "N", "diffusion.num_timesteps"),
    "timesteps": OurName("num_timesteps", "N", "diffusion.num_timesteps"),
    "beta_schedule": OurName("schedule", "NAME (CompVis's linear is scaled_linear)", "diffusion.schedule"),
    "linear_start": OurName("beta_start", "X", "diffusion.beta_start"),
    "linear_end": OurName("beta_end", "X", "diffusion.beta_end"),
    "given_betas": OurName("betas", "[...]", "diffusion.betas"),
    "v_posterior": OurName("variance", "beta (for 1)", "diffusion.variance"),
    "sigma_small": OurName("variance", "beta (for false)", "diffusion.variance"),
    "xstart": OurName("parameterization", "x0 (for true)", "parameterization"),
    "predict_xstart": OurName("parameterization", "x0 (for true)", "parameterization"),
    "num_channels": OurName("model_channels", "N", PARAMS),
    "class_cond": OurName("num_classes", "N (for true)", PARAMS),
    "learn_sigma": OurName("out_channels", "N (for true twice in_channels)", PARAMS),
}
NOT_HERE = {
    "num_heads_upsample": "only its default -1 works, as many heads as num_heads; leave it out",
    "use_fp16": "precision is --precision bf16, in a config trainer.precision",
    "timestep_respacing": "sampling steps are -c N",
    "rescale_learned_sigmas": "it is an option of guided-diffusion's loss; leave it out",
    "use_kl": "it is an option of guided-diffusion's loss; leave it out",
}  # options that neither hints nor the keys of a model have

TRAINING_KEYS = {
    "lr": "trainer.learning_rate=X",
    "base_learning_rate": "trainer.learning_rate=X",
    "ema_rate": "trainer.ema_decay=X",
    "weight_decay": "trainer.weight_decay=X",
    "lr_anneal_steps": "trainer.max_steps=N",
    "max_epochs": "trainer.max_steps=N",
    "accumulate_grad_batches": "trainer.accumulate=N",
    "save_interval": "logging.save_every=N",
    "every_n_train_steps": "logging.save_every=N",
    "data_dir": "data.path=FOLDER",
    "exp_dir": "logging.dir=FOLDER",
    "BATCH": "distill.rho=X",
    "stu_batch_size": "distill.batch_size=N",
    "iter_choice": "distill.variant=NAME",
    "tempfile": "distill.pool_from=PATH",
    "cache_path": "distill.pool_from=PATH",
    "prob": "distill.discard=X",
    "input_perturb": "distill.input_perturbation=X",
    "teacher_ckp": "teacher.ckpt=PATH",
    "model_path": "teacher.ckpt=PATH",
}  # keys of the trainings of the public DKDM code, guided-diffusion and CompVis -> what to write


class UnknownKey(UserError):
    """A key that a section does not have.

    Args:
        place: the dotted key, for the message.
        key: its last part.
        valid: the section's keys.
    """

    def __init__(self, place: str, key: str, valid: Collection[str]) -> None:
        self.place, self.key, self.valid = place, key, valid
        super().__init__(f"{place}: unknown key{advice(key, valid)}")

    def within(self, schema: Any) -> UserError:
        """The error in a config of a schema, where a key of another section may be the right one."""
        return UserError(f"{self.place}: unknown key{advice(self.key, self.valid, _places(schema))}")


def _places(schema: Any) -> set[str]:
    """The dotted keys of a config: section.key."""
    hints = typing.get_type_hints(schema).items()
    options = [(name, option) for name, hint in hints for option in (hint, *typing.get_args(hint))]
    return {f"{name}.{f.name}" for name, option in options if is_dataclass(option) for f in fields(option)}


def advice(key: str, valid: Collection[str], places: Collection[str] | None = None) -> str:
    """The end of a message on an unknown key: our name for another code's, else the nearest valid key, or all.

    Args:
        key: as the user wrote it.
        valid: the keys where it stands.
        places: the dotted keys of the whole config; None: unknown, as for the parameters of a network.
    """
    if key in OUR_NAMES:
        own = OUR_NAMES[key]
        if own.hint in valid or own.place == PARAMS:
            return f"; here it is '{own.hint}'"
        if places is None or own.place in places:
            return f"; here it is {own.place}"
    ours = TRAINING_KEYS.get(key, "").partition("=")[0]
    if ours in (places or ()):
        return f"; here it is {ours}"
    return f"; {NOT_HERE[key]}" if key in NOT_HERE else nearest(key, valid)
