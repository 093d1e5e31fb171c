import subprocess
import sys

import joblib
import numpy as np
import pytest
from PIL import Image
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline as SklearnPipeline
from sklearn.preprocessing import FunctionTransformer

from skanomaly import (
    SPADE,
    BackboneFeatures,
    CenterCropImages,
    LoadImages,
    ResizeImages,
)
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


def save_images(folder, n=8, size=40):
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(n)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(path)
    return paths


def test_maps_of_a_real_pipeline_have_the_size_of_the_files(tmp_path):
    paths = save_images(tmp_path)
    pipeline = make_pipeline(
        LoadImages(),
        ResizeImages(size=64),
        CenterCropImages(size=48),
        BackboneFeatures(
            backbone="shufflenet_v2_x0_5",
            layers=("stage2",),
            weights=None,
            random_state=0,
        ),
        SPADE(backbone="precomputed", layers=("stage2",), image_score="max"),
    ).fit(paths)
    odd = np.asarray(Image.open(paths[0])).copy()
    odd[10:20, 22:32] = 255
    Image.fromarray(odd).save(tmp_path / "odd.png")
    (found,) = pipeline.localize([tmp_path / "odd.png"])
    assert found.shape == (40, 40)
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert 8 <= row < 22
    assert 20 <= column < 34


@pytest.mark.parametrize("pretrained", [False, pytest.param(True, id="pretrained")])
def test_a_file_scores_the_same_in_another_process(pretrained, tmp_path, request):
    weights = None
    if pretrained:
        folder = request.getfixturevalue("shared_data").parent / "weights"
        weights = tmp_path / "resnet18.pth"
        weights.write_bytes((folder / "resnet18-imagenet-to-layer3.pth").read_bytes())
    paths = save_images(tmp_path)
    spade = SPADE(backbone="resnet18", weights=weights, random_state=0)
    pipeline = make_pipeline(LoadImages(), spade).fit(paths)
    expected = pipeline.score_samples(paths), pipeline.localize(paths)
    joblib.dump(pipeline, tmp_path / "pipeline.joblib")
    if pretrained:
        weights.unlink()
        fitted = pipeline[-1]
        gallery = sum(a.nbytes for a in fitted.gallery_.values())
        size = (tmp_path / "pipeline.joblib").stat().st_size
        assert size - gallery - fitted.embeddings_.nbytes < 25e6
    code = (
        "import joblib, numpy, pathlib, socket, sys, torch\n"
        "def refuse(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "torch.set_num_threads(1)\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "pipeline = joblib.load(folder / 'pipeline.joblib')\n"
        "paths = [folder / f'{number}.png' for number in range(8)]\n"
        "numpy.savez(folder / 'out.npz', scores=pipeline.score_samples(paths),"
        " maps=pipeline.localize(paths))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(out["scores"], expected[0])
    np.testing.assert_array_equal(out["maps"], expected[1])
