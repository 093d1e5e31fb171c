"""Settings and fixtures of the whole suite."""

import os
import re
from pathlib import Path

import pytest
from method_settings import small_settings


def pytest_addoption(parser):
    """Add the option to leave the GPU in sight."""
    parser.addoption(
        "--cuda",
        action="store_true",
        help="let device='auto' be a CUDA device, with torch's deterministic "
        "algorithms; only tests/test_common.py is written for it",
    )


def pytest_configure(config):
    """Compute on one thread, here and in child processes, and draw on no screen."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MPLBACKEND"] = "Agg"
    on_cuda = config.getoption("--cuda")
    if on_cuda:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    else:
        # tests hand networks tensors of the host
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch  # reads these variables

    if on_cuda and not torch.cuda.is_available():
        raise pytest.UsageError("--cuda: torch sees no CUDA device")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(on_cuda)


@pytest.fixture(autouse=True)
def _seeded():
    """Let a test draw the same numbers whatever ran before it."""
    import torch

    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Mark the tests that need real images."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("shared_data")


@pytest.fixture(scope="session")
def shared_data():
    """Return the folder of real images, or skip."""
    folder = os.environ.get("SKANOMALY_SHARED_DATA")
    if not folder:
        pytest.skip("needs real images: SKANOMALY_SHARED_DATA must name their folder")
    folder = Path(folder)
    if not folder.is_dir():
        pytest.fail(f"SKANOMALY_SHARED_DATA={str(folder)!r} is not a folder")
    return folder


@pytest.fixture(scope="session")
def random_images():
    """Return a function that draws images (n, *shape), float32 in [0, 1)."""
    import numpy as np

    def draw(n, *shape, seed=0):
        return np.random.default_rng(seed).random((n, *shape)).astype(np.float32)

    return draw


@pytest.fixture(scope="session")
def small():
    """Return a function that makes a small detector with a fixed seed.

    ``small(cls, **parameters)`` takes a class or its name; the parameters replace those
    of the method's test file.
    """
    import skanomaly

    def make(cls, **parameters):
        cls = getattr(skanomaly, cls) if isinstance(cls, str) else cls
        return cls(**{"random_state": 0, **small_settings(cls), **parameters})

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Return a function that makes the batch of a training, its draws seeded."""
    import torch

    from skanomaly._fitting.loop import Batch

    def make(images, labels=None, notes=None, step=0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return Batch(images, labels, notes, step, generator)

    return make


@pytest.fixture(scope="session")
def api_entries():
    """Return the names that the autosummary blocks of doc/api.rst list."""
    text = (Path(__file__).parents[1] / "doc" / "api.rst").read_text()
    blocks = re.findall(
        r"^\.\. autosummary::\n((?:[ \t]+\S.*\n|[ \t]*\n)*)", text + "\n", re.M
    )
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]
