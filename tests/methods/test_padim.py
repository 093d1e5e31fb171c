"""Tests of PaDiM against Gaussians fitted one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import mahalanobis

from skanomaly import BackboneFeatures, PaDiM
from skanomaly.datasets import load_textures

SMALL = {
    "PaDiM": {
        "n_features": 8,
        "backbone": "shufflenet_v2_x0_5",
        "layers": ("stage2",),
        "weights": None,
    }
}

LEAVE_ONE_OUT = (
    "asks for thresholds from the training images' own scores, but a Gaussian knows "
    "the images it was fitted to; thresholds come from the Gaussians of the others"
)
EXPECTED_FAILURES = {
    "PaDiM": {
        "check_outliers_train": LEAVE_ONE_OUT,
        "check_outliers_fit_predict": LEAVE_ONE_OUT,
    }
}

NETWORK = {"backbone": "resnet18", "weights": None, "random_state": 0}
SHAPES = {"fine": (3, 4, 5), "coarse": (2, 2, 7)}


def random_features(n, seed=0):
    rng = np.random.default_rng(seed)
    X = np.empty(n, [(name, "f4", shape) for name, shape in SHAPES.items()])
    for name, shape in SHAPES.items():
        X[name] = rng.normal(size=(n, *shape))
    return X


def make(**parameters):
    settings = {"backbone": "precomputed", "layers": ("fine", "coarse"), "sigma": 0.0}
    return PaDiM(random_state=0, **{**settings, "n_features": None, **parameters})


def joined(X):
    """Return the features (n, 3, 4, 12) of both layers, the coarse ones repeated."""
    coarse = F.interpolate(torch.from_numpy(X["coarse"]).permute(0, 3, 1, 2), (3, 4))
    return np.concatenate([X["fine"], coarse.permute(0, 2, 3, 1)], axis=3)


def slow_distances(train, test):
    """Return the distances (n, rows, columns), one Gaussian after the other."""
    distances = np.empty(test.shape[:3])
    for i in range(test.shape[1]):
        for j in range(test.shape[2]):
            own = train[:, i, j].astype(float)
            covariance = np.cov(own.T) + 0.01 * np.eye(own.shape[1])
            inverse = np.linalg.inv(covariance)
            for k, x in enumerate(test[:, i, j]):
                distances[k, i, j] = mahalanobis(x, own.mean(axis=0), inverse)
    return distances


@pytest.mark.parametrize("n", [6, 40])
def test_maps_are_mahalanobis_distances(n):
    train, test = random_features(n), random_features(3, seed=1)
    detector = make(batch_size=5).fit(train)
    expected = slow_distances(joined(train), joined(test))
    maps = detector.localize(test)
    assert_allclose(maps, expected, rtol=1e-4)
    assert_allclose(-detector.score_samples(test), expected.max((1, 2)), rtol=1e-4)
    features = joined(train)
    assert_allclose(detector.mean_, features.mean(axis=0), atol=1e-6)
    for i, j in [(0, 0), (2, 3)]:
        own = np.cov(features[:, i, j].T) + 0.01 * np.eye(12)
        factor = detector.whitening_[i, j]
        assert_allclose(factor.T @ factor, np.linalg.inv(own), rtol=1e-3, atol=1e-3)
        assert_array_equal(np.triu(factor, 1), 0)


@pytest.mark.parametrize("n, rtol", [(8, 0.1), (60, 1e-3)])
def test_thresholds_are_those_of_the_others(n, rtol):
    train = random_features(n)
    detector = make(contamination=0.5).fit(train)
    features, scores = joined(train), []
    for i in range(n):
        others = np.delete(features, i, axis=0)
        scores.append(slow_distances(others, features[[i]]).max())
    assert_allclose(-detector.offset_, np.median(scores), rtol=rtol)
    own = -detector.score_samples(train)
    assert -detector.offset_ > np.median(own)


def test_copies_are_no_others():
    train = random_features(30)
    with pytest.warns(UserWarning, match="copies"):
        doubled = make(contamination=0.5).fit(np.concatenate([train, train]))
    once = make(contamination=0.5).fit(train)
    # covariances of 60 rows are 58 / 59 of twice the scatter of 30 over 29
    assert_allclose(doubled.offset_, once.offset_, rtol=0.02)


def test_channels_are_drawn_from_all_layers():
    train, test = random_features(40), random_features(3, seed=1)
    detector = make(n_features=6).fit(train)
    assert len(np.unique(detector.channels_)) == 6
    assert detector.channels_.max() < 12
    expected = slow_distances(
        joined(train)[..., detector.channels_], joined(test)[..., detector.channels_]
    )
    assert_allclose(detector.localize(test), expected, rtol=1e-4)
    other = make(n_features=6).set_params(random_state=1).fit(train)
    assert (other.channels_ != detector.channels_).any()


def test_more_channels_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"n_features=13, but layers=.* 12 channels"):
        make(n_features=13).fit(random_features(5))


def test_positions_are_told_apart():
    textures = load_textures(n_train=12, n_test=2, size=64, random_state=1)
    X = textures.X_train.copy()
    X[:, :32] = X[:, :32] // 4  # dark above, bright below
    detector = PaDiM(n_features=30, **NETWORK).fit(X[1:])
    turned = X[:1, ::-1]
    assert detector.score_samples(turned) < 2 * detector.score_samples(X[:1])


def test_equals_itself_on_precomputed_features():
    textures = load_textures(n_train=8, n_test=4, size=64, random_state=1)
    features = BackboneFeatures(layers=("layer1", "layer2", "layer3"), **NETWORK)
    own = PaDiM(n_features=20, **NETWORK).fit(textures.X_train)
    given = PaDiM(n_features=20, backbone="precomputed", random_state=0)
    given.fit(features.fit_transform(textures.X_train))
    assert_array_equal(own.channels_, given.channels_)
    assert_allclose(own.whitening_, given.whitening_, rtol=1e-3, atol=1e-3)


def test_layers_of_which_no_channel_is_drawn_are_passed_over(random_images):
    X = random_images(6, 40, 40, 3)
    detector = PaDiM(n_features=1, **NETWORK).fit(X)
    assert detector.localize(X[:1]).shape == (1, 40, 40)
