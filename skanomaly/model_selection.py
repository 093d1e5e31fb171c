"""Splitters for one-class learning: training sees normals only, tests see both."""

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import KFold, ShuffleSplit
from sklearn.utils import _safe_indexing, check_random_state, indexable
from sklearn.utils.validation import _num_samples

from ._typing import ImagesOrPaths
from ._validation import required_labels


def _checked_labels(X, y, groups, min_normals):
    """Return labels (n,) that hold enough normal images, or raise a ValueError."""
    X, y, groups = indexable(X, y, groups)
    n_samples = _num_samples(X)
    labels = required_labels(y, n_samples)
    n_normals = np.sum(labels == 1)
    if n_normals < min_normals:
        raise ValueError(
            f"y must hold {min_normals} normal images (label +1) or more for these "
            f"splits; got {n_normals} among {n_samples} images."
        )
    return labels


class OneClassKFold(KFold):
    """K-fold cross-validation that trains on normal images only.

    The normal images are cut into `n_splits` folds; each fold is tested once while the
    other normal images train. The anomalous images never train. They are dealt to the
    test folds in turn, so that each one is tested exactly once and a set sorted by kind
    of defect has every kind in many folds.

    Images of one group are tested in the same fold, so that no image is judged by a
    detector that knows another of its group.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, at least 2.
    shuffle : bool, default=False
        Whether to shuffle the normal and the anomalous images, or their groups, before
        they are cut into folds.
    random_state : int, RandomState instance or None, default=None
        Seed of the shuffling; only with ``shuffle=True``.

    See Also
    --------
    OneClassShuffleSplit : Random splits that test every anomaly each time.
    one_class_train_test_split : One split of arrays.
    skanomaly.datasets.plant_defects : Makes anomalies, and groups, of normal images.

    Notes
    -----
    Groups are cut into folds by their number, not by their size; those that hold normal
    images first, and then the others, dealt in turn.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.model_selection import OneClassKFold
    >>> y = np.array([1, 1, 1, 1, -1, -1])
    >>> for train, test in OneClassKFold(n_splits=2).split(y, y):
    ...     print(train, test)
    [2 3] [0 1 4]
    [0 1] [2 3 5]
    >>> groups = np.array([0, 1, 2, 3, 2, 0])
    >>> for train, test in OneClassKFold(n_splits=2).split(y, y, groups):
    ...     print(train, test)
    [2 3] [0 1 5]
    [0 1] [2 3 4]
    """

    # with scikit-learn's metadata routing, groups are handed on without being asked for
    __metadata_request__split = {"groups": True}

    def split(
        self,
        X: ImagesOrPaths,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Generate the indices of the training and the test images.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images; only their number matters.
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels (+1 normal, -1 anomalous) or masks (anomalous where a pixel is True).
            None: every image is normal.
        groups : array-like of shape (n,), default=None
            Group of each image, a number or a name. None: each image is a group.

        Yields
        ------
        train : ndarray of shape (n_train,), int
            Indices of the training images, all normal, in ascending order.
        test : ndarray of shape (n_test,), int
            Indices of the test images in ascending order.

        Raises
        ------
        ValueError
            If `y` holds other labels, or fewer than `n_splits` normal images or groups
            of them.

        Warns
        -----
        UserWarning
            If there are anomalies, but some folds have none: there the area under a ROC
            curve is undefined.
        """
        labels = _checked_labels(X, y, groups, self.n_splits)
        if groups is None:
            numbers = np.arange(len(labels))
        else:
            numbers = np.unique(groups, return_inverse=True)[1]
        normals = np.unique(numbers[labels == 1])
        others = np.setdiff1d(numbers, normals)
        if len(normals) < self.n_splits:
            raise ValueError(
                f"The normal images are of {len(normals)} groups, which cannot be cut "
                f"into n_splits={self.n_splits} folds."
            )
        if self.shuffle:
            others = check_random_state(self.random_state).permutation(others)
        folds = []
        for i, (_, test) in enumerate(super().split(normals)):
            tested = np.concatenate([normals[test], others[i :: self.n_splits]])
            folds.append(np.isin(numbers, tested))
        is_anomaly = labels == -1
        n_without = sum(not is_anomaly[fold].any() for fold in folds)
        if is_anomaly.any() and n_without:
            warnings.warn(
                f"y holds {is_anomaly.sum()} anomalous images for "
                f"n_splits={self.n_splits} folds, and {n_without} have none: a fold "
                "without one has no area under the ROC curve.",
                UserWarning,
                stacklevel=2,
            )
        for fold in folds:
            yield np.flatnonzero(~fold & ~is_anomaly), np.flatnonzero(fold)


class OneClassShuffleSplit(ShuffleSplit):
    """Random splits that train on normal images only.

    Each split draws anew which normal images train and which are tested. Every split
    tests all anomalous images.

    Parameters
    ----------
    n_splits : int, default=10
        Number of splits.
    test_size : float or int, default=None
        Normal images to test, as a share of the normal images or as a number. None: all
        that do not train, or 0.2 if `train_size` is None too.
    train_size : float or int, default=None
        Normal images to train on, as a share of the normal images or as a number. None:
        all that are not tested.
    random_state : int, RandomState instance or None, default=None
        Seed of the draws.

    See Also
    --------
    OneClassKFold : Folds that test every image exactly once.
    one_class_train_test_split : One split of arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.model_selection import OneClassShuffleSplit
    >>> y = np.array([1, 1, 1, 1, 1, -1, -1])
    >>> splitter = OneClassShuffleSplit(n_splits=2, random_state=0)
    >>> for train, test in splitter.split(y, y):
    ...     print(train, test)
    [0 1 3 4] [2 5 6]
    [1 2 3 4] [0 5 6]
    """

    def __init__(
        self, n_splits=10, *, test_size=None, train_size=None, random_state=None
    ):
        super().__init__(
            n_splits,
            test_size=test_size,
            train_size=train_size,
            random_state=random_state,
        )
        self._default_test_size = 0.2

    def split(
        self,
        X: ImagesOrPaths,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Generate the indices of the training and the test images.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images; only their number matters.
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels (+1 normal, -1 anomalous) or masks (anomalous where a pixel is True).
            None: every image is normal.
        groups : array-like of shape (n,), default=None
            Not used, present for scikit-learn's API; a UserWarning says so.

        Yields
        ------
        train : ndarray of shape (n_train,), int
            Indices of the training images, all normal, in ascending order.
        test : ndarray of shape (n_test,), int
            Indices of the test images, among them every anomaly, in ascending order.

        Raises
        ------
        ValueError
            If `y` holds other labels, or fewer than two normal images.
        """
        if groups is not None:
            warnings.warn("groups are not used.", UserWarning, stacklevel=2)
        labels = _checked_labels(X, y, groups, min_normals=2)
        normals, anomalies = np.flatnonzero(labels == 1), np.flatnonzero(labels == -1)
        for train, test in super().split(normals):
            test = np.concatenate([normals[test], anomalies])
            yield np.sort(normals[train]), np.sort(test)


def one_class_train_test_split(
    *arrays: Any,
    labels: ArrayLike,
    test_size: float = 0.25,
    random_state: int | np.random.RandomState | None = None,
) -> list[Any]:
    """Split arrays into normal training images and a test set with all anomalies.

    Parameters
    ----------
    *arrays : array-likes with n entries each
        Images, masks, lists of paths, labels, ...
    labels : array-like of shape (n,) or (n, H, W)
        Labels (+1 normal, -1 anomalous) or masks (anomalous where a pixel is True).
        They only steer the split; to get them split too, give them among `arrays`.
    test_size : float or int, default=0.25
        Normal images to test, as a share of the normal images or as a number.
    random_state : int, RandomState instance or None, default=None
        Seed of the draw.

    Returns
    -------
    list of length 2 * len(arrays)
        Training and test part of each array in turn, of the array's own type.

    Raises
    ------
    ValueError
        If there is no array, if the lengths differ, or if `labels` holds other values
        or fewer than two normal images.

    See Also
    --------
    OneClassShuffleSplit : The splitter behind this function.

    Examples
    --------
    >>> from skanomaly.model_selection import one_class_train_test_split
    >>> paths = ["a.png", "b.png", "c.png", "d.png", "broken.png"]
    >>> one_class_train_test_split(paths, labels=[1, 1, 1, 1, -1], random_state=0)
    [['a.png', 'b.png', 'd.png'], ['c.png', 'broken.png']]
    """
    if not arrays:
        raise ValueError("one_class_train_test_split needs at least one array.")
    *arrays, labels = indexable(*arrays, labels)
    splitter = OneClassShuffleSplit(
        n_splits=1, test_size=test_size, random_state=random_state
    )
    train, test = next(splitter.split(arrays[0], labels))
    return list(
        chain.from_iterable(
            (_safe_indexing(array, train), _safe_indexing(array, test))
            for array in arrays
        )
    )
