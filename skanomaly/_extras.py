"""Packages that only some users need."""

import importlib
from types import ModuleType


def required(package: str, *, extra: str, wanted_by: str) -> ModuleType:
    """Import a package, or say which extra brings it.

    Parameters
    ----------
    package : str
        Name of the package or of a module in it.
    extra : str
        Name of the extra of skanomaly that installs the package.
    wanted_by : str
        What needs it; begins the error.

    Returns
    -------
    module
        The package, or the module in it.

    Raises
    ------
    ImportError
        If the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(
            f"{wanted_by} needs {name}: pip install 'skanomaly[{extra}]'."
        ) from error
