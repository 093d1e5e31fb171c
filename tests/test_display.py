import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import pipeline as sklearn_pipeline
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import Bunch

from skanomaly import LoadImages, ResizeImages, ThresholdCalibrator, localize
from skanomaly._backbones.sources import find_source
from skanomaly.display import (
    MASK_COLOR,
    SEGMENT_COLOR,
    AnomalyMapDisplay,
    ControlChartDisplay,
    ScoresDisplay,
)
from skanomaly.inspection import find_regions, inspect
from skanomaly.pipeline import final_step, make_pipeline

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


class Brightness(OutlierMixin, BaseEstimator):
    """The map is the brightness."""

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def localize(self, X):
        return X.mean(axis=-1).astype(np.float32)

    def inspect(self, X):
        maps = self.localize(X)
        masks = maps > 0.5
        regions = find_regions(masks, maps)
        return Bunch(maps=maps, masks=masks, regions=regions, map_threshold=0.5)


class Flat(TransformerMixin, BaseEstimator):
    """Stand-in for a loader: a path to an image whose grey its name tells."""

    def fit(self, X, y=None):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def transform(self, X):
        return np.stack([np.full((8, 9, 3), float(path)) for path in X])


def data(n=3, height=12, width=10):
    rng = np.random.default_rng(0)
    images = rng.random((n, height, width, 3))
    maps = images.mean(axis=-1) * np.arange(1, n + 1)[:, None, None]
    masks = np.zeros((n, height, width), dtype=bool)
    masks[1, 3:6, 0:4] = True
    return images, maps, masks


def outlines(axes, color):
    """The paths of the outlines of one colour."""
    wanted = matplotlib.colors.to_rgba(color)
    return [
        path
        for contour in axes.collections
        if np.allclose(contour.get_edgecolor(), wanted)
        for path in contour.get_paths()
        if len(path.vertices)
    ]


@pytest.mark.parametrize("constant", [False, True])
def test_maps_share_one_colour_scale(constant):
    images, maps, _ = data()
    maps = np.ones_like(maps) if constant else maps
    display = AnomalyMapDisplay(images, maps).plot()
    assert display.axes_.shape == (3, 2)
    assert display.figure_ is display.axes_[0, 0].figure
    for i, ax in enumerate(display.axes_[:, 1]):
        overlay = ax.images[-1]
        np.testing.assert_array_equal(overlay.get_array(), maps[i])
        assert overlay.norm is display.axes_[0, 1].images[-1].norm
    (colorbar,) = set(display.figure_.axes) - set(display.axes_.flat)
    if not constant:
        assert overlay.get_clim() == (maps.min(), maps.max())
        np.testing.assert_allclose(colorbar.get_ylim(), (maps.min(), maps.max()))


@pytest.mark.parametrize("kind", ["rgb", "grey", "grey channel"])
def test_uint8_and_float_images_look_the_same(kind):
    images, maps, _ = data()
    images = np.round(images * 255)
    images = {"rgb": images, "grey": images[..., 0], "grey channel": images[..., :1]}[
        kind
    ]
    drawn = [
        AnomalyMapDisplay(x, maps).plot().axes_[1, 0].images[0].get_array()
        for x in (images.astype(np.uint8), images / 255)
    ]
    np.testing.assert_array_equal(*drawn)
    expected = np.broadcast_to(images[1].reshape(12, 10, -1), (12, 10, 3))
    np.testing.assert_array_equal(drawn[0], expected)


def test_outlines_enclose_masks_and_segments():
    images, maps, masks = data()
    segments = np.zeros_like(masks)
    segments[2] = True
    axes = AnomalyMapDisplay(images, maps, masks=masks, segments=segments).plot().axes_

    counts = [[len(outlines(ax, MASK_COLOR)) for ax in row] for row in axes]
    assert counts == [[0, 0], [1, 1], [0, 0]]
    counts = [[len(outlines(ax, SEGMENT_COLOR)) for ax in row] for row in axes]
    assert counts == [[0, 0], [0, 0], [0, 1]]

    box = outlines(axes[1, 1], MASK_COLOR)[0].get_extents()
    np.testing.assert_array_equal(box.extents, [-0.5, 2.5, 3.5, 5.5])
    box = outlines(axes[2, 1], SEGMENT_COLOR)[0].get_extents()
    np.testing.assert_array_equal(box.extents, [-0.5, -0.5, 9.5, 11.5])
    assert axes[2, 1].get_xlim() == (-0.5, 9.5)
    assert axes[2, 1].get_ylim() == (11.5, -0.5)


def test_legend_names_only_what_is_drawn():
    images, maps, masks = data()

    def labels(**regions):
        legend = AnomalyMapDisplay(images, maps, **regions).plot().axes_[-1, 1].legend_
        return legend and [text.get_text() for text in legend.get_texts()]

    assert labels() is None
    assert labels(masks=masks) == ["true mask"]
    assert labels(masks=masks, segments=masks) == ["true mask", "found"]


def test_given_axes_are_used():
    images, maps, _ = data()
    figure, axes = plt.subplots(3, 4)
    display = AnomalyMapDisplay.from_predictions(images, maps, ax=axes[:, 2:])
    assert display.figure_ is figure
    assert [len(ax.images) for ax in axes[0]] == [0, 0, 1, 2]
    with pytest.raises(ValueError, match=r"ax must have shape \(3, 2\); got \(3, 4\)"):
        display.plot(ax=axes)


@pytest.mark.parametrize("from_paths", [False, True])
def test_from_estimator(from_paths):
    if from_paths:
        X = ["0.2", "0.9"]
        images = Flat().transform(X)
        estimator = make_pipeline(Flat(), Brightness()).fit(X)
    else:
        X = images = Flat().transform(["0.2", "0.9"])
        estimator = Brightness().fit(X)

    display = AnomalyMapDisplay.from_estimator(estimator, X)

    for i, (left, right) in enumerate(display.axes_):
        expected = np.rint(255 * images[i])
        np.testing.assert_array_equal(left.images[0].get_array(), expected)
        np.testing.assert_allclose(
            right.images[-1].get_array(), images[i].mean(axis=-1)
        )
    assert [len(outlines(ax, SEGMENT_COLOR)) for ax in display.axes_[:, 1]] == [0, 1]


def test_the_first_page_of_the_documentation(tmp_path, monkeypatch, capsys):
    try:
        find_source("efficientnet_lite0").pretrained()
    except ImportError:
        pytest.skip("needs skanomaly[offline]")
    page = Path(__file__).parents[1] / "doc" / "first_heat_map.rst"
    block = page.read_text().partition(".. code-block:: python")[2]
    lines = [line for line in block.splitlines() if line.strip()]
    end = next(i for i, line in enumerate(lines) if not line.startswith("   "))
    assert end == 10
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(textwrap.dedent("\n".join(lines[:end])), names)
    measure, value = capsys.readouterr().out.rsplit(maxsplit=1)
    assert measure == "image AUROC"
    assert float(value) > 0.95
    assert names["masks"].any(axis=(1, 2)).tolist() == [False, True, True, True, True]
    assert (tmp_path / "maps.png").stat().st_size > 10_000


def test_shapes_that_do_not_fit_are_named():
    images, maps, masks = data()
    with pytest.raises(ValueError, match=r"images must be paths.*\(3, 12, 10, 2\)"):
        AnomalyMapDisplay(images[..., :2], maps).plot()
    with pytest.raises(ValueError, match=r"maps must .* 3 images; got \(2, 12, 10\)"):
        AnomalyMapDisplay(images, maps[:2]).plot()
    with pytest.raises(ValueError, match=r"masks must .* got \(3, 2, 12, 10\)"):
        clips = masks[:, None].repeat(2, axis=1)
        AnomalyMapDisplay.from_predictions(images, maps, masks=clips)
    regions = find_regions(masks)
    regions["bottom"] += 10
    with pytest.raises(ValueError, match="image 1 reach beyond its 12 x 10 pixels"):
        AnomalyMapDisplay.from_predictions(images, maps, regions=regions)


@pytest.mark.parametrize(
    "threshold, expected",
    [(None, (-0.5, 0.4)), (0.3, (0, 0.6)), (-0.2, (-0.5, 0.1)), (-0.4, (-0.8, 0))],
)
def test_the_threshold_is_in_the_middle_of_the_scale(threshold, expected):
    maps = np.linspace(-0.5, 0.4, 64).reshape(1, 8, 8)
    images = np.zeros((1, 8, 8))

    def limits(**given):
        display = AnomalyMapDisplay.from_predictions(
            images, maps, map_threshold=threshold, **given
        )
        return display.axes_[0, 1].images[-1].get_clim()

    assert limits() == pytest.approx(expected)
    assert limits(vmin=-3) == pytest.approx((-3, expected[1]))
    assert limits(vmax=3) == pytest.approx((expected[0], 3))


def test_two_figures_compare_and_a_good_image_stays_dark():
    images, maps, _ = data()
    scales = [
        AnomalyMapDisplay.from_predictions(images, factor * maps, map_threshold=5.0)
        .axes_[0, 1]
        .images[-1]
        for factor in (1, 10)
    ]
    assert scales[0].get_clim() == scales[1].get_clim()
    colors = scales[0].cmap(scales[0].norm(maps[0]))
    assert colors[..., :3].max() < 0.5


def test_photographs_are_drawn_at_their_own_size(tmp_path):
    """Maps and masks are stretched over them, boxes are in their pixels."""
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    shapes = [(40, 60), (2100, 700)]
    for path, (height, width) in zip(paths, shapes, strict=True):
        Image.new("RGB", (width, height), (10, 20, 30)).save(path)
    maps = np.zeros((2, 20, 20))
    maps[:, 5:10, 4:16] = 1
    masks = maps > 0.5
    regions = LoadImages(size=20).inverse_transform_regions(find_regions(masks), paths)
    display = AnomalyMapDisplay.from_predictions(
        paths, maps, masks=masks, segments=masks, regions=regions
    )
    for (height, width), axes in zip(shapes, display.axes_, strict=True):
        extent = [-0.5, width - 0.5, height - 0.5, -0.5]
        assert {tuple(i.get_extent()) for ax in axes for i in ax.images} == {
            tuple(extent)
        }
        expected = [0.2 * width, 0.25 * height, 0.8 * width, 0.5 * height]
        (box,) = axes[0].patches
        np.testing.assert_allclose(
            box.get_bbox().extents, np.subtract(expected, 0.5), atol=1e-9
        )
        for ax, color in zip(axes, (MASK_COLOR, SEGMENT_COLOR), strict=True):
            (outline,) = outlines(ax, color)
            # the outline runs between pixels of the map
            np.testing.assert_allclose(
                outline.get_extents().extents, np.subtract(expected, 0.5), atol=1e-6
            )
    assert display.axes_[1, 0].images[0].get_array().shape == (1024, 341, 3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, random_images):
    folder = tmp_path_factory.mktemp("images")
    names = [folder / f"{number}.png" for number in range(12)]
    for path, image in zip(names, random_images(12, 16, 16, 3), strict=True):
        Image.fromarray((255 * image).astype(np.uint8)).save(path)
    return names


def search(estimator, **grid):
    return GridSearchCV(estimator, grid, scoring=lambda *args: 0.0, cv=2)


def calibrated(estimator):
    return ThresholdCalibrator(estimator, false_positive_rate=0.3, cv=2)


PLAIN = sklearn_pipeline.make_pipeline
HOLDERS = {
    "a pipeline": lambda load, detect: make_pipeline(load, detect),
    "a pipeline of scikit-learn": lambda load, detect: PLAIN(load, detect),
    "a search": lambda load, detect: search(PLAIN(load, detect), spade__sigma=[2.0]),
    "a calibrated pipeline": lambda load, detect: calibrated(PLAIN(load, detect)),
    "a search among calibrated pipelines": lambda load, detect: search(
        calibrated(make_pipeline(load, detect)), cv=[2]
    ),
    "a calibrated search": lambda load, detect: calibrated(
        search(make_pipeline(load, detect), spade__sigma=[2.0])
    ),
    "a calibrated detector behind": lambda load, detect: PLAIN(
        load, calibrated(detect)
    ),
    "a search behind": lambda load, detect: PLAIN(load, search(detect, sigma=[2.0])),
    "a step before": lambda load, detect: PLAIN(
        "passthrough", FunctionTransformer(list), load, detect
    ),
    "a pipeline behind": lambda load, detect: PLAIN(
        FunctionTransformer(list), PLAIN(load, detect)
    ),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_whatever_holds_a_detector_is_drawn(kind, paths, small):
    detector = small("SPADE", image_score="max")
    fitted = HOLDERS[kind](LoadImages(size=16), detector).fit(paths)
    for holder in (fitted, FrozenEstimator(fitted)):
        display = AnomalyMapDisplay.from_estimator(holder, paths[:2])
        assert display.images == paths[:2]
        np.testing.assert_array_equal(display.maps, localize(holder, paths[:2]))
        assert display.map_threshold == final_step(holder).map_threshold_
        report = inspect(holder, paths[:2])
        np.testing.assert_array_equal(display.segments, report.masks)
        np.testing.assert_array_equal(display.regions, report.regions)


def test_what_cannot_be_drawn_is_named(paths, small, random_images):
    with pytest.raises(TypeError, match="NoneType has no maps"):
        AnomalyMapDisplay.from_estimator(None, random_images(2, 8, 8))
    detector = small("SPADE").fit(LoadImages().transform(paths))
    with pytest.raises(TypeError, match="X holds paths, but SPADE has no step"):
        AnomalyMapDisplay.from_estimator(detector, paths)


# Scores


def heights(ax):
    """Return the number of images in each group of a histogram."""
    return [sum(bar.get_height() for bar in bars) for bars in ax.containers]


def names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_scores_are_drawn_by_class():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=50)
    y = np.repeat([1, -1], (20, 30))
    classes = np.repeat(["good", "hole", "scratch"], (20, 10, 20))
    for given, expected in [
        ({}, {"images (50)": 50}),
        ({"y": y}, {"good (20)": 20, "anomalous (30)": 30}),
        ({"y": (y == -1)[:, None, None]}, {"good (20)": 20, "anomalous (30)": 30}),
        (
            {"y": y, "classes": classes},
            {"good (20)": 20, "hole (10)": 10, "scratch (20)": 20},
        ),
        (
            {"classes": classes},
            {"good (20)": 20, "hole (10)": 10, "scratch (20)": 20},
        ),
    ]:
        display = ScoresDisplay.from_scores(scores, **given, offset=-1.5, bins=7)
        drawn = [c for c in display.ax_.containers if len(c) == 7]
        assert len(drawn) == len(expected)
        assert heights(display.ax_) == list(expected.values())
        assert sorted(names(display.ax_)) == sorted([*expected, "threshold"])
        (line,) = display.ax_.lines
        assert line.get_xdata()[0] == -1.5
        assert display.figure_ is display.ax_.figure
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        ScoresDisplay.from_scores(scores, classes=classes[1:])
    with pytest.raises(ValueError, match="y has length 49"):
        ScoresDisplay.from_scores(scores, y[1:])
    with pytest.raises(ValueError, match="must be \\+1 for normal"):
        ScoresDisplay.from_scores(scores, y + 1)


def test_scores_and_charts_of_estimators(small, random_images):
    holder = search(
        calibrated(PLAIN(ResizeImages(size=16), small("SPADE", image_score="max"))),
        cv=[2],
    ).fit(random_images(12, 16, 16, 3))
    X = random_images(12, 16, 16, 3, seed=1)
    calibrator = holder.best_estimator_
    _, ax = plt.subplots()
    display = ScoresDisplay.from_estimator(holder, X, ax=ax)
    assert display.ax_ is ax
    assert display.offset == calibrator.offset_
    np.testing.assert_array_equal(display.scores, calibrator.score_samples(X))

    chart = ControlChartDisplay.from_estimator(holder, X)
    assert chart.limit == calibrator.offset_
    np.testing.assert_array_equal(chart.values, display.scores)
    of_p_values = ControlChartDisplay.from_estimator(
        holder, X, response_method="p_values"
    )
    assert of_p_values.limit == 0.3
    np.testing.assert_array_equal(of_p_values.values, calibrator.p_values(X))
    # both mark what predict calls anomalous
    anomalous = np.flatnonzero(calibrator.predict(X) == -1)
    assert 0 < len(anomalous) < len(X)
    for drawn in (chart, of_p_values):
        np.testing.assert_array_equal(drawn.ax_.lines[1].get_xdata(), anomalous)

    with pytest.raises(TypeError, match="needs a ThresholdCalibrator, got SPADE"):
        ControlChartDisplay.from_estimator(
            small("SPADE"), X, response_method="p_values"
        )
    with pytest.raises(ValueError, match="'score_samples' or 'p_values', got 'predict"):
        ControlChartDisplay.from_estimator(holder, X, response_method="predict")


def test_a_chart_is_in_the_order_of_time():
    times = np.array(["2026-03-03", "2026-03-01", "2026-03-02"], "datetime64[D]")
    display = ControlChartDisplay.from_scores([3.0, 1.0, 2.0], limit=2.5, times=times)
    every, beyond, limit = display.ax_.lines
    assert every.get_ydata().tolist() == [1, 2, 3]
    assert beyond.get_ydata().tolist() == [1, 2]
    assert (every.get_xdata() == np.sort(times)).all()
    assert limit.get_ydata()[0] == 2.5
    assert names(display.ax_) == ["score", "anomalous", "limit"]
    assert display.ax_.get_xlabel() == "time"
    display = ControlChartDisplay.from_p_values([0.5, 0.1, 0.02], limit=0.1)
    assert display.ax_.lines[1].get_ydata().tolist() == [0.1, 0.02]
    assert display.ax_.get_yscale() == "log"
    assert len(ControlChartDisplay.from_scores([1.0, 2.0]).ax_.lines) == 1
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        ControlChartDisplay.from_scores([1.0, 2.0], times=[1])
    with pytest.raises(ValueError, match="kind must be 'score' or 'p-value', got 'p'"):
        ControlChartDisplay([1.0], kind="p").plot()
