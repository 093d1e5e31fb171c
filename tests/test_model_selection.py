import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score

from skanomaly import SPADE, PatchCore, PatchDetector, ResizeImages
from skanomaly.datasets import load_textures, plant_defects
from skanomaly.metrics import (
    anomaly_roc_auc,
    make_localization_scorer,
    pixel_roc_auc_score,
)
from skanomaly.model_selection import (
    OneClassKFold,
    OneClassShuffleSplit,
    one_class_train_test_split,
)
from skanomaly.pipeline import Pipeline, localize, make_pipeline


class Deviation(OutlierMixin, BaseEstimator):
    """Distance to the mean training image; refuses anomalies in training."""

    def __init__(self, power=1.0):
        self.power = power

    def fit(self, X, y=None):
        if y is not None:
            normal = y == 1 if y.ndim == 1 else ~y.any(axis=(1, 2))
            assert normal.all()
        self.mean_ = X.mean(axis=0)
        return self

    def localize(self, X):
        return (np.abs(X - self.mean_) ** self.power).astype(np.float32)

    def decision_function(self, X):
        return -self.localize(X).max(axis=(1, 2))


def pixel_roc_auc(estimator, X, masks):
    return roc_auc_score(masks.ravel(), estimator.localize(X).ravel())


def toy(n_normals=12, n_anomalies=7, seed=0):
    """Noise images, a bright pixel in each anomaly; labels and masks, mixed up."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([1] * n_normals + [-1] * n_anomalies)
    masks = np.zeros((len(labels), 6, 5), dtype=bool)
    masks[labels == -1, rng.integers(6), rng.integers(5)] = True
    X = rng.random(masks.shape) * 0.3 + masks
    return X, labels, masks


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shuffle", [False, True])
def test_k_fold_tests_each_image_once_and_trains_on_normals(seed, shuffle):
    rng = np.random.default_rng(seed)
    n_splits = int(rng.integers(2, 6))
    X, labels, _ = toy(int(rng.integers(5, 30)), int(rng.integers(5, 30)), seed)
    splitter = OneClassKFold(
        n_splits, shuffle=shuffle, random_state=seed if shuffle else None
    )

    splits = list(splitter.split(X, labels))

    assert len(splits) == splitter.get_n_splits(X, labels) == n_splits
    tested = np.sort(np.concatenate([test for _, test in splits]))
    np.testing.assert_array_equal(tested, np.arange(len(X)))
    for label in (1, -1):
        counts = [np.sum(labels[test] == label) for _, test in splits]
        assert max(counts) - min(counts) <= 1
    for train, test in splits:
        held_out = test[labels[test] == 1]
        np.testing.assert_array_equal(
            train, np.setdiff1d(np.flatnonzero(labels == 1), held_out)
        )
        np.testing.assert_array_equal(test, np.sort(test))


def test_k_fold_deals_sorted_kinds_of_defects_to_all_folds():
    kinds = np.repeat([0, 1, 2], [9, 3, 6])  # 0 normal, then two kinds of defects
    y = np.where(kinds == 0, 1, -1)
    for _, test in OneClassKFold(3).split(y, y):
        np.testing.assert_array_equal(np.bincount(kinds[test]), [3, 1, 2])


@pytest.mark.parametrize("seed", range(4))
def test_shuffle_split_holds_out_normals_and_tests_all_anomalies(seed):
    X, labels, _ = toy(n_normals=20, n_anomalies=6, seed=seed)
    splitter = OneClassShuffleSplit(5, test_size=0.3, random_state=seed)
    anomalies = np.flatnonzero(labels == -1)

    splits = list(splitter.split(X, labels))

    assert len(splits) == splitter.get_n_splits() == 5
    for train, test in splits:
        assert (len(train), len(test)) == (14, 6 + 6)
        assert np.isin(anomalies, test).all()
        np.testing.assert_array_equal(np.union1d(train, test), np.arange(26))
    assert len({tuple(train) for train, _ in splits}) > 1


@pytest.mark.parametrize(
    ("sizes", "n_train", "n_test"),
    [
        ({}, 16, 4),
        ({"test_size": 7}, 13, 7),
        ({"train_size": 0.5}, 10, 10),
        ({"train_size": 5, "test_size": 0.1}, 5, 2),
    ],
)
def test_shuffle_split_sizes_count_normals(sizes, n_train, n_test):
    X, labels, _ = toy(n_normals=20, n_anomalies=6)
    (train, test), *_ = OneClassShuffleSplit(random_state=0, **sizes).split(X, labels)
    assert (len(train), len(test)) == (n_train, n_test + 6)


@pytest.mark.parametrize(
    "splitter",
    [
        OneClassKFold(3),
        OneClassKFold(3, shuffle=True, random_state=0),
        OneClassShuffleSplit(3, random_state=0),
    ],
    ids=repr,
)
class TestBothSplitters:
    def assert_equal(self, splits, others):
        for parts, other_parts in zip(splits, others, strict=True):
            for part, other in zip(parts, other_parts, strict=True):
                np.testing.assert_array_equal(part, other)

    def test_same_seed_same_splits(self, splitter):
        X, labels, _ = toy()
        self.assert_equal(splitter.split(X, labels), splitter.split(X, labels))

    def test_masks_and_lists_split_like_labels(self, splitter):
        X, labels, masks = toy()
        expected = list(splitter.split(X, labels))
        self.assert_equal(splitter.split(X, masks), expected)
        self.assert_equal(splitter.split(X, masks.astype(np.uint8)), expected)
        self.assert_equal(splitter.split(list(X), labels.tolist()), expected)

    def test_no_y_means_all_normal(self, splitter):
        X = np.zeros((9, 2))
        self.assert_equal(splitter.split(X), splitter.split(X, np.ones(9)))

    def test_zero_one_labels_are_refused(self, splitter):
        X, labels, _ = toy()
        with pytest.raises(ValueError, match=r"\+1 for normal.*labels_from\(y"):
            next(splitter.split(X, (labels == -1).astype(int)))

    def test_works_in_scikit_learn_with_labels(self, splitter):
        X, labels, _ = toy()
        scores = cross_val_score(
            make_pipeline(Deviation()), X, labels, cv=splitter, scoring="roc_auc"
        )
        np.testing.assert_array_equal(scores, np.ones(3))

    def test_works_in_scikit_learn_with_masks(self, splitter):
        X, _, masks = toy()
        search = GridSearchCV(
            make_pipeline(Deviation()),
            {"deviation__power": [0.0, 1.0]},
            cv=splitter,
            scoring=pixel_roc_auc,
            error_score="raise",
            refit=False,
        ).fit(X, masks)
        # to the power of 0 all pixels are equal
        np.testing.assert_array_equal(search.cv_results_["mean_test_score"], [0.5, 1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shuffle", [False, True])
def test_k_fold_keeps_groups_together(seed, shuffle):
    rng = np.random.default_rng(seed)
    X, labels, _ = toy(n_normals=40, n_anomalies=30, seed=seed)
    groups = rng.integers(0, 30, len(X))
    names = np.array([f"part {group}" for group in groups])
    splitter = OneClassKFold(4, shuffle=shuffle, random_state=seed if shuffle else None)

    splits = list(splitter.split(X, labels, groups if seed % 2 else names))

    tested = np.sort(np.concatenate([test for _, test in splits]))
    np.testing.assert_array_equal(tested, np.arange(len(X)))
    for train, test in splits:
        assert not np.intersect1d(groups[train], groups[test]).size
        np.testing.assert_array_equal(
            train, np.setdiff1d(np.flatnonzero(labels == 1), test)
        )


def test_k_fold_of_planted_images_is_that_of_the_originals():
    y, groups = np.repeat([1, -1], 20), np.tile(np.arange(20), 2)
    splitter = OneClassKFold(5, shuffle=True, random_state=0)
    for plain, grouped in zip(
        splitter.split(np.ones(20)), splitter.split(y, y, groups), strict=True
    ):
        np.testing.assert_array_equal(grouped[0], plain[0])
        np.testing.assert_array_equal(grouped[1], [*plain[1], *plain[1] + 20])


def test_k_fold_refuses_too_few_groups():
    with pytest.raises(ValueError, match=r"2 groups.*n_splits=3"):
        next(OneClassKFold(3).split(np.ones(6), groups=[0, 0, 0, 1, 1, 1]))


def test_k_fold_warns_of_folds_whose_groups_hold_no_anomaly():
    y = np.array([1, 1, 1, 1, -1, -1])
    with pytest.warns(UserWarning, match="2 anomalous images.*1 have none"):
        next(OneClassKFold(2).split(y, y, [0, 1, 2, 3, 0, 1]))


def test_shuffle_split_does_not_ignore_groups_in_silence():
    X, labels, _ = toy()
    with pytest.warns(UserWarning, match="groups are not used"):
        next(OneClassShuffleSplit(3).split(X, labels, labels))


@pytest.fixture(scope="module")
def planted():
    good = load_textures(n_train=24, n_test=1, size=64).X_train
    return plant_defects(good, random_state=0)


def frozen(method, **params):
    return method(backbone="resnet18", weights=None, random_state=0, **params)


def test_without_groups_the_background_is_known_by_heart(planted):
    """What is left of the original lies at distance 0 to the training images."""
    aurocs = [
        cross_val_score(
            frozen(PatchCore, coreset=1.0, layers=("layer1", "layer2")),
            planted.X,
            planted.y,
            groups=groups,
            cv=OneClassKFold(3, shuffle=True, random_state=0),
            scoring=anomaly_roc_auc,
        ).mean()
        for groups in (planted.groups, None)
    ]
    assert aurocs[0] > 0.5
    assert aurocs[1] < aurocs[0] - 0.2


@pytest.mark.parametrize("judged_by", ["labels", "masks"])
def test_whole_methods_are_chosen_by_planted_defects(planted, judged_by):
    methods = [
        frozen(SPADE, layers=("layer2", "layer3")),
        frozen(PatchDetector, layers=("layer1",)),
    ]
    by_labels = judged_by == "labels"
    search = GridSearchCV(
        Pipeline([("size", ResizeImages(size=32)), ("detect", methods[0])]),
        {"detect": methods},
        cv=OneClassKFold(2, shuffle=True, random_state=0),
        scoring=anomaly_roc_auc if by_labels else pixel_roc_auc,
        error_score="raise",
    )
    y = planted.y if by_labels else planted.masks
    search.fit(planted.X, y, groups=planted.groups)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert localize(search, planted.X[:2]).shape == (2, 64, 64)


def test_groups_and_masks_go_by_metadata_routing(planted):
    scorer = make_localization_scorer(pixel_roc_auc_score)
    X, params = planted.X[..., 0] / 255, {"power": [1.0, 2.0]}
    settings = {"cv": OneClassKFold(3, shuffle=True, random_state=0), "refit": False}
    with config_context(enable_metadata_routing=True):
        scorer.set_score_request(masks=True)
        search = GridSearchCV(Deviation(), params, scoring=scorer, **settings)
        search.fit(X, planted.y, groups=planted.groups, masks=planted.masks)
    other = GridSearchCV(Deviation(), params, scoring=pixel_roc_auc, **settings)
    other.fit(X, planted.masks, groups=planted.groups)
    np.testing.assert_allclose(
        search.cv_results_["mean_test_score"], other.cv_results_["mean_test_score"]
    )


def test_splitters_differ_by_seed():
    X, labels, _ = toy(n_normals=40)

    def first_test(splitter):
        return next(splitter.split(X, labels))[1].tolist()

    for make in (
        lambda seed: OneClassKFold(shuffle=True, random_state=seed),
        lambda seed: OneClassShuffleSplit(random_state=seed),
    ):
        assert first_test(make(0)) != first_test(make(1))


def test_too_few_normals():
    y = np.array([1, 1, 1, -1, -1, -1, -1])
    with pytest.raises(ValueError, match=r"4 normal images.*got 3 among 7"):
        next(OneClassKFold(4).split(y, y))
    with pytest.raises(ValueError, match=r"2 normal images.*got 1 among 5"):
        next(OneClassShuffleSplit().split(y[2:], y[2:]))


def test_k_fold_warns_of_folds_without_anomaly():
    y = np.array([1] * 6 + [-1] * 2)
    with pytest.warns(UserWarning, match="2 anomalous images for n_splits=3"):
        splits = list(OneClassKFold(3).split(y, y))
    assert sorted(np.sum(y[test] == -1) for _, test in splits) == [0, 1, 1]


def test_repr():
    assert repr(OneClassKFold(3)) == (
        "OneClassKFold(n_splits=3, random_state=None, shuffle=False)"
    )
    assert repr(OneClassShuffleSplit(3)).split() == [
        "OneClassShuffleSplit(n_splits=3,",
        "random_state=None,",
        "test_size=None,",
        "train_size=None)",
    ]


@pytest.mark.parametrize("given", ["labels", "masks"])
def test_train_test_split(given):
    X, labels, masks = toy(n_normals=12, n_anomalies=5)
    paths = [f"{i}.png" for i in range(len(X))]
    steer = labels if given == "labels" else masks

    X_train, X_test, y_train, y_test, paths_train, paths_test = (
        one_class_train_test_split(X, labels, paths, labels=steer, random_state=0)
    )

    np.testing.assert_array_equal(y_train, np.ones(9))
    np.testing.assert_array_equal(np.sort(y_test), [-1] * 5 + [1] * 3)
    assert isinstance(paths_train, list)
    assert set(paths_train + paths_test) == set(paths)
    for images, names in ((X_train, paths_train), (X_test, paths_test)):
        numbers = [int(name.removesuffix(".png")) for name in names]
        np.testing.assert_array_equal(images, X[numbers])


def test_train_test_split_refuses_what_it_cannot_split():
    X, labels, _ = toy()
    with pytest.raises(ValueError, match="at least one array"):
        one_class_train_test_split(labels=labels)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        one_class_train_test_split(X, labels=labels[:-1])
    with pytest.raises(ValueError, match=r"labels_from"):
        one_class_train_test_split(X, labels=(labels == -1).astype(int))
