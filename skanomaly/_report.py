"""A report on images as one HTML page."""

import base64
import hashlib
import io
import os
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from sklearn.utils import Bunch
from sklearn.utils.validation import column_or_1d

from ._fitting.files import replacing, try_to_write
from ._pictures import Pictures, color_limits, regions_of
from ._typing import ImagesOrPaths, StrPath
from ._validation import check_maps, check_masks
from .version import __version__

# longest sides in pixels, the first that fits; bytes of all together in the page
PHOTOGRAPH_SIDES, PHOTOGRAPH_BYTES = (960, 640, 480, 320, 240, 160), 10e6
MAP_SIDES, MAP_BYTES = (320, 160, 80), 3e6
MAX_REGIONS = 30  # drawn of an image
N_BINS = 60
# from dark to bright, matplotlib's "inferno", which is in the public domain (CC0)
COLORS = np.array(
    [
        *((0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84)),
        *((228, 90, 49), (249, 142, 9), (249, 203, 53), (252, 255, 164)),
    ]
)


def write_report(
    report: Bunch,
    images: ImagesOrPaths,
    path: StrPath,
    *,
    names: ArrayLike | None = None,
    title: str = "Inspection report",
    date: Any = None,
) -> None:
    """Write a report on images as one HTML page, to open in a browser or to mail.

    Parameters
    ----------
    report : sklearn.utils.Bunch
        What `inspect` returned.
    images : array-like of shape (n, H, W, C), (n, H, W), or list of paths
        The images that were inspected: grey (C = 1) or RGB (C = 3), uint8 or float in
        [0, 1]; or the paths of the photographs.
    path : str or path-like
        The page, such as "report.html". A file that is there is replaced once the new
        one is complete.
    names : array-like of shape (n,), default=None
        Names of the images. None: the paths below the folder that all are in, or the
        numbers of the images.
    title : str, default="Inspection report"
        Title of the page.
    date : object, default=None
        Date or time of the page, written as ``str`` has it. None: the page has none,
        so that equal reports give equal files.

    Raises
    ------
    ValueError
        If there are other numbers of images or names than of scores, regions that reach
        beyond their images, or a report on clips.
    OSError
        If the page cannot be written, or a photograph not be read.

    See Also
    --------
    inspect : Makes reports.
    skanomaly.display.AnomalyMapDisplay : Figures of a few images.

    Notes
    -----
    The page holds all that it shows, asks nothing of a network, and runs no script but
    its own, which sorts and filters the table: names are text, whatever is in them.

    Photographs are at most 960 pixels wide and high, and smaller in long reports, so
    that a page of 500 images has less than 20 MB. Of an image, the 30 regions with the
    highest peaks are drawn. Maps have the colour scale of
    :class:`skanomaly.display.AnomalyMapDisplay`, with the threshold in its middle.

    Files of 16 bits whose white is another value than 65535 come out dark. Give what
    ``LoadImages(max_value=...).transform(paths)`` returns instead, at the size of the
    files, and the paths as `names`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from skanomaly import SPADE
    >>> from skanomaly.inspection import write_report
    >>> X = np.random.default_rng(0).random((8, 32, 32, 3), dtype=np.float32)
    >>> detector = SPADE(backbone="resnet18", weights=None).fit(X[:6])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = Path(folder) / "report.html"
    ...     write_report(detector.inspect(X[6:]), X[6:], page, date="2031-05-04")
    ...     print(page.read_text().count("<tbody"))
    2
    """
    pictures = Pictures(images)
    n = len(pictures)
    names = _names(names, pictures)
    _check(report, n)
    what = f"path={os.fspath(path)!r}"
    try_to_write(path, what)

    columns = {"Score": (report.scores, "#.4g")}
    if "p_values" in report:
        columns["p-value"] = report.p_values, ".3g"
    if "regions" in report:
        counts = np.bincount(report.regions["image"], minlength=n)
        columns["Regions"] = counts, "d"
    scale = None
    if "maps" in report:
        scale = color_limits(report.maps, report.map_threshold)
    rows = [
        _row(
            number,
            names[number],
            "anomalous" if report.labels[number] == -1 else "normal",
            columns,
            _figures(report, pictures, number, scale),
        )
        for number in np.argsort(report.scores, kind="stable")
    ]
    folder = files("skanomaly")
    script = folder.joinpath("_report.js").read_text("utf-8")
    page = Template(folder.joinpath("_report.html").read_text("utf-8")).substitute(
        title=escape(title),
        date="" if date is None else f'<p class="soft">{escape(str(date))}</p>',
        summary=_summary(report),
        histogram=_histogram(report),
        colors="" if scale is None else _color_scale(scale),
        p_values="The p&#8209;value is the share of good images whose score is as low."
        if "p_values" in report
        else "",
        head="".join(_head(column) for column in ("Name", "Label", *columns)),
        rows="\n".join(rows),
        script=script,
        script_hash=_base64(hashlib.sha256(script.encode()).digest()),
        version=__version__,
    )
    with replacing(path, what) as file:
        # names of files may hold bytes that are no text
        file.write(page.encode("utf-8", "backslashreplace"))


def _names(names, pictures):
    if names is not None:
        names = [str(name) for name in column_or_1d(names)]
    elif pictures.paths is None:
        names = [f"image {number}" for number in range(len(pictures))]
    else:
        paths = [os.path.abspath(path) for path in pictures.paths]
        folder = os.path.commonpath(map(os.path.dirname, paths))
        names = [os.path.relpath(path, folder) for path in paths]
    if len(names) != len(pictures):
        raise ValueError(f"names must be of {len(pictures)} images, got {len(names)}.")
    return names


def _check(report, n):
    if len(report.scores) != n:
        raise ValueError(f"report is of {len(report.scores)} images, but {n} came.")
    if "maps" not in report:
        return
    check_masks(report.masks)
    if check_maps(report.maps).ndim != 3:
        raise ValueError(
            "report must be of images, with maps (n, H, W); those of clips have the "
            f"shape {report.maps.shape}."
        )


# The parts of the page


def _summary(report):
    n, n_anomalous = len(report.labels), int((report.labels == -1).sum())
    facts = {
        "Images": n,
        "Anomalous": f"{n_anomalous} ({n_anomalous / n:.1%})",
        "Threshold of the scores": f"{report.offset:.4g}",
    }
    return "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()
    )


def _histogram(report):
    low, high = (f(*report.scores, report.offset) for f in (min, max))
    width = (high - low) or 1
    bars, below = [], np.zeros(N_BINS, int)
    for kind, label in (("anomalous", -1), ("normal", 1)):
        places = (report.scores[report.labels == label] - low) / width
        counts = np.histogram(places, N_BINS, range=(0, 1))[0]
        below += counts
        bars += [
            f'<rect class="{kind}" x="{i}" y="{-below[i]}" width="0.9" '
            f'height="{counts[i]}"/>'
            for i in np.flatnonzero(counts)
        ]
    top = below.max()
    place = f"{N_BINS * (report.offset - low) / width:.3f}"
    return (
        '<h2 id="scores">Scores</h2><figure class="histogram">'
        f'<svg viewBox="0 {-top} {N_BINS} {top}" preserveAspectRatio="none" role="img" '
        'aria-labelledby="scores caption">'
        f'{"".join(bars)}<line x1="{place}" x2="{place}" y1="{-top}" y2="0"/></svg>'
        f'<div class="axis soft"><span>{low:.4g}</span><span>{high:.4g}</span></div>'
        '<figcaption id="caption" class="soft">'
        '<span class="key" style="background: var(--bad)"></span>anomalous '
        '<span class="key" style="background: var(--good)"></span>normal '
        f"images by score; the line is the threshold, {report.offset:.4g}, and the "
        f"highest bar has {top} images.</figcaption></figure>"
    )


def _color_scale(scale):
    low, high = scale
    stops = ", ".join("rgb({}, {}, {})".format(*color) for color in COLORS)
    return (
        f'<h2>Colours of the maps</h2><div class="scale" style="background: '
        f'linear-gradient(to right, {stops})"></div><div class="axis soft">'
        f"<span>{low:.4g}</span><span>threshold {(low + high) / 2:.4g}</span>"
        f"<span>{high:.4g} and more</span></div>"
    )


def _head(column):
    order = ' aria-sort="ascending"' if column == "Score" else ""
    return f'<th scope="col"{order}><button type="button">{column}</button></th>'


def _row(number, name, kind, columns, figures):
    """Return the row of an image, and below it that of its pictures."""
    name = escape(name).replace("/", "/<wbr>")
    values = [
        f'<td data-value="{values[number].item()!r}">{values[number]:{form}}</td>'
        for values, form in columns.values()
    ]
    return (
        f'<tbody class="{kind}"><tr><th scope="row"><button type="button" '
        f'aria-expanded="false" aria-controls="of-{number}"><bdi>{name}</bdi>'
        f"</button></th><td>{kind}</td>{''.join(values)}</tr>"
        f'<tr id="of-{number}" hidden><td class="pictures" colspan="{len(values) + 2}">'
        f"<noscript><div>{''.join(figures)}</div></noscript></td></tr></tbody>"
    )


def _figures(report, pictures, number, scale):
    """Yield photograph, map, and photograph with outlines and boxes of an image."""
    picture, (height, width) = pictures.read(number, PHOTOGRAPH_SIDES[0])
    share = 1 / len(pictures)
    size = f'width="{width}" height="{height}" preserveAspectRatio="none"'

    def figure(content, caption):
        return (
            f'<figure><svg viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{caption}">{content}</svg>'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    uri = _data_uri(picture, PHOTOGRAPH_SIDES, share * PHOTOGRAPH_BYTES)
    yield figure(f'<image id="photo-{number}" {size} href="{uri}"/>', "Photograph")
    if scale is None:
        return
    again = f'<use href="#photo-{number}"'
    colored = _colored(report.maps[number], scale)
    uri = _data_uri(colored, MAP_SIDES, share * MAP_BYTES)
    yield figure(
        f'{again} class="grey"/><image {size} opacity="0.6" href="{uri}"/>',
        "Anomaly map",
    )
    regions = regions_of(report.regions, number, (height, width))
    drawn = regions[np.argsort(-regions["peak"], kind="stable")[:MAX_REGIONS]]
    caption = f"{len(regions) or 'No'} region{'s' * (len(regions) != 1)}"
    if len(regions) > MAX_REGIONS:
        caption += f", boxes around the {MAX_REGIONS} with the highest peaks"
    outlines = _outlines(report.masks[number], height, width)
    yield figure(f"{again}/>{outlines}{''.join(map(_box, drawn))}", caption)


def _box(region):
    width, height = region["right"] - region["left"], region["bottom"] - region["top"]
    return (
        f'<rect class="found box" x="{region["left"]}" y="{region["top"]}" '
        f'width="{width}" height="{height}"><title>{width} x {height} pixels, '
        f"area {region['area']}, peak {region['peak']:.4g}</title></rect>"
    )


def _outlines(mask, height, width):
    """Return the outlines of a mask that is stretched over so many pixels."""
    if not mask.any():
        return ""
    from skimage.measure import approximate_polygon, find_contours

    scale = np.array([height, width]) / mask.shape
    tolerance = max(0.4, max(mask.shape) / 640)  # else large masks have long outlines
    lines = []
    for outline in sorted(find_contours(np.pad(mask, 1), 0.5), key=len)[-MAX_REGIONS:]:
        corners = (approximate_polygon(outline, tolerance) - 0.5) * scale
        lines.append("M" + " ".join(f"{x:.1f},{y:.1f}" for y, x in corners) + "Z")
    return f'<path class="found" d="{"".join(lines)}"/>'


def _colored(values, scale):
    """Return a picture of a map in colours."""
    low, high = scale
    picture = Image.fromarray(values.astype(np.float32))
    picture.thumbnail(MAP_SIDES[:1] * 2, Image.Resampling.BILINEAR)
    places = (np.asarray(picture) - low) / ((high - low) or 1)
    stops = np.linspace(0, 1, len(COLORS))
    colors = [np.interp(places, stops, channel) for channel in COLORS.T]
    return Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8))


def _data_uri(picture, sides, n_bytes):
    """Return a picture as text, at the largest size that has so many bytes."""
    for side in sides:
        picture.thumbnail((side, side))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80, optimize=True)
        text = _base64(file.getvalue())
        if len(text) <= n_bytes:
            break
    return f"data:image/jpeg;base64,{text}"


def _base64(content):
    return base64.b64encode(content).decode()
