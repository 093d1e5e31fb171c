"""What scores images whose paper does not take the maximum of the map."""

import copy

import numpy as np
import pytest
from method_settings import labels_for
from scipy import ndimage

from skanomaly.metrics import video_scores

NAMES = ("DeScarGAN", "MemAE", "MNAD", "PNet", "SCADN", "SMAI")
OWN = {"DeScarGAN": "classifier", "MNAD": "mixture", "SMAI": "superpixel"}


@pytest.fixture(scope="module", params=NAMES)
def fitted(request, small, random_images):
    X = random_images(8, 16, 20, 1)
    detector = small(
        request.param, reference="training", smoothing_size=1, random_state=0
    )
    return detector.fit(X, labels_for(type(detector), 8)), X


def slow_mean(maps, size):
    """Mean over the pixels of a square that lie within the map."""
    kernel = np.ones((size, size))
    sums = [ndimage.convolve(m.astype(float), kernel, mode="constant") for m in maps]
    counts = ndimage.convolve(np.ones(maps.shape[1:]), kernel, mode="constant")
    return np.array(sums) / counts


def test_the_mean_training_map_is_subtracted(fitted):
    detector, X = fitted
    plain = copy.deepcopy(detector)
    labels = labels_for(type(detector), 8)
    plain.set_params(reference="none").fit(X, labels)
    assert not hasattr(plain, "mean_map_")
    raw = plain.localize(X)
    usual = (raw if labels is None else raw[labels == 1]).mean(axis=0)
    np.testing.assert_allclose(detector.mean_map_, usual, rtol=1e-4)
    np.testing.assert_allclose(detector.localize(X), raw - usual, atol=1e-5 * raw.max())
    # the paper's score knows no reference
    np.testing.assert_allclose(
        detector.score_samples(X), plain.score_samples(X), rtol=1e-5
    )


def test_the_maximum_is_that_of_the_smoothed_map(fitted):
    detector, X = fitted
    asked = copy.deepcopy(detector).set_params(image_score="max", smoothing_size=48)
    maps = asked.localize(X)
    np.testing.assert_allclose(
        asked.score_samples(X), -maps.max(axis=(1, 2)), rtol=1e-6
    )
    expected = slow_mean(detector.localize(X), 3)  # 48 of 256 pixels are 3 of 16
    np.testing.assert_allclose(maps, expected, atol=1e-5 * np.abs(expected).max())
    assert detector.image_score == OWN.get(type(detector).__name__, "mean")
    if type(detector).__name__ not in ("MNAD", "SMAI"):
        raw = maps_without_reference(detector, X)
        by_mean = copy.deepcopy(detector).set_params(image_score="mean")
        np.testing.assert_allclose(
            -by_mean.score_samples(X), raw.mean(axis=(1, 2)), rtol=1e-4
        )


def maps_without_reference(detector, X):
    return detector.localize(X) + detector.mean_map_


def test_clips_are_smoothed_frame_by_frame(small, random_images):
    clips = random_images(4, 3 * 16, 16, 1).reshape(4, 3, 16, 16, 1)
    detector = small("MemAE", clip_length=3, random_state=0).fit(clips)
    raw = detector.localize(clips)
    smooth = detector.set_params(smoothing_size=48).localize(clips)
    expected = np.array([slow_mean(frames, 3) for frames in raw])
    np.testing.assert_allclose(smooth, expected, rtol=1e-4)


def test_a_memory_that_is_written_is_scored_alike(small, random_images):
    X = random_images(6, 16, 16, 1)
    detector = small("MNAD", random_state=0, image_score="max").fit(X)
    detector.set_params(update_at_test=True, update_threshold=0.0)
    written = detector.score_samples(X)  # nothing is below the threshold
    detector.set_params(update_at_test=False)
    np.testing.assert_allclose(written, detector.score_samples(X), rtol=1e-5)


def test_measures_of_mnad_make_its_score(small, random_images):
    X = random_images(6, 16, 16, 1)
    detector = small("MNAD", random_state=0, score_weight=0.3).fit(X)
    measures = detector.measure(X)
    mixed = video_scores(**measures, video=np.zeros(6), score_weight=0.3)
    # of the training images, the ranges of the fit are those of the video
    np.testing.assert_allclose(-detector.score_samples(X), mixed, atol=1e-5)
    one = detector.measure(X[:1])
    assert one.psnr.shape == one.distance.shape == (1,)


def test_video_scores_scale_each_video():
    rng = np.random.default_rng(0)
    psnr, distance = rng.random((2, 9))
    video = np.array(list("aababbbaa"))
    expected = np.empty(9)
    for name in "ab":
        rows = np.flatnonzero(video == name)
        for row in rows:
            error, far = (
                (values[row] - min(values[rows]))
                / (max(values[rows]) - min(values[rows]))
                for values in (-psnr, distance)
            )
            expected[row] = 0.6 * error + 0.4 * far
    np.testing.assert_allclose(video_scores(psnr, distance, video), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": [1.0]}, "psnr, distance and video must have the same shape"),
        ({"psnr": [1.0, np.nan]}, "psnr must be finite"),
        ({"distance": ["a", "b"]}, "distance must hold real numbers"),
        ({"video": [0.0, np.nan]}, "video must hold a number or name"),
        ({"score_weight": 1.5}, r"score_weight=1.5 must be within \[0, 1\]"),
    ],
)
def test_bad_measures_are_refused(change, message):
    good = {"psnr": [1.0, 2.0], "distance": [0.1, 0.2], "video": [0, 0]}
    with pytest.raises(ValueError, match=message):
        video_scores(**{**good, **change})
