"""Options of CompVis's, guided-diffusion's and the public DKDM code's scripts, and what to write here."""

from collections.abc import Sequence

from ldm_dkdm.config.other_names import OUR_NAMES, TRAINING_KEYS

LEFT_OUT = "leave it out"
OTHER_FLAGS = {
    # CompVis's main.py, DKDM's main_dkdm.py
    "-t": f"{LEFT_OUT}, the command says what runs",
    "--train": f"{LEFT_OUT}, the command says what runs",
    "--no-test": f"{LEFT_OUT}, nothing is tested after a training",
    "-r": "write --resume RUN",
    "-n": "write logging.name=NAME",
    "--name": "write logging.name=NAME",
    "-f": "write logging.name=NAME",
    "--postfix": "write logging.name=NAME",
    "-p": "write --resume RUN, or logging.name=NAME for a new run",
    "--project": "write --resume RUN, or logging.name=NAME for a new run",
    "-l": "write logging.dir=FOLDER",
    "--logdir": "write logging.dir=FOLDER",
    "-s": "write trainer.seed=N",
    "--seed": "write trainer.seed=N",
    "-d": f"{LEFT_OUT}, --plan tries a few iterations",
    "--debug": f"{LEFT_OUT}, --plan tries a few iterations",
    "--scale_lr": f"{LEFT_OUT}, trainer.learning_rate=X is used as it is (--scale_lr False)",
    "--gpus": "write trainer.devices=N, the number of devices",
    "--devices": "write trainer.devices=N",
    "--nodes": "write trainer.num_nodes=N, the number of machines",
    "--num_nodes": "write trainer.num_nodes=N, the number of machines",
    "--strategy": "write trainer.strategy=NAME",
    "--accelerator": "write trainer.accelerator=gpu",
    "--precision": "write trainer.precision=32 or bf16",
    "--max_steps": "write trainer.max_steps=N",
    # the public DKDM code's image_kd.py, image_train.py and dynamic_prepare.py; guided-diffusion
    "--config": "write --base FILE",
    "--resume_checkpoint": "write --resume RUN",
    "--resume_step": f"{LEFT_OUT}, --resume RUN knows its step",
    "--wandb": "write logging.loggers=[csv,wandb]",
    "--batch_size": "write distill.batch_size=N, or data.batch_size=N for a training on images",
    "--microbatch": "write trainer.accumulate=N with a smaller batch_size",
    "--save_to": f"{LEFT_OUT}, a run keeps its pool, and distill.pool_from=PATH takes another's",
    "--use_fp16": "write trainer.precision=bf16, or for a sampling --precision bf16",
    "--model_path": "write -r MODEL, or teacher.ckpt=MODEL for a distillation",
    "--num_samples": "write -n N",
    "--timestep_respacing": "write -c N, with --sampler ddpm for ancestral steps",
    "--use_ddim": "write --sampler ddim, or --sampler ddpm for False",
    "--clip_denoised": f"{LEFT_OUT}, pixel space clips x_0 and latent space does not",
}
RUNS = {"distill": " for a distillation", "teacher": " for a distillation", "data": " for a training on images"}
OTHER_FLAGS = {
    f"--{name}": f"write {ours}{RUNS.get(ours.partition('.')[0], '')}" for name, ours in TRAINING_KEYS.items()
} | OTHER_FLAGS
OTHER_FLAGS |= {f"--{name}": own.flag for name, own in OUR_NAMES.items()}
OTHER_FLAGS |= {  # the other parameters of a network have our names
    f"--{name}": f"write {name}=VALUE, in a config a key of params"
    for name in ("image_size", "num_head_channels", "num_heads", "num_res_blocks", "use_new_attention_order")
}


def advice(given: Sequence[str], known: set[str]) -> str | None:
    """A line for the first option that other codes have and this command does not."""
    for item in given:
        flag = item.partition("=")[0]
        if flag in OTHER_FLAGS and flag not in known:
            return f"{flag}: is not an option here; {OTHER_FLAGS[flag]}"
    return None
