"""Thresholds with a promised rate of false alarms, from images not trained on."""

import math
import os
import warnings
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin, OutlierMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import KFold
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch, _safe_indexing, get_tags, indexable
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import _num_samples, check_is_fitted
from tqdm.auto import tqdm

from ._fitting.batches import content_key
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
    Normal images are all that is needed, but by DeScarGAN, whose training needs both
    classes and ``y``.

    Parameters
    ----------
    estimator : object
        A detector, a Pipeline that ends in one, or a search among such estimators.
    method : {"cv", "holdout", "loo", "prefit"}, default="cv"
        Where the scores come from. "cv": cross-validation; then the detector is fitted
        on all images. "holdout": the detector is fitted once, without the first fold of
        `cv`, whose scores are taken. "loo": each image is scored without itself by the
        detector that knows all others, which only SPADE can do, exactly and at the cost
        of one fit; steps before it must not learn from the images. "prefit": the
        estimator is fitted already, on other images; it is not fitted again, and all
        images are scored. A :class:`~sklearn.frozen.FrozenEstimator` is always taken
        so.
    false_positive_rate : float, default=0.01
        Rate of false alarms to keep to; `target` says of what.
    target : {"image", "map"}, default="image"
        What the rate is a share of. "image": of new normal images, at most this share
        is called anomalous by ``predict``, and at most this share has a region whose
        map exceeds ``map_threshold_``. "map": of the pixels of new normal images, at
        most this share is marked by ``segment``; ``predict`` then calls as many of the
        held-out images anomalous as have a marked pixel. Only for detectors that have
        maps, and not for "loo".
    cv : int or splitter, default=5
        Number of folds, filled at random by a fixed seed, or an object whose
        ``split(X)`` yields indices. Anomalous images are left out before, and given
        only to a training that learns from them.
    n_jobs : int, default=None
        Number of folds that are fitted at once, in processes; None means one unless in
        a :obj:`joblib.parallel_backend` context, -1 means as many as there are cores.
    verbose : int, default=0
        Whether to show a progress bar of the fits.

    Attributes
    ----------
    estimator_ : object
        The fitted detector; with "prefit" a copy of the one given, which shares its
        arrays and networks and has thresholds of its own. A fit that goes on with the
        network (``warm_start``) changes both: calibrate again after it.
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
        at most one in their number plus one.

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

    This holds exactly for "holdout" and "prefit". In "cv" the scores come from other
    detectors than the final one, which has seen more images. They are slightly too low,
    and the rate stays below the one asked for, where more training makes normal images
    look more normal. Detectors whose scores differ in scale from one training to the
    next are better calibrated by "holdout".

    For ``target="map"`` the threshold is the lowest one at which the held-out maps
    exceed it in no more than ``(n + 1) * false_positive_rate - 1`` images' worth of
    pixels, the rule of conformal risk control [2]_: the expected share of marked pixels
    is then at most the rate, however the pixels of an image depend on each other.

    Both thresholds are always set together, in the detector inside, too.

    A search is given anomalous images as well, which its scoring may need.

    References
    ----------
    .. [1] V. Vovk, A. Gammerman, G. Shafer. "Algorithmic learning in a random world".
       Springer, 2005.
    .. [2] A. N. Angelopoulos, S. Bates, A. Fisch, L. Lei, T. Schuster. "Conformal risk
       control". ICLR 2024.

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

    A detector that is fitted already needs new good images only:

    >>> detector = detector.fit(X[:10])
    >>> calibrator = ThresholdCalibrator(
    ...     detector, method="prefit", false_positive_rate=0.1
    ... ).fit(X[10:])
    >>> calibrator.calibration_scores_.shape
    (15,)
    """

    _parameter_constraints = {
        "estimator": [HasMethods(["fit", "score_samples"])],
        "method": [StrOptions({"cv", "holdout", "loo", "prefit"})],
        "false_positive_rate": [Interval(Real, 0, 1, closed="neither")],
        "target": [StrOptions({"image", "map"})],
        "cv": [Interval(Integral, 2, None, closed="left"), HasMethods(["split"])],
        "n_jobs": [None, Integral],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator,
        *,
        method="cv",
        false_positive_rate=0.01,
        target="image",
        cv=5,
        n_jobs=None,
        verbose=0,
    ):
        self.estimator = estimator
        self.method = method
        self.false_positive_rate = false_positive_rate
        self.target = target
        self.cv = cv
        self.n_jobs = n_jobs
        self.verbose = verbose

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

    @property
    def _calibrated(self):
        """The fitted estimator; ensembles have an `estimator_` of other meaning."""
        return self.estimator_

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
            anomalous. Anomalous images set no threshold; only a search, and a detector
            that learns from them, such as DeScarGAN, are given them.
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
            cannot leave one image out, ``method="cv"`` and it has a checkpoint,
            which belongs to one fit, or ``target="map"`` and it has no maps; if no
            image is normal.
        TypeError
            If arguments of a fit are given, and the estimator is fitted already.
        sklearn.exceptions.NotFittedError
            If ``method="prefit"`` and the estimator is not fitted.

        Warns
        -----
        UserWarning
            If normal images are in X more than once. Copies stay together, and only
            one of them sets a threshold.
        """
        final = final_step(self.estimator)
        self._check_method(final)
        if self._is_prefit and fit_params:
            raise TypeError(
                f"{', '.join(fit_params)}: what is fitted already takes no arguments "
                "of a fit."
            )
        X, y = indexable(X, y)
        n_samples = _num_samples(X)
        labels = required_labels(y, n_samples)
        normal, anomalous = np.flatnonzero(labels == 1), np.flatnonzero(labels == -1)
        if len(normal) == 0:
            raise ValueError("y calls no image normal, but thresholds come from these.")
        learns_from_them = get_tags(final).target_tags.required
        if not learns_from_them and not isinstance(final, BaseSearchCV):
            anomalous = anomalous[:0]

        groups = _groups(X, normal)
        warn_of_copies(groups)
        if isinstance(self.cv, Integral) and groups.max() + 1 < self.cv:
            groups = np.arange(len(normal))  # nothing but copies
        _, firsts = np.unique(groups, return_index=True)

        forget(self, "offset_", "map_threshold_")
        fit_on = partial(_fit_on, self.estimator, X, y, fit_params)
        everything = np.concatenate([normal, anomalous])
        if self._is_prefit:
            detector = self.estimator
            judged = [_judge(detector, X, normal[firsts], self._spare(len(firsts)))]
        elif self.method == "loo":
            detector = fit_on(everything)
            judged = [_leave_one_out(detector, firsts)]
        else:
            folds = [
                (np.concatenate([normal[train], anomalous]), test)
                for train, test in self._folds(groups, normal, firsts)
            ]
            if self.method == "holdout":
                train, test = folds[0]
                detector = fit_on(train)
                judged = [_judge(detector, X, test, self._spare(len(test)))]
            else:
                judged, detector = self._cross_judge(X, fit_on, folds, everything)
        self.estimator_ = _with_own_thresholds(detector)
        self._set_thresholds(judged)
        return self

    @property
    def _is_prefit(self):
        return self.method == "prefit" or isinstance(self.estimator, FrozenEstimator)

    def _cross_judge(self, X, fit_on, folds, everything):
        """Judge each fold by a detector fitted on the others; fit one on all images."""
        spare = self._spare(sum(len(test) for _, test in folds))
        jobs = (
            delayed(_fit_and_judge)(fit_on, X, train, test, spare)
            for train, test in folds
        )
        judged = []
        with tqdm(total=len(folds) + 1, unit="fit", disable=not self.verbose) as bar:
            for part in Parallel(self.n_jobs, return_as="generator")(jobs):
                judged.append(part)
                bar.update()
            detector = fit_on(everything)
            bar.update()
        return judged, detector

    def _spare(self, n):
        """Return how many of n images may be marked, in pixels; None if none count."""
        return (n + 1) * self.false_positive_rate - 1 if self.target == "map" else None

    def _check_method(self, final):
        """Raise if the way to the scores is not open to a detector."""
        if self.target == "map":
            self._check_maps(final)
        if self._is_prefit and self.method != "loo":
            check_is_fitted(
                self.estimator,
                msg="This %(name)s is not fitted yet, but neither method='prefit' nor "
                "a FrozenEstimator fits: fit it first, or take method='cv' without.",
            )
            return
        for name, value in self.estimator.get_params().items():
            if self.method == "cv" and name.split("__")[-1] == "checkpoint" and value:
                raise ValueError(
                    f"{name}={str(value)!r} belongs to one fit, but method='cv' fits "
                    "one detector for each fold: take None, or method='holdout'."
                )
        if self.method != "loo":
            return
        if unwrapped(self.estimator) is not self.estimator or any(
            isinstance(step, FrozenEstimator)
            for _, step in getattr(self.estimator, "steps", ())
        ):
            raise ValueError(
                "method='loo' leaves out images that the detector was fitted on; a "
                "FrozenEstimator was fitted on others: take 'prefit', 'cv' or "
                "'holdout'."
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

    def _check_maps(self, final):
        """Raise if there are no maps whose pixels could be counted."""
        if not isinstance(final, BaseDetector):
            reason = f"{type(final).__name__} is no detector of skanomaly"
        elif (reason := final._why_no_maps()) is None and self.method == "loo":
            reason = "method='loo' has only their maxima: take 'cv' or 'holdout'"
        if reason is not None:
            raise ValueError(f"target='map' counts the pixels of maps; {reason}.")

    def _folds(self, groups, normal, firsts):
        """Yield rows of normal images to fit on, and those of X to judge."""
        for train, test in self._splits(groups):
            test = np.intersect1d(test, firsts)
            if len(test):  # else they are copies of images that others judge
                yield train, normal[test]

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

    def _set_thresholds(self, judged):
        scores, peaks, pixels = zip(*judged, strict=True)
        scores = self.calibration_scores_ = np.sort(np.concatenate(scores))
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
        detector = final_step(self.estimator_)
        if peaks[0] is not None:
            peaks = np.sort(np.concatenate(peaks))
            threshold = peaks[-n_positives]
            if self.target == "map":
                threshold = _largest(np.concatenate(pixels), len(pixels[0])).min()
                n_positives = 1 + (peaks > threshold).sum()
            self.map_threshold_ = detector.map_threshold_ = float(threshold)
        lowest = np.append(scores, np.nextafter(scores[-1], np.inf))
        self.offset_ = detector.offset_ = float(lowest[n_positives - 1])
        if isinstance(detector, BaseDetector):  # whose settings may be newer than fit
            detector._built_from = {
                **detector._built_from,
                **{name: getattr(detector, name) for name in detector._judged_by},
            }

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


def _with_own_thresholds(estimator):
    """Copy an estimator as far as the detector in it; all else is shared."""
    if isinstance(estimator, FrozenEstimator):
        return _with_own_thresholds(estimator.estimator)
    copied = object.__new__(type(estimator))
    copied.__dict__.update(estimator.__dict__)
    if isinstance(copied, Pipeline):
        (*others, (name, final)) = copied.steps
        copied.steps = [*others, (name, _with_own_thresholds(final))]
    inside = "estimator_" if hasattr(copied, "_calibrated") else "best_estimator_"
    if hasattr(copied, inside):
        setattr(copied, inside, _with_own_thresholds(getattr(copied, inside)))
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
        return content_key(np.fromfile(os.path.expanduser(image), np.uint8))
    except OSError:  # what reads the file has better words for it
        return os.fspath(image)


def _fit_on(estimator, X, y, fit_params, rows):
    labels = None if y is None else _safe_indexing(y, rows)
    return clone(estimator).fit(_safe_indexing(X, rows), labels, **fit_params)


def _fit_and_judge(fit_on, X, train, test, n_marked):
    return _judge(fit_on(train), X, test, n_marked)


def _leave_one_out(estimator, rows):
    """Return what `_judge` does, by a detector that leaves each training image out."""
    degrees, peaks = final_step(estimator)._leave_one_out()
    return -degrees[rows], None if peaks is None else peaks[rows], None


def _judge(estimator, X, rows, n_marked):
    """Judge some rows of X.

    Returns
    -------
    scores : numpy.ndarray of shape (n,)
        Scores.
    peaks : numpy.ndarray of shape (n,) or None
        The maxima of the maps, of a detector of ours that has maps.
    pixels : numpy.ndarray of shape (n_most,) or None
        The largest pixels of all maps, one more than may be marked: `n_marked`
        images' worth of them. None if that is None.
    """
    final, images = _at_the_end(estimator, _safe_indexing(X, rows))
    if not isinstance(final, BaseDetector) or final._why_no_maps() is not None:
        return final.score_samples(images), None, None
    fitted, images = final._prepare(images)
    scores, peaks, pixels = [], [], None
    for _, degrees, maps in fitted._evaluate(images, maps_wanted=True):
        scores.append(-degrees)
        peaks.append(maps.reshape(len(maps), -1).max(axis=1))
        if n_marked is not None:
            n_most = 1 + max(0, math.floor(n_marked * maps[0].size + 1e-9))
            before = np.full(n_most, -np.inf, np.float32) if pixels is None else pixels
            pixels = _largest(np.append(before, maps), n_most)
    return np.concatenate(scores), np.concatenate(peaks), pixels


def _at_the_end(estimator, X):
    """Return the detector in which an estimator ends, and what it is given for X."""
    estimator = unwrapped(estimator)
    if not isinstance(estimator, Pipeline):
        return estimator, X
    if len(estimator.steps) > 1:
        X = estimator[:-1].transform(X)
    return _at_the_end(estimator.steps[-1][1], X)


def _largest(values, n):
    return np.partition(values, -n)[-n:]
