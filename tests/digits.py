"""Runs on scikit-learn's digits, 8x8: configurations and entry points."""

from pathlib import Path

from tests.cli import run_script, write_yaml

UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 32,
    "num_classes": 10,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
DIT = {
    "input_size": 8,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "class_dropout_prob": 0.0,
}
PIXEL = {"space": "pixel", "schedule": "cosine", "num_timesteps": 40}
TRAINER = {"max_steps": 6, "learning_rate": 1e-3, "precision": "32", "accelerator": "cpu", "ema_decay": 0.9}
LOGGING = {"save_every": 3, "sample_every": 6, "sample_count": 4, "sample_steps": 4, "evaluate_every": 0}


def train(home: Path, name: str, data: dict[str, object], **sections: dict[str, object]) -> int:
    """Train on data (Alg. 2) into home/name; -> exit code."""
    config = {
        "model": sections.get("model", {"target": "ldm_dkdm.networks.UNet", "params": UNET}),
        "diffusion": PIXEL,
        "data": {"image_size": 8, "batch_size": 8, "flip": False, **data},
        "trainer": {**TRAINER, **sections.get("trainer", {})},
        "logging": {**LOGGING, "dir": str(home), "name": name},
    }
    return run_script("train_ldm.py", "--base", write_yaml(home / f"{name}.yaml", config))


def distil_config(ckpt: Path, home: Path, name: str, **sections: dict[str, object]) -> Path:
    config: dict[str, dict[str, object]] = {
        "teacher": {"ckpt": str(ckpt), "check": False},
        "student": {"target": "ldm_dkdm.networks.UNet", "params": UNET},
        "distill": {"batch_size": 8, "rho": 0.2, "warmup": {"mode": "ddim", "steps": 4, "images": 16}},
        "trainer": dict(TRAINER),
        "logging": {**LOGGING, "dir": str(home), "name": name},
    }
    for section, values in sections.items():
        config[section] |= values
    return write_yaml(home / f"{name}.yaml", config)
