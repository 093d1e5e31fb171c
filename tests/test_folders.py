"""Folders of one's own, and the layouts of VisA, MVTec LOCO and MVTec AD 2."""

import ast
import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from skanomaly import PatchDetector, make_pipeline
from skanomaly.datasets import (
    labels_from,
    load_folder,
    load_mvtec_ad2,
    load_mvtec_loco,
    load_visa,
)
from skanomaly.images import LoadImages
from skanomaly.model_selection import OneClassKFold


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def image(seed, shape=(12, 10, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def mask(pixel, value=255, shape=(12, 10)):
    """Return a mask in which one pixel is anomalous."""
    pixels = np.zeros(shape, np.uint8)
    pixels.flat[pixel] = value
    return pixels


def marked(masks):
    """Return the anomalous pixels of each mask."""
    return [np.flatnonzero(one).tolist() for one in masks]


@pytest.fixture
def parts(tmp_path):
    """Return a folder: three good images, a hole and two cracks, and their masks."""
    names = ("fine/b", "fine/a", "fine/night/c", "bad/hole/0", "bad/crack/0")
    for seed, name in enumerate((*names, "bad/crack/1")):
        save(tmp_path / f"{name}.png", image(seed))
    save(tmp_path / "masks/hole/0_mask.png", mask(1))
    save(tmp_path / "masks/crack/0_mask.png", mask(2))
    save(tmp_path / "masks/crack/1.png", mask(3))
    return tmp_path


def below(root, files):
    return [Path(file).relative_to(root).as_posix() for file in files]


GOOD = ["fine/a.png", "fine/b.png", "fine/night/c.png"]
BAD = ["bad/crack/0.png", "bad/crack/1.png", "bad/hole/0.png"]


def test_folders(parts):
    data = load_folder(parts / "fine", str(parts / "bad"), parts / "masks")
    assert below(parts, data.files) == GOOD + BAD
    assert data.y.tolist() == [1, 1, 1, -1, -1, -1]
    assert data.classes.tolist() == ["fine", "fine", "night", "crack", "crack", "hole"]
    assert_array_equal(data.X, [np.array(Image.open(file)) for file in data.files])
    assert data.masks.dtype == bool
    assert data.masks.shape == (6, 12, 10)
    assert marked(data.masks) == [[], [], [], [2], [3], [1]]
    assert data.report.splitlines() == [
        "good: 3 images ('fine' 2, 'night' 1)",
        "bad: 3 images ('crack' 2, 'hole' 1)",
        "masks: 3 files, paired by name",
        "skipped: nothing",
    ]


def test_good_alone(parts):
    data = load_folder(parts / "fine", size=(6, 5), mode="L", n_jobs=2)
    assert data.X.shape == (3, 6, 5, 1)
    assert data.y.tolist() == [1, 1, 1]
    assert data.masks is None


def test_masks_are_resized_with_the_images(parts):
    save(parts / "masks/hole/0_mask.png", np.kron(mask(0, shape=(2, 2)), mask_of(6, 5)))
    data = load_folder(
        parts / "fine", parts / "bad/hole", parts / "masks/hole", size=(4, 2)
    )
    assert data.X.shape == (4, 4, 2, 3)
    assert marked(data.masks) == [[], [], [], [0, 2]]


def mask_of(height, width):
    return np.ones((height, width), np.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda root, names: [root / name for name in names],
        lambda root, names: (str(root / name) for name in names),
        lambda root, names: np.array([str(root / name) for name in names]),
        lambda root, names: np.array([[root / name] for name in names], object),
        lambda root, names: frame_of(root, names)["path"],
        lambda root, names: frame_of(root, names)[["path"]],
        lambda root, names: frame_of(root, names)["path"].astype("string"),
    ],
    ids=["list", "generator", "array", "column of an array", "Series", "frame", "text"],
)
def test_lists_and_columns_keep_their_order(parts, make):
    names = BAD[::-1]
    data = load_folder(make(parts, GOOD[::-1]), make(parts, names), parts / "masks")
    assert below(parts, data.files) == GOOD[::-1] + names
    assert data.classes.tolist() == ["night", "fine", "fine", "hole", "crack", "crack"]
    assert marked(data.masks) == [[], [], [], [1], [3], [2]]


def frame_of(root, names):
    paths = [str(root / name) for name in names]
    return pd.DataFrame({"path": paths, "label": "x"}, index=range(len(paths), 0, -1))


def test_a_frame_with_labels_and_masks(parts):
    """Columns of one frame, the labels being strings."""
    frame = pd.DataFrame({"path": [str(parts / name) for name in GOOD + BAD]})
    frame["label"] = ["ok", "ok", "ok", "crack", "crack", "hole"]
    frame["mask"] = [None] * 3 + [
        str(parts / f"masks/{name}.png")
        for name in ("crack/0_mask", "crack/1", "hole/0_mask")
    ]
    fine = frame["label"] == "ok"
    data = load_folder(
        frame[fine]["path"], frame[~fine][["path"]], frame[~fine]["mask"]
    )
    assert marked(data.masks) == [[], [], [], [2], [3], [1]]
    assert "masks: 3 files, paired in order" in data.report
    by_label = dict(iter(frame[~fine].groupby("label")))
    data = load_folder(
        {"ok": frame[fine]["path"]},
        {label: rows["path"] for label, rows in by_label.items()},
        {label: rows["mask"] for label, rows in reversed(by_label.items())},
    )
    assert "in order" in data.report
    assert data.classes.tolist() == frame["label"].tolist()
    assert marked(data.masks) == [[], [], [], [2], [3], [1]]
    assert_array_equal(data.y, labels_from(frame["label"], normal="ok"))


def test_several_folders_and_globs(parts):
    save(parts / "line2/fine/a.png", image(8))
    save(parts / "line2/fine/a.heic.png", image(9))
    for good in (
        [parts / "fine", parts / "line2/fine"],
        [f"{parts}/**/fine"],
        f"{parts}/**/fine/**",
        [f"{parts}/fine", f"{parts}/line2/fine/a*.png"],
    ):
        data = load_folder(good)
        assert sorted(below(parts, data.files)) == [
            *GOOD,
            "line2/fine/a.heic.png",
            "line2/fine/a.png",
        ]


def test_one_image(parts):
    data = load_folder(parts / "fine/a.png", size=8)
    assert data.X.shape == (1, 8, 8, 3)
    assert data.classes.tolist() == ["fine"]
    bad, its_mask = parts / "bad/hole/0.png", parts / "masks/crack/1.png"
    data = load_folder(parts / "fine/a.png", bad, its_mask)
    assert marked(data.masks) == [[], [3]]


def test_names_of_classes_do_not_hang_on_the_way_a_path_is_written(parts, monkeypatch):
    monkeypatch.chdir(parts / "fine")
    for good in (".", "a.png", "../fine", "night/.."):
        assert load_folder(good).classes[0] == "fine"


def test_grey_of_sixteen_bits_and_unequal_sizes(tmp_path):
    save(tmp_path / "good/a.png", np.full((20, 8), 4095, np.uint16))
    save(tmp_path / "good/b.tif", np.full((9, 30), 2048, np.uint16))
    save(tmp_path / "good/c.jpg", image(0, (7, 7, 3)))
    data = load_folder(tmp_path / "good", size=8, mode="L", max_value=4095)
    assert data.X.shape == (3, 8, 8, 1)
    assert np.unique(data.X[0]) == [255]
    assert np.unique(data.X[1]) == [128]
    with pytest.raises(ValueError, match=r"b\.tif.*\(9, 30\).*a\.png.*Give size="):
        load_folder(tmp_path / "good", mode="L", max_value=4095)


def test_paths_for_a_pipeline(parts):
    sources = parts / "fine", parts / "bad", parts / "masks"
    data = load_folder(*sources, size=32, as_paths=True)
    assert below(parts, data.X) == GOOD + BAD
    assert data.masks.shape == (6, 32, 32)
    pipeline = make_pipeline(
        LoadImages(size=32), PatchDetector(backbone="resnet18", weights=None)
    )
    train, test = next(OneClassKFold(3).split(data.X, data.y))
    maps = pipeline.fit(data.X[train]).localize(data.X[test])
    assert maps.shape == data.masks[test].shape
    arrays = load_folder(*sources, size=32)
    assert_array_equal(LoadImages(size=32).transform(data.X), arrays.X)
    assert_array_equal(data.masks, arrays.masks)


def test_masks_of_unequal_images_want_a_size(parts):
    save(parts / "bad/hole/0.png", image(0, (5, 6, 3)))
    save(parts / "masks/hole/0_mask.png", mask(1, shape=(5, 6)))
    sources = parts / "fine", parts / "bad", parts / "masks"
    with pytest.raises(ValueError, match=r"hole.0\.png.*\(5, 6\).*Give size="):
        load_folder(*sources, as_paths=True)
    data = load_folder(*sources, size=(24, 20), as_paths=True)
    assert data.masks.shape == (6, 24, 20)


# masks


def test_masks_beside_the_images_are_no_images(parts):
    for name in ("crack/0", "crack/1", "hole/0"):
        save(parts / f"bad/{name}_mask.png", mask(7))
    data = load_folder(parts / "fine", parts / "bad", f"{parts}/bad/*/*_mask.png")
    assert below(parts, data.files[3:]) == BAD
    assert marked(data.masks[3:]) == [[7]] * 3
    assert data.report.count("_mask.png: a mask") == 3
    with pytest.warns(UserWarning, match=r"3 images of bad called like masks") as told:
        data = load_folder(parts / "fine", parts / "bad")
    assert len(data.X) == 9
    assert told[0].filename == __file__
    _, given = str(told[0].message).removesuffix(".").split("masks=")
    data = load_folder(parts / "fine", parts / "bad", ast.literal_eval(given))
    assert marked(data.masks[3:]) == [[7]] * 3


def test_masks_of_one_name_go_by_their_folders(parts):
    """In one folder for all, nothing tells which of two images a mask belongs to."""
    save(parts / "flat/0_mask.png", mask(1))
    save(parts / "flat/1_mask.png", mask(1))
    with pytest.raises(
        ValueError, match=r"1 mask may belong to .*flat.0_mask\.png.*crack.0.*hole.0"
    ):
        load_folder(parts / "fine", parts / "bad", parts / "flat")
    (parts / "masks/hole/0_mask.png").rename(parts / "masks/crack/0_mask_2.png")
    with pytest.raises(ValueError, match=r"1 image without a mask: .*hole.0\.p"):
        load_folder(parts / "fine", parts / "bad", parts / "masks")


def test_masks_of_another_folder_are_not_taken(parts):
    save(parts / "bad/hole/5.png", image(0))
    save(parts / "masks/crack/5.png", mask(5))
    with pytest.raises(ValueError, match=r"t a mask: .*hole.5\.png'; 1 mask .*crack.5"):
        load_folder(parts / "fine", parts / "bad", parts / "masks")


def test_masks_go_by_all_their_folders(tmp_path):
    save(tmp_path / "fine/0.png", image(0))
    for pixel, kind in enumerate(("crack", "hole"), start=1):
        save(tmp_path / f"bad/{kind}/left/0.png", image(pixel))
        save(tmp_path / f"masks/{kind}/left/0.png", mask(pixel))
    data = load_folder(*(tmp_path / name for name in ("fine", "bad", "masks")))
    assert data.classes.tolist() == ["fine", "crack", "hole"]
    assert marked(data.masks) == [[], [1], [2]]


def test_masks_belong_to_bad_images_before_good_ones(parts):
    """Most sets number good and anomalous images alike."""
    save(parts / "fine/0.png", image(0))
    save(parts / "truth/0.png", mask(4))
    save(parts / "truth/1.png", mask(5))
    data = load_folder(parts / "fine", parts / "bad/crack", parts / "truth")
    assert marked(data.masks) == [[], [], [], [], [4], [5]]


def test_masks_of_several_lines_go_by_where_they_lie(tmp_path):
    for line in (1, 2):
        save(tmp_path / f"line{line}/fine/0.png", image(line))
        save(tmp_path / f"line{line}/bad/0.png", image(line + 2))
        save(tmp_path / f"line{line}/truth/0.png", mask(line))
    sources = (f"{tmp_path}/line*/{name}" for name in ("fine", "bad", "truth"))
    assert marked(load_folder(*sources).masks) == [[], [], [1], [2]]


def test_masks_in_folders_named_like_images(parts):
    for name, pixel in (("0/0", 1), ("0/1", 2), ("1/0", 3)):
        save(parts / f"many/{name}.png", mask(pixel))
    data = load_folder(parts / "fine", parts / "bad/crack", parts / "many")
    assert marked(data.masks[3:]) == [[1, 2], [3]]


def test_masks_without_image_and_images_without_mask_are_named(parts):
    (parts / "masks/crack/1.png").rename(parts / "masks/crack/2_mask.png")
    with pytest.raises(ValueError) as error:
        load_folder(parts / "fine", parts / "bad", parts / "masks")
    assert re.search(r"1 image without a mask: '\S*crack.1\.png'", str(error.value))
    assert re.search(r"1 mask without an image: '\S*2_mask\.png'", str(error.value))


def test_masks_of_good_images_must_be_empty(parts):
    """Sets that have a mask for every image have empty ones of the good."""
    for name in ("a", "b", "night/c"):
        save(parts / f"masks/fine/{name}.png", mask(0, value=0))
    sources = parts / "fine", parts / "bad", parts / "masks"
    assert marked(load_folder(*sources).masks) == [[], [], [], [2], [3], [1]]
    save(parts / "masks/fine/b.png", mask(0))
    with pytest.raises(
        ValueError, match=r"masks.fine.b\.png.*fine.b\.png' is not empty"
    ):
        load_folder(*sources)


def test_masks_in_order(parts):
    bad = [parts / name for name in BAD[:2]]
    masks = [
        save(parts / f"{name}.png", mask(pixel)) for name, pixel in (("x", 3), ("a", 1))
    ]
    assert marked(load_folder(parts / "fine", bad, masks).masks[3:]) == [[3], [1]]
    swapped = [parts / "masks/crack/1.png", parts / "masks/crack/0_mask.png"]
    with pytest.warns(UserWarning, match=r"1\.png' to .*0\.png', .*0_mask\.png' bet"):
        data = load_folder(parts / "fine", bad, swapped)
    assert marked(data.masks[3:]) == [[3], [2]]


def test_masks_are_checked_before_an_image_is_decoded(parts):
    whole = (parts / "fine/a.png").read_bytes()
    (parts / "fine/a.png").write_bytes(whole[:100])
    save(parts / "masks/hole/0_mask.png", mask(0, shape=(10, 12)))
    with pytest.raises(ValueError, match=r"0_mask\.png' has .*\(10, 12\).*\(12, 10\)"):
        load_folder(parts / "fine", parts / "bad", parts / "masks")


def test_masks_of_turned_photographs(parts):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(image(0)).save(parts / "bad/hole/0.png", exif=exif)
    save(parts / "masks/hole/0_mask.png", mask(9, shape=(10, 12)))
    sources = parts / "fine/a.png", parts / "bad/hole", parts / "masks/hole"
    data = load_folder(*sources, size=(10, 12))
    assert marked(data.masks) == [[], [9]]


def test_empty_masks_are_named(parts):
    save(parts / "masks/hole/0_mask.png", mask(0, value=0))
    with pytest.warns(UserWarning, match=r"1 of 3.*hole.0_mask\.png.*empty") as told:
        load_folder(parts / "fine", parts / "bad", parts / "masks")
    assert told[0].filename == __file__


def test_progress_of_images_and_masks(parts, monkeypatch, capsys):
    sources = parts / "fine", parts / "bad", parts / "masks"
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)
    load_folder(*sources)
    assert capsys.readouterr().err == ""
    load_folder(*sources, verbose=1)
    shown = capsys.readouterr().err
    assert "masks: 100%" in shown and "3/3" in shown
    assert "load: 100%" in shown and "6/6" in shown


# what is skipped, and what is refused


def test_the_report_names_what_is_skipped(parts):
    for name in ("Thumbs.db", "notes.txt", ".hidden.png", ".thumbs/a.png", "a.heic"):
        (parts / "fine" / name).parent.mkdir(exist_ok=True)
        (parts / "fine" / name).touch()
    with pytest.warns(UserWarning, match=r"2 files or folders skipped.* all") as told:
        data = load_folder([parts / "fine", f"{parts}/fine/a*"])
    assert len(told) == 1
    assert told[0].filename == __file__
    assert below(parts, data.files) == GOOD
    skipped = dict(line[2:].split(": ") for line in data.report.splitlines()[2:])
    assert {Path(path).name: why for path, why in skipped.items()} == {
        ".hidden.png": "hidden",
        ".thumbs": "hidden",
        "Thumbs.db": "no image, but a companion of images",
        "a.heic": "not a type of image that is read",
        "a.png": "found before",
        "notes.txt": "no image, but a companion of images",
    }


@pytest.mark.parametrize("name", ["good", "bad", "masks"])
def test_arguments_are_named_in_errors(parts, name):
    sources = {key: parts / key for key in ("bad", "masks")} | {"good": parts / "fine"}
    (parts / "empty").mkdir()
    frame = frame_of(parts, BAD)
    for value, kind, message in [
        (parts / "nowhere", FileNotFoundError, rf"{name}='.*nowhere' is no file"),
        (f"{parts}/*.gif", FileNotFoundError, rf"{name}='.*gif' .*matches nothing"),
        ("", FileNotFoundError, f"{name}='' is no file, no folder"),
        (
            parts / "empty",
            FileNotFoundError,
            rf"{name} .*empty': a folder w.*Wanted are",
        ),
        ([], FileNotFoundError, f"{name} holds no image"),
        (frame, TypeError, rf"{name} .*frame of 2: 'path', 'label'.*{name}\['path'\]"),
        ([parts / "fine/a.png", None], TypeError, f"{name} .*element 1 .*NoneType"),
        (np.zeros((2, 8, 8, 3)), TypeError, rf"{name} .*\(2, 8, 8, 3\)"),
        ({"a", "b"}, TypeError, f"{name} is a set"),
        (3, TypeError, f"{name} is a int.* Wanted"),
    ]:
        with pytest.raises(kind, match=message):
            load_folder(**{**sources, name: value})


def test_contradictions_are_refused(parts):
    with pytest.raises(ValueError, match=r"1 image in good and in bad, such as .*a\.p"):
        load_folder(parts / "fine", [parts / "bad", parts / "fine/../fine/a.png"])
    with pytest.raises(ValueError, match=r"masks belong to .*bad is None"):
        load_folder(parts / "fine", masks=parts / "masks")
    two, one = [parts / name for name in BAD[:2]], [parts / BAD[2]]
    masks = [parts / f"{number}.png" for number in (7, 8, 9)]
    for number, file in enumerate(masks):
        save(file, mask(number))
    with pytest.raises(ValueError, match=r"3 masks without an image"):
        load_folder(
            parts / "fine", {"a": two, "b": one}, {"a": masks[:1], "b": masks[1:]}
        )
    with pytest.raises(ValueError, match=r"keys \['rust'\], so bad must"):
        load_folder(parts / "fine", {"a": parts / "bad"}, {"rust": parts / "masks"})
    for parameters in ({"size": 0}, {"mode": "RGBA"}, {"max_value": 0}):
        with pytest.raises(ValueError, match=next(iter(parameters))):
            load_folder(parts / "fine", as_paths=True, **parameters)


def test_folders_of_good_and_bad_images_are_not_mixed_up(parts):
    (parts / "fine").rename(parts / "good")
    with pytest.raises(ValueError, match=r"good='.*good.a\.png', but .*bad.crack"):
        load_folder(parts)
    with pytest.raises(ValueError, match=r"bad='.*folder for normal ones.*good.a\.png"):
        load_folder(parts / "good", parts)
    assert len(load_folder(parts / "good").X) == 3


def test_a_damaged_file_is_named(parts):
    (parts / "fine/a.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"fine.a\.png"):
        load_folder(parts / "fine")


# MVTec LOCO AD


@pytest.fixture
def loco(tmp_path):
    folder = tmp_path / "pushpins"
    for seed, name in enumerate(
        (
            "train/good/000",
            "train/good/001",
            "validation/good/000",
            "test/good/000",
            "test/logical_anomalies/000",
            "test/logical_anomalies/001",
            "test/structural_anomalies/000",
        )
    ):
        save(folder / f"{name}.png", image(seed))
    truth = folder / "ground_truth"
    save(truth / "logical_anomalies/000/000.png", mask(1, value=255))
    save(truth / "logical_anomalies/000/001.png", mask(2, value=254))
    save(truth / "logical_anomalies/001/000.png", mask([3, 4, 5], value=[1, 100, 255]))
    save(truth / "structural_anomalies/000/000.png", mask(6, value=3))
    (folder / "defects_config.json").write_text("[]")
    return tmp_path


def test_loco(loco):
    data = load_mvtec_loco(loco, "pushpins")
    assert below(loco / "pushpins", data.paths_validation) == [
        "validation/good/000.png"
    ]
    assert data.X_train.shape == (2, 12, 10, 3)
    assert_array_equal(data.X_validation[0], image(2))
    assert_array_equal(data.X_test, [image(seed) for seed in (3, 4, 5, 6)])
    assert data.y_test.tolist() == [1, -1, -1, -1]
    assert data.defect_test.tolist() == [
        "good",
        "logical_anomalies",
        "logical_anomalies",
        "structural_anomalies",
    ]
    assert marked(data.masks_test) == [[], [1, 2], [3, 4, 5], [6]]


def test_loco_names_what_is_missing(loco):
    mask_file = loco / "pushpins/ground_truth/logical_anomalies/001/000.png"
    mask_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"logical_anomalies.001\.png.*no mask"):
        load_mvtec_loco(loco, "pushpins")
    (loco / "pushpins/validation").rename(loco / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"validation'\. Wanted are .*validat"):
        load_mvtec_loco(loco, "pushpins")


# MVTec AD 2


@pytest.fixture
def ad2(tmp_path):
    for seed, name in enumerate(
        (
            "train/good/000_regular",
            "validation/good/000_regular",
            "test_public/good/000_regular",
            "test_public/bad/000_regular",
            "test_public/bad/000_overexposed",
            "test_private/000_regular",
            "test_private_mixed/000_mixed",
        )
    ):
        save(tmp_path / f"can/{name}.png", image(seed))
    for pixel, name in enumerate(("regular", "overexposed"), start=1):
        file = f"can/test_public/ground_truth/bad/000_{name}_mask.png"
        save(tmp_path / file, mask(pixel))
    return tmp_path


def test_ad2(ad2):
    data = load_mvtec_ad2(ad2, "can", size=(12, 10))
    assert_array_equal(data.X_train, [image(0)])
    assert_array_equal(data.X_validation, [image(1)])
    assert_array_equal(data.X_test, [image(seed) for seed in (4, 3, 2)])
    assert data.defect_test.tolist() == ["bad", "bad", "good"]
    assert data.y_test.tolist() == [-1, -1, 1]
    assert marked(data.masks_test) == [[2], [1], []]
    private = [*data.paths_private, *data.paths_private_mixed]
    assert_array_equal(LoadImages().transform(private), [image(5), image(6)])


def test_ad2_without_private_images(ad2):
    (ad2 / "can/test_private_mixed").rename(ad2 / "elsewhere")
    data = load_mvtec_ad2(ad2, "can")
    assert len(data.paths_private) == 1
    assert data.paths_private_mixed.tolist() == []


# VisA


@pytest.fixture
def visa(tmp_path):
    rows = [("object", "split", "label", "image", "mask")]
    for category in ("candle", "pcb1"):
        folder = f"{category}/Data"
        for number, part in enumerate(("test", "train", "train")):
            name = f"{folder}/Images/Normal/{number:04}.JPG"
            save(tmp_path / name, image(number))
            rows.append((category, part, "normal", name, ""))
        for number in (1, 0):
            name = f"{folder}/Images/Anomaly/{number:03}.JPG"
            its_mask = f"{folder}/Masks/Anomaly/{number:03}.png"
            save(tmp_path / name, image(5 + number))
            values = mask([number, 50, 51, 52], value=[1, 2, 3, 200])
            save(tmp_path / its_mask, values)
            rows.append((category, "test", "anomaly", name, its_mask))
    write(tmp_path / "split_csv/1cls.csv", rows)
    kinds = [
        ("image", "label", "mask"),
        ("candle/Data/Images/Normal/0000.JPG", "normal", ""),
        ("candle/Data/Images/Anomaly/001.JPG", "damage,extra wax", ""),
    ]
    write(tmp_path / "candle/image_anno.csv", kinds)
    return tmp_path


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_visa(visa):
    data = load_visa(visa, "candle", size=(12, 10))
    folder = visa / "candle/Data/Images"
    assert below(folder, data.paths_train) == ["Normal/0001.JPG", "Normal/0002.JPG"]
    assert below(folder, data.paths_test) == [
        "Anomaly/000.JPG",
        "Anomaly/001.JPG",
        "Normal/0000.JPG",
    ]
    assert data.X_train.shape == (2, 12, 10, 3)
    assert data.y_test.tolist() == [-1, -1, 1]
    assert data.defect_test.tolist() == ["anomaly", "damage,extra wax", "normal"]
    assert marked(data.masks_test) == [[0, 50, 51, 52], [1, 50, 51, 52], []]
    assert_array_equal(data.X_test, LoadImages().transform(data.paths_test))
    assert load_visa(visa, "pcb1").defect_test.tolist() == ["anomaly"] * 2 + ["normal"]


def test_visa_names_what_is_missing(visa):
    with pytest.raises(ValueError, match=r"'pcb2' is not in .*lists 'candle', 'pcb1'"):
        load_visa(visa, "pcb2")
    save(visa / "candle/Data/Images/Normal/0003.JPG", image(0))
    with pytest.warns(UserWarning, match=r"1 files .* not list .*0003\.JPG") as told:
        load_visa(visa, "candle")
    assert told[0].filename == __file__
    (visa / "candle/Data/Masks/Anomaly/001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files .*Masks.Anomaly.001\.png"):
        load_visa(visa, "candle")
    write(visa / "split_csv/1cls.csv", [("image", "mask"), ("a", "b")])
    with pytest.raises(ValueError, match="columns object, split, label, image, mask"):
        load_visa(visa, "candle")
    (visa / "split_csv/1cls.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"1cls\.csv.*spot-diff.*load_folder"):
        load_visa(visa, "candle")


# Real images


def test_real_folders_equal_the_layout(shared_data):
    from skanomaly.datasets import load_mvtec

    root = shared_data / "mvtec_ad" / "toothbrush"
    expected = load_mvtec(root.parent, "toothbrush", size=32)
    data = load_folder(
        root / "test/good", root / "test/defective", root / "ground_truth", size=32
    )
    order = np.argsort(expected.y_test == -1, kind="stable")
    assert_array_equal(data.X, expected.X_test[order])
    assert_array_equal(data.masks, expected.masks_test[order])
    assert_array_equal(data.y, expected.y_test[order])
    assert_array_equal(data.classes, expected.defect_test[order])
