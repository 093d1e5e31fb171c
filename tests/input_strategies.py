"""What strangers may give to fit and predict, and whether the answer is a right one.

`cases` is a Hypothesis strategy of calls. `outcome_of` makes such a call and says what
came of it: "right", "refused", or what else.
"""

import contextlib
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from hypothesis import strategies as st
from method_settings import labels_for, small_settings
from PIL import Image

FITTED_SHAPE = (16, 16, 3)
# of an image; the deepest of the small networks take a tenth of a second for it
MOST_PIXELS = 1200
OUTCOMES = RIGHT, REFUSED = "right", "refused"


@dataclass(frozen=True)
class Given:
    """What is given as one argument.

    Parameters
    ----------
    words : str
        What it is.
    value : object
        The argument.
    plain : numpy.ndarray, default=None
        The same numbers as a plain array, if it holds any.
    """

    words: str
    value: object = field(repr=False)
    plain: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Case:
    """A call of ``fit`` or ``predict``.

    Parameters
    ----------
    is_fit : bool
        Whether it is a fit, else a prediction.
    X, y : Given
        Images and labels; a prediction takes no labels.
    settings : dict
        Parameters that are set before.
    """

    is_fit: bool
    X: Given
    y: Given
    settings: dict


def striped(n, size=16, seed=0):
    """Return images (n, size, size, 3) of noisy stripes, uint8."""
    rng = np.random.default_rng(seed)
    stripes = 0.5 + 0.3 * np.sin(np.arange(size) * np.pi / 4)
    images = stripes[:, None] + rng.normal(0, 0.03, (n, size, size, 3))
    return np.rint(255 * images.clip(0, 1)).astype(np.uint8)


# Numbers

NUMBERS = [
    "uint8",
    "float32",
    "float64",
    "float16",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
    "uint32",
    "uint64",
    ">f4",
    ">i2",
    "longdouble",
]
NO_NUMBERS = ["complex64", "M8[s]", "m8[s]", "U3", "S3", "V4", "f4,f4"]
# smallest and largest value
SCALES = {
    "unit": (0.0, 1.0),
    "bytes": (0.0, 255.0),
    "standardised": (-2.1, 2.6),
    "signed": (-1.0, 1.0),
    "16 bit": (0.0, 65535.0),
    "tiny": (0.0, 1e-30),
    "large": (0.0, 1e30),
    "larger": (-1e300, 1e300),
    "zero": (0.0, 0.0),
    "one": (1.0, 1.0),
    "white": (255.0, 255.0),
}
SPECIAL = [None, None, None, None, np.nan, np.inf, -np.inf, 1e39, 3.4e38, -1e7]

USUAL_SHAPES = [FITTED_SHAPE, (16, 16, 3), (16, 16), (16, 16, 1), (768,), (256,)]
OTHER_SHAPES = [
    (3, 16, 16),
    (1, 16, 16),
    (4, 16, 16),
    (16, 16, 4),
    (8, 24, 3),
    (17, 13, 3),
    (1, 1, 3),
    (2, 16, 16, 3),
    (1, 1),
    (3,),
    (1,),
    (),
    (0,),
    (16, 0, 3),
    (16, 16, 0),
]
shapes = st.one_of(
    st.sampled_from(USUAL_SHAPES),
    st.sampled_from(OTHER_SHAPES),
    st.lists(st.integers(0, 20), max_size=4)
    .map(tuple)
    .filter(lambda shape: np.prod(shape) <= MOST_PIXELS),
)
lengths = st.one_of(st.integers(2, 5), st.sampled_from([0, 1, 3]))


@st.composite
def arrays(draw, usual=False):
    """Draw an array of numbers, and words for it."""
    n = draw(st.integers(2, 4) if usual else lengths)
    shape = (n, *(FITTED_SHAPE if usual else draw(shapes)))
    dtype = draw(st.sampled_from(NUMBERS[:4] if usual else NUMBERS))
    scale = "bytes" if dtype == "uint8" else "unit"
    if not usual and draw(st.booleans()):
        scale = draw(st.sampled_from(sorted(SCALES)))
    seed = draw(st.integers(0, 99))
    low, high = SCALES[scale]
    values = np.random.default_rng(seed).uniform(0, 1, shape)
    # apart, since their difference may be more than a float64 holds
    values = low * (1 - values) + high * values
    words = f"{dtype} {shape} {scale} {seed}"
    kind = np.dtype(dtype).kind
    special = draw(st.sampled_from(SPECIAL)) if kind == "f" and not usual else None
    if special is not None and values.size:
        values.flat[draw(st.integers(0, values.size - 1))] = special
        words += f" with {special}"
    if kind in "iu":
        limits = np.iinfo(dtype)
        values = values.clip(float(limits.min), np.nextafter(float(limits.max), 0))
    with np.errstate(over="ignore"):
        return values.astype(dtype), words


# Containers of arrays


def _series(array):
    series = pd.Series([None] * len(array), dtype=object)
    for row, image in enumerate(array):
        series[row] = image
    return series


def _objects(array):
    objects = np.empty(len(array), object)
    for row, image in enumerate(array):
        objects[row] = image
    return objects


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def _backwards(array):
    return array[::-1].copy()[::-1]


def _strided(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


class Arraylike:
    """Holds an array that NumPy may ask for, and has neither length nor type."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype=dtype)


class Subclass(np.ndarray):
    """An array of another class."""


def _generator(array):
    return (image for image in array)


def _pictures(array):
    array = np.nan_to_num(array).clip(0, 255)
    return [Image.fromarray(image.astype(np.uint8)) for image in array.reshape(-1, 4)]


def _unequal(array):
    images = [image[: 1 + row] for row, image in enumerate(array)]
    if len({image.shape for image in images}) == 1:
        raise ValueError("they are equal")
    return images


def _loader(array):
    return torch.utils.data.DataLoader(torch.from_numpy(array.astype(np.float32)))


CONTAINERS = {
    "as it is": lambda array: array,
    "in Fortran's order": np.asfortranarray,
    "read-only": _read_only,
    "backwards": _backwards,
    "strided": _strided,
    "of a subclass": lambda array: array.view(Subclass),
    "masked": np.ma.masked_array,
    "an array-like": Arraylike,
    "list of lists": lambda array: array.tolist(),
    "list of arrays": list,
    "tuple of arrays": tuple,
    "object array of numbers": lambda array: array.astype(object),
    "object array of arrays": _objects,
    "series of arrays": _series,
    "data frame": lambda array: pd.DataFrame(array.reshape(len(array), -1)),
    "data frame of strings": lambda a: pd.DataFrame(a.reshape(len(a), -1)).astype(str),
    "sparse matrix": lambda a: scipy.sparse.csr_matrix(a.reshape(len(a), -1)),
    "sparse array": lambda a: scipy.sparse.coo_array(a.reshape(len(a), -1)),
    "generator": _generator,
    "pictures": _pictures,
    "list of unequal images": _unequal,
    "loader": _loader,
    "dict": lambda array: dict(enumerate(array)),
    "bytes": lambda array: array.tobytes(),
    "memory view": lambda array: memoryview(np.ascontiguousarray(array)),
    "map": lambda array: map(np.asarray, array),
}
# those that hold no array of the same shape, whether or not they are accepted
WITHOUT_PLAIN = {
    "object array of arrays",
    "series of arrays",
    "pictures",
    "list of unequal images",
    "dict",
    "bytes",
}


@st.composite
def contained(draw, of):
    """Draw arrays in containers; what a container does not take stays an array."""
    array, words = draw(of)
    name = draw(st.sampled_from(sorted(CONTAINERS)))
    try:
        value = CONTAINERS[name](array)
    except (TypeError, ValueError, AttributeError, IndexError):
        name, value = "as it is", array
    plain = None if name in WITHOUT_PLAIN else _plain(name, value, array)
    return Given(f"{words}, {name}", value, plain)


def _plain(name, value, array):
    if name == "data frame":
        return np.asarray(value)
    if name == "object array of numbers":
        return array.astype(float)
    if name in ("data frame of strings", "list of lists"):
        with contextlib.suppress(ValueError, OverflowError):
            numbers = np.asarray(value)
            # of a text, what is written to its last digit
            return numbers.astype(float) if name != "list of lists" else numbers
        return None
    return np.ascontiguousarray(array)


# Tensors


def _sparse(tensor):
    return tensor.float().to_sparse()


def _quantised(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.01, 0, torch.quint8)


def _nested(tensor):
    return torch.nested.nested_tensor(list(tensor.unbind()))


def _nested_jagged(tensor):
    return torch.nested.nested_tensor(list(tensor.unbind()), layout=torch.jagged)


def _of_inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def _channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


class TensorSubclass(torch.Tensor):
    """A tensor of another class."""


TENSORS = {
    "tensor": lambda tensor: tensor,
    "that requires gradients": lambda t: t.float().requires_grad_(),
    "in a graph": lambda tensor: tensor.float().requires_grad_() * 1,
    "parameter": lambda tensor: torch.nn.Parameter(tensor.float()),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "float16": lambda tensor: tensor.half(),
    "float8": lambda tensor: tensor.float().to(torch.float8_e4m3fn),
    "bool": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "sparse": _sparse,
    "quantised": _quantised,
    "nested": _nested,
    "jagged": _nested_jagged,
    "meta": lambda tensor: tensor.to("meta"),
    "of one number": lambda tensor: tensor.flatten()[0],
    "of inference": _of_inference,
    "strided": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels last": _channels_last,
    "expanded": lambda tensor: tensor[:1].expand(3, *tensor.shape[1:]),
    "of a subclass": lambda tensor: tensor.as_subclass(TensorSubclass),
    "negative view": lambda tensor: torch._neg_view(-tensor.float()),
    "conjugated": lambda tensor: tensor.to(torch.complex64).conj().imag,
    "list of tensors": lambda tensor: list(tensor.unbind()),
    "tuple of tensors": lambda tensor: tuple(tensor.unbind()),
    "data set": torch.utils.data.TensorDataset,
}
PLAIN_TENSORS = {
    "tensor",
    "that requires gradients",
    "in a graph",
    "parameter",
    "bfloat16",
    "float16",
    "float8",
    "bool",
    "of inference",
    "strided",
    "channels last",
    "expanded",
    "of a subclass",
    "negative view",
    "conjugated",
}


@st.composite
def tensors(draw, of):
    """Draw tensors; what torch makes no such tensor of stays an array."""
    array, words = draw(of)
    name = draw(st.sampled_from(sorted(TENSORS)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = TENSORS[name](torch.from_numpy(np.ascontiguousarray(array)))
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return Given(f"{words}, as it is", array, np.ascontiguousarray(array))
    plain = None
    if name in PLAIN_TENSORS:
        with torch.no_grad():
            plain = torch.Tensor(value.detach()) if name == "of a subclass" else value
            plain = plain.detach()
            if plain.is_floating_point():
                plain = plain.double()
            plain = plain.resolve_neg().numpy()
    return Given(f"{words}, {name}", value, plain)


@st.composite
def no_numbers(draw):
    """Draw arrays of what are no numbers."""
    dtype = draw(st.sampled_from(NO_NUMBERS))
    shape = draw(st.sampled_from([(2, *FITTED_SHAPE), (3, 768), (3,), ()]))
    return Given(f"{dtype} {shape}", np.zeros(shape, dtype))


OBJECTS = [
    None,
    0,
    1.5,
    "folder",
    b"folder",
    "",
    [],
    [[]],
    [None, None],
    ["a.png", "b.png"],
    [[1, 2], [3]],
    [[1, "a"], [2, "b"]],
    [{"a": 1}],
    {1, 2},
    {},
    object(),
    int,
    np.float64(3.0),
    np.array(None),
    np.array([None] * 3),
    range(3),
    slice(3),
    NotImplemented,
    ...,
]
objects = st.sampled_from(OBJECTS).map(lambda value: Given(repr(value)[:40], value))

# a half of them are good ones, so that what comes later is tried as well
images = st.one_of(
    arrays(usual=True).map(lambda drawn: Given(drawn[1], drawn[0], drawn[0])),
    contained(arrays(usual=True)),
    tensors(arrays(usual=True)),
    arrays().map(lambda drawn: Given(drawn[1], drawn[0], drawn[0])),
    contained(arrays()),
    tensors(arrays()),
    st.one_of(no_numbers(), objects),
)


# Labels


@st.composite
def labels(draw, n):
    """Draw labels of n images: right ones, and others."""
    kinds = ["none", "right", "right", "right", "numbers", "masks", "other"]
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return Given("None", None)
    if kind == "right" and draw(st.booleans()):
        return Given("right", np.resize([1, 1, -1], n))
    if kind == "other":
        return draw(objects)
    length = n if draw(st.integers(0, 4)) else draw(st.integers(0, 6))
    if kind == "masks":
        size = draw(st.sampled_from([(16, 16), (16, 16), (8, 8), (1, 1), (0, 0), (3,)]))
        y = np.zeros((length, *size))
        y[1::2] = draw(st.sampled_from([1, 255, 0.5, np.nan, np.inf]))
        dtypes = ["bool", "uint8", "float32", "float16", "int64", "complex64", "U3"]
    else:
        values = {
            "right": [1, -1],
            "numbers": draw(
                st.sampled_from(
                    [[0, 1], [1], [-1], [1, 2], [np.nan, 1], [1, np.inf], [1e300, 1]]
                )
            ),
        }[kind]
        y = np.resize(np.array(values, float), length)
        dtypes = ["int64", "float64", "int8", "bool", "object", "U4", "S4", "complex64"]
        dtypes += ["M8[s]", "longdouble", "float16"]
    dtype = dtypes[0]
    if kind != "right" or draw(st.booleans()):
        dtype = draw(st.sampled_from(dtypes))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if np.dtype(dtype).kind in "iu":
            y = np.nan_to_num(y).clip(-128, 127)
        y = (y.astype("i8") if dtype[0] == "M" else y).astype(dtype)
        words = f"{dtype} {y.shape} {kind}"
        form = draw(st.sampled_from(sorted(LABEL_FORMS)))
        try:
            return Given(f"{words}, {form}", LABEL_FORMS[form](y))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return Given(words, y)


LABEL_FORMS = {
    "array": lambda y: y,
    "column": lambda y: y[:, None],
    "list": lambda y: y.tolist(),
    "tuple": tuple,
    "series": pd.Series,
    "data frame": pd.DataFrame,
    "tensor": torch.from_numpy,
    "tensor with gradients": lambda y: torch.from_numpy(y).float().requires_grad_(),
    "bfloat16": lambda y: torch.from_numpy(y).bfloat16(),
    "sparse tensor": lambda y: torch.from_numpy(y).to_sparse(),
    "meta tensor": lambda y: torch.from_numpy(y).to("meta"),
    "quantised": lambda y: _quantised(torch.from_numpy(y)),
    "nested": lambda y: _nested(torch.from_numpy(y)),
    "sparse matrix": lambda y: scipy.sparse.csr_matrix(y.reshape(len(y), -1)),
    "masked": np.ma.masked_array,
    "generator": lambda y: (value for value in y),
    "dict": lambda y: dict(enumerate(y)),
    "set": lambda y: set(y.tolist()),
    "list of tensors": lambda y: list(torch.from_numpy(y)),
}


# Parameters

WRONG = [None, "x", -1, 0, 2.5, np.nan, np.inf, True, (), [], (1,), object(), {}, 1e300]
WRONG += [2**70, np.array([1, 2]), np.array(1), "", b"x", int, torch.ones(2), (0.5, 2)]
TAIL = {
    "batch_size": [1, 2, 3, 1000, 2**40, np.int64(2), np.uint8(3)],
    "precision": ["float32", "bfloat16", "float16", torch.float32],
    "device": [
        "auto",
        "cpu",
        "cpu:0",
        "cpu:7",
        "cuda",
        "cuda:9",
        "mps",
        "meta",
        "xpu",
        "lazy",
        "vulkan",
        "mkldnn",
        "hpu",
        "foo",
        "cuda:-1",
        "cuda:x",
        torch.device("cpu"),
    ],
    "image_shape": [
        (16, 16, 3),
        [16, 16, 3],
        (16, 16),
        np.array([16, 16, 3]),
        torch.tensor([16, 16, 3]),
        (16.0, 16.0, 3.0),
        (16, 16, 3, 5),
        (768,),
        (16, -16, 3),
        (16, 16, 0),
        ("16", "16"),
        ((16, 16, 3),),
        "abc",
        range(14, 17),
        {16: 1, 17: 2},
        {16, 17},
        (True, True),
        (np.nan, 1),
        (10**30, 1),
        (None, None),
        np.zeros((2, 2)),
        np.array(3),
        pd.Series([16, 16]),
    ],
    "random_state": [0, 2**32 - 1, 2**32, -1, np.random.RandomState(0), "x"],
    "contamination": [0.5, 1e-9, 0, 0.6, np.float32(0.1)],
    "verbose": [0, False, -1, "x"],
}


@st.composite
def settings_of(draw, cls):
    """Draw parameters of a detector, few of them."""
    names = [
        n for n in cls._parameter_constraints if n not in ("checkpoint", "verbose")
    ]
    settings = {}
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 1, 1, 2]))):
        if draw(st.booleans()):
            name = draw(st.sampled_from(sorted(TAIL)))
            values = TAIL[name]
        else:
            name = draw(st.sampled_from(sorted(names)))
            values = [v for v in WRONG if _is_quick(v)]
        settings[name] = values[draw(st.integers(0, len(values) - 1))]
    return settings


def _is_quick(value):
    # true counts and sizes, as great as that, are allowed and take long
    return not (isinstance(value, int) and value > 1000)


@st.composite
def cases(draw, cls):
    """Draw a call of a detector of a class."""
    X = draw(images)
    is_fit = draw(st.booleans())
    y = Given("None", None)
    if is_fit:
        try:
            n = len(X.value)
        except (TypeError, RuntimeError):
            n = 3
        y = draw(labels(n))
    return Case(is_fit, X, y, draw(settings_of(cls)))


# Outcomes


def small(cls, **settings):
    """Return a small detector."""
    return cls(**{"random_state": 0, **small_settings(cls), **settings})


def fitted_on_bytes(cls):
    """Return a small detector that is fitted on images of 16 pixels."""
    return small(cls).fit(striped(8), labels_for(cls, 8))


def names_an_argument(cls, message):
    """Return whether a text names X, y or a parameter of a class."""
    names = ["X", "y", *cls._parameter_constraints]
    return re.search(rf"(?<![\w.])({'|'.join(names)})(?!\w)", message) is not None


def outcome_of(case, cls, fitted):
    """Make a call, and judge what comes of it.

    Parameters
    ----------
    case : Case
        The call.
    cls : type
        Class of the detector.
    fitted : BaseDetector
        A detector fitted on bytes of the shape FITTED_SHAPE; left as it was.

    Returns
    -------
    str
        RIGHT, REFUSED, or what else has happened, in full.
    """
    before = fitted.get_params(deep=False)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if case.is_fit:
                detector = small(cls, **case.settings)
                detector.fit(case.X.value, case.y.value)
            else:
                detector = fitted.set_params(**case.settings)
            X = case.X.value
            if case.is_fit and isinstance(X, Iterator):
                return "fit took an iterator"
            scores, found = detector.score_samples(X), detector.predict(X)
            maps = detector.localize(X) if hasattr(detector, "localize") else None
    except (ValueError, TypeError, *_others_allowed(case.settings)) as error:
        if names_an_argument(cls, str(error)):
            return REFUSED
        return f"an error that names no argument: {_told(error)}"
    except Exception as error:
        return f"another error: {_told(error)}"
    else:
        return _judged(case, cls, detector, (scores, found, maps), seen)
    finally:
        fitted.set_params(**before)


def _others_allowed(settings):
    """Return errors that fit some parameters better."""
    if "weights" in settings:
        yield FileNotFoundError
    if any(isinstance(value, float) and value > 1e100 for value in settings.values()):
        yield FloatingPointError  # the training diverges


def _told(error):
    where = "".join(traceback.format_tb(error.__traceback__)[-2:])
    return f"{type(error).__name__}: {error}\n{where}"


def _judged(case, cls, detector, answers, seen):
    scores, found, maps = answers
    for warning in seen:
        is_own = issubclass(warning.category, UserWarning)
        if not is_own or not names_an_argument(cls, str(warning.message)):
            if "are copies of others" in str(warning.message):
                continue
            return f"a warning that names no argument: {warning}"
    n = len(scores)
    if n == 0 or scores.shape != (n,) or not np.isfinite(scores).all():
        return f"scores {scores!r}"
    if found.shape != (n,) or not np.isin(found, (-1, 1)).all():
        return f"predictions {found!r}"
    is_mapped = maps is None or maps.shape == (n, *detector.image_shape_[:2])
    if not is_mapped or not (maps is None or np.isfinite(maps).all()):
        return f"maps {maps!r}"
    plain = case.X.plain
    if plain is None:
        return "what holds no array was taken"
    if len(plain) != n:
        return f"{n} scores of {len(plain)} images"
    # the same numbers as a plain array
    if plain.dtype != np.uint8:
        plain = plain.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = detector.score_samples(plain)
        except Exception as error:
            return f"what was taken is refused as a plain array: {_told(error)}"
    if not np.allclose(scores, expected, rtol=1e-4, atol=1e-6):
        return f"scores {scores!r}, but of a plain array {expected!r}"
    return RIGHT
