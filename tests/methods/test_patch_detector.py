"""Tests of PatchDetector with the estimators that it takes and those it refuses."""

import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin, clone
from sklearn.cluster import DBSCAN, FeatureAgglomeration, MiniBatchKMeans
from sklearn.covariance import EllipticEnvelope
from sklearn.decomposition import NMF, PCA, IncrementalPCA, KernelPCA
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LinearRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, ParameterGrid
from sklearn.neighbors import KernelDensity, LocalOutlierFactor, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, OneClassSVM

from skanomaly import BackboneFeatures, PatchCore, PatchDetector
from skanomaly._tensors.moments import Moments
from skanomaly.backbones import Backbone
from skanomaly.datasets import load_mvtec, load_textures
from skanomaly.metrics import make_localization_scorer, pixel_roc_auc_score
from skanomaly.model_selection import OneClassKFold

SMALL = {
    "PatchDetector": {
        "backbone": "shufflenet_v2_x0_5",
        "layers": ("stage2",),
        "weights": None,
    }
}

OTHERS = (
    "asks for thresholds from the training images' own scores; they come from PCAs of "
    "the other images. On MVTec AD's toothbrush at 256 pixels, limits from their own "
    "call 9 of 12 normal test images anomalous, those from the others none"
)
EXPECTED_FAILURES = {
    "PatchDetector": {
        "check_outliers_train": OTHERS,
        "check_outliers_fit_predict": OTHERS,
    }
}

NETWORK = {"backbone": "resnet18", "weights": None, "random_state": 0}


@pytest.fixture(scope="module")
def textures():
    return load_textures(n_train=12, n_test=10, size=64, random_state=1)


@pytest.fixture(scope="module")
def rows(textures):
    """Return the features of the patches of training and test images, made slowly."""
    return [slow_patches(X) for X in (textures.X_train, textures.X_test)]


def slow_patches(X):
    """Return patches (n, rows, columns, d), averaged one after the other."""
    features = BackboneFeatures(layers=("layer2", "layer3"), **NETWORK).fit_transform(X)
    parts = []
    for layer in features.dtype.names:
        maps = np.pad(features[layer], ((0, 0), (1, 1), (1, 1), (0, 0)))
        n, height, width, channels = features[layer].shape
        means = np.empty((n, height, width, channels), np.float32)
        for i in range(height):
            for j in range(width):
                means[:, i, j] = maps[:, i : i + 3, j : j + 3].mean(axis=(1, 2))
        tensor = torch.from_numpy(means).permute(0, 3, 1, 2)
        tensor = torch.nn.functional.interpolate(tensor, (8, 8), mode="bilinear")
        parts.append(tensor.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts, axis=3)


# what estimators say


@pytest.mark.parametrize("n_components", [5, 0.9])
def test_pca_equals_its_own_residual(textures, rows, n_components):
    detector = PatchDetector(PCA(n_components), max_patches=None, **NETWORK)
    detector.fit(textures.X_train)
    train, test = (part.reshape(-1, part.shape[-1]) for part in rows)
    pca = PCA(n_components, random_state=0).fit(train)
    residuals = np.square(test - pca.inverse_transform(pca.transform(test))).sum(axis=1)
    expected = residuals.reshape(len(textures.X_test), -1).max(axis=1)
    assert_allclose(-detector.score_samples(textures.X_test), expected, rtol=1e-4)


def test_default_is_a_pca_of_all_patches(textures, rows):
    detector = PatchDetector(**NETWORK).fit(textures.X_train)
    train, test = (part.reshape(-1, part.shape[-1]).astype(float) for part in rows)
    pca = PCA(0.99, svd_solver="full").fit(train)
    own = detector.estimator_
    assert own.n_components_ == pca.n_components_
    for name in (
        *("mean_", "explained_variance_", "explained_variance_ratio_"),
        *("singular_values_", "noise_variance_"),
    ):
        assert_allclose(getattr(own, name), getattr(pca, name), rtol=1e-3, atol=1e-6)
    residuals = np.square(test - pca.inverse_transform(pca.transform(test))).sum(axis=1)
    expected = residuals.reshape(len(textures.X_test), -1).max(axis=1)
    assert_allclose(-detector.score_samples(textures.X_test), expected, rtol=1e-3)
    assert_allclose(
        own.transform(test[:9]) ** 2, pca.transform(test[:9]) ** 2, rtol=1e-2, atol=1e-4
    )


RULES = {
    "IsolationForest": (IsolationForest(n_estimators=9), "score_samples"),
    "LocalOutlierFactor": (LocalOutlierFactor(novelty=True), "score_samples"),
    "OneClassSVM": (OneClassSVM(), "score_samples"),
    "GaussianMixture": (GaussianMixture(2, covariance_type="diag"), "score_samples"),
    "EllipticEnvelope": (
        make_pipeline(PCA(4, random_state=0), EllipticEnvelope(random_state=0)),
        "score_samples",
    ),
    "KernelDensity": (KernelDensity(bandwidth=3.0), "score_samples"),
    "Pipeline": (make_pipeline(PCA(9), OneClassSVM()), "score_samples"),
}


@pytest.mark.parametrize("name", RULES)
def test_values_are_what_an_estimator_says(textures, rows, name):
    estimator, method = RULES[name]
    detector = PatchDetector(estimator, max_patches=None, **NETWORK)
    detector.fit(textures.X_train)
    test = rows[1].reshape(-1, rows[1].shape[-1])
    said = -getattr(detector.estimator_, method)(test)
    expected = said.reshape(len(textures.X_test), -1).max(axis=1)
    found = -detector.score_samples(textures.X_test)
    assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert not hasattr(estimator, "n_features_in_")


def test_neighbors_and_centers_count_by_distance(textures, rows):
    train, test = (part.reshape(-1, part.shape[-1]) for part in rows)
    n = len(textures.X_test)
    detector = PatchDetector(NearestNeighbors(n_neighbors=2), **NETWORK)
    found = -detector.fit(textures.X_train).score_samples(textures.X_test)
    expected = NearestNeighbors(n_neighbors=2).fit(train).kneighbors(test)[0]
    expected = expected.mean(axis=1).reshape(n, -1).max(axis=1)
    assert_allclose(found, expected, rtol=1e-4)

    detector = PatchDetector(MiniBatchKMeans(5, n_init=1), **NETWORK)
    found = -detector.fit(textures.X_train).score_samples(textures.X_test)
    centers = detector.estimator_.cluster_centers_
    distances = np.linalg.norm(test[:, None] - centers, axis=2).min(axis=1)
    assert_allclose(found, distances.reshape(n, -1).max(axis=1), rtol=1e-4)


def test_all_neighbors_are_those_of_patchcore(textures):
    nearest = PatchDetector(
        NearestNeighbors(n_neighbors=1), max_patches=None, **NETWORK
    ).fit(textures.X_train)
    core = PatchCore(coreset=1.0, **NETWORK).fit(textures.X_train)
    assert_allclose(
        nearest.localize(textures.X_test),
        core.localize(textures.X_test),
        rtol=1e-4,
        atol=1e-5,
    )


class OfPyOD(BaseEstimator):
    """Looks like an estimator of PyOD, whose decisions are high where anomalous."""

    def fit(self, X, y=None):
        self.center_ = X.mean(axis=0)
        self.decision_scores_ = self.decision_function(X)
        return self

    def decision_function(self, X):
        return np.linalg.norm(X - self.center_, axis=1)


class Deciding(OutlierMixin, BaseEstimator):
    """Has nothing but decisions, low where anomalous."""

    def fit(self, X, y=None):
        self.center_ = X.mean(axis=0)
        return self

    def decision_function(self, X):
        return 1 - np.linalg.norm(X - self.center_, axis=1)


class PassedThrough(TransformerMixin, BaseEstimator):
    """Changes nothing, and cannot be inverted."""

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X


def test_decisions_count_with_their_sign(textures):
    far = PatchDetector(OfPyOD(), **NETWORK).fit(textures.X_train)
    low = PatchDetector(Deciding(), **NETWORK).fit(textures.X_train)
    found = far.score_samples(textures.X_test)
    assert_allclose(found, low.score_samples(textures.X_test) - 1, rtol=1e-5)
    assert (found < 0).all()
    within = PatchDetector(make_pipeline(PassedThrough(), OfPyOD()), **NETWORK)
    within.fit(textures.X_train)
    assert_allclose(within.score_samples(textures.X_test), found, rtol=1e-5)


@pytest.mark.parametrize(
    "estimator, message",
    [
        (DBSCAN(), "DBSCAN has none of the methods inverse_transform, score_samples"),
        (LocalOutlierFactor(), "set novelty=True"),
        (make_pipeline(PCA(3), LocalOutlierFactor()), "set novelty=True"),
        (KernelPCA(3), "set fit_inverse_transform=True"),
        (SVC(), "SVC learns from labels"),
        (LinearRegression(), "LinearRegression learns from labels"),
        (make_pipeline(StandardScaler(), DBSCAN()), "Pipeline has none of the methods"),
    ],
    ids=[
        *("none", "novelty", "novelty in a pipeline", "kernel", "classifier"),
        *("regressor", "pipeline"),
    ],
)
def test_estimators_that_cannot_tell_are_refused(estimator, message, textures):
    detector = PatchDetector(estimator, weights="nowhere.pth", random_state=0)
    with pytest.raises(ValueError, match=rf"estimator=.*{message}"):
        detector.fit(textures.X_train)


@pytest.mark.parametrize("estimator", [StandardScaler(), PCA()])
def test_estimators_that_lose_nothing_are_refused(estimator, textures):
    detector = PatchDetector(estimator, **NETWORK)
    with pytest.raises(ValueError, match=r"gives back all patches as they are"):
        detector.fit(textures.X_train)


@pytest.mark.parametrize(
    "estimator",
    [NMF(3, tol=0.1), KernelPCA(3, kernel="rbf", fit_inverse_transform=True)],
)
def test_residuals_of_other_decompositions(estimator, textures):
    detector = PatchDetector(estimator, max_patches=150, **NETWORK)
    if isinstance(estimator, NMF):
        X = textures.X_train[:3]
        detector.set_params(layers=("layer2",), patch_size=1).fit(X)
    else:
        detector.fit(textures.X_train[:3])
    maps = detector.localize(textures.X_test)
    assert (maps >= 0).all()
    assert maps.std() > 0


def test_clusters_that_can_be_undone_count_by_residual(textures, rows):
    detector = PatchDetector(FeatureAgglomeration(8), max_patches=None, **NETWORK)
    detector.fit(textures.X_train)
    estimator, test = detector.estimator_, rows[1].reshape(-1, rows[1].shape[-1])
    residuals = test - estimator.inverse_transform(estimator.transform(test))
    expected = np.square(residuals).sum(axis=1).reshape(len(textures.X_test), -1)
    found = -detector.score_samples(textures.X_test)
    assert_allclose(found, expected.max(axis=1), rtol=1e-4)


class Answering(Deciding):
    """Answers what it is told to."""

    def __init__(self, answer):
        self.answer = answer

    def decision_function(self, X):
        return np.full((len(X), 2), 0.5) if self.answer == "two" else X[:, 0] * np.nan


@pytest.mark.parametrize(
    "answer, message", [("two", r"of shape \(512, 2\)"), ("nan", "NaN or infinity")]
)
def test_wrong_answers_are_refused(answer, message, textures):
    detector = PatchDetector(Answering(answer), **NETWORK)
    with pytest.raises(ValueError, match=f"estimator=Answering.*{message}"):
        detector.fit(textures.X_train)


def test_even_patches_are_refused(textures):
    with pytest.raises(ValueError, match=r"patch_size=4 must be odd"):
        PatchDetector(patch_size=4, **NETWORK).fit(textures.X_train)


def test_other_backbones_want_layers(textures):
    detector = PatchDetector(backbone="vgg11_bn", weights=None)
    with pytest.raises(ValueError, match=r"layers=None: backbone='vgg11_bn' has no"):
        detector.fit(textures.X_train)


# seeds, scores and thresholds


def test_estimators_without_a_seed_get_ours(textures):
    forest = IsolationForest(n_estimators=5)
    seeded = clone(forest).set_params(random_state=3)
    detectors = [
        PatchDetector(estimator, max_patches=100, **NETWORK).fit(textures.X_train)
        for estimator in (forest, forest, seeded)
    ]
    scores = [detector.score_samples(textures.X_test) for detector in detectors]
    assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()
    assert detectors[2].estimator_.random_state == 3
    assert forest.random_state is None


def test_patches_are_drawn_without_replacement(textures):
    class Remembering(Deciding):
        def fit(self, X, y=None):
            self.rows_ = X
            return super().fit(X)

    detector = PatchDetector(Remembering(), max_patches=300, **NETWORK)
    rows = detector.fit(textures.X_train).estimator_.rows_
    assert rows.shape == (300, 384)
    assert len(np.unique(rows, axis=0)) == 300


def test_top_score_is_the_mean_of_the_highest(textures):
    detector = PatchDetector(image_score="top", **NETWORK).fit(textures.X_train)
    maps = detector.localize(textures.X_test)  # 64 x 64
    expected = np.sort(maps.reshape(len(maps), -1))[:, -41:].mean(axis=1)
    assert_allclose(-detector.score_samples(textures.X_test), expected, rtol=1e-5)


def test_precomputed_features_give_the_same_scores(textures):
    features = BackboneFeatures(layers=("layer2", "layer3"), **NETWORK)
    given = PatchDetector(backbone="precomputed")
    given.fit(features.fit_transform(textures.X_train))
    own = PatchDetector(**NETWORK).fit(textures.X_train)
    assert_allclose(
        given.score_samples(features.transform(textures.X_test)),
        own.score_samples(textures.X_test),
        rtol=1e-4,
    )


def test_thresholds_are_those_of_images_not_seen(textures):
    # as many directions as there are patches: each image's own would explain it
    detector = PatchDetector(contamination=0.1, **NETWORK).fit(textures.X_train)
    own = -detector.score_samples(textures.X_train)
    assert -detector.offset_ > np.quantile(own, 0.9)
    fresh = load_textures(n_train=40, n_test=2, size=64, random_state=2).X_train
    assert (detector.predict(fresh) == -1).mean() < 0.4


def test_a_planted_patch_is_the_maximum(textures):
    X = textures.X_train.copy()
    detector = PatchDetector(sigma=1.0, **NETWORK).fit(X[1:])
    foreign = np.random.default_rng(0).integers(0, 256, (16, 16, X.shape[3]), np.uint8)
    X[0, 24:40, 32:48] = foreign
    (map_,) = detector.localize(X[:1])
    row, column = np.unravel_index(map_.argmax(), map_.shape)
    assert 20 <= row < 44
    assert 28 <= column < 52


# further images


@pytest.mark.parametrize(
    "estimator", [None, IncrementalPCA(5), MiniBatchKMeans(3, n_init=1)]
)
def test_partial_fit_adds_images(textures, estimator):
    X = textures.X_train
    detector = PatchDetector(estimator, **NETWORK).fit(X[:6])
    before = detector.score_samples(textures.X_test)
    detector.partial_fit(X[6:])
    assert (detector.score_samples(textures.X_test) != before).any()
    if estimator is None:
        whole = PatchDetector(**NETWORK).fit(X)
        assert detector.estimator_.n_samples_ == whole.estimator_.n_samples_
        assert_allclose(
            detector.score_samples(textures.X_test),
            whole.score_samples(textures.X_test),
            rtol=1e-3,
        )
    first = PatchDetector(estimator, **NETWORK).partial_fit(X[:6])
    assert_array_equal(first.score_samples(textures.X_test), before)


def test_partial_fit_is_that_of_the_estimator(textures):
    assert not hasattr(PatchDetector(OneClassSVM()), "partial_fit")
    detector = PatchDetector(**NETWORK).fit(textures.X_train)
    detector.set_params(layers=("layer2",))
    with pytest.raises(ValueError, match=r"layers=\('layer2',\) was None then"):
        detector.partial_fit(textures.X_train)
    detector = PatchDetector(IncrementalPCA(3), **NETWORK).fit(textures.X_train)
    for estimator in (None, IncrementalPCA(4), MiniBatchKMeans(3)):
        detector.set_params(estimator=estimator)
        with pytest.raises(ValueError, match=r"estimator=.* was IncrementalPCA then"):
            detector.partial_fit(textures.X_test)
    detector.set_params(estimator=IncrementalPCA(3), image_score="top")
    with pytest.raises(ValueError, match=r"image_score='top' was 'max' then"):
        detector.partial_fit(textures.X_test)


def test_partial_fit_leaves_out_what_it_knows(textures):
    X = textures.X_train
    detector = PatchDetector(**NETWORK).fit(X[:6])
    expected = clone(detector).fit(X[:6]).partial_fit(X[6:8])
    with pytest.warns(UserWarning, match="4 of the 6 images are copies"):
        detector.partial_fit(X[[0, 1, 6, 6, 7, 7]], [1] * 6)
    assert_array_equal(
        detector.score_samples(textures.X_test), expected.score_samples(textures.X_test)
    )
    assert detector.offset_ == expected.offset_
    with pytest.warns(UserWarning, match="1 of the 1 images are copies"):
        detector.partial_fit(X[:2], [1, -1])


# the memory


def test_a_search_passes_each_image_once(textures, tmp_path, monkeypatch):
    n_passed, forward = [], Backbone.forward

    def counting(self, images):
        n_passed.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", counting)
    X, masks = textures.X_test, textures.masks_test
    grid = {
        "layers": [("layer2", "layer3"), ("layer2",)],
        "estimator": [
            *(None, PCA(3), IsolationForest(n_estimators=3)),
            *(NearestNeighbors(n_neighbors=1), OneClassSVM()),
        ],
    }
    search = GridSearchCV(
        PatchDetector(memory=tmp_path, max_patches=200, **NETWORK),
        # layers vary slowest: the first candidates have the most
        [
            {name: [value] for name, value in candidate.items()}
            for candidate in sorted(
                ParameterGrid(grid), key=lambda c: -len(c["layers"])
            )
        ],
        scoring=make_localization_scorer(pixel_roc_auc_score),
        cv=OneClassKFold(2),
        error_score="raise",
    )
    search.fit(X, masks)
    assert sum(n_passed) == len(X)
    assert len(search.cv_results_["params"]) == 10
    fresh = clone(search.best_estimator_).set_params(memory=None).fit(X, masks)
    assert_array_equal(fresh.score_samples(X), search.best_estimator_.score_samples(X))


def test_memory_can_be_switched_off_and_on(textures, tmp_path):
    X = textures.X_test
    detector = PatchDetector(memory=tmp_path / "one", **NETWORK).fit(textures.X_train)
    expected = detector.score_samples(X[:5])
    n_files = len(list(tmp_path.rglob("*.npy")))
    detector.set_params(memory=None)
    detector.score_samples(X)
    assert len(list(tmp_path.rglob("*.npy"))) == n_files
    detector.set_params(memory=str(tmp_path / "two"))
    assert_allclose(detector.score_samples(X[:5]), expected, rtol=1e-5)
    assert len(list((tmp_path / "two").rglob("*.npy"))) == 2 * 5


def test_autocast_of_the_caller_does_not_count(textures):
    X = textures.X_train
    expected = PatchDetector(**NETWORK).fit(X).score_samples(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = PatchDetector(**NETWORK).fit(X).score_samples(X)
    assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "estimator, name",
    [(NearestNeighbors(n_neighbors=1), "_fit_X"), (None, "components_")],
)
def test_files_with_another_estimator_are_refused(textures, estimator, name):
    detector = PatchDetector(estimator, **NETWORK).fit(textures.X_train)
    state = detector.__getstate__()
    state["estimator_"] = copy.deepcopy(state["estimator_"])
    getattr(state["estimator_"], name).flat[3] += 1
    with pytest.raises(ValueError, match=r"PatchDetector is damaged"):
        PatchDetector().__setstate__(state)


def test_parameters_of_the_estimator_can_be_searched():
    detector = PatchDetector(PCA())
    assert detector.get_params()["estimator__n_components"] is None
    detector.set_params(estimator__n_components=3)
    assert detector.estimator.n_components == 3


# moments


def test_moments_of_batches_are_those_of_all_rows():
    rows = torch.randn(2, 50, 4, dtype=torch.float64) + 100
    moments = Moments.empty(2, 4, dtype=torch.float64, device="cpu")
    for part in rows.split([1, 30, 19], dim=1):
        moments.add(part)
    halves = [Moments.empty(2, 4, dtype=torch.float64, device="cpu") for _ in range(2)]
    for half, part in zip(halves, rows.split([20, 30], dim=1), strict=True):
        half.add(part)
    for found in (moments, halves[0].merged(halves[1])):
        assert found.count == 50
        for own, mean, scatter in zip(rows, found.mean, found.scatter, strict=True):
            assert_allclose(mean, own.mean(dim=0), rtol=1e-12)
            assert_allclose(scatter / 49, np.cov(own.T), rtol=1e-9)


# real images


def test_defects_of_tiles_are_found(shared_data):
    weights = shared_data.parent / "weights" / "resnet18-imagenet-to-layer3.pth"
    if not weights.exists():
        pytest.skip("needs ImageNet weights beside the real images")
    data = load_mvtec(shared_data / "magnetic_tile", "tile", size=128)
    detector = PatchDetector(weights=weights).fit(data.X_train[:120])
    scores = detector.score_samples(data.X_test)
    normal = data.y_test == 1
    below = scores[~normal][:, None] < scores[normal]
    assert below.mean() > 0.85
    assert (detector.predict(data.X_test[normal]) == -1).mean() < 0.1
