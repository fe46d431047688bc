"""What a call into a library should leave as it was in the process."""

import logging
import os
import random
import signal
import sys
import warnings


def process_state() -> dict[str, object]:
    """Filters, handlers, loggers, environment; with NumPy and torch, their generators and switches too."""
    signals = {number: signal.getsignal(number) for number in sorted(signal.valid_signals())}
    state: dict[str, object] = {
        "warnings": list(warnings.filters),
        "signals": signals,
        "log handlers": list(logging.root.handlers),
        "log level": logging.root.level,
        "environment": dict(os.environ),
        "random": random.getstate(),
        "hooks": (sys.excepthook, sys.stdout, sys.stderr),
        "path": list(sys.path),
    }
    if "lightning" in sys.modules:  # its first import sets its own levels
        state["lightning"] = [logging.getLogger(name).level for name in ("lightning", "lightning.pytorch")]
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, keys.tobytes(), *rest)
        state["numpy errors"] = numpy.geterr()
    if torch := sys.modules.get("torch"):
        cudnn = torch.backends.cudnn
        state |= {
            "torch": torch.get_rng_state().numpy().tobytes(),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "defaults": (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision()),
            "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    return state


def changes(before: dict[str, object]) -> dict[str, object]:
    """What differs from an earlier state: (before, now), of a mapping by name."""
    now = process_state()
    found = {key: (before[key], now[key]) for key in before if before[key] != now[key]}
    for key, (old, new) in found.items():
        if isinstance(old, dict):
            found[key] = [(name, old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)]
    return found
