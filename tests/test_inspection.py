"""Reports in one pass, and the regions in them."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn import pipeline as sklearn_pipeline
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import Bunch

from skanomaly import (
    SPADE,
    CenterCropImages,
    LoadImages,
    MemAE,
    PatchDetector,
    Pipeline,
    ResizeImages,
    ThresholdCalibrator,
    images,
    localize,
    make_pipeline,
)
from skanomaly.inspection import find_regions, full_size_maps, inspect

BOX = ["top", "left", "bottom", "right"]


def boxes(regions):
    return [list(region) for region in regions[BOX]]


# find_regions


def regions_by_hand(masks, maps):
    """Walk from pixel to pixel, in the order in which scipy numbers regions."""
    for image, (mask, values) in enumerate(zip(masks, maps, strict=True)):
        left_over = set(zip(*map(list, np.nonzero(mask)), strict=True))
        label = 0
        while left_over:
            label += 1
            region, ahead = [], [min(left_over)]
            left_over.remove(ahead[0])
            while ahead:
                row, column = ahead.pop()
                region.append((row, column))
                near = {
                    (row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)
                } & left_over
                left_over -= near
                ahead.extend(near)
            rows, columns = zip(*region, strict=True)
            inside = [values[pixel] for pixel in region]
            yield (
                *(image, label, min(rows), min(columns)),
                *(max(rows) + 1, max(columns) + 1, len(region)),
                *(max(inside), np.mean(inside)),
            )


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.9])
def test_regions_equal_those_of_a_slow_walk(density):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(6, 13, 17)).astype(np.float32)
    masks = rng.random(maps.shape) < density
    masks[2] = False
    expected = list(regions_by_hand(masks, maps))
    regions = find_regions(masks, maps)
    *fields, mean = zip(*expected, strict=True)
    for field, values in zip(regions.dtype.names[:-1], fields, strict=True):
        np.testing.assert_array_equal(regions[field], values, err_msg=field)
    np.testing.assert_allclose(regions["mean"], mean, rtol=1e-5, atol=1e-6)


def test_labels_are_those_of_scipy_and_boxes_are_half_open():
    masks = np.random.default_rng(0).random((4, 20, 20)) < 0.2
    regions = find_regions(masks)
    for region in regions:
        labels, _ = ndimage.label(masks[region["image"]], np.ones((3, 3)))
        rows, columns = np.nonzero(labels == region["label"])
        assert len(rows) == region["area"]
        assert [rows.min(), columns.min()] == list(region[BOX[:2]])
        assert [rows.max() + 1, columns.max() + 1] == list(region[BOX[2:]])
    assert np.isnan(regions["peak"]).all() and np.isnan(regions["mean"]).all()


def test_small_regions_are_left_out_and_the_others_stay():
    masks = np.random.default_rng(0).random((4, 20, 20)) < 0.2
    maps = np.random.default_rng(1).random(masks.shape)
    every = find_regions(masks, maps)
    for least in (1, 2, 5, 1000):
        found = find_regions(masks, maps, min_area=least)
        np.testing.assert_array_equal(found, every[every["area"] >= least])
    assert 0 < len(find_regions(masks, min_area=5)) < len(every)


@pytest.mark.parametrize("n", [0, 3])
def test_empty_masks_have_no_regions(n):
    regions = find_regions(np.zeros((n, 8, 8), bool), np.ones((n, 8, 8)))
    assert regions.shape == (0,)
    assert regions.dtype.names == ("image", "label", *BOX, "area", "peak", "mean")
    assert regions.dtype == find_regions(np.ones((1, 2, 2), bool)).dtype


def test_regions_of_clips_tell_the_frame():
    masks = np.random.default_rng(0).random((2, 3, 8, 8)) < 0.3
    maps = np.random.default_rng(1).random(masks.shape)
    regions = find_regions(masks, maps)
    of_frames = find_regions(masks.reshape(6, 8, 8), maps.reshape(6, 8, 8))
    assert regions.dtype.names[:3] == ("image", "frame", "label")
    np.testing.assert_array_equal(
        3 * regions["image"] + regions["frame"], of_frames["image"]
    )
    for field in of_frames.dtype.names[1:]:
        np.testing.assert_array_equal(regions[field], of_frames[field])


def test_what_regions_are_not_found_in():
    masks, maps = np.ones((2, 4, 4), bool), np.ones((2, 4, 4))
    for wrong, match in [
        ((masks[0],), r"shape \(n, H, W\).*got \(4, 4\).*masks\[None\]"),
        ((masks * 255,), "Binarise at half"),
        ((maps * 0.5,), "Binarise at half"),
        ((masks, maps[:1]), r"shape of the masks, \(2, 4, 4\), got \(1, 4, 4\)"),
        ((masks, maps * np.nan), "maps must be finite"),
    ]:
        with pytest.raises(ValueError, match=match):
            find_regions(*wrong)
    with pytest.raises(TypeError, match="masks must be an array"):
        find_regions(None)
    with pytest.raises(TypeError, match=r"min_area must be an integer.*2\.5"):
        find_regions(masks, min_area=2.5)
    with pytest.raises(ValueError, match="min_area must be 1 or more, got 0"):
        find_regions(masks, min_area=0)


def test_regions_are_a_data_frame():
    pandas = pytest.importorskip("pandas")
    masks = np.random.default_rng(0).random((2, 9, 9)) < 0.2
    regions = find_regions(masks, masks.astype(float))
    frame = pandas.DataFrame(regions)
    assert list(frame.columns) == list(regions.dtype.names)
    assert (frame.groupby("image")["area"].sum() == masks.sum(axis=(1, 2))).all()


# Whatever holds a detector


class Bright(OutlierMixin, BaseEstimator):
    """What is brighter than one half is anomalous."""

    def fit(self, X, y=None):
        self.offset_ = -0.5
        return self

    def inspect(self, X):
        maps = np.asarray(X, np.float32).mean(axis=-1) / 255
        scores = -maps.max(axis=(1, 2)).astype(float)
        labels = np.where(scores < -0.5, -1, 1)
        masks = maps > 0.5
        regions = find_regions(masks, maps)
        return Bunch(
            scores=scores, labels=labels, maps=maps, masks=masks, regions=regions
        )

    def localize(self, X):
        return self.inspect(X).maps

    def segment(self, X):
        return self.inspect(X).masks

    def score_samples(self, X):
        return self.inspect(X).scores

    def predict(self, X):
        return self.inspect(X).labels


def textures(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(100, 140, (n, size, size, 3), np.uint8)


def with_squares(n, size=32, seed=1):
    X = textures(n, size, seed)
    X[::2, 8:16, 12:20] = 255
    X[0, 24:28, 2:6] = 0
    return X


def check(report, estimator, X):
    """Compare a report with the four calls."""
    np.testing.assert_array_equal(report.scores, estimator.score_samples(X))
    np.testing.assert_array_equal(report.labels, estimator.predict(X))
    np.testing.assert_array_equal(report.maps, localize(estimator, X))
    holder = getattr(estimator, "best_estimator_", estimator)
    if isinstance(holder, sklearn_pipeline.Pipeline):
        holder = Pipeline(holder.steps)
    np.testing.assert_array_equal(report.masks, holder.segment(X))
    np.testing.assert_array_equal(
        report.regions, find_regions(report.masks, report.maps)
    )
    assert len(report.regions) > 0


@pytest.fixture(scope="module")
def steps(small):
    X = textures(12, size=48)
    return make_pipeline(
        ResizeImages(size=40),
        CenterCropImages(size=32),
        small(SPADE, n_neighbors=2, image_score="max"),
    ).fit(X)


def test_a_pipeline_undoes_its_geometry(steps):
    X = with_squares(5, size=48)
    report = steps.inspect(X)
    assert report.maps.shape == report.masks.shape == X.shape[:3]
    check(report, steps, X)


def test_a_pipeline_sends_images_through_its_steps_once(steps, monkeypatch):
    calls, original = [], ResizeImages.transform

    def counting(self, X):
        calls.append(len(X))
        return original(self, X)

    monkeypatch.setattr(ResizeImages, "transform", counting)
    steps.inspect(with_squares(5, size=48))
    assert calls == [5]


def test_pipelines_and_searches_of_scikit_learn(steps, small):
    X = with_squares(5, size=48)
    plain = sklearn_pipeline.Pipeline(steps.steps)
    assert not hasattr(plain, "inspect")
    check(inspect(plain, X), plain, X)
    search = GridSearchCV(
        sklearn_pipeline.make_pipeline(ResizeImages(size=32), small(SPADE)),
        {"spade__image_score": ["max"]},
        scoring=lambda detector, X, y=None: 0.0,
        cv=KFold(2),
    ).fit(textures(12, size=48))
    check(inspect(search, X), search, X)
    frozen = FrozenEstimator(steps)
    np.testing.assert_array_equal(inspect(frozen, X).maps, steps.localize(X))
    np.testing.assert_array_equal(inspect(steps, X).regions, steps.inspect(X).regions)


@pytest.mark.parametrize("as_pipeline", [False, True])
@pytest.mark.parametrize("method", [SPADE, PatchDetector])
def test_a_calibrator_adds_p_values_and_uses_its_thresholds(small, method, as_pipeline):
    detector = small(method, image_score="max")
    if as_pipeline:
        resize = ("resize", ResizeImages(size=32))
        detector = sklearn_pipeline.Pipeline([resize, ("detect", detector)])
    calibrator = ThresholdCalibrator(detector, false_positive_rate=0.2, cv=2)
    with pytest.raises(NotFittedError):
        calibrator.inspect(textures(2))
    calibrator.fit(textures(12))
    X = with_squares(5)
    report = calibrator.inspect(X)
    check(report, calibrator, X)
    np.testing.assert_array_equal(report.p_values, calibrator.p_values(X))
    thresholds = calibrator.offset_, calibrator.map_threshold_
    assert (report.offset, report.map_threshold) == thresholds
    expected = np.where(report.scores < calibrator.offset_, -1, 1)
    np.testing.assert_array_equal(report.labels, expected)
    anomalous = report.labels == -1
    np.testing.assert_array_equal(
        report.masks[anomalous], report.maps[anomalous] > calibrator.map_threshold_
    )
    np.testing.assert_array_equal(inspect(calibrator, X).p_values, report.p_values)


def test_a_detector_without_maps_reports_scores_and_labels(small):
    detector = small(SPADE, gallery_size=0, n_neighbors=2).fit(textures(12))
    X = with_squares(5)
    for estimator in (detector, make_pipeline(ResizeImages(size=32), detector)):
        if estimator is not detector:
            estimator.fit(textures(12))
        report = estimator.inspect(X)
        assert sorted(report) == ["labels", "offset", "scores"]
        assert report.offset == detector.offset_
        np.testing.assert_array_equal(report.scores, estimator.score_samples(X))
        np.testing.assert_array_equal(report.labels, estimator.predict(X))


def test_clips_have_regions_by_frame(small):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 255, (6, 16, 32, 32), np.uint8)[..., None]
    detector = small(MemAE, clip_length=16, max_epochs=1).fit(X)
    detector.offset_, detector.map_threshold_ = np.inf, np.median(detector.localize(X))
    report = detector.inspect(X[:2])
    assert report.maps.shape == report.masks.shape == (2, 16, 32, 32)
    expected = find_regions(detector.segment(X[:2]), detector.localize(X[:2]))
    np.testing.assert_array_equal(report.regions, expected)
    assert set(report.regions["frame"]) == set(range(16))


def test_complaints_name_the_estimator(small):
    X = textures(2)
    with pytest.raises(TypeError, match="IsolationForest cannot inspect: inspect "):
        inspect(IsolationForest(), X)
    with pytest.raises(TypeError, match="GridSearchCV cannot inspect"):
        inspect(GridSearchCV(small(SPADE), {}), X)
    with pytest.raises(NotFittedError):
        small(SPADE).inspect(X)
    with pytest.raises(NotFittedError):
        make_pipeline(ResizeImages(size=32), small(SPADE)).inspect(X)
    last = sklearn_pipeline.make_pipeline(ResizeImages(), IsolationForest())
    assert not hasattr(Pipeline(last.steps), "inspect")
    assert not hasattr(ThresholdCalibrator(IsolationForest()), "inspect")


# Photographs


def save(path, pixels, orientation=1):
    """Save an image so that it is upright once its EXIF orientation is applied."""
    back = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(back(pixels)))
    image.save(path, exif=exif, lossless=True)


# sides of photographs in units of the 32 pixels that they are loaded to
SCALES = [(3, 5), (5, 3), (1, 1), (2, 7), (4, 4), (7, 2), (6, 1), (3, 8)]


@pytest.fixture
def photographs(tmp_path):
    """Black photographs of unequal sizes and orientations with two white squares."""
    paths, expected = [], []
    for number, (tall, wide) in enumerate(SCALES):
        pixels = np.zeros((32 * tall, 32 * wide, 3), np.uint8)
        # corners on the grid of the loaded pixels
        for top, left, bottom, right in [(4, 6, 9, 14), (20, 8, 26, 27)]:
            box = [top * tall, left * wide, bottom * tall, right * wide]
            pixels[box[0] : box[2], box[1] : box[3]] = 255
            area = (box[2] - box[0]) * (box[3] - box[1])
            expected.append([number, *box, area])
        suffix = ("png", "tif", "webp")[number % 3]
        paths.append(tmp_path / f"{number}.{suffix}")
        save(paths[-1], pixels, orientation=number + 1)
    return paths, expected


def test_planted_squares_are_found_in_pixels_of_the_photographs(photographs):
    paths, expected = photographs
    pipeline = make_pipeline(LoadImages(size=32), Bright()).fit(paths)
    report = pipeline.inspect(paths)
    fields = ["image", *BOX, "area"]
    assert [list(region) for region in report.regions[fields]] == expected
    assert report.masks.shape == (len(SCALES), 32, 32)
    for path, region in zip(np.repeat(paths, 2), report.regions, strict=True):
        top, left, bottom, right = region[BOX]
        whole = images.read_image(path)
        assert (whole[top:bottom, left:right] == 255).all()
    for path, full in zip(paths, full_size_maps(report.maps, paths), strict=True):
        assert full.shape == images.read_image(path).shape[:2]


@pytest.mark.parametrize("kind", ["crop", "nested start", "nested end", "mapped"])
def test_squares_are_found_behind_other_steps(photographs, kind, tmp_path):
    paths, expected = photographs
    load = LoadImages(size=32)
    # a square's distance to the border is more than what is cropped away
    crop, grow = CenterCropImages(size=28), ResizeImages(size=56)
    pipeline = {
        "crop": lambda: make_pipeline(load, crop, grow, Bright()),
        "nested start": lambda: make_pipeline(make_pipeline(load, crop), Bright()),
        "nested end": lambda: make_pipeline(
            FunctionTransformer(list), make_pipeline(load, crop, Bright())
        ),
        "mapped": lambda: make_pipeline(
            LoadImages(size=32, memmap=tmp_path / "cache"), crop, Bright()
        ),
    }[kind]().fit(paths)
    for _ in range(2):  # from the cache, at last
        regions = inspect(pipeline, paths).regions
        fields = ["image", *BOX, "area"]
        assert [list(region) for region in regions[fields]] == expected


def test_boxes_cover_what_was_scaled_and_areas_are_rounded(tmp_path):
    rng = np.random.default_rng(0)
    paths, sizes = [], [(37, 53), (5, 7), (101, 20), (640, 481)]
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}.png")
        Image.new("L", size[::-1]).save(paths[-1])
    masks = rng.random((4, 20, 30)) < 0.1
    regions = find_regions(masks, masks.astype(float))
    loader = LoadImages(size=(20, 30))
    scaled = loader.inverse_transform_regions(regions, paths)
    for before, after in zip(regions, scaled, strict=True):
        tall, wide = sizes[before["image"]]
        by = {"top": Fraction(tall, 20), "left": Fraction(wide, 30)}
        by |= {"bottom": by["top"], "right": by["left"]}
        for side in BOX:
            exact = int(before[side]) * by[side]
            whole = floor(exact) if side in ("top", "left") else ceil(exact)
            assert after[side] == whole
        area = int(before["area"]) * by["top"] * by["left"]
        assert after["area"] == max(1, floor(area + Fraction(1, 2)))
        assert list(before[["image", "label"]]) == list(after[["image", "label"]])
        assert list(before[["peak", "mean"]]) == list(after[["peak", "mean"]])
    assert len(loader.inverse_transform_regions(regions[:0], paths)) == 0


def test_only_headers_of_files_with_regions_are_read(photographs, monkeypatch):
    paths, _ = photographs
    regions = find_regions(np.eye(32, dtype=bool)[None].repeat(8, axis=0))
    opened, original = [], images.upright_shape

    def recording(path):
        opened.append(path)
        return original(path)

    monkeypatch.setattr(images, "upright_shape", recording)
    LoadImages(size=32).inverse_transform_regions(regions[[2, 5]], paths)
    assert opened == [str(paths[2]), str(paths[5])]
    # without a size nothing was scaled
    assert LoadImages().inverse_transform_regions(regions, paths) is regions
    assert len(opened) == 2


def test_a_loader_of_ones_own_may_scale_regions():
    class Halves(TransformerMixin, BaseEstimator):
        def fit(self, X, y=None):
            return self

        def __sklearn_is_fitted__(self):
            return True

        def transform(self, X):
            return X[:, ::2, ::2]

        def inverse_transform_regions(self, regions, X):
            regions = regions.copy()
            for field in BOX:
                regions[field] *= 2
            return regions

    X = np.zeros((1, 16, 16, 3), np.uint8)
    X[0, 4:8, 6:14] = 255
    report = make_pipeline(Halves(), Bright()).fit(X).inspect(X)
    assert boxes(report.regions) == [[4, 6, 8, 14]]


def test_maps_at_full_size_come_one_by_one(photographs):
    paths, _ = photographs
    maps = np.random.default_rng(0).random((3, 32, 32), np.float32)
    iterator = full_size_maps(maps, [*paths[:2], "no such file"])
    first, second = next(iterator), next(iterator)
    assert first.shape == (96, 160) and second.shape == (160, 96)
    assert first.dtype == np.float32
    with pytest.raises(FileNotFoundError):
        next(iterator)
    # a map of the size of its file is left as it is
    (same,) = full_size_maps(maps[2:3], paths[2:3])
    np.testing.assert_array_equal(same, maps[2])
    # as ResizeImages takes maps back
    resized = ResizeImages(size=32).fit(np.zeros((1, 96, 160, 1)))
    (expected,) = resized.inverse_transform_maps(maps[:1], np.zeros((1, 96, 160, 1)))
    np.testing.assert_array_equal(first, expected)


def test_masks_at_full_size_are_cut_at_one_half(photographs):
    paths, expected = photographs
    pipeline = make_pipeline(LoadImages(size=32), Bright()).fit(paths)
    full = [m > 0.5 for m in full_size_maps(pipeline.segment(paths), paths)]
    for number, mask in enumerate(full):
        wanted = [box for image, *box, _ in expected if image == number]
        assert boxes(find_regions(mask[None])) == wanted


def test_maps_and_paths_must_fit():
    with pytest.raises(ValueError, match=r"each of the 3 paths, got \(2, 4, 4\)"):
        full_size_maps(np.ones((2, 4, 4)), ["a", "b", "c"])
    with pytest.raises(ValueError, match="maps must be finite"):
        full_size_maps(np.full((1, 4, 4), np.nan), ["a"])
