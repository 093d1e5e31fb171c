"""Pictures of anomaly maps, after scikit-learn's Display convention."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils._optional_dependencies import check_matplotlib_support

from ._typing import ImagesOrPaths, Self
from .pipeline import final_step, loaded_images, localize, with_maps

MAP_COLORS = "viridis"
MASK_COLOR = "cyan"
SEGMENT_COLOR = "red"


class AnomalyMapDisplay:
    """Pictures of images and their anomaly maps, a row for each image.

    On the left stands the image, on the right its map laid over the image in grey. All
    maps share one colour scale. Outlines show the true defects and the regions that
    the detector marks.

    Parameters
    ----------
    images : array-like of shape (n, H, W) or (n, H, W, C)
        Grey (C = 1) or RGB images (C = 3), uint8 or float in [0, 1].
    maps : array-like of shape (n, H, W)
        Anomaly maps, high where anomalous.
    masks : array-like of shape (n, H, W), default=None
        Ground truth, True where anomalous.
    segments : array-like of shape (n, H, W), default=None
        Regions marked by the detector, True where anomalous.
    map_threshold : float, default=None
        Threshold of the maps. The colour scale ends there, or at the highest value if
        that is above it. None: at the highest value.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure; set by `plot`.
    axes_ : ndarray of shape (n, 2) of matplotlib Axes
        The axes of image and map; set by `plot`.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.display import AnomalyMapDisplay
    >>> images = np.random.default_rng(0).random((3, 32, 32, 3))
    >>> maps = images.mean(axis=-1)
    >>> display = AnomalyMapDisplay.from_predictions(images, maps, segments=maps > 0.9)
    >>> display.axes_.shape
    (3, 2)
    """

    def __init__(self, images, maps, *, masks=None, segments=None, map_threshold=None):
        self.images = images
        self.maps = maps
        self.masks = masks
        self.segments = segments
        self.map_threshold = map_threshold

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ImagesOrPaths,
        *,
        masks: ArrayLike | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw the maps that a fitted detector or pipeline gives for images.

        Regions are outlined if `estimator` has `segment`.

        Parameters
        ----------
        estimator : estimator
            A fitted detector, a pipeline of skanomaly or scikit-learn that ends in one,
            a `ThresholdCalibrator` around these, or a search among them.
        X : array-like of shape (n, H, W, C), (n, H, W), or list of paths
            Images; paths, if a pipeline is given whose first step loads them.
        masks : array-like of shape (n, H, W), default=None
            Ground truth, True where anomalous.
        ax : array-like of shape (n, 2) of matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        AnomalyMapDisplay
            The display, drawn.
        """
        holder = with_maps(getattr(estimator, "best_estimator_", estimator))
        return cls.from_predictions(
            loaded_images(estimator, X),
            localize(estimator, X),
            masks=masks,
            segments=holder.segment(X) if hasattr(holder, "segment") else None,
            map_threshold=getattr(final_step(estimator), "map_threshold_", None),
            ax=ax,
        )

    @classmethod
    def from_predictions(
        cls,
        images: ArrayLike,
        maps: ArrayLike,
        *,
        masks: ArrayLike | None = None,
        segments: ArrayLike | None = None,
        map_threshold: float | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw given maps.

        Parameters
        ----------
        images : array-like of shape (n, H, W) or (n, H, W, C)
            Grey (C = 1) or RGB images (C = 3), uint8 or float in [0, 1].
        maps : array-like of shape (n, H, W)
            Anomaly maps, high where anomalous.
        masks : array-like of shape (n, H, W), default=None
            Ground truth, True where anomalous.
        segments : array-like of shape (n, H, W), default=None
            Regions marked by the detector, True where anomalous.
        map_threshold : float, default=None
            Threshold of the maps. The colour scale ends there, or at the highest value
            if that is above it. None: at the highest value.
        ax : array-like of shape (n, 2) of matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        AnomalyMapDisplay
            The display, drawn.
        """
        return cls(
            images, maps, masks=masks, segments=segments, map_threshold=map_threshold
        ).plot(ax=ax)

    def plot(self, *, ax: Any = None) -> Self:
        """Draw a row for each image.

        Parameters
        ----------
        ax : array-like of shape (n, 2) of matplotlib Axes, default=None
            Axes to draw on. None: a new figure. A figure of one's own is best made with
            ``layout="compressed"``, which leaves room for colour bar and legend.

        Returns
        -------
        AnomalyMapDisplay
            The display itself, with `figure_` and `axes_`.

        Raises
        ------
        ValueError
            If the shapes of images, maps, masks, segments or `ax` do not fit.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        images = _check_images(self.images)
        maps, masks, segments = (
            _check_maps(name, getattr(self, name), images)
            for name in ("maps", "masks", "segments")
        )
        n, height, width = maps.shape
        if ax is None:
            _, ax = plt.subplots(
                n,
                2,
                squeeze=False,
                figsize=(6.0, 0.7 + 2.4 * n * height / width),
                layout="compressed",
            )
        ax = np.asarray(ax)
        if ax.shape != (n, 2):
            raise ValueError(f"ax must have shape {(n, 2)}; got {ax.shape}.")

        # a good image alone is not to glow in the colour of a defect
        highest = maps.max()
        if self.map_threshold is not None:
            highest = max(highest, self.map_threshold)
        scale = Normalize(maps.min(), highest)
        for i, (left, right) in enumerate(ax):
            left.imshow(images[i], cmap="gray", vmin=0, vmax=1)
            grey = images[i].mean(axis=-1) if images.ndim == 4 else images[i]
            right.imshow(grey, cmap="gray", vmin=0, vmax=1)
            right.imshow(maps[i], norm=scale, cmap=MAP_COLORS, alpha=0.6)
            _outline(left, masks, i, MASK_COLOR)
            _outline(right, masks, i, MASK_COLOR)
            _outline(right, segments, i, SEGMENT_COLOR)
            left.set_axis_off()
            right.set_axis_off()
        ax[0, 0].set_title("Image")
        ax[0, 1].set_title("Anomaly map")
        figure = ax[0, 0].figure
        colors = ScalarMappable(scale, MAP_COLORS)
        figure.colorbar(colors, ax=ax[:, 1], label="anomaly score")
        _legend(ax[-1, 1], masks, segments)
        self.axes_ = ax
        self.figure_ = figure
        return self


def _as_array(values):
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def _check_images(images):
    images = np.asarray(_as_array(images))
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3 and (images.ndim != 4 or images.shape[-1] != 3):
        raise ValueError(
            "images must have shape (n, H, W), (n, H, W, 1) or (n, H, W, 3); "
            f"got {images.shape}."
        )
    return images / 255 if images.dtype == np.uint8 else images


def _check_maps(name, maps, images):
    if maps is None:
        return None
    maps = np.asarray(_as_array(maps))
    if maps.shape != images.shape[:3]:
        raise ValueError(
            f"{name} must have the images' shape {images.shape[:3]}; got {maps.shape}."
        )
    return maps


def _outline(ax, masks, i, color):
    if masks is None or not masks[i].any():
        return
    ax.autoscale(False)
    # a rim of False closes the outline of a region that touches the border
    height, width = masks[i].shape
    ax.contour(
        np.arange(-1, width + 1),
        np.arange(-1, height + 1),
        np.pad(masks[i], 1),
        levels=[0.5],
        colors=color,
        linewidths=1.2,
    )


def _legend(ax, masks, segments):
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, label=label)
        for maps, color, label in (
            (masks, MASK_COLOR, "true mask"),
            (segments, SEGMENT_COLOR, "segment"),
        )
        if maps is not None
    ]
    if handles:
        ax.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=2,
            frameon=False,
        )
