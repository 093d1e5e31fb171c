"""Images of one's own: folders, globs and lists, their classes and their masks."""

import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils import Bunch

from .._typing import StrPath
from ..images import (
    COMPANION,
    HIDDEN,
    IMAGE_SUFFIXES,
    LoadImages,
    listed_paths,
    look_through,
    sides_of,
    why_no_image,
)
from .masks import MASK_ENDING, common_size, load_masks, pair, warn_of_trivial

Sources = StrPath | Iterable[StrPath] | Mapping[Any, StrPath | Iterable[StrPath]]

GOOD_NAMES = {"good", "normal", "ok"}
# Why a file is skipped, beside the reasons of `look_through`.
IS_MASK = "a mask"
TWICE = "found before"
EMPTY = "a folder without images"


def load_folder(
    good: Sources,
    bad: Sources | None = None,
    masks: Sources | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    mode: str = "RGB",
    max_value: int | None = None,
    as_paths: bool = False,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Bunch:
    """Load images of one's own: folders, globs, lists, columns of a data frame.

    Each of `good`, `bad` and `masks` may be

    - a folder, which is read with the folders below it;
    - a glob, such as ``"parts/*_ok.png"`` or ``"line*/good"``, of files or folders;
    - one file;
    - a list, array, Series or one-column data frame of these.

    Files are sorted within a folder and a glob; all else keeps its order.

    Parameters
    ----------
    good : path, list of paths, or dict
        Images of normal parts. A dict gives names of classes to what is listed above.
    bad : path, list of paths, or dict, default=None
        Images of anomalous parts.
    masks : path, list of paths, or dict, default=None
        Masks of the anomalous images, of any type that :func:`load_mvtec` reads; its
        Notes say how. None: there are none.

        A list of as many files as `bad` lists belongs to these in order; so do the
        lists in a dict with the keys of `bad`. All else is paired by name: the mask of
        ``NAME.jpg`` is ``NAME.png``, ``NAME_mask.png``, ``NAME_mask_1.png`` and so on,
        or lies in a folder ``NAME``; several are joined. Where names repeat, as in
        ``hole/000.png`` and ``crack/000.png``, the folders of masks must be called
        like those of the images. Masks may lie beside the images.
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
    as_paths : bool, default=False
        Whether `X` holds paths instead of images, for a pipeline that begins with
        ``LoadImages(size=size, ...)``. Masks are loaded all the same.
    n_jobs : int, default=None
        Number of threads that decode; None means 1, -1 all processors.
    verbose : int, default=0
        Whether to show a progress bar, where loading takes more than a second.

    Returns
    -------
    data : sklearn.utils.Bunch
        With the attributes

        X : ndarray of shape (n, H, W, C), or (n,) with `as_paths`
            Images, uint8, or their paths: first the good ones.
        y : ndarray of shape (n,)
            +1 for normal and -1 for anomalous images.
        masks : ndarray of shape (n, H, W) or None
            True where anomalous; None without `masks`.
        classes : ndarray of shape (n,)
            Names of classes: the key of a dict; of a file in a folder that was given,
            the name of the first folder below it or, if there is none between, its own;
            of other files, the name of the folder they lie in.
        files : ndarray of shape (n,)
            Paths of the images.
        report : str
            How many images of which class were found where, and each file that was
            skipped, with the reason.

    Raises
    ------
    FileNotFoundError
        If nothing is found where an argument says.
    TypeError
        If an argument holds something else than paths.
    ValueError
        If an image is both good and bad, if not all of a folder of good images seems
        to be good, if masks and anomalous images do not pair, or if the mask of a good
        image is not empty. Also if a mask is not of the size of its image, or if `size`
        is None and images have several sizes.
    OSError
        If a file cannot be read.

    Warns
    -----
    UserWarning
        If files are skipped, other than hidden ones and well-known companions of
        images; if masks look as if they were in another order than the images, or lie
        among the images; if the mask of an anomalous image is empty or nearly full.

    See Also
    --------
    skanomaly.model_selection.OneClassKFold : Folds that train on normal images only.
    skanomaly.model_selection.one_class_train_test_split : One such split.
    skanomaly.datasets.load_mvtec : Load a folder in the layout of MVTec AD.
    skanomaly.datasets.labels_from : Labels from names, where X is a list already.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from PIL import Image
    >>> from skanomaly.datasets import load_folder
    >>> pixels = np.zeros((8, 8), np.uint8)
    >>> pixels[2:6, 2:6] = 255
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("fine/0", "fine/1", "broken/hole/2", "masks/2_mask"):
    ...         path = Path(root, f"{name}.png")
    ...         path.parent.mkdir(parents=True, exist_ok=True)
    ...         Image.fromarray(pixels).save(path)
    ...     data = load_folder(
    ...         f"{root}/fine", f"{root}/broken", f"{root}/masks", size=8
    ...     )
    >>> data.X.shape, data.y, data.masks.sum(axis=(1, 2))
    ((3, 8, 8, 3), array([ 1,  1, -1]), array([ 0,  0, 16]))
    >>> print(data.report)
    good: 2 images ('fine' 2)
    bad: 1 image ('hole' 1)
    masks: 1 file, paired by name
    skipped: nothing
    """
    loader = LoadImages(
        size=size, mode=mode, max_value=max_value, n_jobs=n_jobs, verbose=verbose
    )
    if masks is not None and bad is None:
        raise ValueError("masks belong to anomalous images, but bad is None.")
    found_masks = _Found([], [], {}) if masks is None else _found("masks", masks, bad)
    taken = {_key(file) for file in found_masks.files}
    found_good = _found("good", good, apart=taken)
    found_bad = _Found([], [], {}) if bad is None else _found("bad", bad, apart=taken)
    files = [*found_good.files, *found_bad.files]
    loader.fit(files)
    _check_apart(found_good.files, found_bad.files)
    mask_files, how = None, None
    if masks is not None:
        mask_files, how = _paired(found_good.files, found_bad, found_masks, masks, bad)
    else:
        _warn_of_masks_among(found_bad.files)
    skipped = found_good.skipped | found_bad.skipped | found_masks.skipped
    _warn_of_skipped(skipped)

    read_masks = None
    if mask_files is not None:
        sides = common_size(files) if size is None else sides_of(size)
        read_masks = load_masks(
            files, mask_files, sides, n_jobs=n_jobs, verbose=verbose
        )
        _check_masks_of_good(found_good.files, mask_files, read_masks)
        n_good = len(found_good.files)
        warn_of_trivial(read_masks[n_good:], mask_files[n_good:], stacklevel=3)
    paths = np.array([str(file) for file in files])
    return Bunch(
        X=paths if as_paths else loader.transform(files),
        y=np.repeat([1, -1], [len(found_good.files), len(found_bad.files)]),
        masks=read_masks,
        classes=np.array(found_good.names + found_bad.names),
        files=paths,
        report="\n".join(
            [
                f"good: {_counted(found_good)}",
                *([] if bad is None else [f"bad: {_counted(found_bad)}"]),
                *([] if how is None else [f"masks: {how}"]),
                "skipped:" if skipped else "skipped: nothing",
                *(f"  {path}: {why}" for path, why in sorted(skipped.items())),
            ]
        ),
    )


def is_good(name):
    """Return whether the name of a folder says that its images are normal."""
    return name.lower() in GOOD_NAMES


class _Found(NamedTuple):
    files: list[Path]
    names: list[str]
    skipped: dict[Path, str]
    is_list: bool = False  # whether files were named one by one


def _key(path):
    """Return a text that is the same for all ways to write the path of a file."""
    return os.path.normcase(os.path.abspath(path))


def _found(argument, given, like=None, apart=()):
    """Return the images that an argument names.

    Parameters
    ----------
    argument : str
        Its name.
    given : path, list of paths or dict
        Its value.
    like : object
        The value of another argument that, if both are dicts, has the same keys.
    apart : set of str
        Keys of files that are left out, since they are masks.
    """
    if isinstance(given, Mapping):
        if argument == "masks" and (
            not isinstance(like, Mapping) or set(like) != set(given)
        ):
            raise ValueError(
                f"masks is a dict with the keys {sorted(map(str, given))}, so bad must "
                "be one with the same keys."
            )
        order = given if argument != "masks" else like
        parts = [(str(name), given[name]) for name in order]
    else:
        parts = [(None, given)]
    files, names, skipped, is_list = [], [], {}, True
    seen = set(apart)
    for own_name, part in parts:
        for path in _listed(argument, part):
            of_one, others, is_file = _search(argument, path)
            is_list &= is_file
            skipped |= others
            for file, name in of_one:
                key = _key(file)
                if key in seen:
                    skipped[file] = IS_MASK if key in apart else TWICE
                    continue
                seen.add(key)
                files.append(file)
                names.append(name if own_name is None else own_name)
    if not files:
        found = "".join(
            f", but {str(path)!r}: {why}" for path, why in [*skipped.items()][:1]
        )
        raise FileNotFoundError(f"{argument} holds no image{found}. {_WANTED}")
    return _Found(files, names, skipped, is_list)


_WANTED = (
    "Wanted are folders, globs such as 'parts/*.png', or files ending in "
    f"{', '.join(sorted(IMAGE_SUFFIXES))}; one, a list, or one column of a data frame."
)


def _listed(argument, given):
    if isinstance(given, (str, os.PathLike)):
        return [os.path.expanduser(given)]
    if not isinstance(given, Iterable) or isinstance(given, (bytes, set, frozenset)):
        raise TypeError(f"{argument} is a {type(given).__name__}. {_WANTED}")
    return listed_paths(argument, given, f" {_WANTED}")


def _search(argument, given):
    """Return images with the names of their classes, what is skipped, and if a file."""
    path = Path(given)
    if os.path.isdir(given):  # to pathlib "" is where we are
        images, others = look_through(path, recursive=True)
        if argument != "masks":
            _check_kind(argument, path, images)
        if not images:
            others[path] = EMPTY
        return [(image, _class_in(path, image)) for image in images], others, False
    if os.path.exists(given):
        return [(path, Path(os.path.abspath(path)).parent.name)], {}, True
    found, skipped = {}, {}
    matches = sorted(glob.glob(os.fspath(given), recursive=True))
    if not matches:
        raise FileNotFoundError(
            f"{argument}={os.fspath(given)!r} is no file, no folder, and matches "
            f"nothing as a glob. {_WANTED}"
        )
    for match in map(Path, matches):
        why = None if match.is_dir() else why_no_image(match)
        if why is not None:
            skipped[match] = why
            continue
        images, others, _ = _search(argument, match)
        found = dict(images) | found  # "**" matches folders, and what is in them
        skipped |= others
    return sorted(found.items()), skipped, False


def _class_in(folder, image):
    between = image.relative_to(folder).parts[:-1]
    return between[0] if between else Path(os.path.abspath(folder)).name


def _check_kind(argument, folder, images):
    """Raise if folders called good lie among others."""
    if is_good(Path(os.path.abspath(folder)).name):
        return
    kinds = {True: [], False: []}
    for image in images:
        between = image.relative_to(folder).parts[:-1]
        kinds[any(map(is_good, between))].append(str(image))
    if kinds[True] and argument == "bad":
        raise ValueError(
            f"bad={str(folder)!r} holds images in a folder for normal ones, such as "
            f"{kinds[True][0]!r}. List the folders of anomalous images instead."
        )
    if kinds[True] and kinds[False]:
        raise ValueError(
            f"good={str(folder)!r} holds images in a folder for normal ones, such as "
            f"{kinds[True][0]!r}, but others too, such as {kinds[False][0]!r}. Give "
            "the folders in which all images are normal."
        )


def _check_apart(good, bad):
    keys = {_key(file) for file in good}
    both = [str(file) for file in bad if _key(file) in keys]
    if both:
        raise ValueError(
            f"{_number(both, 'image')} in good and in bad, such as {both[0]!r}: an "
            "image is either normal or not."
        )


def _paired(good, found_bad, found_masks, masks, bad):
    """Return the masks of each image, good ones first, and how they were paired."""
    images, files = found_bad.files, found_masks.files
    pairs, alone, unclear = pair(images, files, spare=good)
    in_order = (
        found_bad.is_list
        and found_masks.is_list
        and len(files) == len(images)
        and isinstance(masks, Mapping) == isinstance(bad, Mapping)
        and (not isinstance(bad, Mapping) or found_bad.names == found_masks.names)
    )
    if in_order:
        for image, mask in zip(images, files, strict=True):
            others = pairs.get(image, [])
            if not alone and not unclear and others and mask not in others:
                warnings.warn(
                    f"masks belong to bad in order: {str(mask)!r} to {str(image)!r}, "
                    f"whose name fits {str(others[0])!r} better. If the order is wrong,"
                    " give folders of masks instead.",
                    stacklevel=3,
                )
                break
        pairs = dict(zip(images, ([mask] for mask in files), strict=True))
    else:
        _check_pairs([file for file in images if file not in pairs], alone, unclear)
    how = f"{_number(files, 'file')}, paired {'in order' if in_order else 'by name'}"
    return [pairs.get(image, []) for image in (*good, *images)], how


def _check_pairs(without, alone, unclear):
    if unclear:
        mask, *two = map(str, unclear[0])
        raise ValueError(
            f"{_number(unclear, 'mask')} may belong to several images: {mask!r} to "
            f"{two[0]!r} or {two[1]!r}. Call the folders of masks like those of the "
            "images, or list one mask for each image of bad, in order."
        )
    lone = [
        f"{_number(paths, one)} without {other}: {_first(paths)}"
        for paths, one, other in (
            (without, "image", "a mask"),
            (alone, "mask", "an image"),
        )
        if paths
    ]
    if lone:
        raise ValueError(
            f"masks and bad do not pair: {'; '.join(lone)}. The mask of NAME.jpg is "
            "called NAME.png or NAME_mask.png, or lies in a folder NAME; or list one "
            "mask for each image of bad, in order."
        )


def _first(paths, most=5):
    """Return the first paths as a text."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{', '.join(repr(str(path)) for path in paths[:most])}{more}"


def _check_masks_of_good(good, mask_files, masks):
    for image, files, mask in zip(good, mask_files, masks, strict=False):
        if files and mask.any():
            raise ValueError(
                f"The mask {str(files[0])!r} of the good image {str(image)!r} is not "
                "empty."
            )


def _warn_of_masks_among(bad):
    stems = {(image.parent, image.stem) for image in bad}
    like_masks = [
        image
        for image in bad
        if MASK_ENDING.search(image.stem)
        and (image.parent, MASK_ENDING.sub("", image.stem)) in stems
    ]
    if like_masks:
        globs = sorted({str(image.parent / "*_mask*") for image in like_masks})
        warnings.warn(
            f"{_number(like_masks, 'image')} of bad called like masks of others: "
            f"{_first(like_masks, 1)}. If they are, say where: "
            f"masks={globs if len(globs) > 1 else globs[0]!r}.",
            stacklevel=3,
        )


def _warn_of_skipped(skipped):
    silent = {HIDDEN, COMPANION, IS_MASK}
    told = [(path, why) for path, why in skipped.items() if why not in silent]
    if told:
        path, why = told[0]
        warnings.warn(
            f"{_number(told, 'file or folder', 'files or folders')} skipped, such as "
            f"{str(path)!r}: {why}. The report names all.",
            stacklevel=3,
        )


def _number(things, one, several=None):
    """Return how many things there are, with their noun."""
    several = several or f"{one}s"
    return f"{len(things)} {one if len(things) == 1 else several}"


def _counted(found):
    counts = Counter(found.names)
    classes = ", ".join(f"{name!r} {count}" for name, count in counts.items())
    return f"{_number(found.files, 'image')} ({classes})"
