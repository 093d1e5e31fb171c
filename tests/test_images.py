"""Decoding against Pillow, resizing against Pillow, and the ways back for maps."""

import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageFile, ImageOps
from sklearn.base import clone

from skanomaly.images import (
    IMAGE_SUFFIXES,
    CenterCropImages,
    LoadImages,
    RegionOfInterest,
    ResizeImages,
    ToDevice,
    image_files,
    read_image,
    upright_shape,
)


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def paths(tmp_path):
    """Return the paths of seven colour images of 9 x 7 pixels."""
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(random_image(9, 7, 3, seed=i)).save(path)
    return paths


def stacked(paths):
    images = []
    for path in paths:
        with Image.open(path) as file:
            images.append(np.array(file.convert("RGB")))
    return np.stack(images)


# Decoding


def test_read_colour_and_grey(tmp_path):
    pixels = random_image(5, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert_array_equal(read_image(tmp_path / "a.png"), pixels)
    grey = read_image(str(tmp_path / "a.png"), mode="L")
    luma = pixels @ [0.299, 0.587, 0.114]
    assert grey.shape == (5, 4, 1) and grey.dtype == np.uint8
    assert_allclose(grey[:, :, 0], luma, atol=0.51)


def test_read_16_bit_grey(tmp_path):
    levels = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        pixels = read_image(tmp_path / name, mode="L")[:, :, 0]
        assert_array_equal(pixels, np.round(levels / 257))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_read_applies_orientation(tmp_path, name, mode):
    image = Image.fromarray(random_image(6, 4, 3))
    image.save(tmp_path / f"plain_{name}")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(tmp_path / name, exif=exif)
    expected = np.rot90(read_image(tmp_path / f"plain_{name}", mode=mode), -1)
    assert_array_equal(read_image(tmp_path / name, mode=mode), expected)
    if name != "a.jpg" and mode == "RGB":
        assert_array_equal(expected, np.rot90(np.asarray(image), -1))


def put_exif_last(path):
    """Move the EXIF chunk of a PNG behind its pixels, where it may stand, too."""
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    end = len(content) - 12  # IEND
    path.write_bytes(
        content[:start] + content[stop:end] + content[start:stop] + content[end:]
    )


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_upright_shape_is_that_of_the_read_image(tmp_path, suffix, monkeypatch):
    paths = []
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        paths.append(tmp_path / f"{orientation}.{suffix}")
        Image.fromarray(random_image(6, 4, 3)).save(paths[-1], exif=exif)
    expected = [read_image(path).shape[:2] for path in paths]
    assert set(expected) == {(6, 4), (4, 6)}

    def refuse(self):
        raise AssertionError("the pixels are decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert [upright_shape(path) for path in paths] == expected


@pytest.mark.parametrize("name", ["a.gif", "a.bmp", "a.ppm", "a.tga"])
def test_upright_shape_of_formats_without_exif(tmp_path, name):
    Image.fromarray(random_image(6, 4, 3)).save(tmp_path / name)
    assert upright_shape(tmp_path / name) == (6, 4)


def test_upright_shape_of_a_png_with_its_exif_last(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_image(6, 4, 3)).save(tmp_path / "a.png", exif=exif)
    put_exif_last(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape[:2] == (4, 6)
    assert upright_shape(tmp_path / "a.png") == (4, 6)


def test_upright_shape_names_what_it_cannot_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"Cannot read the image '.*a\.png'"):
        upright_shape(np.str_(tmp_path / "a.png"))
    with pytest.raises(FileNotFoundError):
        upright_shape(tmp_path / "b.png")


def test_read_palette_and_alpha(tmp_path):
    rgba = random_image(6, 4, 4)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert_array_equal(read_image(tmp_path / "a.png"), rgba[:, :, :3])

    indices = Image.fromarray(random_image(6, 4) % 3).convert("P")
    indices.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    indices.save(tmp_path / "b.png", transparency=bytes([0, 128, 255]))
    palette = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    assert_array_equal(read_image(tmp_path / "b.png"), palette[random_image(6, 4) % 3])


def test_read_resizes_to_height_and_width(tmp_path):
    Image.fromarray(random_image(40, 30, 3)).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    for size, (height, width) in [((8, 12), (8, 12)), (10, (10, 10))]:
        expected = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = read_image(tmp_path / "a.png", size=size)
        assert_array_equal(pixels, np.asarray(expected))


def decoded_in_full(path, size, mode):
    """Return what Pillow makes of a file when it decodes all of its pixels."""
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert(mode)
    height, width = size
    resized = np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR))
    return resized.reshape(height, width, -1).astype(int)


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_jpegs_come_out_as_if_decoded_in_full(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = (
        Image.fromarray(random_image(60, 80, 3)).resize((800, 600)).convert(kind)
    )
    photograph.save(tmp_path / "a.jpg", quality=90, exif=exif)
    for size in ((20, 30), (37, 25), (150, 70), (250, 250)):
        for mode in ("RGB", "L"):
            image = read_image(tmp_path / "a.jpg", size, mode).astype(int)
            difference = abs(image - decoded_in_full(tmp_path / "a.jpg", size, mode))
            assert difference.mean() < 1
            assert difference.max() < 8


@pytest.mark.parametrize(
    ("sides", "size", "is_reduced"),
    [
        ((400, 320), (72, 58), True),  # a half has 2.75 times these sides
        ((400, 320), (73, 58), False),  # but no longer the height
        ((400, 320), (72, 59), False),  # or the width
        ((402, 322), (50, 50), True),
        ((402, 321), (50, 50), False),  # a column would be left over
        ((400, 320), None, False),
    ],
)
def test_jpegs_are_reduced_where_enough_is_left(tmp_path, sides, size, is_reduced):
    Image.fromarray(random_image(*sides, 3)).save(tmp_path / "a.jpg", quality=95)
    full = decoded_in_full(tmp_path / "a.jpg", size or sides, "RGB")
    assert (read_image(tmp_path / "a.jpg", size) != full).any() == is_reduced


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_other_files_are_decoded_in_full(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_image(400, 320, 3)).save(path)
    assert_array_equal(
        read_image(path, (40, 30)), decoded_in_full(path, (40, 30), "RGB")
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff"])
def test_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"torn.{suffix}"
    Image.fromarray(random_image(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=f"torn.{suffix}"):
        read_image(path)


def test_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match=r"Cannot read the image '.*text\.png'"):
        read_image(tmp_path / "text.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        read_image(tmp_path / "nowhere.png")


def test_pixels_without_range_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(OSError, match=r"a\.tiff.*no defined range"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_listed_suffix_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    image = Image.fromarray(random_image(6, 4))
    if suffix == ".pbm":
        image = image.convert("1")
    image.save(path)
    assert_array_equal(read_image(path), stacked([path])[0])


def test_misnamed_image_is_read(tmp_path):
    Image.fromarray(random_image(6, 4)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert_array_equal(
        read_image(tmp_path / "a.jpg", mode="L")[..., 0], random_image(6, 4)
    )


@pytest.mark.parametrize("name", ["x.png", "x.eps", "x.tga"])
def test_postscript_starts_no_other_program(tmp_path, monkeypatch, name):
    def started(*args, **kwargs):
        raise AssertionError("a program was started")

    path = tmp_path / name
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    )
    with Image.open(path) as opened:  # else the test shows nothing
        assert opened.format == "EPS"
    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(OSError, match=rf"{name}.*another format than BMP, GIF"):
        read_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path, message in (
        (tmp_path / "pipe.png", r"pipe\.png': it is a pipe"),
        (tmp_path / "folder.png", r"folder\.png': it is a folder; sorted\(Path"),
        (Path(os.devnull), f"{os.devnull}': .* a device"),
    ):
        with pytest.raises(OSError, match=message):
            read_image(path)
        with pytest.raises(OSError, match=message):
            LoadImages(memmap=tmp_path / "cache").transform([path])


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("side", [12, 40])  # Pillow warns of the first only
def test_too_large_picture_is_named(tmp_path, monkeypatch, side, action):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", None)  # it is not decoded
    message = rf"a\.png.*{side**2}\b.* pixels.*crop.*raise PIL\.Image\.MAX_IMAGE_PIXELS"
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(OSError, match=message):
            read_image(tmp_path / "a.png")
    monkeypatch.undo()
    assert read_image(tmp_path / "a.png").shape == (side, side, 3)


# 12 bits in files of 16


def save_16_bit(path, levels, colour=False):
    """Write a PNG file of 16 bits; Pillow writes no such colour."""
    levels = np.asarray(levels, np.uint16)
    if not colour:
        Image.fromarray(levels).save(path)
        return

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", checksum)
        )

    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", *levels.shape[::-1], 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("bits", [10, 12, 15])
def test_max_value_counts_as_white(tmp_path, bits, suffix):
    white = 2**bits - 1
    levels = np.random.default_rng(0).integers(0, white + 1, (5, 4), np.uint16)
    path = tmp_path / f"a.{suffix}"
    save_16_bit(path, levels)
    expected = np.floor(levels / white * 255 + 0.5)
    pixels = read_image(path, mode="L", max_value=white)
    assert_array_equal(pixels[..., 0], expected)
    loaded = LoadImages(mode="L", max_value=white).transform([path])
    assert_array_equal(loaded[0], pixels)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("memmap", [False, True])
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_twelve_bits_are_told_once(tmp_path, colour, memmap, n_jobs):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, largest in zip(paths, (900, 4095, 70), strict=True):
        save_16_bit(path, [[0, largest, 5], [3, 2, 1]], colour=colour)
    loader = LoadImages(n_jobs=n_jobs, memmap=tmp_path / "cache" if memmap else None)
    with pytest.warns(UserWarning, match=r"1\.png.* 4095.*max_value=4095") as record:
        loader.transform(paths)
    assert len(record) == 1
    save_16_bit(paths[0], [[0, 4096, 5], [3, 2, 1]], colour=colour)
    loader.transform(paths)


def test_depths_that_are_told_or_not(tmp_path):
    path = tmp_path / "a.png"
    save_16_bit(path, [[0, 4095]])
    with pytest.warns(UserWarning, match=r"a\.png.*max_value=4095"):
        read_image(path)
    read_image(path, max_value=65535)  # dark, and meant to be
    with pytest.warns(UserWarning, match=r"a\.png.* 4095, above max_value=1023"):
        pixels = read_image(path, max_value=1023)
    assert pixels.max() == 255
    save_16_bit(path, [[0, 0]])
    read_image(path)
    save_16_bit(path, [[0, 4095]], colour=True)
    with pytest.raises(OSError, match=r"a\.png.*max_value=4095 is for greys"):
        read_image(path, max_value=4095)


def test_max_value_is_checked(paths):
    for wrong in (0, 65536, 4095.0, "4095"):
        with pytest.raises(ValueError, match="max_value"):
            LoadImages(max_value=wrong).fit(paths)


# image_files


def names_of(files, folder):
    return [str(path.relative_to(folder)) for path in files]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_image_files_are_listed(tmp_path):
    touch(tmp_path, "b.png", "a.JFIF", "c.pgm", "._a.png", "deep/d.tga", "deep/e/f.jpe")
    touch(tmp_path, ".ipynb_checkpoints/g.png", "__MACOSX/h.png", "deep/.i/j.png")
    touch(
        tmp_path, "Thumbs.db", ".DS_Store", "desktop.ini", "deep/list.CSV", "README.md"
    )
    (tmp_path / "y.png").mkdir()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert names_of(image_files(tmp_path), tmp_path) == ["a.JFIF", "b.png", "c.pgm"]
    files = image_files(str(tmp_path), recursive=True)
    expected = ["a.JFIF", "b.png", "c.pgm", "deep/d.tga", "deep/e/f.jpe"]
    assert names_of(files, tmp_path) == [str(Path(name)) for name in expected]


def test_image_files_follow_links(tmp_path):
    touch(tmp_path, "elsewhere/a.png")
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / "link"
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert image_files(tmp_path / "here", recursive=True) == [link / "a.png"]


def test_image_files_tell_what_is_skipped(tmp_path):
    touch(tmp_path, "a.png", "b.heic", "c.heic", "deep/d.npy", "notes.txt")
    with pytest.warns(UserWarning, match=r"2 files in .*b\.heic'.*\.webp") as record:
        assert len(image_files(tmp_path)) == 1
    assert len(record) == 1
    with pytest.warns(UserWarning, match=r"3 files"):
        image_files(tmp_path, recursive=True)


def test_image_files_of_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_files(tmp_path / "nowhere")


# LoadImages


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_load_equals_pillow(paths, n_jobs):
    images = LoadImages(n_jobs=n_jobs).transform([str(path) for path in paths])
    assert images.dtype == np.uint8
    assert_array_equal(images, stacked(paths))


def test_load_takes_arrays_and_series(paths):
    pandas = pytest.importorskip("pandas")
    names = [str(path) for path in paths]
    expected = LoadImages().fit_transform(paths)
    for X in (np.array(names), np.array(names, object), pandas.Series(names)[::1]):
        assert_array_equal(LoadImages().fit_transform(X), expected)


def test_load_takes_a_column(paths):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": paths, "label": "good"}, index=range(7, 0, -1))
    expected = LoadImages().fit_transform(paths)
    for X in (frame[["path"]], frame[["path"]].astype(str), frame[["path"]].to_numpy()):
        assert_array_equal(LoadImages().fit(X).transform(X), expected)
    for method in (LoadImages().fit, LoadImages().transform):
        with pytest.raises(TypeError, match=r"2: 'path', 'label'\. Give .*X\['"):
            method(frame)


def test_load_resizes(paths):
    images = LoadImages(size=(4, 6), mode="L").transform(paths)
    assert images.shape == (7, 4, 6, 1)
    assert_array_equal(images[3], read_image(paths[3], (4, 6), "L"))


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_load_names_the_first_file_of_another_size(paths, n_jobs):
    Image.fromarray(random_image(5, 6, 3)).save(paths[2])
    Image.fromarray(random_image(2, 3, 3)).save(paths[4])
    with pytest.raises(ValueError, match=r"2\.png.*\(5, 6\).*\(9, 7\).*Give size="):
        LoadImages(n_jobs=n_jobs).transform(paths)


@pytest.mark.parametrize(
    "X",
    [
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((3, 4)),
        [1.0, 2.0],
        ["a.png", None],
        "a.png",
        None,
        3,
    ],
)
def test_load_refuses_what_are_no_paths(X):
    for method in ("fit", "transform"):
        with pytest.raises(TypeError, match="paths"):
            getattr(LoadImages(), method)(X)


@pytest.mark.parametrize("method", ["fit", "transform", "fit_transform"])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder.glob("*.png"), r"sorted\(Path\(folder\)\.glob"),
        (lambda folder: (path for path in folder.iterdir()), "generator.*list"),
        (lambda folder: set(folder.iterdir()), r"any order.*sorted\(X\)"),
        (str, r"not a folder.*sorted\(Path\(folder\)\.glob\(\"\*\.png\"\)\)"),
        (Path, r"not a folder.*sorted\(Path\(folder\)\.glob"),
    ],
)
def test_load_names_the_mend(paths, make, message, method):
    with pytest.raises(TypeError, match=message):
        getattr(LoadImages(), method)(make(paths[0].parent))


def test_load_refuses_a_list_of_folders(paths):
    folder = paths[0].parent
    with pytest.raises(
        OSError, match=rf"{re.escape(str(folder))}.*it is a folder; sorted"
    ):
        LoadImages().fit_transform([str(folder)])


def test_load_refuses_nothing():
    with pytest.raises(ValueError, match="0 sample"):
        LoadImages().transform([])


@pytest.mark.parametrize("memmap", [False, True])
def test_progress_is_shown_where_it_takes_a_while(
    paths, tmp_path, memmap, monkeypatch, capsys
):
    folder = tmp_path / "maps" if memmap else None
    LoadImages(verbose=1).transform(paths)
    assert capsys.readouterr().err == ""  # loaded in a moment
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)
    LoadImages().transform(paths)
    assert capsys.readouterr().err == ""
    LoadImages(verbose=1, memmap=folder).transform(paths)
    assert "load: 100%" in (shown := capsys.readouterr().err)
    assert "7/7" in shown
    if memmap:  # which is there already
        LoadImages(verbose=1, memmap=folder).transform(paths)
        assert capsys.readouterr().err == ""


def test_load_checks_parameters_without_fit(paths):
    with pytest.raises(ValueError, match="mode"):
        LoadImages(mode="CMYK").transform(paths)
    with pytest.raises(ValueError, match="size must be"):
        LoadImages(size=(3, 0)).fit(paths)


# LoadImages(memmap=...)


def test_memmap_equals_array_and_is_used_again(paths, tmp_path):
    folder = tmp_path / "new" / "cache"
    loader = LoadImages(memmap=folder)
    images = loader.transform(paths)
    assert isinstance(images, np.memmap) and not images.flags.writeable
    assert_array_equal(images, stacked(paths))

    (file,) = folder.iterdir()
    stamp = file.stat().st_mtime_ns, file.stat().st_ino
    assert_array_equal(clone(loader).transform(paths), images)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == stamp
    assert list(folder.iterdir()) == [file]
    assert file.stat().st_mode & 0o777 == paths[0].stat().st_mode & 0o777


def test_memmap_is_named_by_what_it_holds(paths, tmp_path, monkeypatch):
    folder = tmp_path / "cache"

    def n_files(paths, **params):
        LoadImages(memmap=folder, **params).transform(paths)
        return len(list(folder.iterdir()))

    assert n_files(paths) == 1
    monkeypatch.chdir(tmp_path)
    assert n_files([path.name for path in paths], n_jobs=2) == 1
    assert n_files(paths[::-1]) == 2
    assert n_files(paths, mode="L") == 3
    assert n_files(paths, size=5) == 4
    assert n_files(paths, size=(5, 5)) == 4
    assert n_files(paths, max_value=65535) == 4
    assert n_files(paths, max_value=4095) == 5
    os.utime(paths[0], ns=(0, 1))
    assert n_files(paths) == 6


DAMAGES = {
    "pixel": lambda content: content[:-99] + bytes([content[-99] ^ 4]) + content[-98:],
    "header": lambda content: content.replace(b"(7, 9, 7, 3)", b"(7, 9, 3, 7)"),
    "type": lambda content: content.replace(b"|u1", b"|i1"),
    "truncated": lambda content: content[:-200],
    "half a header": lambda content: content[:40],
    "longer": lambda content: content + b"0",
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_memmap_is_made_anew(paths, tmp_path, damage):
    loader = LoadImages(memmap=tmp_path / "cache")
    loader.transform(paths)
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.write_bytes(DAMAGES[damage](content))
    assert file.read_bytes() != content
    message = rf"memmap: '{re.escape(str(file))}' is damaged \(.*made anew"
    with pytest.warns(UserWarning, match=message) as record:
        images = loader.transform(paths)
    assert len(record) == 1
    assert_array_equal(images, stacked(paths))
    assert file.read_bytes() == content
    assert_array_equal(loader.transform(paths), images)


def test_memmap_of_no_folder_is_named(paths, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match=r"memmap='.*cache.*cannot be written"):
        LoadImages(memmap=tmp_path / "cache").transform(paths)


def test_failed_load_leaves_nothing(paths, tmp_path):
    paths[-1].write_bytes(b"no image")
    with pytest.raises(OSError, match=r"6\.png"):
        LoadImages(memmap=tmp_path / "cache").transform(paths)
    assert list((tmp_path / "cache").iterdir()) == []


FULL = """
import resource, sys
from skanomaly.images import LoadImages

folder, *paths = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
try:
    LoadImages(memmap=folder).transform(paths)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_the_old_file_and_no_other(paths, tmp_path):
    folder = tmp_path / "cache"
    old = LoadImages(memmap=folder).transform(paths[:2])
    before = {file: file.read_bytes() for file in folder.iterdir()}
    command = [sys.executable, "-c", FULL, str(folder), *map(str, paths)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert f"{7 * 9 * 7 * 3} bytes of images, cannot be written" in child.stdout
    assert f"memmap: '{folder}" in child.stdout
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert_array_equal(old, stacked(paths[:2]))


SLOW = """
import signal
import sys
from skanomaly.images import LoadImages

# a process that was started in the background ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, *paths = sys.argv[1:]
print("ready", flush=True)
LoadImages(memmap=folder).transform(paths * 5_000)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_interrupt_leaves_nothing(paths, tmp_path):
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", SLOW, str(folder), *map(str, paths)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as child:
        child.stdout.readline()
        while child.poll() is None and not (folder.exists() and list(folder.iterdir())):
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in child.communicate()[1]
    assert list(folder.iterdir()) == []


def test_concurrent_calls_may_write_the_same_file(paths, tmp_path):
    loader = LoadImages(memmap=tmp_path / "cache")
    with joblib.Parallel(n_jobs=4, prefer="threads") as parallel:
        arrays = parallel(joblib.delayed(loader.transform)(paths) for _ in range(8))
    for images in arrays:
        assert_array_equal(images, stacked(paths))
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ResizeImages


@pytest.mark.parametrize("size", [(24, 31), (120, 20), (64, 48), (7, 5), 33])
def test_resize_equals_pillow(size):
    X = random_image(2, 64, 48, 3)
    resized = ResizeImages(size=size).fit_transform(X)
    height, width = size if isinstance(size, tuple) else (size, size)
    for image, ours in zip(X, resized, strict=True):
        pillow = Image.fromarray(image).resize((width, height), Image.BILINEAR)
        assert ours.dtype == np.uint8
        assert_allclose(ours, np.asarray(pillow).astype(int), atol=1)


def test_resize_floats_equals_pillow():
    X = np.random.default_rng(0).random((2, 40, 30))
    resized = ResizeImages(size=(13, 17)).fit_transform(X)
    assert resized.shape == (2, 13, 17, 1) and resized.dtype == np.float32
    for image, ours in zip(X.astype(np.float32), resized, strict=True):
        pillow = Image.fromarray(image).resize((17, 13), Image.BILINEAR)
        assert_allclose(ours[:, :, 0], np.asarray(pillow), atol=1e-6)


def test_resize_in_batches(monkeypatch):
    X = random_image(7, 12, 10, 3)
    expected = ResizeImages(size=6).fit_transform(X)
    monkeypatch.setattr("skanomaly.images._VALUES_PER_BATCH", 2 * 12 * 10 * 3)
    assert_array_equal(ResizeImages(size=6).fit_transform(X), expected)


def test_resized_maps_fit_the_images():
    X = random_image(3, 60, 40, 3)
    resize = ResizeImages(size=(30, 20)).fit(X)
    maps = np.random.default_rng(0).random((3, 30, 20))
    back = resize.inverse_transform_maps(maps, X)
    assert back.shape == (3, 60, 40) and back.dtype == np.float32
    assert_allclose(back[:, 0, 0], maps[:, 0, 0], rtol=1e-6)
    # two output pixels lie a quarter of a pixel off the centre of an input pixel
    expected = 0.75 * maps[:, 1, 0] + 0.25 * maps[:, 0, 0]
    assert_allclose(back[:, 2, 0], expected, rtol=1e-5)


def test_maps_of_another_shape_are_refused():
    X = random_image(3, 60, 40, 3)
    for transformer in (ResizeImages(size=20), CenterCropImages(size=20)):
        transformer.fit(X)
        for shape in [(3, 21, 20), (2, 20, 20), (3, 20, 20, 1)]:
            with pytest.raises(ValueError, match="maps must have the shape"):
                transformer.inverse_transform_maps(np.zeros(shape), X)


# CenterCropImages


@pytest.mark.parametrize("size", [(4, 6), 5, (100, 3), (9, 7), 100])
def test_crop_equals_pillow(size):
    X = random_image(2, 9, 7, 3)
    crop = CenterCropImages(size=size).fit(X)
    height, width = size if isinstance(size, tuple) else (size, size)
    height, width = min(height, 9), min(width, 7)
    top, left = (9 - height) // 2, (7 - width) // 2
    cropped = crop.transform(X)
    for image, ours in zip(X, cropped, strict=True):
        box = (left, top, left + width, top + height)
        assert_array_equal(ours, np.asarray(Image.fromarray(image).crop(box)))

    maps = np.random.default_rng(0).random((2, height, width)).astype(np.float32) + 3
    back = crop.inverse_transform_maps(maps, X)
    assert back.shape == (2, 9, 7) and back.dtype == np.float32
    assert_array_equal(back[:, top : top + height, left : left + width], maps)
    n_outside = 9 * 7 - height * width
    assert np.count_nonzero(back == 0) == 2 * n_outside
    # nothing beyond the border exceeds what is inside, and no mask marks it
    for one, map_ in zip(crop.inverse_transform_maps(-maps, X), -maps, strict=True):
        assert np.count_nonzero(one == map_.min()) == n_outside + 1


# All of them


def left_half(images):
    """Return masks of images, True in the left half."""
    height, width = images.shape[1:3]
    return np.tile(np.arange(width) < width // 2, (len(images), height, 1))


TRANSFORMERS = [
    ResizeImages(size=(5, 4)),
    CenterCropImages(size=(5, 4)),
    RegionOfInterest(left_half),
    ToDevice(device="cpu"),
]


@pytest.mark.parametrize("transformer", TRANSFORMERS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.float32, np.int64])
def test_dtypes_and_tensors(transformer, dtype):
    X = (
        random_image(3, 9, 7, 3) / (1 if dtype in (np.uint8, np.int64) else 255)
    ).astype(dtype)
    kept = np.uint8 if dtype == np.uint8 else np.float32
    from_array = np.asarray(clone(transformer).fit_transform(X))
    from_tensor = clone(transformer).fit_transform(torch.from_numpy(X))
    assert from_array.dtype == kept
    assert isinstance(from_tensor, torch.Tensor)
    assert_array_equal(from_tensor.numpy(), from_array)
    assert from_tensor.numpy().dtype == kept


@pytest.mark.parametrize("transformer", TRANSFORMERS, ids=lambda t: type(t).__name__)
def test_memory_map_and_rows(transformer, tmp_path):
    X = random_image(3, 8, 8)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    expected = np.asarray(clone(transformer).fit_transform(X))
    assert_array_equal(clone(transformer).fit_transform(mapped), expected)
    assert_array_equal(clone(transformer).fit_transform(X.reshape(3, 64)), expected)


@pytest.mark.parametrize("transformer", TRANSFORMERS, ids=lambda t: type(t).__name__)
def test_shape_is_remembered(transformer):
    transformer = clone(transformer).fit(random_image(3, 9, 7, 3))
    assert transformer.image_shape_ == (9, 7, 3)
    assert transformer.n_features_in_ == 9 * 7 * 3
    with pytest.raises(ValueError, match=r"\(9, 8, 3\).*\(9, 7, 3\)"):
        transformer.transform(random_image(3, 9, 8, 3))
    with pytest.raises(ValueError, match=r"LoadImages\(\)"):
        transformer.transform(["a.png"])


def test_rows_are_read_as_image_shape():
    X = random_image(3, 6, 4, 2)
    for transformer in (
        ResizeImages(size=3, image_shape=(6, 4, 2)),
        CenterCropImages(size=3, image_shape=(6, 4, 2)),
    ):
        expected = transformer.fit_transform(X)
        assert_array_equal(transformer.fit_transform(X.reshape(3, -1)), expected)


@pytest.mark.parametrize("size", [0, -3, (3,), (3, 4, 5), (3, 0), (3.0, 4), 2.5, "3"])
def test_impossible_sizes_are_refused(size):
    for transformer in (ResizeImages(size=size), CenterCropImages(size=size)):
        with pytest.raises(ValueError, match="size"):
            transformer.fit(random_image(2, 9, 7, 3))


def test_to_device_copies():
    X = random_image(3, 4, 4, 3)
    images = ToDevice(device="cpu").fit_transform(X)
    X[:] = 0
    assert images.sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_stay_on_the_gpu():
    X = random_image(3, 9, 7, 3)
    images = ToDevice().fit_transform(X)
    assert images.device.type == "cuda"
    resized = ResizeImages(size=4).fit_transform(images)
    assert resized.device.type == "cuda"
    assert_allclose(
        resized.cpu().int(), ResizeImages(size=4).fit_transform(X).astype(int), atol=1
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"photometric": "rgb", "planarconfig": "separate"}, "separate planes"),
        ({"photometric": "miniswhite"}, "0 is white"),
    ],
)
def test_tiffs_that_pillow_misreads_are_refused(settings, message, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    shape = (3, 8, 9) if message == "separate planes" else (8, 9)
    for dtype, is_read in ((np.uint16, False), (np.uint8, True)):
        path = tmp_path / f"{np.dtype(dtype).name}.tif"
        tifffile.imwrite(path, np.zeros(shape, dtype), **settings)
        if is_read:
            assert LoadImages().transform([path]).shape == (1, 8, 9, 3)
            continue
        with pytest.raises(OSError, match=rf"{path.name}.*{message}"):
            LoadImages().transform([path])
