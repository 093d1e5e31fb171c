"""Small settings of the methods, collected from their test files, and their labels."""

import importlib
import sys
from pathlib import Path

METHODS = Path(__file__).parent / "methods"

TRAINED_BRIEFLY = {"max_epochs": 1, "learning_rate": 1e-3, "n_iter_no_change": None}

# why a check of scikit-learn may fail, of more than one method
ROUNDING = (
    "compares scores within 1e-7; those of an image in other batches differ by the "
    "rounding of float32: relative differences up to 2e-7 (VariationalAutoencoder), "
    "1e-5 (Autoencoder, whose structural similarity magnifies them) and 9e-5 (MNAD, "
    "whose scores are relative to a narrow range) were measured"
)


def collect(name):
    """Merge the dictionaries of one name of all methods' test files.

    Parameters
    ----------
    name : {"SMALL", "TINY", "PLANTED", "EXPECTED_FAILURES"}
        ``SMALL`` are parameters of small networks, ``TINY`` what is smaller still for
        images of a few pixels, ``PLANTED`` numbers of images and of epochs after which
        a planted defect is found, ``EXPECTED_FAILURES`` reasons by the names of
        scikit-learn's checks.

    Returns
    -------
    dict
        Entries by the names of the classes.
    """
    if str(METHODS) not in sys.path:
        sys.path.insert(0, str(METHODS))
    merged = {}
    for path in sorted(METHODS.glob("test_*.py")):
        entries = getattr(importlib.import_module(path.stem), name, {})
        twice = sorted(merged.keys() & entries.keys())
        assert not twice, f"tests/methods/{path.name}: {name}[{twice[0]!r}] is there"
        merged.update(entries)
    return merged


def small_settings(cls):
    """Return the small settings of a class, or of the method it is derived from."""
    settings = collect("SMALL")
    for ancestor in cls.__mro__:
        if ancestor.__name__ in settings:
            return settings[ancestor.__name__]
    module = cls.__module__.rpartition(".")[2]
    raise AssertionError(
        f"tests/methods/test_{module}.py lacks SMALL[{cls.__name__!r}]"
    )


def labels_for(cls, n):
    """Return labels of both classes for a detector that wants them, else None."""
    # conftest.py imports this module before it sets the number of threads
    import numpy as np
    from sklearn.utils import get_tags

    if not get_tags(cls()).target_tags.required:
        return None
    return np.where(np.arange(n) % 2, -1, 1)
