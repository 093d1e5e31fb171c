"""Imports run downwards: a module uses only modules of the floors below its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skanomaly"

FLOORS = [  # from the ground up; modules of one floor do not import each other
    {"filters", "processes", "version"},
    {"losses", "masking", "neighbors", "networks", "synthesis"},
    {"checkpoint", "persistence", "training"},
    {"base"},
    {"backbones", "images", "pipeline"},
    {
        "autoencoder",
        "descargan",
        "differnet",
        "draem",
        "intra",
        "memae",
        "mnad",
        "pnet",
        "riad",
        "scadn",
        "smai",
        "spade",
    },
    {"calibration", "datasets", "display", "metrics", "model_selection"},
    {"onnx"},
    {"__init__"},
]
FLOOR_OF = {module: i for i, floor in enumerate(FLOORS) for module in floor}

# Imported only inside the functions that need them.
LATE = {"matplotlib", "onnx", "onnxscript", "pynndescent", "skimage", "torchvision"}

TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}


def module_level(node):
    """Yield the nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from module_level(child)


def imported(nodes):
    """Yield the absolute dotted name of all that the nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = f"skanomaly.{module}".rstrip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def siblings(nodes):
    """Yield the modules of the package that the nodes import."""
    for name in imported(nodes):
        package, *rest = name.split(".")
        if package == "skanomaly":
            yield rest[0] if rest and rest[0] in TREES else "__init__"


def test_each_module_has_a_floor():
    assert set(TREES) == set(FLOOR_OF)
    assert len(FLOOR_OF) == sum(map(len, FLOORS))


@pytest.mark.parametrize("module", TREES)
def test_imports_run_downwards(module):
    used = set(siblings(ast.walk(TREES[module])))
    assert not {name for name in used if FLOOR_OF[name] >= FLOOR_OF[module]}


@pytest.mark.parametrize("module", TREES)
def test_heavy_libraries_are_imported_late(module):
    libraries = {name.split(".")[0] for name in imported(module_level(TREES[module]))}
    assert not libraries & LATE
