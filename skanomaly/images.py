"""Images from files, and what is done to them in front of a detector."""

import collections
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from joblib import effective_n_jobs
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from ._fitting.batches import resolve_device
from ._fitting.files import named_write_errors, remove_leftovers, replacing
from ._typing import Self, StrPath, fit_context
from ._validation import check_images

__all__ = ["CenterCropImages", "LoadImages", "ResizeImages", "ToDevice"]

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

_VALUES_PER_BATCH = 2**24
_SIZE_CONSTRAINT = [Interval(Integral, 1, None, closed="left"), tuple, list]


def image_files(folder: StrPath, *, recursive: bool = False) -> list[Path]:
    """List the image files of a folder.

    Parameters
    ----------
    folder : str or path-like
        A folder.
    recursive : bool, default=False
        Whether to look into the folders below as well.

    Returns
    -------
    list of pathlib.Path
        Files with the suffix of an image, sorted; hidden ones are left out.
    """
    paths = Path(folder).rglob("*") if recursive else Path(folder).iterdir()
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def read_image(
    path: StrPath, size: int | tuple[int, int] | None = None, mode: str = "RGB"
) -> NDArray[np.uint8]:
    """Decode an image file.

    Parameters
    ----------
    path : str or path-like
        An image file in any format that Pillow reads. Its EXIF orientation is applied,
        alpha is dropped, 16-bit greys are scaled to 8 bit, and of several frames the
        first one is taken.
    size : int or tuple of int, default=None
        Height and width in pixels to resize to, (H, W); an integer stands for both.
        Resized with Pillow's antialiased bilinear filter. None keeps the file's size.
    mode : {"RGB", "L"}, default="RGB"
        Colour or grey.

    Returns
    -------
    numpy.ndarray of shape (H, W, C)
        The image, uint8, with C = 3 for "RGB" and C = 1 for "L".

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OSError
        If the file cannot be decoded, because it is damaged, no image, or holds pixels
        without a defined range (32-bit). The message names the file and the cause.
    """
    try:
        with Image.open(path) as file:
            ImageOps.exif_transpose(file, in_place=True)
            image = _to_eight_bits(file)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode != mode:  # Pillow would copy
                image = image.convert(mode)
            image.load()
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise all kinds on damaged files
        raise OSError(f"Cannot read the image {os.fspath(path)!r}: {error}") from error
    if size is not None:
        height, width = _sides(size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _to_eight_bits(image):
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its pixels (mode {image.mode!r}) have no defined range; 8 or 16 bits are "
            "wanted"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _sides(size):
    """Return the (H, W) that ``size`` stands for."""
    sides = (size, size) if isinstance(size, Integral) else tuple(size)
    if len(sides) != 2 or not all(isinstance(s, Integral) and s > 0 for s in sides):
        raise ValueError(
            f"size must be a positive integer or a pair of them, (H, W). Got {size!r}."
        )
    return sides


class LoadImages(TransformerMixin, BaseEstimator):
    """Load image files into one array.

    Parameters
    ----------
    size : int or tuple of int, default=None
        Height and width in pixels that all images are resized to, (H, W), with an
        antialiased bilinear filter; an integer stands for both. None keeps the size of
        the files, which must then be the same for all.
    mode : {"RGB", "L"}, default="RGB"
        Colour (3 channels) or grey (1 channel).
    n_jobs : int, default=None
        Number of threads that decode. None means 1 unless in a
        :obj:`joblib.parallel_backend` context, -1 means all processors.
    memmap : str or path-like, default=None
        Folder of memory-mapped files. The array then lives in a file there, which is
        read page by page as it is used, so that it may be larger than the memory. The
        file is named after the paths, modification times and sizes of the images and
        the parameters `size` and `mode`; later calls and other processes that ask for
        the same images open it at once. It is written under another name first: an
        interrupted or failed call leaves nothing behind. None keeps the array in
        memory.

    See Also
    --------
    ResizeImages : Resize images that are arrays already.
    skanomaly.datasets.load_mvtec : Load a folder in the layout of MVTec AD.

    Notes
    -----
    EXIF orientation is applied, alpha is dropped, 16-bit greys are scaled to 8 bit. The
    transformer is stateless: `transform` works without `fit`. Files that are no longer
    wanted in the folder `memmap` are left to the user to delete.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from PIL import Image
    >>> from skanomaly.images import LoadImages
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [Path(folder) / "a.png", Path(folder) / "b.png"]
    ...     for level, path in enumerate(paths):
    ...         Image.fromarray(np.full((8, 6), level, np.uint8)).save(path)
    ...     images = LoadImages(mode="L").transform(paths)
    >>> images.shape, images.dtype
    ((2, 8, 6, 1), dtype('uint8'))
    """

    _parameter_constraints = {
        "size": [*_SIZE_CONSTRAINT, None],
        "mode": [StrOptions({"RGB", "L"})],
        "n_jobs": [Integral, None],
        "memmap": [str, os.PathLike, None],
    }

    def __init__(self, *, size=None, mode="RGB", n_jobs=None, memmap=None):
        self.size = size
        self.mode = mode
        self.n_jobs = n_jobs
        self.memmap = memmap

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        tags.requires_fit = False
        return tags

    def __sklearn_is_fitted__(self):
        return True

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Iterable[StrPath], y: ArrayLike | None = None) -> Self:
        """Check the parameters and the kind of input; no file is opened.

        Parameters
        ----------
        X : list, array or Series of str or path-like, of length n
            Paths of image files.
        y : None
            Ignored.

        Returns
        -------
        self : object
            The transformer.
        """
        _check_paths(X)
        if self.size is not None:
            _sides(self.size)
        return self

    def transform(self, X: Iterable[StrPath]) -> NDArray[np.uint8]:
        """Load the images.

        Parameters
        ----------
        X : list, array or Series of str or path-like, of length n
            Paths of image files.

        Returns
        -------
        numpy.ndarray of shape (n, H, W, C)
            The images, uint8; a read-only memory map if `memmap` is given.

        Raises
        ------
        TypeError
            If X does not hold paths.
        FileNotFoundError
            If one of the files does not exist.
        ValueError
            If `size` is None and the images have several sizes.
        OSError
            If a file cannot be read, or if there is no room to write the array.
        """
        self._validate_params()
        paths = _check_paths(X)
        if self.memmap is None:
            shape, images = self._decode(paths)
            result = np.empty(shape, np.uint8)
            for row, image in zip(result, images, strict=True):
                row[:] = image
            return result

        path = Path(self.memmap) / f"{self._digest(paths)}.npy"
        if not path.exists():
            shape, images = self._decode(paths)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_array(path, shape, images)
        return np.load(path, mmap_mode="r")

    def _decode(self, paths):
        """Return the shape of all images together and an iterator over them."""
        images = _decoded(paths, self.size, self.mode, self.n_jobs)
        first = next(images)
        rest = _of_one_shape(images, paths[1:], first.shape, paths[0])
        return (len(paths), *first.shape), chain([first], rest)

    def _digest(self, paths):
        digest = hashlib.sha256()
        size = None if self.size is None else tuple(int(s) for s in _sides(self.size))
        digest.update(repr((size, self.mode)).encode())
        for path in paths:
            status = os.stat(path)
            entry = (os.path.abspath(path), status.st_mtime_ns, status.st_size)
            digest.update(repr(entry).encode())
        return digest.hexdigest()[:32]


def _check_paths(X):
    if isinstance(X, (str, os.PathLike)):
        raise TypeError(f"X must be a list of paths, not a single one. Got {X!r}.")
    if getattr(X, "ndim", 1) != 1:
        raise TypeError(
            "LoadImages wants a one-dimensional list of paths, but X has shape "
            f"{tuple(X.shape)}. Leave LoadImages out if X holds images already."
        )
    paths = list(X)
    if not paths:
        raise ValueError(
            "Found array with 0 sample(s) (shape=(0,)) while a minimum of 1 is "
            "required by LoadImages."
        )
    for index, path in enumerate(paths):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                "LoadImages wants paths (str or path-like), but element "
                f"{index} of X is of type {type(path).__name__}. Leave LoadImages out "
                "if X holds images already."
            )
    return [os.fspath(path) for path in paths]


def _decoded(paths, size, mode, n_jobs):
    """Yield the images in order; only a few are held at a time."""
    n_threads = effective_n_jobs(n_jobs)
    pool = ThreadPoolExecutor(n_threads)
    waiting = collections.deque()
    try:
        for path in paths:
            waiting.append(pool.submit(read_image, path, size, mode))
            if len(waiting) > 4 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _of_one_shape(images, paths, shape, first_path):
    for path, image in zip(paths, images, strict=True):
        if image.shape != shape:
            raise ValueError(
                "All images must have the same size unless size is given: "
                f"{path!r} has (H, W) = {image.shape[:2]}, but {first_path!r} has "
                f"{shape[:2]}. Give size=(H, W) to resize them."
            )
        yield image


def _write_array(path, shape, images):
    """Write images into a .npy file that appears under its name only when complete.

    Plain writes, since a full disk would kill a process that writes to a memory map.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    n_bytes = np.prod(shape, dtype=np.int64)
    what = f"memmap: {str(path)!r}, {n_bytes} bytes of images,"
    remove_leftovers(path.parent)
    with replacing(path, what) as file:
        with named_write_errors(what):
            np.lib.format.write_array_header_1_0(file, header)
        for image in images:  # the files of images have errors of their own
            with named_write_errors(what):
                file.write(np.ascontiguousarray(image))


class _ArrayTransformer(TransformerMixin, BaseEstimator):
    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Remember the shape of the images.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images, uint8 in [0, 255] or real numbers in [0, 1].
        y : None
            Ignored.

        Returns
        -------
        self : object
            The fitted transformer.
        """
        if hasattr(self, "size"):
            _sides(self.size)
        self._check_X(X, reset=True)
        return self

    def _check_X(self, X, *, reset):
        if not reset:
            check_is_fitted(self)
        image_shape = getattr(self, "image_shape", None)
        return check_images(self, X, reset=reset, image_shape=image_shape)

    def _check_maps(self, maps, X, shape):
        check_is_fitted(self)
        maps = np.asarray(maps, np.float32)
        if maps.shape != (len(X), *shape):
            raise ValueError(
                f"maps must have the shape {(len(X), *shape)} of the output of "
                f"{type(self).__name__}. Got {maps.shape}."
            )
        return maps


def _slices(images):
    """Return slices over images that keep a batch small."""
    values = max(1, int(np.prod(images.shape[1:], dtype=np.int64)))
    return gen_batches(len(images), max(1, _VALUES_PER_BATCH // values))


def _kept_dtype(images):
    """Return uint8 for uint8 images and float32 for all others."""
    if isinstance(images, torch.Tensor):
        return torch.uint8 if images.dtype == torch.uint8 else torch.float32
    return np.uint8 if images.dtype == np.uint8 else np.float32


def _resize(images, height, width):
    """Resize a float32 tensor (b, C, H, W) as Pillow's bilinear filter does."""
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


class ResizeImages(_ArrayTransformer):
    """Resize images with an antialiased bilinear filter.

    Parameters
    ----------
    size : int or tuple of int, default=256
        New height and width in pixels, (H, W). An integer stands for both, so that
        every image becomes a square; give a pair to keep another aspect ratio.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.

    Attributes
    ----------
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the columns; only where X was a data frame of rows.

    See Also
    --------
    CenterCropImages : Keep the centre of images.
    LoadImages : Load files and resize them on the way.

    Notes
    -----
    The filter is Pillow's: uint8 images differ from Pillow's by 1 level at most, which
    comes from its rounding between the two directions.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.images import ResizeImages
    >>> X = np.random.default_rng(0).random((4, 30, 20, 3))
    >>> resized = ResizeImages(size=(15, 10)).fit_transform(X)
    >>> resized.shape, resized.dtype
    ((4, 15, 10, 3), dtype('float32'))
    """

    _parameter_constraints = {
        "size": _SIZE_CONSTRAINT,
        "image_shape": ["array-like", None],
    }

    def __init__(self, *, size=256, image_shape=None):
        self.size = size
        self.image_shape = image_shape

    def transform(self, X: ArrayLike) -> NDArray[Any] | torch.Tensor:
        """Resize the images.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in `fit`. A memory map is read batch by batch.

        Returns
        -------
        numpy.ndarray or torch.Tensor of shape (n, size[0], size[1], C)
            The resized images, uint8 if `X` is, else float32; a tensor if `X` is one.
        """
        images = self._check_X(X, reset=False)
        shape = (len(images), *_sides(self.size), images.shape[3])
        result: NDArray[Any] | torch.Tensor
        if isinstance(images, torch.Tensor):
            result = images.new_empty(shape, dtype=_kept_dtype(images))
        else:
            result = np.empty(shape, _kept_dtype(images))
        for rows in _slices(images):
            batch = images[rows]
            if isinstance(batch, np.ndarray):
                batch = torch.from_numpy(np.array(batch, np.float32))
            resized = _resize(batch.float().permute(0, 3, 1, 2), *shape[1:3])
            if result.dtype in (np.uint8, torch.uint8):
                resized = resized.round_().clamp_(0, 255)
            result[rows] = resized.permute(0, 2, 3, 1)
        return result

    def inverse_transform_maps(
        self, maps: ArrayLike, X: ArrayLike
    ) -> NDArray[np.float32]:
        """Resize anomaly maps to the resolution of the images that were resized.

        Parameters
        ----------
        maps : array-like of shape (n, size[0], size[1])
            Anomaly maps of the resized images.
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            The images before `transform`.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            The maps, float32, interpolated bilinearly.
        """
        resized = self._check_maps(maps, X, _sides(self.size))
        height, width, _ = self.image_shape_
        result = np.empty((len(resized), height, width), np.float32)
        for rows in _slices(result):
            batch = torch.from_numpy(np.array(resized[rows]))
            result[rows] = _resize(batch[:, None], height, width)[:, 0]
        return result


class CenterCropImages(_ArrayTransformer):
    """Keep the centre of images.

    Parameters
    ----------
    size : int or tuple of int, default=224
        Height and width in pixels of what is kept, (H, W); an integer stands for both.
        A side of the images that is shorter is kept whole.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.

    Attributes
    ----------
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the columns; only where X was a data frame of rows.

    See Also
    --------
    ResizeImages : Resize images.

    Notes
    -----
    Where an odd number of lines is cut away, one more goes at the end than at the
    start. The result shares the memory of `X` where its type allows it.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.images import CenterCropImages
    >>> X = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    >>> CenterCropImages(size=2).fit_transform(X)[0, :, :, 0]
    array([[ 5,  6],
           [ 9, 10]], dtype=uint8)
    """

    _parameter_constraints = {
        "size": _SIZE_CONSTRAINT,
        "image_shape": ["array-like", None],
    }

    def __init__(self, *, size=224, image_shape=None):
        self.size = size
        self.image_shape = image_shape

    def transform(self, X: ArrayLike) -> NDArray[Any] | torch.Tensor:
        """Crop the images.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in `fit`.

        Returns
        -------
        numpy.ndarray or torch.Tensor of shape (n, h, w, C)
            The centres of the images, with h = min(size[0], H) and w = min(size[1], W);
            uint8 if `X` is, else float32; a tensor if `X` is one.
        """
        images = self._check_X(X, reset=False)
        rows, columns = self._window()
        images = images[:, rows, columns]
        if isinstance(images, torch.Tensor):
            return images.to(_kept_dtype(images))
        return images.astype(_kept_dtype(images), copy=False)

    def inverse_transform_maps(
        self, maps: ArrayLike, X: ArrayLike
    ) -> NDArray[np.float32]:
        """Put anomaly maps back into the centre of the images that were cropped.

        Parameters
        ----------
        maps : array-like of shape (n, h, w)
            Anomaly maps of the cropped images.
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            The images before `transform`.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            The maps, float32. Nothing is known of the border that was cut away: it gets
            the lowest value of the image's map.
        """
        check_is_fitted(self)
        rows, columns = self._window()
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        cropped = self._check_maps(maps, X, shape)
        result = np.empty((len(cropped), *self.image_shape_[:2]), np.float32)
        result[:] = cropped.min(axis=(1, 2), keepdims=True)
        result[:, rows, columns] = cropped
        return result

    def _window(self):
        """Return the rows and columns that are kept, as two slices."""
        window = []
        for side, wanted in zip(self.image_shape_[:2], _sides(self.size), strict=True):
            kept = min(side, wanted)
            start = (side - kept) // 2
            window.append(slice(start, start + kept))
        return window


class ToDevice(_ArrayTransformer):
    """Move images to the memory of a device, as a tensor.

    Saves the transfer of every batch in every epoch, if the images fit into the memory
    of the device. Stands last before the detector, which computes where the tensor is
    (its `device` being "auto"); no scikit-learn estimator and no cache of a pipeline
    follows well on tensors.

    Parameters
    ----------
    device : str, default="auto"
        A torch device. "auto" leaves a tensor where it is and takes CUDA for arrays,
        else MPS, else the CPU, whatever is there first.

    Attributes
    ----------
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the columns; only where X was a data frame of rows.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.images import ToDevice
    >>> X = np.zeros((4, 8, 8, 3), np.uint8)
    >>> images = ToDevice(device="cpu").fit_transform(X)
    >>> images.shape, images.dtype
    (torch.Size([4, 8, 8, 3]), torch.uint8)
    """

    _parameter_constraints = {"device": [str]}

    def __init__(self, *, device="auto"):
        self.device = device

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    def transform(self, X: ArrayLike) -> torch.Tensor:
        """Move the images.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in `fit`. A memory map is read batch by batch.

        Returns
        -------
        torch.Tensor of shape (n, H, W, C)
            The images on the device, uint8 if `X` is, else float32.
        """
        images = self._check_X(X, reset=False)
        device = resolve_device(self.device, X)
        dtype = _kept_dtype(images)
        if isinstance(images, torch.Tensor):
            return images.to(device, dtype)
        kept = torch.uint8 if dtype == np.uint8 else torch.float32
        result = torch.empty(images.shape, dtype=kept, device=device)
        for rows in _slices(images):
            result[rows] = torch.from_numpy(np.array(images[rows], dtype)).to(device)
        return result
