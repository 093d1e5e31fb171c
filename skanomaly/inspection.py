"""Whole reports on images: scores, labels, maps, masks and regions in one pass."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import Bunch

from ._regions import find_regions
from ._report import write_report
from ._typing import ImagesOrPaths, StrPath
from ._validation import check_maps
from .images import resize, upright_shape
from .pipeline import holder_of

__all__ = ["find_regions", "full_size_maps", "inspect", "write_report"]


def inspect(estimator: Any, X: ImagesOrPaths) -> Bunch:
    """Judge images and find their anomalous regions, in one pass of the network.

    Parameters
    ----------
    estimator : object
        A fitted detector, a pipeline of skanomaly or of scikit-learn that ends in one,
        a ThresholdCalibrator around these, or a search among such estimators.
    X : array-like of shape (n, H, W, C), or what the estimator takes
        Images.

    Returns
    -------
    sklearn.utils.Bunch
        What the methods of the estimator return, bit for bit, and more:

        - ``scores`` of shape (n,), as of ``score_samples``: the higher, the more
          normal;
        - ``labels`` of shape (n,), as of ``predict``: +1 for normal and -1 for
          anomalous images;
        - ``offset``, the threshold that scores of anomalous images are below;
        - ``p_values`` of shape (n,), as of ``ThresholdCalibrator.p_values``; only of a
          calibrator;
        - ``maps`` of shape (n, H, W), as of ``localize``; this and the next three only
          if the detector has maps;
        - ``map_threshold``, the value that maps exceed in masks of anomalous images;
        - ``masks`` of shape (n, H, W), as of ``segment``;
        - ``regions`` of shape (n_regions,), the connected regions of the masks, as
          :func:`find_regions` finds them: a structured array with the fields image,
          label, top, left, bottom, right, area, peak and mean. Where maps are of all
          frames of clips, (n, T, H, W), regions have the field frame, too.

    Raises
    ------
    TypeError
        If there is no detector in the estimator, or a search is not fitted or was told
        not to refit.

    See Also
    --------
    skanomaly.localize : The maps alone, for which less memory is needed.
    full_size_maps : The maps at the size of the photographs, one by one.
    write_report : The report as a page to open in a browser, or to mail.

    Notes
    -----
    Detectors, :class:`skanomaly.Pipeline` and :class:`skanomaly.ThresholdCalibrator`
    have the same as a method. This function is for pipelines and searches of
    scikit-learn, which have none.

    Regions are in pixels of the array that came in. Behind ``LoadImages(size=...)``
    their boxes and areas are in pixels of the photographs instead, turned upright by
    their EXIF orientation, while maps and masks keep the size of the loaded images. A
    box is the smallest of whole pixels that covers the scaled one; an area is
    multiplied by the ratio of the numbers of pixels, and rounded.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import SPADE
    >>> from skanomaly.inspection import inspect
    >>> X = np.random.default_rng(0).random((8, 32, 32, 3), dtype=np.float32)
    >>> detector = SPADE(backbone="resnet18", weights=None).fit(X[:6])
    >>> report = inspect(detector, X[6:])
    >>> sorted(report)
    ['labels', 'map_threshold', 'maps', 'masks', 'offset', 'regions', 'scores']
    >>> report.regions.dtype.names[:6]
    ('image', 'label', 'top', 'left', 'bottom', 'right')
    """
    return holder_of("inspect", estimator, "cannot inspect").inspect(X)


def full_size_maps(
    maps: ArrayLike, paths: Iterable[StrPath]
) -> Iterator[NDArray[np.float32]]:
    """Resize maps of loaded images to the sizes of their files, one by one.

    Parameters
    ----------
    maps : array-like of shape (n, H, W)
        Anomaly maps behind :class:`~skanomaly.LoadImages`, such as ``report.maps``;
        or masks.
    paths : list, array or Series of str or path-like, of length n
        Paths of the image files.

    Returns
    -------
    iterator of numpy.ndarray of shape (height, width)
        A map for each file, float32, interpolated bilinearly, as large as the file's
        image is upright. Each is made when it is asked for, so that one at a time is in
        memory. Masks become numbers from 0 to 1; what exceeds one half is anomalous.

    Raises
    ------
    ValueError
        If `maps` are not (n, H, W) or not finite, or there is another number of paths.

    See Also
    --------
    skanomaly.LoadImages : Loads the images, and may resize them on the way.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from PIL import Image
    >>> from skanomaly.inspection import full_size_maps
    >>> maps = np.random.default_rng(0).random((2, 16, 16))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [Path(folder) / "a.png", Path(folder) / "b.png"]
    ...     Image.new("RGB", (60, 40)).save(paths[0])
    ...     Image.new("RGB", (30, 50)).save(paths[1])
    ...     for full in full_size_maps(maps, paths):
    ...         print(full.shape)
    (40, 60)
    (50, 30)
    """
    maps, paths = check_maps(maps), list(paths)
    if maps.ndim != 3 or len(maps) != len(paths):
        raise ValueError(
            "maps must have the shape (n, H, W) with one map for each of the "
            f"{len(paths)} paths, got {maps.shape}."
        )
    return (_resized(*pair) for pair in zip(maps, paths, strict=True))


def _resized(values, path):
    values = torch.from_numpy(np.array(values, np.float32))
    return resize(values[None, None], *upright_shape(path))[0, 0].numpy()
