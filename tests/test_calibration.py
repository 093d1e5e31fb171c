import pickle
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn import pipeline as sklearn_pipeline
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.utils.estimator_checks import check_estimator

from skanomaly import (
    SPADE,
    Autoencoder,
    DeScarGAN,
    LoadImages,
    Pipeline,
    ResizeImages,
    ThresholdCalibrator,
    localize,
    make_pipeline,
)
from skanomaly._fitting.batches import degrees_and_peaks
from skanomaly.base import BaseDetector
from skanomaly.datasets import load_textures
from skanomaly.metrics import (
    anomaly_roc_auc,
    make_localization_scorer,
    pixel_roc_auc_score,
)
from skanomaly.model_selection import OneClassKFold


class Brightness(OutlierMixin, BaseEstimator):
    """Scores rows by their first value; remembers what it was fitted on."""

    def fit(self, X, y=None):
        self.seen_ = np.asarray(X)[:, 0]
        self.labels_ = y
        return self

    def score_samples(self, X):
        return -np.asarray(X, float)[:, 0]


def column(values):
    return np.asarray(values, float)[:, None]


@pytest.mark.parametrize("method", ["cv", "holdout"])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.25])
def test_the_rate_asked_for_is_the_one_that_comes(method, rate):
    """Over many draws the mean rate is floor((n + 1) q) / (n + 1)."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        X, X_new = rng.exponential(size=(2, 200, 1))
        calibrator = ThresholdCalibrator(
            Brightness(), method=method, false_positive_rate=rate
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 40 images do not support 0.02
            calibrator.fit(X)
        n = len(calibrator.calibration_scores_)
        assert n == (200 if method == "cv" else 40)
        rates.append((calibrator.predict(X_new) == -1).mean())
    expected = max(1, np.floor((n + 1) * rate)) / (n + 1)
    spread = np.std(rates) / np.sqrt(len(rates))
    assert abs(np.mean(rates) - expected) < 4 * spread


@pytest.mark.filterwarnings("ignore:.*are copies of others")
@pytest.mark.parametrize("method", ["cv", "holdout", "loo"])
def test_the_rate_holds_on_held_out_images(method, small):
    X = load_textures(texture="grass", n_train=120, n_test=2, size=32).X_train
    assert len(X) >= 100
    rng = np.random.default_rng(0)
    rates, naive = [], []
    for _ in range(3):
        rows = rng.permutation(len(X))
        train, test = rows[: len(X) // 2], rows[len(X) // 2 :]
        detector = small(SPADE, n_neighbors=2, gallery_size=0, contamination=0.1)
        calibrator = ThresholdCalibrator(
            detector, method=method, false_positive_rate=0.1
        ).fit(X[train])
        rates.append((calibrator.predict(X[test]) == -1).mean())
        scores = calibrator.estimator_.score_samples(X[train])
        limit = np.percentile(scores, 10)
        naive.append((calibrator.score_samples(X[test]) < limit).mean())
    assert 0.02 < np.mean(rates) < 0.2
    # thresholds from the training's own scores promise the same rate
    assert np.mean(naive) > 0.22


def test_p_values_are_uniform_on_normal_images_and_small_on_others():
    rng = np.random.default_rng(0)
    calibrator = ThresholdCalibrator(Brightness(), false_positive_rate=0.05)
    p = []
    for _ in range(30):
        calibrator.fit(rng.exponential(size=(400, 1)))
        p.append(calibrator.p_values(rng.exponential(size=(400, 1))))
    assert 0 < np.min(p) <= np.max(p) <= 1
    for level in (0.05, 0.2, 0.5, 0.9):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=0.02)
    assert calibrator.p_values(column([99.0])) == pytest.approx([1 / 401])
    # one and the same decision
    X = rng.exponential(size=(2000, 1))
    expected = calibrator.p_values(X) <= 0.05
    np.testing.assert_array_equal(calibrator.predict(X) == -1, expected)


def test_folds_are_trained_without_what_they_score():
    seen = []

    class Recorder(Brightness):
        def score_samples(self, X):
            seen.append((set(self.seen_), set(np.asarray(X)[:, 0])))
            return super().score_samples(X)

    X = column(np.arange(20))
    calibrator = ThresholdCalibrator(Recorder(), false_positive_rate=0.2).fit(X)
    assert len(seen) == 5
    assert all(not trained & scored for trained, scored in seen)
    assert set.union(*(scored for _, scored in seen)) == set(range(20))
    assert set(calibrator.estimator_.seen_) == set(range(20))
    seen.clear()
    holdout = clone(calibrator).set_params(method="holdout", cv=KFold(4)).fit(X)
    assert seen == [(set(range(5, 20)), set(range(5)))]
    assert set(holdout.estimator_.seen_) == set(range(5, 20))


def test_anomalies_take_no_part():
    X, y = column(np.arange(30)), np.ones(30, int)
    y[[3, 17]] = -1
    calibrator = ThresholdCalibrator(Brightness(), false_positive_rate=0.2).fit(X, y)
    assert len(calibrator.calibration_scores_) == 28
    assert not {3, 17} & set(calibrator.estimator_.seen_)
    with pytest.raises(ValueError, match=r"labels must be.*labels_from"):
        calibrator.fit(X, np.arange(30))


def test_too_few_images_warn_with_the_rate_to_expect():
    X = column(np.arange(20))
    with pytest.warns(UserWarning, match=r"0\.01.* 99 or more.*rate of 0\.0476"):
        calibrator = ThresholdCalibrator(Brightness()).fit(X)
    assert calibrator.offset_ == -19
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ThresholdCalibrator(Brightness(), false_positive_rate=1 / 21).fit(X)


def noisy(n, size=24, seed=0):
    rng = np.random.default_rng(seed)
    wave = 128 + 60 * np.sin(np.arange(size) * np.pi / 4)[:, None, None]
    return (wave + rng.normal(0, 8, (n, size, size, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("image_score", ["knn", "max"])
def test_leaving_one_out_equals_fits_without_one(image_score, small):
    X = noisy(8)
    detector = small(SPADE, n_neighbors=2, gallery_size=3, image_score=image_score)
    exact = ThresholdCalibrator(detector, method="loo", false_positive_rate=0.2).fit(X)
    slow = ThresholdCalibrator(detector, cv=KFold(8), false_positive_rate=0.2).fit(X)
    np.testing.assert_allclose(
        exact.calibration_scores_, slow.calibration_scores_, rtol=1e-4, atol=1e-5
    )
    assert exact.map_threshold_ == pytest.approx(slow.map_threshold_, rel=1e-4)
    with pytest.raises(ValueError, match=r"method='loo'.*Autoencoder"):
        ThresholdCalibrator(Autoencoder(), method="loo").fit(X)


def test_around_a_pipeline(small):
    X, defective = noisy(24, size=40), noisy(3, size=40, seed=1)
    defective[:, 10:25, 10:25] = 0
    detector = small(SPADE, n_neighbors=2, gallery_size=3)
    pipeline = make_pipeline(ResizeImages(size=20), detector)
    calibrator = ThresholdCalibrator(pipeline, false_positive_rate=0.1).fit(X)
    assert isinstance(calibrator.estimator_, Pipeline)
    assert (calibrator.predict(defective) == -1).all()
    maps, marked = calibrator.localize(defective), calibrator.segment(defective)
    assert maps.shape == marked.shape == (3, 40, 40)
    assert marked[:, 14:20, 14:20].all()
    np.testing.assert_array_equal(maps, calibrator.estimator_.localize(defective))
    np.testing.assert_array_equal(
        calibrator.estimator_.predict(defective), calibrator.predict(defective)
    )
    assert calibrator.segment(noisy(30, 40, seed=2)).any(axis=(1, 2)).mean() < 0.4
    # and inside of one
    inside = make_pipeline(ResizeImages(size=20), ThresholdCalibrator(detector, cv=3))
    with pytest.warns(UserWarning, match="cannot support"):
        inside.fit(X)
    np.testing.assert_array_equal(inside.localize(defective), maps)
    loaded = pickle.loads(pickle.dumps(calibrator))
    np.testing.assert_array_equal(loaded.segment(defective), marked)


def test_a_pipeline_of_scikit_learn_has_maps(small):
    X = noisy(24, size=40)
    steps = [("size", ResizeImages(size=20)), ("detector", small(SPADE))]
    ours = ThresholdCalibrator(Pipeline(steps), false_positive_rate=0.1).fit(X)
    plain = ThresholdCalibrator(
        sklearn_pipeline.Pipeline(steps), false_positive_rate=0.1
    ).fit(X)
    assert plain.map_threshold_ == ours.map_threshold_
    np.testing.assert_array_equal(plain.localize(X[:3]), ours.localize(X[:3]))
    np.testing.assert_array_equal(plain.segment(X[:3]), ours.segment(X[:3]))


def test_the_rate_of_false_alarms_in_maps_holds(small):
    """On average over new images, as that of the scores does."""
    rates = []
    for seed in range(8):
        detector = small(SPADE, n_neighbors=2, gallery_size=3)
        calibrator = ThresholdCalibrator(
            detector, method="holdout", cv=2, false_positive_rate=0.2
        ).fit(noisy(58, seed=seed))
        maps = calibrator.localize(noisy(50, seed=100 + seed))
        rates.append((maps.max(axis=(1, 2)) > calibrator.map_threshold_).mean())
    assert 0.12 < np.mean(rates) < 0.28


def test_a_checkpoint_belongs_to_one_fit(tmp_path):
    detector = Autoencoder(max_epochs=1, checkpoint=tmp_path / "progress")
    with pytest.raises(ValueError, match=r"checkpoint=.*method='holdout'"):
        ThresholdCalibrator(detector).fit(noisy(12))


def test_in_a_search(small):
    X, defective = noisy(18), noisy(6, seed=1)
    defective[:, 8:16, 8:16] = 255 - defective[:, 8:16, 8:16]
    y = np.r_[np.ones(18, int), -np.ones(6, int)]
    X = np.concatenate([X, defective])
    masks = np.zeros(X.shape[:3], bool)
    masks[18:, 8:16, 8:16] = True
    search = GridSearchCV(
        ThresholdCalibrator(
            small(SPADE, gallery_size=2), false_positive_rate=0.2, cv=2
        ),
        {"estimator__n_neighbors": [1, 3]},
        scoring=anomaly_roc_auc,
        cv=OneClassKFold(2),
    ).fit(X, y)
    assert search.best_score_ > 0.8
    np.testing.assert_array_equal(
        localize(search, X), search.best_estimator_.localize(X)
    )
    by_map = GridSearchCV(
        ThresholdCalibrator(
            small(SPADE, gallery_size=2), false_positive_rate=0.2, cv=2
        ),
        {"estimator__n_neighbors": [1, 3]},
        scoring=make_localization_scorer(pixel_roc_auc_score),
        cv=OneClassKFold(2),
    ).fit(X, masks)
    assert by_map.best_score_ > 0.8


def test_a_detector_that_needs_labels_gets_them(small):
    X = noisy(16)[..., :1]
    y = np.where(np.arange(16) % 2, -1, 1)
    detector = small(DeScarGAN, width=2, critic_width=2)
    calibrator = ThresholdCalibrator(detector, cv=2, false_positive_rate=0.2).fit(X, y)
    assert len(calibrator.calibration_scores_) == 8
    expected = calibrator.localize(X) > calibrator.map_threshold_
    expected[calibrator.predict(X) == 1] = False
    np.testing.assert_array_equal(calibrator.segment(X), expected)


def test_without_maps():
    calibrator = ThresholdCalibrator(
        IsolationForest(random_state=0), false_positive_rate=0.2
    ).fit(column(np.arange(20)))
    assert not hasattr(calibrator, "map_threshold_")
    assert not hasattr(calibrator, "localize")
    with pytest.raises(TypeError, match="IsolationForest has no maps"):
        localize(IsolationForest(), column(np.arange(3)))


def test_localize_finds_the_detector(small):
    X = noisy(6)
    detector = small(SPADE, gallery_size=2, n_neighbors=1).fit(X)
    expected = detector.localize(X)
    np.testing.assert_array_equal(localize(detector, X), expected)
    pipeline = sklearn_pipeline.make_pipeline(ResizeImages(size=24), detector).fit(X)
    np.testing.assert_allclose(localize(pipeline, X), expected, rtol=1e-5)
    with pytest.raises(TypeError, match="Pipeline has no maps"):
        localize(sklearn_pipeline.make_pipeline(ResizeImages(size=24)), X)


class CalibratorWithoutLabels(ThresholdCalibrator):
    """Does without the class labels that scikit-learn's checks make up."""

    def fit(self, X, y=None, **fit_params):
        return super().fit(X, None, **fit_params)


@pytest.mark.filterwarnings("ignore:.*cannot support", "ignore:.*are copies of others")
def test_sklearn_checks():
    calibrator = CalibratorWithoutLabels(
        IsolationForest(n_estimators=5, random_state=0), cv=2, false_positive_rate=0.3
    )
    check_estimator(calibrator, on_skip=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bootstrap"}, "'method'"),
        ({"false_positive_rate": 0.0}, "'false_positive_rate'"),
        ({"cv": 1}, "'cv'"),
        ({"target": "pixel"}, "'target'"),
        ({"target": "map"}, "target='map' counts.*Brightness is no detector"),
        ({"estimator": 3}, "'estimator'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    calibrator = ThresholdCalibrator(Brightness()).set_params(**settings)
    with pytest.raises(ValueError, match=message):
        calibrator.fit(column(np.arange(20)))


def test_a_frozen_detector_is_calibrated_and_not_changed(small):
    X = np.random.default_rng(0).random((40, 32, 32, 3)).astype(np.float32)
    detector = small("Autoencoder").fit(X[:20])
    before = pickle.dumps(detector)
    calibrator = ThresholdCalibrator(
        FrozenEstimator(detector), method="holdout", false_positive_rate=0.3, cv=2
    ).fit(X[20:])
    assert pickle.dumps(detector) == before
    assert calibrator.offset_ != detector.offset_
    np.testing.assert_array_equal(
        calibrator.score_samples(X), detector.score_samples(X)
    )
    marked = calibrator.segment(X).any(axis=(1, 2))
    high = detector.localize(X).max(axis=(1, 2)) > calibrator.map_threshold_
    np.testing.assert_array_equal(marked, high & (calibrator.predict(X) == -1))


@pytest.mark.filterwarnings("ignore:.*are copies of others")
@pytest.mark.parametrize("method", ["loo", "cv", "holdout"])
def test_copies_stay_together(method, tmp_path):
    """With each image twice the thresholds are those of each image once."""
    X = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    detector = SPADE(
        backbone="resnet18", weights=None, gallery_size=0, n_neighbors=1, random_state=0
    )
    settings = {"method": method, "false_positive_rate": 0.2, "cv": 4}
    once = ThresholdCalibrator(detector, **settings).fit(X)
    twice = ThresholdCalibrator(detector, **settings).fit(np.concatenate([X, X]))
    np.testing.assert_allclose(
        twice.calibration_scores_, once.calibration_scores_, rtol=1e-5
    )
    paths = [tmp_path / f"{number}.png" for number in range(48)]
    for path, image in zip(paths, np.concatenate([X, X]), strict=True):
        Image.fromarray(image).save(path)
    if method == "cv":
        by_path = ThresholdCalibrator(make_pipeline(LoadImages(), detector), **settings)
        for given in (paths, np.array(paths)[:, None]):
            scores = by_path.fit(given).calibration_scores_
            np.testing.assert_allclose(scores, once.calibration_scores_, rtol=1e-5)


def test_copies_are_counted():
    X = column(np.repeat(np.arange(30), 2))
    calibrator = ThresholdCalibrator(Brightness(), false_positive_rate=0.2)
    with pytest.warns(UserWarning, match="30 of the 60 training images are copies"):
        calibrator.fit(X)
    assert len(calibrator.calibration_scores_) == 30


def test_frozen_detectors_are_not_left_out_one_by_one():
    X = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    detector = SPADE(backbone="resnet18", weights=None, gallery_size=0).fit(X[:6])
    before = detector.offset_
    for frozen in (
        FrozenEstimator(detector),
        make_pipeline(ResizeImages(size=16), FrozenEstimator(detector)),
    ):
        with pytest.raises(ValueError, match=r"method='loo'.*FrozenEstimator"):
            ThresholdCalibrator(frozen, method="loo").fit(X[6:])
    assert detector.offset_ == before


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_a_splitter_of_ones_own_keeps_copies_together():
    X = column(np.repeat(np.arange(30), 2))
    calibrator = ThresholdCalibrator(Brightness(), false_positive_rate=0.2, cv=KFold(6))
    assert len(calibrator.fit(X).calibration_scores_) == 30


class Brightest(BaseDetector):
    """Its map is the image, its degree the brightest pixel."""

    image_shape, batch_size, precision, device = None, 7, "float32", "cpu"
    verbose, random_state = 0, 0

    def __init__(self, *, contamination=0.5):
        self.contamination = contamination

    def _fit(self, images, labels):
        self._begin_anew()
        return degrees_and_peaks(self._evaluate(images, maps_wanted=True))

    def _judge(self, images, *, maps_wanted, generator):
        maps = images.mean(dim=1)
        return maps.amax(dim=(1, 2)), maps


@pytest.fixture
def brightest():
    return Brightest().fit(np.random.default_rng(1).random((9, 4, 5, 1)))


@pytest.mark.parametrize("method", ["prefit", "cv", "holdout"])
def test_the_rate_of_marked_pixels_holds(method, brightest):
    """Over many draws the mean share of marked pixels is the one asked for."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(60):
        # images of one lamp each: their pixels depend on each other
        X, X_new = rng.random((2, 100, 1, 1, 1)) ** 4 * rng.random((2, 100, 4, 5, 1))
        calibrator = ThresholdCalibrator(
            brightest, method=method, target="map", false_positive_rate=0.1
        ).fit(X)
        masks = calibrator.segment(X_new)
        shares.append(masks.mean())
        np.testing.assert_array_equal(
            masks.any(axis=(1, 2)),
            calibrator.localize(X_new).max(axis=(1, 2)) > calibrator.map_threshold_,
        )
    spread = np.std(shares) / np.sqrt(len(shares))
    n = 20 if method == "holdout" else 100
    # no more than asked for, and no less than what a whole image could add
    assert 0.1 - 1 / n - 4 * spread < np.mean(shares) < 0.1 + 4 * spread


def test_marked_pixels_and_anomalous_images_go_together(brightest):
    """The threshold equals that of a slow count over all held-out pixels."""
    X = np.random.default_rng(0).random((30, 4, 5, 1))
    calibrator = ThresholdCalibrator(
        brightest, method="prefit", target="map", false_positive_rate=0.1
    ).fit(X)
    maps = brightest.localize(X)
    most = 31 * 0.1 - 1  # images' worth of pixels
    fits = [t for t in np.unique(maps) if (maps > t).mean(axis=(1, 2)).sum() <= most]
    assert calibrator.map_threshold_ == min(fits)
    marked = (maps > min(fits)).any(axis=(1, 2))
    np.testing.assert_array_equal(calibrator.predict(X) == -1, marked)
    np.testing.assert_array_equal(calibrator.segment(X), maps > min(fits))


def test_every_image_may_have_a_marked_pixel(brightest):
    X = np.random.default_rng(0).random((30, 4, 5, 1))
    calibrator = ThresholdCalibrator(
        brightest, method="prefit", target="map", false_positive_rate=0.5
    ).fit(X)
    assert (calibrator.predict(X) == -1).all()
    assert calibrator.segment(X).mean() == pytest.approx(0.5, abs=0.02)
    assert np.isfinite(calibrator.decision_function(X)).all()


def test_a_rate_of_pixels_needs_whole_maps(small):
    X = noisy(12)
    settings = {"target": "map", "false_positive_rate": 0.3}
    with pytest.raises(ValueError, match="only their maxima: take 'cv'"):
        ThresholdCalibrator(small(SPADE), method="loo", **settings).fit(X)
    with pytest.raises(ValueError, match=r"counts the pixels.*gallery_size=0"):
        ThresholdCalibrator(small(SPADE, gallery_size=0), **settings).fit(X)


def anomaly_free_score(estimator, X, y=None):
    return estimator.score_samples(X).mean()


def fitted_things(small, X, tmp_path):
    """Yield fitted estimators, and what they take for X."""
    detector = small(SPADE, gallery_size=2, n_neighbors=1, random_state=0)
    yield clone(detector).fit(X), X
    yield FrozenEstimator(clone(detector).fit(X)), X
    yield make_pipeline(ResizeImages(size=24), clone(detector)).fit(X), X
    pipeline = sklearn_pipeline.make_pipeline(ResizeImages(size=24), clone(detector))
    yield pipeline.fit(X), X
    search = GridSearchCV(
        clone(detector), {"n_neighbors": [1]}, cv=2, scoring=anomaly_free_score
    )
    yield search.fit(X), X
    yield (
        ThresholdCalibrator(clone(detector), cv=2, false_positive_rate=0.4).fit(X),
        X,
    )
    paths = [tmp_path / f"{number}.png" for number in range(len(X))]
    for path, image in zip(paths, X, strict=True):
        Image.fromarray(image).save(path)
    yield make_pipeline(LoadImages(), clone(detector)).fit(paths), paths


def test_settings_since_the_fit_are_calibrated(small):
    X = noisy(16)
    detector = small(SPADE).fit(X[:8]).set_params(sigma=1.0)
    calibrator = ThresholdCalibrator(
        detector, method="prefit", false_positive_rate=0.25
    ).fit(X[8:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrator.inspect(X)
    with pytest.warns(UserWarning, match=r"sigma=1\.0 .* set after fit"):
        detector.inspect(X)
    calibrator.estimator_.sigma = 3.0
    with pytest.warns(UserWarning, match=r"sigma=3\.0 \(in fit 1\.0\)"):
        calibrator.inspect(X)


@pytest.mark.filterwarnings("ignore:.*cannot support")
def test_what_is_fitted_is_calibrated_without_a_fit(small, tmp_path):
    X = noisy(16)
    for estimator, given in fitted_things(small, X, tmp_path):
        before = pickle.dumps(estimator)
        calibrator = ThresholdCalibrator(
            estimator, method="prefit", false_positive_rate=0.25
        ).fit(given)
        assert pickle.dumps(estimator) == before
        scores = estimator.score_samples(given)
        np.testing.assert_array_equal(calibrator.calibration_scores_, np.sort(scores))
        assert calibrator.offset_ == np.sort(scores)[3]  # k = 17 / 4
        maps = localize(calibrator, given)
        assert calibrator.map_threshold_ == np.sort(maps.max(axis=(1, 2)))[-4]
        report = calibrator.inspect(given)
        np.testing.assert_array_equal(report.labels, calibrator.predict(given))
        np.testing.assert_array_equal(report.masks, calibrator.segment(given))
        marked = (maps > calibrator.map_threshold_).any(axis=(1, 2))
        np.testing.assert_array_equal(
            report.masks.any(axis=(1, 2)), marked & (report.labels == -1)
        )
        loaded = pickle.loads(pickle.dumps(calibrator))
        np.testing.assert_array_equal(loaded.segment(given), report.masks)


@pytest.mark.parametrize("method", ["cv", "holdout", "prefit"])
def test_a_frozen_detector_scores_all_images(method, brightest):
    X = np.random.default_rng(0).random((30, 4, 5, 1))
    frozen = FrozenEstimator(brightest)
    calibrator = ThresholdCalibrator(frozen, method=method, false_positive_rate=0.1)
    assert len(calibrator.fit(X).calibration_scores_) == 30


def test_prefit_wants_a_fitted_detector(small):
    for estimator in (small(SPADE), make_pipeline(ResizeImages(size=24), small(SPADE))):
        with pytest.raises(NotFittedError, match=r"not fitted yet, but.*prefit"):
            ThresholdCalibrator(estimator, method="prefit").fit(noisy(6))


def test_prefit_takes_no_arguments_of_a_fit(brightest):
    X = np.random.default_rng(0).random((9, 4, 5, 1))
    with pytest.raises(TypeError, match=r"^structure_images: what is fitted already"):
        ThresholdCalibrator(brightest, method="prefit").fit(X, structure_images=X)


@pytest.mark.parametrize("method", ["prefit", "cv", "holdout"])
def test_anomalous_images_alone_set_no_threshold(method, brightest):
    X = np.random.default_rng(0).random((9, 4, 5, 1))
    with pytest.raises(ValueError, match="y calls no image normal"):
        ThresholdCalibrator(brightest, method=method).fit(X, -np.ones(9))


def test_folds_in_processes_give_the_same(small, capsys):
    X = noisy(12)
    detector = small("Autoencoder", random_state=0)
    found = [
        ThresholdCalibrator(
            detector, cv=3, false_positive_rate=0.2, n_jobs=n_jobs, verbose=verbose
        ).fit(X)
        for n_jobs, verbose in ((None, 0), (2, 1))
    ]
    one, two = (calibrator.calibration_scores_ for calibrator in found)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert found[0].map_threshold_ == pytest.approx(found[1].map_threshold_, rel=1e-5)
    assert "4/4" in capsys.readouterr().err  # three folds and all images


def test_a_search_is_given_the_anomalies_it_scores_by(small):
    X = noisy(20)
    y = np.repeat([1, -1], [14, 6])
    search = GridSearchCV(
        small(SPADE, random_state=0),
        {"n_neighbors": [1, 2]},
        scoring=anomaly_roc_auc,
        cv=OneClassKFold(2),
        error_score="raise",
    )
    calibrator = ThresholdCalibrator(search, cv=2, false_positive_rate=0.2).fit(X, y)
    assert len(calibrator.calibration_scores_) == 14
    assert np.isfinite(calibrator.estimator_.best_score_)
    assert calibrator.localize(X[:1]).shape == (1, 24, 24)
    assert calibrator.inspect(X[:1]).p_values.shape == (1,)
