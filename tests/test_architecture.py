"""The rules of the house, checked on the source."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import ldm_dkdm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm_dkdm"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
# A part may import the layers before its own, and itself; parts of one layer do not import each other.
LAYERS = [
    {"errors"},
    {"rng", "files", "device", "reporting", "records"},
    {"npz"},
    {"images"},
    {"pixel"},
    {"diffusion", "networks", "first_stage", "config"},
    {"checkpoints"},
    {"model"},
    {"distillation", "evaluation", "reports"},
    {"training"},
    {"commands"},
    {"__main__"},
    {"scripts"},
]
EXCEPTIONS = {
    (
        "ldm_dkdm/model/diffusion_model.py",
        "evaluation",
    ): "model.check() is the teacher check, which it imports when it is called",
    ("ldm_dkdm/first_stage/vqgan.py", "config"): "the training module of a first stage takes its run's config",
}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
OVERRIDES = {
    "forward",
    "training_step",
    "configure_optimizers",
    "transfer_batch_to_device",
    "train_dataloader",
    "get_metrics",
    "init_train_tqdm",
    "log_metrics",
    "name",
    "version",
    "should_update",
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _part(path: Path) -> str:
    inside = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT)
    return inside.parts[0].removesuffix(".py")


def _imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {name.split(".")[1] for name in names if name.startswith("ldm_dkdm.")}
    return {ldm_dkdm._HOMES.get(part, f".{part}").split(".")[1] for part in parts} - {"__version__"}


def _upward_imports() -> set[tuple[str, str]]:
    """(file, part) wherever a file imports a part that is not below its own."""
    return {
        (_name(path), part)
        for path in SOURCES
        if path != PACKAGE / "__init__.py"
        for part in _imported_parts(path) - {_part(path)}
        if LEVEL[part] >= LEVEL[_part(path)]
    }


def test_imports_run_one_way() -> None:
    assert _upward_imports() == set(EXCEPTIONS)


def test_the_model_imports_the_teacher_check_only_inside_a_function() -> None:
    bodies = [ast.parse(path.read_text()).body for path in (PACKAGE / "model").glob("*.py")]
    imported = {f"{node.module}" for body in bodies for node in body if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith("ldm_dkdm.evaluation")]


def test_the_layers_keep_the_order_of_the_design() -> None:
    chain = ["records", "pixel", "diffusion", "checkpoints", "model", "distillation", "training", "commands", "scripts"]
    assert sorted(chain, key=LEVEL.get) == chain
    assert LEVEL["diffusion"] == LEVEL["networks"] == LEVEL["first_stage"] == LEVEL["config"]
    assert LEVEL["distillation"] == LEVEL["evaluation"]


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {_part(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts == set(LEVEL) - {"scripts"}


def test_the_top_level_has_at_most_10_modules() -> None:
    assert len({path.name for path in PACKAGE.glob("*.py")} - {"__main__.py"}) <= 10


def test_folders_are_one_level_deep() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 2] == []


def test_no_file_is_longer_than_300_lines() -> None:
    files = [*SOURCES, *(ROOT / "tests").glob("*.py")]
    assert [_name(path) for path in files if len(path.read_text().splitlines()) > 300] == []


def test_half_of_the_files_are_not_longer_than_150_lines() -> None:
    lengths = [len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")]
    assert statistics.median(lengths) <= 150


def _calls(path: Path) -> set[str]:
    """Names of the functions that a file calls."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {node.func.id for node in nodes if isinstance(node.func, ast.Name)}


def _imports_argparse(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text()))
    return any(alias.name == "argparse" for node in nodes if isinstance(node, ast.Import) for alias in node.names)


def test_command_lines_are_read_in_commands_only() -> None:
    found = {_name(path) for path in SOURCES if _imports_argparse(path)}
    assert {name for name in found if not name.startswith(("ldm_dkdm/commands/", "scripts/prepare_"))} == set()


def test_only_commands_and_scripts_print() -> None:
    found = {_name(path) for path in SOURCES if "print" in _calls(path)}
    assert {name for name in found if not name.startswith(("ldm_dkdm/commands/", "scripts/"))} == set()


@pytest.mark.parametrize("banned", [".cuda(", "weights_only=False", "NotImplementedError"])
def test_nothing_is_tied_to_cuda_trusts_pickles_or_is_left_undone(banned: str) -> None:
    assert [_name(path) for path in SOURCES if banned in path.read_text()] == []


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{node.name}.")


def test_modules_and_public_names_have_docstrings() -> None:
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        missing += [] if ast.get_docstring(tree) else [_name(path)]
        wanted = [(name, node) for name, node in _public(tree.body) if PACKAGE in path.parents]
        missing += [f"{_name(path)}: {name}" for name, node in wanted if not _documented(node)]
    assert missing == []


def _documented(node: ast.FunctionDef | ast.ClassDef) -> bool:
    hook = node.name in OVERRIDES or node.name.startswith("on_")
    return hook or ast.get_docstring(node) is not None


def _unannotated(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in named if a and a.annotation is None and a.arg not in ("self", "cls")]
    return missing + ([] if function.returns else ["return"])


def test_functions_are_annotated() -> None:
    found = [
        (_name(path), node.name, _unannotated(node))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert [row for row in found if row[2]] == []


def test_functions_are_short() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for file in (ROOT / "ldm_dkdm").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[-1] <= 60
    assert lengths[len(lengths) * 9 // 10] <= 35
    assert lengths[len(lengths) // 2] <= 8
