"""Nothing silently wrong: what every detector says to images of another kind."""

import io
import pickle
import re
import shutil
import struct
import warnings
from functools import partial
from numbers import Real
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from input_strategies import (
    OUTCOMES,
    cases,
    fitted_on_bytes,
    outcome_of,
    small,
    striped,
)
from method_settings import labels_for
from PIL import Image
from sklearn.base import clone
from sklearn.svm import OneClassSVM
from sklearn.utils._param_validation import (
    Interval,
    InvalidParameterError,
    StrOptions,
    make_constraint,
)

import skanomaly
from skanomaly import (
    SMAI,
    SPADE,
    BackboneFeatures,
    DeScarGAN,
    LoadImages,
    MemAE,
    PatchCore,
    PNet,
    datasets,
)
from skanomaly._fitting.persistence import HOW_TO_COMPUTE
from skanomaly.base import BaseDetector
from skanomaly.inspection import full_size_maps

DETECTORS = [
    cls
    for cls in (getattr(skanomaly, name) for name in skanomaly.__all__)
    if isinstance(cls, type)
    and issubclass(cls, BaseDetector)
    and cls is not skanomaly.TiledDetector  # which is another detector around one
]
EACH = pytest.mark.parametrize("cls", DETECTORS)


class FittedDetectors(dict):
    """One detector of every class, fitted on bytes when first asked for."""

    def __missing__(self, cls):
        return self.setdefault(cls, fitted_on_bytes(cls))


@pytest.fixture(scope="module")
def fitted():
    return FittedDetectors()


@pytest.fixture
def refuses(fitted):
    """Return a function that checks that fit and all predictions refuse images."""

    def check(cls, X, match, *, where=("fit", "predict"), error=ValueError):
        y = labels_for(cls, 4)
        if "fit" in where:
            with pytest.raises(error, match=match):
                small(cls).fit(X, y)
        for method in ("score_samples", "predict", "localize", "segment"):
            if "predict" in where:
                with pytest.raises(error, match=match):
                    getattr(fitted[cls], method)(X)

    return check


def fit_quietly(cls, X, y=None, **parameters):
    """Fit a small detector whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return small(cls, **parameters).fit(
            X, labels_for(cls, len(X)) if y is None else y
        )


def duplicate(detector):
    return pickle.loads(pickle.dumps(detector))


# Another scale


MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
RESCALED = {
    "float32": lambda X: X.astype(np.float32),
    "float64": lambda X: X.astype(np.float64),
    "int64": lambda X: X.astype(np.int64),
    "uint16": lambda X: X.astype(np.uint16),
    "12 bits": lambda X: X.astype(np.uint16) * 16,
    "list": lambda X: X.tolist(),
    "tensor": lambda X: torch.from_numpy(X).float(),
    "standardised": lambda X: (X / 255 - MEAN) / STD,
    "-1 to 1": lambda X: X / 127.5 - 1,
    "0 to 16": lambda X: X / 16,
}


def full_range(n):
    """Return images with black and white pixels."""
    X = striped(n, seed=1)
    X[:, 0], X[:, 1] = 0, 255
    return X


@EACH
@pytest.mark.parametrize("scale", RESCALED)
def test_who_was_fitted_on_bytes_refuses_another_scale(cls, scale, refuses):
    X = RESCALED[scale](full_range(4))
    refuses(
        cls, X, r"X holds values .*fitted on bytes \(uint8\).*uint8", where=["predict"]
    )


@EACH
def test_the_same_pixels_as_fractions_have_the_same_scores(cls, fitted):
    X = full_range(3)
    expected = fitted[cls].score_samples(X)
    for other in (X / 255, torch.from_numpy(X) / 255, (X / 255).tolist()):
        np.testing.assert_allclose(
            fitted[cls].score_samples(other), expected, rtol=1e-3, atol=1e-4
        )


@EACH
def test_who_was_fitted_on_fractions_warns_of_another_scale(cls):
    X = full_range(4)
    detector = small(cls).fit(X / 255, labels_for(cls, 4))
    detector.predict(X)  # bytes are divided by 255
    words = rf"X holds values {{}}, but {cls.__name__} was fitted on values up to 1: "
    with pytest.warns(UserWarning, match=words.format("up to 255")):
        detector.predict(X.astype(np.float32))
    with pytest.warns(UserWarning, match=words.format("from -1 to 1")):
        detector.predict(X / 127.5 - 1)


@EACH
def test_who_was_fitted_on_a_wide_range_warns_in_fit_and_of_others(cls):
    X = full_range(4)
    with pytest.warns(UserWarning, match=r"X holds values up to 255\..*divide them"):
        detector = small(cls).fit(X.astype(np.float32), labels_for(cls, 4))
    detector.predict(X.astype(np.int64))
    for other, own in ((X, r"bytes \(uint8\)"), (X / 255, "values up to 1")):
        words = rf"X holds {own}, but {cls.__name__} was fitted on values up to 255"
        with pytest.warns(UserWarning, match=words):
            detector.predict(other)


@EACH
def test_a_fit_warns_of_standardised_images(cls):
    X = RESCALED["standardised"](full_range(4))
    with pytest.warns(UserWarning, match=r"from -\d.* to \d.*standardise"):
        small(cls).fit(X, labels_for(cls, 4))


# Another layout


@EACH
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_channels_first_are_refused(cls, kind, refuses):
    X = kind(np.moveaxis(striped(4), -1, 1).copy())
    refuses(cls, X, r"\(4, 3, 16, 16\).*channels first.*movedim\(1, -1\)")


@pytest.mark.parametrize("name", ["MemAE", "MNAD"])
def test_channels_first_of_clips_are_refused(name):
    cls = getattr(skanomaly, name)
    settings = {"clip_length": 4}
    if name == "MNAD":
        settings["task"] = "prediction"
    X = np.stack([striped(4, seed=seed) for seed in range(4)])
    detector = small(cls, **settings).fit(X)
    first = np.moveaxis(X, -1, 2)
    for method in (small(cls, **settings).fit, detector.predict):
        with pytest.raises(ValueError, match=r"channels first.*movedim\(2, -1\)"):
            method(first)
        with pytest.raises(ValueError, match=r"clips of T = 4 images"):
            method(np.moveaxis(first, 1, 2))
    assert detector.predict(X).shape == (4,)


def test_images_of_many_columns_are_taken_where_image_shape_says_so():
    X = np.moveaxis(striped(4), -1, 1)
    detector = fit_quietly(MemAE, X, image_shape=(3, 16, 16))
    assert detector.image_shape_ == (3, 16, 16)


@EACH
def test_one_image_is_refused(cls, refuses):
    refuses(cls, striped(1)[0], r"\(16, 16, 3\).*X\[None\]")
    refuses(cls, striped(1)[0, ..., 0], r"that of one image", where=["predict"])
    fitted_on_grey = fit_quietly(cls, striped(4)[..., :1])
    for image in (striped(1)[0, ..., :1], striped(1)[0, ..., 0]):
        with pytest.raises(ValueError, match=r"that of one image.*X\[None\]"):
            fitted_on_grey.predict(image)


@EACH
def test_rows_of_colour_images_ask_for_their_shape(cls, fitted):
    rows = striped(4).reshape(4, -1)
    of_lines = {"window_size": 1} if cls is skanomaly.InTra else {}
    words = r"rows of 768 numbers.*image_shape=\(16, 16, 3\)"
    with pytest.warns(UserWarning, match=words), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Images of 1 x 768 pixels are padded")
        small(cls, **of_lines).fit(rows, labels_for(cls, 4))
    detector = small(cls, image_shape=(16, 16, 3)).fit(rows, labels_for(cls, 4))
    assert detector.image_shape_ == (16, 16, 3)
    # where the shape is known, rows are read as such images
    np.testing.assert_array_equal(
        fitted[cls].score_samples(rows), fitted[cls].score_samples(striped(4))
    )


def _series(X):
    return pd.Series(list(X))


def _objects(X):
    objects = np.empty(len(X), object)
    objects[:] = list(X)
    return objects


NO_ARRAYS = {
    "unequal images": (lambda X: [X[0], X[1][:8]], r"several shapes.*size="),
    "unequal grey images": (lambda X: (X[0, ..., 0], X[1, :, :8, 0]), "several shapes"),
    "unequal lists": (lambda X: [X[0].tolist(), X[1][:8].tolist()], "X.*inhomogeneous"),
    "series": (_series, r"Series of arrays: give one array, np.stack\(list\(X\)\)"),
    "object array": (_objects, r"ndarray of arrays.*np.stack"),
    "list of tensors": (lambda X: list(torch.from_numpy(X)), r"torch.stack\(X\)"),
    "tuple of tensors": (lambda X: tuple(torch.from_numpy(X)), r"torch.stack\(X\)"),
    "pictures": (lambda X: [Image.fromarray(x) for x in X], "X holds pictures of Pill"),
    "generator": (lambda X: (image for image in X), r"X is a generator.*np.stack"),
    "loader": (
        lambda X: torch.utils.data.DataLoader(torch.from_numpy(X)),
        r"X is a DataLoader.*np.concatenate\(list\(X\)\)",
    ),
    "data set": (
        lambda X: torch.utils.data.TensorDataset(torch.from_numpy(X)),
        r"X is a TensorDataset.*np.stack",
    ),
    "dates": (lambda X: X.astype("M8[s]"), "X holds dates or times"),
    "durations": (lambda X: X.astype("m8[s]"), "X holds dates or times"),
    "paths": (lambda X: ["a.png"] * len(X), r"X holds strings or paths.*LoadImages"),
    "texts": (lambda X: X.astype(str), "X is refused by .*bytes/strings"),
    "complex numbers": (lambda X: X + 1j, "X is refused by .*Complex"),
    "one number": (lambda X: 3, "X is refused by .*Expected 2D array"),
    "numbers in a row": (lambda X: np.arange(4.0), "X is refused by .*Expected 2D"),
    "axes": (lambda X: X[:, None, None], r"X has shape \(4, 1, 1, 16.*wants images"),
    "no pixels": (lambda X: X[:, :0], r"X has shape \(4, 0, .*empty"),
    "no columns": (lambda X: X[:, 0, 0, :0], "X is refused by .*0 feature"),
    "no images": (lambda X: X[:0], "X is refused.*0 sample"),
}


@EACH
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_is_no_array_of_images_is_refused(cls, kind, refuses):
    make, match = NO_ARRAYS[kind]
    X = make(striped(4))
    # the features of a backbone go another way, and none of these is one
    error = (TypeError, ValueError)
    if kind != "generator":
        refuses(cls, X, match, error=error)
        return
    refuses(cls, X, match, where=["fit"])
    refuses(cls, X, match, where=["predict"])
    assert len(list(X)) == 4  # nothing was taken of it


def good_features():
    X = np.zeros(4, [("a", "f4", (2, 2, 3))])
    X["a"] = np.random.default_rng(0).random(X["a"].shape)
    return X


@pytest.mark.filterwarnings("ignore:.*are copies of others")
@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        (("f4", (2, 2, 3)), np.nan, "Input X contains NaN or infinity"),
        (("f4", (2, 2, 3)), np.inf, "Input X contains NaN or infinity"),
        (("f4", (2, 2)), 0, r"X has .* field 'a' .*floats \(h, w, c\)"),
        (("i4", (2, 2, 3)), 0, r"X has .* field 'a' .*floats \(h, w, c\)"),
        ("U3", "a", r"X has .* field 'a' .*floats \(h, w, c\)"),
        (("f4", (2, 2, 3)), 1e30, "finds for X are not finite"),
    ],
)
def test_features_that_are_none_are_refused(field, value, match):
    X = np.zeros(4, [("a", *field)] if isinstance(field, tuple) else [("a", field)])
    X["a"][1:3] = value
    detector = fit_quietly(SPADE, good_features(), backbone="precomputed", layers=["a"])
    for method in (clone(detector).fit, detector.predict):
        with pytest.raises(ValueError, match=match), np.errstate(all="ignore"):
            method(X)
    with pytest.raises(ValueError, match=r"X has shape \(2, 4\)"):
        clone(detector).fit(np.stack([good_features()] * 2))


@EACH
@pytest.mark.parametrize(
    "image_shape",
    [
        (16.0, 16.0, 3.0),
        (16, 16, 3, 5),
        (768,),
        (-16, -16, 3),
        (16, 16, 0),
        (True, True),
        ("16", "16", "3"),
        np.array(3),
        {16: 1, 17: 2},
        "abc",
    ],
    ids=repr,
)
def test_an_image_shape_is_two_or_three_integers(cls, image_shape, fitted):
    X, y = striped(4).reshape(4, -1), labels_for(cls, 4)
    with pytest.raises(ValueError, match="image_shape"):
        small(cls, image_shape=image_shape).fit(X, y)


@pytest.mark.parametrize(
    ("X", "words"),
    [
        (striped(1, size=64)[0, ..., 0], r"64 rows of 64 numbers.*of 8 x 8 pixels"),
        (striped(1, size=60)[0, :50, :, 0], r"50 rows of 60 numbers.*of one line"),
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_one_grey_image_in_fit_is_told_from_rows(X, words, kind):
    with pytest.warns(UserWarning, match=rf"{words}.*one grey image, X\[None\]"):
        small(skanomaly.PaDiM, weights=None).fit(kind(X))


@pytest.mark.filterwarnings("error")
def test_rows_of_square_grey_images_are_taken_without_a_word():
    rows = striped(9)[..., 0].reshape(9, -1)
    assert small(skanomaly.Autoencoder).fit(rows).image_shape_ == (16, 16, 1)


# Numbers that are none, or too large


@EACH
def test_nothing_is_refused(cls, refuses):
    refuses(cls, None, rf"X is None, but {cls.__name__} wants images")


def test_advice_on_nan_is_meant_for_images(fitted):
    X = np.full((4, 16, 16, 3), np.nan)
    with pytest.raises(ValueError, match=r"NaN\. Leave such images out, .*missing\.$"):
        fitted[SPADE].predict(X)


EXTREMES = {
    "NaN": (np.float32, np.nan, "Input X contains NaN"),
    "infinity": (np.float64, -np.inf, "Input X contains (NaN or )?infinity"),
    "1e30": (np.float32, 1e30, "X holds values .* no scale of images"),
    "1e300": (np.float64, 1e300, "X holds values .* no scale of images"),
    "-1e30": (np.float32, -1e30, "X holds values .* no scale of images"),
    "int64": (np.int64, 2_000_000, "X holds values .* no scale of images"),
    "largest int64": (np.int64, 2**63 - 1, "X holds values .* no scale of images"),
}


@EACH
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_values_that_no_image_has_are_refused(cls, kind, extreme, refuses):
    dtype, value, match = EXTREMES[extreme]
    X = (striped(4) / 255).astype(dtype)
    X[1, 5, 7, 1] = value
    refuses(cls, kind(X), match)


@EACH
def test_weights_that_are_no_numbers_call_nothing_normal(cls, fitted):
    detector = duplicate(fitted[cls])
    with torch.no_grad():
        for parameter in detector.network_.parameters():
            parameter.fill_(np.nan)
    for method in ("score_samples", "predict", "localize", "segment"):
        with pytest.raises(ValueError, match="finds for X are not finite"):
            getattr(detector, method)(striped(2))


# Tensors


def _nested(X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a prototype
        return torch.nested.nested_tensor(list(X))


def _quantised(X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what it deprecates
        return torch.quantize_per_tensor(X, 0.01, 0, torch.quint8)


REFUSED_TENSORS = {
    "sparse": (torch.Tensor.to_sparse, r"X is a sparse tensor.*X.to_dense\(\)"),
    "meta": (lambda X: X.to("meta"), "X is a meta tensor.*holds numbers"),
    "quantised": (_quantised, r"X is a quantised tensor.*X.dequantize\(\)"),
    "nested": (_nested, r"X is a nested tensor.*torch.stack\(X.unbind\(\)\)"),
    "float8": (lambda X: X.to(torch.float8_e4m3fn), r"X is a float8.*X.float\(\)"),
    "0-d": (lambda X: X[0, 0, 0, 0], "X is a single number"),
    "1-d": (lambda X: X[0, 0, :, 0], r"X has shape \(16,\)"),
    "complex": (lambda X: X + 1j, "X holds complex numbers"),
    "empty": (lambda X: X[:, :0], r"X has shape .*empty"),
    "empty rows": (lambda X: X[:, 0, 0, :0], r"X has shape .*empty"),
}


@EACH
@pytest.mark.parametrize("kind", REFUSED_TENSORS)
def test_tensors_that_hold_no_plain_numbers_are_refused(cls, kind, refuses):
    make, match = REFUSED_TENSORS[kind]
    refuses(cls, make(torch.from_numpy(striped(4)) / 255), match)


TAKEN_TENSORS = {
    "requires gradients": lambda X: X.clone().requires_grad_(),
    "in a graph": lambda X: X.clone().requires_grad_() * 1,
    "parameter": torch.nn.Parameter,
    "bfloat16": torch.Tensor.bfloat16,
    "float16": torch.Tensor.half,
    "float64": torch.Tensor.double,
    "bool": lambda X: X > 0.5,
    "channels last": lambda X: X.to(memory_format=torch.channels_last),
    "uint16": lambda X: (X > 0.5).to(torch.uint16),
    "uint64": lambda X: (X > 0.5).to(torch.uint64),
    "negative": lambda X: torch._neg_view(-X),
}


@EACH
@pytest.mark.parametrize("kind", TAKEN_TENSORS)
def test_tensors_of_plain_numbers_are_taken(cls, kind, fitted):
    X = TAKEN_TENSORS[kind](torch.from_numpy(striped(4)) / 255)
    plain = X.detach().double().resolve_neg().numpy()
    np.testing.assert_allclose(
        fitted[cls].score_samples(X), fitted[cls].score_samples(plain), rtol=1e-5
    )


@EACH
def test_a_fit_on_tensors_in_a_graph_is_that_on_plain_ones(cls):
    X = torch.from_numpy(striped(4)) / 255
    y = torch.tensor([1.0, -1.0, 1.0, 1.0])
    expected = small(cls).fit(X.numpy(), y.numpy())
    for dtype in (torch.float32, torch.bfloat16):
        labels = y.to(dtype).requires_grad_()
        detector = small(cls).fit(X.clone().requires_grad_(), labels)
        assert detector.offset_ == expected.offset_
        np.testing.assert_array_equal(
            detector.score_samples(X), expected.score_samples(X)
        )


@pytest.mark.parametrize("cls", [MemAE, SMAI, PNet, SPADE, DeScarGAN])
@pytest.mark.parametrize("kind", ["bfloat16", "bool", "negative", "uint16"])
def test_a_fit_on_tensors_is_that_on_plain_ones(cls, kind):
    X = TAKEN_TENSORS[kind](torch.from_numpy(striped(4)) / 255)
    plain = X.detach().float().resolve_neg().numpy()
    expected = fit_quietly(cls, plain)
    assert fit_quietly(cls, X).offset_ == pytest.approx(expected.offset_, rel=1e-5)


# Where and how to compute


@EACH
@pytest.mark.parametrize("device", ["foo", "", "meta", "vulkan", "cuda:-1", "cuda:99"])
def test_devices_that_are_none_are_named(cls, device, fitted):
    X, y = striped(4), labels_for(cls, 4)
    detector = duplicate(fitted[cls]).set_params(device=device)
    fit = partial(small(cls, device=device).fit, y=y)
    for method in (fit, detector.predict):
        with pytest.raises(ValueError, match=f"device='{device}'"):
            method(X)


@EACH
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_that_are_not_here_are_named(cls, device, fitted):
    if getattr(torch, device).is_available():
        pytest.skip("it is here")
    X, y = striped(4), labels_for(cls, 4)
    detector = duplicate(fitted[cls]).set_params(device=device)
    fit = partial(small(cls, device=device).fit, y=y)
    for method in (fit, detector.predict):
        with pytest.raises(ValueError, match=f"device='{device}'.*no such device here"):
            method(X)


@EACH
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_fit_minds_no_switch_of_gradients(cls, context, fitted):
    X = striped(8)
    with context():
        detector = small(cls).fit(torch.from_numpy(X), labels_for(cls, 8))
    assert detector.offset_ == fitted[cls].offset_
    assert detector.map_threshold_ == fitted[cls].map_threshold_
    np.testing.assert_array_equal(detector.localize(X), fitted[cls].localize(X))


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@EACH
def test_another_default_dtype_is_refused(cls, fitted, double_precision, refuses):
    words = r"torch.float64, but .*torch.set_default_dtype\(torch.float32\)"
    refuses(cls, striped(4), words)


NUMBERS_OF_A_WRONG_KIND = {
    "batch_size": [True, np.uint8(3), np.int16(3)],
    "contamination": [np.True_],
}


@EACH
def test_numbers_of_a_wrong_kind_are_refused(cls, fitted):
    X, y = striped(4), labels_for(cls, 4)
    kinds = {name: [np.inf] for name in _real_parameters(cls)}
    for name, values in {**kinds, **NUMBERS_OF_A_WRONG_KIND}.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                small(cls, **{name: value}).fit(X, y)
    # other integers of NumPy are taken
    expected = fit_quietly(cls, X, batch_size=2)
    for kind in (np.int32, np.int64):
        detector = small(cls, batch_size=kind(2)).fit(X, y)
        assert detector.offset_ == expected.offset_


def _real_parameters(cls):
    return [
        name
        for name, constraints in cls._parameter_constraints.items()
        if any(isinstance(c, Interval) and c.type is Real for c in constraints)
    ]


# Labels

LABELS = {
    "names": (
        np.array(["good", "hole", "good", "good"]),
        r"y holds names.*labels_from",
    ),
    "objects": (np.array(["a", 1, "a", "a"], object), r"y holds names.*labels_from"),
    "booleans": (np.array([True, False] * 2), r"y holds booleans.*normal=True.*False"),
    "series": (pd.Series(["a", "b", "a", "a"]), r"y holds names.*labels_from"),
    "complex": (np.ones(4, complex), r"y holds .*complex128"),
    "dates": (np.ones(4, int).astype("M8[s]"), r"y holds .*datetime64"),
    "masks with NaN": (np.full((4, 16, 16), np.nan), r"y holds masks with NaN"),
    "unequal": ([[1, -1], [1], [1], [1]], r"y must be an array"),
    "too few": (np.ones(3), "y has length 3, but X 4"),
    "one": (1, "y has length 1, but X 4"),
    "in pairs": (np.ones((4, 2)), r"y has shape \(4, 2\)"),
    "sparse": (torch.ones(4).to_sparse(), r"y is a sparse tensor.*y.to_dense"),
    "meta": (torch.ones(4, device="meta"), r"y is a meta tensor"),
    "all anomalous": (-np.ones(4), r"\by\b"),
}


@EACH
@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_none_are_refused(cls, kind):
    y, match = LABELS[kind]
    with pytest.raises(ValueError, match=match):
        small(cls).fit(striped(4), y)


@EACH
def test_other_numbers_are_no_labels(cls):
    words = r"\+1 for normal and -1 for anomalous.*holds \[0.*1.*\].*labels_from"
    y = np.array([0, 1, 0, 1])
    if cls is DeScarGAN:  # which learns from them
        with pytest.raises(ValueError, match=words):
            small(cls).fit(striped(4), y)
        return
    with pytest.warns(UserWarning, match=f"y is ignored: .*{words}"):
        detector = small(cls).fit(striped(4), y)
    assert detector.offset_ == small(cls).fit(striped(4)).offset_


# Parameters that are set after the fit


@EACH
def test_what_fit_would_refuse_is_refused_after_it(cls, fitted):
    detector = duplicate(fitted[cls])
    for name, value in fitted[cls].get_params().items():
        detector.set_params(**{name: object()})
        for method in ("predict", "score_samples", "localize"):
            with pytest.raises(InvalidParameterError, match=f"'{name}' parameter of"):
                getattr(detector, method)(striped(2))
        detector.set_params(**{name: value})
    detector.predict(striped(2))


# of one kind, but not what they must be
IMPOSSIBLE = {
    "Autoencoder": {"ssim_constants": (1, -1)},
    "InTra": {"patch_size": 0},
    "MNAD": {"score_weight": 2},
    "PNet": {"score_weight": 2},
    "RIAD": {"cell_sizes": ()},
    "SCADN": {"smoothing_size": 0},
    "SMAI": {"n_segments": 1},
    "SPADE": {"sigma": 1e9},
    "DifferNet": {"sigma": 1e9},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values_are_refused_after_the_fit(name, fitted):
    detector = duplicate(fitted[getattr(skanomaly, name)])
    wrong = {**IMPOSSIBLE[name], "batch_size": 0, "precision": "float16"}
    for parameter, value in wrong.items():
        before = getattr(detector, parameter)
        with pytest.raises(ValueError, match=parameter):
            detector.set_params(**{parameter: value}).score_samples(striped(2))
        detector.set_params(**{parameter: before})


OTHER_SEQUENCES = {
    "cell_sizes": (2,),
    "channels": (3, 5),
    "hidden_fraction": (0.1, 0.2),
    "layers": ("stage3",),
    "opacity": (0.2, 0.9),
    "ssim_constants": (1.0, 2.0),
    "strides": (4, 4),
    "stripes": (2,),
    "structure_source": ("images", "masks"),
    "zoom": (1.5, 2.0),
    "image_shape": (4, 4),
    "estimator": OneClassSVM(),
}


def another(cls, name, value):
    """Return a valid value of a parameter that is not the one it has."""
    if isinstance(value, bool):
        return not value
    constraints = [make_constraint(c) for c in cls._parameter_constraints[name]]
    options = [o for c in constraints if isinstance(c, StrOptions) for o in c.options]
    candidates = [*sorted(options), OTHER_SEQUENCES.get(name, "other")]
    if isinstance(value, (int, float)):
        candidates = [2 * value, value / 2, 2 * value + 1, *candidates]
    for candidate in [*candidates, 2, 0.5]:
        is_valid = any(c.is_satisfied_by(candidate) for c in constraints)
        if is_valid and candidate != value:
            return candidate
    raise AssertionError(f"no other value of {name}={value!r} is known")


@EACH
def test_what_describes_network_and_training_is_read_from_the_fit(cls, fitted):
    detector, X = duplicate(fitted[cls]), striped(3, seed=1)
    scores, maps = detector.score_samples(X), detector.localize(X)
    found, segments = detector.predict(X), detector.segment(X)
    n_set = 0
    for name, value in detector.get_params().items():
        if name not in (*HOW_TO_COMPUTE, *cls._judged_by):
            detector.set_params(**{name: another(cls, name, value)})
            n_set += 1
            np.testing.assert_array_equal(detector.score_samples(X), scores, name)
    # all of them at once; a warning would be an error
    np.testing.assert_array_equal(detector.localize(X), maps)
    np.testing.assert_array_equal(detector.predict(X), found)
    np.testing.assert_array_equal(detector.segment(X), segments)
    assert n_set > 5


# what judges, with other values that show in scores or maps
JUDGES = {
    "Autoencoder": {"loss": "l2", "ssim_constants": (1, 2), "smoothing_size": 200},
    "VariationalAutoencoder": {"n_samples": 1, "smoothing_size": 200},
    "DifferNet": {"n_transforms_test": 2, "sigma": 50.0},
    "DRAEM": {"pooling_size": 100},
    "SPADE": {
        "n_neighbors": 2,
        "n_pixel_neighbors": 3,
        "image_score": "max",
        "sigma": 100.0,
    },
    "RIAD": {"cell_sizes": (2,), "n_masks": 2, "smoothing_size": 200},
    "MemAE": {"image_score": "max", "smoothing_size": 200},
    "MNAD": {
        "score_weight": 0.1,
        "update_at_test": True,
        "update_threshold": 1.0,
        "image_score": "max",
        "smoothing_size": 200,
    },
    "InTra": {"reference": "none", "smoothing_size": 200},
    "SMAI": {
        "n_segments": 4,
        "compactness": 1e-3,
        "image_score": "max",
        "smoothing_size": 200,
    },
    "PatchDetector": {"sigma": 100.0, "image_score": "top"},
    "PatchCore": {"sigma": 100.0, "image_score": "top"},
    "PaDiM": {"sigma": 100.0},
    "PatchSVDD": {"combination": "sum"},
    "FCDD": {"sigma": 50.0, "image_score": "max"},
    "PNet": {"score_weight": 0.1, "image_score": "max", "smoothing_size": 200},
    "PuzzleAE": {"image_score": "max", "smoothing_size": 200},
    "SCADN": {"image_score": "max", "smoothing_size": 200},
    "DeScarGAN": {"image_score": "mean", "smoothing_size": 200},
}
# without which another would show nothing
BESIDE = {"update_at_test": {"update_threshold": 1.0}}
BESIDE["update_threshold"] = {"update_at_test": True}


@EACH
def test_what_judges_takes_effect_with_a_warning(cls, fitted):
    detector, X = duplicate(fitted[cls]), striped(3, seed=1)
    X[1, 4:9, 4:9] = 255
    before = detector.score_samples(X), detector.localize(X)
    assert set(JUDGES.get(cls.__name__, {})) == set(cls._judged_by)
    for name, value in JUDGES.get(cls.__name__, {}).items():
        old = detector.get_params()
        detector.set_params(**{name: value}, **BESIDE.get(name, {}))
        scores, maps = detector.score_samples(X), detector.localize(X)
        assert (scores != before[0]).any() or (maps != before[1]).any(), name
        for method in ("predict", "segment", "decision_function"):
            with pytest.warns(UserWarning, match=rf"{name}=.* was set after fit"):
                getattr(detector, method)(X)
        detector.set_params(**old)
    np.testing.assert_array_equal(detector.localize(X), before[1])
    detector.predict(X)  # warns no more


# Copies


@EACH
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_copies_among_the_training_images_are_counted(cls, kind):
    X = np.concatenate([striped(6), striped(6)[:3], striped(6)[:1]])
    with pytest.warns(UserWarning, match="4 of the 10 training images are copies"):
        small(cls).fit(kind(X), labels_for(cls, 10) if cls is DeScarGAN else None)


@pytest.mark.parametrize("image_score", ["knn", "max"])
def test_copies_move_no_threshold_of_spade(image_score):
    X = striped(12)
    settings = {"contamination": 0.2, "n_neighbors": 1, "image_score": image_score}
    once, twice = (fit_quietly(SPADE, np.repeat(X, n, 0), **settings) for n in (1, 2))
    assert twice.offset_ == pytest.approx(once.offset_, rel=0.1)
    assert twice.map_threshold_ == pytest.approx(once.map_threshold_, rel=0.2)


# Files


@EACH
def test_every_flipped_bit_of_the_threshold_is_noticed(cls, fitted):
    buffer = io.BytesIO()
    joblib.dump(fitted[cls], buffer)
    content = buffer.getvalue()
    place = content.find(struct.pack("<d", fitted[cls].offset_))
    assert place > 0
    for bit in range(64):
        damaged = bytearray(content)
        damaged[place + bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=rf"{cls.__name__} is damaged"):
            joblib.load(io.BytesIO(damaged))
    joblib.load(io.BytesIO(content))


@EACH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("__class__", 1),
        ("_build_network", 1),
        ("_judge", None),
        ("predict", 1),
        ("offset_", print),
        ("batch_size", torch.nn.Linear),
    ],
)
def test_a_state_of_a_stranger_is_refused(cls, name, value, fitted):
    state = {**fitted[cls].__getstate__(), name: value}
    del state["_checksum"]  # which a stranger can compute
    detector = object.__new__(cls)
    with pytest.raises(ValueError, match=rf"{cls.__name__} holds '{name}'"):
        detector.__setstate__(state)
    assert vars(detector) == {}


@EACH
@pytest.mark.parametrize("name", ["helper", "_helper", "helper_"])
def test_a_name_that_was_not_saved_is_refused(cls, name, fitted):
    state = {**fitted[cls].__getstate__(), name: 1}
    with pytest.raises(ValueError, match=rf"{cls.__name__} is damaged"):
        object.__new__(cls).__setstate__(state)


# Places on the disk


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a home folder that holds an image, and is not the current folder."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "set/train/good").mkdir(parents=True)
    elsewhere.mkdir()
    Image.fromarray(striped(1)[0]).save(home / "set/train/good/0.png")
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.chdir(elsewhere)
    yield home
    assert not list(elsewhere.iterdir())


def test_home_is_where_images_are_found(home):
    image = striped(1)
    (home / "set/test").mkdir()
    shutil.copytree(home / "set/train/good", home / "set/test/good")
    for name in ("~/set/train/good/0.png", Path("~/set/train/good/0.png")):
        np.testing.assert_array_equal(LoadImages().transform([name]), image)
        assert next(full_size_maps(image[..., 0], [name])).shape == (16, 16)
    for name in ("~/set/train", "~/set/*/good/0.png", ["~/set/train/good"]):
        assert datasets.load_folder(name).files[0].startswith(str(home))
    assert len(datasets.load_mvtec("~", "set").X_train) == 1
    with pytest.raises(FileNotFoundError, match=re.escape(str(home / "split_csv"))):
        datasets.load_visa("~", "set")


def test_home_is_where_files_are_written_and_read(home):
    X = striped(4)
    LoadImages(memmap="~/maps").transform(["~/set/train/good/0.png"])
    assert len(list(home.glob("maps/*.npy"))) == 1
    resnet = {"backbone": "resnet18", "layers": ("layer1",)}
    backbone = BackboneFeatures(**resnet, weights=None).fit(X).network_.trunk
    torch.save(backbone.state_dict(), home / "w.pth")
    detector = PatchCore(**resnet, weights="~/w.pth", memory="~/features").fit(X)
    assert len(list(home.glob("features/*/*.npy"))) == 4
    skanomaly.onnx.export(detector, "~/detector.onnx")
    assert (home / "detector.onnx").is_file()
    small(skanomaly.DRAEM, textures="~/set").fit(X)
    with pytest.raises(FileNotFoundError, match=re.escape(str(home / "nowhere"))):
        small(MemAE, checkpoint="~/nowhere/c.ckpt").fit(X)


# Small images


@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize("n_segments", [2, 4, 31])
def test_smai_takes_small_images_however_many_there_are(width, n_segments):
    X = striped(9)
    detector = small(SMAI, width=width, n_segments=n_segments).fit(X)
    expected = detector.score_samples(X)
    for n in range(1, 9):
        np.testing.assert_allclose(
            detector.score_samples(X[:n]), expected[:n], rtol=1e-3
        )


# Whatever comes


@EACH
def test_whatever_comes_is_answered(cls, fitted):
    detector = duplicate(fitted[cls])

    @settings(
        max_examples=120,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(cls))
    def answer(case):
        assert (outcome := outcome_of(case, cls, detector)) in OUTCOMES, outcome

    answer()
