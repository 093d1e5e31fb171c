"""Progress of a training in a file, for fits that are killed."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from skanomaly import RIAD, Autoencoder, PNet
from skanomaly._fitting.progress import content_checksum, replacing


class Killed(BaseException):
    """No error that any code catches."""


def random_images(n=8, seed=0):
    return np.random.default_rng(seed).random((n, 32, 32, 1)).astype(np.float32)


def detector(**settings):
    return Autoencoder(
        **{
            "code_size": 8,
            "width": 4,
            "max_epochs": 6,
            "checkpoint_every": 1,
            "random_state": 0,
            **settings,
        }
    )


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
def test_kill_9_at_any_moment_costs_nothing_but_time(tmp_path):
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
def test_an_early_stop_remembers_its_best_weights(n_epochs, monkeypatch, tmp_path):
    X = random_images(12)
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


def test_schedules_go_on(monkeypatch, tmp_path):
    """RIAD lowers its learning rate after five sixths of the epochs."""
    X = random_images()
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
def test_both_stages_of_p_net_go_on(stage, monkeypatch, tmp_path):
    X = random_images()
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


def test_without_a_seed_the_killed_fit_keeps_its_own(monkeypatch, tmp_path):
    X, path = random_images(), tmp_path / "progress"
    first = detector(random_state=None, checkpoint=path)
    killed_fit(first, X, 3, monkeypatch)
    resumed = detector(random_state=None, checkpoint=path).fit(X)
    assert resumed.loss_curve_[:3] == first.loss_curve_
    assert resumed._seed == first._seed


def test_an_interrupt_keeps_the_file_and_the_next_fit_goes_on(monkeypatch, tmp_path):
    X, path = random_images(), tmp_path / "progress"
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
    settings, n_images, y, message, monkeypatch, tmp_path
):
    path = tmp_path / "progress"
    killed_fit(detector(checkpoint=path), random_images(), 2, monkeypatch)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        detector(checkpoint=path, **settings).fit(random_images()[:n_images], y)
    assert path.read_bytes() == content
    # what does not change the result may be another
    detector(checkpoint=path, verbose=1, checkpoint_every=3).fit(random_images())


def test_the_first_difference_of_two_sets_of_images_counts(monkeypatch, tmp_path):
    X, path = random_images(), tmp_path / "progress"
    killed_fit(detector(checkpoint=path), X, 2, monkeypatch)
    X[-1, -1, -1] = 0.0
    with pytest.raises(ValueError, match="images="):
        detector(checkpoint=path).fit(X)


def test_other_images_left_out_count(monkeypatch, tmp_path):
    X, path = random_images(), tmp_path / "progress"
    first, second = np.ones((2, 8), int)
    first[3] = second[5] = -1
    killed_fit(detector(checkpoint=path), X, 2, monkeypatch, y=first)
    with pytest.raises(ValueError, match="rows="):
        detector(checkpoint=path).fit(X, second)


def test_sources_of_p_net_count(monkeypatch, tmp_path):
    X, path = random_images(), tmp_path / "progress"
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
def test_other_files_are_refused_before_any_training(content, tmp_path):
    path = tmp_path / "progress"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        detector(checkpoint=path).fit(random_images())
    assert path.read_bytes() == content


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_one_wrong_bit_is_found(place, monkeypatch, tmp_path):
    path = tmp_path / "progress"
    killed_fit(detector(checkpoint=path), random_images(), 2, monkeypatch)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        detector(checkpoint=path).fit(random_images())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        detector(checkpoint=tmp_path / "none" / "progress").fit(random_images())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("new")
        raise OSError("full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checksums_do_not_depend_on_the_container():
    array = random_images(50)
    assert content_checksum(array) == content_checksum(torch.from_numpy(array))
    assert content_checksum(array) != content_checksum(array[::-1])
    assert content_checksum(array) != content_checksum(array.reshape(50, 1024, 1))
