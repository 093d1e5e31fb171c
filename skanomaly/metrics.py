"""Exact metrics of anomaly localization.

Every score here is a mean or a maximum over the anomalous pixels, or frames: each of
them asks how many normal ones of the whole set lie above its own value. One sort of the
values answers that for every threshold that matters, so that no grid of thresholds is
needed.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics._scorer import _BaseScorer
from sklearn.utils.validation import _num_samples

from ._typing import ImagesOrPaths
from ._validation import check_maps, check_masks, required_labels
from .pipeline import with_maps


def pixel_roc_auc_score(masks: ArrayLike, maps: ArrayLike) -> float:
    """Area under the ROC curve over all pixels of all images.

    Parameters
    ----------
    masks : array-like of shape (n, H, W)
        Ground truth, boolean or integers 0 and 1; True where a pixel is anomalous.
    maps : array-like of shape (n, H, W)
        Anomaly maps, high where a pixel looks anomalous. They are compared in their own
        precision.

    Returns
    -------
    score : float
        Probability that an anomalous pixel has a higher map value than a normal one,
        where equal values count one half. A constant map scores 0.5.

    Raises
    ------
    ValueError
        If the shapes differ, the masks are not binary, the maps are not finite, or
        there is no anomalous or no normal pixel.

    See Also
    --------
    pixel_average_precision_score : Less lenient where anomalous pixels are rare.
    pro_auc_score : Gives every anomalous region the same weight, however small.

    Notes
    -----
    The area is computed from the ranks of the anomalous pixels [1]_, at the cost of one
    sort.

    References
    ----------
    .. [1] J. A. Hanley and B. J. McNeil, "The meaning and use of the area under a
       receiver operating characteristic (ROC) curve", Radiology 143, 1982.
       https://doi.org/10.1148/radiology.143.1.7063747

    Examples
    --------
    >>> from skanomaly.metrics import pixel_roc_auc_score
    >>> masks = [[[0, 0, 1, 1]]]
    >>> maps = [[[0.1, 0.4, 0.4, 0.9]]]
    >>> pixel_roc_auc_score(masks, maps)
    0.875
    """
    return _Ranking(*_check_masks_and_maps(masks, maps, ndim=3)).roc_auc()


def pixel_average_precision_score(masks: ArrayLike, maps: ArrayLike) -> float:
    """Average precision over all pixels of all images.

    Parameters
    ----------
    masks : array-like of shape (n, H, W)
        Ground truth, boolean or integers 0 and 1; True where a pixel is anomalous.
    maps : array-like of shape (n, H, W)
        Anomaly maps, high where a pixel looks anomalous. They are compared in their own
        precision.

    Returns
    -------
    score : float
        Mean over the anomalous pixels of the precision at their own map value. A
        constant map scores the fraction of anomalous pixels.

    Raises
    ------
    ValueError
        If the shapes differ, the masks are not binary, the maps are not finite, or
        there is no anomalous or no normal pixel.

    See Also
    --------
    pixel_roc_auc_score : Does not depend on how rare anomalous pixels are.
    f1_max : The best single threshold instead of the mean over all.

    Notes
    -----
    The curve is summed in steps, as :func:`sklearn.metrics.average_precision_score`
    does. The trapezoidal rule would join points of the precision-recall curve by lines
    that no detector reaches.

    Examples
    --------
    >>> from skanomaly.metrics import pixel_average_precision_score
    >>> masks = [[[0, 0, 1, 1]]]
    >>> maps = [[[0.1, 0.4, 0.3, 0.9]]]
    >>> round(pixel_average_precision_score(masks, maps), 4)
    0.8333
    """
    return _Ranking(*_check_masks_and_maps(masks, maps, ndim=3)).average_precision()


def pro_auc_score(masks: ArrayLike, maps: ArrayLike, *, max_fpr: float = 0.3) -> float:
    """Normalized area under the per-region overlap (PRO) curve.

    Parameters
    ----------
    masks : array-like of shape (n, H, W)
        Ground truth, boolean or integers 0 and 1; True where a pixel is anomalous.
    maps : array-like of shape (n, H, W)
        Anomaly maps, high where a pixel looks anomalous. They are compared in their own
        precision.
    max_fpr : float, default=0.3
        False positive rate, in (0, 1], at which the curve is cut. The area is divided
        by it.

    Returns
    -------
    score : float
        Area up to `max_fpr` divided by `max_fpr`: 1 for a perfect detector,
        `max_fpr / 2` for a constant map.

    Raises
    ------
    ValueError
        If the shapes differ, the masks are not binary, the maps are not finite, there
        is no anomalous or no normal pixel, or `max_fpr` is outside of (0, 1].

    See Also
    --------
    pixel_roc_auc_score : The same area with equal weights for pixels, not for regions.

    Notes
    -----
    At each threshold the overlap is the fraction of an anomalous region that the map
    covers, averaged over the regions of the whole set [1]_. Regions are 8-connected
    components of a mask. The false positive rate counts the normal pixels of all
    images, those without any anomaly included. The curve has a point at every distinct
    map value, starts at (0, 0), is linear in between, and is cut exactly at `max_fpr`.

    The PRO curve is a ROC curve in which an anomalous pixel weighs the inverse of the
    size of its region. The area is summed pixel by pixel in double precision.

    References
    ----------
    .. [1] P. Bergmann, K. Batzner, M. Fauser, D. Sattlegger and C. Steger, "The MVTec
       Anomaly Detection Dataset: A Comprehensive Real-World Dataset for Unsupervised
       Anomaly Detection", International Journal of Computer Vision 129, 2021.
       https://doi.org/10.1007/s11263-020-01400-4

    Examples
    --------
    >>> from skanomaly.metrics import pro_auc_score
    >>> masks = [[[1, 0, 1, 1, 1, 0]]]
    >>> maps = [[[0.9, 0.8, 0.7, 0.7, 0.7, 0.1]]]
    >>> pro_auc_score(masks, maps, max_fpr=1.0)
    0.75
    """
    _check_max_fpr(max_fpr)
    masks, maps = _check_masks_and_maps(masks, maps, ndim=3)
    return _Ranking(masks, maps).pro_auc(_region_weights(masks), max_fpr)


def f1_max(masks: ArrayLike, maps: ArrayLike) -> float:
    """Highest F1 score that any threshold reaches.

    Parameters
    ----------
    masks : array-like of any shape
        Ground truth, boolean or integers 0 and 1; True where anomalous: masks of shape
        (n, H, W), or image labels of shape (n,).
    maps : array-like of the same shape as `masks`
        Anomaly maps, or one anomaly score per image, high where anomalous. They are
        compared in their own precision.

    Returns
    -------
    score : float
        Maximum over the thresholds of the harmonic mean of precision and recall.

    Raises
    ------
    ValueError
        If the shapes differ, the masks are not binary, the maps are not finite, or
        nothing is anomalous or nothing is normal.

    See Also
    --------
    pixel_average_precision_score : The mean over all thresholds, not the best one.

    Notes
    -----
    The threshold is chosen on the data that are scored: this is an upper bound of what
    a threshold fixed beforehand can reach. For the labels (+1 normal, -1 anomalous) and
    scores (high = normal) of a fitted detector, the image score is
    ``f1_max(y == -1, -detector.score_samples(X))``.

    Examples
    --------
    >>> from skanomaly.metrics import f1_max
    >>> f1_max([False, False, True, True], [0.1, 0.4, 0.3, 0.9])
    0.8
    """
    return _Ranking(*_check_masks_and_maps(masks, maps)).f1_max()


def localization_scores(
    masks: ArrayLike, maps: ArrayLike, *, max_fpr: float = 0.3
) -> dict[str, float]:
    """All measures of anomaly maps, at little more than the cost of one.

    Parameters
    ----------
    masks : array-like of shape (n, H, W)
        Ground truth, boolean or integers 0 and 1; True where a pixel is anomalous.
    maps : array-like of shape (n, H, W)
        Anomaly maps, high where a pixel looks anomalous. They are compared in their own
        precision.
    max_fpr : float, default=0.3
        False positive rate, in (0, 1], at which the PRO curve is cut.

    Returns
    -------
    scores : dict of str to float
        "pixel_roc_auc", "pixel_average_precision", "pro_auc" and "f1_max", as the
        functions of these names compute them.

    Raises
    ------
    ValueError
        If the shapes differ, the masks are not binary, the maps are not finite, there
        is no anomalous or no normal pixel, or `max_fpr` is outside of (0, 1].

    See Also
    --------
    make_localization_scorer : One of them as a scorer.

    Examples
    --------
    >>> from skanomaly.metrics import localization_scores
    >>> masks = [[[0, 0, 1, 1]]]
    >>> maps = [[[0.1, 0.4, 0.3, 0.9]]]
    >>> localization_scores(masks, maps)["pixel_roc_auc"]
    0.75
    """
    _check_max_fpr(max_fpr)
    masks, maps = _check_masks_and_maps(masks, maps, ndim=3)
    ranking = _Ranking(masks, maps)
    return {
        "pixel_roc_auc": ranking.roc_auc(),
        "pixel_average_precision": ranking.average_precision(),
        "pro_auc": ranking.pro_auc(_region_weights(masks), max_fpr),
        "f1_max": ranking.f1_max(),
    }


def frame_roc_auc_score(
    y_true: ArrayLike, scores: ArrayLike, video: ArrayLike
) -> float:
    """Area under the ROC curve over all frames, with scores normalized in each video.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        +1 for normal and -1 for anomalous frames.
    scores : array-like of shape (n,)
        Anomaly scores, high where a frame looks anomalous: of a fitted detector,
        ``-detector.score_samples(X)``.
    video : array-like of shape (n,)
        For each frame, the number or name of its video.

    Returns
    -------
    score : float
        Probability that an anomalous frame has a higher normalized score than a normal
        one, where equal values count one half.

    Raises
    ------
    ValueError
        If the shapes differ, the labels are not +1 and -1, the scores are not finite,
        a video has no number or name, or there is no anomalous or no normal frame.

    See Also
    --------
    skanomaly.datasets.make_clips : The frames that end a clip, and their videos.
    sklearn.metrics.roc_auc_score : Compares the scores as they are.

    Notes
    -----
    Scores are scaled to [0, 1] within each video, by its own minimum and maximum; those
    of a video of equal scores become 0. The frames of all videos then share one curve,
    as in [1]_ and [2]_. The scaling needs whole videos and gives every video a
    score of 1 somewhere, even one that has nothing anomalous: the area is not that of a
    detector that sees one frame after the other.

    References
    ----------
    .. [1] D. Gong et al., "Memorizing normality to detect anomaly: memory-augmented
       deep autoencoder for unsupervised anomaly detection", ICCV 2019.
       arXiv 1904.02639.

    .. [2] H. Park, J. Noh and B. Ham, "Learning memory-guided normality for anomaly
       detection", CVPR 2020, pp. 14372-14381. arXiv 2003.13228.

    Examples
    --------
    >>> from skanomaly.metrics import frame_roc_auc_score
    >>> y_true = [1, 1, -1, 1, -1, 1]
    >>> scores = [0.1, 0.2, 0.3, 5.0, 9.0, 6.0]
    >>> frame_roc_auc_score(y_true, scores, [0, 0, 0, 1, 1, 1])
    1.0
    """
    y_true = np.asarray(y_true)
    if not np.isin(y_true, (-1, 1)).all():
        raise ValueError(
            "y_true must hold +1 for normal and -1 for anomalous frames, got values "
            f"such as {np.unique(y_true)[:5]}."
        )
    _check_frames(y_true=y_true, scores=scores, video=video)
    for label, kind in ((-1, "an anomalous"), (1, "a normal")):
        if label not in y_true:
            raise ValueError(f"y_true must contain {kind} frame, got none.")
    return _Ranking(y_true == -1, _scaled_in_videos(scores, video)).roc_auc()


def _check_frames(**values):
    """Raise unless arrays have one number, and the last a name, for each frame."""
    *numbers, video = names = list(values)
    arrays = {name: np.asarray(values[name]) for name in names}
    shapes = [array.shape for array in arrays.values()]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError(
            f"{', '.join(numbers)} and {video} must have the same shape (n,), got "
            f"{', '.join(map(str, shapes[:-1]))} and {shapes[-1]}."
        )
    for name in numbers:
        if arrays[name].dtype.kind not in "biuf":
            raise ValueError(
                f"{name} must hold real numbers, got {arrays[name].dtype}."
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
    if (arrays[video] != arrays[video]).any():
        raise ValueError("video must hold a number or name for each frame, got NaN.")


def _scaled_in_videos(values, video):
    """Scale values to [0, 1] within each video; equal ones become 0."""
    values, video = np.asarray(values), np.asarray(video)
    scaled = np.zeros(len(values))
    for name in np.unique(video):
        rows = video == name
        shifted = values[rows].astype(np.float64)
        shifted -= shifted.min()
        scaled[rows] = shifted / (shifted.max() or 1)
    return scaled


def video_scores(
    psnr: ArrayLike,
    distance: ArrayLike,
    video: ArrayLike,
    *,
    score_weight: float = 0.6,
) -> NDArray[np.float64]:
    """Mix two measures of frames into scores, each scaled in its video.

    Parameters
    ----------
    psnr, distance : array-like of shape (n,)
        Peak signal-to-noise ratio of each frame in decibels, low where anomalous, and
        its distance from a memory, high where anomalous, as of ``MNAD.measure``.
    video : array-like of shape (n,)
        For each frame, the number or name of its video.
    score_weight : float, default=0.6
        Weight of the first measure; the second has the rest.

    Returns
    -------
    numpy.ndarray of shape (n,)
        Scores from 0 to 1, high where a frame looks anomalous.

    Raises
    ------
    ValueError
        If the shapes differ, the numbers are not finite, or the weight is not within
        [0, 1].

    See Also
    --------
    skanomaly.MNAD.measure : Returns both measures.
    frame_roc_auc_score : Scales one score in each video.

    Notes
    -----
    With g scaling to [0, 1] by minimum and maximum of the video, the score is
    ``w * (1 - g(psnr)) + (1 - w) * g(distance)``, as in [1]_. Its area under the ROC
    curve over the frames of all videos, by :func:`sklearn.metrics.roc_auc_score`, is
    what the paper reports. The scaling needs whole videos.

    References
    ----------
    .. [1] H. Park, J. Noh and B. Ham, "Learning memory-guided normality for anomaly
       detection", CVPR 2020, pp. 14372-14381. arXiv 2003.13228.

    Examples
    --------
    >>> from skanomaly.metrics import video_scores
    >>> video_scores([30, 20, 25], [0.1, 0.3, 0.2], ["a", "a", "a"])
    array([0. , 1. , 0.5])
    """
    _check_frames(psnr=psnr, distance=distance, video=video)
    if not isinstance(score_weight, Real) or not 0 <= score_weight <= 1:
        raise ValueError(f"score_weight={score_weight!r} must be within [0, 1].")
    error = 1 - _scaled_in_videos(psnr, video)
    return score_weight * error + (1 - score_weight) * _scaled_in_videos(
        distance, video
    )


def anomaly_roc_auc(estimator: Any, X: ImagesOrPaths, y: ArrayLike) -> float:
    """Score a detector by the area under the ROC curve of images.

    For the argument ``scoring`` of scikit-learn's searches and cross-validations. The
    training folds of one-class learning hold one label only and have no such score:
    :class:`sklearn.model_selection.HalvingGridSearchCV` needs
    ``return_train_score=False``.

    Parameters
    ----------
    estimator : object
        A fitted detector with ``score_samples``, high for normal images.
    X : array-like of shape (n, ...)
        Images.
    y : array-like of shape (n,) or (n, H, W)
        Labels (+1 normal, -1 anomalous) or masks (anomalous where a pixel is True).

    Returns
    -------
    score : float
        Probability that an anomalous image has a lower score than a normal one.

    Raises
    ------
    ValueError
        If `y` holds other labels, which scikit-learn's "roc_auc" would take, at times
        the wrong way round, or only one of both.

    See Also
    --------
    anomaly_average_precision : Asks more where anomalies are rare.
    skanomaly.model_selection.OneClassKFold : Folds that hold both.

    Examples
    --------
    >>> from sklearn.ensemble import IsolationForest
    >>> from skanomaly.metrics import anomaly_roc_auc
    >>> X, y = [[0.0], [0.1], [0.2], [5.0]], [1, 1, 1, -1]
    >>> anomaly_roc_auc(IsolationForest(random_state=0).fit(X), X, y)
    1.0
    """
    return roc_auc_score(*_anomalies_and_degrees(estimator, X, y))


def anomaly_average_precision(estimator: Any, X: ImagesOrPaths, y: ArrayLike) -> float:
    """Score a detector by the average precision of images, anomalies being positive.

    For the argument ``scoring`` of scikit-learn's searches and cross-validations, where
    "average_precision" would take the normal images for the positive ones.

    Parameters
    ----------
    estimator : object
        A fitted detector with ``score_samples``, high for normal images.
    X : array-like of shape (n, ...)
        Images.
    y : array-like of shape (n,) or (n, H, W)
        Labels (+1 normal, -1 anomalous) or masks (anomalous where a pixel is True).

    Returns
    -------
    score : float
        Mean precision over the recalls of anomalous images.

    Raises
    ------
    ValueError
        If `y` holds other labels, or only one of both.

    See Also
    --------
    anomaly_roc_auc : Does not depend on how many images are anomalous.

    Examples
    --------
    >>> from sklearn.ensemble import IsolationForest
    >>> from skanomaly.metrics import anomaly_average_precision
    >>> X, y = [[0.0], [0.1], [0.2], [5.0]], [1, 1, 1, -1]
    >>> anomaly_average_precision(IsolationForest(random_state=0).fit(X), X, y)
    1.0
    """
    return average_precision_score(*_anomalies_and_degrees(estimator, X, y))


def _anomalies_and_degrees(estimator, X, y):
    """Return which images are anomalous, and the degrees that an estimator finds."""
    labels = required_labels(y, _num_samples(X))
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(
            f"y holds {len(labels)} images, all with the label {present[0]:+d}: a "
            "ranking needs both. skanomaly.model_selection.OneClassKFold makes folds "
            "that hold normal and anomalous ones."
        )
    return labels == -1, -estimator.score_samples(X)


def make_localization_scorer(
    score_func: Callable[..., float], **kwargs: Any
) -> "_LocalizationScorer":
    """Make a scorer of anomaly maps for cross-validation and searches.

    Parameters
    ----------
    score_func : callable
        Metric with the signature ``score_func(masks, maps, **kwargs)``, such as
        :func:`pro_auc_score`. Higher is better.
    **kwargs : dict
        Further arguments of `score_func`.

    Returns
    -------
    scorer : callable
        Object with the signature ``scorer(estimator, X, y=None, *, masks=None)`` that
        returns ``score_func(masks, estimator.localize(X), **kwargs)``. Without `masks`,
        `y` must hold the masks, of shape (n, H, W).

    See Also
    --------
    sklearn.metrics.make_scorer : The counterpart for predictions and image scores.

    Notes
    -----
    In a search the masks arrive in one of two ways: as metadata, after
    ``sklearn.set_config(enable_metadata_routing=True)`` and
    ``scorer.set_score_request(masks=True)``, with ``search.fit(X, y, masks=masks)``; or
    in the place of the labels, with ``search.fit(X, masks)``.

    Several such scorers in one search share a single call of `localize` per fold.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.base import BaseEstimator, OutlierMixin
    >>> from skanomaly.metrics import make_localization_scorer, pro_auc_score
    >>> class Darkness(OutlierMixin, BaseEstimator):
    ...     def fit(self, X, y=None):
    ...         return self
    ...
    ...     def localize(self, X):
    ...         return 1 - X
    >>> X = np.array([[[0.9, 0.2, 0.8, 0.7]]])
    >>> scorer = make_localization_scorer(pro_auc_score, max_fpr=1.0)
    >>> scorer(Darkness().fit(X), X, masks=X < 0.5)
    1.0
    """
    return _LocalizationScorer(score_func, 1, kwargs, response_method="localize")


class _LocalizationScorer(_BaseScorer):
    __metadata_request__score = {"masks": None}

    def __call__(self, estimator, X, y=None, *, masks=None):
        return self._score(_call_method, estimator, X, y, masks=masks)

    def _score(self, method_caller, estimator, X, y=None, *, masks=None):
        masks = y if masks is None else masks
        if masks is None or np.ndim(masks) < 2:
            given = "none" if masks is None else f"an array of shape {np.shape(masks)}"
            raise ValueError(
                f"{self!r} needs masks of shape (n, H, W), got {given}. Request them "
                "with set_score_request(masks=True) and pass masks=..., or pass them "
                "in the place of y."
            )
        maps = method_caller(estimator, self._response_method, X)
        return self._score_func(masks, maps, **self._kwargs)

    def __repr__(self):
        arguments = [self._score_func.__name__]
        arguments += [f"{name}={value!r}" for name, value in self._kwargs.items()]
        return f"make_localization_scorer({', '.join(arguments)})"


def _call_method(estimator, method, X):
    return getattr(with_maps(estimator), method)(X)


def _check_masks_and_maps(masks, maps, ndim=None):
    masks, maps = check_masks(masks), check_maps(maps)
    if masks.shape != maps.shape:
        raise ValueError(
            "masks and maps must have the same shape, "
            f"got {masks.shape} and {maps.shape}."
        )
    if ndim is not None and masks.ndim != ndim:
        raise ValueError(
            f"masks and maps must have the shape (n, H, W), got {masks.shape}."
        )
    if not masks.any():
        raise ValueError("masks must contain an anomalous pixel, all are normal.")
    if masks.all():
        raise ValueError("masks must contain a normal pixel, all are anomalous.")
    return masks, maps


def _check_max_fpr(max_fpr):
    if not isinstance(max_fpr, Real):
        raise TypeError(f"max_fpr must be a number in (0, 1], got {max_fpr!r}.")
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must lie in (0, 1], got {max_fpr!r}.")


class _Ranking:
    """How many pixels lie above each anomalous one, in ascending order of those."""

    def __init__(self, masks, maps):
        normal, anomalous = maps[~masks], maps[masks]
        normal.sort()
        self.order = np.argsort(anomalous)
        anomalous = anomalous[self.order]
        self.n_normal = normal.size
        self.n_normal_above = _n_above(normal, anomalous)
        self.n_normal_at_least = _n_at_least(normal, anomalous)
        self.n_anomalous_at_least = _n_at_least(anomalous, anomalous)

    def roc_auc(self):
        n_false_positives = self.n_normal_above + self.n_normal_at_least
        return float(1 - n_false_positives.mean() / (2 * self.n_normal))

    def average_precision(self):
        n_positives = self.n_anomalous_at_least + self.n_normal_at_least
        return float(np.mean(self.n_anomalous_at_least / n_positives))

    def f1_max(self):
        n_positives = self.n_anomalous_at_least + self.n_normal_at_least
        f1 = 2 * self.n_anomalous_at_least / (n_positives + self.order.size)
        return float(f1.max())

    def pro_auc(self, weights, max_fpr):
        limit = max_fpr * self.n_normal
        # A pixel adds its weight to the curve while the number of false positives grows
        # from `start` to `stop`; from there on it counts in full.
        start, stop = self.n_normal_above, self.n_normal_at_least
        cut = np.clip(limit, start, stop)
        ramp = (cut - start) ** 2 / (2 * np.maximum(stop - start, 1))
        area = ramp + np.maximum(limit - stop, 0)
        return float(np.average(area / limit, weights=weights[self.order]))


def _n_above(values, thresholds):
    """Count the sorted values that are greater than each threshold."""
    return values.size - np.searchsorted(values, thresholds, side="right")


def _n_at_least(values, thresholds):
    """Count the sorted values that are greater than or equal to each threshold."""
    return values.size - np.searchsorted(values, thresholds, side="left")


def _region_weights(masks):
    """Inverse size of its 8-connected region for each anomalous pixel."""
    weights = []
    for mask in masks[masks.any(axis=(1, 2))]:
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        region = ndimage.label(mask, structure=np.ones((3, 3)))[0][mask]
        weights.append(1 / np.bincount(region)[region])
    return np.concatenate(weights)
