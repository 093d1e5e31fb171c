"""Data sets for visual anomaly detection: one that is at hand, and a folder reader."""

from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions, validate_params

from .images import IMAGE_SUFFIXES, LoadImages, read_image

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
def load_textures(*, texture="brick", n_train=200, n_test=80, size=64, random_state=0):
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


def _spot(rng, size, radius, edge):
    """Return the opacity of an irregular spot; lengths are fractions of the side."""
    y, x = np.mgrid[:size, :size] / size - rng.uniform(0.2, 0.8, (2, 1, 1))
    angle = np.arctan2(y, x)
    outline = np.ones((size, size))
    for waves in range(2, 6):
        swing, phase = rng.uniform(0, 0.5 / waves), rng.uniform(0, 2 * np.pi)
        outline += swing * np.cos(waves * angle + phase)
    depth = rng.uniform(*radius) * outline - np.hypot(y, x)
    return np.clip(depth / edge + 0.5, 0, 1)


def _hole(rng, image, others):
    opacity = _spot(rng, len(image), radius=(0.07, 0.13), edge=0.03)
    return opacity, np.full(image.shape, rng.uniform(15, 40))


def _patch(rng, image, others):
    opacity = _spot(rng, len(image), radius=(0.12, 0.2), edge=0.03)
    return opacity, _crop(rng, others[rng.randint(len(others))], len(image))


def _stain(rng, image, others):
    opacity = _spot(rng, len(image), radius=(0.14, 0.22), edge=0.12)
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


def load_mvtec(root, category, *, size=None, mode="RGB", n_jobs=None):
    """Load a category of a data set in the folder layout of MVTec AD.

    The layout is ::

        root/category/train/good/*.png
        root/category/test/good/*.png
        root/category/test/DEFECT/NAME.png
        root/category/ground_truth/DEFECT/NAME_mask.png

    where masks may also be called ``NAME.png``, and the images may be of the types bmp,
    jpg, png, tif and webp.

    Parameters
    ----------
    root : str or path-like
        Folder of the data set.
    category : str
        Name of the folder of the category, such as "toothbrush".
    size : int or tuple of int, default=None
        Height and width in pixels to resize to, (H, W); an integer stands for both.
        Images are resized with an antialiased bilinear filter, masks to the nearest
        pixel. None keeps the size of the files, which must then be the same for all.
    mode : {"RGB", "L"}, default="RGB"
        Colour (3 channels) or grey (1 channel).
    n_jobs : int, default=None
        Number of threads that decode; None means 1, -1 all processors.

    Returns
    -------
    data : sklearn.utils.Bunch
        With the attributes

        X_train : ndarray of shape (n_train, H, W, C)
            Training images, uint8, all normal.
        X_test : ndarray of shape (n_test, H, W, C)
            Test images, uint8, sorted by defect and file name.
        y_test : ndarray of shape (n_test,)
            +1 for normal ("good") and -1 for anomalous images.
        masks_test : ndarray of shape (n_test, H, W) or None
            True where anomalous, which is where a mask exceeds half of 255. None if
            there is no folder ``ground_truth``.
        defect_test : ndarray of shape (n_test,)
            Names of the defects, that is, of the folders under ``test``.
        paths_train : ndarray of shape (n_train,)
            Paths of the training images.
        paths_test : ndarray of shape (n_test,)
            Paths of the test images.

    Raises
    ------
    FileNotFoundError
        If a folder of the layout, the images in it, or the mask of an anomalous test
        image is missing.
    ValueError
        If a mask is not of the size of its image, or if `size` is None and the images
        have several sizes.
    OSError
        If a file cannot be read.

    See Also
    --------
    skanomaly.images.LoadImages : Load images from a list of paths.
    load_textures : Images that need no folder.

    References
    ----------
    P. Bergmann, M. Fauser, D. Sattlegger, C. Steger. "MVTec AD: A comprehensive
    real-world dataset for unsupervised anomaly detection." CVPR 2019.
    https://doi.org/10.1109/CVPR.2019.00982

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from PIL import Image
    >>> from skanomaly.datasets import load_mvtec
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("train/good/0", "test/good/0", "test/hole/0",
    ...                  "ground_truth/hole/0_mask"):
    ...         path = Path(root, "cork", f"{name}.png")
    ...         path.parent.mkdir(parents=True)
    ...         Image.fromarray(np.full((8, 8), 255, np.uint8)).save(path)
    ...     data = load_mvtec(root, "cork", mode="L")
    >>> data.X_train.shape, data.y_test, data.masks_test.sum(axis=(1, 2))
    ((1, 8, 8, 1), array([ 1, -1]), array([ 0, 64]))
    """
    folder = Path(root) / category
    for needed in (Path(root), folder, folder / "train" / "good", folder / "test"):
        if not needed.is_dir():
            raise FileNotFoundError(
                f"There is no folder {str(needed)!r}. Wanted are "
                f"{str(folder / 'train' / 'good')!r} with normal images and "
                f"{str(folder / 'test')!r} with one folder of images for each defect "
                "and one named 'good'."
            )
    train = _image_files(folder / "train" / "good")
    test = [
        path
        for defect in sorted((folder / "test").iterdir())
        if defect.is_dir()
        for path in _image_files(defect)
    ]
    for files, place in ((train, "train/good"), (test, "test")):
        if not files:
            raise FileNotFoundError(
                f"There are no images in {str(folder / place)!r}. Wanted are files "
                f"ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
    defects = np.array([path.parent.name for path in test])
    masked = (folder / "ground_truth").is_dir()
    mask_files = {
        i: _mask_file(folder / "ground_truth", path)
        for i, path in enumerate(test)
        if masked and defects[i] != "good"
    }

    loader = LoadImages(size=size, mode=mode, n_jobs=n_jobs)
    images = loader.fit_transform(train + test)
    masks = np.zeros((len(test), *images.shape[1:3]), bool) if masked else None
    for i, mask_file in mask_files.items():
        masks[i] = _read_mask(mask_file, test[i], images.shape[1:3])
    return Bunch(
        X_train=images[: len(train)],
        X_test=images[len(train) :],
        y_test=np.where(defects == "good", 1, -1),
        masks_test=masks,
        defect_test=defects,
        paths_train=np.array([str(path) for path in train]),
        paths_test=np.array([str(path) for path in test]),
    )


def _image_files(folder):
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _mask_file(ground_truth, image_file):
    folder, stem = ground_truth / image_file.parent.name, image_file.stem
    if folder.is_dir():
        files = {path.stem: path for path in _image_files(folder)}
        for name in (f"{stem}_mask", stem):
            if name in files:
                return files[name]
    raise FileNotFoundError(
        f"The anomalous image {str(image_file)!r} has no mask: there is neither "
        f"{folder / stem}_mask.png nor {folder / stem}.png, nor either of "
        "another image type."
    )


def _read_mask(mask_file, image_file, size):
    mask = read_image(mask_file, mode="L")[:, :, 0] > 127
    image_size = read_image(image_file).shape[:2]
    if mask.shape != image_size:
        raise ValueError(
            f"The mask {str(mask_file)!r} has (H, W) = {mask.shape}, but its image "
            f"{str(image_file)!r} has {image_size}."
        )
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]
