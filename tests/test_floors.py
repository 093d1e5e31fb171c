"""Imports run downwards: a module uses only modules of the floors below its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skanomaly"
METHODS = {f"methods.{path.stem}" for path in PACKAGE.glob("methods/[!_]*.py")}

FLOORS = [  # from the ground up; modules of one floor do not import each other
    {
        "version",
        "_extras",
        "_typing",
        "_tensors.filters",
        "_fitting.files",
        "_fitting.processes",
    },
    {
        "_backbones.efficientnet",
        "_backbones.weights",
        "_tensors.losses",
        "_tensors.masking",
        "_tensors.moments",
        "_tensors.neighbors",
        "_tensors.networks",
        "_tensors.synthesis",
        "_fitting.batches",
        "_fitting.loop",
        "_fitting.persistence",
    },
    {"_backbones.sources", "_fitting.progress"},
    {"_validation"},
    {"_regions"},
    {"_planting", "base"},
    {"backbones", "images", "pipeline"},
    {"_map_scores", "_patches", "_pictures"},
    METHODS,
    {"_datasets.masks", "_report"},
    {"_datasets.folders"},
    {"_datasets.layouts"},
    {
        "calibration",
        "datasets",
        "display",
        "inspection",
        "metrics",
        "model_selection",
        "tiling",
    },
    {"onnx"},
    {"__init__"},
]
FLOOR_OF = {module: i for i, floor in enumerate(FLOORS) for module in floor}
# what is for the package alone does not know what users see
ON_TENSORS_ONLY = {"numpy", "sklearn"}

# Imported only inside the functions that need them.
LATE = {
    "matplotlib",
    "onnx",
    "onnxscript",
    "pynndescent",
    "skimage",
    "timm",
    "torchvision",
}

TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == PACKAGE
}


def module_level(node):
    """Yield the nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from module_level(child)


def imported(module, nodes):
    """Yield the absolute dotted name of all that nodes of a module import."""
    folder = ["skanomaly", *module.split(".")[:-1]]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def siblings(module):
    """Yield the modules of the package that one of them imports, anywhere in it."""
    for name in imported(module, ast.walk(TREES[module])):
        package, *rest = name.split(".")
        if package == "skanomaly":
            candidates = [".".join(rest[:length]) for length in (2, 1)]
            yield next((name for name in candidates if name in TREES), "__init__")


def test_each_module_has_a_floor():
    assert set(TREES) == set(FLOOR_OF)
    assert len(FLOOR_OF) == sum(map(len, FLOORS))


@pytest.mark.parametrize("module", TREES)
def test_imports_run_downwards(module):
    used = set(siblings(module))
    assert not {name for name in used if FLOOR_OF[name] >= FLOOR_OF[module]}


def test_methods_are_imported_by_the_door_alone():
    """So that a method can be read, changed and removed by itself."""
    users = {module for module in TREES if METHODS & set(siblings(module))}
    assert users == {"__init__"}


TENSOR_MODULES = sorted(module for module in TREES if module.startswith("_tensors."))


@pytest.mark.parametrize("module", TENSOR_MODULES)
def test_functions_on_tensors_know_tensors_only(module):
    names = imported(module, ast.walk(TREES[module]))
    libraries = {name.split(".")[0] for name in names}
    # superpixels and the approximate index are NumPy's in the libraries that have them
    allowed = (
        {"numpy"} if module in ("_tensors.masking", "_tensors.neighbors") else set()
    )
    assert not (libraries & ON_TENSORS_ONLY) - allowed


@pytest.mark.parametrize("module", TREES)
def test_heavy_libraries_are_imported_late(module):
    names = imported(module, module_level(TREES[module]))
    libraries = {name.split(".")[0] for name in names}
    assert not libraries & LATE
