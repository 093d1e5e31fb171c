"""Images from files, and what is done to them in front of a detector."""

import collections
import contextlib
import hashlib
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterable, Iterator
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
from PIL import ExifTags, Image, ImageOps
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from ._fitting.batches import resolve_device, shown
from ._fitting.files import (
    DamagedFileError,
    as_numpy,
    map_summed,
    named_write_errors,
    remove_leftovers,
    replacing_summed,
)
from ._fitting.persistence import forget
from ._typing import Self, StrPath, fit_context
from ._validation import check_images, check_masks

__all__ = [
    "CenterCropImages",
    "LoadImages",
    "RegionOfInterest",
    "ResizeImages",
    "ToDevice",
]

# By suffix, Pillow's name of the format. Nothing else is opened: Pillow hands some
# formats, such as PostScript, to other programs.
FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".pbm": "PPM",
    ".pgm": "PPM",
    ".png": "PNG",
    ".pnm": "PPM",
    ".ppm": "PPM",
    ".tga": "TGA",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
IMAGE_SUFFIXES = set(FORMATS)
# What lies beside images and is skipped without a word.
COMPANION_NAMES = {"thumbs.db", "desktop.ini"}
COMPANION_SUFFIXES = {".csv", ".json", ".md", ".txt", ".xml"}
HIDDEN_NAMES = {"__macosx"}  # beside those that begin with a dot
# Why a file is skipped.
HIDDEN = "hidden"
COMPANION = "no image, but a companion of images"
NO_IMAGE = "not a type of image that is read"

WHITE = 65535  # of 16 bits
WHITE_OF_TWELVE_BITS = 4095

_RAW_16_BITS = re.compile(";16[BLN]")  # in Pillow's names of what a file holds
_WAY_OUT = (
    "If the file is not a trap, crop or shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS."
)

JPEGS = {"JPEG", "MPO"}  # to Pillow; the second is that of several pictures
QUARTER_TURNS = {5, 6, 7, 8}  # of EXIF's orientations
SPARE = 2.75  # times the sides wanted; with less, fine detail comes out otherwise

# numbers of tags in TIFFs
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES = 258, 262, 284
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
_PNG_NOTES = {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}
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
        Files with the suffix of an image, sorted; hidden files and those in hidden
        folders are left out.

    Warns
    -----
    UserWarning
        If other files are skipped, but for well-known companions of images, such as
        lists and notes.
    """
    images, others = find_images(folder, recursive=recursive)
    if others:
        warnings.warn(
            f"{len(others)} files in {os.fspath(folder)!r} are skipped, such as "
            f"{str(others[0])!r}: images are files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}.",
            stacklevel=2,
        )
    return images


def check_pictures(name: str, pictures: Any) -> list[Path] | NDArray[Any]:
    """Find the pictures that an argument names or holds.

    Parameters
    ----------
    name : str
        Name of the argument; stands in the errors.
    pictures : array-like of shape (n, h, w, c) or (n, h, w), str or path-like
        Pictures, or a folder that is searched for image files.

    Returns
    -------
    list of pathlib.Path or numpy.ndarray
        The files, or the pictures: uint8, or numbers in [0, 1].

    Raises
    ------
    ValueError
        If there is no picture, or if an array has another shape or range.
    """
    if isinstance(pictures, (str, os.PathLike)):
        folder = Path(os.path.expanduser(pictures))
        files = image_files(folder, recursive=True) if folder.is_dir() else []
        if not files:
            raise ValueError(f"{name}={str(pictures)!r} holds no image file.")
        return files
    pictures = np.asarray(pictures)
    if pictures.ndim not in (3, 4) or len(pictures) == 0:
        raise ValueError(
            f"{name} has shape {pictures.shape}; it must hold images (n, h, w, c) or "
            "(n, h, w)."
        )
    low, high = pictures.min(), pictures.max()
    if pictures.dtype != np.uint8 and not 0 <= low <= high <= 1:
        raise ValueError(
            f"{name} holds values from {low:g} to {high:g}; it must hold uint8, or "
            "numbers in [0, 1]."
        )
    return pictures


def some_pictures(
    sources: list[Path] | NDArray[Any],
    image_shape: tuple[int, int, int],
    *,
    most: int,
    generator: torch.Generator,
) -> NDArray[np.uint8]:
    """Take pictures of any size in the shape of a detector's images.

    Parameters
    ----------
    sources : list of pathlib.Path or numpy.ndarray
        What `check_pictures` returns.
    image_shape : tuple of int
        Height, width and number of channels.
    most : int
        Largest number of pictures; of more, so many are drawn.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    numpy.ndarray of shape (m, H, W, C)
        The pictures, uint8. If they have another number of channels, each gets the
        mean of theirs.
    """
    *size, channels = image_shape
    chosen = torch.randperm(len(sources), generator=generator)[:most]
    if isinstance(sources, list):
        pictures = LoadImages(size=size).transform([sources[i] for i in chosen])
    else:
        pictures = ResizeImages(size=size).fit_transform(sources[chosen.numpy()])
    if pictures.dtype != np.uint8:
        pictures = 255 * pictures.clip(0, 1)
    if pictures.shape[3] != channels:
        pictures = pictures.mean(axis=3, keepdims=True).repeat(channels, axis=3)
    return np.rint(pictures).astype(np.uint8)


def find_images(
    folder: StrPath, *, recursive: bool = False
) -> tuple[list[Path], list[Path]]:
    """List the image files of a folder, and files that are worth a warning.

    Parameters
    ----------
    folder : str or path-like
        A folder.
    recursive : bool, default=False
        Whether to look into the folders below as well.

    Returns
    -------
    images : list of pathlib.Path
        What `image_files` returns.
    others : list of pathlib.Path
        Other files, sorted, without those that are hidden and the companions.
    """
    images, others = look_through(folder, recursive=recursive)
    return images, [path for path, why in others.items() if why == NO_IMAGE]


def look_through(
    folder: StrPath, *, recursive: bool = False
) -> tuple[list[Path], dict[Path, str]]:
    """List the image files of a folder, and why others are none.

    Parameters
    ----------
    folder : str or path-like
        A folder.
    recursive : bool, default=False
        Whether to look into the folders below as well; links are followed.

    Returns
    -------
    images : list of pathlib.Path
        Files with the suffix of an image, sorted, that are not hidden.
    others : dict
        For other files and for hidden folders, sorted, why they are skipped.
    """
    images, others = [], {}
    seen = set()  # a link may lead back up

    def stop(error):
        raise error

    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        seen.add(os.path.realpath(place))
        if not recursive:
            folders.clear()
        inside = [Path(place, name) for name in folders]
        found = [Path(place, name) for name in names]
        others |= {path: HIDDEN for path in inside + found if is_hidden(path)}
        folders[:] = [
            path.name
            for path in inside
            if path not in others and os.path.realpath(path) not in seen
        ]
        for path in found:
            why = others.get(path) or why_no_image(path)
            if why is None:
                images.append(path)
            else:
                others[path] = why
    return sorted(images), dict(sorted(others.items()))


def why_no_image(path: Path) -> str | None:
    """Return why a file is skipped, by its name; None if it is an image."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    is_companion = path.name.lower() in COMPANION_NAMES or suffix in COMPANION_SUFFIXES
    return COMPANION if is_companion else NO_IMAGE


def is_hidden(path: Path) -> bool:
    """Tell whether a file or folder is a system's or a program's own."""
    return path.name.startswith(".") or path.name.lower() in HIDDEN_NAMES


def read_image(
    path: StrPath,
    size: int | tuple[int, int] | None = None,
    mode: str = "RGB",
    max_value: int | None = None,
) -> NDArray[np.uint8]:
    """Decode an image file.

    Parameters
    ----------
    path : str or path-like
        An image file: BMP, GIF, JPEG, PBM, PGM, PNG, PPM, TIFF, WebP, or TGA if it is
        named so. Its EXIF orientation is applied, alpha is dropped, 16-bit greys are
        scaled to 8 bit, and of several frames the first one is taken.
    size : int or tuple of int, default=None
        Height and width in pixels to resize to, (H, W); an integer stands for both.
        Resized with Pillow's antialiased bilinear filter; a JPEG that is much larger is
        decoded at a fraction of its size. None keeps the file's size.
    mode : {"RGB", "L"}, default="RGB"
        Colour or grey.
    max_value : int, default=None
        The value that counts as white in a file of 16 bits, such as 4095 for data of
        12 bits; values above it come out white. None means 65535, and warns where no
        value exceeds 4095.

    Returns
    -------
    numpy.ndarray of shape (H, W, C)
        The image, uint8, with C = 3 for "RGB" and C = 1 for "L".

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OSError
        If the file cannot be decoded, because it is damaged, no image, no file (but a
        folder or a named pipe), holds pixels without a defined range (32-bit), or
        promises more of them than ``PIL.Image.MAX_IMAGE_PIXELS``. The message names the
        file and the cause.

    Warns
    -----
    UserWarning
        If a file of 16 bits has no value above 4095 and `max_value` is None, or values
        above `max_value`.
    """
    image, depth = _read(path, size, mode, max_value)
    _warn_of_depths([(path, depth)], max_value)
    return image


def _read(path, size, mode, max_value):
    """Return the image, and the largest value of a file of 16 bits or None."""
    with open_image(path) as file:
        _refuse_what_is_misread(file)
        halved = file.mode.startswith("RGB") and _RAW_16_BITS.search(str(file.tile))
        if halved and max_value is not None:
            raise ValueError(
                f"max_value={max_value} is for greys; of colour of 16 bits, Pillow "
                "reads the upper 8 only. Convert the file to 8 bits."
            )
        if size is not None:
            _shrink_jpeg(file, *sides_of(size))
        ImageOps.exif_transpose(file, in_place=True)
        image, depth = _to_eight_bits(file, max_value)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode != mode:  # Pillow would copy
            image = image.convert(mode)
        image.load()
    if halved:
        depth = 256 * int(np.max(image)) + 255
    if size is not None:
        height, width = sides_of(size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return (pixels[:, :, None] if pixels.ndim == 2 else pixels), depth


@contextlib.contextmanager
def open_image(path: StrPath) -> Iterator[Image.Image]:
    """Open an image file; errors name it, those of the block as well.

    Parameters
    ----------
    path : str or path-like
        A file of one of the `FORMATS`.

    Yields
    ------
    PIL.Image.Image
        The image, not decoded yet.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OSError
        If it is no file, of another format, damaged or too large.
    """
    path = os.path.expanduser(path)
    try:
        _check_regular(path)
        with Image.open(path, formats=_formats(path)) as file:
            _check_n_pixels(file)
            yield file
    except (FileNotFoundError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise _unreadable(
            path,
            "it is damaged or of another format than "
            f"{', '.join(sorted(set(FORMATS.values())))}",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _unreadable(path, f"{error} {_WAY_OUT}") from error
    except Exception as error:  # Pillow's plugins raise all kinds on damaged files
        raise _unreadable(path, error) from error


def upright_shape(path: StrPath) -> tuple[int, int]:
    """Read the height and width that `read_image` gives an image, but no pixel of it.

    Parameters
    ----------
    path : str or path-like
        An image file.

    Returns
    -------
    tuple of int
        Height and width, after the EXIF orientation is applied.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OSError
        If its header cannot be read.
    """
    with open_image(path) as file:
        width, height = file.size
        if file.format == "TIFF":  # whose size some Pillows have turned already
            width, height = file.tag_v2[TIFF_WIDTH], file.tag_v2[TIFF_HEIGHT]
        if file.format == "PNG" and _has_notes_at_its_end(file.fp):
            file.load()
        # that of PNGs would decode the pixels first
        orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation)
    return (width, height) if orientation in QUARTER_TURNS else (height, width)


def _has_notes_at_its_end(file):
    """Tell whether notes, such as EXIF, stand behind the pixels of a PNG."""
    place = file.tell()
    file.seek(8)
    names = []
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        names.append(name)
        file.seek(length + 4, os.SEEK_CUR)  # the content and its checksum
    file.seek(place)
    behind = names[names.index(b"IDAT") :] if b"IDAT" in names else []
    return bool(_PNG_NOTES & set(behind))


def _unreadable(path, cause):
    return OSError(f"Cannot read the image {str(path)!r}: {cause}")


def _formats(path):
    """Return the formats to try, that of the suffix first."""
    own = FORMATS.get(Path(path).suffix.lower(), "PNG")
    others = sorted(set(FORMATS.values()) - {own, "TGA"})  # TGA has no mark of its own
    return [own, *others]


def _check_regular(path):
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            'it is a folder; sorted(Path(folder).glob("*.png")) lists the files in one.'
        )
    if not stat.S_ISREG(mode):
        raise OSError("it is a pipe, a socket or a device, not a file on disk.")


def _check_n_pixels(image):
    n_pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and n_pixels > most:
        raise ValueError(
            f"its header promises {image.width} x {image.height} = {n_pixels} pixels, "
            f"more than PIL.Image.MAX_IMAGE_PIXELS = {most}. {_WAY_OUT}"
        )


def _refuse_what_is_misread(image):
    """Raise for TIFFs of more than 8 bits whose pixels Pillow gets wrong."""
    tags = getattr(image, "tag_v2", {})
    bits, of_white_is_zero = tags.get(TIFF_BITS, (1,)), tags.get(TIFF_PHOTOMETRIC) == 0
    if max(bits) <= 8:
        return
    if len(bits) > 1 and tags.get(TIFF_PLANES) == 2:
        raise ValueError(
            "its colours of 16 bits lie in separate planes, which Pillow mixes up; "
            "save them together (planarconfig='contig')"
        )
    if of_white_is_zero:
        raise ValueError(
            "in it 0 is white (photometric 'miniswhite'), which Pillow passes over in "
            "16 bits; save it with 0 for black"
        )


def _shrink_jpeg(file, height, width):
    """Let a JPEG be decoded at a fraction of its size, if enough is left to resize.

    Only what divides both sides will do, else the last pixels would be of fewer ones.
    """
    if file.format not in JPEGS:
        return
    if file.getexif().get(ExifTags.Base.Orientation) in QUARTER_TURNS:
        height, width = width, height
    largest = min(file.width / width, file.height / height) / SPARE
    for part in (8, 4, 2):
        if part <= largest and file.width % part == file.height % part == 0:
            file.draft(None, (file.width // part, file.height // part))
            return


def _to_eight_bits(image, max_value):
    """Return an image of 8 bits, and the largest value of one of 16 bits or None."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image, None
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > WHITE:
        raise ValueError(
            f"its pixels (mode {image.mode!r}) have no defined range; 8 or 16 bits are "
            "wanted"
        )
    white = WHITE if max_value is None else max_value
    scaled = (np.minimum(values, white).astype(np.uint32) * 510 + white) // (2 * white)
    return Image.fromarray(scaled.astype(np.uint8)), int(values.max())


def _warn_of_depths(depths, max_value):
    """Warn of 16-bit files that are nearly black, or brighter than white.

    Parameters
    ----------
    depths : list of tuple (path, int or None)
        The largest value of each file of 16 bits; None for other files.
    max_value : int or None
        The parameter of the user.
    """
    depths = [(largest, os.fspath(path)) for path, largest in depths if largest]
    if not depths:
        return
    largest, path = max(depths)
    if max_value is None and largest <= WHITE_OF_TWELVE_BITS:
        warnings.warn(
            f"{path!r} is a file of 16 bits whose largest value is {largest}, and no "
            "other one of this call exceeds it: taken as parts of 65535, the images "
            "are nearly black. Give the value that counts as white: max_value=4095 "
            "for data of 12 bits, 1023 for 10 bits, 255 for 8 bits, or 65535 if they "
            "are meant to be dark. (Colour is to be converted to 8 bits instead.)",
            stacklevel=4,
        )
    elif max_value is not None and largest > max_value:
        warnings.warn(
            f"{path!r} holds values up to {largest}, above max_value={max_value}: they "
            "come out white.",
            stacklevel=4,
        )


def sides_of(size: Any) -> tuple[int, int]:
    """Return the (H, W) that ``size`` stands for, or raise a ValueError."""
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
    max_value : int, default=None
        The value that counts as white in grey files of 16 bits, such as 4095 for data
        of 12 bits; values above it come out white. None means 65535, and warns where no
        value in the files of a call exceeds 4095.
    n_jobs : int, default=None
        Number of threads that decode. None means 1 unless in a
        :obj:`joblib.parallel_backend` context, -1 means all processors.
    memmap : str or path-like, default=None
        Folder of memory-mapped files. The array then lives in a file there, which is
        read page by page as it is used, so that it may be larger than the memory. The
        file is named after the paths, modification times and sizes of the images and
        the parameters `size`, `mode` and `max_value`; later calls and other processes
        that ask for the same images open it at once. It is written under another name
        first: an interrupted or failed call leaves nothing behind. A damaged file is
        made anew, with a warning; its checksum is compared when a process opens it for
        the first time. None keeps the array in memory.
    verbose : int, default=0
        Whether to show a progress bar, where loading takes more than a second.

    See Also
    --------
    ResizeImages : Resize images that are arrays already.
    skanomaly.datasets.load_folder : Load images, labels and masks from folders.

    Notes
    -----
    Files may be of the formats BMP, GIF, JPEG, PBM, PGM, PNG, PPM, TGA, TIFF and WebP.
    EXIF orientation is applied, alpha is dropped, 16-bit greys are scaled to 8 bit;
    :doc:`/pictures` tells what can go wrong. A JPEG of much more than the wanted `size`
    is decoded at a half, a quarter or an eighth of its sides: photographs of 12
    megapixels load in less than half the time, and differ by less than half a grey
    level on average (``benchmarks/loading.py``). The transformer is stateless:
    `transform` works without `fit`. Files that are no longer wanted in the folder
    `memmap` are left to the user to delete.

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
        "max_value": [Interval(Integral, 1, WHITE, closed="both"), None],
        "n_jobs": [Integral, None],
        "memmap": [str, os.PathLike, None],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        *,
        size=None,
        mode="RGB",
        max_value=None,
        n_jobs=None,
        memmap=None,
        verbose=0,
    ):
        self.size = size
        self.mode = mode
        self.max_value = max_value
        self.n_jobs = n_jobs
        self.memmap = memmap
        self.verbose = verbose

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
            Paths of image files. A data frame or array of one column will do.
        y : None
            Ignored.

        Returns
        -------
        self : object
            The transformer.
        """
        _check_paths(X)
        if self.size is not None:
            sides_of(self.size)
        return self

    def transform(self, X: Iterable[StrPath]) -> NDArray[np.uint8]:
        """Load the images.

        Parameters
        ----------
        X : list, array or Series of str or path-like, of length n
            Paths of image files. A data frame or array of one column will do.

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

        folder = os.path.expanduser(self.memmap)
        path = Path(folder, f"{self._digest(paths)}.npy")
        with named_write_errors(f"memmap={os.fspath(self.memmap)!r}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _open_array(path, len(paths))
        except FileNotFoundError:
            pass
        except DamagedFileError as error:
            warnings.warn(
                f"memmap: {str(path)!r} is damaged ({error}) and made anew.",
                stacklevel=2,
            )
        shape, images = self._decode(paths)
        _write_array(path, shape, images)
        return _open_array(path, len(paths))

    def inverse_transform_regions(
        self, regions: NDArray[np.void], X: Iterable[StrPath]
    ) -> NDArray[np.void]:
        """Turn regions of the loaded images into regions of the files.

        Parameters
        ----------
        regions : numpy.ndarray of shape (n_regions,)
            What :func:`skanomaly.inspection.find_regions` finds in the loaded images.
        X : list, array or Series of str or path-like, of length n
            Paths of the image files.

        Returns
        -------
        numpy.ndarray of shape (n_regions,)
            The regions in pixels of the files, turned upright as the images are. A box
            is the smallest of whole pixels that covers the one that was scaled; an area
            grows as the image did, and is rounded to whole pixels, one at least.

        Raises
        ------
        FileNotFoundError
            If a file with a region does not exist any more.
        OSError
            If its header cannot be read.
        """
        if self.size is None:
            return regions
        paths = _check_paths(X)
        images, rows = np.unique(regions["image"], return_inverse=True)
        shapes = [upright_shape(paths[image]) for image in images]
        tall, wide = np.reshape(shapes, (-1, 2)).astype(np.int64)[rows].T
        height, width = sides_of(self.size)
        result = regions.copy()
        result["top"] = regions["top"] * tall // height
        result["left"] = regions["left"] * wide // width
        result["bottom"] = -(-regions["bottom"] * tall // height)
        result["right"] = -(-regions["right"] * wide // width)
        # rounded: half of the divisor is added
        area = 2 * regions["area"] * tall * wide + height * width
        result["area"] = np.maximum(area // (2 * height * width), 1)
        return result

    def _decode(self, paths):
        """Return the shape of all images together and an iterator over them."""
        arguments = self.size, self.mode, self.max_value
        decoded = _decoded(paths, arguments, self.n_jobs)
        decoded = shown(decoded, len(paths), verbose=self.verbose, what="load")
        images = _told(paths, decoded, self.max_value)
        first = next(images)
        rest = _of_one_shape(images, paths[1:], first.shape, paths[0])
        return (len(paths), *first.shape), chain([first], rest)

    def _digest(self, paths):
        digest = hashlib.sha256()
        size = None if self.size is None else tuple(int(s) for s in sides_of(self.size))
        white = WHITE if self.max_value is None else int(self.max_value)
        digest.update(repr((size, self.mode, white)).encode())
        for path in paths:
            status = os.stat(path)
            entry = (os.path.abspath(path), status.st_mtime_ns, status.st_size)
            digest.update(repr(entry).encode())
        return digest.hexdigest()[:32]


def _check_paths(X):
    listed = 'sorted(Path(folder).glob("*.png"))'
    if isinstance(X, (str, os.PathLike)):
        what = "a folder" if os.path.isdir(X) else "a single one"
        raise TypeError(
            f"X must be a list of paths, not {what}. Got {X!r}. {listed} lists the "
            "files in a folder."
        )
    if isinstance(X, Iterator):
        raise TypeError(
            f"X must be a list of paths, not a {type(X).__name__}, which is empty once "
            f"it was looked through. Give a list, such as {listed}."
        )
    if isinstance(X, (set, frozenset)):
        raise TypeError(
            "X must be a list of paths, not a set: images would come in any order. "
            "Give sorted(X)."
        )
    if not isinstance(X, Iterable):
        raise TypeError(f"X must be a list of paths. Got {X!r}.")
    paths = listed_paths("X", X, " Leave LoadImages out if X holds images already.")
    if not paths:
        raise ValueError(
            "Found array with 0 sample(s) (shape=(0,)) while a minimum of 1 is "
            "required by LoadImages."
        )
    return paths


def listed_paths(name: str, paths: Iterable[StrPath], hint: str = "") -> list[str]:
    """List the paths in a list, a Series, or a data frame or array of one column.

    Parameters
    ----------
    name : str
        Name of the argument; stands in the errors.
    paths : iterable of str or path-like
        What was given.
    hint : str, default=""
        What to do with something else; ends the errors.

    Returns
    -------
    list of str
        The paths, with the home folder in the place of ``~``.

    Raises
    ------
    TypeError
        If there are several columns, or something that is no path.
    """
    shape = tuple(getattr(paths, "shape", ()))
    if hasattr(paths, "columns") and shape[1] != 1:
        raise TypeError(
            f"{name} must be one column of paths, but is a data frame of {shape[1]}: "
            f"{', '.join(map(repr, paths.columns))}. Give the one of paths, such as "
            f"{name}['path'].{hint}"
        )
    if len(shape) > 1 and shape[1:] != (1,):
        raise TypeError(
            f"{name} must be a list or one column of paths, but has the shape "
            f"{shape}.{hint}"
        )
    listed = np.asarray(paths)[:, 0].tolist() if len(shape) == 2 else list(paths)
    for index, path in enumerate(listed):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                f"{name} must hold paths (str or path-like), but element {index} is of "
                f"type {type(path).__name__}.{hint}"
            )
    return [os.path.expanduser(path) for path in listed]


def _decoded(paths, arguments, n_jobs):
    """Yield what `_read` returns in order; only a few images are held at a time."""
    n_threads = effective_n_jobs(n_jobs)
    pool = ThreadPoolExecutor(n_threads)
    waiting = collections.deque()
    try:
        for path in paths:
            waiting.append(pool.submit(_read, path, *arguments))
            if len(waiting) > 4 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _told(paths, decoded, max_value):
    """Yield the images, and warn behind the last one of what their files hold."""
    depths = []
    for path, (image, depth) in zip(paths, decoded, strict=True):
        depths.append((path, depth))
        yield image
    _warn_of_depths(depths, max_value)


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
    with replacing_summed(path, what) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for image in images:
            file.write(np.ascontiguousarray(image))


def _open_array(path, n_images):
    images = map_summed(path)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != n_images:
        raise DamagedFileError("its header is another")
    return images


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
            sides_of(self.size)
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


def resize(images, height, width):
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
        shape = (len(images), *sides_of(self.size), images.shape[3])
        result: NDArray[Any] | torch.Tensor
        if isinstance(images, torch.Tensor):
            result = images.new_empty(shape, dtype=_kept_dtype(images))
        else:
            result = np.empty(shape, _kept_dtype(images))
        for rows in _slices(images):
            batch = images[rows]
            if isinstance(batch, np.ndarray):
                batch = torch.from_numpy(np.array(batch, np.float32))
            resized = resize(batch.float().permute(0, 3, 1, 2), *shape[1:3])
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
        resized = self._check_maps(maps, X, sides_of(self.size))
        height, width, _ = self.image_shape_
        result = np.empty((len(resized), height, width), np.float32)
        for rows in _slices(result):
            batch = torch.from_numpy(np.array(resized[rows]))
            result[rows] = resize(batch[:, None], height, width)[:, 0]
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
            0, or the lowest value of the image's map if that is below.
        """
        check_is_fitted(self)
        rows, columns = self._window()
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        cropped = self._check_maps(maps, X, shape)
        result = np.empty((len(cropped), *self.image_shape_[:2]), np.float32)
        result[:] = cropped.min(axis=(1, 2), keepdims=True, initial=0)
        result[:, rows, columns] = cropped
        return result

    def _window(self):
        """Return the rows and columns that are kept, as two slices."""
        window = []
        sides = sides_of(self.size)
        for side, wanted in zip(self.image_shape_[:2], sides, strict=True):
            kept = min(side, wanted)
            start = (side - kept) // 2
            window.append(slice(start, start + kept))
        return window


class RegionOfInterest(_ArrayTransformer):
    """Leave out of account what lies outside of a region.

    Pixels outside are painted in one colour, the mean of those inside of the training
    images. Whatever a photograph shows there, the steps behind see the same: no
    threshold, score or map depends on it, and nothing there is marked.

    Parameters
    ----------
    mask : array-like of shape (H, W), str, path-like or callable
        True or 1 inside of the region, False or 0 outside. Or the path of an image
        file, bright inside (more than half of white). Or a function that takes images
        (b, H, W, C) as they come in and returns a mask of each (b, H, W); to equal
        images it must give equal masks.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.

    Attributes
    ----------
    mask_ : numpy.ndarray of shape (H, W)
        True inside; absent if `mask` is a function.
    fill_ : numpy.ndarray of shape (C,)
        Colour outside, as numbers in [0, 1] (of uint8, divided by 255).
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the columns; only where X was a data frame of rows.

    See Also
    --------
    CenterCropImages : Cut away what lies around the centre.
    TiledDetector : Judge photographs tile by tile.

    Notes
    -----
    A detector sees the painted pixels, and judges them too: its own maps may be high
    at the rim of a region whose shape is another than in training. One mask for all
    images is always the same; a function is best where parts lie differently.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import RegionOfInterest
    >>> X = np.array([[[10, 20, 250], [30, 40, 240]]], np.uint8)
    >>> region = RegionOfInterest([[1, 1, 0], [1, 1, 0]]).fit(X)
    >>> region.transform(X)[..., 0]
    array([[[10, 20, 25],
            [30, 40, 25]]], dtype=uint8)
    """

    _parameter_constraints = {
        "mask": ["array-like", str, os.PathLike, callable],
        "image_shape": ["array-like", None],
    }

    def __init__(self, mask, *, image_shape=None):
        self.mask = mask
        self.image_shape = image_shape

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Find the colour of the pixels outside.

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

        Raises
        ------
        ValueError
            If the mask is of another shape than the images, holds other values than 0
            and 1, or selects nothing.
        OSError
            If it is a file that cannot be read.
        """
        images = self._check_X(X, reset=True)
        forget(self, "mask_")
        if not callable(self.mask):
            self.mask_ = self._one_mask()
        total, n = 0.0, 0
        for rows in _slices(images):
            masks = self._masks(images[rows], rows.start)
            inside = as_numpy(images[rows])[masks].astype(np.float32)
            total, n = total + inside.sum(axis=0, dtype=float), n + len(inside)
        scale = 255 if _kept_dtype(images) in (np.uint8, torch.uint8) else 1
        self.fill_ = total / (scale * n)
        return self

    def transform(self, X: ArrayLike) -> NDArray[Any] | torch.Tensor:
        """Paint what lies outside of the region.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in `fit`. A memory map is read batch by batch.

        Returns
        -------
        numpy.ndarray or torch.Tensor of shape (n, H, W, C)
            The painted images, in memory; uint8 if `X` is, else float32; a tensor if
            `X` is one.
        """
        images = self._check_X(X, reset=False)
        dtype = _kept_dtype(images)
        result: NDArray[Any] | torch.Tensor
        if isinstance(images, torch.Tensor):
            result = images.to(dtype, copy=True)
        else:
            result = np.array(images, dtype)
        of_bytes = dtype in (np.uint8, torch.uint8)
        fill = np.rint(255 * self.fill_) if of_bytes else self.fill_
        for rows in _slices(images):
            outside = ~self._masks(images[rows], rows.start)
            if isinstance(images, torch.Tensor):
                outside = torch.from_numpy(outside).to(images.device)
                result[rows][outside] = torch.from_numpy(fill).to(result)
            else:
                result[rows][outside] = fill
        return result

    def inverse_transform_maps(
        self, maps: ArrayLike, X: ArrayLike
    ) -> NDArray[np.float32]:
        """Set anomaly maps outside of the region to a value that marks nothing.

        Parameters
        ----------
        maps : array-like of shape (n, H, W)
            Anomaly maps of the painted images.
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            The images before `transform`.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            The maps, float32; outside lies 0, or the lowest value inside if that is
            below 0.
        """
        images = self._check_X(X, reset=False)
        maps = self._check_maps(maps, images, self.image_shape_[:2])
        result = np.empty_like(maps)
        for rows in _slices(images):
            masks = self._masks(images[rows], rows.start)
            lowest = maps[rows].min(axis=(1, 2), keepdims=True, where=masks, initial=0)
            result[rows] = np.where(masks, maps[rows], lowest)
        return result

    def _one_mask(self):
        if isinstance(self.mask, (str, os.PathLike)):
            name = f"mask={os.fspath(self.mask)!r}"
            if not os.path.isfile(os.path.expanduser(self.mask)):
                raise FileNotFoundError(f"{name} is not a file.")
            mask = read_image(self.mask, mode="L")[..., 0] > 127
        else:
            name, mask = "mask", check_masks(self.mask)
        if mask.shape != self.image_shape_[:2]:
            raise ValueError(
                f"{name} has shape {mask.shape}, but the images that come in are (H, W)"
                f" = {self.image_shape_[:2]}. That of a photograph fits images behind "
                "LoadImages(size=size) as LoadImages(size=size, mode='L').transform("
                "[path])[0, :, :, 0] > 127."
            )
        if not mask.any():
            raise ValueError(f"{name} selects no pixel.")
        return mask

    def _masks(self, images, start):
        """Return the masks (b, H, W) of images, the first of which has a number."""
        shape = tuple(images.shape[:3])
        if not callable(self.mask):
            return np.broadcast_to(self.mask_, shape)
        masks = check_masks(self.mask(images))
        if masks.shape != shape:
            raise ValueError(
                f"mask has returned an array of shape {masks.shape} for images of "
                f"shape {tuple(images.shape)}; wanted is {shape}."
            )
        selected = masks.any(axis=(1, 2))
        if not selected.all():
            number = start + selected.argmin()
            raise ValueError(f"mask selects no pixel of image {number}.")
        return masks


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
