"""Docstrings follow numpydoc: in full for the API, wherever they have sections else."""

import importlib
import inspect
import pkgutil

import pytest
from numpydoc.docscrape import NumpyDocString
from numpydoc.validate import validate
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils._testing import assert_docstring_consistency

import skanomaly
from skanomaly.base import BaseDetector

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
    for info in pkgutil.walk_packages(skanomaly.__path__, "skanomaly."):
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

ESTIMATORS = [
    value
    for value in map(vars(skanomaly).get, skanomaly.__all__)
    if inspect.isclass(value) and issubclass(value, BaseEstimator)
]
# parameters whose defaults are the papers', with the words that all classes share
OF_THE_PAPERS = {
    "learning_rate": "^Learning rate of Adam",
    "batch_size": "^Number of images( or clips)? a batch",
    "random_state": "^Seed of ",
    "max_epochs": None,
    "validation_fraction": None,
    "n_iter_no_change": None,
}
SHARED = [
    "contamination",
    "device",
    "checkpoint",
    "checkpoint_every",
    "image_shape",
    "warm_start",
    "weights",
]
FITTED = [
    "feature_names_in_",
    "image_shape_",
    "loss_curve_",
    "map_threshold_",
    "n_features_in_",
    "n_iter_",
    "offset_",
    "validation_curve_",
]


def having(name, section, among=ESTIMATORS):
    """Return the estimators that document a parameter or an attribute."""
    return [
        cls
        for cls in among
        if name in {item.name for item in NumpyDocString(cls.__doc__)[section]}
    ]


@pytest.mark.parametrize("name", [*SHARED, *OF_THE_PAPERS])
def test_the_same_parameter_has_the_same_words(name):
    users = [cls for cls in having(name, "Parameters") if cls is not skanomaly.ToDevice]
    assert len(users) > 2
    assert_docstring_consistency(
        users,
        include_params=[name],
        descr_regex_pattern=OF_THE_PAPERS.get(name),
        ignore_types=tuple(OF_THE_PAPERS),
    )


DETECTORS = [cls for cls in ESTIMATORS if issubclass(cls, BaseDetector)]
IMAGE_TRANSFORMERS = [
    cls
    for cls in ESTIMATORS
    if issubclass(cls, TransformerMixin) and hasattr(cls, "inverse_transform_maps")
]


@pytest.mark.parametrize("name", [*FITTED, "verbose"])
def test_what_a_fit_leaves_has_the_same_words(name):
    among = [*DETECTORS, *IMAGE_TRANSFORMERS]
    section = "Parameters" if name == "verbose" else "Attributes"
    users = having(name, section, among)
    assert len(users) > 2
    kind = {"include_params" if name == "verbose" else "include_attrs": [name]}
    assert_docstring_consistency(users, **kind)


def test_the_tail_of_all_constructors_has_one_order():
    tail = [
        "image_shape",
        "max_epochs",
        "learning_rate",
        "batch_size",
        "validation_fraction",
        "n_iter_no_change",
        "contamination",
        "precision",
        "device",
        "random_state",
        "warm_start",
        "checkpoint",
        "checkpoint_every",
        "verbose",
    ]
    for cls in DETECTORS:
        own = list(inspect.signature(cls).parameters)
        expected = [name for name in tail if name in own]
        assert own[-len(expected) :] == expected, cls


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
