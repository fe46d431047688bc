"""Keep the teacher's part of the agreement in a file, for resumes."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ldm_dkdm.checkpoints.hashes import check_content
from ldm_dkdm.checkpoints.reading import file_kind
from ldm_dkdm.errors import MALFORMED, UserError
from ldm_dkdm.evaluation import agreement
from ldm_dkdm.evaluation.agreement import Reference
from ldm_dkdm.evaluation.held_out import HeldOutStates
from ldm_dkdm.files import write_tensors


def save_reference(reference: Reference, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a reference to a safetensors file, atomically, with what it follows from."""
    states = reference.states
    tensors = {"x": states.x, "t": states.t, "eps": states.eps, "drift": reference.drift, "images": reference.images}
    labels = {"states_label": states.label, "label": reference.label}
    tensors |= {name: label for name, label in labels.items() if label is not None}
    numbers = {"seed": reference.seed, "steps": reference.steps}
    write_tensors(path, tensors, {"reference": json.dumps({"facts": facts, **numbers})})


def read_reference(path: Path, facts: Mapping[str, Any]) -> Reference | None:
    """Read what `save_reference` wrote; None if there is none, or one that follows from other facts."""
    if not path.is_file():
        return None
    try:
        file_kind(path)  # refuses a header without end
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["reference"])
            if header["facts"] != json.loads(json.dumps(facts)):
                return None
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            check_content(path, found, file.metadata())
        states = HeldOutStates(found["x"], found["t"], found["eps"], found.get("states_label"))
        steps = header.get("steps") or header["facts"]["steps"]  # as older versions wrote it
        return Reference(states, found["drift"], found["images"], found.get("label"), header["seed"], steps)
    except (SafetensorError, OSError, *MALFORMED, UserError):  # it is computed again
        return None


def reference_facts() -> dict[str, int]:
    """The sizes that a training's reference depends on."""
    return {**asdict(agreement.TRAINING), "kept_states": agreement.KEPT_STATES}
