"""Masks of anomalous images: which files belong to an image, and what they say."""

import re
import warnings
from collections import defaultdict
from itertools import takewhile
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from PIL import ExifTags, ImageOps

from .._fitting.batches import shown
from ..images import JPEGS, QUARTER_TURNS, open_image

MASK_ENDING = re.compile(r"_mask([_-]?[0-9]+)?$")
HALF = 127  # of the values of 8 bits
NEARLY_FULL = 0.9  # few defects cover more of their image
CHROMA_NOISE = 24


def pair(images, masks, *, spare=()):
    """Find out by name which masks belong to which image.

    A mask is named like its image, with ``_mask``, ``_mask_1`` and so on behind it or
    not, or lies in a folder that is named so. Of several such images it belongs to the
    one whose folders are called like its own, then to one that is not spare, then to
    the one that lies nearest. A mask in a folder called like one of the images' belongs
    to images of such a folder only.

    Parameters
    ----------
    images : list of pathlib.Path
        Images that have masks.
    masks : list of pathlib.Path
        Files of masks.
    spare : list of pathlib.Path, default=()
        Images that may have masks.

    Returns
    -------
    pairs : dict
        For each image that has masks, the list of them.
    alone : list of pathlib.Path
        Masks that belong to no image.
    unclear : list of tuple
        Masks that may belong to several images, with two of these.
    """
    by_stem = defaultdict(list)
    for image in [*images, *spare]:
        by_stem[image.stem].append(image)
    folders = {image.parent.name for image in (*images, *spare)}
    wanted = set(images)

    def nearness(image, place):
        own, other = image.absolute().parent.parts, place.absolute().parts
        n_alike = _n_equal(own[::-1], other[::-1])
        return n_alike, image in wanted, _n_equal(own, other)

    pairs, alone, unclear = defaultdict(list), [], []
    for mask in masks:
        named = {mask.stem, MASK_ENDING.sub("", mask.stem)}
        rated = [
            ((*nearness(image, place), by_folder), image)
            for names, place, by_folder in (
                (named, mask.parent, False),
                ({mask.parent.name}, mask.parent.parent, True),
            )
            for name in names
            for image in by_stem.get(name, ())
            if place.name not in folders or image.parent.name == place.name
        ]
        best = max((rate for rate, _ in rated), default=None)
        chosen = list(dict.fromkeys(image for rate, image in rated if rate == best))
        if not chosen:
            alone.append(mask)
        elif len(chosen) > 1:
            unclear.append((mask, *chosen[:2]))
        else:
            pairs[chosen[0]].append(mask)
    return dict(pairs), alone, unclear


def _n_equal(first, second):
    """Return how many things two sequences have in common at their start."""
    equal = (a == b for a, b in zip(first, second, strict=False))
    return sum(1 for _ in takewhile(bool, equal))


def load_masks(images, masks, size, *, any_value=False, n_jobs=None, verbose=0):
    """Load the masks of images.

    Parameters
    ----------
    images : list of path-like
        Files of all images.
    masks : list of list of path-like
        Files of the masks of each image; an image without any is normal everywhere.
    size : tuple of int
        Height and width of the result.
    any_value : bool, default=False
        Whether all that is not 0 is anomalous in a grey file, so that no file is taken
        for one with soft edges.
    n_jobs : int, default=None
        Number of threads; None means 1, -1 all processors.
    verbose : int, default=0
        Whether to show a progress bar, where loading takes more than a second.

    Returns
    -------
    numpy.ndarray of shape (n, H, W)
        True where any mask of the image is anomalous.

    Raises
    ------
    ValueError
        If a mask is not of the size of its image.
    OSError
        If a file cannot be read.
    """
    masked = [row for row, files in enumerate(masks) if files]
    for row in masked:
        _check_sizes(images[row], masks[row])
    result = np.zeros((len(images), *size), bool)
    joined = Parallel(n_jobs=n_jobs, prefer="threads", return_as="generator")(
        delayed(_joined)(masks[row], size, any_value) for row in masked
    )
    joined = shown(joined, len(masked), verbose=verbose, what="masks")
    for row, mask in zip(masked, joined, strict=True):
        result[row] = mask
    return result


def warn_of_trivial(masks, mask_files, stacklevel):
    """Warn of masks of anomalous images that are empty or nearly full.

    Parameters
    ----------
    masks : numpy.ndarray of shape (n, H, W)
        Masks of anomalous images.
    mask_files : list of list of path-like
        The files that they come from.
    stacklevel : int
        Number of calls between the user and this function, plus one.

    Warns
    -----
    UserWarning
        If there are such masks.
    """
    shares = masks.mean(axis=(1, 2))
    trivial = np.flatnonzero((shares == 0) | (shares > NEARLY_FULL))
    if len(trivial):
        first = trivial[0]
        how = {0: "empty", 1: "full"}.get(shares[first], "nearly full")
        height, width = masks.shape[1:]
        warnings.warn(
            f"Masks of anomalous images are empty or nearly full: {len(trivial)} of "
            f"{len(masks)}, such as {str(mask_files[first][0])!r}, which is {how} at "
            f"{height} x {width} pixels. See in the Notes of load_mvtec how masks are "
            "read: defects are neither black on white nor painted on the photograph. "
            "Small ones may also be lost where size shrinks the images.",
            stacklevel=stacklevel,
        )


def size_of(file):
    """Return (H, W) of the image in a file, as it is to be looked at."""
    with open_image(file) as image:
        if image.format == "TIFF":  # before decoding, Pillow's versions differ
            ImageOps.exif_transpose(image, in_place=True)
        elif image.format != "PNG" or "exif" in image.info:  # else it would decode
            turn = image.getexif().get(ExifTags.Base.Orientation)
            if turn in QUARTER_TURNS:
                return image.width, image.height
        return image.height, image.width


def common_size(files):
    """Return the (H, W) that all images have, or raise a ValueError."""
    first = size_of(files[0])
    for file in files[1:]:
        if (size := size_of(file)) != first:
            raise ValueError(
                "All images must have the same size unless size is given: "
                f"{str(file)!r} has (H, W) = {size}, but {str(files[0])!r} has "
                f"{first}. Give size=(H, W) to resize them."
            )
    return first


def _check_sizes(image_file, mask_files):
    image_size = size_of(image_file)
    for mask_file in mask_files:
        size = size_of(mask_file)
        if size != image_size:
            raise ValueError(
                f"The mask {str(mask_file)!r} has (H, W) = {size}, but its image "
                f"{str(image_file)!r} has {image_size}."
            )


def _joined(mask_files, size, any_value):
    """Return where any of some masks is anomalous, at another size (H, W)."""
    joined = np.logical_or.reduce([_read(file, any_value) for file in mask_files])
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, joined.shape, strict=True)
    )
    return joined[np.ix_(rows, columns)]


def _read(mask_file, any_value):
    """Return where a mask is anomalous, (H, W); the Notes of `load_mvtec` say how."""
    with open_image(mask_file) as image:
        lossy = image.format in JPEGS or (
            image.format == "WEBP" and b"VP8L" not in Path(mask_file).read_bytes()
        )
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "P":
            indices = np.asarray(image)[:, :, None]
            return _distances(indices) > 0
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            if len(image.getbands()) == 1:
                return np.asarray(image) != 0
            has_alpha = image.mode in ("La", "PA", "RGBa")
            image = image.convert("RGBA" if has_alpha else "RGB")
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if pixels.shape[2] in (2, 4):
        colours, alpha = pixels[:, :, :-1], pixels[:, :, -1:]
        in_alpha = _is_constant(colours) and not _is_constant(alpha)
        pixels = alpha if in_alpha else colours

    # a lossy file of greys may have a touch of colour
    is_grey = np.ptp(pixels, axis=2).max() <= (CHROMA_NOISE if lossy else 0)
    distances = pixels[:, :, 0] if is_grey else _distances(pixels)
    if lossy:
        return distances > distances.max() / 2
    is_soft = is_grey and distances.max() > HALF and len(np.unique(distances)) > 3
    return distances > (HALF if is_soft and not any_value else 0)


def _is_constant(pixels):
    return (pixels == pixels[0, 0]).all()


def _distances(pixels):
    """Return how far pixels (H, W, C) are from the most frequent one on the border."""
    border = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    values, counts = np.unique(np.concatenate(border), axis=0, return_counts=True)
    background = values[counts.argmax()].astype(int)
    return np.abs(pixels - background).max(axis=2)
