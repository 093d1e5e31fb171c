"""Defects of several kinds, planted in images of good parts."""

import itertools

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from sklearn.utils import Bunch, check_random_state

from ._typing import validate_params

SMALLEST_SIDE = 32
ANYWHERE = (0.03, 0.97)  # of a side, for centres of defects
# changes of the grey level, the range of all images being 1
LEAST_CHANGE = 0.01
CLEAR_CHANGE = 0.05
CLEAR_PIXELS = 4
CLEAR_SHARE = 0.25  # of the pixels that change
DRAWS = 10  # of one kind; then comes the next


@validate_params(
    {"X": ["array-like"], "random_state": ["random_state"]},
    prefer_skip_nested_validation=True,
)
def plant_defects(
    X: ArrayLike, *, random_state: int | np.random.RandomState | None
) -> Bunch:
    """Plant a defect in a copy of each image, to choose a detector without a bad part.

    Parameters
    ----------
    X : array-like of shape (n, H, W, C) or (n, H, W)
        Images of good parts, integers or floating-point numbers, with sides of at least
        32 pixels.
    random_state : int, RandomState instance or None
        Draws the defects. Pass an int for the same ones in every call.

    Returns
    -------
    planted : sklearn.utils.Bunch
        With the attributes

        X : ndarray of shape (2 * n, H, W, C) or (2 * n, H, W)
            The images as they are and then, in the same order, with defects. Of the
            type of the images given.
        y : ndarray of shape (2 * n,)
            +1 for the images given and -1 for planted ones.
        masks : ndarray of shape (2 * n, H, W)
            True where a planted image differs from its original. Elsewhere the two are
            equal to the last bit.
        groups : ndarray of shape (2 * n,)
            Numbers of the originals, 0 to n - 1 twice over, by which
            :class:`~skanomaly.model_selection.OneClassKFold` keeps an image and its
            copy together.
        defect_names : ndarray of shape (2 * n,)
            "good", "blur", "hole", "patch", "scratch" or "stain".

    Raises
    ------
    ValueError
        If X holds no images, too small ones, NaN or infinity, or pixels that are all
        equal.

    See Also
    --------
    skanomaly.model_selection.OneClassKFold : Tests a copy where its original is tested.
    load_textures : Photographs with stronger defects.

    Notes
    -----
    The kinds take turns, image by image; size, place and strength are drawn. Defects
    lie anywhere in the image, at its border, too, where some detectors see little:

    - blur: a spot out of focus;
    - hole: a dark spot of irregular outline;
    - patch: a piece of another image, turned or mirrored, a bit brighter or darker;
    - scratch: a bent line, bright or dark, thinner towards its ends;
    - stain: a soft-edged spot that darkens or brightens what is under it, and tints it
      where the image has colours.

    Spots have radii between 1.5 and 20 % of the shorter side, scratches half lengths
    between 5 and 40 % and half widths between 0.2 and 2 %, small ones as often as large
    ones on a scale of ratios. Grey levels lie between the lowest and the highest of all
    images. A change by less than a hundredth of this range is left out; a defect is
    drawn anew until four pixels or more, and a quarter of those that it changes, change
    by a twentieth, and after ten draws it is of the next kind.

    Examples
    --------
    >>> from skanomaly.datasets import load_textures, plant_defects
    >>> good = load_textures(n_train=5, n_test=1).X_train
    >>> planted = plant_defects(good, random_state=0)
    >>> planted.X.shape, planted.masks.shape
    ((10, 64, 64, 1), (10, 64, 64))
    >>> planted.y
    array([ 1,  1,  1,  1,  1, -1, -1, -1, -1, -1])
    >>> planted.groups
    array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    >>> planted.defect_names[5:].tolist()
    ['blur', 'hole', 'patch', 'scratch', 'stain']
    """
    good = _checked(X)
    rng = check_random_state(random_state)
    n, names = len(good), list(_DEFECTS)
    low, high = float(good.min()), float(good.max())
    bad, kinds = good.copy(), []
    for number, image in enumerate(good):
        other = (number + rng.randint(1, n)) % n if n > 1 else number
        for draw in itertools.count():  # until a defect can be seen
            name = names[(number + draw // DRAWS) % len(names)]
            bad[number] = _with_defect(rng, name, image, good[other], low, high)
            changes = np.abs(bad[number].astype(float) - image) / (high - low)
            changes = _over_channels(changes)
            n_clear, n_changed = np.sum(changes >= CLEAR_CHANGE), np.sum(changes > 0)
            if n_clear >= max(CLEAR_PIXELS, CLEAR_SHARE * n_changed):
                kinds.append(name)
                break
    masks = np.zeros((2 * n, *good.shape[1:3]), bool)
    for mask, image, original in zip(masks[n:], bad, good, strict=True):
        mask[:] = _over_channels(image != original)
    return Bunch(
        X=np.concatenate([good, bad]),
        y=np.repeat([1, -1], n),
        masks=masks,
        groups=np.tile(np.arange(n), 2),
        defect_names=np.array(["good"] * n + kinds),
    )


def _checked(X):
    X = np.asarray(X)
    if X.ndim not in (3, 4) or X.dtype.kind not in "uif" or len(X) == 0:
        raise ValueError(
            "X must hold images (n, H, W, C) or (n, H, W), integers or floating-point "
            f"numbers; got an array of shape {X.shape} and type {X.dtype}. "
            "LoadImages(size=...).fit_transform(paths) reads files."
        )
    if min(X.shape[1:3]) < SMALLEST_SIDE or 0 in X.shape:
        raise ValueError(
            f"X holds images of shape {X.shape[1:]}; defects need sides of at least "
            f"{SMALLEST_SIDE} pixels, and channels stand last."
        )
    if not np.isfinite(X).all():
        raise ValueError("X contains NaN or infinity.")
    if X.min() == X.max():
        raise ValueError("All pixels of X are equal: defects have no grey levels.")
    return X


def _with_defect(rng, name, image, other, low, high):
    """Return an image with a defect drawn; grey levels lie between low and high."""
    levels, other = (
        (pixels.astype(float).reshape(*pixels.shape[:2], -1) - low) / (high - low)
        for pixels in (image, other)
    )
    opacity, content = _DEFECTS[name](rng, levels, other)
    opacity = np.where(opacity < 0.1, 0, opacity)
    change = opacity[:, :, None] * (content - levels)
    change[_over_channels(np.abs(change)) < LEAST_CHANGE] = 0
    change = change.reshape(image.shape)
    changed = image + (high - low) * change
    if image.dtype.kind != "f":
        changed = np.rint(changed)
    return np.where(change == 0, image, changed.astype(image.dtype))


def _over_channels(pixels):
    """Return the largest value (H, W) of the channels of an image."""
    return pixels.max(axis=2) if pixels.ndim == 3 else pixels


def irregular_spot(rng, height, width, *, radius, edge, centre=(0.2, 0.8)):
    """Draw a spot of irregular outline.

    Parameters
    ----------
    rng : numpy.random.RandomState
        What is drawn from.
    height, width : int
        Size of the image.
    radius : tuple of float
        Smallest and largest mean radius, in parts of the shorter side.
    edge : float
        Width of the soft edge, in parts of the shorter side.
    centre : tuple of float, default=(0.2, 0.8)
        Where the centre may lie, in parts of each side.

    Returns
    -------
    numpy.ndarray of shape (height, width)
        Opacity of the spot, from 0 to 1.
    """
    y, x = _offsets(rng, height, width, *centre)
    angle = np.arctan2(y, x)
    outline = np.ones((height, width))
    for waves in range(2, 6):
        swing, phase = rng.uniform(0, 0.5 / waves), rng.uniform(0, 2 * np.pi)
        outline += swing * np.cos(waves * angle + phase)
    depth = rng.uniform(*radius) * outline - np.hypot(y, x)
    return np.clip(depth / edge + 0.5, 0, 1)


def _offsets(rng, height, width, low, high):
    """Return distances (2, H, W) from a point, in parts of the shorter side."""
    side = min(height, width)
    sides = np.array([[[height]], [[width]]]) / side
    return np.mgrid[:height, :width] / side - sides * rng.uniform(low, high, (2, 1, 1))


def _log_uniform(rng, low, high):
    return np.exp(rng.uniform(np.log(low), np.log(high)))


def _spot(rng, image, low, high, softness):
    """Draw a spot of a radius between two, with an edge in parts of the radius."""
    radius = _log_uniform(rng, low, high)
    edge = max(softness * radius, 1 / min(image.shape[:2]))  # a pixel at least
    return irregular_spot(
        rng, *image.shape[:2], radius=(radius, radius), edge=edge, centre=ANYWHERE
    )


def _blur(rng, image, other):
    opacity = _spot(rng, image, 0.04, 0.2, softness=0.4)
    sigma = _log_uniform(rng, 0.015, 0.06) * min(image.shape[:2])
    return opacity, ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def _hole(rng, image, other):
    opacity = _spot(rng, image, 0.015, 0.1, softness=0.3)
    return rng.uniform(0.2, 1) * opacity, np.full_like(image, rng.uniform(0, 0.2))


def _patch(rng, image, other):
    opacity = _spot(rng, image, 0.03, 0.2, softness=0.2)
    box = ndimage.find_objects(np.where(opacity > 0, 1, 0))[0]
    height, width = opacity[box].shape
    turns, is_mirrored = rng.randint(4), rng.randint(2)
    rows, columns = (width, height) if turns % 2 else (height, width)
    top = rng.randint(image.shape[0] - rows + 1)
    left = rng.randint(image.shape[1] - columns + 1)
    piece = np.rot90(other[top : top + rows, left : left + columns], turns)
    piece = piece[:, ::-1] if is_mirrored else piece
    content = image.copy()
    content[box] = np.clip(piece + rng.uniform(-0.15, 0.15), 0, 1)
    return rng.uniform(0.5, 1) * opacity, content


def _scratch(rng, image, other):
    y, x = _offsets(rng, *image.shape[:2], *ANYWHERE)
    direction, half_length = rng.uniform(0, np.pi), _log_uniform(rng, 0.05, 0.4)
    along = (np.cos(direction) * x + np.sin(direction) * y) / half_length
    across = np.cos(direction) * y - np.sin(direction) * x
    across = across - half_length * rng.uniform(-0.25, 0.25) * along**2
    half_width = _log_uniform(rng, 0.002, 0.02) * (1 - 0.6 * along**2)
    depth = (half_width - np.abs(across)) * min(image.shape[:2])
    opacity = np.where(np.abs(along) <= 1, np.clip(depth + 0.5, 0, 1), 0)
    level = rng.uniform(0, 0.2) if rng.randint(2) else rng.uniform(0.8, 1)
    return rng.uniform(0.2, 1) * opacity, np.full_like(image, level)


def _stain(rng, image, other):
    opacity = _spot(rng, image, 0.03, 0.2, softness=0.8)
    shade, tint = rng.randint(2), rng.uniform(-0.3, 0.3, image.shape[2])
    if (image == image[:, :, :1]).all():  # grey
        tint = tint[0]
    colour = np.clip(shade + tint, 0, 1)
    return rng.uniform(0.15, 0.6) * opacity, np.broadcast_to(colour, image.shape)


_DEFECTS = {
    "blur": _blur,
    "hole": _hole,
    "patch": _patch,
    "scratch": _scratch,
    "stain": _stain,
}
