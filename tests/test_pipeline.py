import numpy as np
import pytest
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline as SklearnPipeline
from sklearn.preprocessing import FunctionTransformer

from skanomaly.pipeline import Pipeline, make_pipeline


class Stateless(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def __sklearn_is_fitted__(self):
        return True


class Shrink(Stateless):
    """Mean of blocks of `factor` x `factor` pixels."""

    def __init__(self, factor=2):
        self.factor = factor

    def transform(self, X):
        n, height, width = X.shape
        f = self.factor
        return X.reshape(n, height // f, f, width // f, f).mean(axis=(2, 4))

    def inverse_transform_maps(self, maps, X):
        return maps.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


class Crop(Stateless):
    """Leave out a border; the way back puts zeros there."""

    def __init__(self, border=3):
        self.border = border

    def transform(self, X):
        b = self.border
        return X[:, b:-b, b:-b]

    def inverse_transform_maps(self, maps, X):
        b = self.border
        back = np.zeros(X.shape, dtype=maps.dtype)
        back[:, b:-b, b:-b] = maps
        return back


class Numbered(Stateless):
    """Stand-in for a loader: names of images to the images."""

    def transform(self, X):
        images = np.zeros((len(X), 26, 22))
        for image, name in zip(images, X, strict=True):
            row, column = map(int, name.split("-"))
            image[row, column] = 1.0
        return images


class Deviation(OutlierMixin, BaseEstimator):
    """Distance of each pixel to the mean training image."""

    def __init__(self, threshold=0.5):
        self.threshold = threshold

    def fit(self, X, y=None):
        self.mean_ = X.mean(axis=0)
        return self

    def localize(self, X):
        return np.abs(X - self.mean_).astype(np.float32)

    def segment(self, X):
        return self.localize(X) > self.threshold

    def score_samples(self, X):
        return -self.localize(X).max(axis=(1, 2))

    def predict(self, X):
        return np.where(self.score_samples(X) < -self.threshold, -1, 1)


class OnlyScores(OutlierMixin, BaseEstimator):
    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def predict(self, X):
        return np.ones(len(X))


NORMAL = np.zeros((4, 26, 22))


def spot(row, column):
    """One image with a bright block of 2 x 2 pixels on the grid of Crop then Shrink."""
    X = np.zeros((1, 26, 22))
    X[0, row : row + 2, column : column + 2] = 1.0
    return X


def pipelines():
    """The same chain, flat, nested at either end, and with steps that do nothing."""
    crop, shrink, detect = Crop(), Shrink(), Deviation()
    return {
        "flat": make_pipeline(crop, shrink, detect),
        "nested": make_pipeline(make_pipeline(crop, shrink), detect),
        "sklearn nested": make_pipeline(
            SklearnPipeline([("crop", crop), ("none", None), ("shrink", shrink)]),
            detect,
        ),
        "nested end": make_pipeline(crop, make_pipeline(shrink, detect)),
        "skipped": Pipeline(
            [
                ("pass", "passthrough"),
                ("crop", crop),
                ("same", FunctionTransformer()),
                ("none", None),
                ("shrink", shrink),
                ("detect", detect),
            ]
        ),
    }


@pytest.mark.parametrize("kind", pipelines())
def test_maps_return_through_all_geometry_steps(kind):
    pipeline = pipelines()[kind].fit(NORMAL)
    X = spot(9, 13)

    maps, segments = pipeline.localize(X), pipeline.segment(X)

    assert maps.dtype == np.float32
    assert segments.dtype == bool
    np.testing.assert_array_equal(maps, X)
    np.testing.assert_array_equal(segments, X == 1)


def test_steps_walk_back_in_reverse_order_with_their_own_input():
    X = np.random.default_rng(0).random((3, 26, 22))
    pipeline = make_pipeline(Crop(1), Shrink(2), Crop(2), Deviation()).fit(NORMAL)

    by_hand = Shrink(2).transform(Crop(1).transform(X))
    maps = np.zeros_like(by_hand)
    maps[:, 2:-2, 2:-2] = by_hand[:, 2:-2, 2:-2]
    expected = np.zeros_like(X)
    expected[:, 1:-1, 1:-1] = maps.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(pipeline.localize(X), expected, rtol=1e-6)


def test_maps_stop_at_the_first_array():
    pipeline = make_pipeline(Numbered(), Crop(), Deviation()).fit(["0-0", "1-1"])
    maps = pipeline.localize(["7-5", "10-18"])
    assert maps.shape == (2, 26, 22)
    assert [np.unravel_index(m.argmax(), m.shape) for m in maps] == [(7, 5), (10, 18)]


def test_fractional_segments_are_cut_at_one_half():
    class Blur(Shrink):
        def inverse_transform_maps(self, maps, X):
            wide = super().inverse_transform_maps(maps, X)
            return (wide + np.roll(wide, 1, axis=2) * 0.8) / 1.8

    pipeline = make_pipeline(Blur(), Deviation()).fit(NORMAL)
    X = spot(8, 12)
    # the shifted copy alone weighs 0.8 / 1.8 < 0.5
    np.testing.assert_array_equal(pipeline.segment(X), X == 1)


def test_scikit_learn_methods_still_work():
    pipeline = make_pipeline(Crop(), Shrink(), Deviation()).fit(NORMAL)
    X = np.concatenate([spot(9, 13), NORMAL[:1]])
    np.testing.assert_array_equal(pipeline.predict(X), [-1, 1])
    np.testing.assert_array_equal(pipeline.score_samples(X), [-1, 0])
    assert isinstance(pipeline[:-1], Pipeline)


def test_methods_exist_only_where_the_last_step_has_them():
    assert hasattr(make_pipeline(Crop(), Deviation()), "localize")
    assert hasattr(make_pipeline(Crop(), Deviation()), "segment")
    for last in (OnlyScores(), Crop(), "passthrough", None):
        pipeline = Pipeline([("crop", Crop()), ("last", last)])
        assert not hasattr(pipeline, "localize")
        assert not hasattr(pipeline, "segment")


def test_unfitted_pipeline_says_so():
    with pytest.raises(NotFittedError, match="Pipeline"):
        make_pipeline(Crop(), Deviation()).localize(NORMAL)


def test_parameters_clone_and_memory(tmp_path):
    pipeline = make_pipeline(Crop(), Deviation(), memory=str(tmp_path), verbose=True)
    pipeline.set_params(crop__border=5, deviation__threshold=0.25)
    copy = clone(pipeline).set_params(verbose=False)

    assert type(copy) is Pipeline
    assert list(copy.named_steps) == ["crop", "deviation"]
    assert pipeline.get_params()["verbose"] is True
    assert copy.get_params()["crop__border"] == 5
    assert copy.get_params()["deviation__threshold"] == 0.25
    maps = copy.fit(NORMAL).localize(spot(9, 13))
    np.testing.assert_array_equal(maps, spot(9, 13))
    assert any(tmp_path.iterdir())
