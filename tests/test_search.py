"""Searches and cross-validations: what gives a right number, and what refuses."""

from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline as make_sklearn_pipeline

from skanomaly import SPADE, ResizeImages, localize
from skanomaly.metrics import (
    anomaly_average_precision,
    anomaly_roc_auc,
    make_localization_scorer,
    pixel_roc_auc_score,
)
from skanomaly.model_selection import OneClassKFold

N_NORMAL, N_ANOMALOUS = 24, 18


@pytest.fixture(scope="module")
def data():
    """Return images, the anomalous ones last, with labels and masks."""
    rng = np.random.default_rng(0)
    n = N_NORMAL + N_ANOMALOUS
    wave = 128 + 60 * np.sin(np.arange(24) * np.pi / 4)[:, None, None]
    X = wave + rng.normal(0, 8, (n, 24, 24, 3))
    masks = np.zeros((n, 24, 24), bool)
    masks[N_NORMAL:, 4:20, 4:20] = True
    X[masks] = 0
    y = np.where(masks.any(axis=(1, 2)), -1, 1)
    return X.clip(0, 255).astype(np.uint8), y, masks


@pytest.fixture
def detector(small):
    """Return a function that makes a small detector of few neighbours."""
    return partial(small, SPADE, n_neighbors=1, gallery_size=2)


def test_scorers_rank_the_anomalous_class(data, detector):
    X, y, masks = data
    fitted = detector().fit(X[:8])
    degrees, anomalous = -fitted.score_samples(X), y == -1
    assert anomaly_roc_auc(fitted, X, y) == roc_auc_score(anomalous, degrees)
    expected = average_precision_score(anomalous, degrees)
    assert anomaly_average_precision(fitted, X, y) == expected
    assert anomaly_average_precision(fitted, X, masks) == expected
    assert expected > 0.8


@pytest.mark.parametrize(
    "search",
    [
        lambda *args, **kwargs: GridSearchCV(*args, **kwargs),
        lambda estimator, grid, **kwargs: RandomizedSearchCV(
            estimator,
            {"n_neighbors": stats.randint(1, 4)},
            n_iter=2,
            random_state=0,
            **kwargs,
        ),
        lambda *args, **kwargs: HalvingGridSearchCV(
            *args,
            min_resources=36,
            return_train_score=False,  # training folds hold normal images only
            random_state=0,
            **kwargs,
        ),
    ],
    ids=["grid", "random", "halving"],
)
@pytest.mark.parametrize("kind", ["images", "pixels"])
def test_searches_take_both_kinds_of_scorers(search, kind, data, detector):
    X, y, masks = data
    scoring = (
        anomaly_roc_auc
        if kind == "images"
        else make_localization_scorer(pixel_roc_auc_score)
    )
    found = search(
        detector(),
        {"n_neighbors": [1, 3]},
        scoring=scoring,
        cv=OneClassKFold(2),
        error_score="raise",
    )
    # images in mixed order: halving takes a part of them
    order = np.random.default_rng(0).permutation(len(X))
    found.fit(X[order], (y if kind == "images" else masks)[order])
    assert found.best_score_ > 0.7
    np.testing.assert_array_equal(localize(found, X), found.best_estimator_.localize(X))


def test_halving_in_two_rounds(data, detector):
    X, y, _ = data
    search = HalvingGridSearchCV(
        detector(),
        {"n_neighbors": [1, 2, 3]},
        scoring=anomaly_roc_auc,
        cv=OneClassKFold(2),
        min_resources=14,
        return_train_score=False,
        random_state=0,
    ).fit(X, y)
    assert search.n_iterations_ == 2
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_score_ > 0.7


def test_pixel_scorers_take_pipelines_of_scikit_learn(data, detector):
    X, y, masks = data
    pipeline = make_sklearn_pipeline(ResizeImages(size=24), detector()).fit(X[y == 1])
    scorer = make_localization_scorer(pixel_roc_auc_score)
    assert scorer(pipeline, X, masks) == scorer(pipeline[-1], X, masks)


def test_sorted_labels_with_an_integer_cv_give_no_number(data, detector):
    X, y, _ = data
    with pytest.raises(ValueError, match=r"all with the label \+1.*OneClassKFold"):
        cross_val_score(
            detector(), X, y, cv=3, scoring=anomaly_roc_auc, error_score="raise"
        )
    # by default scikit-learn turns that into nan, never into a number
    with pytest.warns(UserWarning, match="Scoring failed"):
        scores = cross_val_score(detector(), X, y, cv=3, scoring=anomaly_roc_auc)
    assert np.isnan(scores).tolist() == [True, False, True]
    scores = cross_val_score(
        detector(), X, y, cv=OneClassKFold(3), scoring=anomaly_roc_auc
    )
    assert (scores > 0.7).all()


@pytest.mark.parametrize("scorer", [anomaly_roc_auc, anomaly_average_precision])
@pytest.mark.parametrize("of", [lambda y: (y == -1).astype(int), lambda y: y == 1])
def test_labels_that_would_invert_the_result_are_refused(scorer, of, data, detector):
    X, y, _ = data
    fitted = detector().fit(X[:8])
    # scikit-learn's own scorer takes them, and calls the best detector the worst
    inverted = roc_auc_score((y == -1).astype(int), fitted.decision_function(X))
    assert inverted < 0.2
    with pytest.raises(ValueError, match=r"labels must be.*labels_from"):
        scorer(fitted, X, of(y))


@pytest.mark.parametrize(
    "cv", [KFold(3, shuffle=True, random_state=0), StratifiedKFold(3)]
)
def test_anomalies_in_training_folds_are_not_trained_on(cv, data, detector):
    X, y, _ = data
    train, test = next(cv.split(X, y))
    assert (y[train] == -1).any()
    fitted = detector().fit(X[train], y[train])
    clean = detector().fit(X[train][y[train] == 1])
    np.testing.assert_array_equal(
        fitted.score_samples(X[test]), clean.score_samples(X[test])
    )
    # without labels they are, and make other anomalies look normal
    spoiled = detector().fit(X[train])
    anomalies = X[test][y[test] == -1]
    assert (spoiled.score_samples(anomalies) > clean.score_samples(anomalies)).all()
