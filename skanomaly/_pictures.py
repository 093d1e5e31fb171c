"""Pictures for people: photographs at a bounded size, and the colours of maps."""

import numpy as np
from PIL import Image

from ._fitting.files import as_numpy
from ._validation import holds_paths
from .images import listed_paths, read_image


class Pictures:
    """Images in memory or in files, read one at a time.

    Parameters
    ----------
    images : array-like of shape (n, H, W) or (n, H, W, C), or list of paths
        Grey (C = 1) or RGB images (C = 3), uint8 or float in [0, 1]; or image files.

    Attributes
    ----------
    paths : list of str or None
        The files, if there are any.
    """

    def __init__(self, images):
        if holds_paths(images):
            self.paths = listed_paths("images", images)
            return
        self.paths = None
        images = np.asarray(as_numpy(images))
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                "images must be paths or have the shape (n, H, W), (n, H, W, 1) or "
                f"(n, H, W, 3); got {images.shape}."
            )
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise ValueError(
                f"images must be uint8 or float in [0, 1]; got {images.dtype}."
            )
        self.images = images

    def __len__(self):
        return len(self.images if self.paths is None else self.paths)

    def read(self, number, side):
        """Return a picture and the shape of its original.

        Parameters
        ----------
        number : int
            Number of the image.
        side : int
            Largest height and width of the picture, in pixels.

        Returns
        -------
        picture : PIL.Image.Image
            The picture, RGB.
        shape : tuple of int
            Height and width of the image itself.
        """
        if self.paths is not None:
            pixels = read_image(self.paths[number])
        else:
            pixels = self.images[number]
            if pixels.dtype != np.uint8:
                pixels = np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)
        shape = pixels.shape[:2]
        picture = Image.fromarray(np.broadcast_to(pixels, (*shape, 3)))
        picture.thumbnail((side, side))
        return picture, shape


def regions_of(regions, number, shape):
    """Return the regions of one image, or raise if one does not lie in it.

    Parameters
    ----------
    regions : ndarray of shape (n_regions,)
        The regions of all images, as `find_regions` returns them.
    number : int
        Number of the image.
    shape : tuple of int
        Height and width of the image.

    Returns
    -------
    ndarray
        Its regions.
    """
    found = regions[regions["image"] == number]
    if (found["bottom"] > shape[0]).any() or (found["right"] > shape[1]).any():
        raise ValueError(
            f"regions of image {number} reach beyond its {shape[0]} x {shape[1]} "
            "pixels. Behind LoadImages(size=...) they are in pixels of the photographs:"
            " give the paths as images."
        )
    return found


def color_limits(maps, map_threshold):
    """Return the values at the two ends of the colour scale of maps.

    The scale has the threshold in its middle and begins at 0, so that it does not
    depend on the maps. If the threshold is not positive, the scale begins at the lowest
    value, or at twice the threshold if that is lower. Without a threshold it goes from
    the lowest to the highest value.

    Parameters
    ----------
    maps : ndarray
        The maps.
    map_threshold : float or None
        Their threshold.

    Returns
    -------
    tuple of float
        The lowest and the highest value of the scale.
    """
    if map_threshold is None or not np.isfinite(map_threshold):
        return float(maps.min()), float(maps.max())
    low = 0.0 if map_threshold > 0 else min(float(maps.min()), 2 * map_threshold)
    return low, 2 * map_threshold - low
