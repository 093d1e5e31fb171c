"""Textures against their photographs, synthetic sets, and folders in MVTec's layout."""

import math
import re
import shutil
import socket
import warnings

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy import ndimage, optimize
from skimage import data

from skanomaly.datasets import (
    _displaced,
    _ellipses_apart,
    _paint_ellipses,
    labels_from,
    load_mvtec,
    load_textures,
    make_clips,
    make_ellipses,
    make_moving_shapes,
)
from skanomaly.metrics import pixel_roc_auc_score

KINDS = ["hole", "patch", "scratch", "stain"]


# load_textures


def clean_crop(image, mask, area):
    """Return the crop of an area that equals the image outside the mask, or None."""
    crops = sliding_window_view(area, image.shape).reshape(-1, *image.shape)
    for candidates in (crops, crops[:, :, ::-1]):
        equal = (candidates == image)[:, ~mask].all(axis=1)
        if equal.any():
            return candidates[equal.argmax()]
    return None


@pytest.mark.parametrize("texture", ["brick", "grass", "gravel"])
def test_textures_are_the_photograph_but_for_the_defect(texture):
    textures = load_textures(texture=texture, n_train=5, n_test=16, size=32)
    photograph = getattr(data, texture)()
    left, middle, right = (
        np.asarray(Image.fromarray(part).resize((len(part[0]) // 4, 128), 2))
        for part in (photograph[:, :160], photograph[:, 160:352], photograph[:, 352:])
    )
    unmasked = np.zeros((32, 32), bool)
    for image in textures.X_train[..., 0]:
        crops = [clean_crop(image, unmasked, area) for area in (left, right)]
        assert sum(crop is not None for crop in crops) == 1
        assert clean_crop(image, unmasked, middle) is None
    for image, mask, kind in zip(
        textures.X_test[..., 0],
        textures.masks_test,
        textures.defect_test,
        strict=True,
    ):
        clean = clean_crop(image, mask, middle)
        assert clean is not None, kind
        assert clean_crop(image, mask, left) is None
        assert clean_crop(image, mask, right) is None
        if kind != "good":
            change = np.abs(image[mask].astype(int) - clean[mask])
            assert change.mean() > 15, kind


def test_textures_bunch():
    textures = load_textures()
    assert textures.X_train.shape == (200, 64, 64, 1)
    assert textures.X_test.shape == (80, 64, 64, 1)
    assert textures.X_train.dtype == textures.X_test.dtype == np.uint8
    names, counts = np.unique(textures.defect_test, return_counts=True)
    assert names.tolist() == ["good", *KINDS]
    assert counts.tolist() == [40, 10, 10, 10, 10]
    assert_array_equal(textures.y_test == -1, textures.defect_test != "good")
    covered = textures.masks_test.mean(axis=(1, 2))
    assert textures.masks_test.dtype == bool
    assert not covered[textures.y_test == 1].any()
    assert covered[textures.y_test == -1].min() > 0.01
    assert covered[textures.y_test == -1].max() < 0.3
    assert "CC0" in textures.DESCR


@pytest.mark.parametrize("size", [16, 51, 128])
def test_textures_of_any_size(size):
    textures = load_textures(n_train=2, n_test=9, size=size)
    assert textures.X_train.shape == (2, size, size, 1)
    assert textures.masks_test.shape == (9, size, size)
    assert textures.masks_test[textures.y_test == -1].any(axis=(1, 2)).all()


def test_textures_are_seeded():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, same, other = (
        load_textures(n_train=4, n_test=8, random_state=seed) for seed in (0, 0, 1)
    )
    for key in ("X_train", "X_test", "masks_test"):
        assert_array_equal(first[key], same[key])
        assert (first[key] != other[key]).any()
    assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_textures_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    for texture in ("brick", "grass", "gravel"):
        assert len(load_textures(texture=texture, n_train=1, n_test=1).X_train) == 1


def test_textures_parameters_are_checked():
    for params in ({"texture": "wood"}, {"size": 129}, {"n_train": 0}):
        with pytest.raises(ValueError, match=next(iter(params))):
            load_textures(**params)


# load_mvtec


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """Return a folder with the category "cork": 12 x 10 pixels, two defects."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cork"
    for name in (
        "train/good/1.png",
        "train/good/0.png",
        "train/good/2.PNG",
        "test/good/0.bmp",
        "test/hole/000.png",
        "test/hole/001.png",
        "test/crack/000.tif",
    ):
        save(folder / name, rng.integers(0, 256, (12, 10, 3), np.uint8))
    (folder / "train" / "good" / "notes.txt").write_text("no image")
    (folder / "train" / "good" / "._0.png").write_bytes(b"no image")
    mask = np.zeros((12, 10), np.uint8)
    mask[2:6, 4:8] = 255
    mask[0, :4] = 0, 1, 127, 128
    save(folder / "ground_truth/hole/000_mask.png", mask)
    save(folder / "ground_truth/hole/001.png", mask[::-1])
    save(folder / "ground_truth/crack/000_mask.bmp", mask[:, ::-1])
    return tmp_path


def test_mvtec_is_read_in_order(root):
    cork = load_mvtec(root, "cork")
    folder = root / "cork"
    train = [folder / "train" / "good" / name for name in ("0.png", "1.png", "2.PNG")]
    test = ["crack/000.tif", "good/0.bmp", "hole/000.png", "hole/001.png"]
    test = [folder / "test" / name for name in test]
    assert cork.paths_train.tolist() == [str(path) for path in train]
    assert cork.paths_test.tolist() == [str(path) for path in test]
    assert_array_equal(cork.X_train, [np.array(Image.open(path)) for path in train])
    assert_array_equal(cork.X_test, [np.array(Image.open(path)) for path in test])
    assert cork.defect_test.tolist() == ["crack", "good", "hole", "hole"]
    assert cork.y_test.tolist() == [-1, 1, -1, -1]

    mask = np.zeros((12, 10), bool)
    mask[2:6, 4:8] = True
    mask[0, 3] = True
    expected = [mask[:, ::-1], np.zeros((12, 10), bool), mask, mask[::-1]]
    assert cork.masks_test.dtype == bool
    assert_array_equal(cork.masks_test, expected)


def test_mvtec_is_resized(root):
    cork = load_mvtec(str(root), "cork", size=(7, 23), mode="L", n_jobs=2)
    assert cork.X_train.shape == (3, 7, 23, 1)
    assert cork.X_test.shape == (4, 7, 23, 1)
    full = load_mvtec(root, "cork").masks_test
    for mask, original in zip(cork.masks_test, full, strict=True):
        pillow = Image.fromarray(original.astype(np.uint8)).resize((23, 7), 0)
        assert_array_equal(mask, np.asarray(pillow).astype(bool))


def test_mvtec_without_masks(root):
    (root / "cork" / "ground_truth").rename(root / "elsewhere")
    cork = load_mvtec(root, "cork")
    assert cork.masks_test is None
    assert cork.y_test.tolist() == [-1, 1, -1, -1]


@pytest.mark.parametrize(
    "missing", ["", "cork", "cork/train", "cork/train/good", "cork/test"]
)
def test_mvtec_names_the_missing_folder(root, missing):
    shutil.rmtree(root / missing)
    with pytest.raises(FileNotFoundError, match=r"no folder.*Wanted are") as error:
        load_mvtec(root, "cork")
    assert str(root / missing) in str(error.value)


def test_mvtec_names_the_empty_folder(root):
    for path in (root / "cork" / "train" / "good").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no images in .*train.good"):
        load_mvtec(root, "cork")


def test_mvtec_names_the_missing_mask(root):
    (root / "cork" / "ground_truth" / "hole" / "001.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"test.hole.001\.png.*ground_truth.hole.001_mask\.png"
    ):
        load_mvtec(root, "cork")


def test_mvtec_names_the_mask_of_another_size(root):
    save(root / "cork/ground_truth/hole/001.png", np.zeros((10, 12), np.uint8))
    for size in (None, 8):
        with pytest.raises(ValueError, match=r"001\.png.*\(10, 12\).*\(12, 10\)"):
            load_mvtec(root, "cork", size=size)


def test_mvtec_names_the_damaged_file(root):
    path = root / "cork" / "test" / "hole" / "001.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OSError, match=r"test.hole.001\.png"):
        load_mvtec(root, "cork")


def test_mvtec_sizes_must_agree_between_training_and_test(root):
    save(root / "cork/test/good/0.bmp", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"0\.bmp.*\(9, 9\)"):
        load_mvtec(root, "cork")


def test_mvtec_scales_images_of_twelve_bits(root):
    for name in ("0.png", "1.png", "2.PNG"):
        save(root / "cork/train/good" / name, np.full((12, 10), 4095, np.uint16))
    with pytest.warns(UserWarning, match=r"max_value=4095"):
        load_mvtec(root, "cork")
    cork = load_mvtec(root, "cork", max_value=4095)
    assert (cork.X_train == 255).all()


# load_mvtec: names of files and folders


@pytest.mark.parametrize("name", ["good", "Good", "GOOD", "ok", "OK", "normal"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_mvtec_names_of_good(root, name, part):
    folder = root / "cork" / part
    (folder / "good").rename(folder / "renamed")
    (folder / "renamed").rename(folder / name)
    cork = load_mvtec(root, "cork")
    assert len(cork.X_train) == 3
    assert sorted(cork.y_test) == [-1, -1, -1, 1]
    assert (
        cork.defect_test[cork.y_test == 1] == (name if part == "test" else "good")
    ).all()
    assert not cork.masks_test[cork.y_test == 1].any()


def test_mvtec_skips_hidden_folders(root):
    pixels = np.zeros((12, 10), np.uint8)
    for name in (".ipynb_checkpoints", "__MACOSX", "hole/.thumbnails"):
        save(root / "cork" / "test" / name / "0.png", pixels)
        save(root / "cork" / "train" / "good" / name / "0.png", pixels)
    cork = load_mvtec(root, "cork")
    assert len(cork.X_train) == 3
    assert cork.defect_test.tolist() == ["crack", "good", "hole", "hole"]


def test_mvtec_reads_further_down(root):
    rng = np.random.default_rng(1)
    image, mask = (
        rng.integers(0, 256, (12, 10, 3), np.uint8),
        np.zeros((12, 10), np.uint8),
    )
    mask[3, 7] = 255
    save(root / "cork/train/good/batch/0.pgm", image[..., 0])
    save(root / "cork/test/hole/cam/a/000.jpg", image)
    save(root / "cork/ground_truth/hole/cam/a/000_mask.png", mask)
    save(root / "cork/test/good/cam/0.tga", image)
    cork = load_mvtec(root, "cork")
    assert len(cork.X_train) == 4
    assert cork.defect_test.tolist() == [
        "crack",
        "good",
        "good",
        "hole",
        "hole",
        "hole",
    ]
    (row,) = [i for i, path in enumerate(cork.paths_test) if path.endswith("jpg")]
    assert_array_equal(cork.masks_test[row], mask > 0)


def test_mvtec_tells_folders_of_images_from_folders_of_masks(root):
    """A folder named like an image holds masks of others if it holds images too."""
    before = load_mvtec(root, "cork").masks_test
    save(root / "cork/test/hole/000/5.png", np.zeros((12, 10), np.uint8))
    save(root / "cork/ground_truth/hole/000/5_mask.png", np.eye(12, 10, dtype=np.uint8))
    cork = load_mvtec(root, "cork")
    nested = np.array([path.endswith("5.png") for path in cork.paths_test])
    assert_array_equal(cork.masks_test[nested], [np.eye(12, 10, dtype=bool)])
    assert_array_equal(cork.masks_test[~nested], before)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("train/bad/0.png", "train/bad"),
        ("train/0.png", "train/0.png"),
        ("test/0.png", "test/0.png"),
        ("train/good/0.heic", "train/good/0.heic"),
        ("test/hole/a/0.raw", "test/hole/a/0.raw"),
    ],
)
def test_mvtec_tells_what_is_skipped(root, name, named):
    load_mvtec(root, "cork")  # notes.txt is a companion
    (root / "cork" / name).parent.mkdir(exist_ok=True)
    (root / "cork" / name).touch()
    message = re.escape(f"1 files or folders of {str(root / 'cork')!r} are skipped")
    message += f".*{re.escape(repr(str(root / 'cork' / named)))}.*webp"
    with pytest.warns(UserWarning, match=message) as record:
        cork = load_mvtec(root, "cork")
    assert [told.filename for told in record] == [__file__]
    assert (len(cork.X_train), len(cork.X_test)) == (3, 4)


def test_mvtec_joins_the_masks_of_an_image(root):
    image, places = np.zeros((12, 10, 3), np.uint8), {}
    folder = root / "cork"
    names = ["1_mask", "1_mask_1", "1_mask_2", "1", "10_mask", "10_mask_1", "11"]
    names += ["1_mask_mask", "00/a", "00/b", "2_mask3"]
    for number, name in enumerate(names):
        mask = np.zeros((12, 10), np.uint8)
        mask.flat[number] = 255
        save(folder / "ground_truth" / "bent" / f"{name}.png", mask)
        places[name] = number
    for stem, own in {
        "1": ["1", "1_mask", "1_mask_1", "1_mask_2"],
        "10": ["10_mask", "10_mask_1"],
        "11": ["11"],
        "00": ["00/a", "00/b"],
        "2": ["2_mask3"],
    }.items():
        shutil.rmtree(folder / "test" / "bent", ignore_errors=True)
        save(folder / "test" / "bent" / f"{stem}.png", image)
        cork = load_mvtec(root, "cork")
        joined = np.flatnonzero(cork.masks_test[cork.defect_test == "bent"])
        assert joined.tolist() == sorted(places[name] for name in own), stem


# load_mvtec: what is anomalous in a mask

HOLE = np.zeros((12, 10), np.uint8)
HOLE[2:6, 4:8] = 1


def grey(*values, dtype=np.uint8):
    """Return the hole in one value, or in two halves of two values."""
    levels = HOLE.astype(dtype) * values[0]
    levels[4:6, 4:8] = values[-1]
    return Image.fromarray(levels)


def palette(background, defect, colours):
    image = Image.fromarray(np.where(HOLE, defect, background).astype(np.uint8))
    image = image.convert("P")
    image.putdata(np.where(HOLE, defect, background).ravel().tolist())
    image.putpalette(colours)
    return image


def coloured(background, *defect):
    pixels = np.array(np.broadcast_to(background, (12, 10, len(background))), np.uint8)
    pixels[2:4, 4:8], pixels[4:6, 4:8] = defect[0], defect[-1]
    return Image.fromarray(pixels)


BLACK, WHITE, RED, GREEN = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 99, 0)
MASKS = {
    "0/1": grey(1),
    "0/1/2": grey(1, 2),
    "0/255": grey(255),
    "0/128/255": grey(128, 255),
    "0/40/200": grey(40, 200),
    "1 bit": grey(255).convert("1"),
    "16 bit 0/1": grey(1, dtype=np.uint16),
    "16 bit 0/255": grey(255, dtype=np.uint16),
    "16 bit 0/65535": grey(65535, dtype=np.uint16),
    "16 bit 0/1/300": grey(1, 300, dtype=np.uint16),
    "32 bit 0/1": grey(1, dtype=np.int32),
    "float 0/1": grey(1, dtype=np.float32),
    "palette": palette(0, 1, [*BLACK, 128, 0, 0]),
    "palette, all black": palette(0, 1, [*BLACK, *BLACK]),
    "palette, background 3": palette(3, 0, [*WHITE, *RED, *GREEN, *BLACK]),
    "palette, white background": palette(0, 1, [*WHITE, *BLACK]),
    "RGB 0/1": coloured(BLACK, (1, 1, 1)),
    "RGB 0/255": coloured(BLACK, WHITE),
    "red on black": coloured(BLACK, RED),
    "red and green on black": coloured(BLACK, RED, GREEN),
    "red and black on white": coloured(WHITE, RED, BLACK),
    "LA, alpha constant": coloured((0, 255), (255, 255)),
    "LA, colour constant": coloured((255, 0), (255, 255)),
    "RGBA, alpha constant": coloured((*BLACK, 255), (*WHITE, 255)),
    "RGBA, colour constant": coloured((*WHITE, 0), (*WHITE, 255)),
    "RGBA, black": coloured((*BLACK, 0), (*BLACK, 255)),
    "RGBA, alpha 0/1": coloured((*RED, 0), (*RED, 1)),
    "RGBA, both": coloured((*BLACK, 0), (*RED, 255), (*GREEN, 255)),
}


def mask_of(root, image, name="000_mask.png", **options):
    """Return what is read of an image that is stored as the mask of a defect."""
    shutil.rmtree(root / "cork" / "ground_truth" / "hole")
    shutil.rmtree(root / "cork" / "test" / "hole")
    (root / "cork" / "ground_truth" / "hole").mkdir()
    image.save(root / "cork" / "ground_truth" / "hole" / name, **options)
    stand_in = np.zeros((image.height, image.width, 3), np.uint8)
    save(root / "cork" / "test" / "hole" / "000.png", stand_in)
    return load_mvtec(root, "cork", size=(image.height, image.width)).masks_test[-1]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_masks_of_any_format(root, kind, suffix):
    image = MASKS[kind]
    if suffix == "png" and image.mode in ("I", "F"):
        pytest.skip("PNG has 16 bits at most")
    assert_array_equal(mask_of(root, image, f"000_mask.{suffix}"), HOLE == 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("000.gif", {}),
        ("000.bmp", {}),
        ("000.pgm", {}),
        ("000.tga", {}),
        ("000.webp", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("level", [1, 255])
def test_masks_of_other_formats(root, name, options, level):
    image = grey(level).convert("RGB" if name.endswith("webp") else "L")
    assert_array_equal(mask_of(root, image, name, **options), HOLE == 1)


LARGE = np.zeros((48, 40), bool)
LARGE[11:29, 9:30] = True


@pytest.mark.parametrize("name", ["000.jpg", "000_mask.webp"])
@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("colours", [(BLACK, WHITE), (BLACK, RED), (WHITE, RED)])
def test_masks_with_the_noise_of_compression(root, name, quality, colours):
    pixels = np.array(colours, np.uint8)[LARGE.astype(int)]
    image = Image.fromarray(pixels)
    image.save(root / name, quality=quality, subsampling=0)
    with Image.open(root / name) as noisy:
        assert len(np.unique(np.asarray(noisy).reshape(-1, 3), axis=0)) > 3
    mask = mask_of(root, image, name, quality=quality, subsampling=0)
    # WebP halves the resolution of colour
    allowed = 0 if name == "000.jpg" or colours == (BLACK, WHITE) else 80
    assert (mask != LARGE).sum() <= allowed


def test_masks_with_soft_edges(root):
    large = np.kron(LARGE, np.ones((4, 4), np.uint8)).astype(np.uint8) * 255
    image = Image.fromarray(np.roll(large, 2, axis=(0, 1))).resize((40, 48), 2)
    levels = np.asarray(image)
    assert len(np.unique(levels)) > 3
    assert_array_equal(mask_of(root, image), levels > 127)
    assert_array_equal(mask_of(root, image.convert("RGB")), levels > 127)


@pytest.mark.parametrize(("level", "what"), [(0, "empty"), (255, "full"), (1, "full")])
def test_masks_that_are_empty_or_full_are_named(root, level, what):
    save(root / "cork/ground_truth/hole/001.png", np.full((12, 10), level, np.uint8))
    message = rf"1 of 3, such as .*hole.001\.png', which is {what} at 12 x 10"
    with pytest.warns(UserWarning, match=message) as record:
        cork = load_mvtec(root, "cork")
    assert [told.filename for told in record] == [__file__]
    assert cork.masks_test[-1].all() == cork.masks_test[-1].any() == (level > 0)


def test_masks_painted_on_the_photograph_are_named(root):
    photograph = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    photograph[4:6, 3:7] = 255, 0, 0
    save(root / "cork/ground_truth/hole/001.png", photograph)
    with pytest.warns(UserWarning, match=r"hole.001\.png', which is nearly full at"):
        load_mvtec(root, "cork")


def test_masks_that_are_lost_when_the_image_shrinks_are_named(root):
    mask = np.zeros((12, 10), np.uint8)
    mask[0, 0] = 255
    save(root / "cork/ground_truth/hole/001.png", mask)
    load_mvtec(root, "cork")
    with pytest.warns(UserWarning, match=r"hole.001\.png', which is empty at 4 x 4"):
        load_mvtec(root, "cork", size=4)


# labels_from


@pytest.mark.parametrize(
    ("y", "normal", "expected"),
    [
        (["good", "hole", "good"], "good", [1, -1, 1]),
        (("good", "hole", "ok"), ["good", "ok"], [1, -1, 1]),
        (np.array(["good", "hole"]), {"good", "fine"}, [1, -1]),
        (np.array(["good", "hole"], object), np.array(["good"]), [1, -1]),
        ([True, False], False, [-1, 1]),
        (np.array([True, False]), True, [1, -1]),
        ([0, 1, 1], 0, [1, -1, -1]),
        (np.array([0.0, 1.0]), 1, [-1, 1]),
        (np.array([0, 1, 2], np.uint8), (0, 2), [1, -1, 1]),
        ([np.int64(3), "a"], 3, [1, -1]),
        ([b"ok", b"no"], b"ok", [1, -1]),
        ([1, -1], 1, [1, -1]),
        ([0, None, "a"], None, [-1, 1, -1]),
        (["good"], "good", [1]),
    ],
)
def test_labels_of_any_kind(y, normal, expected):
    labels = labels_from(y, normal=normal)
    assert labels.dtype == np.int64
    assert labels.tolist() == expected


def test_labels_of_series_and_tensors():
    pandas = pytest.importorskip("pandas")
    torch = pytest.importorskip("torch")
    names = pandas.Series(["good", "hole"], index=[7, 3])
    for y in (names, names.astype("category"), names.astype("string")):
        assert labels_from(y, normal="good").tolist() == [1, -1]
    assert labels_from(torch.tensor([0, 1]), normal=0).tolist() == [1, -1]
    with pytest.raises(ValueError, match=r"no label at index 1, but <NA>"):
        labels_from(pandas.Series(["a", None], dtype="string"), normal="a")


def test_labels_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"normal='Good' is not .*'good', 'hole'\."):
        labels_from(["hole", "good"], normal="Good")
    with pytest.raises(ValueError, match=r"normal='1' is not .* y holds 0, 1\."):
        labels_from(np.array([0, 1]), normal="1")
    with pytest.raises(ValueError, match=r"normal=\[\] is not .*and 2 more\."):
        labels_from(range(12), normal=[])
    with pytest.raises(ValueError, match="y holds nothing"):
        labels_from([], normal=0)
    for missing in (None, float("nan")):
        with pytest.raises(ValueError, match=f"no label at index 1, but {missing}"):
            labels_from(["good", missing], normal="good")
    with pytest.raises(ValueError, match=r"y has shape \(2, 1\)"):
        labels_from([[0], [1]], normal=0)
    for wrong in ("good", None, 1):
        with pytest.raises(ValueError, match="'y' parameter of labels_from"):
            labels_from(wrong, normal="good")


# make_clips


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_clips_equal_slow_reference(length, channels, dtype):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 4, 3, *channels)).astype(dtype)
    video = np.array(["b"] * 5 + ["a"] * 2 + ["c"] * 5)
    expected, last = [], []
    for i in range(12):
        frame_numbers = range(i - length + 1, i + 1)
        if frame_numbers[0] >= 0 and {video[j] for j in frame_numbers} == {video[i]}:
            expected.append([frames[j].reshape(4, 3, -1) for j in frame_numbers])
            last.append(i)

    clips = make_clips(frames, video, length=length)
    assert_array_equal(clips.clips, expected)
    assert clips.clips.dtype == dtype
    assert_array_equal(clips.last, last)
    assert_array_equal(clips.video, video[last])


def test_clips_of_one_video():
    frames = np.zeros((8, 4, 4), np.uint8)
    clips, same = make_clips(frames), make_clips(frames, np.zeros(8))
    assert clips.clips.shape == (4, 5, 4, 4, 1)
    assert_array_equal(clips.last, [4, 5, 6, 7])
    assert_array_equal(clips.last, same.last)
    assert_array_equal(clips.video, same.video)


def test_clips_are_a_copy():
    frames = np.zeros((8, 4, 4, 1))
    make_clips(frames).clips[:] = 1
    assert not frames.any()


def test_clips_refuse_bad_input():
    frames = np.zeros((6, 4, 4))
    for wrong in (frames[0], frames[..., None, None], ["a.png", "b.png"]):
        with pytest.raises(ValueError, match=r"frames must have shape \(N, H, W\) or"):
            make_clips(wrong)
    for wrong in ([0] * 5, np.zeros((6, 1))):
        with pytest.raises(ValueError, match="each of the 6 frames, got an array of"):
            make_clips(frames, wrong)
    with pytest.raises(ValueError, match="those of video 7 form 2 separate runs"):
        make_clips(frames, [7, 7, 8, 8, 7, 7], length=2)
    with pytest.raises(ValueError, match="those of video nan form 6 separate runs"):
        make_clips(frames, [np.nan] * 6)
    with pytest.raises(ValueError, match=r"length=5 frames.* longest video has 4"):
        make_clips(frames, [0, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="longest video has 0"):
        make_clips(frames[:0])
    with pytest.raises(ValueError, match="length"):
        make_clips(frames, length=0)


# make_moving_shapes


def path_of(frames):
    """Return the centres (n, 2) of the only shape in a video, its brightest object."""
    background = frames.min(axis=0).astype(float)
    grid = np.moveaxis(np.mgrid[: frames.shape[1], : frames.shape[2]], 0, -1)
    return [
        np.average(
            grid.reshape(-1, 2),
            weights=((frame - background) / (frame.max() - background)).ravel(),
            axis=0,
        )
        for frame in frames
    ]


def test_shapes_move_steadily_and_faster_when_anomalous():
    data = make_moving_shapes(n_shapes=1, n_videos_train=3, n_videos_test=4, size=128)
    for frames, kinds in zip(
        [
            *np.split(data.frames_train[..., 0], 3),
            *np.split(data.frames_test[..., 0], 4),
        ],
        [np.full(60, "good")] * 3 + np.split(data.anomaly_test, 4),
        strict=True,
    ):
        # a bounce mirrors the velocity, and shortens one step
        steps = np.abs(np.diff(path_of(frames), axis=0))
        slow, fast = steps[kinds[1:] != "fast"], steps[kinds[1:] == "fast"]
        velocity = np.median(slow, axis=0)
        assert 0.9 < np.hypot(*velocity) < 2.2
        steady = np.abs(slow - velocity).max(axis=1) < 0.1
        assert steady.mean() > 0.85
        if len(fast):
            assert np.median(fast, axis=0) == pytest.approx(5 * velocity, abs=0.1)


def test_shapes_bunch():
    data = make_moving_shapes(n_videos_train=2, n_videos_test=3, n_frames=40, size=48)
    assert data.frames_train.shape == (80, 48, 48, 1)
    assert data.frames_test.shape == (120, 48, 48, 1)
    assert data.frames_train.dtype == data.frames_test.dtype == np.uint8
    assert_array_equal(data.video_train, [0] * 40 + [1] * 40)
    assert_array_equal(data.video_test, [0] * 40 + [1] * 40 + [2] * 40)
    assert_array_equal(data.y_test == -1, data.anomaly_test != "good")
    assert data.masks_test.dtype == bool
    assert_array_equal(data.masks_test.any(axis=(1, 2)), data.y_test == -1)
    for kinds in np.split(data.anomaly_test, 3):
        starts = kinds[np.flatnonzero(np.r_[True, kinds[1:] != kinds[:-1]])]
        assert sorted(kind for kind in starts if kind != "good") == ["fast", "form"]
        assert kinds[0] == "good"
    assert "bounces" in data.DESCR


def test_shapes_are_masked_where_they_are_a_cross():
    data = make_moving_shapes(n_shapes=1, n_videos_test=2)
    for frames, masks, kinds in zip(
        np.split(data.frames_test[..., 0].astype(float), 2),
        np.split(data.masks_test, 2),
        np.split(data.anomaly_test, 2),
        strict=True,
    ):
        changed = np.abs(frames - np.median(frames, axis=0)) > 40
        for kind in ("fast", "form"):
            assert (masks[kinds == kind] >= changed[kinds == kind]).all()
        area = {kind: changed[kinds == kind].mean() for kind in ("fast", "form")}
        assert area["form"] < 0.8 * area["fast"]


@pytest.mark.parametrize(
    ("make", "params"),
    [
        (make_moving_shapes, {"n_videos_train": 1, "n_videos_test": 1}),
        (make_ellipses, {"n_train": 4, "n_test": 4}),
        (make_ellipses, {"n_train": 4, "n_test": 4, "arrangement": "nested"}),
    ],
)
def test_synthetic_sets_are_seeded(make, params):
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, same, other = (make(**params, random_state=seed) for seed in (0, 0, 1))
    for key in set(first) - {"DESCR"}:
        assert_array_equal(first[key], same[key])
    for key in set(first) & {"frames_train", "frames_test", "X_train", "X_test"}:
        assert (first[key] != other[key]).any()
    assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_synthetic_sets_check_their_parameters():
    for make, params in (
        (make_moving_shapes, {"n_frames": 19}),
        (make_moving_shapes, {"n_shapes": 0}),
        (make_ellipses, {"size": 257}),
        (make_ellipses, {"arrangement": "beside"}),
        (make_ellipses, {"n_test": 1}),
    ):
        with pytest.raises(ValueError, match=next(iter(params))):
            make(**params)


# make_ellipses


@pytest.mark.parametrize("arrangement", ["apart", "nested"])
@pytest.mark.parametrize("size", [32, 64, 65, 255])
def test_ellipses_differ_from_their_healthy_version_where_diseased(size, arrangement):
    data = make_ellipses(n_train=2, n_test=6, size=size, arrangement=arrangement)
    assert data.X_train.shape == (2, size, size, 1)
    assert data.X_test.dtype == data.healthy_test.dtype == np.uint8
    assert data.y_test.tolist() == [1, -1] * 3
    differences = (data.X_test.astype(float) - data.healthy_test)[..., 0] / 255
    assert_array_equal(data.differences_test, differences.astype(np.float32))
    assert_array_equal(data.masks_test, np.abs(2 * data.differences_test) > 0.44195)
    assert_array_equal(data.masks_test.any(axis=(1, 2)), data.y_test == -1)
    assert not data.differences_test[data.y_test == 1].any()


def test_healthy_ellipses_lie_apart_and_have_their_sizes():
    data = make_ellipses(n_train=2, n_test=24, size=256)
    axes, strokes = [], []
    for image in data.healthy_test[..., 0]:
        # waves are 229 at most; pixels of a contour may touch at their corners
        contours, n = ndimage.label(image > 230, np.ones((3, 3)))
        assert n == 2
        assert not (contours[[0, -1]].any() or contours[:, [0, -1]].any())
        ellipses = [ndimage.binary_fill_holes(contours == k) for k in (1, 2)]
        small, large = sorted((np.argwhere(e) for e in ellipses), key=len)
        assert math.dist(small.mean(axis=0), large.mean(axis=0)) > 118
        # the variance along a semi-axis is a quarter of its square
        axes.append(
            [2 * np.linalg.eigvalsh(np.cov(e.T)) ** 0.5 for e in (small, large)]
        )
        strokes.append((contours > 0).sum() / (np.pi * np.sum(axes[-1])))
    # the soft edges of 3 pixels are darker
    assert 5 - 3 < np.mean(strokes) < 5
    axes = np.array(axes)
    assert_allclose(axes.mean(axis=0), [[19, 39], [34, 69]], atol=0.5)
    assert_allclose(axes.std(axis=0), 1, atol=0.5)


def test_shrunk_ellipse_equals_slow_reference():
    """Look up by bilinear interpolation what the published displacement shows."""
    size = 256
    data = make_ellipses(n_train=2, n_test=4, size=size)
    grid = np.mgrid[:size, :size]

    def shrunk(healthy, centre):
        y, x = (grid - centre[:, None, None]) * 2 / size
        gaussian = np.exp(-(y**2 + x**2) / (2 * 0.19**2))
        displacement = np.stack([y, x]) * gaussian
        displacement *= 0.1 / np.hypot(*displacement).max()
        points = grid + displacement * size / 2
        return ndimage.map_coordinates(healthy, points, order=1, mode="nearest")

    for row in np.flatnonzero(data.y_test == -1):
        image, healthy = (
            X[row, ..., 0] / 255 for X in (data.X_test, data.healthy_test)
        )

        def error(centre, image=image, healthy=healthy):
            return np.abs(shrunk(healthy, centre) - image).mean()

        start = np.argwhere(data.masks_test[row]).mean(axis=0)
        found = optimize.minimize(
            error, start, method="Nelder-Mead", options={"maxfev": 60}
        )
        assert found.fun < 0.05 * np.abs(image - healthy).mean()

        # most of what differs is background in either version
        waves = (image < 0.9) & (healthy < 0.9)
        assert waves[data.masks_test[row]].mean() > 0.5


@pytest.mark.parametrize("size", [32, 64, 255])
def test_nested_ellipses_differ_in_the_inner_contour(size):
    data = make_ellipses(n_train=2, n_test=12, size=size, arrangement="nested")
    for difference in data.differences_test[data.y_test == -1]:
        before, after = (np.argwhere(sign * difference > 0.2) for sign in (-1, 1))
        assert before.mean(axis=0) == pytest.approx(after.mean(axis=0), abs=size / 50)
        extent = np.ptp(after, axis=0).max() / np.ptp(before, axis=0).max()
        assert 0.5 < extent < 0.9


def test_shrunk_nested_ellipse_equals_slow_reference():
    # Follow every pixel's displacement in the published units and look up, by bilinear
    # interpolation, what the healthy contour shows there.
    size = 256
    data = make_ellipses(n_train=2, n_test=8, size=size, arrangement="nested")
    for row in np.flatnonzero(data.y_test == -1):
        difference = data.differences_test[row]
        centre = np.argwhere(difference < -0.3).mean(axis=0)
        grid = np.mgrid[:size, :size]
        y, x = (grid - centre[:, None, None]) * 2 / size
        gaussian = np.exp(-(y**2 + x**2) / (2 * 0.19**2))
        displacement = np.stack([y, x]) * gaussian
        displacement *= 0.1 / np.hypot(*displacement).max()
        healthy = np.maximum(-difference, 0)
        moved = ndimage.map_coordinates(
            healthy, grid + displacement * size / 2, order=1
        )
        expected, found = moved > 0.25, difference > 0.25
        assert (expected & found).sum() / (expected | found).sum() > 0.5


def test_nested_ellipses_grey_levels_do_not_tell_the_class():
    data = make_ellipses(n_train=400, n_test=2, arrangement="nested")
    healthy, diseased = (data.X_train[data.y_train == label] for label in (1, -1))
    for level in (np.min, np.max, np.median):
        first, second = (level(X, axis=(1, 2, 3)) for X in (healthy, diseased))
        spread = np.concatenate([first, second]).std()
        assert abs(first.mean() - second.mean()) <= 0.4 * spread, level


def test_a_painter_of_another_healthy_size_is_nearly_perfect():
    """Nobody knows the healthy size, so that the masks must not depend on it."""
    rng = np.random.RandomState(0)
    y, x = np.mgrid[2:256:4, 2:256:4]
    masks, maps = [], []
    for _ in range(20):
        small, large = _ellipses_apart(rng)
        other = (small[0], rng.normal([40, 20], 1), small[2])
        waves = rng.uniform(0.2, 0.4, (2, 2))
        healthy, diseased, painted = (
            _paint_ellipses(points, ellipses, [5, 5], waves) / 2
            for points, ellipses in (
                (x + 1j * y, (small, large)),
                (_displaced(x + 1j * y, small[0]), (small, large)),
                (x + 1j * y, (other, large)),
            )
        )
        masks.append(np.abs(diseased - healthy) > 0.44195 / 2)
        maps.append(np.abs(diseased - painted))
    assert pixel_roc_auc_score(masks, maps) > 0.99


def test_the_range_of_ellipses_does_not_tell_the_class():
    data = make_ellipses(n_train=200, n_test=2)
    healthy, diseased = (data.X_train[data.y_train == label] for label in (1, -1))
    for level in (np.min, np.max):
        first, second = (level(X, axis=(1, 2, 3)) for X in (healthy, diseased))
        spread = np.concatenate([first, second]).std()
        assert abs(first.mean() - second.mean()) <= 0.4 * spread, level


# Real images


@pytest.mark.parametrize(
    ("folder", "category", "n_train", "n_good", "n_anomalous", "masked"),
    [
        ("mvtec_ad", "toothbrush", 48, 12, 30, True),
        ("magnetic_tile", "tile", 240, 60, 150, True),
        ("brain_mri", "brain", 58, 29, 141, False),
    ],
)
def test_real_sets(shared_data, folder, category, n_train, n_good, n_anomalous, masked):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = load_mvtec(shared_data / folder, category, size=64)
    # two cracks are so thin that no pixel of 64 x 64 falls on them
    lost = ["2 of 150"] if category == "tile" else []
    assert len(caught) == len(lost)
    assert all(n in str(w.message) for n, w in zip(lost, caught, strict=True))
    assert images.X_train.shape == (n_train, 64, 64, 3)
    assert images.X_test.shape == (n_good + n_anomalous, 64, 64, 3)
    assert np.sum(images.y_test == 1) == n_good
    if not masked:
        assert images.masks_test is None
        return
    covered = images.masks_test.mean(axis=(1, 2))
    assert not covered[images.y_test == 1].any()
    assert covered[images.y_test == -1].mean() > 0.005
