"""Files of fitted estimators: portable, shared, checked."""

import pickle
import sys
import warnings

import joblib
import numpy as np
import pytest
import torch
import torchvision

from skanomaly import MNAD, Autoencoder, MemAE, version
from skanomaly._fitting.persistence import without_data


@pytest.fixture(scope="module")
def fitted(random_images, small):
    return small(Autoencoder, width=8, max_epochs=2).fit(random_images(8, 32, 32, 1))


def mapped_files():
    """Return the address ranges of this process that are mapped from files."""
    ranges = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6:
                start, stop = (int(part, 16) for part in fields[0].split("-"))
                ranges.append((start, stop, fields[5].strip()))
    return ranges


def test_networks_without_data_have_the_parameters_of_others():
    def build():
        layer = torch.nn.Conv2d(3, 4, 3)
        normalized = torch.nn.utils.parametrizations.spectral_norm(layer)
        return torch.nn.Sequential(normalized, torchvision.models.resnet18())

    with without_data():
        found = build().state_dict()
    expected = build().state_dict()
    assert all(tensor.is_meta for tensor in found.values())
    assert [(name, t.shape, t.dtype) for name, t in found.items()] == [
        (name, t.shape, t.dtype) for name, t in expected.items()
    ]
    # and outside weights are drawn as ever
    assert torch.nn.Linear(8, 8).weight.std() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_share_the_weights_of_a_mapped_file(fitted, tmp_path, random_images):
    file = tmp_path / "detector.joblib"
    joblib.dump(fitted, file)
    shared, own = joblib.load(file, mmap_mode="r"), joblib.load(file)
    X = random_images(3, 32, 32, 1, seed=1)
    np.testing.assert_array_equal(shared.localize(X), fitted.localize(X))
    ranges = [(a, b) for a, b, path in mapped_files() if path == str(file)]

    def share(detector):
        return [
            any(a <= tensor.data_ptr() < b for a, b in ranges)
            for tensor in detector.network_.parameters()
        ]

    assert all(share(shared))
    assert not any(share(own))


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(Autoencoder, {}), (MemAE, {}), (MNAD, {"update_at_test": True})],
)
def test_training_goes_on_from_a_mapped_file_without_writing_into_it(
    cls, settings, tmp_path, random_images, small
):
    X, file = random_images(8, 32, 32, 1), tmp_path / "detector.joblib"
    detector = small(cls, warm_start=True, **settings).fit(X)
    joblib.dump(detector, file)
    content = file.read_bytes()
    shared, own = joblib.load(file, mmap_mode="r"), joblib.load(file)
    np.testing.assert_array_equal(shared.score_samples(X), own.score_samples(X))
    np.testing.assert_array_equal(
        shared.fit(X).score_samples(X), own.fit(X).score_samples(X)
    )
    assert file.read_bytes() == content


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, fitted, tmp_path):
    for name, dump, load in (
        ("a.joblib", joblib.dump, joblib.load),
        (
            "a.pkl",
            lambda estimator, file: file.write_bytes(pickle.dumps(estimator)),
            lambda file: pickle.loads(file.read_bytes()),
        ),
    ):
        file = tmp_path / name
        dump(fitted, file)
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises((EOFError, ValueError, pickle.UnpicklingError)):
            load(file)


def test_a_changed_weight_is_noticed(fitted, tmp_path):
    state = fitted.__getstate__()
    name = "encoder.0.weight"
    weight = state["network_"][name].copy()
    weight.flat[3] += 1e-3
    file = tmp_path / "detector.joblib"
    joblib.dump(fitted, file)
    content = file.read_bytes()
    old = state["network_"][name].tobytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, weight.tobytes()))
    with pytest.raises(ValueError, match="file of this Autoencoder is damaged"):
        joblib.load(file)


def test_a_file_from_before_a_parameter_is_refused(fitted, monkeypatch):
    content = pickle.dumps(fitted)
    names = [*type(fitted)._get_param_names(), "newer"]
    renewed = classmethod(lambda cls: names)
    monkeypatch.setattr(type(fitted), "_get_param_names", renewed)
    with pytest.raises(ValueError, match="file of this Autoencoder has no newer"):
        pickle.loads(content)


@pytest.mark.parametrize(
    ("module", "package"),
    [(version, "skanomaly"), (torch, "torch")],
)
def test_other_versions_warn_with_both(
    module, package, fitted, monkeypatch, random_images
):
    content = pickle.dumps(fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(content)
    now = module.__version__.partition("+")[0]
    monkeypatch.setattr(module, "__version__", "99.1+cpu")
    with pytest.warns(UserWarning, match=rf"saved with {package} {now} \(now 99\.1"):
        loaded = pickle.loads(content)
    X = random_images(2, 32, 32, 1)
    np.testing.assert_array_equal(loaded.score_samples(X), fitted.score_samples(X))


def test_unfitted_estimators_have_no_such_notes():
    detector = Autoencoder(width=4)
    assert detector.__getstate__() == vars(detector)
    assert pickle.loads(pickle.dumps(detector)).get_params() == detector.get_params()
