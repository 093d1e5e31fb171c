"""Folders in the layouts of public data sets."""

import csv
import os
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch

from .._typing import StrPath
from ..images import IMAGE_SUFFIXES, LoadImages, find_images, is_hidden, sides_of
from .folders import is_good
from .masks import common_size, load_masks, pair, warn_of_trivial

VISA_COLUMNS = ("object", "split", "label", "image", "mask")


def load_mvtec(
    root: StrPath,
    category: str,
    *,
    size: int | tuple[int, int] | None = None,
    mode: str = "RGB",
    max_value: int | None = None,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Bunch:
    """Load a category of a data set in the folder layout of MVTec AD.

    The layout is ::

        root/category/train/good/*.png
        root/category/test/good/*.png
        root/category/test/DEFECT/NAME.png
        root/category/ground_truth/DEFECT/NAME_mask.png

    where "good" may also be called "ok" or "normal", in capitals or not. Files in
    folders further down are read as well; their masks are looked for at the same place
    below ``ground_truth``. Hidden files and folders are left out. Images may be of any
    type that :class:`~skanomaly.LoadImages` reads.

    Masks may be called ``NAME.png`` and ``NAME_mask.png`` as well as
    ``NAME_mask_1.png`` and so on, or be all the images of a folder ``NAME``. Where an
    image has several masks, a pixel is anomalous if it is so in any of them.

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
    max_value : int, default=None
        The value that counts as white in grey images of 16 bits, such as 4095 for data
        of 12 bits; values above it come out white. None means 65535, and warns where no
        value in the images exceeds 4095.
    n_jobs : int, default=None
        Number of threads that decode; None means 1, -1 all processors.
    verbose : int, default=0
        Whether to show a progress bar, where loading takes more than a second.

    Returns
    -------
    data : sklearn.utils.Bunch
        With the attributes

        X_train : ndarray of shape (n_train, H, W, C)
            Training images, uint8, all normal.
        X_test : ndarray of shape (n_test, H, W, C)
            Test images, uint8, sorted by defect and file name.
        y_test : ndarray of shape (n_test,)
            +1 for normal ("good", "ok", "normal") and -1 for anomalous images.
        masks_test : ndarray of shape (n_test, H, W) or None
            True where anomalous; the Notes say how masks are read. None if there is no
            folder ``ground_truth``.
        defect_test : ndarray of shape (n_test,)
            Names of the defects, that is, of the folders right under ``test``.
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

    Warns
    -----
    UserWarning
        If the mask of an anomalous image is empty or nearly full, or if files that are
        neither images nor well-known companions of them are skipped.

    See Also
    --------
    load_folder : Load a folder in any other layout.
    skanomaly.images.LoadImages : Load images from a list of paths.
    skanomaly.datasets.load_textures : Images that need no folder.

    Notes
    -----
    What is anomalous depends on how the mask is stored:

    - Grey of 1, 8, 16 or 32 bits, and colour whose channels are all equal: what is not
      0. Files of 8 bits with more than three different values, some of them above 127,
      are taken for masks with soft edges: what is above 127. Numbers of many classes
      that are spread over 0 to 255 look the same; store them as a palette.
    - A palette: what is not the background, the index of most pixels on the border.
    - Colour: what is not the background, the colour of most pixels on the border.
    - With transparency: if the colours are all the same and the transparency is not,
      what is opaque, as in a grey file. Otherwise transparency is left out.
    - JPEG and WebP, whose compression leaves noise around edges: what is farther from 0
      (or from the background's colour) than half of the farthest pixel.

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
    >>> pixels = np.zeros((8, 8), np.uint8)
    >>> pixels[2:6, 2:6] = 255
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("train/good/0", "test/good/0", "test/hole/0",
    ...                  "ground_truth/hole/0_mask"):
    ...         path = Path(root, "cork", f"{name}.png")
    ...         path.parent.mkdir(parents=True)
    ...         Image.fromarray(pixels).save(path)
    ...     data = load_mvtec(root, "cork", mode="L")
    >>> data.X_train.shape, data.y_test, data.masks_test.sum(axis=(1, 2))
    ((1, 8, 8, 1), array([ 1, -1]), array([ 0, 16]))
    """
    loader = LoadImages(
        size=size, mode=mode, max_value=max_value, n_jobs=n_jobs, verbose=verbose
    )
    folder = _category(root, category, "test")
    train, skipped = _good_images(folder, "train")
    test, more = _test_images(folder / "test")
    _warn_of_skipped(folder, [*skipped, *more], "test")
    truth = folder / "ground_truth"
    return _loaded(loader, train, test, folder / "test", truth)


def load_mvtec_loco(
    root: StrPath,
    category: str,
    *,
    size: int | tuple[int, int] | None = None,
    mode: str = "RGB",
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Bunch:
    """Load a category of MVTec LOCO AD: logical and structural anomalies.

    The layout is ::

        root/category/train/good/NNN.png
        root/category/validation/good/NNN.png
        root/category/test/good/NNN.png
        root/category/test/logical_anomalies/NNN.png
        root/category/test/structural_anomalies/NNN.png
        root/category/ground_truth/logical_anomalies/NNN/000.png
        root/category/ground_truth/structural_anomalies/NNN/000.png

    with one or more masks an image, whose grey value tells the kind of the defect.

    Parameters
    ----------
    root : str or path-like
        Folder of the data set.
    category : str
        Name of the folder of the category, such as "breakfast_box".
    size : int or tuple of int, default=None
        Height and width in pixels to resize to, as for :func:`load_mvtec`.
    mode : {"RGB", "L"}, default="RGB"
        Colour (3 channels) or grey (1 channel).
    n_jobs : int, default=None
        Number of threads that decode; None means 1, -1 all processors.
    verbose : int, default=0
        Whether to show a progress bar, where loading takes more than a second.

    Returns
    -------
    data : sklearn.utils.Bunch
        What :func:`load_mvtec` returns, and `X_validation` and `paths_validation`,
        more normal images. In `masks_test` any value above 0, of any mask of an image,
        is anomalous. `defect_test` holds "good", "logical_anomalies" and
        "structural_anomalies".

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

    Warns
    -----
    UserWarning
        As for :func:`load_mvtec`.

    See Also
    --------
    load_mvtec : The first set of the same authors, and folders made like it.
    load_folder : Load a folder in any other layout.

    Notes
    -----
    The published measure of this set, the saturated per-region overlap, needs to know
    how much of each kind of defect is to be found; it is not among
    the metrics of this package.

    References
    ----------
    P. Bergmann, K. Batzner, M. Fauser, D. Sattlegger, C. Steger. "Beyond Dents and
    Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization."
    IJCV 130, 2022. https://doi.org/10.1007/s11263-022-01578-9

    Examples
    --------
    >>> from skanomaly.datasets import load_mvtec_loco
    >>> data = load_mvtec_loco("mvtec_loco", "pushpins", size=256)  # doctest: +SKIP
    """
    loader = LoadImages(size=size, mode=mode, n_jobs=n_jobs, verbose=verbose)
    folder = _category(root, category, "test", "validation")
    train, skipped = _good_images(folder, "train")
    validation, others = _good_images(folder, "validation")
    test, more = _test_images(folder / "test")
    _warn_of_skipped(folder, [*skipped, *others, *more], "test")
    truth = folder / "ground_truth"
    return _loaded(
        loader, train, test, folder / "test", truth, validation, any_value=True
    )


def load_mvtec_ad2(
    root: StrPath,
    category: str,
    *,
    size: int | tuple[int, int] | None = None,
    mode: str = "RGB",
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Bunch:
    """Load a category of MVTec AD 2, with its public test images.

    The layout is ::

        root/category/train/good/*.png
        root/category/validation/good/*.png
        root/category/test_public/good/*.png
        root/category/test_public/bad/NAME.png
        root/category/test_public/ground_truth/bad/NAME_mask.png
        root/category/test_private/*.png
        root/category/test_private_mixed/*.png

    Parameters
    ----------
    root : str or path-like
        Folder of the data set.
    category : str
        Name of the folder of the category, such as "fruit_jelly".
    size : int or tuple of int, default=None
        Height and width in pixels to resize to, as for :func:`load_mvtec`.
    mode : {"RGB", "L"}, default="RGB"
        Colour (3 channels) or grey (1 channel).
    n_jobs : int, default=None
        Number of threads that decode; None means 1, -1 all processors.
    verbose : int, default=0
        Whether to show a progress bar, where loading takes more than a second.

    Returns
    -------
    data : sklearn.utils.Bunch
        What :func:`load_mvtec` returns, of the public test images, and

        X_validation : ndarray of shape (n_validation, H, W, C)
            More normal images, uint8.
        paths_validation : ndarray of shape (n_validation,)
            Their paths.
        paths_private, paths_private_mixed : ndarray of shape (n,)
            Paths of the test images without public labels, for
            :class:`~skanomaly.LoadImages`; empty where there is no such folder.

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

    Warns
    -----
    UserWarning
        As for :func:`load_mvtec`.

    See Also
    --------
    load_mvtec : The first set of the same authors, and folders made like it.
    load_folder : Load a folder in any other layout.

    References
    ----------
    L. Heckler-Kram, J.-H. Neudeck, U. Scheler, R. König, C. Steger. "The MVTec AD 2
    Dataset: Advanced Scenarios for Unsupervised Anomaly Detection." 2025.
    https://arxiv.org/abs/2503.21622

    Examples
    --------
    >>> from skanomaly.datasets import load_mvtec_ad2
    >>> data = load_mvtec_ad2("mvtec_ad_2", "rice", size=256)  # doctest: +SKIP
    """
    loader = LoadImages(size=size, mode=mode, n_jobs=n_jobs, verbose=verbose)
    folder = _category(root, category, "test_public", "validation")
    public = folder / "test_public"
    train, skipped = _good_images(folder, "train")
    validation, others = _good_images(folder, "validation")
    test, more = _test_images(public, but="ground_truth")
    private = {"private": [], "private_mixed": []}
    for name in private:
        place = folder / f"test_{name}"
        if place.is_dir():
            private[name], unread = find_images(place, recursive=True)
            more += unread
    _warn_of_skipped(folder, [*skipped, *others, *more], "test_public")
    data = _loaded(loader, train, test, public, public / "ground_truth", validation)
    for name, files in private.items():
        data[f"paths_{name}"] = _texts(files)
    return data


def load_visa(
    root: StrPath,
    category: str,
    *,
    size: int | tuple[int, int] | None = None,
    mode: str = "RGB",
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Bunch:
    """Load a category of VisA, split as in its one-class protocol.

    The layout is ::

        root/split_csv/1cls.csv
        root/category/Data/Images/Normal/*.JPG
        root/category/Data/Images/Anomaly/NAME.JPG
        root/category/Data/Masks/Anomaly/NAME.png
        root/category/image_anno.csv

    The first file says which normal images train; without it, :func:`load_folder` reads
    the folders. What its authors' script makes of the set is a folder for
    :func:`load_mvtec`.

    Parameters
    ----------
    root : str or path-like
        Folder of the data set.
    category : str
        Name of the folder of the category, such as "candle".
    size : int or tuple of int, default=None
        Height and width in pixels to resize to, as for :func:`load_mvtec`.
    mode : {"RGB", "L"}, default="RGB"
        Colour (3 channels) or grey (1 channel).
    n_jobs : int, default=None
        Number of threads that decode; None means 1, -1 all processors.
    verbose : int, default=0
        Whether to show a progress bar, where loading takes more than a second.

    Returns
    -------
    data : sklearn.utils.Bunch
        What :func:`load_mvtec` returns. In `masks_test` any value above 0 is anomalous.
        `defect_test` holds "normal" and the labels that ``image_anno.csv`` gives the
        images; "anomaly" where it gives none.

    Raises
    ------
    FileNotFoundError
        If ``split_csv/1cls.csv`` or one of the files that it lists is missing.
    ValueError
        If it has other columns or none of the category, if a mask is not of the size
        of its image, or if `size` is None and the images have several sizes.
    OSError
        If a file cannot be read.

    Warns
    -----
    UserWarning
        If there are images that the file does not list, or if the mask of an anomalous
        image is empty or nearly full.

    See Also
    --------
    load_folder : Load a folder in any other layout.

    References
    ----------
    Y. Zou, J. Jeong, L. Pemula, D. Zhang, O. Dabeer. "SPot-the-Difference
    Self-Supervised Pre-training for Anomaly Detection and Segmentation." ECCV 2022.
    https://arxiv.org/abs/2207.14315

    Examples
    --------
    >>> from skanomaly.datasets import load_visa
    >>> data = load_visa("VisA_20220922", "candle", size=256)  # doctest: +SKIP
    """
    loader = LoadImages(size=size, mode=mode, n_jobs=n_jobs, verbose=verbose)
    root = Path(os.path.expanduser(root))
    rows = [row for row in _visa_rows(root) if row["object"] == category]
    if not rows:
        known = sorted({row["object"] for row in _visa_rows(root)})
        raise ValueError(
            f"category={category!r} is not in {str(root / _VISA_SPLIT)!r}, which lists "
            f"{', '.join(map(repr, known))}."
        )
    rows.sort(key=lambda row: row["image"])
    listed = [
        root / row[what] for row in rows for what in ("image", "mask") if row[what]
    ]
    missing = [str(file) for file in listed if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files that {str(root / _VISA_SPLIT)!r} lists are missing, "
            f"such as {missing[0]!r}."
        )
    found = chain(*find_images(root / category / "Data" / "Images", recursive=True))
    stray = sorted(set(found) - set(listed))
    if stray:
        warnings.warn(
            f"{len(stray)} files that {str(root / _VISA_SPLIT)!r} does not list are "
            f"skipped, such as {str(stray[0])!r}.",
            stacklevel=2,
        )
    train, test = (
        [row for row in rows if row["split"] == part] for part in ("train", "test")
    )
    kinds = _visa_kinds(root / category / "image_anno.csv")
    return _assembled(
        loader,
        [root / row["image"] for row in train],
        [root / row["image"] for row in test],
        np.array([kinds.get(_visa_key(row), row["label"]) for row in test]),
        np.array([row["label"] == "normal" for row in test], bool),
        [[root / row["mask"]] if row["mask"] else [] for row in test],
        any_value=True,
    )


_VISA_SPLIT = Path("split_csv", "1cls.csv")


def _visa_rows(root):
    try:
        with open(root / _VISA_SPLIT, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no file {str(root / _VISA_SPLIT)!r}, which tells training from "
            "test images. It comes with VisA, and lies in its authors' repository "
            "amazon-science/spot-diff. load_folder reads folders without it."
        ) from None
    if not rows or not set(VISA_COLUMNS) <= set(rows[0]):
        raise ValueError(
            f"{str(root / _VISA_SPLIT)!r} must have the columns "
            f"{', '.join(VISA_COLUMNS)}."
        )
    return rows


def _visa_kinds(file):
    """Return the kinds of defects of images, as far as a file tells them."""
    if not file.is_file():
        return {}
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("image")]
    return {_visa_key(row): row["label"] for row in rows if row.get("label")}


def _visa_key(row):
    """Return what is the same in all files that name an image."""
    return Path(row["image"]).parts[-2:]


def _category(root, category, test, *others):
    """Return the folder of a category, or raise if there is none of its layout."""
    folder = Path(os.path.expanduser(root), category)
    for needed in (
        folder.parent,
        folder,
        *(folder / p for p in ("train", test, *others)),
    ):
        _check_folder(needed, folder, test, others)
    return folder


def _check_folder(needed, folder, test="test", others=()):
    if not needed.is_dir():
        good = [str(folder / part / "good") for part in ("train", *others)]
        raise FileNotFoundError(
            f"There is no folder {str(needed)!r}. Wanted are "
            f"{' and '.join(map(repr, good))} with normal images and "
            f"{str(folder / test)!r} with one folder of images for each defect "
            "and one named 'good'."
        )


def _good_images(folder, part):
    """Return the normal images of a part of a set, and what else is there."""
    subfolders = _folders(folder / part)
    good = [path for path in subfolders if is_good(path.name)]
    if not good:
        _check_folder(folder / part / "good", folder)
    images, skipped = _images_in(good)
    _check_some(images, folder / part / "good")
    others = [path for path in subfolders if path not in good]
    return images, [*skipped, *chain(*find_images(folder / part)), *others]


def _test_images(test, but=None):
    """Return the images of all defects, and what else is there."""
    images, skipped = _images_in([path for path in _folders(test) if path.name != but])
    _check_some(images, test)
    return images, [*skipped, *chain(*find_images(test))]


def _check_some(images, place):
    if not images:
        raise FileNotFoundError(
            f"There are no images in {str(place)!r}. Wanted are files "
            f"ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )


def _folders(folder):
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not is_hidden(path)
    )


def _images_in(folders):
    """Return the images in folders and below, and what else is there."""
    found = [find_images(folder, recursive=True) for folder in folders]
    return [[*chain(*files)] for files in zip(*found, strict=True)] or [[], []]


def _warn_of_skipped(folder, paths, test):
    if paths:
        warnings.warn(
            f"{len(paths)} files or folders of {str(folder)!r} are skipped, such as "
            f"{str(paths[0])!r}: what is read are files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} in folders of good images and in the "
            f"folders under {test}.",
            stacklevel=3,
        )


def _mask_files(images, test, truth):
    """Return a list of the files of masks for each image.

    Masks are looked for at the place below `truth` that the image has below `test`.
    """
    pairs = {}
    for place in {path.parent for path in images}:
        masks = truth / place.relative_to(test)
        here = [path for path in images if path.parent == place]
        if not masks.is_dir():
            continue
        files, _ = find_images(masks)
        for path in _folders(masks):
            if not (place / path.name).is_dir():
                files += find_images(path)[0]
        pairs |= pair(here, files)[0]
    for path in images:
        if path not in pairs:
            wanted = truth / path.parent.relative_to(test) / path.stem
            raise FileNotFoundError(
                f"The anomalous image {str(path)!r} has no mask: there is neither "
                f"{wanted}_mask.png nor {wanted}.png, nor either of another image type."
            )
    return [pairs[path] for path in images]


def _loaded(loader, train, test, test_folder, truth, validation=(), *, any_value=False):
    """Load a set whose test images lie in one folder for each defect."""
    defects = np.array([path.relative_to(test_folder).parts[0] for path in test])
    normal = np.array([is_good(defect) for defect in defects])
    mask_files = None
    if truth.is_dir():
        anomalous = [path for path, fine in zip(test, normal, strict=True) if not fine]
        files = iter(_mask_files(anomalous, test_folder, truth))
        mask_files = [[] if fine else next(files) for fine in normal]
    return _assembled(
        loader,
        train,
        test,
        defects,
        normal,
        mask_files,
        validation,
        any_value=any_value,
        stacklevel=5,
    )


def _assembled(
    loader,
    train,
    test,
    defects,
    normal,
    mask_files,
    validation=(),
    *,
    any_value,
    stacklevel=4,
):
    files = [*train, *validation, *test]
    loader.fit(files)
    masks = None
    if mask_files is not None:
        sides = common_size(files) if loader.size is None else sides_of(loader.size)
        masks = load_masks(
            test,
            mask_files,
            sides,
            any_value=any_value,
            n_jobs=loader.n_jobs,
            verbose=loader.verbose,
        )
        with_masks = [files for files in mask_files if files]
        warn_of_trivial(masks[~normal], with_masks, stacklevel=stacklevel)
    images = loader.transform(files)
    n_train, n_fitted = len(train), len(train) + len(validation)
    data = Bunch(
        X_train=images[:n_train],
        X_test=images[n_fitted:],
        y_test=np.where(normal, 1, -1),
        masks_test=masks,
        defect_test=defects,
        paths_train=_texts(train),
        paths_test=_texts(test),
    )
    if validation:
        data.X_validation = images[n_train:n_fitted]
        data.paths_validation = _texts(validation)
    return data


def _texts(paths):
    return np.array([str(path) for path in paths], str)
