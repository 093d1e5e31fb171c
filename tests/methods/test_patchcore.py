"""Tests of PatchCore against slow searches, and of the choice of its patches."""

from itertools import islice

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import cdist

from skanomaly import BackboneFeatures, PatchCore
from skanomaly._tensors import neighbors
from skanomaly._tensors.neighbors import (
    farthest_rows,
    nearest_distances,
    traceable_nearest_distances,
)
from skanomaly.datasets import load_textures

SMALL = {
    "PatchCore": {
        "backbone": "shufflenet_v2_x0_5",
        "layers": ("stage2",),
        "weights": None,
    }
}

LEAVE_ONE_OUT = (
    "asks for thresholds from the training images' own scores, but these are distances "
    "to themselves; thresholds come from the distances to the patches of other images"
)
EXPECTED_FAILURES = {
    "PatchCore": {
        "check_outliers_train": LEAVE_ONE_OUT,
        "check_outliers_fit_predict": LEAVE_ONE_OUT,
    }
}

NETWORK = {"backbone": "resnet18", "weights": None, "random_state": 0}


@pytest.fixture(scope="module")
def textures():
    return load_textures(n_train=10, n_test=6, size=64, random_state=1)


@pytest.fixture(scope="module")
def precomputed(textures):
    """Return features of training and test images in one layer, patches as they are."""
    transformer = BackboneFeatures(layers=("layer2",), **NETWORK)
    return (
        transformer.fit_transform(textures.X_train),
        transformer.transform(textures.X_test),
    )


def make(**parameters):
    settings = {"backbone": "precomputed", "patch_size": 1, "sigma": 0.0}
    return PatchCore(random_state=0, **{**settings, **parameters})


def rows_of(features):
    return features["layer2"].reshape(-1, features["layer2"].shape[-1])


# the choice of patches


def slow_choice(rows, n, generator):
    start = rows[torch.randperm(len(rows), generator=generator)[:10]]
    nearest = torch.cdist(rows, start).mean(dim=1)
    chosen = []
    for _ in range(n):
        chosen.append(int(nearest.argmax()))
        distances = (rows - rows[chosen[-1]]).norm(dim=1)
        nearest = torch.minimum(nearest, distances)
    return chosen


@pytest.mark.parametrize("block_rows", [7, 64, 1024])
def test_choice_equals_a_slow_one(monkeypatch, block_rows):
    monkeypatch.setattr(neighbors, "BLOCK_ROWS", block_rows)
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(3))
    expected = slow_choice(rows.double(), 60, torch.Generator().manual_seed(1))
    found = farthest_rows(rows, generator=torch.Generator().manual_seed(1))
    assert list(islice(found, 60)) == expected


def test_choice_covers_better_than_chance():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 3, generator=generator)
    chosen = list(islice(farthest_rows(rows, generator=generator), 60))
    distances = torch.cdist(rows, rows[chosen])
    radii = [distances[:, :n].amin(dim=1).amax().item() for n in range(1, 61)]
    assert (np.diff(radii) <= 1e-6).all()
    drawn = rows[torch.randperm(600, generator=generator)[:60]]
    assert radii[-1] < torch.cdist(rows, drawn).amin(dim=1).amax().item()


def test_every_row_is_chosen_once():
    rows = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    found = list(farthest_rows(rows, generator=torch.Generator().manual_seed(0)))
    assert sorted(found) == list(range(100))


def test_traceable_search_equals_the_other():
    queries, gallery = torch.randn(40, 6) + 9, torch.randn(300, 6) + 9
    for n_neighbors in (1, 5):
        settings = {"n_neighbors": n_neighbors}
        found = traceable_nearest_distances(queries, gallery, **settings)
        for own, expected in zip(
            found, nearest_distances(queries, gallery, **settings), strict=True
        ):
            assert_allclose(own, expected, rtol=1e-6)


# maps and scores


def test_maps_equal_brute_force(precomputed):
    train, test = precomputed
    detector = make(coreset=1.0).fit(train)
    assert_array_equal(detector.bank_, rows_of(train))
    expected = cdist(rows_of(test), rows_of(train)).min(axis=1)
    maps = detector.localize(test)
    assert_allclose(maps.ravel(), expected, rtol=1e-4)
    assert_allclose(-detector.score_samples(test), maps.max(axis=(1, 2)), rtol=1e-6)


def test_images_with_all_their_patches_kept_score_zero(textures):
    detector = PatchCore(coreset=1.0, **NETWORK).fit(textures.X_train)
    assert (detector.score_samples(textures.X_train) == 0).all()
    assert (detector.localize(textures.X_train) == 0).all()
    assert detector.offset_ < 0
    assert detector.map_threshold_ > 0


def test_coreset_is_a_share_of_the_patches(precomputed):
    train, test = precomputed
    everything = rows_of(train)
    detector = make(coreset=0.1).fit(train)
    assert detector.bank_.shape == (64, 128)
    assert (cdist(detector.bank_, everything).min(axis=1) == 0).all()
    more = make(coreset=0.5).fit(train)
    assert (more.localize(test) <= detector.localize(test) + 1e-5).mean() > 0.95


def test_thresholds_leave_the_image_out(precomputed):
    train, _ = precomputed
    detector = make(coreset=1.0, contamination=0.5).fit(train)
    scores = []
    for i in range(len(train)):
        others = rows_of(np.delete(train, i))
        scores.append(cdist(rows_of(train[[i]]), others).min(axis=1).max())
    assert_allclose(detector.offset_, np.percentile(-np.array(scores), 50), rtol=1e-4)


def test_copies_are_no_others(precomputed):
    train, _ = precomputed
    with pytest.warns(UserWarning, match="copies"):
        doubled = make(coreset=1.0, contamination=0.5)
        doubled.fit(np.concatenate([train, train]))
    once = make(coreset=1.0, contamination=0.5).fit(train)
    assert_allclose(doubled.offset_, once.offset_, rtol=1e-3)


def test_weight_of_the_score(precomputed):
    train, test = precomputed
    detector = make(coreset=1.0, n_reweighting_neighbors=4).fit(train)
    bank, expected = rows_of(train).astype(float), []
    for image in test:
        queries = rows_of(image[None]).astype(float)
        distances = cdist(queries, bank)
        worst = distances.min(axis=1).argmax()
        nearest = distances[worst].argmin()
        others = np.argsort(cdist(bank[[nearest]], bank)[0])[:4]
        exponentials = np.exp(distances[worst, others])
        weight = 1 - np.exp(distances[worst, nearest]) / exponentials.sum()
        expected.append(weight * distances[worst, nearest])
    assert_allclose(-detector.score_samples(test), expected, rtol=1e-3)


def test_weight_by_one_neighbor_is_refused(precomputed):
    with pytest.raises(ValueError, match="n_reweighting_neighbors"):
        make(n_reweighting_neighbors=1).fit(precomputed[0])


# further images


def test_partial_fit_adds_and_thins_out(precomputed):
    train, test = precomputed
    detector = make(coreset=0.2).fit(train[:6])
    before = detector.localize(test)
    detector.partial_fit(train[6:])
    assert len(detector.bank_) == round(0.2 * 640)
    assert (cdist(detector.bank_, rows_of(train)).min(axis=1) == 0).all()
    assert (detector.localize(test) != before).any()
    everything = make(coreset=1.0).fit(train[:6]).partial_fit(train[6:])
    assert_allclose(
        everything.localize(test), make(coreset=1.0).fit(train).localize(test)
    )


def test_same_seed_same_bank(textures):
    banks = [PatchCore(**NETWORK).fit(textures.X_train).bank_ for _ in range(2)]
    assert_array_equal(*banks)
    other = PatchCore(**{**NETWORK, "random_state": 1, "weights": None})
    assert other.fit(textures.X_train).bank_.shape == banks[0].shape
