"""Keep the teacher's part of the agreement in a file, for resumes and for the next student."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ldm_dkdm.checkpoints.hashes import check_content
from ldm_dkdm.checkpoints.reading import file_kind
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.errors import MALFORMED, UserError
from ldm_dkdm.evaluation import agreement
from ldm_dkdm.evaluation.agreement import Reference, Sizes, new_reference
from ldm_dkdm.evaluation.extractor import SHORT
from ldm_dkdm.evaluation.held_out import HeldOutStates, kept_timesteps
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.evaluation.sources import key_of
from ldm_dkdm.files import write_tensors
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.reporting import Progress, in_home, logger

LAYOUT = 1  # version of what is cached; raise it when the chains or their seeds change


def save_reference(reference: Reference, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a reference to a safetensors file, atomically, with what it follows from."""
    states = reference.states
    tensors = {"x": states.x, "t": states.t, "eps": states.eps, "drift": reference.drift, "images": reference.images}
    labels = {"states_label": states.label, "label": reference.label}
    tensors |= {name: label for name, label in labels.items() if label is not None}
    numbers = {"seed": reference.seed, "steps": reference.steps}
    write_tensors(path, tensors, {"reference": json.dumps({"facts": facts, **numbers})})


def read_reference(path: Path, facts: Mapping[str, Any]) -> Reference | None:
    """Read what `save_reference` wrote; None if there is none, one of other facts, or one that is not finite."""
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
        if not (states.is_finite().all() and found["drift"].isfinite().all()):
            return None
        steps = header.get("steps") or header["facts"]["steps"]  # as older versions wrote it
        return Reference(states, found["drift"], found["images"], found.get("label"), header["seed"], steps)
    except (SafetensorError, OSError, *MALFORMED, UserError):  # it is computed again
        return None


def cached_reference(
    teacher: DiffusionModel, seed: int, sizes: Sizes, cache: Path, batch_size: int, progress: bool | Progress
) -> Reference:
    """The reference of `new_reference`; in `cache`, a folder, from the second call with this teacher on."""
    identity = sampled(teacher, SamplingConfig(sizes.images, batch_size, seed, sizes.steps)).identity()
    facts = {**identity, **asdict(sizes), "seed": seed, "kept_states": agreement.KEPT_STATES}
    total, count = teacher.schedule.num_timesteps, agreement.KEPT_STATES
    if total > count and total % count:  # other timesteps than older versions kept, which did not say which
        facts["kept_timesteps"] = kept_timesteps(total, count)
    key = key_of("agreement", LAYOUT, facts)
    file = cache / f"{key}.safetensors"
    known = read_reference(file, facts)
    if known is not None:
        logger.info(f"chains and images of the teacher are reused: {in_home(cache)}/{key[:SHORT]}*.safetensors")
        return known
    found = new_reference(teacher, seed, sizes, batch_size=batch_size, progress=progress)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_reference(found, file, facts)
    except OSError as error:
        logger.warning(f"{in_home(cache)}: {error.strerror or error}; chains and images of the teacher are not kept")
    return found


def reference_facts() -> dict[str, int]:
    """The sizes that a training's reference depends on."""
    return {**asdict(agreement.TRAINING), "kept_states": agreement.KEPT_STATES}
