"""The public names are those that doc/api.rst lists, neither more nor fewer."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skanomaly
from skanomaly import _tensors, methods
from skanomaly.base import BaseDetector

MODULES = [
    "backbones",
    "datasets",
    "display",
    "images",
    "inspection",
    "metrics",
    "model_selection",
    "onnx",
    "pipeline",
]


def resolve(entry):
    """Return the object that an entry such as ``metrics.f1_max`` names."""
    *modules, name = entry.split(".")
    return getattr(importlib.import_module(".".join(["skanomaly", *modules])), name)


def test_top_level_names_are_listed(api_entries):
    assert len(set(api_entries)) == len(api_entries)
    top_level = [entry for entry in api_entries if "." not in entry]
    assert sorted(top_level) == sorted(skanomaly.__all__)


def test_entries_exist(api_entries):
    assert api_entries
    for entry in api_entries:
        assert callable(resolve(entry)), entry


@pytest.mark.parametrize("name", MODULES)
def test_public_names_of_a_module_are_listed(name, api_entries):
    module = importlib.import_module(f"skanomaly.{name}")
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }
    public &= set(getattr(module, "__all__", public))
    assert public
    listed = {entry.removeprefix(f"{name}.") for entry in api_entries}
    assert public <= listed


GUIDE = Path(skanomaly.__file__).parents[1] / "doc" / "user_guide"
HOMES = [
    *(f"methods.{info.name}" for info in pkgutil.iter_modules(methods.__path__)),
    *(f"_tensors.{info.name}" for info in pkgutil.iter_modules(_tensors.__path__)),
]


def exists(name):
    """Return whether a class or module of the package has what a table names."""
    first, rest = name.split(".", 1)
    owners = [getattr(skanomaly, first, None)]
    for home in HOMES:
        module = importlib.import_module(f"skanomaly.{home}")
        owners.append(
            module if home.endswith(f".{first}") else getattr(module, first, None)
        )
    return any(hasattr(owner, rest) for owner in owners if owner is not None)


def test_the_guide_names_code_that_exists():
    names = {
        name
        for page in GUIDE.glob("*.rst")
        for name in re.findall(
            r"^     - .*?``(\w+\.\w+)``", page.read_text(), flags=re.MULTILINE
        )
    }
    assert len(names) > 40
    assert not {name for name in names if not exists(name)}


def test_each_method_has_its_lines():
    """What a new method needs beside its file and its test."""
    for info in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"skanomaly.methods.{info.name}")
        own = [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value)
            and issubclass(value, BaseDetector)
            and value.__module__ == module.__name__
            and not name.startswith("_")
        ]
        assert own, f"skanomaly/methods/{info.name}.py holds no detector"
        for name in own:
            assert name in skanomaly.__all__, f"skanomaly/__init__.py lacks {name}"


def test_modules_load_when_they_are_asked_for():
    script = (
        "import sys, skanomaly\n"
        "assert 'skanomaly.metrics' not in sys.modules\n"
        "assert 'onnx' in dir(skanomaly)\n"
        "assert skanomaly.metrics.f1_max and skanomaly.onnx.export\n"
        "assert skanomaly.display.AnomalyMapDisplay\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'metric'"):
        skanomaly.metric  # noqa: B018
