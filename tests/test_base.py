import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from pretend_device import PretendDevice

from skanomaly._fitting import batches
from skanomaly._fitting.batches import resolve_device
from skanomaly._fitting.loop import seeded
from skanomaly._validation import check_images

TEXTURES = np.random.default_rng(1).random((4, 16, 16, 1))


@pytest.fixture(scope="module")
def detector(small):
    """Return a function that makes a small DRAEM with noise for textures."""

    def make(**settings):
        return small("DRAEM", textures=TEXTURES, **settings)

    return make


@pytest.fixture(scope="module")
def X(random_images):
    return random_images(16, 16, 20, 1)


@pytest.fixture(scope="module")
def fitted(X, detector):
    """Trained until maps and scores clearly differ between the images."""
    return detector(
        contamination=0.4,
        random_state=3,
        pooling_size=48,
        max_epochs=8,
        learning_rate=1e-2,
        batch_size=4,
    ).fit(X)


@pytest.fixture(scope="module")
def one_epoch(X, detector):
    return detector().fit(X)


@pytest.fixture(scope="module")
def fitted_on_half(X, detector):
    """Fitted on the first eight images alone."""
    return detector().fit(X[:8])


# What is no image


@pytest.mark.parametrize(
    "paths",
    [
        ["a.png", "b.png"],
        [Path("a.png"), Path("b.png")],
        np.array(["a.png", "b.png"]),
        np.array([Path("a.png"), Path("b.png")]),
        "folder",
        Path("folder"),
    ],
    ids=["list", "list of Path", "array", "array of Path", "string", "Path"],
)
def test_paths_ask_for_load_images(paths, fitted, detector):
    for method in (detector().fit, fitted.predict):
        with pytest.raises(ValueError, match=r"paths.*DRAEM.*LoadImages\(\)"):
            method(paths)


def test_a_series_of_paths_asks_for_load_images(detector):
    pandas = pytest.importorskip("pandas")
    names = pandas.Series(["a.png", "b.png"], name="path")
    for X in (names, names.to_frame(), names.to_frame().to_numpy()):
        with pytest.raises(ValueError, match=r"LoadImages\(\)"):
            detector().fit(X)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_another_shape_names_both(kind, fitted, random_images):
    for method in (fitted.predict, fitted.localize, fitted.segment):
        with pytest.raises(ValueError, match=r"\(20, 16, 1\).*DRAEM.*\(16, 20, 1\)"):
            method(kind(random_images(2, 20, 16)))
    with pytest.raises(ValueError, match=r"\(16, 20, 3\).*\(16, 20, 1\)"):
        fitted.score_samples(kind(random_images(2, 16, 20, 3)))
    with pytest.raises(ValueError, match=r"300 features.*expecting 320 features"):
        fitted.score_samples(kind(random_images(2, 300)))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(kind, value, X, fitted, detector):
    broken = X.copy()
    broken[3, 5, 7] = value
    for method in (detector().fit, fitted.localize):
        with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
            method(kind(broken))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_too_few_images(kind, X, fitted, detector):
    with pytest.raises(ValueError, match=r"1 sample.*minimum of 2 is required by DRAE"):
        detector().fit(kind(X[:1]))
    for method in (detector().fit, fitted.predict):
        with pytest.raises(ValueError, match=r"0 sample.*minimum of \d is required"):
            method(kind(X[:0]))
    assert fitted.predict(kind(X[:1])).shape == (1,)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_images_without_pixels(kind, detector):
    with pytest.raises(ValueError, match=r"\(4, 0, 5, 1\).*empty"):
        detector().fit(kind(np.empty((4, 0, 5, 1))))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("shape", [(8,), (8, 2, 4, 4, 3)])
def test_arrays_of_other_dimensions(kind, shape, detector, random_images):
    with pytest.raises(ValueError, match=r"(?s)(wants images|Expected 2D array)"):
        detector().fit(kind(random_images(*shape)))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_complex_numbers(kind, X, detector):
    with pytest.raises(ValueError, match=r"[Cc]omplex"):
        detector().fit(kind(X + 1j))


def test_image_shape_must_agree_with_the_rows_and_the_images(X, detector):
    with pytest.raises(ValueError, match=r"320 features.*\(16, 16, 1\).*DRAEM.*256"):
        detector(image_shape=(16, 16)).fit(X.reshape(16, -1))
    with pytest.raises(ValueError, match=r"\(16, 20, 1\).*image_shape=\(20, 16\)"):
        detector(image_shape=(20, 16)).fit(X)
    model = detector(image_shape=(16, 20)).fit(X)
    assert model.image_shape_ == (16, 20, 1)


@pytest.mark.parametrize(
    ("n_features", "image_shape", "expected"),
    [
        (48, (4, 4, 3), (4, 4, 3)),
        (48, [6, 8], (6, 8, 1)),
        (49, None, (7, 7, 1)),
        (47, None, (1, 47, 1)),  # more would be warned of
    ],
)
def test_rows_are_read_as_images(n_features, image_shape, expected, detector):
    model, rows = detector(), np.arange(2.0 * n_features).reshape(2, -1)
    images = check_images(model, rows, reset=True, image_shape=image_shape)
    assert model.image_shape_ == expected
    assert model.n_features_in_ == n_features
    np.testing.assert_array_equal(images, rows.reshape(2, *expected))


def test_bad_input_costs_no_training(X, detector):
    model = detector()
    with pytest.raises(ValueError, match="y has length"):
        model.fit(X, np.ones(3))
    assert not hasattr(model, "network_")


# What is taken without a word


def test_tensors_give_the_scores_of_arrays(X, fitted, one_epoch, detector):
    tensors = torch.from_numpy(X)
    model = detector().fit(tensors)
    np.testing.assert_array_equal(model.score_samples(X), one_epoch.score_samples(X))
    for method in ("score_samples", "predict", "localize", "segment"):
        np.testing.assert_array_equal(
            getattr(fitted, method)(tensors), getattr(fitted, method)(X)
        )


def test_tensors_of_bytes_are_divided_by_255(detector, random_images):
    images = (255 * random_images(4, 8, 8, 3)).astype(np.uint8)
    model = detector().fit(images)
    maps = model.localize(images)
    np.testing.assert_array_equal(model.localize(torch.from_numpy(images)), maps)
    np.testing.assert_allclose(model.localize(images / 255), maps, atol=1e-6)


def test_lists_give_the_scores_of_arrays(X, fitted):
    scores = fitted.score_samples(X)
    np.testing.assert_array_equal(fitted.score_samples(list(X)), scores)
    np.testing.assert_array_equal(fitted.score_samples(X.tolist()), scores)


def test_data_frames_of_rows_leave_their_names(X, one_epoch, detector):
    pandas = pytest.importorskip("pandas")
    names = [f"pixel{i}" for i in range(320)]
    frame = pandas.DataFrame(X.reshape(16, -1), columns=names)
    model = detector(image_shape=(16, 20)).fit(frame)
    assert model.feature_names_in_.tolist() == names
    np.testing.assert_array_equal(
        model.score_samples(frame), one_epoch.score_samples(X)
    )
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame.iloc[:, ::-1])


def test_memory_maps_are_read_in_batches(tmp_path, X, one_epoch, detector):
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    model = detector().fit(mapped)
    np.testing.assert_array_equal(model.localize(mapped), one_epoch.localize(X))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(4, 6, 6, 3), (4, 6, 6), (4, 36)])
def test_checking_copies_nothing(tmp_path, dtype, shape, detector):
    np.save(tmp_path / "X.npy", np.zeros(shape, dtype))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert np.shares_memory(check_images(detector(), mapped, reset=True), mapped)
    tensor = torch.zeros(shape)
    images = check_images(detector(), tensor, reset=True)
    assert images.data_ptr() == tensor.data_ptr()


# Labels


def test_anomalous_images_are_left_out(X, fitted_on_half, detector):
    rows = np.sort(np.random.default_rng(0).permutation(16)[:8])
    mixed, y = np.empty_like(X), np.full(16, -1)
    mixed[rows], y[rows] = X[:8], 1
    mixed[y == -1] = X[8:]
    for images in (mixed, torch.from_numpy(mixed)):
        model = detector().fit(images, y.tolist())
        np.testing.assert_array_equal(
            model.score_samples(X), fitted_on_half.score_samples(X)
        )
        assert model.offset_ == fitted_on_half.offset_
        assert model.map_threshold_ == fitted_on_half.map_threshold_


@pytest.mark.parametrize("dtype", [bool, np.uint8, float])
def test_masks_tell_the_anomalous_images(dtype, X, fitted_on_half, detector):
    masks = np.zeros((16, 16, 20), dtype)
    masks[np.arange(8, 16), np.arange(8), np.arange(8)] = 1
    model = detector().fit(X, masks)
    np.testing.assert_array_equal(
        model.score_samples(X), fitted_on_half.score_samples(X)
    )


def test_other_labels_are_ignored_with_a_warning_that_states_the_rule(
    X, one_epoch, detector
):
    rule = r"\+1 for normal and -1 for anomalous.*holds \[0, 1\].*labels_from\(y"
    with pytest.warns(UserWarning, match=rule):
        model = detector().fit(X, np.repeat([0, 1], 8))
    np.testing.assert_array_equal(model.score_samples(X), one_epoch.score_samples(X))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.ones(15), "y has length 15, but X 16"),
        (np.zeros((15, 16, 20)), "y has length 15, but X 16"),
        (1, "y has length 1, but X 16"),
        (np.ones((16, 2)), r"y has shape \(16, 2\).*labels .* masks"),
        (-np.ones(16), r"label \+1.*2 or more, but y marks n_samples = 0"),
        (np.repeat([1, -1], [1, 15]), "2 or more, but y marks n_samples = 1"),
        (np.ones((16, 16, 20)), "2 or more, but y marks n_samples = 0"),
    ],
)
def test_labels_that_cannot_be_used(y, message, X, detector):
    with pytest.raises(ValueError, match=message):
        detector().fit(X, y)


# Scores, maps and decisions


def test_the_contract_between_scores_and_decisions(X, fitted):
    scores = fitted.score_samples(X)
    assert scores.shape == (16,)
    assert scores.dtype == np.float64
    decisions = fitted.decision_function(X)
    np.testing.assert_array_equal(decisions, scores - fitted.offset_)
    np.testing.assert_array_equal(fitted.predict(X), np.where(decisions < 0, -1, 1))
    assert fitted.offset_ == np.percentile(scores, 40)
    assert (fitted.predict(X) == -1).sum() == 6

    peaks = fitted.localize(X).max(axis=(1, 2))
    assert fitted.map_threshold_ == pytest.approx(np.quantile(peaks, 0.6), rel=1e-6)


def test_segments_lie_above_the_threshold_in_anomalous_images(X, fitted):
    maps, labels = fitted.localize(X), fitted.predict(X)
    segments = fitted.segment(X)
    assert segments.dtype == bool
    high = maps > fitted.map_threshold_
    np.testing.assert_array_equal(segments, high & (labels == -1)[:, None, None])
    assert high[labels == 1].any()  # what predict calls normal stays unmarked
    assert segments.any()


def test_fit_predict_equals_fit_and_predict(X, one_epoch, detector):
    np.testing.assert_array_equal(detector().fit_predict(X), one_epoch.predict(X))


def test_bfloat16_maps_are_close(X, fitted, detector):
    model = detector(precision="bfloat16").fit(X)
    assert np.isfinite(model.loss_curve_).all()

    model = copy.deepcopy(fitted).set_params(precision="bfloat16")
    maps, expected = model.localize(X), fitted.localize(X)
    assert maps.dtype == np.float32
    assert 0 < np.abs(maps - expected).max() < 0.1 * np.ptp(expected)


def test_every_draw_of_random_state_gives_another_model(X, detector):
    generator = np.random.RandomState(0)
    first, second = (detector(random_state=generator).fit(X) for _ in range(2))
    assert not np.array_equal(first.score_samples(X), second.score_samples(X))


# Generators and devices


def test_seeded_restores_the_generator_even_after_an_error():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with seeded(7):
        inside = torch.rand(4)
    with pytest.raises(RuntimeError, match="inside"), seeded(7):
        assert torch.equal(torch.rand(4), inside)
        raise RuntimeError("inside")
    assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(inside, expected)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), inside)


def test_the_device_of_a_tensor_is_taken_unless_one_is_named():
    tensor = torch.zeros(2, device="meta")
    assert resolve_device("auto", tensor) == torch.device("meta")
    assert resolve_device("cpu", tensor) == torch.device("cpu")
    for name in ("foo", ""):
        with pytest.raises(ValueError, match=f"device='{name}' is no device of torch"):
            resolve_device(name)
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        assert resolve_device("auto", np.zeros(2)) == torch.device("cpu")
        for name in ("cuda", "cuda:1", "mps"):
            with pytest.raises(ValueError, match=f"device='{name}'.*no such device"):
                resolve_device(name)


# What a refused fit, and a file, leave behind


@pytest.mark.parametrize(
    ("images", "labels"), [((24, 24, 1), ["a"] * 12), ((24, 24, 1), [1])]
)
def test_a_fit_that_refuses_leaves_the_estimator_as_it_was(
    images, labels, detector, random_images
):
    X = random_images(12, 16, 20, 1)
    model = detector().fit(X)
    before = pickle.dumps(model)
    with pytest.raises(ValueError, match="y "):
        model.fit(random_images(12, *images), labels)
    assert pickle.dumps(model) == before


@pytest.mark.parametrize("mode", ["r+", "c", "r"])
def test_a_warm_start_does_not_write_into_a_mapped_file(mode, small, tmp_path, X):
    path = tmp_path / "detector.joblib"
    joblib.dump(small("Autoencoder", warm_start=True).fit(X), path)
    content = path.read_bytes()
    joblib.load(path, mmap_mode=mode).fit(X)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("fitted_on", "asked"),
    [
        (lambda X: (X - 0.45) / 0.22, lambda X: X),
        (lambda X: 2 * X - 1, lambda X: X),
        (lambda X: 16 * X, lambda X: X),
        (lambda X: 255 * X, lambda X: X),
        (lambda X: 255 * X, lambda X: (255 * X).astype(np.uint8)),
    ],
)
def test_another_scale_than_that_of_the_fit_warns(fitted_on, asked, small, X):
    with pytest.warns(UserWarning, match="taken to lie in"):
        model = small("Autoencoder").fit(fitted_on(X))
    with pytest.warns(UserWarning, match="X holds.*was fitted on values"):
        model.score_samples(asked(X))


def test_textures_on_another_scale_are_refused(small, X):
    with pytest.raises(ValueError, match=r"textures holds values from 0 to 255"):
        small("DRAEM", textures=np.tile([0, 255], (4, 16, 8))).fit(X)


def test_threads_see_a_network_on_one_device_only(small, X, monkeypatch):
    """Threads that ask for tensors of another device wait until all of it is there."""
    model = small("Autoencoder", device="auto").fit(X)
    expected = model.score_samples(X)
    monkeypatch.setattr(batches, "is_there", lambda device: True)
    model.set_params(device="cuda")

    def score(number):
        with PretendDevice():
            return model.score_samples(X)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(score, range(8)):
            np.testing.assert_array_equal(found, expected)
    assert next(model.network_.parameters()).device.type == "cuda"


def test_long_predictions_show_their_progress(X, one_epoch, capsys):
    """A bar comes up after a second, so that short calls stay silent."""
    quiet, told = copy.copy(one_epoch), copy.copy(one_epoch)
    told.set_params(verbose=1, batch_size=3)
    capsys.readouterr()
    quiet.score_samples(X)
    told.score_samples(X)  # takes no second
    assert capsys.readouterr().err == ""
    rows = batches.slices(7, 3, verbose=1)
    assert next(rows) == slice(0, 3)
    time.sleep(1.1)
    assert list(rows) == [slice(3, 6), slice(6, 7)]
    assert "7/7" in capsys.readouterr().err
