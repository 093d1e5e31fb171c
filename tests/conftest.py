"""Settings and fixtures of the whole suite."""

import os
import re
from pathlib import Path

import pytest


def pytest_configure():
    """Compute on one thread, here and in child processes, and draw on no screen."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MPLBACKEND"] = "Agg"
    import torch  # reads OMP_NUM_THREADS

    torch.set_num_threads(1)


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
def api_entries():
    """Return the names that the autosummary blocks of doc/api.rst list."""
    text = (Path(__file__).parents[1] / "doc" / "api.rst").read_text()
    blocks = re.findall(
        r"^\.\. autosummary::\n((?:[ \t]+\S.*\n|[ \t]*\n)*)", text + "\n", re.M
    )
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]
