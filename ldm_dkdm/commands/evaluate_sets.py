"""What `dkdm evaluate SAMPLES [REFERENCE]` does: opens both sets, measures, has the result printed and written."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_dkdm.commands.arguments import flags, load_plugins
from ldm_dkdm.commands.evaluate_output import add_row, show
from ldm_dkdm.commands.hints import ScopedHints
from ldm_dkdm.commands.places import require_kept
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded
from ldm_dkdm.reporting import logger

if TYPE_CHECKING:
    import torch

    from ldm_dkdm.evaluation.measurement import Measurement
    from ldm_dkdm.model import DiffusionModel

SCOPES = ("samples", "reference")
RESULTS = Path("logs/results.csv")
FLAGS = {
    "count": "--n_samples",
    "steps": "--custom_steps",
    "metrics": "--metrics",
    "features": "--features",
    "sampler": "--sampler",
    "eta": "--eta",
    "labels": "--labels",
    "seed": "--seed",
    "reference_seed": "--reference_seed",
    "batch_size": "--batch_size",
    "size": "--size",
    "samples": "SAMPLES",
    "reference": "REFERENCE",
    "device": "--device",
    "processes": "--processes",
    "cache": "--cache",
    "chains": "--chains",
    "pairs": "--pairs",
    "lpips": "--lpips",
    "first_stage": "--first_stage",
}


def measure_sets(options: argparse.Namespace, paths: Sequence[str], items: Sequence[str]) -> None:
    """Measure SAMPLES against REFERENCE, by default the teacher of SAMPLES if that is a distillation's run."""
    hints = ScopedHints(items, SCOPES)
    load_plugins(options.plugin)

    from ldm_dkdm.device import resolve_device
    from ldm_dkdm.evaluation.json_files import write_json
    from ldm_dkdm.evaluation.measurement import measure
    from ldm_dkdm.evaluation.results import read_rows, record_in_run, records_of
    from ldm_dkdm.model.ranks import joined

    if options.processes > 1 and joined().ranks > 1:
        raise UserError(f"--processes: {joined().ranks} ranks are started, which share the images; leave it out")
    read_rows(options.results)  # refuses another file before anything is measured
    with flags(**FLAGS):
        device = resolve_device(options.device)
        samples, reference = _opened(options, paths, hints, device)
        _require_effect(options, samples, reference)
        if options.save_statistics:
            _require_place(options, reference is not None)
        records = records_of(getattr(samples, "path", None)) if options.out is None else None
        if records is not None:
            require_kept(records, folder=True)
        found = measure(
            samples,
            reference,
            metrics=options.metrics,
            features=options.features,
            count=options.n_samples,
            steps=options.custom_steps,
            sampler=options.sampler,
            eta=options.eta,
            seed=options.seed or 0,
            reference_seed=options.reference_seed,
            labels=options.labels,
            batch_size=options.batch_size,
            size=options.size,
            chains=options.chains,
            pairs=options.pairs,
            lpips=options.lpips,
            cache=options.cache,
            device=device,
            processes=options.processes,
            progress=True,
        )
    if not joined().first:
        return
    record = found.record()
    show(found)
    add_row(options.results, found)
    kept = record_in_run(getattr(samples, "path", None), record) if options.out is None else None
    if options.out is not None:
        write_json(options.out, record)
    if place := options.out or kept:
        print(f"{place}: the figures and what they were measured on")
    if options.save_statistics:
        _save_statistics(found, options.save_statistics)


def _opened(
    options: argparse.Namespace, paths: Sequence[str], hints: ScopedHints, device: "torch.device"
) -> tuple[Any, Any]:
    """SAMPLES and REFERENCE: models that are opened, and paths of all else."""
    from ldm_dkdm.evaluation.features import named_features
    from ldm_dkdm.evaluation.measurement import chosen_metrics
    from ldm_dkdm.evaluation.metrics import METRICS
    from ldm_dkdm.evaluation.opening import is_model, require_set

    if len(paths) > 1 and options.teacher is not None:
        raise UserError(f"--teacher: has no effect; REFERENCE is {paths[1]}")
    own = paths[0]
    given = paths[1] if len(paths) > 1 else options.teacher
    for scope, path in (("SAMPLES", own), ("REFERENCE", given)):
        if path is not None:
            require_set(expanded(path), scope)
    models: dict[str, DiffusionModel] = {}
    samples: Any = own
    if is_model(expanded(own)):
        samples = models["samples"] = _model(own, hints, "samples", device, options.precision)
    reference: Any = given
    if given is not None and is_model(expanded(given)):
        reference = models["reference"] = _model(given, hints, "reference", device, options.precision)
    hints.require_used(models)
    if given is None and "samples" in models:
        wanted = options.metrics or chosen_metrics(None, named_features(options.features)[0], True)
        if any(name in METRICS and METRICS[name].reference for name in wanted):
            reference = _teacher(own, device, options.precision)
    return samples, reference


def _require_effect(options: argparse.Namespace, samples: object, reference: object) -> None:
    """Refuse flags that are for models where both sets are images; `measure` refuses the rest."""
    from ldm_dkdm.model import DiffusionModel

    if isinstance(samples, DiffusionModel) or isinstance(reference, DiffusionModel):
        return
    given = {"n_samples": options.n_samples, "seed": options.seed, "precision": options.precision != "32" or None}
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--{name}: has no effect; neither SAMPLES nor REFERENCE is a model")


def _model(path: str, hints: ScopedHints, scope: str, device: "torch.device", precision: str) -> "DiffusionModel":
    from ldm_dkdm.model import open_model

    return open_model(path, hints.of(scope), lenient=True).to(device, precision)


def _teacher(path: str, device: "torch.device", precision: str) -> "DiffusionModel | None":
    """The teacher of a distillation's run, which is then the reference; None for another model."""
    from ldm_dkdm.commands.evaluate import run_of, teacher_of

    run = run_of(expanded(path))
    if run is None:
        return None
    teacher = teacher_of(run, expanded(path)).to(device, precision)
    logger.info(f"REFERENCE: {teacher.path}, the teacher of {path}")
    return teacher


def _require_place(options: argparse.Namespace, reference: bool) -> None:
    """Refuse --save_statistics before the work where it could not be done after it."""
    from ldm_dkdm.evaluation.features import named_features
    from ldm_dkdm.evaluation.measurement import chosen_metrics
    from ldm_dkdm.evaluation.metric_figures import features_of
    from ldm_dkdm.evaluation.metrics import METRICS
    from ldm_dkdm.evaluation.statistics import require_place_for_statistics

    named = named_features(options.features)[0]
    used = [METRICS[name] for name in chosen_metrics(options.metrics, named, reference) if METRICS[name].of]
    if not used:
        raise UserError("--save_statistics: none of these metrics compares features")
    with flags(path="--save_statistics"):
        require_place_for_statistics(options.save_statistics, [*dict.fromkeys(features_of(own, named) for own in used)])


def _save_statistics(found: "Measurement", path: Path) -> None:
    next(iter(found.statistics.values())).write(path)
    print(f"{path}: statistics of SAMPLES, to be a REFERENCE")
