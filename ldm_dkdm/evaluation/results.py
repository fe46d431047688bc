"""Write figures: a JSON file, a row of a CSV file, the record of a run, tables over several."""

import csv
import datetime
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.card import AGREEMENT_BY, FIGURES, MEASURED_WITH, RECORDS
from ldm_dkdm.checkpoints.source import Source
from ldm_dkdm.config.load import RUN_KIND, card_kind
from ldm_dkdm.config.recipes import find_shipped
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.evaluation.json_files import write_json
from ldm_dkdm.evaluation.sources import key_of
from ldm_dkdm.files import JSON_BYTES, locked, read_text, require_file, write_text
from ldm_dkdm.reporting import names_apart

Record = Mapping[str, Any]  # as `Measurement.record` makes it
SAMPLING = (
    "images",
    "seeds",
    "sampler",
    "steps",
    "eta",
    "labels",
    "guidance",
    "arithmetic",
    "weights",
    "opened_from",
    "opened_from_sha256",
    "sha256",
    "size",
    "resized",
    "rounding",
    AGREEMENT_BY,
)
OF_REFERENCE = ("images", "seeds", "weights", "sha256", "size", "resized", "rounding")
ORDER = ("FID", "sFID", "FD", "IS", "precision", "recall", "KID", "PSNR", "SSIM", "LPIPS")
SPEED = "_images_per_second"  # ends the names of figures that differ from call to call
DETAILS = ("agreement_q", "untrained_", "teacher_", "student_")  # prefixes of figures that tables leave out
SETTINGS = ("images", "sampler", "reference", AGREEMENT_BY)
NETWORK = ("parameters", "GFLOPs")
BEFORE = ("model", *NETWORK, *SETTINGS)
DISTANCES = ("FID", "sFID", "FD", "KID", "precision", "recall")  # figures that depend on the reference
PRIME = "A prime (FID') marks a figure against samples of a model, the teacher, in place of data (Tab. 11)."
AGREEMENT = "eps error by quarter of t"


def row_of(record: Record) -> dict[str, Any]:
    """A record as one row: figures, the samples' sampling, the reference, extractors, warnings."""
    samples, reference = record["samples"], record["reference"] or {}
    row = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "samples": samples["source"]}
    row |= {"reference": reference.get("source"), **{n: v for n, v in record["figures"].items() if _is_number(v)}}
    row |= {name: samples.get(name) for name in SAMPLING}
    row |= {f"reference {name}": reference.get(name) for name in OF_REFERENCE}
    for name in ("features", "weights_sha256", "resize"):
        row[f"extractor {name}"] = "; ".join(str(features[name]) for features in record["features"])
    return {**row, "warnings": "; ".join(record["warnings"]), "ldm_dkdm": record["ldm_dkdm"]}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file of results; an empty list without a file.

    Raises:
        UserError: a file that is not one.
    """
    require_file(path)
    if not path.exists():
        return []
    try:
        with blaming(path, "is not a CSV file of results"), path.open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), reader.fieldnames
    except csv.Error as error:
        raise UserError(f"{path}: is not a CSV file of results: {error}") from error
    if any(None in row for row in rows) or (columns is not None and "samples" not in columns):
        raise UserError(f"{path}: is not a CSV file of results")
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> bool:
    """Add a row to a CSV file, atomically, one process at a time; new figures make new columns.

    Returns:
        False where an earlier row says the same but for its date and speeds, as after a call that reused statistics of
        the cache; then nothing is written.

    Raises:
        UserError: as `read_rows`.
    """
    with locked(path):
        known = read_rows(path)
        if any(_same(old, row) for old in known):
            return False
        rows = [*known, row]
        columns = dict.fromkeys(name for known in rows for name in known)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
        return True


def _same(old: Mapping[str, str], row: Mapping[str, Any]) -> bool:
    """Whether a row says nothing new: other dates and speeds do not count, but speeds where there were none."""
    if any(row[name] is not None and not old.get(name) for name in row if name.endswith(SPEED)):
        return False
    names = {name for name in {*old, *row} - {"date"} if not name.endswith(SPEED)}
    return all((old.get(name) or "") == ("" if row.get(name) is None else str(row[name])) for name in names)


def records_of(model: Path | None) -> Path | None:
    """The folder of the records beside a run's model; None outside runs."""
    return model / RECORDS if model is not None and model.is_dir() and _in_run(model) else None


def record_in_run(model: Path | None, record: Record) -> Path | None:
    """Keep a record beside a run's model, together with other figures of the same two sets; None outside runs."""
    records = records_of(model)
    if records is None:
        return None
    key = key_of(record["samples"], record["reference"])[:8]
    name = Path(str((record["reference"] or {}).get("source") or "alone")).stem
    path = records / f"{name}-{key}.json"
    with locked(path):
        write_json(path, _joined(_read(path), record) if path.is_file() else record)
    return path


def _joined(known: Record, record: Record) -> Record:
    """Figures of two calls on the same two sets in one record; those of the later one count."""
    versions = {**_versions(known), **_versions(record)}
    features = {(used["features"], used["weights_sha256"]): used for used in [*known["features"], *record["features"]]}
    figures = {**known["figures"], **record["figures"]}
    warnings = list(dict.fromkeys([*known["warnings"], *record["warnings"]]))
    joined = {"figures": figures, "features": list(features.values()), "warnings": warnings, "versions": versions}
    return {**record, **joined}


def _versions(record: Record) -> dict[str, str]:
    """The package's version by figure: records of several calls hold several."""
    return {name: record.get("versions", {}).get(name, record["ldm_dkdm"]) for name in record["figures"]}


def _in_run(model: Path) -> bool:
    config = model.parent / "config.yaml"
    return config.is_file() and card_kind(config) == RUN_KIND


def _read(path: Path) -> dict[str, Any]:
    with blaming(path, "is not a record of an evaluation"):
        record = json.loads(read_text(path, JSON_BYTES))
        names = ("figures", "samples", "reference", "features", "warnings", "ldm_dkdm")
        return {name: record[name] for name in names} | {"versions": record.get("versions", {})}


def table(paths: Iterable[str | Path]) -> str:
    """Figures of evaluated runs, and of JSON records, as Markdown: a row per run and pair of sets (Tab. 2, 3, 11).

    A prime marks distances to a model's samples, as the paper's FID' and sFID'. How several rows were sampled stands
    below them where it is the same for all, and runs without figures are named there.

    Raises:
        UserError: a path that is not there, a file that is not a record, or no figures at all.
    """
    homes = {path: _home(Path(path)) for path in paths}
    places = list(dict.fromkeys(home.absolute() for home in homes.values() if home))
    titles = dict(zip(places, names_apart(places), strict=True))
    found = {
        path: _rows(home, titles[home.absolute()]) if home else [_row(_read(Path(path)))]
        for path, home in homes.items()
    }
    rows = [row for own in found.values() for row in own]
    if not rows:
        raise UserError(_unmeasured(found))
    names = dict.fromkeys(name for row in rows for name in row)
    same = [name for name in SETTINGS if len(rows) > 1 and len({row.get(name, "") for row in rows}) == 1]
    figures = sorted((name for name in names if name not in BEFORE), key=_rank)
    columns = [*(name for name in BEFORE if name in names and name not in same), *figures]
    below = [", ".join(f"{name} {rows[0][name]}" for name in same if name in names)]
    below += [PRIME] if any(name.endswith("'") for name in names) else []
    below += [_unmeasured({path: own for path, own in found.items() if not own})]
    return "\n\n".join([markdown(columns, rows), *filter(None, below)])


def _unmeasured(paths: Iterable[str | Path]) -> str:
    names = list(map(str, paths))
    if not names:
        return ""
    what = "has not been evaluated" if len(names) == 1 else "have not been evaluated"
    return f"{', '.join(names)}: {what}; dkdm evaluate {names[0]} REFERENCE does it, -r {names[0]} for a student"


def _rank(name: str) -> tuple[int, str]:
    first = next((i for i, start in enumerate(ORDER) if name.partition("-")[0].startswith(start)), len(ORDER))
    return first, name


def _home(path: Path) -> Path | None:
    """The model folder of a run or a model; None for a JSON record."""
    if path.suffix.lower() == ".json":
        return None
    if not find_shipped(path).exists():
        raise UserError(f"{path}: no such run, model or JSON file of an evaluation; correct the path")
    home = Source(path).path
    return home if home.is_dir() else home.parent


def _rows(home: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a model folder, with a name for the model."""
    own = _without_data(home / FIGURES)
    network = {key: value for key, value in own.items() if key in NETWORK}
    records = [_read(file) for file in sorted((home / RECORDS).glob("*.json"))]
    rows = [{**_row(record), "model": name + _of_checkpoint(record["samples"])} for record in records]
    # records with an agreement of their own, and those of checkpoints, which FIGURES is not of
    measured = [bool({AGREEMENT, AGREEMENT_BY} & row.keys()) or row["model"] != name for row in rows]
    whole = [{**(network if known else own), **row} for row, known in zip(rows, measured, strict=True)]
    return whole + ([{**own, "model": name}] if own and all(measured) else [])


def _of_checkpoint(samples: Mapping[str, Any]) -> str:
    """What the name of a run's model needs where a training checkpoint was measured in its place."""
    file = Path(samples.get("opened_from") or "")
    if file.parent.name != "checkpoints":
        return ""
    return f"-{file.stem}" + ("-raw" if samples.get("weights") == "raw" else "")


def _row(record: Record) -> dict[str, Any]:
    samples, reference = record["samples"], record["reference"] or {}
    prime = "'" if reference.get("kind") == "model" else ""
    sampler = " ".join(str(samples[name]) for name in ("sampler", "steps") if samples.get(name))
    row = {"model": samples["source"], "parameters": _millions(samples.get("parameters")), "images": samples["images"]}
    row |= {"sampler": sampler, "reference": reference.get("source")}
    row |= _quarters(record["figures"]) | {AGREEMENT_BY: _options(samples.get(AGREEMENT_BY))}
    kept = _main(record["figures"])
    row |= {f"{name}{prime if name.startswith(DISTANCES) else ''}": value for name, value in kept.items()}
    return {name: value for name, value in row.items() if value not in (None, "")}


def _main(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that tables show; the quarters have a cell of their own."""
    numbers = {name: value for name, value in figures.items() if _is_number(value) and not name.endswith(" std")}
    return {name: value for name, value in numbers.items() if not name.startswith(DETAILS)}


def _without_data(path: Path) -> dict[str, Any]:
    """Parameters, GFLOPs and figures out of a run's evaluation.json, which `-r` writes, if there is one."""
    if not path.is_file():
        return {}
    with blaming(path, "is not a file of figures"):
        figures = json.loads(read_text(path, JSON_BYTES))
        own = {"parameters": _millions(figures["student_parameters"]), "GFLOPs": figures["student_gflops"]}
        by = _options(figures.get(MEASURED_WITH))
        return {**own, **_quarters(figures), **_main(figures), **({AGREEMENT_BY: by} if by else {})}


def _quarters(figures: Mapping[str, Any]) -> dict[str, str]:
    """The eps errors by quarter of t in one cell; nothing where they were not measured."""
    named = [figures[f"agreement_q{n}"] for n in range(1, 5) if f"agreement_q{n}" in figures]
    errors = named or figures.get("eps_mse_by_t_quarter", [])  # the key of older versions
    return {AGREEMENT: " ".join(f"{error:.3g}" for error in errors)} if errors else {}


def _options(measured_with: str | None) -> str | None:
    """The options in `comparison.measured_with`."""
    return measured_with and measured_with.partition("dkdm evaluate ")[2]


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.1f} M"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table with aligned columns."""
    cells = [[_shown(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
