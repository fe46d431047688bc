"""Names that guided-diffusion, improved-diffusion and CompVis have for what has another name here."""

from collections.abc import Collection
from dataclasses import dataclass

from ldm_dkdm.errors import nearest


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


def advice(key: str, valid: Collection[str]) -> str:
    """The end of a message on an unknown key: our name for another code's, else the nearest valid key, or all."""
    if key in OUR_NAMES:
        own = OUR_NAMES[key]
        found = f"'{own.hint}'" if own.hint in valid or own.place == PARAMS else own.place
        return f"; here it is {found}"
    if key in TRAINING_KEYS:
        return f"; here it is {TRAINING_KEYS[key].partition('=')[0]}"
    return f"; {NOT_HERE[key]}" if key in NOT_HERE else nearest(key, valid)
