"""Thresholds with a promised rate of false alarms, from images not trained on."""

import copy
import math
import os
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin, OutlierMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch, _safe_indexing, get_tags, indexable
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import _num_samples, check_is_fitted

from ._fitting.batches import content_key, degrees_and_peaks
from ._fitting.persistence import forget
from ._typing import ImagesOrPaths, Self, available_if, fit_context
from ._validation import holds_paths, required_labels, warn_of_copies
from .base import BaseDetector
from .pipeline import final_step, unwrapped, with_maps


def _estimator_has(method):
    def has(calibrator):
        estimator = getattr(calibrator, "estimator_", calibrator.estimator)
        return hasattr(with_maps(estimator), method)

    return has


class ThresholdCalibrator(MetaEstimatorMixin, OutlierMixin, BaseEstimator):
    """Set the thresholds of a detector for a wanted rate of false positives.

    A detector's own thresholds come from the images that it was trained on, which look
    more normal to it than new ones. Here they come from the scores and maps of normal
    images that took no part in the training, by the rule of conformal prediction [1]_.
    Normal images are all that is needed.

    Parameters
    ----------
    estimator : object
        A detector, or a Pipeline that ends in one.
    method : {"cv", "holdout", "loo"}, default="cv"
        Where the scores come from. "cv": cross-validation; then the detector is fitted
        on all images. "holdout": the detector is fitted once, without the first fold of
        `cv`, whose scores are taken. "loo": each image is scored without itself by the
        detector that knows all others, which only SPADE can do, exactly and at the cost
        of one fit; steps before it must not learn from the images.
    false_positive_rate : float, default=0.01
        Share of new normal images that ``predict`` may call anomalous, and share of
        them in which a map may exceed ``map_threshold_``.
    cv : int or splitter, default=5
        Number of folds, filled at random by a fixed seed, or an object whose
        ``split(X)`` yields indices. Anomalous images are left out before.

    Attributes
    ----------
    estimator_ : object
        The fitted detector.
    calibration_scores_ : numpy.ndarray of shape (n_calibration,)
        Scores of the normal images held out, in ascending order.
    offset_ : float
        Threshold of ``score_samples`` below which ``predict`` calls an image anomalous.
    map_threshold_ : float
        Threshold of the maps above which ``segment`` marks a pixel. Only where the
        detector has maps.
    n_features_in_ : int
        Number of features of an image; only where the detector has it.

    Warns
    -----
    UserWarning
        If there are fewer than ``1 / false_positive_rate - 1`` normal images held out.
        The thresholds are then the most extreme of them, and the rate to be expected is
        one in their number plus one.

    See Also
    --------
    skanomaly.model_selection.OneClassKFold : Splits for a search among detectors.

    Notes
    -----
    With n held-out scores, an image is called anomalous if its score is below the k-th
    lowest of them, with ``k = floor((n + 1) * false_positive_rate)``. If normal images
    come independently from one source, the share of them that are called anomalous is
    k / (n + 1) on average over all draws of the images, whatever the detector. For one
    draw it varies: with 1,000 held-out images and a rate of 0.01 its standard deviation
    is 0.003.

    This holds exactly for "holdout". In "cv" the scores come from other detectors than
    the final one, which has seen more images. They are slightly too low, and the rate
    stays below the one asked for, where more training makes normal images look more
    normal. Detectors whose scores differ in scale from one training to the next are
    better calibrated by "holdout".

    References
    ----------
    .. [1] V. Vovk, A. Gammerman, G. Shafer. "Algorithmic learning in a random world".
       Springer, 2005.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import SPADE, ThresholdCalibrator
    >>> X = np.random.default_rng(0).random((25, 32, 32, 3))
    >>> detector = SPADE(backbone="resnet18", weights=None)
    >>> calibrator = ThresholdCalibrator(detector, false_positive_rate=0.1).fit(X)
    >>> calibrator.segment(X[:2]).shape
    (2, 32, 32)
    >>> calibrator.p_values(X[:2]).shape
    (2,)
    """

    _parameter_constraints = {
        "estimator": [HasMethods(["fit", "score_samples"])],
        "method": [StrOptions({"cv", "holdout", "loo"})],
        "false_positive_rate": [Interval(Real, 0, 1, closed="neither")],
        "cv": [Interval(Integral, 2, None, closed="left"), HasMethods(["split"])],
    }

    def __init__(self, estimator, *, method="cv", false_positive_rate=0.01, cv=5):
        self.estimator = estimator
        self.method = method
        self.false_positive_rate = false_positive_rate
        self.cv = cv

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        own = get_tags(self.estimator)
        tags.input_tags = own.input_tags
        tags.target_tags.required = own.target_tags.required
        return tags

    def __sklearn_is_fitted__(self):
        return hasattr(self, "offset_")

    @property
    def n_features_in_(self) -> int:
        """Number of features of an image."""
        return self.estimator_.n_features_in_

    @fit_context(prefer_skip_nested_validation=False)
    def fit(
        self, X: ImagesOrPaths, y: ArrayLike | None = None, **fit_params: Any
    ) -> Self:
        """Fit the detector and set the thresholds.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images, or what the first step of a pipeline takes.
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels, +1 for normal and -1 for anomalous images, or masks, True where
            anomalous. Anomalous images set no threshold; only a detector that learns
            from them, such as DeScarGAN, is given them.
        **fit_params : dict
            Further arguments of the detector's ``fit``.

        Returns
        -------
        self : object
            The calibrated detector.

        Raises
        ------
        ValueError
            If y holds other labels than -1 and +1, ``method="loo"`` and the estimator
            cannot leave one image out, or ``method="cv"`` and it has a checkpoint,
            which belongs to one fit.

        Warns
        -----
        UserWarning
            If normal images are in X more than once. Copies stay together, and only
            one of them sets a threshold.
        """
        final = final_step(self.estimator)
        self._check_method(final)
        X, y = indexable(X, y)
        n_samples = _num_samples(X)
        labels = required_labels(y, n_samples)
        normal, anomalous = np.flatnonzero(labels == 1), np.flatnonzero(labels == -1)
        if not get_tags(final).target_tags.required:
            anomalous = anomalous[:0]

        groups = _groups(X, normal)
        warn_of_copies(groups)
        if isinstance(self.cv, Integral) and groups.max() + 1 < self.cv:
            groups = np.arange(len(normal))  # nothing but copies
        _, firsts = np.unique(groups, return_index=True)

        def fitted(rows):
            rows = np.concatenate([normal[rows], anomalous])
            labels = None if y is None else _safe_indexing(y, rows)
            return clone(self.estimator).fit(
                _safe_indexing(X, rows), labels, **fit_params
            )

        forget(self, "offset_", "map_threshold_")
        if self.method == "loo":
            self.estimator_ = fitted(np.arange(len(normal)))
            degrees, peaks = final_step(self.estimator_)._leave_one_out()
            scores = -degrees[firsts]
            peaks = None if peaks is None else peaks[firsts]
        else:
            splits = [
                (train, normal[np.intersect1d(test, firsts)])
                for train, test in self._splits(groups)
            ]
            # a fold may hold nothing but copies of images that others score
            splits = [(train, test) for train, test in splits if len(test)]
            found = []
            for train, test in splits[: 1 if self.method == "holdout" else None]:
                detector = fitted(train)
                found.append(_scores_and_peaks(detector, _safe_indexing(X, test)))
            scores, peaks = (
                None if parts[0] is None else np.concatenate(parts)
                for parts in zip(*found, strict=True)
            )
            if self.method == "cv":
                detector = fitted(np.arange(len(normal)))
            self.estimator_ = _own_copy(detector)
        self._set_thresholds(scores, peaks)
        return self

    def _check_method(self, final):
        """Raise if the way to the scores is not open to a detector."""
        checkpoint = final.get_params(deep=False).get("checkpoint")
        if self.method == "cv" and checkpoint is not None:
            raise ValueError(
                f"checkpoint={str(checkpoint)!r} belongs to one fit, but method='cv' "
                "fits one detector for each fold: take checkpoint=None, or "
                "method='holdout'."
            )
        if self.method != "loo":
            return
        if unwrapped(self.estimator) is not self.estimator or any(
            isinstance(step, FrozenEstimator)
            for _, step in getattr(self.estimator, "steps", ())
        ):
            raise ValueError(
                "method='loo' leaves out images that the detector was fitted on; a "
                "FrozenEstimator was fitted on others: take 'cv' or 'holdout'."
            )
        reason = (
            final._why_not_leave_one_out()
            if isinstance(final, BaseDetector)
            else f"{type(final).__name__} cannot do that without a fit for each"
        )
        if reason is not None:
            raise ValueError(
                "method='loo' scores each image by a detector fitted on the others; "
                f"{reason}: take 'cv' or 'holdout'."
            )

    def _splits(self, groups):
        """Yield training and test rows of normal images; copies stay together."""
        if not isinstance(self.cv, Integral):
            for train, test in self.cv.split(groups):
                yield train[~np.isin(groups[train], groups[test])], test
            return
        folds = KFold(self.cv, shuffle=True, random_state=0)
        numbers, firsts = np.unique(groups, return_index=True)
        numbers = numbers[np.argsort(firsts)]  # in the order of the images
        for train, test in folds.split(numbers):
            yield tuple(
                np.flatnonzero(np.isin(groups, numbers[part])) for part in (train, test)
            )

    def _set_thresholds(self, scores, peaks):
        n = len(scores)
        # the smallest float above the rate must not take the last false positive away
        n_positives = math.floor((n + 1) * self.false_positive_rate + 1e-9)
        if n_positives < 1:
            warnings.warn(
                f"{n} normal images cannot support false_positive_rate="
                f"{self.false_positive_rate:g}: that takes "
                f"{math.ceil(1 / self.false_positive_rate) - 1} or more of them. "
                f"Expect a rate of {1 / (n + 1):.3g}.",
                stacklevel=3,
            )
            n_positives = 1
        self.calibration_scores_ = np.sort(scores)
        detector = final_step(self.estimator_)
        if peaks is not None:
            self.map_threshold_ = float(np.sort(peaks)[-n_positives])
            detector.map_threshold_ = self.map_threshold_
        self.offset_ = float(self.calibration_scores_[n_positives - 1])
        detector.offset_ = self.offset_

    def score_samples(self, X: ImagesOrPaths) -> NDArray[np.float64]:
        """Score images by the detector: the higher, the more normal.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images.

        Returns
        -------
        numpy.ndarray of shape (n,)
            Scores.
        """
        check_is_fitted(self)
        return self.estimator_.score_samples(X)

    def decision_function(self, X: ImagesOrPaths) -> NDArray[np.float64]:
        """Score images relative to the threshold.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images.

        Returns
        -------
        numpy.ndarray of shape (n,)
            ``score_samples(X) - offset_``, negative for anomalous images.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: ImagesOrPaths) -> NDArray[np.int64]:
        """Tell normal from anomalous images.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images.

        Returns
        -------
        numpy.ndarray of shape (n,)
            +1 for normal and -1 for anomalous images.
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: ImagesOrPaths) -> NDArray[np.float64]:
        """Compute how probable so low a score is for a normal image.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images.

        Returns
        -------
        numpy.ndarray of shape (n,)
            Conformal p-values: one plus the number of held-out normal images that do
            not score higher, divided by one plus their number. Of new normal images, a
            share of at most q has a p-value of q or less.
        """
        return self._p_values_of(self.score_samples(X))

    def _p_values_of(self, scores):
        not_higher = np.searchsorted(self.calibration_scores_, scores, side="right")
        return (1 + not_higher) / (1 + len(self.calibration_scores_))

    @available_if(_estimator_has("localize"))
    def localize(self, X: ImagesOrPaths) -> NDArray[np.floating]:
        """Map where images are anomalous.

        Only available if the detector has it.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            Anomaly maps, high where anomalous.
        """
        check_is_fitted(self)
        return with_maps(self.estimator_).localize(X)

    @available_if(_estimator_has("segment"))
    def segment(self, X: ImagesOrPaths) -> NDArray[np.bool_]:
        """Mark the anomalous pixels of anomalous images.

        Only available if the detector has it.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            True where the map exceeds ``map_threshold_``, in images that ``predict``
            calls anomalous.
        """
        check_is_fitted(self)
        return with_maps(self.estimator_).segment(X)

    @available_if(_estimator_has("inspect"))
    def inspect(self, X: ImagesOrPaths) -> Bunch:
        """Judge images and find their anomalous regions, in one pass of the network.

        Only available if the detector has it.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images.

        Returns
        -------
        sklearn.utils.Bunch
            ``scores``, ``labels``, ``p_values``, and, if the detector has maps,
            ``maps``, ``masks`` and ``regions``; :func:`skanomaly.inspection.inspect`
            tells what they are. Labels and masks go by the calibrated thresholds.
        """
        check_is_fitted(self)
        report = with_maps(self.estimator_).inspect(X)
        report.p_values = self._p_values_of(report.scores)
        return report


def _own_copy(estimator):
    """Return an estimator whose thresholds may be set: frozen ones are the user's."""
    if isinstance(estimator, FrozenEstimator):
        return _shallow_copy(estimator.estimator)
    if isinstance(estimator, Pipeline):
        (*others, (name, final)) = estimator.steps
        estimator = copy.copy(estimator)
        estimator.steps = [*others, (name, _own_copy(final))]
    return estimator


def _shallow_copy(estimator):
    """Copy a detector, or a pipeline as far as its detector."""
    copied = copy.copy(estimator)
    if isinstance(copied, Pipeline):
        (*others, (name, final)) = copied.steps
        copied.steps = [*others, (name, _shallow_copy(final))]
    return copied


def _groups(X, rows):
    """Return a number for some of the images, which only equal ones share."""
    images = _safe_indexing(X, rows)
    if hasattr(images, "iloc"):
        images = images.to_numpy()
    if holds_paths(images):
        images = np.ravel(images)
    return np.unique(np.array(list(map(_key, images))), return_inverse=True)[1]


def _key(image):
    """Return a text that only equal images, or files of equal content, share."""
    if not isinstance(image, (str, os.PathLike)):
        return content_key(image)
    try:
        return content_key(np.fromfile(image, np.uint8))
    except OSError:  # what reads the file has better words for it
        return os.fspath(image)


def _scores_and_peaks(estimator, X):
    """Return the scores of images and, of a detector of ours, their maps' maxima."""
    if isinstance(estimator, FrozenEstimator):
        return _scores_and_peaks(estimator.estimator, X)
    if isinstance(estimator, Pipeline):
        if len(estimator.steps) > 1:
            X = estimator[:-1].transform(X)
        return _scores_and_peaks(estimator.steps[-1][1], X)
    if not isinstance(estimator, BaseDetector) or estimator._why_no_maps() is not None:
        return estimator.score_samples(X), None
    fitted, images = estimator._prepare(X)
    degrees, peaks = degrees_and_peaks(fitted._evaluate(images, maps_wanted=True))
    return -degrees, peaks
