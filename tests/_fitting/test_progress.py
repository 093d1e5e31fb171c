"""Progress of a training in a file, for fits that are killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from skanomaly import RIAD, Autoencoder, PNet


class Killed(BaseException):
    """No error that any code catches."""


@pytest.fixture
def detector(small):
    """Return a function that makes an autoencoder, by default that of the script."""
    settings = {"learning_rate": 2e-4, "batch_size": 128, "max_epochs": 6}
    return partial(small, Autoencoder, checkpoint_every=1, **settings)


def killed_fit(model, X, n_epochs, monkeypatch, **fit_params):
    """Fit until some epochs are over, then die."""
    cls = type(model)
    losses = cls._losses

    def killing(self, network, batch):
        if len(self.loss_curve_) == n_epochs:
            raise Killed
        yield from losses(self, network, batch)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "_losses", killing)
        with pytest.raises(Killed):
            model.fit(X, **fit_params)


SCRIPT = """
import sys
import numpy as np
import torch
from skanomaly import Autoencoder

torch.set_num_threads(1)
X = np.random.default_rng(0).random((8, 32, 32, 1)).astype(np.float32)
model = Autoencoder(
    code_size=8, width=4, max_epochs=40, checkpoint=sys.argv[1], checkpoint_every=1,
    random_state=0,
).fit(X)
np.savez(sys.argv[2], scores=model.score_samples(X), curve=model.loss_curve_)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_kill_9_at_any_moment_costs_nothing_but_time(tmp_path, detector):
    checkpoint, out = tmp_path / "progress", tmp_path / "out.npz"
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(out)]
    for _ in range(2):
        process = subprocess.Popen(command)
        old = checkpoint.read_bytes() if checkpoint.exists() else None
        deadline = time.monotonic() + 120
        while not checkpoint.exists() or checkpoint.read_bytes() == old:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    subprocess.run(command, check=True)
    resumed = np.load(out)
    X = np.random.default_rng(0).random((8, 32, 32, 1)).astype(np.float32)
    expected = detector(max_epochs=40).fit(X)
    np.testing.assert_array_equal(resumed["curve"], expected.loss_curve_)
    np.testing.assert_array_equal(resumed["scores"], expected.score_samples(X))
    assert not checkpoint.exists()


@pytest.mark.parametrize("n_epochs", [1, 4])
def test_an_early_stop_remembers_its_best_weights(
    n_epochs, monkeypatch, tmp_path, detector, random_images
):
    X = random_images(12, 32, 32, 1)
    settings = {
        "n_iter_no_change": 2,
        "learning_rate": 3e-2,
        "max_epochs": 12,
        "validation_fraction": 0.3,
    }
    expected = detector(**settings).fit(X)
    assert n_epochs < expected.n_iter_ < 12
    settings["checkpoint"] = tmp_path / "progress"
    killed_fit(detector(**settings), X, n_epochs, monkeypatch)
    resumed = detector(**settings).fit(X)
    assert resumed.loss_curve_ == expected.loss_curve_
    assert resumed.validation_curve_ == expected.validation_curve_
    np.testing.assert_array_equal(resumed.score_samples(X), expected.score_samples(X))


def test_schedules_go_on(monkeypatch, tmp_path, random_images):
    """RIAD lowers its learning rate after five sixths of the epochs."""
    X = random_images(8, 32, 32, 1)
    settings = {
        "cell_sizes": (4,),
        "width": 2,
        "max_epochs": 6,
        "n_iter_no_change": None,
        "random_state": 0,
        "checkpoint_every": 1,
    }
    expected = RIAD(**settings).fit(X)
    settings["checkpoint"] = tmp_path / "progress"
    killed_fit(RIAD(**settings), X, 5, monkeypatch)
    assert RIAD(**settings).fit(X).loss_curve_ == expected.loss_curve_


@pytest.mark.parametrize("stage", ["_imitate", "_losses"])
def test_both_stages_of_p_net_go_on(stage, monkeypatch, tmp_path, random_images):
    X = random_images(8, 32, 32, 1)
    settings = {
        "structure_epochs": 3,
        "max_epochs": 3,
        "width": 2,
        "critic_width": 2,
        "random_state": 0,
        "checkpoint_every": 1,
    }
    expected = PNet(**settings).fit(X)
    settings["checkpoint"] = tmp_path / "progress"
    original = getattr(PNet, stage)

    def killing(self, network, batch):
        curve = self.structure_loss_curve_ if stage == "_imitate" else self.loss_curve_
        if len(curve) == 2:
            raise Killed
        yield from original(self, network, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PNet, stage, killing)
        with pytest.raises(Killed):
            PNet(**settings).fit(X)
    calls = []
    imitate = PNet._imitate
    monkeypatch.setattr(
        PNet, "_imitate", lambda *args: calls.append(1) or imitate(*args)
    )
    resumed = PNet(**settings).fit(X)
    assert len(calls) == (1 if stage == "_imitate" else 0)
    assert resumed.structure_loss_curve_ == expected.structure_loss_curve_
    assert resumed.loss_curve_ == expected.loss_curve_
    np.testing.assert_array_equal(resumed.score_samples(X), expected.score_samples(X))


def test_without_a_seed_the_killed_fit_keeps_its_own(
    monkeypatch, tmp_path, detector, random_images
):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    first = detector(random_state=None, checkpoint=path)
    killed_fit(first, X, 3, monkeypatch)
    resumed = detector(random_state=None, checkpoint=path).fit(X)
    assert resumed.loss_curve_[:3] == first.loss_curve_
    assert resumed._seed == first._seed


def test_an_interrupt_keeps_the_file_and_the_next_fit_goes_on(
    monkeypatch, tmp_path, detector, random_images
):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    expected = detector().fit(X)
    losses = Autoencoder._losses

    def interrupting(self, network, batch):
        if len(self.loss_curve_) == 2:
            raise KeyboardInterrupt
        yield from losses(self, network, batch)

    model = detector(checkpoint=path)
    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "_losses", interrupting)
        with pytest.warns(UserWarning, match="interrupted after 2 epochs"):
            model.fit(X)
    assert model.n_iter_ == 2
    assert path.exists()
    assert model.fit(X).loss_curve_ == expected.loss_curve_
    assert not path.exists()


@pytest.mark.parametrize(
    ("settings", "n_images", "y", "message"),
    [
        ({"learning_rate": 0.5}, 8, None, r"learning_rate=0\.5 \(there 0\.0002\)"),
        ({"max_epochs": 9}, 8, None, r"max_epochs=9 \(there 6\)"),
        ({}, 7, None, r"images=7 of checksum \d+ \(there 8"),
        ({}, 8, np.ones(8, int), "labels="),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(
    settings, n_images, y, message, monkeypatch, tmp_path, detector, random_images
):
    path = tmp_path / "progress"
    killed_fit(detector(checkpoint=path), random_images(8, 32, 32, 1), 2, monkeypatch)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        detector(checkpoint=path, **settings).fit(
            random_images(8, 32, 32, 1)[:n_images], y
        )
    assert path.read_bytes() == content
    # what does not change the result may be another
    detector(checkpoint=path, verbose=1, checkpoint_every=3).fit(
        random_images(8, 32, 32, 1)
    )


def test_the_first_difference_of_two_sets_of_images_counts(
    monkeypatch, tmp_path, detector, random_images
):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    killed_fit(detector(checkpoint=path), X, 2, monkeypatch)
    X[-1, -1, -1] = 0.0
    with pytest.raises(ValueError, match="images="):
        detector(checkpoint=path).fit(X)


def test_other_images_left_out_count(monkeypatch, tmp_path, detector, random_images):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    first, second = np.ones((2, 8), int)
    first[3] = second[5] = -1
    killed_fit(detector(checkpoint=path), X, 2, monkeypatch, y=first)
    with pytest.raises(ValueError, match="rows="):
        detector(checkpoint=path).fit(X, second)


def test_sources_of_p_net_count(monkeypatch, tmp_path, random_images):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    settings = {
        "structure_epochs": 2,
        "width": 2,
        "critic_width": 2,
        "checkpoint": path,
        "checkpoint_every": 1,
    }
    source = {"structure_images": X, "structure_masks": X[..., 0] > 0.5}
    killed_fit(PNet(**settings), X, 0, monkeypatch, **source)
    source["structure_masks"] = X[..., 0] > 0.6
    with pytest.raises(ValueError, match="structure_masks="):
        PNet(**settings).fit(X, **source)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x05}."])
def test_other_files_are_refused_before_any_training(
    content, tmp_path, detector, random_images
):
    path = tmp_path / "progress"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        detector(checkpoint=path).fit(random_images(8, 32, 32, 1))
    assert path.read_bytes() == content


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_one_wrong_bit_is_found(place, monkeypatch, tmp_path, detector, random_images):
    path = tmp_path / "progress"
    killed_fit(detector(checkpoint=path), random_images(8, 32, 32, 1), 2, monkeypatch)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        detector(checkpoint=path).fit(random_images(8, 32, 32, 1))


def test_a_missing_folder_is_named(tmp_path, detector, random_images):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        detector(checkpoint=tmp_path / "none" / "progress").fit(
            random_images(8, 32, 32, 1)
        )


@pytest.mark.parametrize("place", ["", ".", os.devnull])
def test_places_that_are_no_files_are_refused_before_any_training(
    place, detector, random_images
):
    model = detector(checkpoint=place)
    with pytest.raises(ValueError, match=r"checkpoint='.*' must name a file"):
        model.fit(random_images(8, 32, 32, 1))
    assert not hasattr(model, "network_")


@contextlib.contextmanager
def full_disk():
    """Let no file grow, as if the disk were full."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_found_before_any_training(tmp_path, detector, random_images):
    model = detector(checkpoint=tmp_path / "progress")
    with pytest.raises(OSError, match=r"checkpoint=.*cannot be written"), full_disk():
        model.fit(random_images(8, 32, 32, 1))
    assert not hasattr(model, "network_")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_later_costs_no_training(
    monkeypatch, tmp_path, detector, random_images
):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    expected = detector().fit(X)
    losses = Autoencoder._losses

    def filling(self, network, batch):
        with full_disk() if len(self.loss_curve_) == 3 else contextlib.nullcontext():
            yield from losses(self, network, batch)

    model = detector(checkpoint=path)
    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "_losses", filling)
        model.fit(X)
    assert model.loss_curve_ == expected.loss_curve_

    def vanishing(self, network, batch):
        if len(self.loss_curve_) == 3:
            shutil.rmtree(tmp_path)
        yield from losses(self, network, batch)

    monkeypatch.setattr(Autoencoder, "_losses", vanishing)
    with pytest.warns(UserWarning, match=r"checkpoint=.*cannot be written") as record:
        model = detector(checkpoint=path).fit(X)
    assert len(record) == 3  # epochs 4 to 6
    assert model.loss_curve_ == expected.loss_curve_
    assert model.offset_ == expected.offset_


def test_a_fit_that_fails_does_not_spoil_the_next(
    monkeypatch, tmp_path, detector, random_images
):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    killed_fit(detector(checkpoint=path), X, 2, monkeypatch)
    model = detector(checkpoint=path)
    # it has read the checkpoint when it fails
    killed_fit(model, X, 2, monkeypatch)
    other = X[:, :16, :16]
    path.unlink()
    expected = detector().fit(other)
    np.testing.assert_array_equal(
        model.fit(other).score_samples(other), expected.score_samples(other)
    )


def test_a_warm_start_after_an_interrupt_is_the_same_fit(
    monkeypatch, tmp_path, detector, random_images
):
    X, path = random_images(8, 32, 32, 1), tmp_path / "progress"
    settings = {"checkpoint": path, "checkpoint_every": 2, "warm_start": True}
    expected = detector().fit(X)
    losses = Autoencoder._losses

    def interrupting(self, network, batch):
        if len(self.loss_curve_) == 3:
            raise KeyboardInterrupt
        yield from losses(self, network, batch)

    model = detector(**settings)
    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "_losses", interrupting)
        with pytest.warns(UserWarning, match="interrupted after 3 epochs"):
            model.fit(X)
    assert model.fit(X).loss_curve_ == expected.loss_curve_
    assert not path.exists()
    # with the fit at its end, the next one is a warm start again
    assert model.fit(X).n_iter_ == 12
