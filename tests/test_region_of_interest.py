"""Pixels outside of a region of interest are left out of account."""

import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from skanomaly import (
    SPADE,
    Autoencoder,
    LoadImages,
    PaDiM,
    PatchDetector,
    RegionOfInterest,
    ThresholdCalibrator,
    TiledDetector,
    make_pipeline,
)

MASK = np.zeros((32, 32), bool)
MASK[4:26, 8:28] = True
MASK[20:, 20:] = False


def textures(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(100, 140, (n, size, size, 3), np.uint8)


def disturbed(X, masks, seed=7):
    """Return images with other pixels outside of masks."""
    noise = np.random.default_rng(seed).integers(0, 256, X.shape, np.uint8)
    noise = noise if X.dtype == np.uint8 else (noise / 255).astype(X.dtype)
    return np.where(np.broadcast_to(masks, X.shape[:3])[..., None], X, noise)


def by_corner(images):
    """Return a mask of each image, which lies where its first pixel says."""
    masks = np.zeros(images.shape[:3], bool)
    for mask, image in zip(masks, images, strict=True):
        top = int(1000 * float(image[0, 0, 0])) % 3
        mask[2 + top : 28 + top, 3:-3] = True
    return masks


# What detectors see of it


def outputs(estimator, X):
    report = estimator.inspect(X)
    return {
        **report,
        "decisions": estimator.decision_function(X),
        "localize": estimator.localize(X),
        "segment": estimator.segment(X),
    }


@pytest.mark.parametrize("method", [PatchDetector, SPADE, PaDiM, Autoencoder])
def test_nothing_outside_changes_anything(small, method):
    X, X_new = textures(12), textures(4, seed=1)
    X_new[::2, 10:14, 12:16] = 255
    pipeline = make_pipeline(RegionOfInterest(MASK), small(method)).fit(X)
    other = clone(pipeline).fit(disturbed(X, MASK))
    expected = outputs(pipeline, X_new)
    assert expected["labels"].min() == -1
    for estimator in (pipeline, other):
        found = outputs(estimator, disturbed(X_new, MASK, seed=8))
        for name, values in expected.items():
            assert_array_equal(found[name], values, err_msg=name)
    assert not expected["masks"][:, ~MASK].any()
    inside = expected["maps"][:, MASK].min(axis=1, keepdims=True)
    assert (expected["maps"][:, ~MASK] <= inside).all()


def test_calibrated_thresholds_do_not_depend_on_it(small):
    X = textures(12)
    pipeline = make_pipeline(RegionOfInterest(MASK), small(SPADE))
    calibrator = ThresholdCalibrator(pipeline, cv=2, false_positive_rate=0.2)
    expected, found = calibrator.fit(X), clone(calibrator).fit(disturbed(X, MASK))
    assert found.offset_ == expected.offset_
    assert found.map_threshold_ == expected.map_threshold_


def test_photographs_behind_it_are_tiled(small):
    X, mask = textures(4, size=96), np.zeros((96, 96), bool)
    mask[10:60, 20:90] = True
    pipeline = make_pipeline(
        RegionOfInterest(mask), TiledDetector(small(PatchDetector), tile_size=32)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # empty tiles are no copies to warn of
        pipeline.fit(X)
    X_new = textures(2, size=96, seed=1)
    X_new[0, 40:50, 60:70] = 255
    X_new[1, 70:80, 60:70] = 255
    report = pipeline.inspect(X_new)
    assert report.scores[0] < report.scores[1]
    assert report.labels[0] == -1 and report.masks[0].any()
    assert not report.masks[:, ~mask].any()
    assert_array_equal(pipeline.score_samples(disturbed(X_new, mask)), report.scores)


def test_boxes_are_in_pixels_of_the_photographs(small, tmp_path):
    X = textures(6)
    X[0, 10:14, 12:16] = 255
    X[0, :4] = 255
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, image in zip(paths, X.repeat(3, axis=1).repeat(2, axis=2), strict=True):
        Image.fromarray(image).save(path)
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    pipeline = make_pipeline(
        LoadImages(size=32), RegionOfInterest(tmp_path / "mask.png"), small(PaDiM)
    )
    report = pipeline.fit(paths[1:]).inspect(paths[:1])
    expected = make_pipeline(RegionOfInterest(MASK), small(PaDiM)).fit(
        LoadImages(size=32).transform(paths[1:])
    )
    regions = expected.inspect(LoadImages(size=32).transform(paths[:1])).regions
    assert_array_equal(report.regions["top"], 3 * regions["top"])
    assert_array_equal(report.regions["right"], 2 * regions["right"])
    assert len(regions) and regions["top"].min() >= 4


# What it does


@pytest.mark.parametrize("mask", [MASK, by_corner], ids=["one", "function"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_outside_lies_the_mean_of_what_is_inside(mask, dtype):
    X = textures(5)
    scale = 1 if dtype == np.uint8 else 255
    X = (X / scale).astype(dtype)
    masks = mask(X) if callable(mask) else np.broadcast_to(mask, X.shape[:3])
    region = RegionOfInterest(mask).fit(X)
    mean = X[masks].mean(axis=0, dtype=float)
    assert_allclose(region.fill_, mean * scale / 255)
    painted = region.transform(X)
    assert_array_equal(painted[masks], X[masks].astype(painted.dtype))
    if dtype == np.uint8:
        mean = np.rint(mean)
    assert_allclose(painted[~masks], np.broadcast_to(mean, painted[~masks].shape))
    assert painted.dtype == (np.uint8 if dtype == np.uint8 else np.float32)


def test_what_comes_in_stays_as_it_is():
    X = textures(3)
    for images in (X.copy(), torch.from_numpy(X.copy()), X.astype(np.float32) / 255):
        before = np.asarray(images).copy()
        RegionOfInterest(MASK).fit_transform(images)
        assert_array_equal(np.asarray(images), before)


def test_maps_outside_mark_nothing():
    X = textures(3)
    region = RegionOfInterest(MASK).fit(X)
    rng = np.random.default_rng(0)
    for maps in (rng.random(X.shape[:3]) + 1, rng.normal(size=X.shape[:3])):
        back = region.inverse_transform_maps(maps, X)
        assert_array_equal(back[:, MASK], maps[:, MASK].astype(np.float32))
        lowest = np.minimum(back[:, MASK].min(axis=1), 0)
        outside = np.broadcast_to(lowest[:, None], (3, (~MASK).sum()))
        assert_array_equal(back[:, ~MASK], outside)
    # masks that are all True are so inside only
    back = region.inverse_transform_maps(np.ones(X.shape[:3], bool), X)
    assert_array_equal(back > 0.5, np.broadcast_to(MASK, X.shape[:3]))


def test_a_function_sees_the_images_that_came_in():
    X = textures(5)
    region = RegionOfInterest(by_corner).fit(X)
    masks = by_corner(X)
    assert len(np.unique(masks.argmax(axis=1).max(axis=1))) > 1
    back = region.inverse_transform_maps(np.ones(X.shape[:3]), X)
    assert_array_equal(back > 0.5, masks)
    rows = X.reshape(5, -1)
    of_rows = RegionOfInterest(by_corner, image_shape=(32, 32, 3)).fit(rows)
    assert_array_equal(of_rows.transform(rows), region.transform(X))


def test_masks_of_integers_lists_and_files(tmp_path):
    X = textures(3)
    expected = RegionOfInterest(MASK).fit_transform(X)
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(200 * MASK.astype(np.uint8)).save(tmp_path / "mask.bmp")
    for mask in (
        MASK.astype(int),
        MASK.tolist(),
        torch.from_numpy(MASK),
        tmp_path / "mask.png",
        str(tmp_path / "mask.bmp"),
    ):
        assert_array_equal(RegionOfInterest(mask).fit_transform(X), expected)


def test_a_mask_set_after_fit_waits_for_the_next():
    X = textures(3)
    region = RegionOfInterest(MASK).fit(X)
    expected = region.transform(X)
    assert_array_equal(region.set_params(mask=~MASK).transform(X), expected)
    assert not np.array_equal(region.fit(X).transform(X), expected)
    assert not hasattr(region.set_params(mask=by_corner).fit(X), "mask_")


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (MASK[:, :30], r"mask has shape \(32, 30\).*\(H, W\) = \(32, 32\)"),
        (MASK[None], r"mask has shape \(1, 32, 32\)"),
        (np.zeros((32, 32), bool), "mask selects no pixel"),
        (MASK * 255, "Binarise at half"),
        (MASK * np.nan, "boolean or hold the integers"),
        (lambda X: MASK, r"returned an array of shape \(32, 32\).*\(3, 32, 32\)"),
        (lambda X: np.arange(3)[:, None, None] * MASK != 2 * MASK, "of image 2"),
        (None, "'mask' parameter"),
        (3, "'mask' parameter"),
    ],
)
def test_what_is_no_mask(mask, match):
    with pytest.raises(ValueError, match=match):
        RegionOfInterest(mask).fit(textures(3))


def test_files_that_are_no_masks(tmp_path):
    X = textures(3)
    with pytest.raises(FileNotFoundError, match=r"mask=.*is not a file"):
        RegionOfInterest(tmp_path / "no.png").fit(X)
    Image.fromarray(MASK[:, :30]).save(tmp_path / "mask.png")
    region = RegionOfInterest(tmp_path / "mask.png")
    match = r"mask=.*mask.png' has shape \(32, 30\).*behind LoadImages"
    with pytest.raises(ValueError, match=match):
        region.fit(X)
    Image.fromarray(~MASK | True).save(tmp_path / "mask.png")
    assert_array_equal(region.fit_transform(X), X)
    with pytest.raises(NotFittedError):
        RegionOfInterest(MASK).transform(X)
    with pytest.raises(ValueError, match=r"maps must have the shape \(3, 32, 32\)"):
        region.inverse_transform_maps(np.ones((3, 16, 16)), X)
