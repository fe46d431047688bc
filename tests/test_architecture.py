"""The rules of the house, checked on the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm_dkdm"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
# A part may import the layers before its own, and itself; parts of one layer do not know each other.
LAYERS = [
    {"errors"},
    {"rng", "files", "device", "reporting"},
    {"records", "images"},
    {"config"},
    {"diffusion", "networks", "first_stage"},
    {"denoiser", "generate"},
    {"teacher", "pixel"},
    {"checkpoints", "distillation"},
    {"sources"},
    {"assemble"},
    {"evaluation"},
    {"training"},
    {"commands"},
    {"scripts"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
OVERRIDES = {"forward", "training_step", "configure_optimizers", "transfer_batch_to_device", "should_update"}


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
    return {name.split(".")[1] for name in names if name.startswith("ldm_dkdm.")}


def test_imports_run_one_way() -> None:
    wrong = [
        (_name(path), part)
        for path in SOURCES
        if path != PACKAGE / "__init__.py"
        for part in _imported_parts(path) - {_part(path)}
        if LEVEL[part] >= LEVEL[_part(path)]
    ]
    assert wrong == []


def test_the_layers_keep_the_order_of_the_design() -> None:
    chain = ["records", "diffusion", "teacher", "distillation", "training", "commands", "scripts"]
    assert sorted(chain, key=LEVEL.get) == chain
    assert LEVEL["diffusion"] == LEVEL["networks"] == LEVEL["first_stage"]


def test_folders_are_one_level_deep() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 2] == []


def test_no_file_is_longer_than_300_lines() -> None:
    files = [*SOURCES, *(ROOT / "tests").glob("*.py")]
    assert [_name(path) for path in files if len(path.read_text().splitlines()) > 300] == []


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
