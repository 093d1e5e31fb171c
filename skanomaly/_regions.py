"""What scores and maps amount to: masks, regions and whole reports."""

from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn.utils import Bunch

from ._validation import check_maps, check_masks

_FIELDS = [
    *((name, np.int64) for name in ("image", "frame", "label")),
    *((name, np.int64) for name in ("top", "left", "bottom", "right", "area")),
    *((name, np.float64) for name in ("peak", "mean")),
]
_FIELDS_OF_IMAGES = [field for field in _FIELDS if field[0] != "frame"]
_NEIGHBORS = np.ones((3, 3), bool)


def find_regions(
    masks: ArrayLike, maps: ArrayLike | None = None, *, min_area: int = 1
) -> NDArray[np.void]:
    """Find the connected regions of masks, with their boxes, areas and map values.

    Parameters
    ----------
    masks : array-like of shape (n, H, W) or (n, T, H, W)
        Masks, boolean or integers 0 and 1; True where anomalous. Of clips, a mask for
        each of their T frames.
    maps : array-like of the same shape as `masks`, default=None
        Anomaly maps, high where anomalous.
    min_area : int, default=1
        Smallest number of pixels of a region; smaller ones are left out.

    Returns
    -------
    numpy.ndarray of shape (n_regions,)
        Structured array, sorted by image, frame and label, with the fields

        - ``image``: row of `masks` that the region is in;
        - ``frame``: number of the frame, from 0; only of clips;
        - ``label``: number of the region in its mask, from 1: the value of its pixels
          in ``scipy.ndimage.label(mask, numpy.ones((3, 3)))[0]``;
        - ``top``, ``left``, ``bottom``, ``right``: the box in pixels, half-open:
          ``masks[image, top:bottom, left:right]`` holds the region;
        - ``area``: number of its pixels;
        - ``peak``, ``mean``: maximum and mean of the map over its pixels; NaN without
          `maps`.

        ``pandas.DataFrame(regions)`` takes it.

    Raises
    ------
    TypeError
        If `masks` is None, or `min_area` is no integer.
    ValueError
        If the shapes do not fit, the masks are not binary, the maps are not finite, or
        `min_area` is below 1.

    Notes
    -----
    Pixels that touch at a side or a corner belong together (8-connectivity), as in
    :func:`skanomaly.metrics.pro_auc_score`. The regions of an image, or of a frame, do
    not reach into another one.

    Examples
    --------
    >>> from skanomaly.inspection import find_regions
    >>> masks = [[[1, 1, 0, 0, 0], [0, 0, 1, 0, 1]]]
    >>> maps = [[[0.5, 0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.4, 0.1, 0.8]]]
    >>> regions = find_regions(masks, maps)
    >>> regions["area"], regions["peak"]
    (array([3, 1]), array([0.9, 0.8]))
    >>> regions[["top", "left", "bottom", "right"]][0].tolist()
    (0, 0, 2, 3)
    >>> len(find_regions(masks, min_area=2))
    1
    """
    masks, maps = _check(masks, maps)
    _check_min_area(min_area)
    of_clips = masks.ndim == 4
    n_frames = masks.shape[1] if of_clips else 1
    masks = masks.reshape(-1, *masks.shape[-2:])
    if maps is not None:
        maps = maps.reshape(masks.shape)
    found = [np.empty(0, _FIELDS)]
    for number in np.flatnonzero(masks.any(axis=(1, 2))):
        regions = _regions_of(masks[number], None if maps is None else maps[number])
        regions["image"], regions["frame"] = divmod(number, n_frames)
        found.append(regions[regions["area"] >= min_area])
    regions = np.concatenate(found)
    if of_clips:
        return regions
    return regions[[name for name, _ in _FIELDS_OF_IMAGES]].astype(_FIELDS_OF_IMAGES)


def _regions_of(mask, values):
    """Return the regions of one mask; image and frame are zero."""
    labels, n_regions = ndimage.label(mask, _NEIGHBORS)
    boxes = ndimage.find_objects(labels)
    regions = np.zeros(n_regions, _FIELDS)
    regions["label"] = np.arange(1, n_regions + 1)
    for axis, (start, stop) in enumerate((("top", "bottom"), ("left", "right"))):
        regions[start] = [box[axis].start for box in boxes]
        regions[stop] = [box[axis].stop for box in boxes]
    labels = labels[mask]
    regions["area"] = np.bincount(labels)[1:]
    if values is None:
        regions["peak"] = regions["mean"] = np.nan
        return regions
    # pixels of a region side by side; labels are in runs, which this sort is quick with
    values = values[mask][np.argsort(labels, kind="stable")]
    starts = np.cumsum(regions["area"]) - regions["area"]
    regions["peak"] = np.maximum.reduceat(values, starts)
    regions["mean"] = np.add.reduceat(values, starts, dtype=float) / regions["area"]
    return regions


def _check(masks, maps):
    masks = check_masks(masks)
    if masks.ndim not in (3, 4):
        one = " One mask of a single image is masks[None]." if masks.ndim == 2 else ""
        raise ValueError(
            "masks must have the shape (n, H, W), or (n, T, H, W) for clips, got "
            f"{masks.shape}.{one}"
        )
    if maps is None:
        return masks, None
    maps = check_maps(maps)
    if maps.shape != masks.shape:
        raise ValueError(
            f"maps must have the shape of the masks, {masks.shape}, got {maps.shape}."
        )
    return masks, maps


def _check_min_area(min_area):
    if not isinstance(min_area, Integral):
        raise TypeError(f"min_area must be an integer from 1 on, got {min_area!r}.")
    if min_area < 1:
        raise ValueError(f"min_area must be 1 or more, got {min_area!r}.")


def marked(degrees, maps, offset, map_threshold):
    """Return masks: what exceeds a threshold in maps of anomalous images."""
    masks = maps > map_threshold
    masks[-degrees - offset >= 0] = False
    return masks


def report(judged, *, n_images, map_shape, offset, map_threshold):
    """Return what `inspect` does, of batches that were judged.

    Parameters
    ----------
    judged : iterable of tuple
        Rows, degrees of anomaly and maps of each batch.
    n_images : int
        Number of images.
    map_shape : tuple of int or None
        Shape of the map of an image; None if there are no maps.
    offset, map_threshold : float
        The thresholds of scores and maps.

    Returns
    -------
    sklearn.utils.Bunch
        The report.
    """
    result = Bunch(scores=np.empty(n_images), labels=np.empty(n_images, np.int64))
    result.offset = float(offset)
    if map_shape is not None:
        result.map_threshold = float(map_threshold)
        result.maps = np.empty((n_images, *map_shape), np.float32)
        result.masks = np.empty((n_images, *map_shape), bool)
    for rows, degrees, maps in judged:
        result.scores[rows] = -degrees
        result.labels[rows] = np.where(-degrees - offset < 0, -1, 1)
        if map_shape is not None:
            result.maps[rows] = maps
            result.masks[rows] = marked(degrees, maps, offset, map_threshold)
    if map_shape is not None:
        result.regions = find_regions(result.masks, result.maps)
    return result
