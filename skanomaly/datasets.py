"""Data sets for visual anomaly detection: at hand, synthetic, or read from a folder."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions

from ._datasets.folders import load_folder
from ._datasets.layouts import load_mvtec, load_mvtec_ad2, load_mvtec_loco, load_visa
from ._planting import irregular_spot, plant_defects
from ._typing import validate_params

__all__ = [
    "labels_from",
    "load_folder",
    "load_mvtec",
    "load_mvtec_ad2",
    "load_mvtec_loco",
    "load_textures",
    "load_visa",
    "make_clips",
    "make_ellipses",
    "make_moving_shapes",
    "plant_defects",
]

TEXTURES_DESCR = """\
Photographed textures with planted defects
------------------------------------------
Square crops of a photograph that scikit-image brings along: skimage.data.brick, grass
or gravel, 512 x 512 grey pixels, Creative Commons CC0 (brick and gravel from
CC0Textures, grass from DeviantArt). A crop covers 128 x 128 pixels of the photograph,
scaled to the size asked for, and is mirrored left to right with probability one half.
Test crops come from the 192 columns in the middle, training crops from the 160 columns
on either side of them, so that the two share no pixel. Crops of the same part overlap.

Half of the test crops get one defect each, blended in with an opacity between 0 and 1:

hole     a dark spot of irregular outline
patch    a piece of another of the three photographs, of irregular outline
scratch  a bent line, bright or dark, thinner towards its ends
stain    a soft-edged spot that darkens or brightens the texture under it

An opacity below 0.1 is set to 0, and a defect's mask is where its opacity is above 0:
outside the mask an image is the photograph, unchanged to the last bit.
"""

MOVING_SHAPES_DESCR = """\
Videos of moving shapes
-----------------------
Grey discs and squares move over a faint background that all videos share. Each keeps
its velocity, passes in front of or behind the others and bounces off the borders.

A test video has two intervals in which its foremost shape is anomalous, one in each
half and of either kind first:

fast     the shape moves five times as fast as before
form     the shape is a cross

Outside of these intervals test videos are made like training videos. A mask is where
the anomalous shape is.
"""

_TEXTURES = ("brick", "grass", "gravel")
_CROP = 128  # side of a crop in pixels of the photograph
_TEST_COLUMNS = (160, 352)


@validate_params(
    {
        "texture": [StrOptions(set(_TEXTURES))],
        "n_train": [Interval(Integral, 1, None, closed="left")],
        "n_test": [Interval(Integral, 1, None, closed="left")],
        "size": [Interval(Integral, 16, _CROP, closed="both")],
        "random_state": ["random_state"],
    },
    prefer_skip_nested_validation=True,
)
def load_textures(
    *,
    texture: str = "brick",
    n_train: int = 200,
    n_test: int = 80,
    size: int = 64,
    random_state: int | np.random.RandomState | None = 0,
) -> Bunch:
    """Load crops of a photographed texture, half of the test crops with a defect.

    Real photographs under Creative Commons CC0, no download, known masks.

    Parameters
    ----------
    texture : {"brick", "grass", "gravel"}, default="brick"
        The photograph. Brick is regular and the easiest of the three.
    n_train : int, default=200
        Number of training images, all normal.
    n_test : int, default=80
        Number of test images. Every second one has a defect; the kinds hole, patch,
        scratch and stain take turns.
    size : int, default=64
        Height and width of the images in pixels, from 16 to 128. An image covers
        128 x 128 pixels of the photograph at any size.
    random_state : int, RandomState instance or None, default=0
        Draws crops and defects. Pass an int for the same images in every call.

    Returns
    -------
    data : sklearn.utils.Bunch
        With the attributes

        X_train : ndarray of shape (n_train, size, size, 1)
            Training images, uint8.
        X_test : ndarray of shape (n_test, size, size, 1)
            Test images, uint8, in the order of their defects' names.
        y_test : ndarray of shape (n_test,)
            +1 for normal and -1 for anomalous images.
        masks_test : ndarray of shape (n_test, size, size)
            True where anomalous.
        defect_test : ndarray of shape (n_test,)
            "good", "hole", "patch", "scratch" or "stain".
        DESCR : str
            Where the photographs come from and how the defects are made.

    See Also
    --------
    load_mvtec : Load a folder in the layout of MVTec AD.
    plant_defects : Plant defects in images of one's own.

    Notes
    -----
    Training and test crops come from separate parts of the photograph. `DESCR` tells
    how crops and defects are made.

    Examples
    --------
    >>> from skanomaly.datasets import load_textures
    >>> data = load_textures(n_train=20, n_test=8)
    >>> data.X_train.shape, data.X_test.shape
    ((20, 64, 64, 1), (8, 64, 64, 1))
    >>> data.defect_test.tolist()
    ['good', 'good', 'good', 'good', 'hole', 'patch', 'scratch', 'stain']
    """
    rng = check_random_state(random_state)
    left, middle, right = (
        _scaled(part, size)
        for part in np.split(_photograph(texture), _TEST_COLUMNS, axis=1)
    )
    others = [_scaled(_photograph(name), size) for name in _TEXTURES if name != texture]
    kinds = list(_DEFECTS)
    defects = np.array(
        sorted(kinds[i // 2 % len(kinds)] if i % 2 else "good" for i in range(n_test))
    )

    X_train = np.stack(
        [_crop(rng, (left, right)[rng.randint(2)], size) for _ in range(n_train)]
    )
    X_test = np.stack([_crop(rng, middle, size) for _ in range(n_test)])
    masks = np.zeros((n_test, size, size), bool)
    for image, mask, kind in zip(X_test, masks, defects, strict=True):
        if kind != "good":
            opacity, content = _DEFECTS[kind](rng, image.astype(float), others)
            opacity[opacity < 0.1] = 0
            image[:] = np.rint((1 - opacity) * image + opacity * content)
            mask[:] = opacity > 0
    return Bunch(
        X_train=X_train[..., None],
        X_test=X_test[..., None],
        y_test=np.where(defects == "good", 1, -1),
        masks_test=masks,
        defect_test=defects,
        DESCR=TEXTURES_DESCR,
    )


def _photograph(name):
    from skimage import data

    return getattr(data, name)()


def _scaled(photograph, size):
    """Scale a part of a photograph so that ``_CROP`` of its pixels become ``size``."""
    height, width = (round(side * size / _CROP) for side in photograph.shape)
    image = Image.fromarray(photograph)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _crop(rng, area, size):
    top = rng.randint(area.shape[0] - size + 1)
    left = rng.randint(area.shape[1] - size + 1)
    crop = area[top : top + size, left : left + size]
    return crop[:, ::-1] if rng.randint(2) else crop


def _hole(rng, image, others):
    opacity = irregular_spot(rng, *image.shape, radius=(0.07, 0.13), edge=0.03)
    return opacity, np.full(image.shape, rng.uniform(15, 40))


def _patch(rng, image, others):
    opacity = irregular_spot(rng, *image.shape, radius=(0.12, 0.2), edge=0.03)
    return opacity, _crop(rng, others[rng.randint(len(others))], len(image))


def _stain(rng, image, others):
    opacity = irregular_spot(rng, *image.shape, radius=(0.14, 0.22), edge=0.12)
    level, strength = (15, 240)[rng.randint(2)], rng.uniform(0.4, 0.6)
    return opacity, image + strength * (level - image)


def _scratch(rng, image, others):
    size = len(image)
    centre, direction = rng.uniform(0.3, 0.7, 2), rng.uniform(0, np.pi)
    along = np.array([np.sin(direction), np.cos(direction)])
    across = along[::-1] * [1, -1]
    t = np.linspace(-1, 1, 100)[:, None]
    half_length, bend = rng.uniform(0.2, 0.4), rng.uniform(-0.05, 0.05)
    points = centre + half_length * t * along + bend * t**2 * across
    pixels = np.stack(np.mgrid[:size, :size], axis=-1) / size
    distances = np.linalg.norm(pixels[:, :, None] - points, axis=-1)
    half_width = rng.uniform(0.02, 0.03) * (1 - 0.6 * t[:, 0] ** 2)
    opacity = np.clip((half_width - distances) * size + 0.5, 0, 1).max(axis=-1)
    level = rng.uniform(20, 45) if rng.randint(2) else rng.uniform(200, 235)
    return opacity, np.full(image.shape, level)


_DEFECTS = {"hole": _hole, "patch": _patch, "scratch": _scratch, "stain": _stain}


@validate_params(
    {"y": ["array-like"], "normal": "no_validation"},
    prefer_skip_nested_validation=True,
)
def labels_from(y: ArrayLike, *, normal: Any) -> NDArray[np.int64]:
    """Turn labels of any kind into +1 for normal and -1 for anomalous.

    Parameters
    ----------
    y : array-like of shape (n,)
        Labels: strings, booleans, numbers.
    normal : object or list of objects
        The label that means normal, or a list of such labels. All others mean
        anomalous.

    Returns
    -------
    numpy.ndarray of shape (n,)
        +1 and -1, as detectors and scorers want them.

    Raises
    ------
    ValueError
        If no label in y equals one of `normal`, or if labels are missing (None, NaN).

    See Also
    --------
    load_mvtec : Gives names of defects beside +1 and -1.

    Examples
    --------
    >>> from skanomaly.datasets import labels_from
    >>> labels_from(["good", "hole", "good", "crack"], normal="good")
    array([ 1, -1,  1, -1])
    >>> labels_from([True, False], normal=False)  # True meant anomalous
    array([-1,  1])
    >>> labels_from([0, 3, 1, 2], normal=[0, 1])
    array([ 1, -1,  1, -1])
    """
    labels = np.asarray(y, None if hasattr(y, "dtype") else object)
    if labels.ndim != 1:
        raise ValueError(
            f"y has shape {labels.shape}; it must hold one label an image, (n,)."
        )
    labels = labels.tolist()
    several = isinstance(normal, Iterable) and not isinstance(normal, (str, bytes))
    known = np.asarray(list(normal), object).tolist() if several else [normal]
    for index, label in enumerate(labels):
        if _is_missing(label) and not any(label is value for value in known):
            raise ValueError(
                f"y has no label at index {index}, but {label!r}. Leave such images "
                "out, or give them a label."
            )
    is_normal = np.array([label in known for label in labels], bool)
    if not is_normal.any():
        held = sorted({repr(label) for label in labels})
        more = f" and {len(held) - 10} more" if len(held) > 10 else ""
        raise ValueError(
            f"normal={normal!r} is not among the labels: y holds "
            f"{', '.join(held[:10]) or 'nothing'}{more}."
        )
    return np.where(is_normal, 1, -1)


def _is_missing(label):
    # that which is not equal to itself; pandas' NA is not even comparable
    return label is None or type(label).__name__ == "NAType" or label != label


@validate_params(
    {
        "frames": ["array-like"],
        "video": ["array-like", None],
        "length": [Interval(Integral, 1, None, closed="left")],
    },
    prefer_skip_nested_validation=True,
)
def make_clips(
    frames: ArrayLike, video: ArrayLike | None = None, *, length: int = 5
) -> Bunch:
    """Cut videos into overlapping clips, one for each frame that ends one.

    Parameters
    ----------
    frames : array-like of shape (N, H, W) or (N, H, W, C)
        The frames of one video after the other.
    video : array-like of shape (N,), default=None
        For each frame, the number or name of its video. The frames of a video stand
        together. None: there is one video.
    length : int, default=5
        Number T of frames a clip.

    Returns
    -------
    clips : sklearn.utils.Bunch
        With the attributes

        clips : ndarray of shape (n, T, H, W, C)
            A copy of all runs of T frames of one video, of the dtype of `frames`. It
            takes T times the memory of `frames`. Grey frames get C = 1.
        last : ndarray of shape (n,)
            Index in `frames` of the last frame of each clip.
        video : ndarray of shape (n,)
            Number or name of the video of each clip.

    Raises
    ------
    ValueError
        If the shapes do not fit, if the frames of a video do not stand together, or if
        all videos are shorter than `length`.

    See Also
    --------
    skanomaly.metrics.frame_roc_auc_score : Score the frames that end a clip.

    Notes
    -----
    The first T - 1 frames of a video end no clip, and a video of fewer than T frames
    has none. ``y[clips.last]`` are the labels of the frames that do.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly.datasets import make_clips
    >>> clips = make_clips(np.zeros((7, 32, 32)), [0, 0, 0, 0, 1, 1, 1], length=3)
    >>> clips.clips.shape
    (3, 3, 32, 32, 1)
    >>> clips.last, clips.video
    (array([2, 3, 6]), array([0, 0, 1]))
    """
    frames = np.asarray(frames)
    if frames.ndim not in (3, 4):
        raise ValueError(
            f"frames must have shape (N, H, W) or (N, H, W, C), got {frames.shape}."
        )
    n = len(frames)
    video = np.zeros(n, int) if video is None else np.asarray(video)
    if video.shape != (n,):
        raise ValueError(
            f"video must hold a number or name for each of the {n} frames, got an "
            f"array of shape {video.shape}."
        )
    starts = np.flatnonzero(np.r_[n > 0, video[1:] != video[:-1]])
    names, n_runs = np.unique(video[starts], return_counts=True)
    if (n_runs > 1).any():
        raise ValueError(
            "The frames of a video must stand together, but those of video "
            f"{names[n_runs.argmax()]!s} form {n_runs.max()} separate runs."
        )
    lengths = np.diff(starts, append=n)
    position = np.arange(n) - np.repeat(starts, lengths)
    last = np.flatnonzero(position >= length - 1)
    if not last.size:
        raise ValueError(
            f"There is no clip of length={length} frames: the longest video has "
            f"{lengths.max(initial=0)}."
        )
    if frames.ndim == 3:
        frames = frames[..., None]
    clips = frames[last[:, None] + np.arange(1 - length, 1)]
    return Bunch(clips=clips, last=last, video=video[last])


@validate_params(
    {
        "n_videos_train": [Interval(Integral, 1, None, closed="left")],
        "n_videos_test": [Interval(Integral, 1, None, closed="left")],
        "n_frames": [Interval(Integral, 20, None, closed="left")],
        "n_shapes": [Interval(Integral, 1, None, closed="left")],
        "size": [Interval(Integral, 32, 256, closed="both")],
        "random_state": ["random_state"],
    },
    prefer_skip_nested_validation=True,
)
def make_moving_shapes(
    *,
    n_videos_train: int = 8,
    n_videos_test: int = 8,
    n_frames: int = 60,
    n_shapes: int = 3,
    size: int = 64,
    random_state: int | np.random.RandomState | None = 0,
) -> Bunch:
    """Make videos of slowly moving shapes, with a fast or strange one now and then.

    Parameters
    ----------
    n_videos_train : int, default=8
        Number of training videos, all normal.
    n_videos_test : int, default=8
        Number of test videos. Each has one interval with a fast shape and one with a
        shape of another form.
    n_frames : int, default=60
        Number of frames a video, 20 or more.
    n_shapes : int, default=3
        Number of shapes in a video.
    size : int, default=64
        Height and width of the frames in pixels, from 32 to 256. Shapes and velocities
        scale with it.
    random_state : int, RandomState instance or None, default=0
        Draws background, shapes and intervals. Pass an int for the same videos in every
        call.

    Returns
    -------
    data : sklearn.utils.Bunch
        With the attributes

        frames_train : ndarray of shape (n_videos_train * n_frames, size, size, 1)
            Training frames, uint8, one video after the other.
        video_train : ndarray of shape (n_videos_train * n_frames,)
            Number of the video of each training frame.
        frames_test : ndarray of shape (n_videos_test * n_frames, size, size, 1)
            Test frames, uint8.
        video_test : ndarray of shape (n_videos_test * n_frames,)
            Number of the video of each test frame.
        y_test : ndarray of shape (n_videos_test * n_frames,)
            +1 for normal and -1 for anomalous frames.
        masks_test : ndarray of shape (n_videos_test * n_frames, size, size)
            True where anomalous.
        anomaly_test : ndarray of shape (n_videos_test * n_frames,)
            "good", "fast" or "form".
        DESCR : str
            How the videos are made.

    See Also
    --------
    make_clips : Cut the videos into clips.

    Examples
    --------
    >>> from skanomaly.datasets import make_moving_shapes
    >>> data = make_moving_shapes(n_videos_train=2, n_videos_test=3)
    >>> data.frames_train.shape, data.frames_test.shape
    ((120, 64, 64, 1), (180, 64, 64, 1))
    >>> sorted(set(data.anomaly_test.tolist()))
    ['fast', 'form', 'good']
    """
    rng = check_random_state(random_state)
    grid = np.mgrid[:size, :size] / size
    background = 40 + 8 * (_waves(rng, *grid) + _waves(rng, *grid))
    normal = np.full(n_frames, "good")
    train = [
        _shapes_video(rng, background, n_shapes, normal)[0]
        for _ in range(n_videos_train)
    ]
    anomalies = [_intervals(rng, n_frames) for _ in range(n_videos_test)]
    test, masks = zip(
        *(_shapes_video(rng, background, n_shapes, kinds) for kinds in anomalies),
        strict=True,
    )
    anomaly = np.concatenate(anomalies)
    return Bunch(
        frames_train=np.concatenate(train)[..., None],
        video_train=np.repeat(np.arange(n_videos_train), n_frames),
        frames_test=np.concatenate(test)[..., None],
        video_test=np.repeat(np.arange(n_videos_test), n_frames),
        y_test=np.where(anomaly == "good", 1, -1),
        masks_test=np.concatenate(masks),
        anomaly_test=anomaly,
        DESCR=MOVING_SHAPES_DESCR,
    )


def _waves(rng, y, x):
    """Return waves around a point, in [-1, 1]; lengths are fractions of the side."""
    distance = np.hypot(y - rng.uniform(), x - rng.uniform())
    return np.cos(2 * np.pi * (rng.uniform(3, 5) * distance + rng.uniform()))


def _intervals(rng, n_frames):
    """Name the anomaly of each frame of a video: one in each half."""
    kinds, half = np.full(n_frames, "good"), n_frames // 2
    for begin, kind in zip((0, half), rng.permutation(["fast", "form"]), strict=True):
        length = rng.randint(n_frames // 6, n_frames // 4)
        start = begin + rng.randint(2, half - length)
        kinds[start : start + length] = kind
    return kinds


def _shapes_video(rng, background, n_shapes, kinds):
    """Return frames (n, size, size) and masks of the anomalies named for each frame."""
    frames = np.repeat(background[None], len(kinds), axis=0)
    normal = np.full(len(kinds), "good")
    for kinds_of_shape in [normal] * (n_shapes - 1) + [kinds]:
        opacity, level = _moving_shape(rng, len(background), kinds_of_shape)
        frames += opacity * (level - frames)
    masks = (opacity > 0) & (kinds != "good")[:, None, None]
    return np.rint(frames).astype(np.uint8), masks


def _moving_shape(rng, size, kinds):
    """Return a shape's opacity (n, size, size) and grey level."""
    radius, level = size * rng.uniform(0.07, 0.11), rng.uniform(130, 230)
    speed, direction = size * rng.uniform(0.008, 0.016), rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.sin(direction), np.cos(direction)])
    # folding the path of a shape that nothing holds makes it bounce off the borders
    span = size - 1 - 2 * radius
    n_steps = np.cumsum(np.where(kinds == "fast", 5, 1))
    path = rng.uniform(0, 2 * span, 2) + n_steps[:, None] * velocity
    centres = radius + np.abs(path % (2 * span) - span)
    y, x = np.abs(np.mgrid[:size, :size] - centres[:, :, None, None]).swapaxes(0, 1)
    form = (_disc, _square)[rng.randint(2)]
    reach = np.where((kinds == "form")[:, None, None], _cross(y, x), form(y, x))
    return np.clip(radius - reach + 0.5, 0, 1), level


def _disc(y, x):
    return np.hypot(y, x)


def _square(y, x):
    return np.maximum(y, x)


def _cross(y, x):
    return np.maximum(np.maximum(y, x), 3 * np.minimum(y, x))


@validate_params(
    {
        "n_train": [Interval(Integral, 2, None, closed="left")],
        "n_test": [Interval(Integral, 2, None, closed="left")],
        "size": [Interval(Integral, 32, 256, closed="both")],
        "arrangement": [StrOptions({"apart", "nested"})],
        "random_state": ["random_state"],
    },
    prefer_skip_nested_validation=True,
)
def make_ellipses(
    *,
    n_train: int = 400,
    n_test: int = 80,
    size: int = 64,
    arrangement: Literal["apart", "nested"] = "apart",
    random_state: int | np.random.RandomState | None = 0,
) -> Bunch:
    """Make images of two ellipses, the small one shrunk in diseased images.

    For methods that learn from labels. The healthy version of every test image is
    known.

    Parameters
    ----------
    n_train : int, default=400
        Number of training images. Every second one is diseased.
    n_test : int, default=80
        Number of test images. Every second one is diseased.
    size : int, default=64
        Height and width of the images in pixels, from 32 to 256.
    arrangement : {"apart", "nested"}, default="apart"
        Where the small ellipse lies: beside the large one, as in the paper's set, or
        inside of it, alone shrunk before a still background, which is far easier.
    random_state : int, RandomState instance or None, default=0
        Draws backgrounds and contours. Pass an int for the same images in every call.

    Returns
    -------
    data : sklearn.utils.Bunch
        With the attributes

        X_train : ndarray of shape (n_train, size, size, 1)
            Training images, uint8.
        y_train : ndarray of shape (n_train,)
            +1 for healthy and -1 for diseased images.
        X_test : ndarray of shape (n_test, size, size, 1)
            Test images, uint8.
        y_test : ndarray of shape (n_test,)
            +1 for healthy and -1 for diseased images.
        healthy_test : ndarray of shape (n_test, size, size, 1)
            Healthy versions of the test images, uint8.
        differences_test : ndarray of shape (n_test, size, size)
            Test images minus their healthy versions, where the grey levels from black
            to white span 1.
        masks_test : ndarray of shape (n_test, size, size)
            True where a difference exceeds 0.221 in either direction, which is half of
            the 0.44195 that the reference takes for grey levels from -1 to 1.

    Notes
    -----
    After the synthetic set of [1]_. Lengths are in pixels of an image of 256, and scale
    with `size`. The contours of two ellipses, some 5 pixels wide with soft edges, lie
    apart and within the image, their centres more than 120 pixels from each other.
    Semi-axes are normal with means 40 and 20, and 70 and 35, and standard deviation 1.
    The background is the sum of concentric waves around both centres.

    In a diseased image what lies around the small ellipse is shrunk, the waves of the
    background included: what is shown at a point is taken from the point displaced by
    the negative gradient of a Gaussian around the ellipse's centre. The Gaussian's
    standard deviation is 24 pixels, and displacements measure 13 at most.

    Nested ellipses are a departure: the small one, whose size varies by 15 %, lies
    inside of the large one, waves are fainter, and only the small contour is displaced.

    Training images are not paired: a healthy and a diseased image differ in background
    and ellipses, too. Grey levels of both classes are scaled alike, and not image by
    image as the published script does it with one class, so that their range does not
    tell the classes apart. Their mean does in part: a shrunk contour is shorter.

    References
    ----------
    .. [1] J. Wolleb, R. Sandkühler, P. Cattin. "DeScarGAN: disease-specific anomaly
       detection with weak supervision". MICCAI 2020. arXiv 2007.14118.

    Examples
    --------
    >>> from skanomaly.datasets import make_ellipses
    >>> data = make_ellipses(n_train=10, n_test=4)
    >>> data.X_train.shape, data.y_test
    ((10, 64, 64, 1), array([ 1, -1,  1, -1]))
    >>> data.masks_test.any(axis=(1, 2))
    array([False,  True, False,  True])
    """
    rng = check_random_state(random_state)
    y_train, y_test = (np.where(np.arange(n) % 2, -1, 1) for n in (n_train, n_test))
    images = _ellipse_images if arrangement == "apart" else _nested_ellipse_images
    X_train, _ = images(rng, y_train, size)
    X_test, healthy = images(rng, y_test, size)
    differences = (X_test.astype(np.float32) - healthy)[..., 0] / 255
    return Bunch(
        X_train=X_train,
        y_train=y_train,
        X_test=X_test,
        y_test=y_test,
        healthy_test=healthy,
        differences_test=differences,
        masks_test=np.abs(differences) > 0.44195 / 2,
    )


def _ellipse_images(rng, labels, size):
    """Return images (n, size, size, 1) and their healthy versions, uint8."""
    fine = -(-128 // size)  # a grid of 128 points or more misses no wave
    y, x = (np.mgrid[: fine * size, : fine * size] + 0.5) * 256 / (fine * size)
    grid = x + 1j * y
    images, healthy = np.empty((2, len(labels), size, size, 1), np.uint8)
    for image, healthy_image, label in zip(images, healthy, labels, strict=True):
        ellipses = _ellipses_apart(rng)
        thickness = rng.normal(5, 0.7, 2)
        waves = rng.uniform([[0.2, 0.2], [0.35, 0.2]], [[0.35, 0.4], [0.5, 0.4]])
        displaced = grid if label == 1 else _displaced(grid, ellipses[0][0])
        for result, points in ((healthy_image, grid), (image, displaced)):
            levels = _paint_ellipses(points, ellipses, thickness, waves)
            levels = levels.reshape(size, fine, size, fine).mean(axis=(1, 3))
            result[..., 0] = np.rint(127.5 * (1 + levels))
    return images, healthy


def _ellipses_apart(rng):
    """Draw centre, semi-axes and direction of a small and of a large ellipse."""
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 100))
    while True:
        small, large = (
            (
                complex(*rng.uniform(50, 200, 2)),
                rng.normal(means, 1),
                np.exp(1j * rng.uniform(0, np.pi)),
            )
            for means in ((40, 20), (70, 35))
        )
        outlines = [
            centre + direction * (circle.real * axes[0] + 1j * circle.imag * axes[1])
            for centre, axes, direction in (small, large)
        ]
        edges = np.stack(outlines).view(float)
        if (
            abs(small[0] - large[0]) > 120
            and 0 < edges.min() < edges.max() < 256
            and np.abs(_in_frame(outlines[0], *large)).min() > 1
        ):
            return small, large


def _in_frame(points, centre, axes, direction):
    """Return points as an ellipse has them, which is the unit circle there."""
    turned = (points - centre) / direction
    return turned.real / axes[0] + 1j * turned.imag / axes[1]


def _paint_ellipses(points, ellipses, thickness, waves):
    """Return the levels at points, from -1 to 1: contours on concentric waves."""
    background, opacity = 0.0, 0.0
    for ellipse, width, wave in zip(ellipses, thickness, waves, strict=True):
        centre, axes, _ = ellipse
        frequency, height = wave
        background += height * np.sin(frequency * np.abs(points - centre))
        inside = _in_frame(points, *ellipse)
        radius = np.abs(inside)
        slope = np.hypot(inside.real / axes[0], inside.imag / axes[1])
        depth = radius * (1 - radius) / np.maximum(slope, 1e-9)  # in pixels
        off_middle = np.abs(depth - width / 2)
        opacity = np.maximum(opacity, np.clip((width / 2 - off_middle) / 3 + 0.5, 0, 1))
    return background + opacity * (1 - background)


def _displaced(points, centre, sigma=24.32, largest=12.8):
    """Follow the negative gradient of a Gaussian, which is steepest at sigma."""
    offsets = points - centre
    distance = np.abs(offsets) / sigma
    return points + offsets * largest / sigma * np.exp((1 - distance**2) / 2)


def _nested_ellipse_images(rng, labels, size):
    """Return images (n, size, size, 1) and their healthy versions, uint8."""
    grid = (np.mgrid[:size, :size] + 0.5) / size
    images, healthy = np.empty((2, len(labels), size, size, 1), np.uint8)
    for image, healthy_image, label in zip(images, healthy, labels, strict=True):
        background = 70 + 25 * (_waves(rng, *grid) + _waves(rng, *grid))
        offsets = grid - rng.uniform(0.42, 0.58, (2, 1, 1))
        large = _contour(offsets, rng.uniform(0.3, 0.4, 2), rng.uniform(0, np.pi))
        offsets = offsets - rng.uniform(-0.07, 0.07, (2, 1, 1))
        axes = rng.uniform(0.85, 1.15) * np.array([40, 20]) / 256
        angle = rng.uniform(0, np.pi)
        small = _contour(offsets, axes, angle)
        displaced = _displaced(256 * (offsets[0] + 1j * offsets[1]), 0) / 256
        shrunk = _contour(np.stack([displaced.real, displaced.imag]), axes, angle)
        for result, inner in (
            (healthy_image, small),
            (image, small if label == 1 else shrunk),
        ):
            opacity = np.maximum(large, inner)
            result[..., 0] = np.rint(background + opacity * (220 - background))
    return images, healthy


def _contour(offsets, axes, angle):
    """Return the opacity of an ellipse's contour; lengths are fractions of the side."""
    sine, cosine = np.sin(angle), np.cos(angle)
    y, x = np.tensordot([[cosine, sine], [-sine, cosine]], offsets, axes=1)
    slope = 2 * np.hypot(y / axes[0] ** 2, x / axes[1] ** 2)
    level = (y / axes[0]) ** 2 + (x / axes[1]) ** 2 - 1
    distance = np.abs(level) / np.maximum(slope, 1e-9)
    return np.clip((2.5 / 256 - distance) * offsets.shape[-1] + 0.5, 0, 1)
