"""What comes in: images, labels and ranges, checked in one place for every estimator.

A wrong input is refused, or warned of, at every call. What looks like another
convention is named with its mend.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from sklearn.utils import assert_all_finite, check_array
from sklearn.utils.validation import _check_feature_names, validate_data

from ._fitting.persistence import is_other

# values beyond which numbers in [0, 1] are something else; resampling overshoots a bit
OVERSHOOT = 0.25
# beyond it squares, and products of them, leave float32
LARGEST = 1e6
# a picture has so many channels at most, and sides that are longer than that
MOST_CHANNELS = 4
# the number of pixels from which on it matters how a row is read
SMALLEST_PICTURE = 48


def check_images(
    estimator, X, *, reset, image_shape=None, clip_length=None, min_samples=1
):
    """Check images and view them as an array of shape (n, H, W, C), without a copy.

    Sets ``n_features_in_`` and ``image_shape_`` of the estimator, or compares with
    them.

    Parameters
    ----------
    estimator : BaseEstimator
        The estimator that was given the images; named in the errors.
    X : array-like or torch.Tensor
        Images of shape (n, H, W, C) or (n, H, W), or their rows (n, H * W * C).
    reset : bool
        True in fit: remember the shape. False: compare with the one remembered.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of an image given as a row. None takes a square number
        of features for a square grey image, any other number for an image of one line.
    clip_length : int, default=None
        Number T of images a clip, where X holds clips (n, T, H, W, C), (n, T, H, W) or
        their rows. None where it holds images.
    min_samples : int, default=1
        Smallest number of images accepted.

    Returns
    -------
    numpy.ndarray or torch.Tensor of shape (n, H, W, C) or (n, T, H, W, C)
        The images or clips.

    Raises
    ------
    ValueError
        If X is no array of real numbers, holds paths, NaN or infinity, too few images,
        images of another shape, or images in another layout.
    """
    name = type(estimator).__name__
    given, image_shape = image_shape, _full_shape(image_shape)
    images = _as_array(estimator, X, min_samples)
    clip = () if clip_length is None else (clip_length,)
    fitted = None if reset else estimator.image_shape_
    _check_layout(name, tuple(images.shape), clip, image_shape or fitted)
    if images.ndim == 2:
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        shape = fitted or _row_shape(
            name, images.shape[1], image_shape, clip_length or 1
        )
        if reset and image_shape is None:
            _warn_of_rows(len(images), images.shape[1] // (clip_length or 1), shape)
    else:
        _check_feature_names(estimator, X, reset=reset)
        shape = (*images.shape[1 + len(clip) :], 1)[:3]
        if image_shape is not None and shape != image_shape:
            raise ValueError(
                f"X holds images of shape {shape}, but image_shape={given!r}."
            )
        if fitted is not None and shape != fitted:
            raise ValueError(
                f"X holds images of shape {shape}, but {name} was fitted on images of "
                f"shape {fitted}."
            )
    if reset:
        estimator.image_shape_ = tuple(int(side) for side in shape)
        estimator.n_features_in_ = math.prod((*clip, *estimator.image_shape_))
    return images.reshape(len(images), *clip, *estimator.image_shape_)


def _as_array(estimator, X, min_samples):
    """Return X as an array or tensor of finite real numbers."""
    name = type(estimator).__name__
    if X is None:
        raise ValueError(f"X is None, but {name} wants images.")
    if isinstance(X, torch.Tensor):
        return _check_tensor(name, X, min_samples)
    _refuse_what_is_no_array(name, X)
    try:
        if _is_plain(X) and len(X) >= min_samples:
            # all that `check_array` would find, in a fifth of its time
            assert_all_finite(X, estimator_name=name, input_name="X")
            return X
        return check_array(
            X,
            dtype="numeric",
            allow_nd=True,
            ensure_min_samples=min_samples,
            estimator=estimator,
            input_name="X",
        )
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        cause = str(error)
        if "contains NaN" in cause:  # and advice for tables in further lines
            (cause, *_) = cause.splitlines()
            cause += " Leave such images out, or fill in what is missing."
        raise kind(f"X is refused by {name}: {cause}") from error


def _is_plain(X):
    """Return whether X is an array of numbers with two axes or more, none empty."""
    return type(X) is np.ndarray and X.dtype.kind in "uif" and X.ndim > 1 and X.size > 0


def _refuse_what_is_no_array(name, X):
    """Raise if X holds images in a way that NumPy makes no array of."""
    if holds_paths(X):
        raise ValueError(
            f"X holds strings or paths, but {name} works on images: put LoadImages() "
            "in front of it, make_pipeline(LoadImages(size=...), ...)."
        )
    if isinstance(X, (torch.utils.data.DataLoader, torch.utils.data.Dataset)) or (
        hasattr(X, "__iter__") and not hasattr(X, "__len__")
    ):
        raise ValueError(
            f"X is a {type(X).__name__}, but {name} wants all images in one array: "
            "np.stack(list(X)), or np.concatenate(list(X)) of batches."
        )
    if getattr(getattr(X, "dtype", None), "kind", "") in ("m", "M"):
        raise ValueError(f"X holds dates or times, but {name} wants images.")
    is_sequence = isinstance(X, (list, tuple)) or (
        getattr(getattr(X, "dtype", None), "kind", "") == "O" and X.ndim == 1
    )
    if not is_sequence or len(X) == 0:
        return
    parts = list(X)
    if any(isinstance(part, torch.Tensor) for part in parts):
        raise ValueError("X is a list of tensors: give one tensor, torch.stack(X).")
    kinds = {type(part).__module__.partition(".")[0] for part in parts}
    if "PIL" in kinds:
        raise ValueError(
            "X holds pictures of Pillow: give one array, np.stack([np.asarray(image) "
            "for image in X])."
        )
    shapes = {np.shape(part) for part in parts if isinstance(part, np.ndarray)}
    if len(shapes) > 1:
        raise ValueError(
            f"X holds images of several shapes, {sorted(shapes)[0]} and "
            f"{sorted(shapes)[-1]} among them. LoadImages(size=...) loads files in one "
            "size; skimage.transform.resize resizes arrays one by one."
        )
    if shapes and not isinstance(X, (list, tuple)):
        raise ValueError(
            f"X is a {type(X).__name__} of arrays: give one array, np.stack(list(X))."
        )


def holds_paths(X):
    """Return whether X is a path, or holds paths instead of images."""
    if not isinstance(X, (list, tuple, np.ndarray)) and not hasattr(X, "iloc"):
        return isinstance(X, (str, os.PathLike))
    if getattr(X, "shape", ())[1:] not in ((), (1,)) or len(X) == 0:
        return False
    first = X.iloc[0] if hasattr(X, "iloc") else X[0]
    if getattr(X, "ndim", 1) == 2:  # of one column
        first = first.iloc[0] if hasattr(X, "iloc") else first[0]
    return isinstance(first, (str, os.PathLike))


def _check_tensor(name, X, min_samples):
    refuse_tensor_kinds(name, "X", X)
    if X.ndim == 0:
        raise ValueError(f"X is a single number, but {name} wants images.")
    if len(X) < min_samples:
        raise ValueError(
            f"X is refused: Found array with {len(X)} sample(s) (shape="
            f"{tuple(X.shape)}) while a minimum of {min_samples} is required by {name}."
        )
    if X.is_complex():
        raise ValueError(f"X holds complex numbers, but {name} wants real images.")
    if X.is_floating_point() and not all(chunk.isfinite().all() for chunk in X):
        raise ValueError(f"Input X contains NaN or infinity, which {name} refuses.")
    return X.detach().resolve_neg()


def refuse_tensor_kinds(name, argument, tensor):
    """Raise if a tensor is of a kind that little can be computed with.

    Parameters
    ----------
    name : str
        Who was given the tensor.
    argument : str
        As what it was given.
    tensor : torch.Tensor
        The tensor.

    Raises
    ------
    ValueError
        If it is nested, sparse, quantised, without numbers, or of 8 bits.
    """
    is_short = tensor.is_floating_point() and tensor.element_size() == 1
    is_nested = tensor.is_nested
    mends = {
        "nested": is_nested and "torch.stack({}.unbind()), if its parts are alike",
        "sparse": not is_nested and tensor.layout != torch.strided and "{}.to_dense()",
        "quantised": tensor.is_quantized and "{}.dequantize()",
        "meta": tensor.is_meta and "a tensor that holds numbers",
        "float8": is_short and "{}.float()",
    }
    for kind, mend in mends.items():
        if mend:
            raise ValueError(
                f"{argument} is a {kind} tensor, but {name} wants a plain one: "
                f"{mend.format(argument)}."
            )


def _check_layout(name, shape, clip, known):
    """Raise if X of a shape is no set of images, or one in another layout.

    Parameters
    ----------
    name : str
        Name of the estimator.
    shape : tuple of int
        Shape of X.
    clip : tuple of int
        Length of a clip, or empty where X holds images.
    known : tuple of int or None
        Shape (H, W, C) of the images that are expected, if it is known.
    """
    n_axes = 1 + len(clip)
    sides = shape[n_axes:]
    is_grey = known is not None and shape == known[:2] and shape[1] != math.prod(known)
    if not clip and known is not None and (shape == known or is_grey):
        raise ValueError(
            f"X has shape {shape}, that of one image: {name} wants a set of them, "
            "X[None]."
        )
    if len(shape) not in (2, n_axes + 2, n_axes + 3) or (
        len(shape) > 2 and shape[1:n_axes] != clip
    ):
        wanted = "images (n, H, W, C) or (n, H, W), or their rows (n, H * W * C)"
        if clip:
            wanted = (
                f"clips of T = {clip[0]} images, (n, T, H, W, C) or (n, T, H, W), "
                "or their rows (n, T * H * W * C)"
            )
        raise ValueError(f"X has shape {shape}, but {name} wants {wanted}.")
    if 0 in shape[1:]:
        raise ValueError(f"X has shape {shape}: its images are empty.")
    if len(shape) == 2:
        return
    if known is not None and (*sides, 1)[:3] == known:
        return

    def is_long(*lengths):
        return min(lengths) > MOST_CHANNELS

    if len(sides) == 3 and sides[0] in (1, 3, 4) and is_long(*sides[1:]):
        source = n_axes
        raise ValueError(
            f"X has shape {shape}, which looks like channels first: {name} wants them "
            f"last, np.moveaxis(X, {source}, -1) or, of a tensor, X.movedim({source}, "
            "-1). If these are images of so many channels, image_shape=(H, W, C) says "
            "so."
        )
    if not clip and len(shape) == 3 and shape[2] in (3, 4) and is_long(*shape[:2]):
        raise ValueError(
            f"X has shape {shape}. One image? {name} wants a set of them, X[None]. If "
            f"these are {shape[0]} grey images of {shape[2]} columns, X[..., None]."
        )


def _full_shape(image_shape):
    """Return the (H, W, C) that ``image_shape`` stands for, or None."""
    if image_shape is None:
        return None
    sides = ()
    if isinstance(image_shape, Sequence | np.ndarray) and np.ndim(image_shape) == 1:
        sides = tuple(image_shape)
    if len(sides) not in (2, 3) or not all(
        isinstance(side, Integral) and side is not True and side > 0 for side in sides
    ):
        raise ValueError(
            f"image_shape={image_shape!r} must be two or three integers >= 1, (H, W) "
            "or (H, W, C)."
        )
    return (*map(int, sides), 1)[:3]


def _row_shape(name, n_features, image_shape, n_images):
    if n_features % n_images:
        raise ValueError(
            f"X has {n_features} features, which {name} cannot share out to the "
            f"{n_images} images of a clip."
        )
    n_features //= n_images
    if image_shape is None:
        side = math.isqrt(n_features)
        if side * side == n_features:
            return side, side, 1
        return 1, n_features, 1
    if math.prod(image_shape) != n_features:
        raise ValueError(
            f"X has {n_features} features an image, but image_shape={image_shape} of "
            f"{name} asks for {math.prod(image_shape)}."
        )
    return image_shape


def _warn_of_rows(n_rows, n_features, shape):
    """Warn of rows that are hardly meant as they are read."""
    is_line = shape[0] == 1
    if n_features < SMALLEST_PICTURE or not (is_line or n_rows == n_features):
        return
    side = math.isqrt(n_features // 3)
    is_colour = 3 * side * side == n_features
    wanted = f"({side}, {side}, 3)" if is_colour else "(H, W, C)"
    kind = "one line" if is_line else f"{shape[0]} x {shape[1]} pixels"
    warnings.warn(
        f"X holds {n_rows} rows of {n_features} numbers, which are taken for grey "
        f"images of {kind}. If rows are images of another shape, image_shape={wanted} "
        "says so; if X is one grey image, X[None].",
        stacklevel=4,
    )


class ValueRange(NamedTuple):
    """The values of images.

    Parameters
    ----------
    is_bytes : bool
        Whether they are uint8, which are divided by 255.
    low, high : float
        The smallest and the largest value.
    """

    is_bytes: bool
    low: float
    high: float

    @property
    def is_unit(self):
        """Whether the values are those of images in [0, 1], up to some overshoot."""
        return self.is_bytes or (self.low >= -OVERSHOOT and self.high <= 1 + OVERSHOOT)

    def __str__(self):
        if self.is_bytes:
            return "bytes (uint8)"
        if self.low >= 0:
            return f"values up to {self.high:g}"
        return f"values from {self.low:g} to {self.high:g}"


def check_range(estimator, images, seen=None):
    """Refuse or warn of images whose values are on another scale.

    Parameters
    ----------
    estimator : BaseEstimator
        The estimator that was given the images; named in the errors.
    images : numpy.ndarray or torch.Tensor
        Images as `check_images` returns them.
    seen : tuple, default=None
        The range that fit saw. None in fit.

    Returns
    -------
    ValueRange or None
        The range of the images; None for features, which have no such scale.

    Raises
    ------
    ValueError
        If values are far too large for images, or if fit saw uint8 and the images hold
        numbers far outside of [0, 1].

    Warns
    -----
    UserWarning
        If numbers lie outside of [0, 1], or are on another scale than those of fit.
    """
    if getattr(images.dtype, "names", None) is not None:
        return None
    if images.dtype in (np.uint8, torch.uint8):
        own = ValueRange(True, 0.0, 255.0)
    else:
        own = ValueRange(False, *_extremes(images))
    name = type(estimator).__name__
    if max(-own.low, own.high) > LARGEST:
        raise ValueError(
            f"X holds {own}, which is no scale of images: {name} wants uint8, or "
            "numbers in [0, 1]."
        )
    if seen is None:
        if not own.is_unit:
            _warn_of_range(
                f"X holds {own}. Images that are not uint8 are taken to lie in [0, 1]: "
                + _mend_of(own)
            )
        return own
    seen = ValueRange(*seen)
    words = f"X holds {own}, but {name} was fitted on {seen}"
    low, high = min(seen.low, 0.0), max(seen.high, 1.0)
    if seen.is_bytes:
        low, high = 0.0, 1.0
    margin = (high - low) / 2
    is_outside = not own.is_bytes and (
        own.low < low - margin or own.high > high + margin
    )
    if is_outside and seen.is_bytes:
        raise ValueError(
            f"{words}, which are divided by 255: give the same, X.astype(np.uint8) "
            "where the values are theirs, or numbers in [0, 1]."
        )
    if is_outside:
        _warn_of_range(f"{words}: its scores say little unless the scale is the same.")
    elif not seen.is_unit and own.is_unit and own.high > 0:
        is_smaller = seen.high > 4 * max(own.high, 1.0)
        if own.is_bytes or is_smaller or seen.low < -OVERSHOOT <= own.low:
            _warn_of_range(
                f"{words}: uint8 is divided by 255, all else is taken as it is. Give "
                "what fit was given."
            )
    return own


def _extremes(images):
    if images.dtype in (torch.uint16, torch.uint32, torch.uint64):
        images = images.double()  # of them torch finds no minimum
    return float(images.min()), float(images.max())


def _mend_of(own):
    if own.low < 0:
        return (
            "scale them to it. If they were standardised, leave that out: backbones "
            "standardise by themselves."
        )
    return "divide them by their largest possible value."


def _warn_of_range(message):
    warnings.warn(message, stacklevel=5)


def check_default_dtype():
    """Raise if torch makes tensors of another type than the networks have."""
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default dtype is {torch.get_default_dtype()}, but networks "
            "compute in float32: torch.set_default_dtype(torch.float32)."
        )


def check_finite(estimator, degrees, maps=None):
    """Raise if an estimator's degrees of anomaly, or its maps, are no numbers.

    Parameters
    ----------
    estimator : BaseEstimator
        The estimator; named in the error.
    degrees : numpy.ndarray of shape (n,)
        Degrees of anomaly.
    maps : numpy.ndarray of shape (n, ...) or None, default=None
        Maps, or their maxima.

    Raises
    ------
    ValueError
        If one of them is NaN or infinite.
    """
    for what, values in (("scores", degrees), ("maps", maps)):
        if values is not None and not np.isfinite(values).all():
            raise ValueError(
                f"The {what} that {type(estimator).__name__} finds for X are not "
                "finite: the values of X are too large for its network, or its weights "
                "are no numbers."
            )


def check_labels(y, n_samples):
    """Read labels or masks as +1 (normal) and -1 (anomalous).

    Parameters
    ----------
    y : array-like of shape (n,), (n, H, W) or (n, T, H, W), or None
        Labels within {-1, +1}, or masks, True where anomalous.
    n_samples : int
        Number of images.

    Returns
    -------
    numpy.ndarray of shape (n,) or None
        +1 and -1, or None if y is None or holds other numbers.

    Raises
    ------
    ValueError
        If the length of y is not ``n_samples`` or its shape neither (n,) nor (n, H, W),
        or if it holds names or booleans.

    Warns
    -----
    UserWarning
        If y holds other numbers than -1 and +1: they are ignored.
    """
    labels, problem = _read_labels(y, n_samples)
    if problem is not None:
        warnings.warn(f"y is ignored: {problem}", stacklevel=4)
    return labels


def required_labels(y, n_samples):
    """Read labels or masks as `check_labels` does, but refuse others.

    Parameters
    ----------
    y : array-like of shape (n,), (n, H, W) or (n, T, H, W), or None
        Labels within {-1, +1}, or masks, True where anomalous. None: all are normal.
    n_samples : int
        Number of images.

    Returns
    -------
    numpy.ndarray of shape (n,)
        +1 and -1.

    Raises
    ------
    ValueError
        If y holds other labels, or as many as there are no images.
    """
    labels, problem = _read_labels(y, n_samples)
    if problem is not None:
        raise ValueError(problem)
    return np.ones(n_samples, np.int64) if labels is None else labels


def _read_labels(y, n_samples):
    """Return labels or None, and what is wrong with numbers that are none, or None."""
    if y is None:
        return None, None
    y = _labels_as_array(y)
    if len(np.atleast_1d(y)) != n_samples:
        raise ValueError(f"y has length {len(np.atleast_1d(y))}, but X {n_samples}.")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 3, 4):
        raise ValueError(
            f"y has shape {y.shape}; it must hold labels (n,) or masks (n, H, W)."
        )
    if y.dtype == object:
        kinds = set(map(type, y.ravel().tolist()))
        if kinds <= {bool, np.bool_}:
            y = y.astype(bool)
        elif str not in kinds:
            with contextlib.suppress(TypeError, ValueError):
                y = y.astype(float)
    rule = "labels must be +1 for normal and -1 for anomalous images"
    values = np.unique(y.astype(str) if y.dtype == object else y)[:5].tolist()
    if y.dtype.kind in "cmM":
        raise ValueError(f"y holds numbers of the type {y.dtype}, but {rule}.")
    if y.dtype.kind in "OUS":
        raise ValueError(
            f"y holds names, {values} among them, but {rule}: datasets.labels_from(y, "
            "normal=...) converts them, with the name of what is normal."
        )
    if y.ndim > 1:
        if y.dtype.kind == "f" and np.isnan(y).any():
            raise ValueError("y holds masks with NaN; True or 1 is anomalous, 0 not.")
        return np.where(y.reshape(n_samples, -1).any(axis=1), -1, 1), None
    if y.dtype.kind == "b":
        raise ValueError(
            f"y holds booleans, but {rule}: datasets.labels_from(y, normal=True) if "
            "True is normal, normal=False if True is anomalous."
        )
    if np.isin(y, (-1, 1)).all():
        return y.astype(np.int64), None
    return None, (
        f"{rule}, or masks (n, H, W), but y holds {values}. datasets.labels_from(y, "
        "normal=...) converts labels, with the value of what is normal."
    )


def _labels_as_array(y):
    rule = "labels (n,), +1 for normal and -1 for anomalous images, or masks (n, H, W)"
    if isinstance(y, torch.Tensor):
        refuse_tensor_kinds("fit", "y", y)
        y = y.detach().cpu().resolve_neg()
        y = y.float() if y.dtype == torch.bfloat16 else y  # which NumPy does not know
    try:
        return np.asarray(y)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y must be an array of {rule}: {error}") from error


def normal_rows(estimator, labels, least=2):
    """Return the rows of the normal images, of which ``least`` are needed."""
    normal = np.flatnonzero(labels == 1)
    if len(normal) < least:
        raise ValueError(
            f"{type(estimator).__name__} learns from normal images (label +1) and "
            f"needs {least} or more, but y marks n_samples = {len(normal)}."
        )
    return normal


def warn_of_copies(groups):
    """Warn of images that are in a training set more than once."""
    n_copies = len(groups) - len(np.unique(groups))
    if n_copies:
        warnings.warn(
            f"{n_copies} of the {len(groups)} training images are copies of others "
            "among them. They teach nothing new, and hide how new images score.",
            stacklevel=4,
        )


def checked_offset(estimator):
    """Return the threshold of the scores of a fitted detector.

    Parameters
    ----------
    estimator : BaseDetector
        A fitted detector.

    Returns
    -------
    float
        Its ``offset_``.

    Warns
    -----
    UserWarning
        If parameters that judge were set since: the thresholds belong to others.
    """
    built_from = estimator._built_from
    changes = [
        f"{name}={getattr(estimator, name)!r} (in fit {built_from[name]!r})"
        for name in estimator._judged_by
        if name in built_from and is_other(getattr(estimator, name), built_from[name])
    ]
    if changes:
        warnings.warn(
            f"{', '.join(changes)} was set after fit: scores and maps go by it, but "
            "offset_ and map_threshold_ are those of the fit. Fit again, have new ones "
            "of new normal images by ThresholdCalibrator(method='prefit'), or take "
            "score_samples and localize.",
            stacklevel=3,
        )
    return estimator.offset_


def check_masks(masks):
    """Return masks as a boolean array, or raise if they hold more than two values."""
    masks = _values_of("masks", masks)
    if masks.dtype.kind not in "biu" or (
        masks.dtype != bool and not np.array_equal(masks, masks.astype(bool))
    ):
        raise ValueError(
            "masks must be boolean or hold the integers 0 (normal) and 1 (anomalous), "
            f"got {masks.dtype} with values such as {np.unique(masks)[:5]}. Binarise "
            "at half of the maximum, for example with `masks > 127` for 8-bit images."
        )
    return masks.astype(bool, copy=False)


def check_maps(maps):
    """Return maps as an array, or raise if they hold other than finite numbers."""
    maps = _values_of("maps", maps)
    if maps.dtype.kind not in "biuf":
        raise ValueError(f"maps must hold real numbers, got {maps.dtype}.")
    if not np.isfinite(maps).all():
        raise ValueError("maps must be finite, got NaN or infinity.")
    return maps


def _values_of(name, values):
    if values is None:
        raise TypeError(f"{name} must be an array of shape (n, H, W), got None.")
    if hasattr(values, "detach"):  # a tensor
        values = values.detach().cpu()
    return np.asarray(values)


def has_maps(detector):
    """Return True, or raise for a detector without maps; for ``available_if``."""
    if (reason := detector._why_no_maps()) is not None:
        raise AttributeError(f"{type(detector).__name__} has no maps: {reason}.")
    return True


def check_out(out, shape):
    """Return the array that maps are written into: the one given, or a new one.

    Parameters
    ----------
    out : numpy.ndarray or None
        The array.
    shape : tuple of int
        The shape of the maps.

    Returns
    -------
    numpy.ndarray
        The array as it is, or one of float32.

    Raises
    ------
    TypeError
        If it is no array.
    ValueError
        If it is of another shape or type, or read-only.
    """
    if out is None:
        return np.empty(shape, np.float32)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array, got {type(out).__name__}.")
    if out.shape != shape or out.dtype.kind != "f":
        raise ValueError(
            f"out has shape {out.shape} and type {out.dtype}, but the maps "
            f"are of shape {shape} and floating-point."
        )
    if not out.flags.writeable:
        raise ValueError("out is read-only: open the file with mode='r+' or 'w+'.")
    return out
