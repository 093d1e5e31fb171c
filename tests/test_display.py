import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import pipeline as sklearn_pipeline
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin
from sklearn.model_selection import GridSearchCV

from skanomaly import LoadImages, ThresholdCalibrator, localize
from skanomaly._backbones.sources import find_source
from skanomaly.display import MASK_COLOR, SEGMENT_COLOR, AnomalyMapDisplay
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

    def segment(self, X):
        return self.localize(X) > 0.5


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
    np.testing.assert_allclose(*drawn)
    np.testing.assert_allclose(drawn[0], images[1].squeeze() / 255)


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
    assert labels(masks=masks, segments=masks) == ["true mask", "segment"]


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
        np.testing.assert_array_equal(left.images[0].get_array(), images[i])
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
    with pytest.raises(ValueError, match=r"images must have shape.*\(3, 12, 10, 2\)"):
        AnomalyMapDisplay(images[..., :2], maps).plot()
    with pytest.raises(ValueError, match=r"maps must have .*\(3, 12, 10\); got"):
        AnomalyMapDisplay(images, maps[:2]).plot()
    with pytest.raises(ValueError, match=r"masks must have .*got \(3, 12, 9\)"):
        AnomalyMapDisplay.from_predictions(images, maps, masks=masks[..., 1:])


def test_a_good_image_alone_stays_dark():
    """The scale ends at the threshold of the maps, not at the image's own maximum."""
    maps = np.linspace(0.1, 0.2, 64).reshape(1, 8, 8)
    images = np.zeros((1, 8, 8))
    drawn = {
        threshold: AnomalyMapDisplay.from_predictions(
            images, maps, map_threshold=threshold
        ).axes_[0, 1]
        for threshold in (None, 0.15, 1.0)
    }
    for threshold, end in ((None, 0.2), (0.15, 0.2), (1.0, 1.0)):
        norm = drawn[threshold].images[-1].norm
        assert (norm.vmin, norm.vmax) == pytest.approx((0.1, end))


@pytest.fixture(scope="module")
def paths(tmp_path_factory, random_images):
    folder = tmp_path_factory.mktemp("images")
    names = [folder / f"{number}.png" for number in range(12)]
    for path, image in zip(names, random_images(12, 16, 16, 3), strict=True):
        Image.fromarray((255 * image).astype(np.uint8)).save(path)
    return names


HOLDERS = {
    "a pipeline of scikit-learn": lambda pipeline: sklearn_pipeline.Pipeline(
        pipeline.steps
    ),
    "a search": lambda pipeline: GridSearchCV(
        pipeline, {"spade__sigma": [2.0]}, scoring=lambda *args: 0.0, cv=2
    ),
    "a calibrated pipeline": lambda pipeline: ThresholdCalibrator(
        pipeline, false_positive_rate=0.3, cv=2
    ),
    "a search among calibrated pipelines": lambda pipeline: GridSearchCV(
        ThresholdCalibrator(pipeline, false_positive_rate=0.3, cv=2),
        {"cv": [2]},
        scoring=lambda *args: 0.0,
        cv=2,
    ),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_whatever_holds_a_detector_is_drawn(kind, paths, small):
    pipeline = make_pipeline(LoadImages(), small("SPADE"))
    holder = HOLDERS[kind](pipeline).fit(paths)
    display = AnomalyMapDisplay.from_estimator(holder, paths[:2])
    np.testing.assert_array_equal(display.images, LoadImages().transform(paths[:2]))
    np.testing.assert_array_equal(display.maps, localize(holder, paths[:2]))
    assert display.map_threshold == final_step(holder).map_threshold_
    assert display.segments.shape == (2, 16, 16)


def test_what_cannot_be_drawn_is_named(paths, small, random_images):
    with pytest.raises(TypeError, match="NoneType has no maps"):
        AnomalyMapDisplay.from_estimator(None, random_images(2, 8, 8))
    detector = small("SPADE").fit(LoadImages().transform(paths))
    with pytest.raises(TypeError, match="X holds paths, but SPADE has no step"):
        AnomalyMapDisplay.from_estimator(detector, paths)
