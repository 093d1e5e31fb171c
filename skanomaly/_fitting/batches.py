"""How images become batches of tensors on the device that computes."""

import functools
import hashlib
import threading

import numpy as np
import torch
from tqdm.auto import tqdm

from .files import as_numpy

_MOVING = threading.Lock()


def resolve_device(device, X=None):
    """Return the device to compute on.

    Parameters
    ----------
    device : str
        A torch device, or "auto": that of ``X`` if it is a tensor, else CUDA, else
        MPS, else the CPU, whatever is there first.
    X : array-like, default=None
        The images to compute on.

    Returns
    -------
    torch.device
        The device.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if device != "auto":
        return _named_device(device)
    if isinstance(X, torch.Tensor):
        return X.device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _named_device(name):
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device={name!r} is no device of torch; 'auto', 'cpu', 'cuda', 'cuda:1' "
            "and 'mps' are such names."
        ) from None
    if not is_there(device):
        raise ValueError(
            f"device={name!r}, but torch finds no such device here. 'auto' takes a GPU "
            "where there is one."
        )
    return device


def is_there(device):
    """Return whether this machine has a device."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (
            device.index is None or device.index < torch.cuda.device_count()
        )
    if device.type in ("cpu", "mps"):
        return device.type == "cpu" or torch.backends.mps.is_available()
    # of other makers; "meta" and its like are no places to compute
    is_available = getattr(getattr(torch, device.type, None), "is_available", None)
    return is_available is not None and is_available()


def move_network(network, device):
    """Move a network to a device, if it is not there, by one thread at a time.

    Others wait: none is to compute with half a network.

    Parameters
    ----------
    network : torch.nn.Module
        The network, whose parameters are together before and afterwards.
    device : torch.device
        Where it is wanted.
    """
    with _MOVING:
        here = next(network.parameters()).device
        if here.type != device.type or device.index not in (None, here.index):
            network.to(device)


class ImageBatches:
    """Images of an array, handed out as tensors a batch at a time.

    Parameters
    ----------
    array : numpy.ndarray or torch.Tensor of shape (n, H, W, C) or (n, T, H, W, C)
        Images or clips, uint8 in [0, 255] or real numbers in [0, 1]; or a structured
        array of shape (n,) whose fields have the shape (H, W, C). A sequence will do
        that gives such an array for an array of rows.
    device : torch.device
        Where the tensors are wanted.
    rows : numpy.ndarray of int, default=None
        Which images of the array these are; None takes them all.
    """

    def __init__(self, array, device, rows=None):
        self.array = array
        self.device = device
        self.rows = np.arange(len(array)) if rows is None else rows

    def __len__(self):
        return len(self.rows)

    @functools.cached_property
    def keys(self):
        """Return a text for each image (n,), which only equal images share."""
        return np.array([content_key(self.array[row]) for row in self.rows])

    @functools.cached_property
    def groups(self):
        """Return a number for each image (n,), which only equal images share."""
        return np.unique(self.keys, return_inverse=True)[1]

    def __getitem__(self, index):
        """Return the images of some rows as float32: (b, C, H, W) or (b, C, T, H, W).

        In memory the channels come last.
        """
        rows = self.rows[index]
        if isinstance(self.array, torch.Tensor):
            rows = torch.as_tensor(rows)
        chunk = self.array[rows]
        if isinstance(chunk, torch.Tensor):
            return _to_unit(chunk, self.device)
        if chunk.dtype.names is None:
            return _to_unit(_to_tensor(chunk), self.device)
        return {
            name: _to_unit(_to_tensor(chunk[name]), self.device)
            for name in chunk.dtype.names
        }


def _to_tensor(array):
    dtype = np.uint8 if array.dtype == np.uint8 else np.float32
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


def _to_unit(images, device):
    is_bytes = images.dtype == torch.uint8
    # bytes travel to the device, where they become four times as large
    images = images.to(device).to(torch.float32)
    if is_bytes:
        # by a number of the host, CUDA would multiply with its rounded reciprocal
        images = images / images.new_full((), 255.0)
    return images.movedim(-1, 1)


def slices(n, size, *, verbose=0):
    """Yield slices of at most `size` of n images, behind a progress bar.

    The bar comes up after a second, so that calls for single images stay silent.
    """
    parts = (slice(start, min(start + size, n)) for start in range(0, n, size))
    if not verbose:  # even a bar that is not shown costs a call 0.05 ms
        yield from parts
        return
    with tqdm(total=n, unit="image", delay=1) as bar:
        for part in parts:
            yield part
            bar.update(part.stop - part.start)


def shown(items, n, *, verbose, what):
    """Return an iterator over n items, of images, behind a bar after a second."""
    settings = {"desc": what, "total": n, "unit": "image", "delay": 1}
    return tqdm(items, **settings, disable=not verbose)


def degrees_and_peaks(batches):
    """Return the degrees (n,) of judged batches and the maxima (n,) of their maps."""
    degrees, peaks = zip(
        *((own, maps.reshape(len(maps), -1).max(axis=1)) for _, own, maps in batches),
        strict=True,
    )
    return np.concatenate(degrees), np.concatenate(peaks)


def content_key(image):
    """Return a text that only images of equal content share.

    Parameters
    ----------
    image : numpy.ndarray, numpy.void or torch.Tensor
        An image, or a record of features.

    Returns
    -------
    str
        The text.
    """
    image = as_numpy(image)
    digest = hashlib.sha256(repr((image.shape, image.dtype.str)).encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()[:32]
