"""Tests of SPADE, on images with random weights and on given features."""

import joblib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from sklearn.utils import estimator_html_repr

from skanomaly import SPADE, BackboneFeatures, make_pipeline
from skanomaly.datasets import load_mvtec, load_textures
from skanomaly.metrics import pixel_roc_auc_score

SMALL = {
    "SPADE": {
        "backbone": "shufflenet_v2_x0_5",
        "layers": ("stage2",),
        "weights": None,
    }
}

LEAVE_ONE_OUT = (
    "asks for thresholds from the training images' own scores, but each image lies at "
    "distance 0 to itself. On MVTec AD's toothbrush (image_score='max') limits from "
    "these call all 12 normal test images anomalous, leave-one-out scores 1 of 12"
)
EXPECTED_FAILURES = {
    "SPADE": {
        "check_outliers_train": LEAVE_ONE_OUT,
        "check_outliers_fit_predict": LEAVE_ONE_OUT,
    }
}

NETWORK = {"backbone": "resnet18", "weights": None, "random_state": 0}
LAYERS = ("layer1", "layer2", "layer3")
SHAPES = {"fine": (6, 8, 5), "coarse": (3, 4, 9), "last": (2, 2, 7)}


@pytest.fixture(scope="module")
def textures():
    return load_textures(n_train=24, n_test=10, size=64)


@pytest.fixture(scope="module")
def fitted(textures):
    return SPADE(**NETWORK).fit(textures.X_train)


@pytest.fixture(scope="module")
def features(textures):
    """Return features of training and test images: those that SPADE computes."""
    transformer = BackboneFeatures(layers=(*LAYERS, "layer4"), **NETWORK)
    return transformer.fit_transform(textures.X_train), transformer.transform(
        textures.X_test
    )


def random_features(n, seed=0):
    rng = np.random.default_rng(seed)
    X = np.empty(n, [(name, "f4", shape) for name, shape in SHAPES.items()])
    for name, shape in SHAPES.items():
        X[name] = rng.normal(size=(n, *shape))
    return X


def precomputed(**parameters):
    return SPADE(backbone="precomputed", layers=("fine", "coarse"), **parameters)


def slow_maps(X, gallery, layers, size, *, sigma=4.0, n_pixel_neighbors=1):
    """Compute maps from features, one image and one layer at a time."""
    maps = []
    for x in X:
        upsampled = []
        for layer in layers:
            rows, columns, channels = x[layer].shape
            distances = cdist(
                x[layer].reshape(-1, channels), gallery[layer].reshape(-1, channels)
            )
            nearest = np.sort(distances, axis=1)[:, :n_pixel_neighbors].mean(axis=1)
            grid = torch.from_numpy(nearest.reshape(1, 1, rows, columns))
            upsampled.append(F.interpolate(grid, size, mode="bilinear")[0, 0].numpy())
        sigma_pixels = sigma * min(size) / 224
        radius = int(np.ceil(4 * sigma_pixels))
        mean = np.mean(upsampled, axis=0)
        maps.append(gaussian_filter(mean, sigma_pixels, mode="reflect", radius=radius))
    return np.array(maps)


def pool(X, layer):
    return X[layer].mean(axis=(1, 2), dtype=float)


# maps


def test_maps_equal_brute_force(textures, fitted, features):
    train, test = features
    maps = fitted.localize(textures.X_test)
    assert maps.dtype == np.float32
    assert_allclose(maps, slow_maps(test, train, LAYERS, (64, 64)), rtol=1e-3)


@pytest.mark.parametrize("n_pixel_neighbors", [1, 3])
@pytest.mark.parametrize("sigma", [0, 4.0, 40.0])
def test_maps_of_features_equal_brute_force(n_pixel_neighbors, sigma):
    X = random_features(9)
    parameters = {"sigma": sigma, "n_pixel_neighbors": n_pixel_neighbors}
    detector = precomputed(**parameters).fit(X[:6])
    expected = slow_maps(X[6:], X[:6], ("fine", "coarse"), (6, 8), **parameters)
    assert_allclose(detector.localize(X[6:]), expected, rtol=1e-5)


def test_sigma_scales_with_the_size(textures):
    X = textures.X_train[:4]
    for height, width in ((64, 64), (32, 48)):
        crops = X[:, :height, :width]
        sharp = SPADE(sigma=0, **NETWORK).fit(crops[:3]).localize(crops[3:])[0]
        smooth = SPADE(sigma=7.0, **NETWORK).fit(crops[:3]).localize(crops[3:])[0]
        sigma = 7.0 * height / 224
        radius = int(np.ceil(4 * sigma))
        expected = gaussian_filter(sharp, sigma, mode="reflect", radius=radius)
        assert_allclose(smooth, expected, rtol=1e-5)


def test_training_images_have_maps_of_zeros(textures):
    X = textures.X_train[:6]
    detector = SPADE(n_neighbors=1, **NETWORK).fit(X)
    assert (detector.localize(X) == 0).all()
    assert (detector.score_samples(X) == 0).all()
    assert detector.offset_ < 0
    assert detector.map_threshold_ > 0


def test_more_images_only_lower_the_maps():
    X = random_features(12)
    few = precomputed().fit(X[:5]).localize(X[9:])
    many = precomputed().fit(X[:9]).localize(X[9:])
    assert (many <= few + 1e-6).all()
    assert (many < few - 1e-3).any()


def test_order_of_the_training_images_is_irrelevant():
    X = random_features(12)
    detector = precomputed(gallery_size=3).fit(X[:9])
    permuted = precomputed(gallery_size=3).fit(X[:9][::-1])
    assert_allclose(permuted.localize(X[9:]), detector.localize(X[9:]), rtol=1e-6)
    assert_allclose(permuted.score_samples(X), detector.score_samples(X), atol=1e-6)
    assert permuted.offset_ == pytest.approx(detector.offset_)
    assert permuted.map_threshold_ == pytest.approx(detector.map_threshold_)


def test_positions_in_the_gallery_are_irrelevant():
    X = random_features(9)
    shifted = X[:6].copy()
    for name in SHAPES:
        shifted[name] = np.roll(shifted[name], (1, 2), axis=(1, 2))
    expected = precomputed().fit(X[:6]).localize(X[6:])
    assert_allclose(precomputed().fit(shifted).localize(X[6:]), expected, rtol=1e-6)


def test_maps_and_scores_scale_with_the_features():
    X = random_features(9)
    scaled = X.copy()
    for name in SHAPES:
        scaled[name] *= 8
    detector, eightfold = precomputed().fit(X[:6]), precomputed().fit(scaled[:6])
    assert_allclose(eightfold.localize(scaled), 8 * detector.localize(X), rtol=1e-6)
    assert_allclose(
        eightfold.score_samples(scaled), 8 * detector.score_samples(X), rtol=1e-6
    )


def test_only_the_nearest_images_make_the_gallery():
    X = random_features(12)
    train, test = X[:9], X[9:]
    maps = precomputed(gallery_size=2).fit(train).localize(test)
    nearest = cdist(pool(test, "last"), pool(train, "last")).argsort(axis=1)[:, :2]
    for row, chosen in enumerate(nearest):
        expected = slow_maps(test[[row]], train[chosen], ("fine", "coarse"), (6, 8))
        assert_allclose(maps[[row]], expected, rtol=1e-5)


def test_precomputed_features_give_nearly_the_same_maps(textures, fitted):
    X = textures.X_test.copy()
    X[0, 20:32, 36:48] = 255
    pipeline = make_pipeline(
        BackboneFeatures(**NETWORK), SPADE(backbone="precomputed", random_state=0)
    ).fit(textures.X_train)
    maps, expected = pipeline.localize(X), fitted.localize(X)
    assert maps.shape == expected.shape
    assert np.corrcoef(maps.ravel(), expected.ravel())[0, 1] > 0.95
    peak, other = (divmod(m[0].argmax(), 64) for m in (maps, expected))
    assert np.abs(np.subtract(peak, other)).max() <= 4


# scores


def test_scores_are_mean_distances_to_the_nearest_images(textures, fitted, features):
    train, test = (pool(X, "layer4") for X in features)
    expected = np.sort(cdist(test, train), axis=1)[:, :5].mean(axis=1)
    assert_allclose(fitted.score_samples(textures.X_test), -expected, rtol=1e-3)


def test_maximum_of_the_map_as_score():
    X = random_features(9)
    detector = precomputed(image_score="max").fit(X[:6])
    assert_array_equal(
        -detector.score_samples(X), detector.localize(X).max(axis=(1, 2))
    )


def test_thresholds_are_leave_one_out():
    X, contamination = random_features(8), 0.3
    detector = precomputed(n_neighbors=2, contamination=contamination).fit(X)
    on_maps = precomputed(image_score="max", contamination=contamination).fit(X)
    scores, peaks = [], []
    for row in range(len(X)):
        others = precomputed(n_neighbors=2).fit(np.delete(X, row))
        scores.append(others.score_samples(X[[row]])[0])
        peaks.append(others.localize(X[[row]]).max())
    assert detector.offset_ == pytest.approx(np.percentile(scores, 30))
    assert detector.map_threshold_ == pytest.approx(np.quantile(peaks, 0.7))
    assert on_maps.offset_ == pytest.approx(np.percentile(np.negative(peaks), 30))
    assert on_maps.map_threshold_ == detector.map_threshold_


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_copies_of_training_images_change_no_threshold():
    X = random_features(9)
    once, often = (
        precomputed(n_neighbors=1, gallery_size=1).fit(X.repeat(n)) for n in (1, 3)
    )
    # a percentile between two scores moves a little where each is there three times
    assert often.offset_ == pytest.approx(once.offset_, rel=0.05)
    # the images whose maps are taken are drawn from others
    assert often.map_threshold_ == pytest.approx(once.map_threshold_, rel=0.2)
    alike = precomputed(n_neighbors=3).fit(X[:1].repeat(4))
    assert alike.offset_ == alike.map_threshold_ == 0


def test_refit_forgets_the_threshold_of_the_maps():
    X = random_features(12)
    detector = precomputed().fit(X[:4])
    before = detector.map_threshold_
    detector.fit(X[4:])
    assert detector.map_threshold_ == precomputed().fit(X[4:]).map_threshold_ != before


def test_without_a_gallery_there_is_no_threshold_of_maps():
    X = random_features(4)
    detector = precomputed().fit(X)
    assert detector.map_threshold_ > 0
    detector.set_params(gallery_size=0).fit(X)
    assert not hasattr(detector, "map_threshold_")
    for shown in (detector, precomputed().fit(X), precomputed()):
        assert "precomputed" in estimator_html_repr(shown)


# DN2: images only


def test_dn2_scores_like_spade_and_cannot_localize():
    X = random_features(12)
    detector = precomputed(gallery_size=0).fit(X[:9])
    expected = precomputed().fit(X[:9])
    assert detector.gallery_ == {}
    assert_array_equal(detector.score_samples(X), expected.score_samples(X))
    assert detector.offset_ == expected.offset_
    for method in ("localize", "segment"):
        with pytest.raises(AttributeError, match="'SPADE' has no") as error:
            getattr(detector, method)
        assert "gallery_size=0 keeps no features" in str(error.value.__cause__)
    with pytest.raises(ValueError, match=r"image_score='max'.*gallery_size=0"):
        precomputed(gallery_size=0, image_score="max").fit(X)


def test_dn2_with_all_neighbors_is_the_mean_distance():
    X = random_features(12)
    scores = precomputed(gallery_size=0, n_neighbors=9).fit(X[:9]).score_samples(X)
    expected = cdist(pool(X, "last"), pool(X[:9], "last")).mean(axis=1)
    assert_allclose(-scores, expected, rtol=1e-5)
    more = precomputed(gallery_size=0, n_neighbors=50).fit(X[:9])
    assert_array_equal(more.score_samples(X), scores)


def test_dn2_degree_of_anomaly_rises_with_the_distance():
    X = random_features(10)
    detector = precomputed(gallery_size=0).fit(X[:9])
    away = X[[9]].repeat(5)
    away["last"] += np.linspace(0, 20, 5)[:, None, None, None]
    scores = detector.score_samples(away)
    assert (np.diff(scores[1:]) < 0).all()
    assert scores[1] < scores[0]


def test_dn2_finds_outliers_among_its_training_images(textures):
    X = textures.X_train[:20].copy()
    X[3, 16:48, 16:48] = 255
    X[11, :, 20:44] = 0
    X[16, ::4] = 0
    scores = SPADE(gallery_size=0, **NETWORK).fit(X).score_samples(X)
    assert set(np.argsort(scores)[:3]) == {3, 11, 16}


# planted and real defects


def test_planted_defects_are_found_and_marked(textures, small):
    normal = textures.X_test[textures.y_test == 1]
    broken = normal.copy()
    mask = np.zeros(broken.shape[:3], bool)
    for row in range(len(broken)):
        mask[row, 8 + 4 * row : 24 + 4 * row, 40:56] = True
    broken[mask] = 255
    detector = small(SPADE, layers=("maxpool", "stage2"), image_score="max")
    detector.fit(textures.X_train)

    maps = detector.localize(broken)
    peaks = maps.reshape(len(maps), -1).argmax(axis=1)
    assert mask.reshape(len(mask), -1)[np.arange(len(mask)), peaks].all()
    assert pixel_roc_auc_score(mask, maps) > 0.95
    assert detector.score_samples(broken).max() < detector.score_samples(normal).min()
    assert (detector.predict(broken) == -1).all()

    marked = detector.segment(broken)
    assert (marked & mask).sum() > 0.5 * mask.sum()
    assert (marked & ~mask).mean() < 0.1
    assert detector.segment(textures.X_train).sum() == 0


def test_toothbrush(shared_data):
    """On real photographs, with real weights and at half the side."""
    data = load_mvtec(shared_data / "mvtec_ad", "toothbrush", size=112)
    weights = shared_data.parent / "weights" / "resnet18-imagenet-to-layer3.pth"
    detector = SPADE(backbone="resnet18", weights=weights, gallery_size=5)
    maps = detector.fit(data.X_train).localize(data.X_test)
    assert pixel_roc_auc_score(data.masks_test, maps) >= 0.97


# what X may be


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_image_features_fall_back_to_the_last_layer_of_the_weights(tmp_path):
    whole = SPADE(**NETWORK).fit(np.zeros((2, 32, 32, 3)))
    state = whole.network_.trunk.state_dict()
    assert whole.embeddings_.shape == (2, 512)
    assert list(whole.gallery_) == list(LAYERS)
    truncated = {k: v for k, v in state.items() if not k.startswith("layer4")}
    torch.save(truncated, tmp_path / "weights.pth")
    detector = SPADE(backbone="resnet18", weights=str(tmp_path / "weights.pth"))
    detector.fit(np.zeros((2, 32, 32, 3)))
    assert detector.embeddings_.shape == (2, 256)


def test_missing_layer_is_named():
    with pytest.raises(ValueError, match=r"no field 'layer1', but fine, coarse, last"):
        SPADE(backbone="precomputed").fit(random_features(3))


def test_no_layers():
    with pytest.raises(ValueError, match="layers is empty"):
        SPADE(layers=(), **NETWORK).fit(np.zeros((2, 32, 32, 3)))


def test_features_given_as_images_and_the_reverse():
    with pytest.raises(ValueError, match=r"resnet18.* but X is a structured array"):
        SPADE(**NETWORK).fit(random_features(3))
    with pytest.raises(ValueError, match="but X is not a structured array"):
        precomputed().fit(np.zeros((3, 32, 32, 3)))
    with pytest.raises(ValueError, match="but X is not a structured array"):
        precomputed().fit(random_features(3)).predict(np.zeros((3, 32, 32, 3)))


def test_features_of_another_shape():
    detector = precomputed().fit(random_features(3))
    other = np.zeros(2, [("fine", "f4", (5, 8, 5)), ("coarse", "f4", (3, 4, 9))])
    with pytest.raises(ValueError, match=r"\(5, 8, 5\).*was fitted on.*\(6, 8, 5\)"):
        detector.predict(other)


def test_single_record():
    with pytest.raises(ValueError, match=r"1 sample.* minimum of 2"):
        precomputed().fit(random_features(1))
    detector, X = precomputed().fit(random_features(3)), random_features(5, seed=1)
    for row, score in enumerate(detector.score_samples(X)):
        assert detector.score_samples(X[[row]]) == pytest.approx([score])
    with pytest.raises(ValueError, match=r"0 sample.* minimum of 1"):
        detector.predict(random_features(0))


def test_anomalous_records_are_left_out():
    X = random_features(8)
    y = np.array([1, 1, -1, 1, -1, 1, 1, 1])
    detector = precomputed().fit(X, y)
    expected = precomputed().fit(X[y == 1])
    assert_array_equal(detector.localize(X), expected.localize(X))
    assert detector.offset_ == expected.offset_


@pytest.mark.parametrize("kind", [np.nan, np.inf])
def test_precomputed_features_must_be_finite(kind):
    X = np.zeros(4, [("layer1", np.float32, (4, 4, 3))])
    X["layer1"][2, 1, 1, 1] = kind
    spade = SPADE(backbone="precomputed", layers=("layer1",))
    with pytest.raises(ValueError, match="NaN or infinity"):
        spade.fit(X)


def test_layers_inside_of_a_sequential_child(random_images):
    X = random_images(4, 32, 32, 3)
    spade = SPADE(backbone="vgg11", layers=("features.2", "features.5"), weights=None)
    spade.set_params(random_state=0).fit(X)
    assert spade.localize(X).shape == (4, 32, 32)
    assert spade.embeddings_.shape == (4, 512)


def test_a_refit_on_features_forgets_the_network(tmp_path, random_images, small):
    spade = small(SPADE).fit(random_images(4, 32, 32, 3))
    spade.set_params(backbone="precomputed")
    features = np.zeros(4, [("stage2", np.float32, (4, 4, 3))])
    features["stage2"] = np.arange(4)[:, None, None, None]
    spade.fit(features)
    joblib.dump(spade, tmp_path / "spade.joblib")
    loaded = joblib.load(tmp_path / "spade.joblib")
    np.testing.assert_array_equal(
        loaded.score_samples(features), spade.score_samples(features)
    )


def test_the_gallery_of_the_fit_decides_on_maps():
    X = random_features(12)
    without = precomputed(gallery_size=0).fit(X).set_params(gallery_size=5)
    assert not hasattr(without, "localize")
    full = precomputed(gallery_size=5).fit(X)
    expected = full.localize(X)
    assert_array_equal(full.set_params(gallery_size=0).localize(X), expected)
