"""More images than memory holds, and more than one machine."""

import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV, cross_val_score

from skanomaly import SPADE, Autoencoder
from skanomaly.metrics import anomaly_roc_auc
from skanomaly.model_selection import OneClassKFold


def test_maps_may_be_written_into_a_file(tmp_path, random_images, small):
    X = random_images(10, 24, 24, 3)
    detector = small(SPADE, gallery_size=2, n_neighbors=1, batch_size=3).fit(X)
    expected = detector.localize(X)
    out = np.lib.format.open_memmap(
        tmp_path / "maps.npy", mode="w+", dtype=np.float32, shape=expected.shape
    )
    assert detector.localize(X, out=out) is out
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), expected)
    half = np.zeros(expected.shape, np.float16)
    np.testing.assert_allclose(detector.localize(X, out=half), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "out", [np.zeros((10, 24, 23), np.float32), np.zeros((10, 24, 24), np.uint8)]
)
def test_other_arrays_for_maps_are_refused(out, random_images, small):
    X = random_images(10, 24, 24, 3)
    detector = small(SPADE, gallery_size=2, n_neighbors=1).fit(X)
    with pytest.raises(ValueError, match="out has shape"):
        detector.localize(X, out=out)


def test_what_cannot_be_written_is_refused_before_the_work(random_images, small):
    X = random_images(10, 24, 24, 3)
    detector = small(SPADE, gallery_size=2, n_neighbors=1).fit(X)
    out = np.zeros((10, 24, 24), np.float32)
    with pytest.raises(TypeError, match="out must be an array, got list"):
        detector.localize(X, out=out.tolist())
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        detector.localize(X, out=out)


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes of dask, behind joblib's backend."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
        ) as workers,
        distributed.Client(workers) as client,
    ):
        yield client


def test_a_search_on_a_cluster_of_processes_gives_the_same_numbers(
    cluster, random_images, small
):
    X = random_images(24, 24, 24, 3)
    X[18:, 4:20, 4:20] = 0
    y = np.where(np.arange(24) < 18, 1, -1)
    search = GridSearchCV(
        small(Autoencoder, code_size=4, max_epochs=2),
        {"learning_rate": [1e-4, 1e-2]},
        scoring=anomaly_roc_auc,
        cv=OneClassKFold(3),
        error_score="raise",
    )
    expected = search.fit(X, y).cv_results_["mean_test_score"]
    assert len(cluster.scheduler_info()["workers"]) == 2
    with joblib.parallel_config(backend="dask"):
        found = search.fit(X, y).cv_results_["mean_test_score"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    detector = small(SPADE, gallery_size=0, n_neighbors=1)
    scoring = {"scoring": anomaly_roc_auc, "cv": OneClassKFold(3)}
    expected = cross_val_score(detector, X, y, **scoring)
    with joblib.parallel_config(backend="dask"):
        found = cross_val_score(detector, X, y, **scoring)
    np.testing.assert_allclose(found, expected, atol=1e-6)


TOGETHER = """
import sys
import numpy as np
import torch
from skanomaly import RIAD, SPADE, Autoencoder

torch.set_num_threads(1)
rank, n_ranks = 0, int(sys.argv[2])
if n_ranks > 1:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
X = np.random.default_rng(0).integers(0, 256, (22, 24, 24, 3), dtype=np.uint8)
# random_state=None: all processes are to draw the same seed
autoencoder = Autoencoder(code_size=4, width=4, batch_size=8, max_epochs=3)
curve = autoencoder.set_params(random_state=0).fit(X).loss_curve_
scores = autoencoder.score_samples(X)
normed = RIAD(cell_sizes=(2,), width=4, batch_size=8, max_epochs=2).fit(X)
spade = SPADE(
    backbone="shufflenet_v2_x0_5", layers=("stage2",), weights=None, random_state=0,
    gallery_size=4, batch_size=8,
).fit(X)
np.savez(
    f"{sys.argv[1]}/{rank}.npz",
    curve=curve,
    scores=scores,
    normed=normed.score_samples(X),
    gallery=spade.gallery_["stage2"],
    embeddings=spade.embeddings_,
)
try:
    Autoencoder(batch_size=2, max_epochs=1).fit(X)
except ValueError as error:
    assert "batch_size" in str(error)
else:
    assert n_ranks == 1
if n_ranks > 1:
    torch.distributed.destroy_process_group()
"""


def run_together(n_processes, folder):
    """Fit in one process, or in some of torchrun; return what each of them has."""
    folder.mkdir()
    (folder / "fit.py").write_text(TOGETHER)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    subprocess.run(
        [
            sys.executable,
            *((*torchrun, str(n_processes)) if n_processes > 1 else ()),
            *(folder / "fit.py", folder, str(n_processes)),
        ],
        check=True,
        timeout=240,
    )
    return [np.load(folder / f"{rank}.npz") for rank in range(n_processes)]


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)
def test_two_processes_of_torchrun_learn_what_one_learns(tmp_path):
    [alone] = run_together(1, tmp_path / "one")
    first, second = run_together(2, tmp_path / "two")
    np.testing.assert_allclose(first["curve"], alone["curve"], rtol=1e-5)
    np.testing.assert_allclose(first["scores"], alone["scores"], rtol=1e-4)
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for name in ("gallery", "embeddings"):
        np.testing.assert_array_equal(first[name], alone[name], err_msg=name)
