"""Detection in photographs that are large, tile by tile."""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import MetaEstimatorMixin, clone
from sklearn.utils import get_tags
from sklearn.utils._param_validation import Interval

from ._fitting.batches import ImageBatches, degrees_and_peaks, move_network
from ._fitting.persistence import as_fitted
from .base import BaseDetector

# of a tile where others see more of the surroundings; above zero, since at the border
# of the photograph there are no others
LEAST_WEIGHT = 1e-6


class TiledDetector(MetaEstimatorMixin, BaseDetector):
    """Judge large photographs by a detector for small images, tile by tile.

    The detector learns from tiles of the photographs. To judge one, it is laid out with
    tiles that overlap, and their maps are blended, so that no seams show. A batch of
    tiles at a time becomes floats; the photographs may lie in a memory-mapped file
    (``LoadImages(memmap=...)``).

    Parameters
    ----------
    detector : BaseDetector
        A detector of this package for images of `tile_size`, which is cloned.
    tile_size : int, default=256
        Side of the tiles in pixels.
    overlap : float, default=0.25
        Share of its side by which a tile overlaps the next one at least, in [0, 1).
        Without an overlap seams may show.
    max_tiles : int, default=None
        Largest number of tiles that the detector learns from; of more, so many are
        drawn. None takes all.
    contamination : float, default=0.01
        Share of the training images that ``predict`` is to call anomalous.
    random_state : int, RandomState instance or None, default=None
        Seed of the tiles that are drawn, and of the detector where its own
        ``random_state`` is None.

    Attributes
    ----------
    detector_ : BaseDetector
        The fitted detector of tiles.
    offset_ : float
        Threshold of ``score_samples`` below which ``predict`` calls an image anomalous.
    map_threshold_ : float
        Threshold of the maps above which ``segment`` marks a pixel.
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.

    See Also
    --------
    ResizeImages : Make photographs smaller, where defects are large.
    RegionOfInterest : Leave out of account what surrounds a part.

    Notes
    -----
    A photograph's degree of anomaly is the highest of its tiles'. In its map, each tile
    counts fully in its middle and next to nothing in the outer quarter of the overlap,
    where the tile beside it has more of the surroundings; between, its weight falls
    linearly. As many tiles as the overlap asks for are spread evenly from border to
    border.

    Tiles to learn from do not overlap: a detector that compares an image with all
    others would find it again in its neighbours. So many as fit are spread evenly, and
    of equal ones, such as empty ones, one is kept. They are copied into one array.

    Thresholds go by the training photographs, judged as in a prediction. Where the
    detector judged a tile that it learned from higher in its own fit, that counts:
    SPADE, PatchDetector without an estimator, PatchCore, PaDiM and PatchSVDD judge
    training images without themselves. Still, tiles of one photograph know each other,
    which makes thresholds too strict for photographs from elsewhere;
    ``ThresholdCalibrator`` leaves whole photographs out. Anomalous photographs are left
    out as a whole, even if masks tell where they are normal.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import SPADE, TiledDetector
    >>> X = np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), np.uint8)
    >>> detector = TiledDetector(
    ...     SPADE(backbone="resnet18", weights=None), tile_size=32, random_state=0
    ... )
    >>> X_new = X[:1].copy()
    >>> X_new[0, 40:56, 100:116] = 255
    >>> detector.fit(X).predict(X_new)
    array([-1])
    >>> detector.localize(X_new).shape
    (1, 96, 128)
    """

    _parameter_constraints = {
        "detector": [BaseDetector],
        "tile_size": [Interval(Integral, 1, None, closed="left")],
        "overlap": [Interval(Real, 0, 1, closed="left")],
        "max_tiles": [Interval(Integral, 2, None, closed="left"), None],
        "contamination": BaseDetector._parameter_constraints["contamination"],
        "random_state": ["random_state"],
    }

    _judged_by = ("overlap",)

    image_shape = None  # photographs come as they are, not as rows

    def __init__(
        self,
        detector,
        *,
        tile_size=256,
        overlap=0.25,
        max_tiles=None,
        contamination=0.01,
        random_state=None,
    ):
        self.detector = detector
        self.tile_size = tile_size
        self.overlap = overlap
        self.max_tiles = max_tiles
        self.contamination = contamination
        self.random_state = random_state

    @property
    def device(self) -> str:
        """Torch device, that of the detector."""
        return self.detector.device

    def _why_no_maps(self):
        return getattr(self, "detector_", self.detector)._why_no_maps()

    def _why_not_exported(self):
        return "it cuts images into tiles; its detector_, which judges one, can be"

    def _check_settings(self):
        name = type(self.detector).__name__
        height, width, _ = self.image_shape_
        if self.tile_size > min(height, width):
            raise ValueError(
                f"tile_size={self.tile_size}, but X holds images of {height} x {width} "
                f"pixels: take tile_size={min(height, width)} or less, or {name} "
                "without tiles."
            )
        if self.detector._clip_length is not None:
            raise ValueError(f"detector={name} judges clips, which are not tiled.")
        if get_tags(self.detector).target_tags.required:
            raise ValueError(
                f"detector={name} needs labels to learn from, which tiles do not have."
            )
        self.detector._validate_params()

    def _fit(self, images, labels):
        self._begin_anew()
        size, sides = self.tile_size, self.image_shape_[:2]
        starts = [spread(side, size, side // size) for side in sides]
        tiles = Tiles(images.array, places_of(images.rows, *starts), size)
        keys = ImageBatches(tiles, images.device).keys
        _, firsts = np.unique(keys, return_index=True)
        if self.max_tiles is not None:
            rng = np.random.default_rng(self._seed)
            firsts = rng.permutation(firsts)[: self.max_tiles]
        drawn = np.sort(firsts)

        self.detector_ = clone(self.detector)
        if self.detector_.random_state is None:
            self.detector_.set_params(random_state=self._seed)
        self.detector_.fit(tiles[drawn])
        return self._judged(images, drawn // (len(tiles) // len(images)))

    def _judged(self, images, photographs):
        """Return degrees and maxima of maps of photographs, for the thresholds.

        Both are those of a prediction, unless tiles learned from, which come from some
        of the photographs, were judged higher without themselves.
        """
        detector, has_maps = self.detector_, self._why_no_maps() is None
        of_tiles = detector._training_degrees, detector._training_peaks
        if has_maps and len(of_tiles[1]) < len(photographs):
            of_tiles = detector._leave_one_out()  # SPADE's fit makes a few maps only
        judged = self._evaluate(images, maps_wanted=has_maps)
        if has_maps:
            of_photographs = degrees_and_peaks(judged)
        else:
            of_photographs = np.concatenate([degrees for _, degrees, _ in judged]), None
        highest = []
        for values, others in zip(of_photographs, of_tiles, strict=True):
            if values is not None:
                values = values.astype(float)
                np.maximum.at(values, photographs, others)
            highest.append(values)
        return highest

    def _evaluate(self, images, *, maps_wanted):
        """Yield the row, degree of anomaly and map (or None) of each photograph."""
        detector = as_fitted(self.detector_)
        if hasattr(detector, "network_"):
            move_network(detector.network_, images.device)
        size, sides = self.tile_size, self.image_shape_[:2]
        stride = max(1, int(size * (1 - self.overlap)))
        starts = [spread(side, size, -(-(side - size) // stride) + 1) for side in sides]
        down, across = (
            dict(zip(own, shares(own, size, self.overlap * size), strict=True))
            for own in starts
        )
        for number, row in enumerate(images.rows):
            places = places_of([row], *starts)
            tiles = ImageBatches(Tiles(images.array, places, size), images.device)
            degree = -np.inf
            whole = np.zeros((1, *sides), np.float32) if maps_wanted else None
            for rows, degrees, maps in detector._evaluate(
                tiles, maps_wanted=maps_wanted
            ):
                degree = max(degree, degrees.max())
                if not maps_wanted:
                    continue
                for (_, top, left), values in zip(places[rows], maps, strict=True):
                    weights = np.outer(down[top], across[left])
                    whole[0, top : top + size, left : left + size] += weights * values
            yield slice(number, number + 1), np.array([degree]), whole

    def _judge(self, images, *, maps_wanted, generator):
        raise NotImplementedError  # tiles are judged by the detector


class Tiles:
    """Tiles of images, cut when they are asked for.

    Parameters
    ----------
    images : numpy.ndarray or torch.Tensor of shape (n, H, W, C)
        Images.
    places : numpy.ndarray of shape (n_tiles, 3)
        Of each tile the row of its image, and its first row and column there.
    size : int
        Side of the tiles in pixels.
    """

    def __init__(self, images, places, size):
        self.images = images
        self.places = places
        self.size = size

    def __len__(self):
        return len(self.places)

    def __getitem__(self, rows):
        """Return a tile (size, size, C), or a copy of several (b, size, size, C)."""
        if np.ndim(rows) == 0:
            return self._cut(*self.places[rows])
        stack = torch.stack if isinstance(self.images, torch.Tensor) else np.stack
        return stack([self._cut(*place) for place in self.places[rows]])

    def _cut(self, image, top, left):
        return self.images[image, top : top + self.size, left : left + self.size]


def spread(side, size, n):
    """Return the starts (n,) of tiles, spread evenly over a side.

    Parameters
    ----------
    side, size : int
        Length of the side, and of a tile, in pixels.
    n : int
        Number of tiles. If they fit without an overlap, they have none.

    Returns
    -------
    numpy.ndarray of shape (n,)
        The first pixel of each tile; a single one is in the middle.
    """
    if n == 1:
        return np.array([(side - size) // 2])
    return np.arange(n) * (side - size) // (n - 1)


def places_of(rows, tops, lefts):
    """Return the places (n_tiles, 3) of the tiles of images, row by row."""
    return np.stack(np.meshgrid(rows, tops, lefts, indexing="ij"), -1).reshape(-1, 3)


def shares(starts, size, overlap):
    """Return the shares that tiles have in the values along a side.

    Parameters
    ----------
    starts : numpy.ndarray of shape (n,)
        The first pixel of each tile.
    size : int
        Side of the tiles in pixels.
    overlap : float
        Number of pixels by which a tile overlaps the next one at least.

    Returns
    -------
    numpy.ndarray of shape (n, size)
        Shares in [0, 1], float32; those in one pixel of the side add up to one. They
        rise linearly where the distance to the end of a tile is from a quarter to three
        quarters of the overlap.
    """
    distances = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    ramp = (distances - overlap / 4) / max(overlap / 2, 1)
    weights = ramp.clip(LEAST_WEIGHT, 1)
    pixels = starts[:, None] + np.arange(size)
    sums = np.bincount(pixels.ravel(), np.tile(weights, len(starts)))
    return (weights / sums[pixels]).astype(np.float32)
