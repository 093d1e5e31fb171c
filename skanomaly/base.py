"""The contract that every detector keeps, and the training that networks share."""

import os
from abc import ABCMeta, abstractmethod
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from . import _regions, _validation
from ._fitting import batches, loop, persistence
from ._fitting.persistence import PersistentNetwork
from ._fitting.processes import Processes
from ._fitting.progress import Progress
from ._typing import Self, available_if, fit_context


class BaseDetector(PersistentNetwork, OutlierMixin, BaseEstimator, metaclass=ABCMeta):
    """Base of all detectors: images in, scores and maps out.

    A method writes ``_fit`` and ``_judge``. Methods that hold a network keep it in
    ``network_`` and write ``_build_network()``, from which a pickled estimator is
    rebuilt. Prediction writes nothing on the estimator.
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

    # number of images a clip, of methods that take clips
    _clip_length = None

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self):
        return hasattr(self, "offset_")

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Learn what normal images look like.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Training images, uint8 in [0, 255] or real numbers in [0, 1].
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels, +1 for normal and -1 for anomalous images, or masks, True where
            anomalous. Anomalous images are left out of the training, but by FCDD and
            DeScarGAN, which learn from both; the latter needs `y`.

        Returns
        -------
        self : object
            The fitted detector.
        """
        return self._fit_to(X, y)

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
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
        fitted, images = self._prepare(X)
        batches = fitted._evaluate(images, maps_wanted=False)
        return -np.concatenate([degrees for _, degrees, _ in batches])

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
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
        return self.score_samples(X) - _validation.checked_offset(self)

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
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

    def fit_predict(
        self, X: ArrayLike, y: ArrayLike | None = None, **fit_params
    ) -> NDArray[np.int64]:
        return self.fit(X, y, **fit_params).predict(X)

    @available_if(_validation.has_maps)
    def localize(
        self, X: ArrayLike, *, out: NDArray[np.floating] | None = None
    ) -> NDArray[np.floating]:
        """Map where images are anomalous.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.
        out : numpy.ndarray of shape (n, H, W), default=None
            Floating-point numbers to write the maps into, batch by batch, such as a
            :class:`numpy.memmap` for more maps than memory holds. None makes a new one.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            Anomaly maps, float32 unless `out` is of another type, high where anomalous.
        """
        fitted, images = self._prepare(X)
        shape = (len(images), *fitted._map_shape)
        result = _validation.check_out(out, shape)
        for rows, _, maps in fitted._evaluate(images, maps_wanted=True):
            result[rows] = maps
        return result

    @available_if(_validation.has_maps)
    def segment(self, X: ArrayLike) -> NDArray[np.bool_]:
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
        fitted, images = self._prepare(X)
        result = np.empty((len(images), *fitted._map_shape), bool)
        thresholds = _validation.checked_offset(self), self.map_threshold_
        for rows, degrees, maps in fitted._evaluate(images, maps_wanted=True):
            result[rows] = _regions.marked(degrees, maps, *thresholds)
        return result

    def inspect(self, X: ArrayLike) -> Bunch:
        """Judge images and find their anomalous regions, in one pass of the network.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.

        Returns
        -------
        sklearn.utils.Bunch
            ``scores``, ``labels``, and, if the detector has maps, ``maps``, ``masks``
            and ``regions``; :func:`skanomaly.inspection.inspect` tells what they are.
        """
        fitted, images = self._prepare(X)
        map_shape = fitted._map_shape if self._why_no_maps() is None else None
        return _regions.report(
            fitted._evaluate(images, maps_wanted=map_shape is not None),
            n_images=len(images),
            map_shape=map_shape,
            offset=_validation.checked_offset(self),
            map_threshold=getattr(self, "map_threshold_", None),
        )

    def _fit_to(self, X, y, **given):
        """Fit, with what a method's `fit` is given beside images and labels."""
        with persistence.unchanged_if_refused(self):
            _validation.check_default_dtype()
            X = self._check_X(X, reset=True)
            images, labels = self._training_images(X, self._check_y(y, len(X)))
            value_range = _validation.check_range(self, images.array)
            self._check_settings()
            _validation.warn_of_copies(images.groups)
        persistence.forget(self, "offset_", "map_threshold_")
        # whatever the caller has switched on or off
        usual = loop.autocast(images.device, "float32")
        with torch.inference_mode(False), torch.enable_grad(), usual:
            degrees, peaks = self._fit(images, labels, **given)
        _validation.check_finite(self, degrees, peaks)
        self._value_range = value_range and tuple(value_range)
        self._set_thresholds(degrees, peaks)
        return self

    def _set_thresholds(self, degrees, peaks):
        self._training_degrees, self._training_peaks = degrees, peaks
        self.offset_ = np.percentile(-degrees, 100 * self.contamination)
        if peaks is not None:
            self.map_threshold_ = np.quantile(peaks, 1 - self.contamination)

    # what a method writes

    @abstractmethod
    def _fit(self, images, labels):
        """Learn from the training images, an ImageBatches, and their labels.

        Return what thresholds are taken from: degrees of anomaly (n,) of normal images
        and the maxima (n,) of their maps, or None where there are no maps.
        """

    @abstractmethod
    def _judge(self, images, *, maps_wanted, generator):
        """Return degrees of anomaly (b,) and maps (b, H, W) of images (b, C, H, W).

        Both are high where anomalous; the maps may be None unless they are wanted. What
        is random is drawn from the generator, which is the same for each batch.
        """

    def _why_no_maps(self):
        """Return why there are no maps, or None."""
        return None

    def _why_not_exported(self):
        """Return why a graph cannot hold what the detector does, or None."""
        return None

    def _why_not_leave_one_out(self):
        """Return why the detector cannot judge each image without it, or None."""
        return f"{type(self).__name__} cannot do that without a fit for each"

    def _as_module(self):
        """Return a module to export, or None if `_judge` can be traced as it is."""
        return None

    @property
    def _map_shape(self):
        """Shape of the map of one sample."""
        return self.image_shape_[:2]

    # the ways of images

    def _check_X(self, X, *, reset):
        return _validation.check_images(
            self,
            X,
            reset=reset,
            image_shape=self.image_shape,
            clip_length=self._clip_length,
            min_samples=2 if reset else 1,
        )

    def _check_y(self, y, n_samples):
        return _validation.check_labels(y, n_samples)

    def _training_images(self, X, labels):
        """Return the images to learn from and their labels; normal ones, if known."""
        device = batches.resolve_device(self.device, X)
        if labels is None:
            return batches.ImageBatches(X, device), None
        normal = _validation.normal_rows(self, labels)
        return batches.ImageBatches(X, device, normal), labels[normal]

    def _prepare(self, X):
        """Return the detector as it was fitted, its network moved, and the images."""
        check_is_fitted(self)
        _validation.check_default_dtype()
        fitted = persistence.as_fitted(self)
        X = fitted._check_X(X, reset=False)
        _validation.check_range(self, X, seen=self._value_range)
        device = batches.resolve_device(self.device, X)
        if hasattr(self, "network_"):
            batches.move_network(self.network_, device)
        return fitted, batches.ImageBatches(X, device)

    def _begin_anew(self):
        """Draw the seed of a fit, and note what its network is built from."""
        self._built_from = persistence.plain_parameters(self)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        self._seed = int(Processes().of_first(torch.tensor(seed)))

    def _in_batches(self, images, function):
        """Yield the rows of each batch and what a function returns for its images."""
        for rows in batches.slices(len(images), self.batch_size, verbose=self.verbose):
            with torch.inference_mode(), loop.autocast(images.device, self.precision):
                generator = loop.seeded_generator(self._seed)
                result = function(images[rows], generator=generator)
            yield rows, result

    def _evaluate(self, images, *, maps_wanted, judge=None):
        """Yield the rows, degrees of anomaly and maps (or None) of each batch."""
        judge = partial(judge or self._judge, maps_wanted=maps_wanted)
        for rows, (degrees, maps) in self._in_batches(images, judge):
            degrees = degrees.cpu().double().numpy()
            maps = maps.float().cpu().numpy() if maps_wanted else None
            _validation.check_finite(self, degrees, maps)
            yield rows, degrees, maps


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

    # what a method writes

    @abstractmethod
    def _build_network(self):
        """Return the untrained network."""

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

    def _learn(self, images, labels, progress):
        """Train; return the judged batches of normal images, for the thresholds."""
        self._begin(images.device, progress)
        self._train(loop.Samples(images, labels, device=images.device), progress)
        self._survey(images)
        return self._evaluate(images, maps_wanted=True)

    def _survey(self, images):
        """Find out what else the judging needs to know of the training images."""

    # the way of a fit

    @property
    def _continues(self):
        """Whether a fit goes on with the network of the last one."""
        return self.warm_start and hasattr(self, "network_")

    def _check_X(self, X, *, reset):
        if reset and self._continues:
            try:
                return super()._check_X(X, reset=False)
            except ValueError as error:
                raise ValueError(
                    f"{error} With warm_start=True a fit goes on with the network of "
                    "the last one."
                ) from error
        return super()._check_X(X, reset=reset)

    def _fit(self, images, labels, **given):
        with Progress.of(self, images, labels, **given) as progress:
            judged = self._learn(images, labels, progress, **given)
            return batches.degrees_and_peaks(judged)

    def _begin(self, device, progress, build=None):
        """Make the network, unless the fit goes on with one, and move it to a device.

        A method whose network depends on the images hands down how to ``build`` it.
        """
        if progress.goes_on:
            persistence.check_architecture(self)
            self._own_weights()
        else:
            persistence.forget(self, "network_")
            self._begin_anew()
            with loop.seeded(self._seed):
                self.network_ = (build or self._build_network)()
            self.loss_curve_ = []
            self.validation_curve_ = []
            persistence.forget(self, "_optimizers")
        if not hasattr(self, "_optimizers"):  # files do not hold them
            self._optimizers = {}
        persistence.channels_last(self.network_.to(device))
        for optimizer in self._optimizers.values():
            # moves the moments to the device of the weights
            optimizer.load_state_dict(optimizer.state_dict())

    def _train(self, samples, progress, *, scheduler=None, loss_curve=None, **settings):
        """Train with the settings of the estimator, but for those that are given.

        Returns whether the training came to its end.
        """
        try:
            progress.finished = loop.train(
                self.network_,
                samples,
                optimizers=loop.Optimizers(
                    self._optimizers, self._optimizer, scheduler or self._scheduler
                ),
                loss_curve=self.loss_curve_ if loss_curve is None else loss_curve,
                progress=progress,
                **{
                    "losses": self._losses,
                    "validation_curve": self.validation_curve_,
                    "max_epochs": self.max_epochs,
                    "batch_size": self.batch_size,
                    "validation_fraction": self.validation_fraction,
                    "n_iter_no_change": self.n_iter_no_change,
                    "seed": self._seed,
                    "precision": self.precision,
                    "verbose": self.verbose,
                    **settings,
                },
            )
        finally:
            self.n_iter_ = len(self.loss_curve_)
        return progress.finished
