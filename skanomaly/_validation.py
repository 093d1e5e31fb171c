"""What comes in: images and labels, checked in one place for every estimator."""

import math
import os
import warnings

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import _check_feature_names, validate_data

BYTE_LIKE = 100


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
        If X holds paths, NaN or infinity, too few images or images of another shape.
    """
    name = type(estimator).__name__
    if _holds_paths(X):
        raise ValueError(
            f"X holds strings or paths, but {name} works on images: put LoadImages() "
            "in front of it, make_pipeline(LoadImages(size=...), ...)."
        )
    if isinstance(X, torch.Tensor):
        images = _check_tensor(name, X, min_samples)
    else:
        images = check_array(
            X,
            dtype="numeric",
            allow_nd=True,
            ensure_min_samples=min_samples,
            estimator=estimator,
            input_name="X",
        )
    clip = () if clip_length is None else (clip_length,)
    n_axes = 1 + len(clip)
    if images.ndim not in (2, n_axes + 2, n_axes + 3) or (
        images.ndim > 2 and images.shape[1:n_axes] != clip
    ):
        wanted = "images (n, H, W, C) or (n, H, W), or their rows (n, H * W * C)"
        if clip:
            wanted = (
                f"clips of T = {clip_length} images, (n, T, H, W, C) or (n, T, H, W), "
                "or their rows (n, T * H * W * C)"
            )
        raise ValueError(
            f"X has shape {tuple(images.shape)}, but {name} wants {wanted}."
        )

    if images.ndim == 2:
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        shape = (
            _row_shape(name, images.shape[1], image_shape, clip_length or 1)
            if reset
            else estimator.image_shape_
        )
    else:
        _check_feature_names(estimator, X, reset=reset)
        shape = (*images.shape[n_axes:], 1)[:3]
        if 0 in shape:
            raise ValueError(
                f"X has shape {tuple(images.shape)}: its images are empty."
            )
        if image_shape is not None and shape != _full_shape(image_shape):
            raise ValueError(
                f"X holds images of shape {shape}, but image_shape={image_shape!r}."
            )
        if not reset and shape != estimator.image_shape_:
            raise ValueError(
                f"X holds images of shape {shape}, but {name} was fitted on images of "
                f"shape {estimator.image_shape_}."
            )
    if reset:
        estimator.image_shape_ = tuple(int(side) for side in shape)
        estimator.n_features_in_ = math.prod((*clip, *estimator.image_shape_))
    return images.reshape(len(images), *clip, *estimator.image_shape_)


def _holds_paths(X):
    if not isinstance(X, (list, tuple, np.ndarray)) and not hasattr(X, "iloc"):
        return isinstance(X, (str, os.PathLike))
    if getattr(X, "ndim", 1) != 1 or len(X) == 0:
        return False
    first = X.iloc[0] if hasattr(X, "iloc") else X[0]
    return isinstance(first, (str, os.PathLike))


def _check_tensor(name, X, min_samples):
    if X.ndim and len(X) < min_samples:
        raise ValueError(
            f"Found array with {len(X)} sample(s) (shape={tuple(X.shape)}) while a "
            f"minimum of {min_samples} is required by {name}."
        )
    if X.is_complex():
        raise ValueError(f"X holds complex numbers, but {name} wants real images.")
    if X.is_floating_point() and not all(chunk.isfinite().all() for chunk in X):
        raise ValueError(f"Input X contains NaN or infinity, which {name} refuses.")
    return X


def _full_shape(image_shape):
    return (*image_shape, 1)[:3]


def _row_shape(name, n_features, image_shape, n_images):
    if n_features % n_images:
        raise ValueError(
            f"X has {n_features} features, which {name} cannot share out to the "
            f"{n_images} images of a clip."
        )
    n_features //= n_images
    if image_shape is None:
        side = math.isqrt(n_features)
        return (side, side, 1) if side * side == n_features else (1, n_features, 1)
    shape = _full_shape(image_shape)
    if math.prod(shape) != n_features:
        raise ValueError(
            f"X has {n_features} features an image, but image_shape={image_shape!r} of "
            f"{name} asks for {math.prod(shape)}."
        )
    return shape


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
        +1 and -1, or None if y is None or holds other labels.

    Raises
    ------
    ValueError
        If the length of y is not ``n_samples`` or its shape neither (n,) nor (n, H, W).

    Warns
    -----
    UserWarning
        If y holds other labels than -1 and +1: they are ignored.
    """
    if y is None:
        return None
    y = np.asarray(y)
    if len(np.atleast_1d(y)) != n_samples:
        raise ValueError(f"y has length {len(np.atleast_1d(y))}, but X {n_samples}.")
    if y.ndim in (3, 4):
        return np.where(y.reshape(n_samples, -1).any(axis=1), -1, 1)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ValueError(
            f"y has shape {y.shape}; it must hold labels (n,) or masks (n, H, W)."
        )
    if not np.isin(y, (-1, 1)).all():
        warnings.warn(
            "y is ignored: labels must be +1 for normal and -1 for anomalous images, "
            f"but y holds {np.unique(y)[:5].tolist()}. Convert labels with 1 for "
            "anomalous images by np.where(y == 1, -1, 1).",
            stacklevel=3,
        )
        return None
    return y.astype(np.int64)


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
    if y is None:
        return np.ones(n_samples, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        labels = check_labels(y, n_samples)
    if labels is None:
        raise ValueError(
            "y must hold labels, +1 for a normal image and -1 for an anomalous one, or "
            f"masks of shape (n, H, W); got {np.unique(y)[:5].tolist()}. Convert "
            "labels that are 1 for an anomaly and 0 for a normal image by "
            "np.where(y == 1, -1, 1)."
        )
    return labels


def warn_of_bytes(images):
    """Warn of images that look like bytes but are of another type."""
    if images.dtype in (np.uint8, torch.uint8):
        return
    if images.dtype in (np.bool_, torch.bool) or getattr(images.dtype, "names", None):
        return
    if (largest := float(images.max())) >= BYTE_LIKE:
        warnings.warn(
            f"X holds values up to {largest:g}. Images that are not uint8 are taken to "
            "lie in [0, 1]: divide them by their largest possible value.",
            stacklevel=3,
        )


def check_out(out, shape):
    """Return an array that maps can be written into, or raise.

    Parameters
    ----------
    out : numpy.ndarray
        The array.
    shape : tuple of int
        The shape of the maps.

    Returns
    -------
    numpy.ndarray
        The array as it is.

    Raises
    ------
    TypeError
        If it is no array.
    ValueError
        If it is of another shape or type, or read-only.
    """
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
