"""The contract that every detector keeps, and the training that networks share."""

import math
import os
import warnings
from abc import ABCMeta, abstractmethod
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin, _fit_context
from sklearn.utils import check_array, check_random_state, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import (
    _check_feature_names,
    check_is_fitted,
    validate_data,
)

from ._fitting.loop import autocast, seeded, train
from ._fitting.persistence import PersistentNetwork, channels_last, plain_parameters
from ._fitting.processes import Processes
from ._fitting.progress import Checkpoint, content_checksum

BYTE_LIKE = 100


def resolve_device(device, X=None):
    """Return the device to compute on.

    Parameters
    ----------
    device : str
        A torch device, or "auto": that of ``X`` if it is a tensor, else CUDA, else
        MPS, else the CPU, whatever is there first.
    X : array-like, default=None
        The images to compute on.

    Returns
    -------
    torch.device
        The device.
    """
    if device != "auto":
        return torch.device(device)
    if isinstance(X, torch.Tensor):
        return X.device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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


class ImageBatches:
    """Images of an array, handed out as tensors a batch at a time.

    Parameters
    ----------
    array : numpy.ndarray or torch.Tensor of shape (n, H, W, C) or (n, T, H, W, C)
        Images or clips, uint8 in [0, 255] or real numbers in [0, 1]; or a structured
        array of shape (n,) whose fields have the shape (H, W, C).
    device : torch.device
        Where the tensors are wanted.
    rows : numpy.ndarray of int, default=None
        Which images of the array these are; None takes them all.
    """

    def __init__(self, array, device, rows=None):
        self.array = array
        self.device = device
        self.rows = np.arange(len(array)) if rows is None else rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        """Return the images of some rows as float32: (b, C, H, W) or (b, C, T, H, W).

        In memory the channels come last.
        """
        rows = self.rows[index]
        if isinstance(self.array, torch.Tensor):
            return _to_unit(self.array[torch.as_tensor(rows)], self.device)
        chunk = self.array[rows]
        if chunk.dtype.names is None:
            return _to_unit(_to_tensor(chunk), self.device)
        return {
            name: _to_unit(_to_tensor(chunk[name]), self.device)
            for name in chunk.dtype.names
        }


class AnnotatedImages:
    """Images with one more channel that is computed from each image once.

    Parameters
    ----------
    images : ImageBatches
        Images.
    annotate : callable
        ``annotate(images)`` returns an array (b, H, W) for images (b, C, H, W). It is
        kept in memory as it is.
    """

    def __init__(self, images, annotate):
        self.images = images
        self.device = images.device
        self.annotate = annotate
        self.known = {}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        """Return images and annotations as float32: (b, C + 1, H, W)."""
        images = self.images[indices]
        numbers = np.arange(len(self))[indices].tolist()
        new = [i for i, number in enumerate(numbers) if number not in self.known]
        if new:
            for i, annotation in zip(new, self.annotate(images[new]), strict=True):
                self.known[numbers[i]] = annotation
        annotations = np.stack([self.known[number] for number in numbers])
        annotations = torch.from_numpy(annotations.astype(np.float32))
        return torch.cat([images, annotations[:, None].to(images.device)], dim=1)


def _to_tensor(array):
    dtype = np.uint8 if array.dtype == np.uint8 else np.float32
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


def _to_unit(images, device):
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    images = images.to(device).to(torch.float32)
    return (images / scale if scale != 1.0 else images).movedim(-1, 1)


def _warn_of_bytes(images):
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


class BaseDetector(PersistentNetwork, OutlierMixin, BaseEstimator, metaclass=ABCMeta):
    """Base of all detectors: images in, scores and maps out.

    A method writes ``_fit(images, labels)`` and ``_anomaly_maps(images)``, and
    ``_anomaly_scores(images, maps)`` unless the maximum of the map is its score.
    Methods that hold a network keep it in ``network_`` and write ``_build_network()``,
    from which a pickled estimator is rebuilt.
    """

    _parameter_constraints = {
        "image_shape": ["array-like", None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
        "precision": [StrOptions({"float32", "bfloat16"})],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self):
        return hasattr(self, "offset_")

    # whether a fit continues the one before
    _goes_on = False

    def _resume(self, images, labels):
        """Go back to where a fit that was killed had come to."""

    def _end_fit(self):
        """Tidy up behind a fit."""

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Learn what normal images look like.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Training images, uint8 in [0, 255] or real numbers in [0, 1].
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels, +1 for normal and -1 for anomalous images, or masks, True where
            anomalous. Anomalous images are left out of the training, but by DeScarGAN,
            which learns from both and needs `y`.

        Returns
        -------
        self : object
            The fitted detector.
        """
        X = self._check_X(X, reset=True)
        labels = self._check_y(y, len(X))
        images, labels = self._training_images(X, labels)
        _warn_of_bytes(images.array)
        self.__dict__.pop("offset_", None)
        self._resume(images, labels)
        if not self._goes_on:
            self.__dict__.pop("network_", None)
            self._built_from = plain_parameters(self)
            seed = check_random_state(self.random_state).randint(2**31 - 1)
            self._seed = int(Processes().of_first(torch.tensor(seed)))
        with seeded(self._seed):
            self._fit(images, labels)
        self._set_thresholds(images)
        self._end_fit()
        return self

    def score_samples(self, X):
        """Score images: the higher, the more normal.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.

        Returns
        -------
        numpy.ndarray of shape (n,)
            Scores, the negative of the image's degree of anomaly.
        """
        batches = self._evaluate(self._images(X), maps_wanted=False)
        return -np.concatenate([scores for _, scores, _ in batches])

    def decision_function(self, X):
        """Score images relative to the threshold learned in fit.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.

        Returns
        -------
        numpy.ndarray of shape (n,)
            ``score_samples(X) - offset_``, negative for anomalous images.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X):
        """Tell normal from anomalous images.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.

        Returns
        -------
        numpy.ndarray of shape (n,)
            +1 for normal and -1 for anomalous images.
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def fit_predict(self, X, y=None, **fit_params):
        """Fit and tell normal from anomalous images of the same set.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Training images.
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels or masks, as `fit` takes them.
        **fit_params : dict
            Further arguments of `fit`.

        Returns
        -------
        numpy.ndarray of shape (n,)
            +1 for normal and -1 for anomalous images.
        """
        return self.fit(X, y, **fit_params).predict(X)

    def localize(self, X, *, out=None):
        """Map where images are anomalous.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.
        out : numpy.ndarray of shape (n, H, W), default=None
            Array of floating-point numbers to write the maps into, batch by batch, such
            as a `numpy.memmap` for more maps than memory holds. None makes a new one.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            Anomaly maps, float32 unless `out` is of another type, high where anomalous.
        """
        images = self._images(X)
        shape = (len(images), *self._map_shape)
        result = np.empty(shape, np.float32) if out is None else out
        if not isinstance(result, np.ndarray):
            raise TypeError(f"out must be an array, got {type(out).__name__}.")
        if result.shape != shape or result.dtype.kind != "f":
            raise ValueError(
                f"out has shape {result.shape} and type {result.dtype}, but the maps "
                f"are of shape {shape} and floating-point."
            )
        if not result.flags.writeable:
            raise ValueError("out is read-only: open the file with mode='r+' or 'w+'.")
        for rows, _, maps in self._evaluate(images, maps_wanted=True):
            result[rows] = maps
        return result

    def segment(self, X):
        """Mark the anomalous pixels of anomalous images.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            True where the map exceeds ``map_threshold_``, in images that ``predict``
            calls anomalous.
        """
        images = self._images(X)
        result = np.empty((len(images), *self._map_shape), bool)
        for rows, scores, maps in self._evaluate(images, maps_wanted=True):
            normal = -scores - self.offset_ >= 0
            result[rows] = maps > self.map_threshold_
            result[rows][normal] = False
        return result

    @abstractmethod
    def _fit(self, images, labels):
        """Learn from the training images, an ImageBatches, and their labels or None."""

    @abstractmethod
    def _anomaly_maps(self, images):
        """Return the maps (b, H, W) of images (b, C, H, W)."""

    def _anomaly_scores(self, images, maps):
        """Return the degrees of anomaly (b,) of images."""
        return maps.flatten(1).amax(dim=1)

    def _embed(self, images):
        """Return what maps and scores are both computed from: the images themselves."""
        return images

    _scores_need_maps = True
    _clip_length = None

    @property
    def _map_shape(self):
        """Shape of the map of one sample."""
        return self.image_shape_[:2]

    def _check_X(self, X, *, reset):
        return check_images(
            self,
            X,
            reset=reset,
            image_shape=self.image_shape,
            clip_length=self._clip_length,
            min_samples=2 if reset else 1,
        )

    def _check_y(self, y, n_samples):
        return check_labels(y, n_samples)

    def _images(self, X):
        check_is_fitted(self)
        X = self._check_X(X, reset=False)
        device = resolve_device(self.device, X)
        parameters = self.network_.parameters() if hasattr(self, "network_") else ()
        if any(parameter.device != device for parameter in parameters):
            self.network_.to(device)
        return ImageBatches(X, device)

    def _training_images(self, X, labels):
        device = resolve_device(self.device, X)
        if labels is None:
            return ImageBatches(X, device), None
        normal = np.flatnonzero(labels == 1)
        if len(normal) < 2:
            raise ValueError(
                f"{type(self).__name__} learns from normal images (label +1) and needs "
                f"2 or more, but y marks n_samples = {len(normal)}."
            )
        return ImageBatches(X, device, normal), labels[normal]

    def _in_batches(self, images, function):
        """Yield the rows of each batch and what a function returns for its images."""
        for rows in gen_batches(len(images), self.batch_size):
            with (
                torch.inference_mode(),
                seeded(self._seed),
                autocast(images.device, self.precision),
            ):
                result = function(images[rows])
            yield rows, result

    def _evaluate(self, images, *, maps_wanted):
        """Yield the rows, anomaly scores and maps (or None) of each batch."""

        def evaluate(batch):
            embedded = self._embed(batch)
            maps = (
                self._anomaly_maps(embedded)
                if maps_wanted or self._scores_need_maps
                else None
            )
            return self._anomaly_scores(embedded, maps), maps

        for rows, (scores, maps) in self._in_batches(images, evaluate):
            yield (
                rows,
                scores.cpu().double().numpy(),
                None if maps is None else maps.float().cpu().numpy(),
            )

    def _scores_and_peaks(self, images):
        """Return the scores (n,) of images and the maxima (n,) of their maps."""
        scores, peaks = [], []
        for _, batch_scores, maps in self._evaluate(images, maps_wanted=True):
            scores.append(-batch_scores)
            peaks.append(maps.reshape(len(maps), -1).max(axis=1))
        return np.concatenate(scores), np.concatenate(peaks)

    def _set_thresholds(self, images):
        scores, peaks = self._scores_and_peaks(images)
        self.offset_ = np.percentile(scores, 100 * self.contamination)
        self.map_threshold_ = np.quantile(peaks, 1 - self.contamination)


def _to_fact(value):
    """Return a short text that differs where values differ."""
    if isinstance(value, np.random.RandomState):
        return "a RandomState"
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return str(content_checksum(value))
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_to_fact, value))})"
    return repr(value)


class NetworkDetector(BaseDetector):
    """Base of the detectors that train a network.

    A method writes ``_build_network()``, which may read ``image_shape_``, and
    ``_losses(network, batch)``, a generator of ``(part, loss)``.
    """

    _parameter_constraints = {
        **BaseDetector._parameter_constraints,
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), None],
        "warm_start": ["boolean"],
        "checkpoint": [str, os.PathLike, None],
        "checkpoint_every": [Interval(Integral, 1, None, closed="left")],
    }

    _weight_decay = 0.0

    @abstractmethod
    def _build_network(self):
        """Return the untrained network."""

    def _initial_network(self, images):
        """Return the network that a fit begins with."""
        return self._build_network()

    @abstractmethod
    def _losses(self, network, batch):
        """Yield ``(part, loss)`` for each optimiser step that the batch is worth."""

    def _optimizer(self, part):
        trainable = [p for p in part.parameters() if p.requires_grad]
        return torch.optim.Adam(
            trainable,
            lr=self.learning_rate,
            weight_decay=self._weight_decay,
            fused=True,
        )

    def _scheduler(self, optimizer):
        return None

    # private attributes of a fit that a training goes on from
    _kept_names = ("_seed", "_built_from")
    _checkpoint = None
    _loop_state = None

    @property
    def _goes_on(self):
        continues = self.warm_start or self._loop_state is not None
        return continues and hasattr(self, "network_")

    def _facts(self, images, labels):
        """Return what the fit depends on, as strings by name."""
        facts = {
            name: _to_fact(value)
            for name, value in self.get_params(deep=False).items()
            if name not in ("checkpoint", "checkpoint_every", "verbose", "warm_start")
        }
        facts["images"] = f"{len(images)} of checksum " + _to_fact(images.array)
        facts["rows"] = _to_fact(images.rows)
        facts["labels"] = _to_fact(labels)
        facts["epochs before"] = str(len(self.loss_curve_) if self._goes_on else 0)
        facts["processes"] = str(Processes().count)
        return {"method": type(self).__name__, **facts}

    def _resume(self, images, labels):
        for name in ("_checkpoint", "_loop_state"):
            self.__dict__.pop(name, None)
        if self.checkpoint is None:
            return
        facts = self._facts(images, labels)
        self._checkpoint = Checkpoint(self.checkpoint, self.checkpoint_every, facts)
        processes = Processes()
        saved = self._checkpoint.load() if processes.rank == 0 else None
        saved = processes.object_of_first(saved)
        if saved is not None:
            state, self._loop_state = saved
            vars(self).update(state)
            self._restore_network(self.network_)
            self._optimizers = {}

    def _keep(self, n_epochs, loop_state):
        if n_epochs % self._checkpoint.every == 0:
            state = {
                name: value
                for name, value in self.__getstate__().items()
                if name in self._kept_names or name.endswith("_")
            }
            self._checkpoint.save(state, loop_state())

    def _end_fit(self):
        if self._checkpoint is not None:
            processes = Processes()
            if self._is_trained and processes.rank == 0:
                self._checkpoint.remove()
            processes.wait()
            del self._checkpoint
        self.__dict__.pop("_is_trained", None)

    def _check_X(self, X, *, reset):
        if reset and self._goes_on:
            try:
                return super()._check_X(X, reset=False)
            except ValueError as error:
                raise ValueError(
                    f"{error} With warm_start=True a fit goes on with the network of "
                    "the last one."
                ) from error
        return super()._check_X(X, reset=reset)

    def _fit(self, images, labels):
        self._start(images)
        self._train(
            images,
            labels,
            losses=self._losses,
            scheduler=self._scheduler,
            loss_curve=self.loss_curve_,
            validation_curve=self.validation_curve_,
            max_epochs=self.max_epochs,
        )

    def _start(self, images):
        """Make the network, unless a warm start has one, and move it to its device."""
        if self._goes_on:
            self._check_architecture()
            self._own_weights()
        else:
            self.network_ = self._initial_network(images)
            self.loss_curve_ = []
            self.validation_curve_ = []
            self._optimizers = {}
        channels_last(self.network_.to(images.device))
        for optimizer in self._optimizers.values():
            # moves the moments to the device of the weights
            optimizer.load_state_dict(optimizer.state_dict())

    def _check_architecture(self):
        """Raise if the network of the last fit is not one of the parameters."""
        with torch.device("meta"):
            wanted = self._build_network().state_dict()
        shapes = [
            {name: tensor.shape for name, tensor in state.items()}
            for state in (self.network_.state_dict(), wanted)
        ]
        if shapes[0] == shapes[1]:
            return
        changes = ", ".join(
            f"{name}={value!r} (was {self._built_from[name]!r})"
            for name, value in plain_parameters(self).items()
            if value != self._built_from.get(name, value)
        )
        raise ValueError(
            "With warm_start=True a fit goes on with the network of the last one, "
            f"which these parameters do not describe: {changes}. Set them back, or "
            "warm_start to False."
        )

    def _train(self, images, labels, *, loss_curve, **settings):
        """Train with the settings of the estimator; return whether it was finished."""
        torch.manual_seed(self._seed + len(loss_curve))
        resumed = self.__dict__.pop("_loop_state", None)
        try:
            self._is_trained = train(
                self.network_,
                images,
                None if labels is None else torch.from_numpy(labels),
                optimizer=self._optimizer,
                optimizers=self._optimizers,
                loss_curve=loss_curve,
                batch_size=self.batch_size,
                validation_fraction=self.validation_fraction,
                n_iter_no_change=self.n_iter_no_change,
                seed=self._seed,
                precision=self.precision,
                verbose=self.verbose,
                resumed=resumed,
                keep=None if self._checkpoint is None else self._keep,
                **settings,
            )
            return self._is_trained
        finally:
            self.n_iter_ = len(self.loss_curve_)

    def __getstate__(self):
        state = super().__getstate__()
        return {
            name: value
            for name, value in state.items()
            if name not in ("_optimizers", "_checkpoint", "_loop_state")
        }

    def __setstate__(self, state):
        super().__setstate__(state)
        if hasattr(self, "network_"):
            self._optimizers = {}
