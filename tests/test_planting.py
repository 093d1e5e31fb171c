"""Planted defects: only the mask changes, whatever the type and the size of images."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from skanomaly.datasets import load_textures, plant_defects

KINDS = ["blur", "hole", "patch", "scratch", "stain"]


def noise(n, *shape, dtype=np.uint8, seed=0):
    images = np.random.default_rng(seed).uniform(0, 255, (n, *shape))
    return np.rint(images).astype(np.uint8) if dtype == np.uint8 else images / 255


@pytest.mark.parametrize(
    "images",
    [
        noise(10, 32, 32, 1),
        noise(10, 40, 57),
        noise(10, 64, 33, 3),
        noise(10, 48, 48, 3, dtype=float),
        noise(10, 48, 48, dtype=float).astype(np.float32),
        noise(10, 32, 32, dtype=float).astype(np.float16) * 6 - 3,
        noise(10, 32, 32).astype(np.uint16) * 257,
        noise(10, 32, 32, 6),
        noise(10, 32, 32) // 128,  # two grey levels only
    ],
    ids=lambda images: f"{images.dtype}-{images.shape}",
)
def test_only_the_mask_changes(images):
    given, n = images.copy(), len(images)
    planted = plant_defects(images, random_state=0)
    assert_array_equal(images, given)
    assert planted.X.dtype == images.dtype
    assert planted.X.shape == (2 * n, *images.shape[1:])
    assert_array_equal(planted.X[:n], images)
    assert_array_equal(planted.y, [1] * n + [-1] * n)
    assert_array_equal(planted.groups, [*range(n), *range(n)])
    differs = images[planted.groups] != planted.X
    differs = differs.reshape(*differs.shape[:3], -1).any(axis=-1)
    assert_array_equal(planted.masks, differs)
    assert_array_equal(planted.masks.any(axis=(1, 2)), planted.y == -1)
    assert sorted(set(planted.defect_names[n:])) == KINDS
    assert planted.X.min() == images.min()
    assert planted.X.max() == images.max()


def test_sizes_and_strengths_are_many():
    good = np.repeat(load_textures(n_train=20, n_test=1, size=128).X_train, 5, axis=0)
    planted = plant_defects(good, random_state=0)
    covered = planted.masks[100:].mean(axis=(1, 2))
    changes = np.abs(planted.X[100:].astype(float) - good)[..., 0]
    for kind in KINDS:
        own = planted.defect_names[100:] == kind
        assert own.sum() == 20
        assert covered[own].max() > 4 * covered[own].min(), kind
        strengths = changes[own].max(axis=(1, 2))
        assert strengths.max() > 1.5 * strengths.min(), kind
        assert strengths.min() >= 0.05 * (int(good.max()) - good.min()), kind
    assert covered.min() < 0.005
    assert 0.1 < covered.max() < 0.3


def test_grey_images_of_three_channels_stay_grey():
    images = np.repeat(noise(10, 32, 32, 1), 3, axis=3)
    planted = plant_defects(images, random_state=0)
    assert (planted.X[..., :1] == planted.X).all()


def test_patches_come_from_other_images():
    levels = np.linspace(0, 1, 6)[:, None, None]
    planted = plant_defects(np.broadcast_to(levels, (6, 64, 64)), random_state=0)
    assert planted.defect_names[6 + 2] == "patch"
    # a blur of one grey level shows nowhere; the next kind stands in for it
    assert_array_equal(
        planted.defect_names[6:], ["hole", "hole", "patch", "scratch", "stain", "hole"]
    )


def test_planting_is_seeded():
    images = noise(5, 32, 32, 3)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, same, other = (plant_defects(images, random_state=s) for s in (0, 0, 1))
    assert_array_equal(first.X, same.X)
    assert_array_equal(first.masks, same.masks)
    assert (first.masks != other.masks).any()
    assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_one_image_is_enough():
    assert plant_defects(noise(1, 32, 32), random_state=0).masks[1].any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (noise(2, 31, 64), "at least 32 pixels"),
        (noise(2, 3, 64, 64), "channels stand last"),
        (noise(2, 64), r"\(n, H, W, C\)"),
        (noise(0, 64, 64), r"\(n, H, W, C\)"),
        (["a.png", "b.png"], r"\(n, H, W, C\).*LoadImages"),
        (np.full((2, 32, 32), np.nan), "NaN"),
        (np.ones((2, 32, 32)), "All pixels of X are equal"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        plant_defects(images, random_state=0)
