"""Docstrings follow numpydoc: in full for the API, wherever they have sections else."""

import importlib
import inspect
import pkgutil

import pytest
from numpydoc.validate import validate

import skanomaly

IGNORED = {
    "ES01",  # a summary that says it all needs no extended one
    "RT02",  # a single return value is named too, as scikit-learn does
    "SA01",  # "See Also" stands where there is something to see
    "YD01",  # a context manager yields for the sake of its with block
}


def is_ours(value):
    if isinstance(value, property):
        value = value.fget
    return str(getattr(value, "__module__", "")).startswith("skanomaly.")


def is_documented_elsewhere(cls, name):
    """Whether a method overrides one of torch or scikit-learn without a word."""
    return not vars(cls)[name].__doc__ and any(
        name in vars(base) for base in cls.__mro__ if not is_ours(base)
    )


def methods(cls):
    """Yield the names of the public methods and properties that a class defines."""
    for name in vars(cls):
        value = getattr(cls, name)
        if (
            not name.startswith("_")
            and (inspect.isroutine(value) or isinstance(value, property))
            and is_ours(value)
            and not is_documented_elsewhere(cls, name)
        ):
            yield name


def public_objects():
    """Yield the dotted names of the public functions, classes and methods."""
    for info in pkgutil.iter_modules(skanomaly.__path__, "skanomaly."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if (
                name.startswith("_")
                or not (inspect.isclass(value) or inspect.isfunction(value))
                or value.__module__ != info.name
            ):
                continue
            yield f"{info.name}.{name}"
            if inspect.isclass(value):
                yield from (f"{info.name}.{name}.{method}" for method in methods(value))


OBJECTS = list(public_objects())


def test_objects_are_found():
    assert len(OBJECTS) > len(skanomaly.__all__) > 0


@pytest.mark.parametrize("name", OBJECTS)
def test_docstring(name, api_entries):
    module, first, *method = name.removeprefix("skanomaly.").split(".")
    in_api = bool({first, f"{module}.{first}"} & set(api_entries))
    report = validate(name)
    ignored = set(IGNORED)
    if method:
        ignored.add("EX01")  # the example of the class shows its methods
    if not in_api:
        ignored.add("EX01")
        if "\n---" not in report["docstring"]:
            ignored |= {"PR01", "RT01"}
    assert not [error for error in report["errors"] if error[0] not in ignored]
