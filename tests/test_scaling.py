"""More images than memory holds, and more than one machine."""

import joblib
import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, cross_val_score

from skanomaly import SPADE, Autoencoder
from skanomaly.metrics import anomaly_roc_auc
from skanomaly.model_selection import OneClassKFold

SMALL = {
    "backbone": "shufflenet_v2_x0_5",
    "layers": ("stage2",),
    "weights": None,
    "random_state": 0,
}


def random_images(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 24, 24, 3), dtype=np.uint8)


def test_maps_may_be_written_into_a_file(tmp_path):
    X = random_images(10)
    detector = SPADE(gallery_size=2, n_neighbors=1, batch_size=3, **SMALL).fit(X)
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
def test_other_arrays_for_maps_are_refused(out):
    X = random_images(10)
    detector = SPADE(gallery_size=2, n_neighbors=1, **SMALL).fit(X)
    with pytest.raises(ValueError, match="out has shape"):
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


def test_a_search_on_a_cluster_of_processes_gives_the_same_numbers(cluster):
    X = random_images(24)
    X[18:, 4:20, 4:20] = 0
    y = np.where(np.arange(24) < 18, 1, -1)
    search = GridSearchCV(
        Autoencoder(code_size=4, width=4, max_epochs=2, random_state=0),
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
    detector = SPADE(gallery_size=0, n_neighbors=1, **SMALL)
    scoring = {"scoring": anomaly_roc_auc, "cv": OneClassKFold(3)}
    expected = cross_val_score(detector, X, y, **scoring)
    with joblib.parallel_config(backend="dask"):
        found = cross_val_score(detector, X, y, **scoring)
    np.testing.assert_allclose(found, expected, atol=1e-6)
