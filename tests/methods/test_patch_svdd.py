"""Tests of Patch SVDD: the networks, the pairs, the dense evaluation, the search."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_settings import TRAINED_BRIEFLY
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import cdist
from torch import nn

from skanomaly._tensors.neighbors import nearest_distances
from skanomaly.methods import patch_svdd
from skanomaly.methods.patch_svdd import (
    DIRECTIONS,
    PatchSVDD,
    PatchSVDDNetwork,
    RepeatedSamples,
    crop,
    near_pairs,
    position_pairs,
    spread,
)
from skanomaly.metrics import pixel_roc_auc_score

SMALL = {
    "PatchSVDD": {
        "patch_size": 4,
        "strides": (2, 4),
        "width": 4,
        "n_features": 8,
        "n_repeats": 8,
        "center": "channel",
        **TRAINED_BRIEFLY,
        "learning_rate": 1e-2,
    }
}
TINY = {"PatchSVDD": {"width": 1, "n_features": 2, "n_repeats": 1, "strides": (4, 4)}}

LEAVE_ONE_OUT = (
    "asks for thresholds from the training images' own scores, but their patches are "
    "stored and each image lies at distance 0 to itself. On MVTec AD's toothbrush (64 "
    "pixels) limits from these call all 12 normal test images anomalous, limits from "
    "the patches of the others none or 1 of 12"
)
EXPECTED_FAILURES = {
    "PatchSVDD": {
        "check_outliers_train": LEAVE_ONE_OUT,
        "check_outliers_fit_predict": LEAVE_ONE_OUT,
    }
}


def make(**parameters):
    return PatchSVDD(random_state=0, **{**SMALL["PatchSVDD"], **parameters})


def waves(n, size=32, channels=3, seed=0):
    """Make smooth images, each shifted on its own, of a little noise."""
    rng = np.random.default_rng(seed)
    phases = rng.uniform(0, 2 * np.pi, (n, 2, 1))
    rows, columns = np.moveaxis(np.sin(np.arange(size) / 3 + phases), 1, 0)
    images = 0.5 + 0.2 * (rows[:, :, None] + columns[:, None, :])[..., None]
    return (images + rng.normal(0, 0.01, (n, size, size, channels))).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return make().fit(waves(8))


# the networks


class Restated(nn.Module):
    """Both encoders and a classifier in plain torch, as the fact sheet has them."""

    def __init__(self):
        super().__init__()
        rows = [(3, 32, 2), (32, 64, 1), (64, 128, 1), (128, 128, 1), (128, 64, 1)]
        rows += [(64, 32, 1), (32, 32, 1), (32, 64, 1)]
        for number, (n_in, n_out, stride) in enumerate(rows, 1):
            setattr(self, f"conv{number}", nn.Conv2d(n_in, n_out, 3, stride))
        self.join1, self.join2 = nn.Conv2d(64, 128, 2), nn.Conv2d(128, 64, 1)
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 8)

    def small(self, x):
        for number in range(1, 8):
            x = F.leaky_relu(getattr(self, f"conv{number}")(x), 0.1)
        return torch.tanh(self.conv8(x))

    def large(self, x):
        upper, lower = x[:, :, :32], x[:, :, 32:]
        rows = [
            torch.cat([self.small(half[..., :32]), self.small(half[..., 32:])], dim=3)
            for half in (upper, lower)
        ]
        joined = F.leaky_relu(self.join1(torch.cat(rows, dim=2)), 0.1)
        return torch.tanh(self.join2(joined))

    def position(self, first, second):
        x = F.leaky_relu(self.fc1(first - second), 0.1)
        return self.fc3(F.leaky_relu(self.fc2(x), 0.1))


def exchanged():
    """Return a network of the paper's size and a restated one of the same weights."""
    network, restated = PatchSVDDNetwork(3, 32, 32, 64, (1, 1)), Restated()
    own = [
        *network.encoder.parameters(),
        *network.head.parameters(),
        *network.classifiers["large"].parameters(),
    ]
    for mine, other in zip(own, restated.parameters(), strict=True):
        other.data = mine.data.clone()
    return network, restated


def test_paper_size():
    model = PatchSVDD()
    model.image_shape_ = (256, 256, 3)
    with torch.device("meta"):
        network = model._build_network()

    def count(part):
        return sum(parameter.numel() for parameter in part.parameters())

    assert count(network.encoder) == 360_832
    assert count(network.head) == 41_152
    assert count(network.encoder) + count(network.head) == 401_984
    assert [count(part) for part in network.classifiers.values()] == [25_864] * 2
    assert count(network) == 453_712
    assert network.mean.shape == (3, 256, 256)
    network, images = model._build_network(), torch.rand(1, 3, 256, 256)
    with torch.inference_mode():
        grids = network.dense(images, model.strides)
    assert [grid.shape for grid in grids] == [(1, 64, 57, 57), (1, 64, 13, 13)]


@pytest.mark.parametrize("is_training", [True, False])
def test_outputs_equal_those_of_the_restated_network(is_training):
    network, restated = exchanged()
    network.train(is_training), restated.train(is_training)
    small, large = torch.randn(3, 3, 32, 32), torch.randn(2, 3, 64, 64)
    found = network(small, large)
    expected = restated.small(small), restated.large(large)
    assert expected[0].shape == (3, 64, 1, 1)
    assert expected[1].shape == (2, 64, 1, 1)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other.flatten(1), rtol=0, atol=1e-5)
        assert own.abs().max() < 1
    first, second = torch.randn(2, 5, 64)
    torch.testing.assert_close(
        network.classifiers["large"](first - second),
        restated.position(first, second),
        rtol=0,
        atol=1e-5,
    )


def features_alone(network, patches, side):
    """Return the features of patches of one of both sizes."""
    none = patches.new_zeros(
        0, patches.shape[1], network.patch_size, network.patch_size
    )
    if side == network.patch_size:
        return network(patches, none.repeat(1, 1, 2, 2))[0]
    return network(none, patches)[1]


@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
def test_dense_equals_patchwise(patch_size):
    network = PatchSVDDNetwork(2, patch_size, 4, 6, (1, 1))
    assert len([m for m in network.encoder if isinstance(m, nn.Conv2d)]) == (
        patch_size // 4
    )
    for parameter in network.parameters():
        parameter.data *= 2  # features far from each other
    height, width = 3 * patch_size, 4 * patch_size
    images = torch.randn(2, 2, height, width)
    strides = patch_size // 2, patch_size
    small, large = (grid.detach() for grid in network.dense(images, strides))
    for grid, side, stride in zip(
        (small, large), (patch_size, 2 * patch_size), strides, strict=True
    ):
        tops = range(0, height - side + 1, stride)
        lefts = range(0, width - side + 1, stride)
        assert grid.shape == (2, 6, len(tops), len(lefts))
        for i, top in enumerate(tops):
            for j, left in enumerate(lefts):
                patch = images[:, :, top : top + side, left : left + side]
                alone = features_alone(network, patch, side)
                torch.testing.assert_close(grid[:, :, i, j], alone, rtol=0, atol=1e-5)
    assert small.std(dim=(2, 3)).min() > 0.01


def test_a_gradient_reaches_every_weight(make_batch):
    model = make()
    model.image_shape_ = (32, 32, 3)
    torch.manual_seed(0)
    network = model._build_network()
    ((part, loss),) = model._losses(network, make_batch(torch.rand(16, 3, 32, 32)))
    assert part is network
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    last = network.classifiers["small"][-1]
    assert (last.weight.grad.abs().amax(dim=1) > 0).all()


# the pairs


def inside(places, size, side):
    return ((places >= 0) & (places <= torch.tensor(size) - side)).all()


@pytest.mark.parametrize(
    ("size", "side"),
    [((256, 256), 64), ((256, 256), 32), ((64, 72), 32), ((14, 40), 8)],
)
def test_position_pairs(size, side):
    generator = torch.Generator().manual_seed(0)
    places, directions = position_pairs(4000, size, side, generator)
    assert places.shape == (2, 4000, 2)
    assert inside(places, size, side)
    offsets = places[1] - places[0]
    expected = torch.tensor(DIRECTIONS)[directions]
    assert torch.equal(offsets.sign(), expected)
    moved = offsets.abs()[expected != 0]
    assert moved.min() == 3 * side // 4
    assert moved.max() < side
    if min(size) >= 2 * side:
        assert len(moved.unique()) == side // 4  # all lengths
    counts = directions.bincount(minlength=8)
    assert counts.min() > 400 < counts.max() < 600
    # nothing of an axis is left out
    for axis, length in enumerate(size):
        assert places[..., axis].min() == 0
        assert places[..., axis].max() == length - side


@pytest.mark.parametrize(("side", "reach"), [(64, 2), (32, 1), (8, 1)])
def test_near_pairs(side, reach):
    size = side + side // 2, 2 * side
    places = near_pairs(3000, size, side, torch.Generator().manual_seed(0))
    assert inside(places, size, side)
    offsets = places[1] - places[0]
    found, counts = offsets.unique(dim=0, return_counts=True)
    assert len(found) == (2 * reach + 1) ** 2 - 1  # all but (0, 0)
    assert offsets.abs().max() == reach
    assert (offsets != 0).any(dim=1).all()
    assert counts.min() > 0.6 * counts.max()


def test_crops_are_those_of_each_image():
    images = torch.rand(3, 2, 9, 11)
    places = torch.randint(0, 5, (4, 3, 2))
    patches = crop(images, places, 5)
    assert patches.shape == (4, 3, 2, 5, 5)
    for k in range(4):
        for i in range(3):
            top, left = places[k, i]
            expected = images[i, :, top : top + 5, left : left + 5]
            assert torch.equal(patches[k, i], expected)


def test_only_neighbours_have_noise_and_each_its_own():
    model = make()
    images = torch.zeros(200, 3, 32, 32)
    patches, _ = model._draw(images, 8, torch.Generator().manual_seed(0))
    first, second, third, fourth = patches.unflatten(0, (4, 200))
    assert third.abs().max() == fourth.abs().max() == 0
    for noisy in (first, second):
        shifts = noisy.mean(dim=(2, 3))
        assert shifts.std() == pytest.approx(0.02, rel=0.1)
        rest = noisy - shifts[..., None, None]
        assert rest.std() == pytest.approx(0.02, rel=0.1)
    both = torch.stack([first.flatten(), second.flatten()])
    assert torch.corrcoef(both)[0, 1].abs() < 0.1
    between = torch.corrcoef(first.mean(dim=(2, 3)).T)
    assert (between - torch.eye(3)).abs().max() < 0.3


# the loss


def test_loss(make_batch):
    model = make(svdd_weight=0.3)
    model.image_shape_ = (32, 32, 3)
    torch.manual_seed(0)
    network = model._build_network()
    network.mean += 0.4
    images = torch.rand(3, 3, 32, 32)
    ((_, loss),) = model._losses(network, make_batch(images, seed=1))
    generator = torch.Generator().manual_seed(1)
    cross_entropy = distance = 0.0
    for name, side in (("small", 4), ("large", 8)):
        patches, directions = model._draw(images - 0.4, side, generator)
        features = features_alone(network, patches, side)
        p1, p2, p3, p4 = features.view(4, 3, -1)
        logits = network.classifiers[name](p1 - p2)
        cross_entropy += F.cross_entropy(logits, directions)
        distance += (p3 - p4).square().sum(dim=1).sqrt().mean()
    torch.testing.assert_close(loss, cross_entropy + 0.3 * distance)
    model.svdd_weight = 0
    ((_, plain),) = model._losses(network, make_batch(images, seed=1))
    torch.testing.assert_close(plain, cross_entropy)


def feature_spread(model):
    """Return the mean distance of small patches' features from their mean."""
    features = model.gallery_["small"].reshape(-1, model.n_features)
    return np.linalg.norm(features - features.mean(axis=0), axis=1).mean()


def test_a_large_weight_makes_all_features_equal():
    X = waves(8)
    settings = {"max_epochs": 15}
    spreads = [
        feature_spread(make(svdd_weight=weight, **settings).fit(X))
        for weight in (1e-3, 100.0)
    ]
    assert spreads[1] < 0.1 * spreads[0]


def test_positions_are_learned():
    """Of images with a gradient of brightness, neighbours tell where they are."""
    ramp = np.linspace(0, 1, 32)
    X = np.stack([np.stack(np.meshgrid(ramp, ramp), axis=2)] * 8)
    X = (X + np.random.default_rng(0).normal(0, 0.01, X.shape)).clip(0, 1)
    settings = {"max_epochs": 30}
    model = make(svdd_weight=0, **settings).fit(X)
    assert model.loss_curve_[-1] < 0.8 * 2 * np.log(8) < model.loss_curve_[0]


def test_epochs_visit_images_several_times():
    images = torch.arange(10.0)[:, None, None, None]
    samples = RepeatedSamples(images, 3)
    assert len(samples) == 30
    batch = samples.batch(np.arange(30), 0, None)
    assert_array_equal(batch.images.flatten().unique(return_counts=True)[1], 3)
    rows, held_out = samples.split(0.2, 0)
    assert len(rows) == 24
    assert len(held_out) == 6
    assert_array_equal(np.sort([*rows, *held_out]), np.arange(30))
    # an image is held out of all visits
    assert not set(rows % 10) & set(held_out % 10)


# what is subtracted, and the border


@pytest.mark.parametrize("center", ["pixel", "channel"])
def test_the_mean_of_the_training_images_is_subtracted(center):
    X = waves(6)
    model = make(center=center, batch_size=4).fit(X)
    mean = X.mean(axis=0, dtype=float)
    if center == "channel":
        mean = mean.mean(axis=(0, 1), keepdims=True)
    assert_allclose(model.network_.mean.movedim(0, 2), mean, atol=1e-6)
    # and that of the first fit stays with the weights
    other = model.set_params(warm_start=True).fit(waves(6, seed=1))
    assert_allclose(other.network_.mean.movedim(0, 2), mean, atol=1e-6)


@pytest.mark.parametrize("size", [(14, 14), (15, 22), (21, 33)])
def test_images_of_any_size(size):
    X = waves(4, 40)[:, : size[0], : size[1]]
    model = make(strides=(4, 2)).fit(X)
    assert model.localize(X).shape == (4, *size)
    height, width = (4 * -(-max(side, 14) // 4) for side in size)
    shapes = {name: gallery.shape[1:3] for name, gallery in model.gallery_.items()}
    assert shapes["small"] == ((height - 4) // 4 + 1, (width - 4) // 4 + 1)
    assert shapes["large"] == ((height - 8) // 2 + 1, (width - 8) // 2 + 1)


def test_small_images_are_padded_with_a_warning():
    X = waves(4, 12)
    with pytest.warns(
        UserWarning, match=r"12 x 12 pixels are padded to sides of 14.*size=4"
    ):
        model = make().fit(X)
    assert model.localize(X).shape == (4, 12, 12)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"patch_size": 6}, "patch_size=6 must be a multiple of 4"),
        ({"patch_size": 36}, "patch_size"),
        ({"strides": (2,)}, "strides="),
        ({"strides": (1, 4)}, "strides="),
        ({"strides": (2, 8)}, "strides="),
        ({"strides": (2, 4.0)}, "strides="),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        make(**settings).fit(waves(4))


# from patches to pixels


@pytest.mark.parametrize(("side", "stride"), [(4, 2), (8, 4), (6, 6), (3, 1)])
def test_pixels_have_the_mean_of_the_patches_that_cover_them(side, stride):
    values = torch.rand(2, 4, 5)
    maps = spread(values, side, stride)
    size = 3 * stride + side, 4 * stride + side
    sums, counts = np.zeros((2, *size)), np.zeros(size)
    for i in range(4):
        for j in range(5):
            rows = slice(i * stride, i * stride + side)
            columns = slice(j * stride, j * stride + side)
            sums[:, rows, columns] += values[:, i, j, None, None].numpy()
            counts[rows, columns] += 1
    assert counts.min() > 0
    assert_allclose(maps, sums / counts, rtol=1e-5)
    assert (maps <= values.amax(dim=(1, 2))[:, None, None] + 1e-6).all()
    assert (maps >= values.amin(dim=(1, 2))[:, None, None] - 1e-6).all()
    constant = spread(torch.full((1, 4, 5), 0.3), side, stride)
    assert_allclose(constant, 0.3, rtol=1e-6)


# the search


def slow_maps(model, X, gallery):
    """Compute both maps from features, by all distances: (2, n, h, w)."""
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = model._features(images)
    maps = []
    for name, side, stride in zip(gallery, (4, 8), model.strides, strict=True):
        queries = features[name].numpy()
        distances = cdist(
            queries.reshape(-1, queries.shape[-1]).astype(float),
            gallery[name].reshape(-1, queries.shape[-1]).astype(float),
        ).min(axis=1)
        distances = torch.from_numpy(distances.reshape(queries.shape[:3]))
        maps.append(spread(distances, side, stride).numpy())
    return np.array(maps)[..., : X.shape[1], : X.shape[2]]


def test_maps_are_products_of_nearest_distances(fitted):
    X = waves(3, seed=1)
    small, large = slow_maps(fitted, X, fitted.gallery_)
    assert_allclose(fitted.localize(X), small * large, rtol=1e-3)
    assert_allclose(-fitted.score_samples(X), (small * large).max((1, 2)), rtol=1e-3)
    summed = copy.deepcopy(fitted).set_params(combination="sum")
    assert_allclose(summed.localize(X), small + large, rtol=1e-3)


def test_training_images_have_maps_of_zeros(fitted):
    X = waves(8)
    assert_allclose(fitted.localize(X), 0, atol=1e-9)
    assert fitted.offset_ < 0 < fitted.map_threshold_


def test_more_stored_features_never_raise_a_score(fitted):
    X = waves(4, seed=1)
    fewer = copy.deepcopy(fitted)
    fewer.gallery_ = {name: g[:4] for name, g in fitted.gallery_.items()}
    assert (fitted.localize(X) <= fewer.localize(X) + 1e-7).all()
    assert (fitted.localize(X) < fewer.localize(X) - 1e-7).any()


def test_thresholds_leave_each_image_out():
    X, contamination = waves(6), 0.3
    model = make(contamination=contamination).fit(X)
    peaks = []
    for row in range(6):
        gallery = {n: np.delete(g, row, axis=0) for n, g in model.gallery_.items()}
        small, large = slow_maps(model, X[[row]], gallery)
        peaks.append((small * large).max())
    assert model.offset_ == pytest.approx(np.percentile(np.negative(peaks), 30))
    assert model.map_threshold_ == pytest.approx(np.quantile(peaks, 0.7))


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_copies_are_no_others():
    X = waves(5)
    model = make().fit(X[[0, 1, 1, 2, 3, 4, 4, 4]])
    once = copy.deepcopy(model)
    once.gallery_ = {n: g[[0, 1, 3, 4, 5]] for n, g in model.gallery_.items()}
    peaks = []
    for row in range(5):
        gallery = {n: np.delete(g, row, axis=0) for n, g in once.gallery_.items()}
        small, large = slow_maps(model, X[[row]], gallery)
        peaks.append((small * large).max())
    own = np.array(peaks)[[0, 1, 1, 2, 3, 4, 4, 4]]
    assert model.map_threshold_ == pytest.approx(np.quantile(own, 0.99))
    alike = make().fit(X[:1].repeat(4, axis=0))
    assert alike.offset_ == alike.map_threshold_ == 0


class ExactIndex:
    """Stands for the approximate index, whose making takes a minute."""

    def __init__(self, gallery, random_state):
        self.gallery, self.seed = gallery, random_state

    def search(self, queries, n_neighbors):
        assert n_neighbors == 1
        return nearest_distances(queries, torch.from_numpy(self.gallery))


def test_an_index_searches_all_patches(monkeypatch):
    X, X_test = waves(8), waves(3, seed=1)
    exact = make().fit(X)
    monkeypatch.setattr(patch_svdd, "ApproximateIndex", ExactIndex)
    model = make(algorithm="nndescent").fit(X)
    assert {name: len(index.gallery) for name, index in model.indices_.items()} == {
        "small": 8 * 15**2,
        "large": 8 * 7**2,
    }
    assert model.offset_ == exact.offset_
    assert_array_equal(model.localize(X_test), exact.localize(X_test))
    model.gallery_ = None
    assert_array_equal(model.score_samples(X_test), exact.score_samples(X_test))
    assert "approximate index" in model._why_not_exported()
    assert not hasattr(model.set_params(algorithm="brute").fit(X), "indices_")


# what it is for


def test_a_planted_defect_is_found():
    X, X_test = waves(24), waves(6, seed=1)
    X_test[:3, 8:18, 10:20] = X_test[:3, 8:18, 10:20].transpose(0, 2, 1, 3)[:, ::-1]
    mask = np.zeros((3, 32, 32), bool)
    mask[:, 8:18, 10:20] = True
    model = make(max_epochs=10).fit(X)
    maps = model.localize(X_test)
    assert pixel_roc_auc_score(mask, maps[:3]) > 0.8
    scores = model.score_samples(X_test)
    assert scores[:3].max() < scores[3:].min()


def test_the_graph_finds_the_same():
    X, X_test = waves(6), waves(2, seed=1)
    model = make().fit((255 * X).astype(np.uint8))
    module = model._as_module().eval()
    X_test = (255 * X_test).astype(np.uint8)
    with torch.inference_mode():
        maps, scores = module(torch.from_numpy(X_test))
    expected = model.localize(X_test)
    scale = expected.max()
    assert_allclose(maps, expected, rtol=1e-4, atol=1e-4 * scale)
    assert_allclose(scores, model.score_samples(X_test), rtol=1e-4)
    assert model._why_not_exported() is None
