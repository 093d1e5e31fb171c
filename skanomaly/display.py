"""Pictures of maps and scores, after scikit-learn's Display convention."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import Bunch
from sklearn.utils.validation import check_consistent_length, column_or_1d

from ._extras import required
from ._pictures import Pictures, color_limits, regions_of
from ._typing import ImagesOrPaths, Self
from ._validation import check_maps, check_masks, required_labels
from .pipeline import final_step, holder_of, loaded_images

MAP_COLORS = "inferno"
MASK_COLOR = "cyan"
SEGMENT_COLOR = "lime"
# longest side of the pictures in a figure, in pixels
PICTURE_SIDE = 1024


class AnomalyMapDisplay:
    """Pictures of images and their anomaly maps, a row for each image.

    On the left stands the image with boxes around its regions, on the right its map,
    laid over the image in grey, with the regions' outlines. Outlines of the true
    defects are drawn on both.

    Parameters
    ----------
    images : array-like of shape (n, H, W) or (n, H, W, C), or list of paths
        Grey (C = 1) or RGB images (C = 3), uint8 or float in [0, 1]; or image files.
        Axes count the pixels of the images at their own size, whatever the size of
        their maps.
    maps : array-like of shape (n, h, w)
        Anomaly maps, high where anomalous. They are stretched over the images, as
        `masks` and `segments` are.
    masks : array-like of shape (n, h, w), default=None
        Ground truth, True where anomalous.
    segments : array-like of shape (n, h, w), default=None
        Pixels marked by the detector, True where anomalous.
    regions : ndarray of shape (n_regions,), default=None
        Regions in pixels of `images`, as
        :func:`skanomaly.inspection.find_regions` returns them.
    map_threshold : float, default=None
        Threshold of the maps, in the middle of the colour scale; see Notes.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure; set by `plot`.
    axes_ : ndarray of shape (n, 2) of matplotlib Axes
        The axes of image and map; set by `plot`.

    See Also
    --------
    skanomaly.inspection.write_report : The same for many images, as a page to mail.

    Notes
    -----
    All maps of all figures of a detector share one colour scale: it goes from 0 to
    twice `map_threshold`. What the detector marks is in its upper half, bright, and a
    good image stays dark; values beyond the ends have the colours of the ends. If the
    threshold is not positive, which only negative maps have, the scale begins at their
    lowest value, or at twice the threshold if that is lower, and has the threshold in
    its middle, too. Without a threshold it goes from the lowest to the highest value.
    `vmin` and `vmax` replace either end.

    Images larger than 1,024 pixels are drawn at that size.

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

    def __init__(
        self,
        images,
        maps,
        *,
        masks=None,
        segments=None,
        regions=None,
        map_threshold=None,
    ):
        self.images = images
        self.maps = maps
        self.masks = masks
        self.segments = segments
        self.regions = regions
        self.map_threshold = map_threshold

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ImagesOrPaths,
        *,
        masks: ArrayLike | None = None,
        vmin: float | None = None,
        vmax: float | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw what a fitted detector finds in images.

        Parameters
        ----------
        estimator : estimator
            A fitted detector, a pipeline of skanomaly or scikit-learn that ends in one,
            a `ThresholdCalibrator` around these, or a search among them.
        X : array-like of shape (n, H, W, C), (n, H, W), or list of paths
            Images; paths, if a pipeline is given that loads them. Photographs behind
            `LoadImages` are drawn at their own size.
        masks : array-like of shape (n, h, w), default=None
            Ground truth, True where anomalous.
        vmin, vmax : float, default=None
            Ends of the colour scale. None: by the threshold of the maps.
        ax : array-like of shape (n, 2) of matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        AnomalyMapDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If the estimator has no maps, or no step that loads the paths.
        """
        _pyplot(cls)
        holder_of("localize", estimator, "has no maps")
        images = loaded_images(estimator, X)
        report = holder_of("inspect", estimator, "cannot inspect").inspect(X)
        return cls.from_report(report, images, masks=masks, vmin=vmin, vmax=vmax, ax=ax)

    @classmethod
    def from_report(
        cls,
        report: Bunch,
        images: ImagesOrPaths,
        *,
        masks: ArrayLike | None = None,
        vmin: float | None = None,
        vmax: float | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw what a report says of images.

        Parameters
        ----------
        report : sklearn.utils.Bunch
            What `inspect` returned, of a detector with maps.
        images : array-like of shape (n, H, W, C), (n, H, W), or list of paths
            The images that were inspected.
        masks : array-like of shape (n, h, w), default=None
            Ground truth, True where anomalous.
        vmin, vmax : float, default=None
            Ends of the colour scale. None: by the threshold of the maps.
        ax : array-like of shape (n, 2) of matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        AnomalyMapDisplay
            The display, drawn.
        """
        return cls(
            images,
            report.maps,
            masks=masks,
            segments=report.masks,
            regions=report.regions,
            map_threshold=report.map_threshold,
        ).plot(vmin=vmin, vmax=vmax, ax=ax)

    @classmethod
    def from_predictions(
        cls,
        images: ImagesOrPaths,
        maps: ArrayLike,
        *,
        masks: ArrayLike | None = None,
        segments: ArrayLike | None = None,
        regions: NDArray[np.void] | None = None,
        map_threshold: float | None = None,
        vmin: float | None = None,
        vmax: float | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw given maps.

        Parameters
        ----------
        images : array-like of shape (n, H, W) or (n, H, W, C), or list of paths
            Grey (C = 1) or RGB images (C = 3), uint8 or float in [0, 1]; or image
            files.
        maps : array-like of shape (n, h, w)
            Anomaly maps, high where anomalous.
        masks : array-like of shape (n, h, w), default=None
            Ground truth, True where anomalous.
        segments : array-like of shape (n, h, w), default=None
            Pixels marked by the detector, True where anomalous.
        regions : ndarray of shape (n_regions,), default=None
            Regions in pixels of `images`, as
            :func:`skanomaly.inspection.find_regions` returns them.
        map_threshold : float, default=None
            Threshold of the maps, in the middle of the colour scale.
        vmin, vmax : float, default=None
            Ends of the colour scale. None: by the threshold of the maps.
        ax : array-like of shape (n, 2) of matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        AnomalyMapDisplay
            The display, drawn.
        """
        return cls(
            images,
            maps,
            masks=masks,
            segments=segments,
            regions=regions,
            map_threshold=map_threshold,
        ).plot(vmin=vmin, vmax=vmax, ax=ax)

    def plot(
        self,
        *,
        vmin: float | None = None,
        vmax: float | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw a row for each image.

        Parameters
        ----------
        vmin, vmax : float, default=None
            Ends of the colour scale. None: by the threshold of the maps.
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
            If the shapes of images, maps, masks, segments, regions or `ax` do not fit.
        """
        plt = _pyplot(type(self))
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        pictures = Pictures(self.images)
        n = len(pictures)
        maps = _of_each("maps", check_maps(self.maps), n)
        masks, segments = (
            None if marks is None else _of_each(name, check_masks(marks), n)
            for name, marks in (("masks", self.masks), ("segments", self.segments))
        )
        read = [pictures.read(i, PICTURE_SIDE) for i in range(n)]
        if ax is None:
            relative = [height / width for _, (height, width) in read]
            _, ax = plt.subplots(
                n,
                2,
                squeeze=False,
                figsize=(6.0, 0.7 + 2.4 * sum(relative)),
                height_ratios=relative,
                layout="compressed",
            )
        ax = np.asarray(ax)
        if ax.shape != (n, 2):
            raise ValueError(f"ax must have shape {(n, 2)}; got {ax.shape}.")

        low, high = color_limits(maps, self.map_threshold)
        scale = Normalize(low if vmin is None else vmin, high if vmax is None else vmax)
        for i, (left, right) in enumerate(ax):
            shape = read[i][1]
            _draw(left, right, *read[i], maps[i], scale)
            if masks is not None:
                _outline(left, masks[i], shape, MASK_COLOR)
                _outline(right, masks[i], shape, MASK_COLOR)
            if segments is not None:
                _outline(right, segments[i], shape, SEGMENT_COLOR)
            if self.regions is not None:
                _draw_boxes(left, regions_of(self.regions, i, shape))
        ax[0, 0].set_title("Image")
        ax[0, 1].set_title("Anomaly map")
        figure = ax[0, 0].figure
        bar = figure.colorbar(
            ScalarMappable(scale, MAP_COLORS),
            ax=ax[:, 1],
            label="degree of anomaly",
            extend="max" if maps.max() > scale.vmax else "neither",
        )
        if self.map_threshold is not None:
            bar.ax.axhline(self.map_threshold, color=SEGMENT_COLOR)
        marked = segments is not None or self.regions is not None
        _legend(ax[-1, 1], masks is not None, marked)
        self.axes_ = ax
        self.figure_ = figure
        return self


class ScoresDisplay:
    """Histogram of the scores of good and of anomalous images, with the threshold.

    Parameters
    ----------
    scores : array-like of shape (n,)
        Scores, high where normal.
    y : array-like of shape (n,) or (n, H, W), default=None
        Labels, +1 for normal and -1 for anomalous images, or masks, True where
        anomalous. None: one histogram of all images.
    classes : array-like of shape (n,), default=None
        Names of the classes of defects, such as those of
        :func:`skanomaly.datasets.load_folder`. Anomalous images, all without `y`, are
        drawn by class.
    offset : float, default=None
        Threshold below which an image is called anomalous.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure; set by `plot`.
    ax_ : matplotlib Axes
        The axes; set by `plot`.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.display import ScoresDisplay
    >>> scores = np.random.default_rng(0).normal([[0], [-5]], 1, (2, 50)).ravel()
    >>> y = np.repeat([1, -1], 50)
    >>> display = ScoresDisplay.from_scores(scores, y, offset=-2.5)
    >>> display.ax_.get_xlabel()
    'score'
    """

    def __init__(self, scores, y=None, *, classes=None, offset=None):
        self.scores = scores
        self.y = y
        self.classes = classes
        self.offset = offset

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ImagesOrPaths,
        y: ArrayLike | None = None,
        *,
        classes: ArrayLike | None = None,
        bins: Any = 30,
        ax: Any = None,
    ) -> Self:
        """Draw the scores that a fitted estimator gives images.

        Parameters
        ----------
        estimator : estimator
            A fitted detector, a pipeline that ends in one, a `ThresholdCalibrator`
            around these, or a search among them.
        X : array-like of shape (n, H, W, C), or what the estimator takes
            Images.
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels, +1 for normal and -1 for anomalous images, or masks, True where
            anomalous.
        classes : array-like of shape (n,), default=None
            Names of the classes of defects.
        bins : int, sequence or str, default=30
            The bins, as :func:`numpy.histogram_bin_edges` takes them.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        ScoresDisplay
            The display, drawn.
        """
        _pyplot(cls)
        return cls.from_scores(
            estimator.score_samples(X),
            y,
            classes=classes,
            offset=getattr(final_step(estimator), "offset_", None),
            bins=bins,
            ax=ax,
        )

    @classmethod
    def from_scores(
        cls,
        scores: ArrayLike,
        y: ArrayLike | None = None,
        *,
        classes: ArrayLike | None = None,
        offset: float | None = None,
        bins: Any = 30,
        ax: Any = None,
    ) -> Self:
        """Draw given scores.

        Parameters
        ----------
        scores : array-like of shape (n,)
            Scores, high where normal.
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels, +1 for normal and -1 for anomalous images, or masks, True where
            anomalous.
        classes : array-like of shape (n,), default=None
            Names of the classes of defects.
        offset : float, default=None
            Threshold below which an image is called anomalous.
        bins : int, sequence or str, default=30
            The bins, as :func:`numpy.histogram_bin_edges` takes them.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        ScoresDisplay
            The display, drawn.
        """
        return cls(scores, y, classes=classes, offset=offset).plot(bins=bins, ax=ax)

    def plot(self, *, bins: Any = 30, ax: Any = None) -> Self:
        """Draw the histogram, the classes on top of each other.

        Parameters
        ----------
        bins : int, sequence or str, default=30
            The bins, as :func:`numpy.histogram_bin_edges` takes them.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        ScoresDisplay
            The display itself, with `figure_` and `ax_`.

        Raises
        ------
        ValueError
            If there are other numbers of labels or classes than of scores, or labels
            other than +1 and -1.
        """
        plt = _pyplot(type(self))
        scores = column_or_1d(self.scores)
        groups = self._groups(len(scores))
        if ax is None:
            _, ax = plt.subplots()
        edges = np.histogram_bin_edges(scores, bins)
        ax.hist(
            [scores[rows] for rows in groups.values()],
            edges,
            stacked=True,
            label=[f"{name} ({rows.sum()})" for name, rows in groups.items()],
        )
        if self.offset is not None:
            ax.axvline(self.offset, color="black", linestyle="--", label="threshold")
        ax.set(xlabel="score", ylabel="number of images")
        ax.legend()
        self.ax_ = ax
        self.figure_ = ax.figure
        return self

    def _groups(self, n):
        """Return the rows of each group by its name, as booleans."""
        good = required_labels(self.y, n) == 1
        if self.classes is not None:
            check_consistent_length(good, self.classes)
            classes = np.asarray(self.classes).astype(str)
            bad = ~good if self.y is not None else np.ones(n, bool)
            groups = {name: bad & (classes == name) for name in np.unique(classes[bad])}
        elif self.y is None:
            return {"images": good}
        else:
            groups = {"anomalous": ~good}
        return groups if self.y is None else {"good": good, **groups}


class ControlChartDisplay:
    """Scores or p-values in the order of time, with the limit of what is normal.

    Parameters
    ----------
    values : array-like of shape (n,)
        Scores or p-values, high where normal.
    limit : float, default=None
        Threshold of the scores, below which an image is called anomalous; or the rate
        of false positives that p-values are compared with, which do not exceed it where
        an image is anomalous.
    times : array-like of shape (n,), default=None
        Numbers or times (datetime64) of the images, in any order. None: they are in
        order, and counted from 0.
    kind : {"score", "p-value"}, default="score"
        What `values` are. P-values have a logarithmic axis.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure; set by `plot`.
    ax_ : matplotlib Axes
        The axes; set by `plot`.

    See Also
    --------
    skanomaly.ThresholdCalibrator : Finds the limit, and p-values.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.display import ControlChartDisplay
    >>> scores = np.random.default_rng(0).normal(size=100)
    >>> display = ControlChartDisplay.from_scores(scores, limit=-2.5)
    >>> display.ax_.get_ylabel()
    'score'
    """

    def __init__(self, values, *, limit=None, times=None, kind="score"):
        self.values = values
        self.limit = limit
        self.times = times
        self.kind = kind

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ImagesOrPaths,
        *,
        response_method: str = "score_samples",
        times: ArrayLike | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw the scores or p-values that a fitted estimator gives images.

        Parameters
        ----------
        estimator : estimator
            A fitted detector, a pipeline that ends in one, a `ThresholdCalibrator`
            around these, or a search among them.
        X : array-like of shape (n, H, W, C), or what the estimator takes
            Images.
        response_method : {"score_samples", "p_values"}, default="score_samples"
            What is drawn: scores with the threshold, or the p-values of a
            `ThresholdCalibrator` with its rate of false positives.
        times : array-like of shape (n,), default=None
            Numbers or times of the images, in any order.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        ControlChartDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If p-values are asked of what is no `ThresholdCalibrator`.
        ValueError
            If `response_method` is neither of these.
        """
        _pyplot(cls)
        if response_method == "score_samples":
            return cls.from_scores(
                estimator.score_samples(X),
                limit=getattr(final_step(estimator), "offset_", None),
                times=times,
                ax=ax,
            )
        if response_method != "p_values":
            raise ValueError(
                "response_method must be 'score_samples' or 'p_values', got "
                f"{response_method!r}."
            )
        calibrator = getattr(estimator, "best_estimator_", estimator)
        if not hasattr(calibrator, "p_values"):
            raise TypeError(
                "response_method='p_values' needs a ThresholdCalibrator, got "
                f"{type(calibrator).__name__}."
            )
        return cls.from_p_values(
            calibrator.p_values(X),
            limit=calibrator.false_positive_rate,
            times=times,
            ax=ax,
        )

    @classmethod
    def from_scores(
        cls,
        scores: ArrayLike,
        *,
        limit: float | None = None,
        times: ArrayLike | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw given scores.

        Parameters
        ----------
        scores : array-like of shape (n,)
            Scores, high where normal.
        limit : float, default=None
            Threshold below which an image is called anomalous.
        times : array-like of shape (n,), default=None
            Numbers or times of the images, in any order.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        ControlChartDisplay
            The display, drawn.
        """
        return cls(scores, limit=limit, times=times).plot(ax=ax)

    @classmethod
    def from_p_values(
        cls,
        p_values: ArrayLike,
        *,
        limit: float | None = None,
        times: ArrayLike | None = None,
        ax: Any = None,
    ) -> Self:
        """Draw given p-values.

        Parameters
        ----------
        p_values : array-like of shape (n,)
            P-values, as of ``ThresholdCalibrator.p_values``.
        limit : float, default=None
            Rate of false positives. An image is called anomalous whose p-value does not
            exceed it.
        times : array-like of shape (n,), default=None
            Numbers or times of the images, in any order.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        ControlChartDisplay
            The display, drawn.
        """
        return cls(p_values, limit=limit, times=times, kind="p-value").plot(ax=ax)

    def plot(self, *, ax: Any = None) -> Self:
        """Draw the values as points, those beyond the limit in red.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None: a new figure.

        Returns
        -------
        ControlChartDisplay
            The display itself, with `figure_` and `ax_`.

        Raises
        ------
        ValueError
            If there is another number of times than of values, or `kind` is unknown.
        """
        plt = _pyplot(type(self))
        if self.kind not in ("score", "p-value"):
            raise ValueError(f"kind must be 'score' or 'p-value', got {self.kind!r}.")
        values = column_or_1d(self.values)
        times = np.arange(len(values)) if self.times is None else np.ravel(self.times)
        check_consistent_length(values, times)
        order = np.argsort(times, kind="stable")
        times, values = times[order], values[order]
        if ax is None:
            _, ax = plt.subplots(figsize=(8, 3), layout="constrained")
        ax.plot(times, values, ".-", linewidth=0.5, label=self.kind)
        if self.limit is not None:
            is_score = self.kind == "score"
            beyond = values < self.limit if is_score else values <= self.limit
            ax.plot(times[beyond], values[beyond], "o", color="red", label="anomalous")
            ax.axhline(self.limit, color="black", linestyle="--", label="limit")
        if self.kind == "p-value":
            ax.set_yscale("log")
        ax.set(xlabel="image" if self.times is None else "time", ylabel=self.kind)
        ax.legend()
        self.ax_ = ax
        self.figure_ = ax.figure
        return self


def _pyplot(cls):
    """Return matplotlib's pyplot, before the images are judged."""
    return required("matplotlib.pyplot", extra="plot", wanted_by=cls.__name__)


def _of_each(name, maps, n):
    if maps.ndim != 3 or len(maps) != n:
        raise ValueError(
            f"{name} must have the shape (n, H, W), one for each of the {n} images; "
            f"got {maps.shape}."
        )
    return maps


def _draw(left, right, picture, shape, values, scale):
    """Draw an image, and its map over the image in grey."""
    height, width = shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    left.imshow(picture, extent=extent)
    right.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, extent=extent)
    right.imshow(values, norm=scale, cmap=MAP_COLORS, alpha=0.6, extent=extent)
    left.set_axis_off()
    right.set_axis_off()


def _outline(ax, mask, shape, color):
    """Draw the outline of a mask that is stretched over an image."""
    if not mask.any():
        return
    ax.autoscale(False)
    # a rim of False closes the outline of a region that touches the border
    rows, columns = (
        (np.arange(-1, n_pixels + 1) + 0.5) * length / n_pixels - 0.5
        for n_pixels, length in zip(mask.shape, shape, strict=True)
    )
    ax.contour(
        columns, rows, np.pad(mask, 1), levels=[0.5], colors=color, linewidths=1.2
    )


def _draw_boxes(ax, regions):
    from matplotlib.patches import Rectangle

    for region in regions:
        corner = region["left"] - 0.5, region["top"] - 0.5
        sides = region["right"] - region["left"], region["bottom"] - region["top"]
        ax.add_patch(Rectangle(corner, *sides, fill=False, color=SEGMENT_COLOR))


def _legend(ax, has_masks, is_marked):
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, label=label)
        for is_drawn, color, label in (
            (has_masks, MASK_COLOR, "true mask"),
            (is_marked, SEGMENT_COLOR, "found"),
        )
        if is_drawn
    ]
    if handles:
        ax.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=2,
            frameon=False,
        )
