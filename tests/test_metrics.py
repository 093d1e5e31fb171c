import pickle
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import sklearn
from scipy import ndimage
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.metrics import (
    auc,
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
)
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score

from skanomaly.metrics import (
    f1_max,
    frame_roc_auc_score,
    localization_scores,
    make_localization_scorer,
    pixel_average_precision_score,
    pixel_roc_auc_score,
    pro_auc_score,
)

PIXEL_METRICS = [pixel_roc_auc_score, pixel_average_precision_score, pro_auc_score]
METRICS = [*PIXEL_METRICS, f1_max]


# Slow references: one pass over the set for every distinct threshold


def regions_of(masks):
    """List the 8-connected regions of each mask as lists of pixel indices."""
    regions = []
    todo = {tuple(index) for index in np.argwhere(masks)}
    while todo:
        region, frontier = [], [todo.pop()]
        while frontier:
            i, r, c = frontier.pop()
            region.append((i, r, c))
            around = {(i, r + a, c + b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
            frontier.extend(around & todo)
            todo -= around
        regions.append(region)
    return regions


def pro_curve(masks, maps):
    """List (false positive rate, overlap) at every threshold, as fractions."""
    regions = regions_of(masks)
    n_normal = int((~masks).sum())
    curve = [(Fraction(0), Fraction(0))]
    for threshold in np.unique(maps)[::-1]:
        positive = maps >= threshold
        covered = [Fraction(sum(bool(positive[p]) for p in r), len(r)) for r in regions]
        false_positives = int((positive & ~masks).sum())
        curve.append((Fraction(false_positives, n_normal), sum(covered) / len(regions)))
    return curve


def area_up_to(curve, limit):
    area = Fraction(0)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x1 > limit:
            if x0 < limit:
                y_cut = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + y_cut) / 2
            return area
        area += (x1 - x0) * (y0 + y1) / 2
    return area


def slow_pro_auc(masks, maps, max_fpr=0.3):
    limit = Fraction(max_fpr)
    return float(area_up_to(pro_curve(masks, maps), limit) / limit)


def slow_roc_auc(masks, maps):
    return roc_auc_score(masks.ravel(), maps.ravel())


def slow_average_precision(masks, maps):
    score, recall = 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        positive = maps >= threshold
        true_positives = (positive & masks).sum()
        new_recall = true_positives / masks.sum()
        score += (new_recall - recall) * true_positives / positive.sum()
        recall = new_recall
    return score


def slow_f1_max(masks, maps):
    scores = []
    for threshold in np.unique(maps):
        positive = maps >= threshold
        true_positives = (positive & masks).sum()
        if true_positives:
            precision = true_positives / positive.sum()
            recall = true_positives / masks.sum()
            scores.append(2 * precision * recall / (precision + recall))
    return max(scores)


SLOW = {
    pixel_roc_auc_score: slow_roc_auc,
    pixel_average_precision_score: slow_average_precision,
    pro_auc_score: slow_pro_auc,
    f1_max: slow_f1_max,
}


def make_data(seed, n_values=None, dtype=np.float32):
    """Six images, two of them normal, with regions that touch in a corner and not."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((6, 10, 12), dtype=bool)
    masks[0, 1:4, 1:4] = masks[0, 4, 4] = masks[0, 8, 9] = True
    masks[1, 0, 11] = masks[1, 5:10, 2:9] = True
    masks[2] = rng.random((10, 12)) < 0.2
    masks[3, 2:5, 6:8] = True
    maps = rng.normal(size=masks.shape) + masks
    if n_values is not None:
        maps = np.floor(maps * n_values / 6)
    return masks, maps.astype(dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n_values", [3, 10, None])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_slow_reference(metric, n_values, dtype):
    for seed in range(3):
        masks, maps = make_data(seed, n_values, dtype)
        expected = SLOW[metric](masks, maps)
        assert metric(masks, maps) == pytest.approx(expected, abs=1e-12)
        assert metric(masks.astype(np.uint8), maps) == metric(masks, maps)


@pytest.mark.parametrize("max_fpr", [1e-4, 0.01, 0.05, 0.3, 0.9999, 1.0])
@pytest.mark.parametrize("n_values", [2, 6, None])
def test_pro_auc_is_cut_exactly(max_fpr, n_values):
    masks, maps = make_data(3, n_values)
    expected = slow_pro_auc(masks, maps, max_fpr)
    assert pro_auc_score(masks, maps, max_fpr=max_fpr) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("max_fpr", [0.05, 0.3])
def test_all_measures_at_once_equal_each_alone(max_fpr):
    masks, maps = make_data(0, 20)
    assert localization_scores(masks, maps, max_fpr=max_fpr) == {
        "pixel_roc_auc": pixel_roc_auc_score(masks, maps),
        "pixel_average_precision": pixel_average_precision_score(masks, maps),
        "pro_auc": pro_auc_score(masks, maps, max_fpr=max_fpr),
        "f1_max": f1_max(masks, maps),
    }


def test_pro_auc_of_one_pixel_regions_is_roc_auc():
    masks, maps = make_data(0, 20)
    masks[:] = False
    masks[::2, ::3, ::3] = True
    assert pro_auc_score(masks, maps, max_fpr=1.0) == pytest.approx(
        roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12
    )


def test_equals_scikit_learn():
    masks, maps = make_data(4, 30)
    assert pixel_average_precision_score(masks, maps) == pytest.approx(
        average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12
    )


def test_integer_maps():
    masks, maps = make_data(5, 10)
    codes = (maps - maps.min()).astype(np.uint8)
    for metric in METRICS:
        assert metric(masks, codes) == pytest.approx(metric(masks, maps), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_perfect_detector(metric):
    masks, _ = make_data(0)
    assert metric(masks, masks.astype(np.float32)) == 1.0


def test_constant_map():
    masks, maps = make_data(0)
    constant = np.full_like(maps, 0.7)
    prevalence = masks.mean()
    assert pixel_roc_auc_score(masks, constant) == 0.5
    assert pixel_average_precision_score(masks, constant) == pytest.approx(prevalence)
    assert pro_auc_score(masks, constant, max_fpr=0.2) == pytest.approx(0.1)
    assert f1_max(masks, constant) == pytest.approx(2 * prevalence / (1 + prevalence))


def test_f1_max_of_image_scores():
    labels = np.array([1, 1, -1, 1, -1, -1])
    scores = np.array([0.1, 0.5, 0.5, 0.2, 0.9, 0.4])
    assert f1_max(labels == -1, scores) == pytest.approx(6 / 7)


# Known mistakes: the mistaken variant differs, the reference agrees with ours


def test_pro_auc_is_divided_by_the_limit_not_by_the_reached_rate():
    masks, maps = make_data(6, 4)
    reached = [(x, y) for x, y in pro_curve(masks, maps) if x <= Fraction(0.3)]
    mistaken = float(area_up_to(reached, Fraction(0.3)) / reached[-1][0])

    score = pro_auc_score(masks, maps)
    assert abs(score - mistaken) > 0.01
    assert score == pytest.approx(slow_pro_auc(masks, maps), abs=1e-12)


def test_average_precision_is_not_trapezoidal():
    masks = np.zeros((2, 16, 16), dtype=bool)
    masks[0, 0, :2] = True
    constant = np.ones(masks.shape)
    precision, recall, _ = precision_recall_curve(masks.ravel(), constant.ravel())
    mistaken = auc(recall, precision)

    score = pixel_average_precision_score(masks, constant)
    assert mistaken == pytest.approx(0.5, abs=0.01)
    assert score == slow_average_precision(masks, constant) == masks.mean()


@pytest.mark.parametrize("metric", METRICS)
def test_resized_masks_are_not_binarised_above_zero(metric):
    masks, _ = make_data(0)
    maps = np.random.default_rng(0).normal(size=(6, 5, 6))
    maps += masks.reshape(6, 5, 2, 6, 2).mean(axis=(2, 4))
    resized = masks.reshape(6, 5, 2, 6, 2).mean(axis=(2, 4))  # quarters, 0 to 1

    for wrong in (resized, (255 * resized).astype(np.uint8), 255 * (resized > 0.5)):
        with pytest.raises(ValueError, match="Binarise at half of the maximum"):
            metric(wrong, maps)
    score = metric(resized > 0.5, maps)
    assert abs(score - metric(resized > 0, maps)) > 0.01
    assert score == pytest.approx(SLOW[metric](resized > 0.5, maps), abs=1e-12)


@pytest.mark.parametrize("metric", [pixel_roc_auc_score, pro_auc_score])
def test_normal_pixels_of_normal_images_count(metric):
    masks, maps = make_data(0)
    maps[~masks.any(axis=(1, 2))] += 1
    anomalous = masks.any(axis=(1, 2))
    mistaken = SLOW[metric](masks[anomalous], maps[anomalous])

    score = metric(masks, maps)
    assert abs(score - mistaken) > 0.01
    assert score == pytest.approx(SLOW[metric](masks, maps), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_maps_are_not_scaled_per_image(metric):
    masks, maps = make_data(0)
    maps *= np.array([1, 4, 2, 3, 0.1, 0.2], dtype=maps.dtype)[:, None, None]
    low, high = maps.min(axis=(1, 2)), maps.max(axis=(1, 2))
    scaled = (maps - low[:, None, None]) / (high - low)[:, None, None]
    mistaken = SLOW[metric](masks, scaled)

    score = metric(masks, maps)
    assert abs(score - mistaken) > 0.01
    assert score == pytest.approx(SLOW[metric](masks, maps), abs=1e-12)


def test_pro_auc_does_not_accumulate_in_float32():
    # Three regions, whose every pixel has its own value: a long sum of small weights.
    masks = np.zeros((1, 400, 403), dtype=bool)
    masks[0, :, :200] = masks[0, :, 201:301] = masks[0, :, 302:402] = True
    maps = np.random.default_rng(0).permutation(masks.size).reshape(masks.shape)
    maps = maps.astype(np.float32)

    descending = np.argsort(-maps, axis=None)
    labels, _ = ndimage.label(masks)
    sizes = np.bincount(labels.ravel())
    weights = np.where(masks, 1 / (3.0 * sizes[labels]), 0).ravel()[descending]
    steps = (~masks).ravel()[descending] / 1200
    # Single pixels add either height or width, hence a sum of rectangles.
    mistaken = np.sum(np.cumsum(weights, dtype=np.float32) * steps)
    precise = np.sum(np.cumsum(weights, dtype=np.longdouble) * steps)

    score = pro_auc_score(masks, maps, max_fpr=1.0)
    assert abs(score - mistaken) > 1e-7
    assert score == pytest.approx(float(precise), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_double_precision_maps_are_not_rounded(metric):
    masks, _ = make_data(0)
    maps = 1 + 1e-12 * masks
    assert metric(masks, maps.astype(np.float32)) < 0.7
    assert metric(masks, maps) == SLOW[metric](masks, maps) == 1.0


# Frames of videos


def make_videos(seed, n_values=None):
    """Four videos mixed, one without anomalies and one of equal scores."""
    rng = np.random.default_rng(seed)
    video = rng.permutation(np.repeat(["b", "a", "c", "d"], [9, 12, 7, 5]))
    y_true = np.where(rng.random(len(video)) < 0.3, -1, 1)
    y_true[video == "c"] = 1
    scores = rng.normal(size=len(video)) - y_true
    if n_values is not None:
        scores = np.floor(scores * n_values / 6)
    for name, scale, shift in (("a", 5, 3), ("b", 0.1, -40), ("d", 0, 2)):
        rows = video == name
        scores[rows] = scale * scores[rows] + shift
    return y_true, scores, video


def slow_frame_roc_auc(y_true, scores, video):
    frames = []
    for label, score, name in zip(y_true, scores, video, strict=True):
        company = [s for s, v in zip(scores, video, strict=True) if v == name]
        low, high = min(company), max(company)
        frames.append((label, (score - low) / (high - low) if high > low else 0.0))
    wins = [
        (anomalous > normal) + (anomalous == normal) / 2
        for label, anomalous in frames
        for other, normal in frames
        if label == -1 and other == 1
    ]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("n_values", [3, None])
@pytest.mark.parametrize("seed", range(4))
def test_frame_roc_auc_equals_slow_reference(seed, n_values):
    y_true, scores, video = make_videos(seed, n_values)
    score = frame_roc_auc_score(y_true, scores, video)
    assert score == pytest.approx(slow_frame_roc_auc(y_true, scores, video), abs=1e-12)
    assert abs(score - roc_auc_score(y_true == -1, scores)) > 0.01
    assert frame_roc_auc_score(list(y_true), list(scores), list(video)) == score


def test_frame_roc_auc_of_one_video_is_roc_auc():
    y_true, scores, _ = make_videos(0)
    score = frame_roc_auc_score(y_true, scores, np.zeros(len(scores)))
    assert score == pytest.approx(roc_auc_score(y_true == -1, scores), abs=1e-12)


def test_frame_roc_auc_of_integer_scores():
    video, scores = [0, 0, 0, 1, 1, 1], np.array([250, 0, 100, 7, 9, 8], np.uint8)
    assert frame_roc_auc_score([-1, 1, 1, 1, -1, 1], scores, video) == 1.0
    assert frame_roc_auc_score([-1, 1, 1, 1, -1, 1], 0 * scores, video) == 0.5


def test_frame_roc_auc_refuses_bad_input():
    y_true, scores, video = make_videos(0)
    for arguments in (
        (y_true[1:], scores, video),
        (y_true, scores, video[:-1]),
        (y_true, scores[:, None], video),
        (y_true[:, None], scores[:, None], video[:, None]),
    ):
        with pytest.raises(ValueError, match=r"must have the same shape \(n,\), got"):
            frame_roc_auc_score(*arguments)
    for wrong in (y_true == -1, np.where(y_true == -1, 1, 0), y_true.astype(str)):
        with pytest.raises(ValueError, match=r"\+1 for normal and -1 for anomalous"):
            frame_roc_auc_score(wrong, scores, video)
    with pytest.raises(ValueError, match="contain an anomalous frame"):
        frame_roc_auc_score(np.ones(len(scores)), scores, video)
    with pytest.raises(ValueError, match="contain a normal frame"):
        frame_roc_auc_score(-np.ones(len(scores)), scores, video)
    with pytest.raises(ValueError, match="real numbers, got complex128"):
        frame_roc_auc_score(y_true, scores + 1j, video)
    with pytest.raises(ValueError, match=r"video must hold .* got NaN"):
        frame_roc_auc_score(y_true, scores, np.where(video == "a", np.nan, 1))
    for value in (np.nan, np.inf):
        scores[3] = value
        with pytest.raises(ValueError, match="scores must be finite"):
            frame_roc_auc_score(y_true, scores, video)


# Memory and refusals


@pytest.mark.parametrize("metric", [*METRICS, localization_scores])
def test_memory_is_a_small_multiple_of_the_maps(metric):
    rng = np.random.default_rng(0)
    maps = rng.random((100, 256, 256), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    masks[::2, 50:100, 80:130] = masks[::2, 200:220, 10:30] = True
    tracemalloc.start()
    metric(masks, maps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * maps.nbytes


@pytest.mark.parametrize("metric", [*METRICS, localization_scores])
def test_bad_input_is_refused(metric):
    masks, maps = make_data(0)
    with pytest.raises(ValueError, match=r"same shape, got \(6, 10, 12\) and \(6, 10"):
        metric(masks, maps[:, :, :11])
    with pytest.raises(ValueError, match=r"got int64 with values such as \[-1  1\]"):
        metric(np.where(masks, -1, 1).astype(np.int64), maps)
    with pytest.raises(
        ValueError, match=r"boolean or hold the integers .* got float64"
    ):
        metric(masks.astype(np.float64), maps)
    with pytest.raises(ValueError, match="anomalous pixel, all are normal"):
        metric(np.zeros_like(masks), maps)
    with pytest.raises(ValueError, match="normal pixel, all are anomalous"):
        metric(np.ones_like(masks), maps)
    with pytest.raises(ValueError, match="real numbers, got complex64"):
        metric(masks, maps + 1j)
    for value in (np.nan, np.inf):
        maps[1, 2, 3] = value
        with pytest.raises(ValueError, match="maps must be finite"):
            metric(masks, maps)


@pytest.mark.parametrize("metric", [*PIXEL_METRICS, localization_scores])
def test_pixel_metrics_refuse_single_images(metric):
    masks, maps = make_data(0)
    with pytest.raises(ValueError, match=r"shape \(n, H, W\), got \(10, 12\)"):
        metric(masks[0], maps[0])


@pytest.mark.parametrize("max_fpr", [0, -0.1, 1.1, np.nan])
def test_pro_auc_refuses_a_bad_limit(max_fpr):
    with pytest.raises(ValueError, match=r"max_fpr must lie in \(0, 1\]"):
        pro_auc_score(*make_data(0), max_fpr=max_fpr)


# Scorer


class MeanImage(OutlierMixin, BaseEstimator):
    """Smoothed distance to the mean of the normal training images."""

    n_localized = 0

    def __init__(self, *, sigma=0.0):
        self.sigma = sigma

    def fit(self, X, y=None):
        normal = np.ones(len(X), dtype=bool)
        if y is not None:
            normal = np.asarray(y) == 1 if np.ndim(y) == 1 else ~np.any(y, axis=(1, 2))
        self.mean_ = X[normal].mean(axis=0)
        return self

    def localize(self, X):
        MeanImage.n_localized += len(X)
        return ndimage.gaussian_filter(np.abs(X - self.mean_), (0, *2 * [self.sigma]))


@pytest.fixture
def images():
    """Noisy images X, labels y and masks; every other image has a bright square."""
    rng = np.random.default_rng(0)
    masks = np.zeros((12, 16, 16), dtype=bool)
    masks[::2, 4:9, 6:12] = True
    return rng.normal(size=masks.shape) + 2 * masks, 1 - 2 * masks.any((1, 2)), masks


SIGMAS = [0.0, 1.0, 8.0]
CV = KFold(3)


def scores_by_hand(X, y, masks, metric):
    return [
        np.mean(
            [
                metric(
                    masks[test],
                    MeanImage(sigma=sigma).fit(X[train], y[train]).localize(X[test]),
                )
                for train, test in CV.split(X)
            ]
        )
        for sigma in SIGMAS
    ]


def test_search_with_masks_as_metadata(images):
    X, y, masks = images
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_localization_scorer(pro_auc_score, max_fpr=0.1)
        scorer.set_score_request(masks=True)
        search = GridSearchCV(MeanImage(), {"sigma": SIGMAS}, scoring=scorer, cv=CV)
        search.fit(X, y, masks=masks)
        score = search.score(X, y, masks=masks)
    expected = scores_by_hand(
        X, y, masks, lambda *args: pro_auc_score(*args, max_fpr=0.1)
    )
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected)
    assert search.best_params_ == {"sigma": 1.0}
    assert score == pro_auc_score(
        masks, search.best_estimator_.localize(X), max_fpr=0.1
    )


def test_search_with_masks_as_y(images):
    X, y, masks = images
    search = GridSearchCV(
        MeanImage(),
        {"sigma": SIGMAS},
        scoring=make_localization_scorer(pixel_roc_auc_score),
        cv=CV,
    ).fit(X, masks)
    np.testing.assert_allclose(
        search.cv_results_["mean_test_score"],
        scores_by_hand(X, y, masks, pixel_roc_auc_score),
    )
    assert search.best_params_ == {"sigma": 1.0}


@pytest.mark.parametrize("routing", [True, False])
def test_several_scorers_share_the_maps(images, routing):
    X, y, masks = images
    with sklearn.config_context(enable_metadata_routing=routing):
        scoring = {f.__name__: make_localization_scorer(f) for f in METRICS}
        if routing:
            scoring = {k: s.set_score_request(masks=True) for k, s in scoring.items()}
        search = GridSearchCV(
            MeanImage(), {"sigma": SIGMAS}, scoring=scoring, cv=CV, refit="f1_max"
        )
        MeanImage.n_localized = 0
        if routing:
            search.fit(X, y, masks=masks)
        else:
            search.fit(X, masks)
    assert MeanImage.n_localized == len(SIGMAS) * len(X)
    for metric in METRICS:
        np.testing.assert_allclose(
            search.cv_results_[f"mean_test_{metric.__name__}"],
            scores_by_hand(X, y, masks, metric),
        )


def test_masks_must_be_requested(images):
    X, y, masks = images
    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(
            MeanImage(),
            {"sigma": SIGMAS},
            scoring=make_localization_scorer(pro_auc_score),
        )
        with pytest.raises(ValueError, match="masks"):
            search.fit(X, y, masks=masks)


def test_scorer_needs_masks(images):
    X, y, masks = images
    detector = MeanImage().fit(X, y)
    scorer = make_localization_scorer(pro_auc_score, max_fpr=0.1)
    with pytest.raises(ValueError, match=r"needs masks of shape \(n, H, W\), got none"):
        scorer(detector, X)
    with pytest.raises(ValueError, match=r"got an array of shape \(12,\)"):
        scorer(detector, X, y)
    assert scorer(detector, X, masks) == scorer(detector, X, y, masks=masks)


def test_fold_without_anomalies_gets_the_error_score(images):
    X, y, masks = images
    order = np.argsort(y, kind="stable")  # the six anomalous images first
    scorer = make_localization_scorer(pro_auc_score)
    with pytest.warns(UserWarning, match="must contain an anomalous pixel"):
        scores = cross_val_score(
            MeanImage(),
            X[order],
            masks[order],
            scoring=scorer,
            cv=[(np.arange(6, 12), np.arange(8)), (np.arange(9), np.arange(9, 12))],
        )
    assert np.isfinite(scores[0])
    assert np.isnan(scores[1])


def test_scorer_is_pickled_with_its_request(images):
    X, y, masks = images
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_localization_scorer(pro_auc_score, max_fpr=0.1)
        scorer.set_score_request(masks="ground_truth")
        copy = pickle.loads(pickle.dumps(scorer))
        assert copy.get_metadata_routing().score.requests == {"masks": "ground_truth"}
    detector = MeanImage().fit(X, y)
    assert copy(detector, X, masks=masks) == scorer(detector, X, masks=masks)
    assert repr(copy) == "make_localization_scorer(pro_auc_score, max_fpr=0.1)"
