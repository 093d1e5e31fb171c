"""Photographs judged tile by tile."""

import pickle
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

from skanomaly import (
    SPADE,
    Autoencoder,
    CenterCropImages,
    DeScarGAN,
    LoadImages,
    MemAE,
    PatchDetector,
    PNet,
    ThresholdCalibrator,
    TiledDetector,
    make_pipeline,
    onnx,
)
from skanomaly._fitting.batches import degrees_and_peaks
from skanomaly._tensors.filters import gaussian_blur
from skanomaly.base import BaseDetector
from skanomaly.inspection import find_regions
from skanomaly.model_selection import OneClassKFold
from skanomaly.tiling import shares, spread

BOX = ["top", "left", "bottom", "right"]


class Brightness(BaseDetector):
    """Bright spots are anomalous: the map is the blurred image, whatever fit saw."""

    _judged_by = ("sigma",)

    def __init__(
        self,
        *,
        sigma=2.0,
        of_tile=False,
        image_shape=None,
        batch_size=3,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.sigma = sigma
        self.of_tile = of_tile
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.contamination = contamination
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _fit(self, images, labels):
        self._begin_anew()
        return degrees_and_peaks(self._evaluate(images, maps_wanted=True))

    def _judge(self, images, *, maps_wanted, generator):
        maps = gaussian_blur(images.mean(dim=1), self.sigma)
        if self.of_tile:  # all pixels of a tile get its mean
            maps = maps.mean(dim=(1, 2), keepdim=True).expand_as(maps)
        return maps.amax(dim=(1, 2)), maps


def noise(n, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 200, (n, height, width, 3), np.uint8)


# Where tiles lie


@pytest.mark.parametrize("size", [2, 7, 16])
@pytest.mark.parametrize("side", [16, 17, 31, 32, 33])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
def test_tiles_reach_from_border_to_border_and_overlap(side, size, overlap):
    seen = []

    class Recorder(Brightness):
        def _evaluate(self, images, *, maps_wanted):
            seen.append(images)
            yield from super()._evaluate(images, maps_wanted=maps_wanted)

    X = noise(2, side, side)
    detector = TiledDetector(Recorder(sigma=0), tile_size=size, overlap=overlap)
    detector.fit(X).score_samples(X[:1])
    *_, tiles = seen
    starts = np.unique(tiles.array.places[:, 1])
    assert starts[0] == 0 and starts[-1] == side - size
    if len(starts) > 1:
        steps = np.diff(starts)
        assert 0 < steps.min() <= steps.max() <= max(1, size * (1 - overlap))
        assert np.ptp(steps) <= 1
    # those of the fit lie beside each other
    n = side // size
    assert len(detector.detector_._training_degrees) == 2 * n**2
    starts = spread(side, size, n)
    assert starts[0] >= 0 and starts[-1] + size <= side
    assert (np.diff(starts) >= size).all()
    assert starts[0] == side - size - starts[-1] or n == 1


@pytest.mark.parametrize("overlap", [0, 0.25, 0.7])
def test_shares_add_up_to_one_in_each_pixel(overlap):
    starts = spread(100, 32, 6)
    sums = np.zeros(100)
    for start, own in zip(starts, shares(starts, 32, 32 * overlap), strict=True):
        assert (own > 0).all()
        sums[start : start + 32] += own
    assert_allclose(sums, 1, atol=1e-6)


# Maps


def test_where_tiles_see_enough_the_map_is_that_of_the_whole():
    X = noise(3, 150, 210)
    whole = Brightness().fit(X)
    # the outer quarter of the overlap, 8 pixels, is as wide as the filter reaches
    tiled = TiledDetector(Brightness(), tile_size=64, overlap=0.5).fit(X)
    assert_allclose(tiled.localize(X), whole.localize(X), atol=1e-5)
    # here it is not: near the ends of tiles the map is another
    narrow = TiledDetector(Brightness(), tile_size=64, overlap=0.0).fit(X)
    differences = abs(narrow.localize(X) - whole.localize(X))
    assert differences.max() > 0.01
    starts = spread(210, 64, 4)
    inside = np.full(210, True)
    for end in (*starts[1:], *(starts[:-1] + 64)):
        inside[end - 8 : end + 8] = False
    assert differences[:, :35, inside].max() < 1e-5  # tiles begin at row 43


def test_maps_of_tiles_that_disagree_have_no_seams():
    X = noise(2, 192, 192)
    X[:, :96] //= 8
    steps = {}
    for overlap in (0, 0.25, 0.5):
        detector = Brightness(of_tile=True)
        tiled = TiledDetector(detector, tile_size=64, overlap=overlap).fit(X)
        (map_,) = tiled.localize(X[:1])
        spans = [abs(np.diff(map_, axis=axis)).max() for axis in (0, 1)]
        steps[overlap] = max(spans) / np.ptp(map_)
    assert steps[0] > 0.3
    # weights rise by one over half of the overlap, 8 and 16 pixels
    assert steps[0.25] < 1 / 8 + 0.01
    assert steps[0.5] < 1 / 16 + 0.01


def test_one_tile_is_what_the_detector_says(small):
    X = noise(8, 64, 64)
    for detector in (small(PatchDetector), small(SPADE), Brightness()):
        tiled = TiledDetector(detector, tile_size=64, contamination=0.2).fit(X)
        detector.set_params(contamination=0.2).fit(X)
        report, expected = tiled.inspect(X), detector.inspect(X)
        for name in ("scores", "labels", "maps", "masks", "regions"):
            assert_array_equal(report[name], expected[name], err_msg=name)
        assert_allclose(tiled.offset_, detector.offset_, rtol=1e-6)
        assert_allclose(tiled.map_threshold_, detector.map_threshold_, rtol=1e-6)


def test_localize_writes_into_out_and_segment_goes_by_thresholds():
    X = noise(3, 80, 100)
    X[1, 30:40, 50:60] = 255
    tiled = TiledDetector(Brightness(), tile_size=32).fit(X[[0, 2]])
    out = np.empty(X.shape[:3], np.float64)
    assert tiled.localize(X, out=out) is out
    maps = tiled.localize(X)
    assert_array_equal(out, maps)
    normal = tiled.score_samples(X) >= tiled.offset_
    assert not normal[1] and normal.any()
    assert_array_equal(tiled.predict(X), np.where(normal, 1, -1))
    expected = maps > tiled.map_threshold_
    expected[normal] = False
    assert_array_equal(tiled.segment(X), expected)
    assert_array_equal(tiled.inspect(X).regions, find_regions(expected, maps))


# Scores and thresholds


def cut(X, size):
    """Return the tiles (n, n_tiles, size, size, C) of images, without an overlap."""
    tiles = [
        X[:, top : top + size, left : left + size]
        for top in range(0, X.shape[1], size)
        for left in range(0, X.shape[2], size)
    ]
    return np.stack(tiles, axis=1)


def test_the_worst_tile_counts(small):
    X = noise(4, 64, 96)
    tiled = TiledDetector(small(PatchDetector), tile_size=32, overlap=0).fit(X)
    tiles = cut(X, 32)
    alone = clone(small(PatchDetector)).fit(tiles.reshape(-1, 32, 32, 3))
    scores = alone.score_samples(tiles.reshape(-1, 32, 32, 3))
    assert_allclose(tiled.score_samples(X), scores.reshape(4, 6).min(axis=1))
    worst = alone._training_degrees.reshape(4, 6).max(axis=1)
    assert tiled.offset_ == np.percentile(-worst, 1)
    highest = alone._training_peaks.reshape(4, 6).max(axis=1)
    assert tiled.map_threshold_ == np.quantile(highest, 0.99)


def test_tiles_that_are_not_drawn_are_judged_all_the_same():
    X = noise(4, 64, 96)
    every = TiledDetector(Brightness(), tile_size=32).fit(X)
    some = TiledDetector(Brightness(), tile_size=32, max_tiles=5, random_state=0)
    some.fit(X)
    assert len(some.detector_._training_degrees) == 5
    assert some.offset_ == every.offset_
    assert some.map_threshold_ <= every.map_threshold_
    highest = np.quantile(some.localize(X).max(axis=(1, 2)), 0.99)
    assert some.map_threshold_ >= highest - 1e-6
    more = clone(some).set_params(max_tiles=1000).fit(X)
    assert len(more.detector_._training_degrees) == 24


def test_tiles_of_spade_are_judged_without_themselves(small):
    # its own fit makes maps of 20 images at most
    X = noise(4, 96, 96)
    for image_score in ("knn", "max"):
        detector = small(SPADE, image_score=image_score, n_neighbors=2)
        tiled = TiledDetector(detector, tile_size=32, overlap=0, contamination=0.4).fit(
            X
        )
        degrees, peaks = tiled.detector_._leave_one_out()
        worst, highest = (v.reshape(4, 9).max(axis=1) for v in (degrees, peaks))
        assert tiled.offset_ == np.percentile(-worst, 40)
        assert tiled.map_threshold_ == np.quantile(highest, 0.6)


def test_equal_tiles_are_learned_once_and_without_a_warning():
    X = noise(3, 64, 64)
    X[:, :, 32:] = 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiled = TiledDetector(Brightness(), tile_size=32).fit(X)
    assert len(tiled.detector_._training_degrees) == 3 * 2 + 1
    whole = Brightness(sigma=2).fit(X[:, :, :32])
    assert_allclose(-tiled.offset_, whole._training_degrees.max(), rtol=0.05)


def test_anomalous_photographs_are_left_out():
    X = noise(4, 64, 64)
    X[1] = 255
    y = [1, -1, 1, 1]
    tiled = TiledDetector(Brightness(), tile_size=32).fit(X, y)
    normal_ones = TiledDetector(Brightness(), tile_size=32).fit(X[[0, 2, 3]])
    assert tiled.offset_ == normal_ones.offset_
    masks = np.zeros((4, 64, 64), bool)
    masks[1, 3, 3] = True
    assert TiledDetector(Brightness(), tile_size=32).fit(X, masks).offset_ == (
        tiled.offset_
    )


# What comes in


def test_mapped_photographs_are_read_tile_by_tile(tmp_path):
    X = noise(12, 320, 400)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    expected = TiledDetector(Brightness(), tile_size=64, random_state=0).fit(X)
    tiled = TiledDetector(Brightness(), tile_size=64, max_tiles=10, random_state=0)
    tracemalloc.start()
    tiled.fit(mapped)
    scores = tiled.score_samples(mapped)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < X.nbytes / 2
    assert_array_equal(scores, expected.score_samples(X))


def test_tensors_and_floats_are_judged_like_bytes(small):
    X = noise(4, 64, 96)
    tiled = TiledDetector(small(Autoencoder), tile_size=32)
    of_bytes = clone(tiled).fit(X)
    of_tensors = clone(tiled).fit(torch.from_numpy(X))
    assert_array_equal(of_tensors.localize(torch.from_numpy(X)), of_bytes.localize(X))
    of_floats = clone(tiled).fit(X / 255)
    assert_allclose(of_floats.localize(X / 255), of_bytes.localize(X), atol=1e-5)


def test_what_is_not_tiled():
    X = noise(3, 64, 96)
    for wrong, match in [
        (TiledDetector(Brightness(), tile_size=65), "64 x 96 pixels: take .*=64 or"),
        (TiledDetector(MemAE(clip_length=16), tile_size=32), "MemAE judges clips"),
        (TiledDetector(DeScarGAN(), tile_size=32), "DeScarGAN needs labels"),
        (TiledDetector(Brightness(), overlap=1.0), "'overlap' parameter"),
        (TiledDetector(Brightness(), overlap=-0.1), "'overlap' parameter"),
        (TiledDetector(Brightness(), tile_size=0), "'tile_size' parameter"),
        (TiledDetector(Brightness(), max_tiles=1), "'max_tiles' parameter"),
        (TiledDetector(IsolationForest(), tile_size=32), "'detector' parameter"),
        (TiledDetector(PatchDetector(sigma=-1), tile_size=32), "'sigma' parameter"),
    ]:
        with pytest.raises(ValueError, match=match):
            wrong.fit(X)
        with pytest.raises(NotFittedError):
            wrong.predict(X)
    tiled = TiledDetector(Brightness(), tile_size=32).fit(X)
    with pytest.raises(ValueError, match=r"\(64, 64, 3\).*fitted on.*\(64, 96, 3\)"):
        tiled.predict(X[:, :, :64])
    with pytest.raises(TypeError, match="cuts images into tiles; its detector_"):
        onnx.export(tiled, "never.onnx")


def test_a_detector_without_maps(small):
    X = noise(4, 64, 96)
    tiled = TiledDetector(small(SPADE, gallery_size=0), tile_size=32)
    assert not hasattr(tiled, "localize")
    assert sorted(tiled.fit(X).inspect(X)) == ["labels", "offset", "scores"]
    assert not hasattr(tiled, "map_threshold_")


def test_a_fit_of_more_arguments(small):
    tiled = TiledDetector(small(PNet), tile_size=32)
    assert tiled.fit(noise(2, 64, 64)).localize(noise(1, 64, 64)).shape == (1, 64, 64)


# The company it keeps


def test_seeds_decide_and_go_on_to_the_detector(small):
    X = noise(3, 64, 96)

    def scores(random_state, own):
        detector = small(PatchDetector, random_state=own)
        tiled = TiledDetector(
            detector, tile_size=32, max_tiles=9, random_state=random_state
        )
        return tiled.fit(X).score_samples(X)

    first = scores(0, None)
    assert_array_equal(scores(0, None), first)
    assert not np.array_equal(scores(1, None), first)
    assert not np.array_equal(scores(0, 5), first)


def test_a_prediction_writes_nothing_and_threads_agree(small):
    X = noise(3, 64, 96)
    tiled = TiledDetector(small(Autoencoder), tile_size=32).fit(X)
    content = pickle.dumps(tiled)
    expected = tiled.localize(X)
    tiled.inspect(X), tiled.segment(X), tiled.predict(X)
    assert pickle.dumps(tiled) == content
    with ThreadPoolExecutor(4) as pool:
        for maps in pool.map(lambda _: tiled.localize(X), range(12)):
            assert_array_equal(maps, expected)


@pytest.mark.parametrize("method", [Autoencoder, PatchDetector])
def test_files(small, method, tmp_path):
    X = noise(3, 64, 96)
    tiled = TiledDetector(small(method), tile_size=32).fit(X)
    joblib.dump(tiled, tmp_path / "tiled.joblib")
    for mmap_mode in (None, "r"):
        again = joblib.load(tmp_path / "tiled.joblib", mmap_mode=mmap_mode)
        assert_array_equal(again.localize(X), tiled.localize(X))
        assert_array_equal(again.predict(X), tiled.predict(X))


def test_parameters_set_after_fit():
    X = noise(3, 64, 96)
    tiled = TiledDetector(Brightness(), tile_size=32).fit(X)
    expected = tiled.localize(X)
    tiled.set_params(tile_size=48, detector__sigma=5)
    assert_array_equal(tiled.localize(X), expected)  # those of the fit
    tiled.set_params(overlap=0.5)
    assert not np.array_equal(tiled.localize(X), expected)
    with pytest.warns(UserWarning, match=r"overlap=0\.5 \(in fit 0\.25\)"):
        tiled.predict(X)


def test_a_search_among_settings_of_the_detector():
    X = np.concatenate([noise(6, 64, 96), noise(3, 64, 96, seed=1)])
    X[6:, 10:12, 20:22] = 255
    y = np.repeat([1, -1], [6, 3])
    search = GridSearchCV(
        TiledDetector(Brightness(), tile_size=32),
        {"detector__sigma": [30.0, 1.0], "overlap": [0, 0.5]},
        scoring="roc_auc",
        cv=OneClassKFold(2),
    ).fit(X, y)
    assert search.best_params_["detector__sigma"] == 1.0
    assert search.best_estimator_.detector_.sigma == 1.0


def test_a_calibrator_takes_maxima_of_blended_maps():
    X = noise(20, 64, 96)
    tiled = TiledDetector(Brightness(), tile_size=32)
    calibrator = ThresholdCalibrator(tiled, false_positive_rate=0.2).fit(X)
    # the detector learns nothing, so that all folds score alike
    assert_array_equal(
        calibrator.calibration_scores_, np.sort(tiled.fit(X).score_samples(X))
    )
    peaks = np.sort(tiled.localize(X).max(axis=(1, 2)))
    assert calibrator.map_threshold_ == peaks[-4]
    assert calibrator.estimator_.map_threshold_ == peaks[-4]
    X[0, 30:40, 40:50] = 255
    report = calibrator.inspect(X[:1])
    assert report.labels == [-1] and len(report.regions) > 0


# Photographs


def test_boxes_are_in_pixels_of_the_photograph_behind_size_and_crop(tmp_path):
    paths, expected = [], []
    for number, (tall, wide) in enumerate([(3, 5), (5, 3), (1, 1), (2, 7)]):
        pixels = np.full((96 * tall, 128 * wide, 3), 20, np.uint8)
        for top, left, bottom, right in [(20, 17, 29, 26), (60, 88, 65, 110)]:
            box = [top * tall, left * wide, bottom * tall, right * wide]
            pixels[box[0] : box[2], box[1] : box[3]] = 255
            expected.append([number, *box])
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    good = [tmp_path / "good 0.png", tmp_path / "good 1.png"]
    for path, pixels in zip(good, noise(2, 96, 128), strict=True):
        Image.fromarray(pixels).save(path)
    pipeline = make_pipeline(
        LoadImages(size=(96, 128)),
        CenterCropImages(size=(90, 100)),
        TiledDetector(Brightness(sigma=0), tile_size=32),
    )
    regions = pipeline.fit(good).inspect(paths).regions
    assert [list(region) for region in regions[["image", *BOX]]] == expected


@pytest.mark.parametrize("texture", ["brick", "gravel"])
def test_a_defect_of_20_pixels_is_found_in_photographs(texture, tmp_path):
    data = pytest.importorskip("skimage.data")
    photograph = getattr(data, texture)()
    crops = [photograph[:, start : start + 400] for start in range(0, 113, 28)]
    pixels = np.stack(crops)[..., None].repeat(3, axis=-1)
    rng = np.random.default_rng(0)
    pixels[4, 300:320, 200:220] = rng.integers(
        (140, 50, 40), (160, 70, 60), (20, 20, 3)
    )
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    detector = PatchDetector(
        backbone="efficientnet_lite0",
        layers=("blocks.2", "blocks.4"),
        patch_size=1,
        sigma=2.0,
        random_state=0,
    )
    load = LoadImages(memmap=tmp_path / "cache")
    pipeline = make_pipeline(load, TiledDetector(detector, tile_size=128))
    report = pipeline.fit(paths[:4]).inspect(paths[4:])
    assert report.labels == [-1]
    (region,) = report.regions
    box = np.array(region[BOX].tolist())
    assert abs(box - [300, 200, 320, 220]).max() <= 8
