"""Pipelines that localize: scikit-learn's Pipeline and a way back for the maps."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import pipeline as sklearn_pipeline
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import _final_estimator_has, _name_estimators
from sklearn.utils import Bunch
from sklearn.utils.validation import check_is_fitted

from ._regions import find_regions
from ._typing import ImagesOrPaths, available_if
from ._validation import holds_paths

__all__ = ["Pipeline", "localize", "make_pipeline"]

_WAYS_BACK = "inverse_transform_maps", "inverse_transform_regions"


class Pipeline(sklearn_pipeline.Pipeline):
    """Chain of transformers and a detector, with anomaly maps at the input resolution.

    scikit-learn's :class:`~sklearn.pipeline.Pipeline` plus :meth:`localize`,
    :meth:`segment` and :meth:`inspect`. The images run forward through the
    transformers, the last step computes its maps, and the maps walk back through the
    steps that changed the geometry, until they fit the images that entered.

    Parameters
    ----------
    steps : list of (str, estimator) tuples
        Names and estimators in the order in which they are chained. All but the last
        one must be transformers, ``"passthrough"`` or None.
    transform_input : list of str, default=None
        Names of metadata that run through the transformers like `X`; see
        :class:`sklearn.pipeline.Pipeline`. Needs metadata routing.
    memory : str or object with the joblib.Memory interface, default=None
        Cache of the fitted transformers; a string is a path to a folder.
    verbose : bool, default=False
        Whether to print the time that each step takes to fit.

    Attributes
    ----------
    named_steps : Bunch
        The steps by name.
    n_features_in_ : int
        Number of features that the first step saw in `fit`; only defined if that step
        defines it.
    feature_names_in_ : ndarray of shape (n_features,)
        Names of the features that the first step saw in `fit`; only defined if that
        step defines it.

    See Also
    --------
    make_pipeline : Build a pipeline without naming its steps.

    Notes
    -----
    A step that changes the geometry has the method ``inverse_transform_maps(maps, X)``:
    it takes maps of shape (n, h, w) that fit the step's output and the images `X` that
    entered the step, and returns maps of shape (n, H, W) that fit `X`. A step without
    this method is passed over, hence the maps have the resolution of the first array:
    that of `X`, or, behind a step that loads files, that of the loaded images. A
    pipeline may stand inside a pipeline, scikit-learn's own as a transformer too.

    A step that loads files, and resizes them on the way, may have the method
    ``inverse_transform_regions(regions, X)``: it takes the regions that :meth:`inspect`
    finds in the loaded images and the files `X`, and returns the regions in pixels of
    the files. :class:`LoadImages` has it.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import SPADE, Pipeline, ResizeImages
    >>> X = np.random.default_rng(0).random((8, 24, 20, 3), dtype=np.float32)
    >>> pipeline = Pipeline(
    ...     [
    ...         ("resize", ResizeImages(size=(16, 16))),
    ...         ("detect", SPADE(backbone="resnet18", weights=None)),
    ...     ]
    ... )
    >>> pipeline.fit(X).localize(X).shape
    (8, 24, 20)
    """

    @available_if(_final_estimator_has("localize"))
    def localize(self, X: ImagesOrPaths) -> NDArray[np.floating]:
        """Compute anomaly maps at the resolution of the first array.

        Only available if the last step has `localize`.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), or what the first step takes
            Images.

        Returns
        -------
        numpy.ndarray of shape (n, H, W), float32
            Anomaly maps, high where anomalous.
        """
        return self._maps(X, "localize")

    @available_if(_final_estimator_has("segment"))
    def segment(self, X: ImagesOrPaths) -> NDArray[np.bool_]:
        """Mark the anomalous pixels at the resolution of the first array.

        The regions found by the last step walk back as maps of zeros and ones; a pixel
        is anomalous where the returned map exceeds one half. Only available if the
        last step has `segment`.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), or what the first step takes
            Images.

        Returns
        -------
        numpy.ndarray of shape (n, H, W), bool
            True where anomalous.
        """
        return self._maps(X, "segment") > 0.5

    @available_if(_final_estimator_has("inspect"))
    def inspect(self, X: ImagesOrPaths) -> Bunch:
        """Judge images and find their anomalous regions; X runs through the steps once.

        Only available if the last step has `inspect`.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), or what the first step takes
            Images.

        Returns
        -------
        sklearn.utils.Bunch
            What `inspect` of the last step returns. Maps and masks have the resolution
            of the first array, as `localize` and `segment` have them; regions are in
            its pixels, and behind :class:`~skanomaly.LoadImages` in pixels of the
            files: :func:`skanomaly.inspection.inspect` tells more.
        """
        X, way_back = self._forward(X)
        report = self._final_estimator.inspect(X)
        if "maps" not in report:
            return report
        maps = _backward(report.maps, way_back)
        if maps is not report.maps:  # else the regions are right already
            report.maps, report.masks = maps, _backward(report.masks, way_back) > 0.5
            report.regions = find_regions(report.masks, report.maps)
        for transformer, X in reversed(way_back):
            if hasattr(transformer, "inverse_transform_regions"):
                report.regions = transformer.inverse_transform_regions(
                    report.regions, X
                )
        return report

    def _maps(self, X, method):
        X, way_back = self._forward(X)
        return _backward(getattr(self._final_estimator, method)(X), way_back)

    def _forward(self, X):
        """Return what the last step gets; of steps with a way back, what they got."""
        check_is_fitted(self)
        way_back = []
        for transformer in _transformers(self._iter(with_final=False)):
            if any(hasattr(transformer, name) for name in _WAYS_BACK):
                way_back.append((transformer, X))
            X = transformer.transform(X)
        return X, way_back


def _backward(maps, way_back):
    """Return maps at the resolution of the first array."""
    maps = maps.astype(np.float32, copy=False)
    for transformer, X in reversed(way_back):
        if hasattr(transformer, "inverse_transform_maps"):
            maps = transformer.inverse_transform_maps(maps, X)
    return maps


def localize(estimator: Any, X: ImagesOrPaths) -> NDArray[np.floating]:
    """Compute anomaly maps by whatever holds a fitted detector.

    Parameters
    ----------
    estimator : object
        A fitted detector, a pipeline of skanomaly or of scikit-learn that ends in one,
        a ThresholdCalibrator around these, or a search among such estimators.
    X : array-like of shape (n, H, W, C), or what the estimator takes
        Images.

    Returns
    -------
    numpy.ndarray of shape (n, H, W), float32
        Anomaly maps, high where anomalous.

    Raises
    ------
    TypeError
        If there is no detector in the estimator, or a search is not fitted or was told
        not to refit.

    See Also
    --------
    Pipeline.localize : The same as a method.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.pipeline import make_pipeline
    >>> from skanomaly import SPADE, ResizeImages, localize
    >>> X = np.random.default_rng(0).random((8, 24, 20, 3), dtype=np.float32)
    >>> detector = SPADE(backbone="resnet18", weights=None)
    >>> pipeline = make_pipeline(ResizeImages(size=(16, 16)), detector).fit(X)
    >>> localize(pipeline, X).shape
    (8, 24, 20)
    """
    return holder_of("localize", estimator, "has no maps").localize(X)


def holder_of(method, estimator, complaint):
    """Return an estimator, or what holds its detector, if that has a method."""
    holder = with_maps(estimator)
    if hasattr(holder, method):
        return holder
    raise TypeError(
        f"{type(estimator).__name__} {complaint}: {method} takes a fitted detector, a "
        "pipeline that ends in one, or a fitted search among these, with refit=True."
    )


def with_maps(estimator: Any) -> Any:
    """Return a pipeline of scikit-learn as one of ours, anything else as it is.

    It may stand inside of a search, be frozen, or end in any of these.
    """
    estimator = getattr(estimator, "best_estimator_", estimator)
    if isinstance(estimator, FrozenEstimator):
        return with_maps(estimator.estimator)
    if isinstance(estimator, sklearn_pipeline.Pipeline):
        *others, (name, final) = estimator.steps
        return Pipeline([*others, (name, with_maps(final))])
    return estimator


def unwrapped(estimator):
    """Return the estimator inside of a search, a calibrator or a frozen one."""
    for name in ("best_estimator_", "_calibrated"):
        if hasattr(estimator, name):
            return unwrapped(getattr(estimator, name))
    if isinstance(estimator, FrozenEstimator):
        return unwrapped(estimator.estimator)
    return estimator


def final_step(estimator):
    """Return the detector in which an estimator ends, whatever is around it."""
    estimator = unwrapped(estimator)
    if isinstance(estimator, sklearn_pipeline.Pipeline):
        return final_step(estimator.steps[-1][1])
    return estimator


def loaded_images(estimator, X):
    """Return the images in whose pixels `inspect` finds the regions.

    These are X, what a step loads from the paths in X, or, where such a step scales
    regions to its files as `LoadImages` does, their paths.
    """
    if not holds_paths(X):
        return X
    holder = unwrapped(estimator)
    if not isinstance(holder, sklearn_pipeline.Pipeline):
        raise TypeError(
            f"X holds paths, but {type(holder).__name__} has no step that loads them."
        )
    for transformer in _transformers(holder._iter(with_final=False)):
        if hasattr(transformer, "inverse_transform_regions"):
            return X
        X = transformer.transform(X)
        if not holds_paths(X):
            return X
    return loaded_images(holder.steps[-1][1], X)


def _transformers(steps):
    for _, _, step in steps:
        if isinstance(step, sklearn_pipeline.Pipeline):
            yield from _transformers(step._iter())
        else:
            yield step


def make_pipeline(*steps: Any, memory: Any = None, verbose: bool = False) -> Pipeline:
    """Build a :class:`Pipeline` whose steps are named after their types.

    Parameters
    ----------
    *steps : estimators
        Transformers and, last, a detector.
    memory : str or object with the joblib.Memory interface, default=None
        Cache of the fitted transformers; a string is a path to a folder.
    verbose : bool, default=False
        Whether to print the time that each step takes to fit.

    Returns
    -------
    Pipeline
        The pipeline; the names of its steps are the types in lower case.

    See Also
    --------
    Pipeline : The class, for steps with names of one's own.

    Examples
    --------
    >>> from skanomaly import SPADE, ResizeImages, make_pipeline
    >>> list(make_pipeline(ResizeImages(size=(16, 16)), SPADE()).named_steps)
    ['resizeimages', 'spade']
    """
    return Pipeline(_name_estimators(steps), memory=memory, verbose=verbose)
