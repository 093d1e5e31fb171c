"""What every detector and transformer promises: scikit-learn's checks and our own."""

import inspect
import pickle
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from joblib import parallel_config
from method_settings import ROUNDING, collect, labels_for, small_settings
from pretend_device import PretendDevice
from sklearn.base import TransformerMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator

import skanomaly
from skanomaly._fitting import batches
from skanomaly.base import BaseDetector, NetworkDetector
from skanomaly.inspection import find_regions
from skanomaly.metrics import make_localization_scorer, pixel_roc_auc_score
from skanomaly.model_selection import OneClassKFold

SMALL_BACKBONE = {
    "backbone": "shufflenet_v2_x0_5",
    "layers": ("stage2",),
    "weights": None,
}


def upper_half(images):
    """Return masks that are True in the upper half of images, at least in one row."""
    masks = np.zeros(images.shape[:3], bool)
    masks[:, : max(1, masks.shape[1] // 2)] = True
    return masks


TRANSFORMER_SETTINGS = {
    "BackboneFeatures": [SMALL_BACKBONE, {**SMALL_BACKBONE, "pool": True}],
    "CenterCropImages": [{}],
    "LoadImages": [{}],
    "RegionOfInterest": [{"mask": upper_half}],
    "ResizeImages": [{}],
    "ToDevice": [{"device": "cpu"}],
}

STRUCTURED = (
    "compares by assert_allclose, which takes no structured array; pool=True passes"
)

EXPECTED_FAILURES = {
    **collect("EXPECTED_FAILURES"),
    "BackboneFeatures": {
        "check_pipeline_consistency": STRUCTURED,
        "check_estimators_pickle": STRUCTURED,
        "check_transformer_data_not_an_array": STRUCTURED,
        "check_transformer_general": STRUCTURED,
        "check_methods_sample_order_invariance": STRUCTURED,
        "check_methods_subset_invariance": STRUCTURED,
        "check_fit_idempotent": STRUCTURED,
    },
    "ToDevice": {
        "check_fit_idempotent": "reads the result's dtype as NumPy's; it is a tensor's",
    },
}

# At least so many checks of scikit-learn run. Of LoadImages, whose input is paths,
# scikit-learn can check little but the constructor.
N_CHECKS = {"detector": 44, "transformer": 42, "LoadImages": 1}


def public_classes(base):
    classes = [getattr(skanomaly, name) for name in skanomaly.__all__]
    return [
        c
        for c in classes
        if inspect.isclass(c)
        and issubclass(c, base)
        and c is not skanomaly.TiledDetector  # which is another detector around one
    ]


DETECTORS = public_classes(BaseDetector)
LEARN_FROM_ANOMALIES = skanomaly.DeScarGAN, skanomaly.FCDD
UNSUPERVISED = [cls for cls in DETECTORS if cls not in LEARN_FROM_ANOMALIES]
NETWORK_DETECTORS = public_classes(NetworkDetector)
TRANSFORMERS = public_classes(TransformerMixin)


class DeScarGANOfClasses(skanomaly.DeScarGAN):
    """Takes the class labels that scikit-learn's checks make up."""

    def _check_y(self, y, n_samples):
        if y is not None:
            y = np.where(np.ravel(np.asarray(y)) == np.min(np.asarray(y)), 1, -1)
        return super()._check_y(y, n_samples)


CHECKED_AS = {skanomaly.DeScarGAN: DeScarGANOfClasses}


def small(cls, **parameters):
    """Return a detector of small size with a fixed seed."""
    return cls(**{"random_state": 0, **small_settings(cls), **parameters})


def striped(n, size=32, channels=3, seed=0):
    """Make images of noisy stripes."""
    rng = np.random.default_rng(seed)
    stripes = 0.5 + 0.3 * np.sin(np.arange(size) * np.pi / 4)
    images = stripes[:, None] + rng.normal(0, 0.03, (n, size, size, channels))
    return np.rint(255 * images.clip(0, 1)).astype(np.uint8)


class FittedDetectors(dict):
    """One fitted detector of every class, by class, fitted when first asked for."""

    def __missing__(self, cls):
        return self.setdefault(cls, small(cls).fit(striped(12), labels_for(cls, 12)))


@pytest.fixture(scope="module")
def fitted():
    return FittedDetectors()


LOAD_AND_SCORE = """
import pathlib, sys, joblib, numpy, torch

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
X = numpy.load(folder / "X.npy")
for path in sorted(folder.glob("*.joblib")):
    detector = joblib.load(path)
    numpy.savez(
        path.with_suffix(".npz"),
        scores=detector.score_samples(X),
        maps=detector.localize(X),
    )
"""


@pytest.fixture(scope="module")
def reloaded(fitted, tmp_path_factory):
    """Return scores and maps of a process that knows detectors from files only."""
    folder = tmp_path_factory.mktemp("detectors")
    np.save(folder / "X.npy", striped(3, seed=1))
    for cls in DETECTORS:
        joblib.dump(fitted[cls], folder / f"{cls.__name__}.joblib")
    subprocess.run([sys.executable, "-c", LOAD_AND_SCORE, str(folder)], check=True)
    return {path.stem: np.load(path) for path in folder.glob("*.npz")}


EVERY_SETTING = [
    *(pytest.param(cls, small_settings(cls), id=cls.__name__) for cls in DETECTORS),
    *(
        pytest.param(cls, settings, id=f"{cls.__name__}{number}")
        for cls in TRANSFORMERS
        for number, settings in enumerate(TRANSFORMER_SETTINGS[cls.__name__])
    ),
]
# scikit-learn's checks fit hundreds of images of a few pixels, at times of one
TINY = collect("TINY")


@pytest.mark.parametrize(("cls", "settings"), EVERY_SETTING)
def test_scikit_learn_checks(cls, settings):
    expected = EXPECTED_FAILURES.get(cls.__name__, {})
    if settings.get("pool"):
        expected = {}
    tiny = TINY.get(cls.__name__, {})
    if "batch_size" in cls(**settings).get_params():
        tiny = {**tiny, "batch_size": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            CHECKED_AS.get(cls, cls)(**settings).set_params(**tiny),
            expected_failed_checks=expected,
            on_skip=None,
            on_fail=None,
        )
    by_status = {}
    for result in results:
        by_status.setdefault(result["status"], {})[result["check_name"]] = result[
            "exception"
        ]
    assert not by_status.get("failed")
    # this one runs only where array API dispatch is switched on
    assert set(by_status.get("skipped", {})) <= {"check_array_api_input"}
    failed = {name for name in expected if expected[name] != ROUNDING}
    assert failed <= set(by_status.get("xfail", {})), "an expected failure passed"
    kind = "detector" if issubclass(cls, BaseDetector) else "transformer"
    ran = sum(result["status"] != "skipped" for result in results)
    assert ran >= N_CHECKS.get(cls.__name__, N_CHECKS[kind])


@pytest.mark.parametrize("cls", DETECTORS)
def test_maps(cls, fitted):
    X = striped(3, seed=1)
    maps = fitted[cls].localize(X)
    assert maps.shape == (3, 32, 32)
    assert maps.dtype == np.float32
    assert np.isfinite(maps).all()
    scores = fitted[cls].score_samples(X)
    assert scores.shape == (3,)
    assert scores.dtype == np.float64
    segments = fitted[cls].segment(X)
    assert segments.shape == (3, 32, 32)
    assert segments.dtype == bool


@pytest.mark.parametrize("cls", DETECTORS)
def test_inspect_is_four_calls_in_one_pass(cls, fitted, monkeypatch):
    X = striped(5, seed=1)
    detector = pickle.loads(pickle.dumps(fitted[cls])).set_params(batch_size=2)
    scores, maps = detector.score_samples(X), detector.localize(X)
    # thresholds that some images and pixels exceed
    detector.offset_, detector.map_threshold_ = np.median(scores), np.median(maps)
    labels, masks = detector.predict(X), detector.segment(X)
    n_calls = count_calls(monkeypatch, detector, "_evaluate")

    report = detector.inspect(X)

    assert len(n_calls) == 1
    assert set(labels) == {-1, 1}
    assert set(report) == {
        *("labels", "map_threshold", "maps", "masks", "offset", "regions", "scores")
    }
    assert report.offset == detector.offset_
    assert report.map_threshold == detector.map_threshold_
    for name, expected in {
        "scores": scores,
        "labels": labels,
        "maps": maps,
        "masks": masks,
        "regions": find_regions(masks, maps),
    }.items():
        assert report[name].dtype == expected.dtype
        np.testing.assert_array_equal(report[name], expected)
    assert set(report.regions["image"]) <= set(np.flatnonzero(labels == -1))
    assert report.regions["area"].sum() == masks.sum() > 0


def count_calls(monkeypatch, owner, method):
    """Return a list that grows by each call of a method of an object's class."""
    calls, original = [], getattr(type(owner), method)

    def counting(self, *args, **kwargs):
        calls.append(method)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(owner), method, counting)
    return calls


# numbers of images and epochs; the other methods have a planted defect of their own
PLANTED = collect("PLANTED")


@pytest.mark.parametrize("name", PLANTED)
def test_maps_are_high_where_anomalous(name):
    n, n_epochs = PLANTED[name]
    X, defective = striped(n), striped(4, seed=1)
    defective[:, 8:20, 10:22] = 255 - defective[:, 8:20, 10:22]
    mask = np.zeros((4, 32, 32), bool)
    mask[:, 8:20, 10:22] = True
    detector = small(getattr(skanomaly, name), max_epochs=n_epochs).fit(X)
    assert pixel_roc_auc_score(mask, detector.localize(defective)) > 0.65


@pytest.mark.parametrize("cls", DETECTORS)
def test_rows_are_images(cls):
    X = striped(8, channels=1)
    y = labels_for(cls, 8)
    by_image, by_row = small(cls).fit(X, y), small(cls).fit(X.reshape(8, -1), y)
    assert by_row.n_features_in_ == by_image.n_features_in_ == 32 * 32
    np.testing.assert_array_equal(
        by_image.localize(X[..., 0]), by_row.localize(X.reshape(8, -1))
    )


@pytest.mark.parametrize("cls", DETECTORS)
def test_bytes_equal_fractions(cls, fitted):
    X = striped(3, seed=1)
    np.testing.assert_array_equal(
        fitted[cls].localize(X), fitted[cls].localize(X / 255)
    )


def generator_states():
    """Return the states of the generators that a caller may draw from."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return pickle.dumps((torch.get_rng_state().numpy(), numpy_state, random.getstate()))


@pytest.mark.parametrize("cls", DETECTORS)
def test_seeds(cls):
    X, y = striped(8), labels_for(cls, 8)
    before = generator_states()
    # of the training images themselves a search may find the distance 0
    X_test = striped(8, seed=1)
    first = small(cls).fit(X, y).score_samples(X_test)
    assert generator_states() == before
    # whatever was drawn elsewhere
    torch.rand(3)
    np.testing.assert_array_equal(first, small(cls).fit(X, y).score_samples(X_test))
    other = small(cls).set_params(random_state=1).fit(X, y).score_samples(X_test)
    assert not np.array_equal(first, other)


# What a call leaves behind

PREDICTIONS = (
    "score_samples",
    "decision_function",
    "predict",
    "localize",
    "segment",
)
# the defaults, and settings that keep something from image to image or need maps
CALLED = [
    *(pytest.param(cls, {}, id=cls.__name__) for cls in DETECTORS),
    pytest.param(
        skanomaly.MNAD,
        {"update_at_test": True, "update_threshold": 1.0},
        id="MNAD updated",
    ),
    pytest.param(skanomaly.SPADE, {"image_score": "max"}, id="SPADE by maps"),
    pytest.param(
        skanomaly.Autoencoder, {"patch_size": 16}, id="Autoencoder of patches"
    ),
]


class WatchedDict(dict):
    """A ``__dict__`` that refuses to change."""

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"a prediction changed __dict__: {args} {kwargs}")

    __setitem__ = __delitem__ = __ior__ = refuse
    clear = pop = popitem = setdefault = update = refuse


@pytest.mark.parametrize(("cls", "settings"), CALLED)
def test_a_prediction_writes_nothing(cls, settings, monkeypatch):
    X, y = striped(8), labels_for(cls, 8)
    detector = small(cls, **settings).fit(X, y)
    content, generators = pickle.dumps(detector), generator_states()
    vars(detector)["offset_"] = np.inf  # all images are anomalous and get segments
    detector.__dict__ = WatchedDict(vars(detector))

    def refuse(self, name, *value):
        raise AssertionError(f"a prediction changed {name}")

    with monkeypatch.context() as patch:
        patch.setattr(cls, "__setattr__", refuse)
        patch.setattr(cls, "__delattr__", refuse)
        for method in (*PREDICTIONS, "inspect"):
            getattr(detector, method)(X)
    assert generator_states() == generators
    # what the attributes hold has not changed either
    detector.__dict__ = {**vars(detector), "offset_": pickle.loads(content).offset_}
    assert pickle.dumps(detector) == content


@pytest.mark.parametrize(("cls", "settings"), CALLED)
def test_threads_that_predict_together_get_what_one_gets(cls, settings):
    X, y = striped(8), labels_for(cls, 8)
    detector = small(cls, **settings).fit(X, y)
    calls = [(method, rows) for method in PREDICTIONS for rows in (2, 3)]
    expected = {call: getattr(detector, call[0])(X[: call[1]]) for call in calls}

    def same(number):
        method, rows = calls[number % len(calls)]
        found = getattr(detector, method)(X[:rows])
        return np.array_equal(found, expected[method, rows])

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(same, range(8 * 20 * len(PREDICTIONS))))
    assert all(results), f"{results.count(False)} of {len(results)} calls differ"


@pytest.mark.parametrize("cls", DETECTORS)
def test_a_search_in_threads_gives_what_one_in_turn_gives(cls):
    X = striped(12, size=24)
    y = np.where(np.arange(12) % 3, 1, -1)
    if not get_tags(cls()).target_tags.required:
        splits = OneClassKFold(2).split(X, y)
    else:
        splits = StratifiedKFold(2).split(X, y)
    search = GridSearchCV(
        small(cls),
        {"contamination": [0.01, 0.1]},
        scoring=lambda detector, X, y: detector.score_samples(X).sum(),
        cv=list(splits),
        refit=False,
        error_score="raise",
    )
    expected = search.fit(X, y).cv_results_
    before = torch.get_rng_state()
    for _ in range(2):
        with parallel_config(backend="threading", n_jobs=4):
            found = search.fit(X, y).cv_results_
        for split in ("split0_test_score", "split1_test_score"):
            np.testing.assert_array_equal(found[split], expected[split])
    assert torch.equal(torch.get_rng_state(), before)


# A GPU without a GPU


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cls", DETECTORS)
def test_nothing_mixes_devices(cls, precision, monkeypatch, pytestconfig):
    """The fit and all predictions, on tensors that say that they are on CUDA."""
    if pytestconfig.getoption("--cuda"):
        pytest.skip("torch's deterministic algorithms index by tensors of the host")
    # torch's own refuses a CUDA that is not there
    monkeypatch.setattr(torch, "autocast", partial(autocast_on_cpu, torch.autocast))
    monkeypatch.setattr(batches, "is_there", lambda device: True)
    X, y = striped(6), labels_for(cls, 6)
    settings = {"precision": precision, "batch_size": 4}
    expected = small(cls, device="cpu", **settings).fit(X, y)
    with PretendDevice():
        found = small(cls, device="cuda", **settings).fit(X, y)
        scores, maps = found.score_samples(X), found.localize(X)
        if hasattr(found, "network_"):
            assert next(found.network_.parameters()).device.type == "cuda"
    # what is cast where may differ inside of torch's own functions
    rtol = 0 if precision == "float32" else 2e-2
    np.testing.assert_allclose(scores, expected.score_samples(X), rtol=rtol)
    np.testing.assert_allclose(maps, expected.localize(X), rtol=rtol, atol=rtol / 10)
    assert found.offset_ == pytest.approx(expected.offset_, rel=rtol, abs=0)


def autocast_on_cpu(autocast, device_type, **settings):
    return autocast("cpu", **settings)


def test_the_pretended_device_refuses_to_mix():
    with PretendDevice():
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        with pytest.raises(RuntimeError, match="are mixed"):
            there + here
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert torch.equal((there + here.to("cuda")).cpu(), torch.full((2,), 2.0))


@pytest.mark.parametrize("cls", DETECTORS)
def test_pickle_in_a_fresh_process(cls, fitted, reloaded):
    X = striped(3, seed=1)
    out = reloaded[cls.__name__]
    np.testing.assert_array_equal(out["scores"], fitted[cls].score_samples(X))
    np.testing.assert_array_equal(out["maps"], fitted[cls].localize(X))


@pytest.mark.parametrize("cls", DETECTORS)
def test_skops_asks_for_trust_in_our_own_types_only(cls, fitted):
    skops = pytest.importorskip("skops.io")
    content = skops.dumps(fitted[cls])
    types = skops.get_untrusted_types(data=content)
    assert types
    # by their exact names: a prefix would trust what a module imports, too
    indices = {"skanomaly._tensors.neighbors.ApproximateIndex"}
    assert set(types) <= {f"{cls.__module__}.{cls.__name__}", *indices}
    X = striped(3, seed=1)
    loaded = skops.loads(content, trusted=types)
    np.testing.assert_array_equal(loaded.score_samples(X), fitted[cls].score_samples(X))
    np.testing.assert_array_equal(loaded.localize(X), fitted[cls].localize(X))


@pytest.mark.parametrize("cls", DETECTORS)
def test_pickle_holds_no_torch_storage(cls, fitted):
    assert b"torch.storage" not in pickle.dumps(fitted[cls])


@pytest.mark.parametrize("cls", DETECTORS)
def test_batch_size_does_not_change_results(cls, fitted):
    X = striped(5, seed=1)
    expected = fitted[cls].localize(X), fitted[cls].score_samples(X)
    other = pickle.loads(pickle.dumps(fitted[cls])).set_params(batch_size=2)
    np.testing.assert_allclose(other.localize(X), expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other.score_samples(X), expected[1], rtol=1e-4)


@pytest.mark.parametrize("cls", DETECTORS)
def test_bfloat16_is_close(cls, fitted):
    X = striped(5, seed=1)
    expected = fitted[cls].score_samples(X)
    other = pickle.loads(pickle.dumps(fitted[cls])).set_params(precision="bfloat16")
    found = other.score_samples(X)
    assert not np.array_equal(found, expected)
    # scores of MNAD are relative to the range of the training images
    atol = 0.5 if cls is skanomaly.MNAD else 0.0
    np.testing.assert_allclose(found, expected, rtol=0.2, atol=atol)


@pytest.mark.parametrize("cls", UNSUPERVISED)
def test_anomalous_images_are_left_out(cls):
    X = striped(12)
    X[:3] = 255
    y = np.array([-1] * 3 + [1] * 9)
    expected = small(cls).fit(X[3:]).score_samples(X)
    np.testing.assert_array_equal(small(cls).fit(X, y).score_samples(X), expected)


@pytest.mark.parametrize("cls", UNSUPERVISED)
def test_search_by_masks(cls):
    X = striped(16)
    masks = np.zeros((16, 32, 32), bool)
    masks[::4, 4:12, 4:12] = True
    X[masks] = 0
    search = GridSearchCV(
        skanomaly.make_pipeline(skanomaly.ResizeImages(size=24), small(cls)),
        {f"{cls.__name__.lower()}__contamination": [0.01, 0.1]},
        scoring=make_localization_scorer(pixel_roc_auc_score),
        cv=OneClassKFold(2),
        error_score="raise",
    )
    search.fit(X, masks)
    # the score of a fold is that of a pipeline fitted on the other normal images
    train, test = next(OneClassKFold(2).split(X, masks))
    detector = clone(search.best_estimator_).fit(X[train])
    expected = pixel_roc_auc_score(masks[test], detector.localize(X[test]))
    assert search.cv_results_["split0_test_score"].max() == pytest.approx(expected)


@pytest.mark.parametrize("cls", DETECTORS)
def test_a_refit_that_fails_leaves_no_thresholds(cls, monkeypatch):
    X, y = striped(8), labels_for(cls, 8)
    detector = small(cls).fit(X, y)

    def interrupt(*args, **given):
        raise FloatingPointError("as if the training had failed")

    monkeypatch.setattr(cls, "_fit", interrupt)
    with pytest.raises(FloatingPointError):
        detector.fit(X, y)
    with pytest.raises(NotFittedError):
        detector.predict(X)


@pytest.mark.parametrize("cls", DETECTORS)
def test_a_file_loads_whatever_was_set_after_fit(cls, fitted):
    X = striped(3, seed=1)
    copy = pickle.loads(pickle.dumps(fitted[cls]))
    for name, other in {
        "reconstructive_width": 2,
        "width": 8,
        "code_size": 2,
        "backbone": "resnet18",
    }.items():
        if name in copy.get_params():
            copy.set_params(**{name: other})
    loaded = pickle.loads(pickle.dumps(copy))
    np.testing.assert_array_equal(loaded.score_samples(X), fitted[cls].score_samples(X))


@pytest.mark.parametrize("cls", DETECTORS)
def test_clones_are_unfitted(cls, fitted):
    copy = clone(fitted[cls])
    assert copy.get_params() == fitted[cls].get_params()
    assert not [name for name in vars(copy) if name.endswith("_")]


@pytest.mark.parametrize("cls", DETECTORS)
def test_a_mapped_file_scores_the_same(cls, fitted, tmp_path):
    joblib.dump(fitted[cls], tmp_path / "detector.joblib")
    mapped = joblib.load(tmp_path / "detector.joblib", mmap_mode="r")
    X = striped(3, seed=1)
    np.testing.assert_array_equal(mapped.score_samples(X), fitted[cls].score_samples(X))


@pytest.mark.parametrize("cls", NETWORK_DETECTORS)
def test_an_early_stop_goes_back_to_the_best_weights(cls, monkeypatch):
    """A rate so large that the losses of later epochs are worse ones."""
    monkeypatch.setattr(cls, "_scheduler", lambda self, optimizer: None)
    X, y = striped(12), labels_for(cls, 12)
    settings = {"learning_rate": 0.2, "validation_fraction": 0.3, "max_epochs": 5}
    stopped = small(cls, n_iter_no_change=2, **settings).fit(X, y)
    curve = stopped.validation_curve_
    assert len(curve) == stopped.n_iter_
    n_best = 1 + int(np.argmin(curve))
    assert stopped.n_iter_ == min(5, n_best + 2)
    # the same images held out, and no epoch after the best
    settings["max_epochs"] = n_best
    best = small(cls, n_iter_no_change=8, **settings).fit(X, y)
    for own, other in zip(
        stopped.network_.state_dict().values(),
        best.network_.state_dict().values(),
        strict=True,
    ):
        np.testing.assert_array_equal(own.numpy(), other.numpy())


@pytest.mark.parametrize("cls", NETWORK_DETECTORS)
def test_warm_start_goes_on(cls):
    X, y = striped(16), labels_for(cls, 16)
    detector = small(cls, warm_start=True, max_epochs=3).fit(X, y)
    first = detector.loss_curve_[:]
    detector.fit(X, y)
    assert detector.n_iter_ == 6
    assert detector.loss_curve_[:3] == first
    assert np.mean(detector.loss_curve_[3:]) < np.mean(first)
    unpickled = pickle.loads(pickle.dumps(detector)).fit(X, y)
    assert unpickled.n_iter_ == 9
    with pytest.raises(ValueError, match="warm_start"):
        detector.fit(X[:, :16], y)
    assert detector.localize(X).shape == X.shape[:3]


@pytest.mark.parametrize("cls", NETWORK_DETECTORS)
def test_a_fit_that_was_killed_goes_on_from_its_checkpoint(cls, monkeypatch, tmp_path):
    class Killed(BaseException):
        pass

    losses = cls._losses

    def killing(self, network, batch, **given):
        if len(self.loss_curve_) == 3:
            raise Killed
        yield from losses(self, network, batch, **given)

    X, y = striped(8), labels_for(cls, 8)
    expected = small(cls, max_epochs=4).fit(X, y)
    file = tmp_path / "progress"
    settings = {"max_epochs": 4, "checkpoint": file, "checkpoint_every": 2}
    monkeypatch.setattr(cls, "_losses", killing)
    with pytest.raises(Killed):
        small(cls, **settings).fit(X, y)
    assert file.exists()
    monkeypatch.undo()
    detector = small(cls, **settings).fit(X, y)
    assert not file.exists()
    assert detector.loss_curve_ == expected.loss_curve_
    np.testing.assert_array_equal(detector.localize(X), expected.localize(X))
    np.testing.assert_array_equal(detector.score_samples(X), expected.score_samples(X))
    assert detector.offset_ == expected.offset_


# a parameter of the network's shape, and one that does not show in its weights
OTHER_NETWORKS = {
    "Autoencoder": ({"code_size": 5}, {}),
    "DifferNet": ({"n_blocks": 3}, {"clamp": 1.0}),
    "MemAE": ({"n_items": 5}, {"shrink": 0.2}),
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_a_warm_start_keeps_the_network_and_what_it_was_built_from(name):
    X, X_test = striped(16), striped(3, seed=1)
    reshaped, changed = OTHER_NETWORKS[name]
    detector = small(getattr(skanomaly, name), warm_start=True).fit(X)
    detector.set_params(**changed).fit(X)
    expected = detector.score_samples(X_test)
    loaded = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(loaded.score_samples(X_test), expected)
    (parameter,) = reshaped
    with pytest.raises(ValueError, match=rf"{parameter}=\d \(was \d+\)"):
        detector.set_params(**reshaped).fit(X)
    # a fit that was refused leaves something that can be saved and fitted
    again = pickle.loads(pickle.dumps(detector)).set_params(warm_start=False).fit(X)
    assert again.score_samples(X_test).shape == (3,)


@pytest.mark.parametrize("cls", NETWORK_DETECTORS)
def test_an_interrupt_leaves_a_usable_detector(cls, monkeypatch):
    losses = cls._losses

    def interrupted(self, network, batch, **given):
        if len(self.loss_curve_) == 2:
            raise KeyboardInterrupt
        yield from losses(self, network, batch, **given)

    X, y = striped(8), labels_for(cls, 8)
    expected = small(cls, max_epochs=2).fit(X, y)
    monkeypatch.setattr(cls, "_losses", interrupted)
    with pytest.warns(UserWarning, match="interrupted after 2 epochs"):
        detector = small(cls, max_epochs=5).fit(X, y)
    assert detector.n_iter_ == 2
    assert detector.localize(X).shape == expected.localize(X).shape
    assert set(detector.predict(X)) <= {-1, 1}
