"""The public names are those that doc/api.rst lists, neither more nor fewer."""

import importlib
import inspect

import pytest

import skanomaly

MODULES = [
    "backbones",
    "datasets",
    "display",
    "images",
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
