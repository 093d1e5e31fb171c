"""How images become batches of tensors on the device that computes."""

import numpy as np
import torch


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
    """
    if device != "auto":
        return torch.device(device)
    if isinstance(X, torch.Tensor):
        return X.device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class ImageBatches:
    """Images of an array, handed out as tensors a batch at a time.

    Parameters
    ----------
    array : numpy.ndarray or torch.Tensor of shape (n, H, W, C) or (n, T, H, W, C)
        Images or clips, uint8 in [0, 255] or real numbers in [0, 1]; or a structured
        array of shape (n,) whose fields have the shape (H, W, C).
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

    def __getitem__(self, index):
        """Return the images of some rows as float32: (b, C, H, W) or (b, C, T, H, W).

        In memory the channels come last.
        """
        rows = self.rows[index]
        if isinstance(self.array, torch.Tensor):
            return _to_unit(self.array[torch.as_tensor(rows)], self.device)
        chunk = self.array[rows]
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
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    # bytes travel to the device, where they become four times as large
    images = images.to(device).to(torch.float32)
    return (images / scale if scale != 1.0 else images).movedim(-1, 1)


def degrees_and_peaks(batches):
    """Return the degrees (n,) of judged batches and the maxima (n,) of their maps."""
    degrees, peaks = zip(
        *((own, maps.reshape(len(maps), -1).max(axis=1)) for _, own, maps in batches),
        strict=True,
    )
    return np.concatenate(degrees), np.concatenate(peaks)
