"""Textures against their photographs, synthetic sets, and folders in MVTec's layout."""

import shutil
import socket

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_array_equal
from PIL import Image
from skimage import data

from skanomaly.datasets import (
    load_mvtec,
    load_textures,
    make_clips,
    make_ellipses,
    make_moving_shapes,
)

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
        (make_ellipses, {"n_test": 1}),
    ):
        with pytest.raises(ValueError, match=next(iter(params))):
            make(**params)


# make_ellipses


@pytest.mark.parametrize("size", [32, 64, 255])
def test_ellipses_differ_from_their_healthy_version_in_the_inner_contour(size):
    data = make_ellipses(n_train=2, n_test=12, size=size)
    assert data.X_train.shape == (2, size, size, 1)
    assert data.X_test.dtype == data.healthy_test.dtype == np.uint8
    assert data.y_test.tolist() == [1, -1] * 6
    differences = (data.X_test.astype(float) - data.healthy_test)[..., 0] / 255
    assert_array_equal(data.differences_test, differences.astype(np.float32))
    assert_array_equal(data.masks_test, np.abs(2 * data.differences_test) > 0.44195)
    assert_array_equal(data.masks_test.any(axis=(1, 2)), data.y_test == -1)
    assert not data.differences_test[data.y_test == 1].any()

    for difference in data.differences_test[data.y_test == -1]:
        before, after = (np.argwhere(sign * difference > 0.2) for sign in (-1, 1))
        assert before.mean(axis=0) == pytest.approx(after.mean(axis=0), abs=size / 50)
        extent = np.ptp(after, axis=0).max() / np.ptp(before, axis=0).max()
        assert 0.5 < extent < 0.9


def test_shrunk_ellipse_equals_slow_reference():
    # Follow every pixel's displacement in the published units and look up, by bilinear
    # interpolation, what the healthy contour shows there.
    from scipy.ndimage import map_coordinates

    size = 256
    data = make_ellipses(n_train=2, n_test=8, size=size)
    for row in np.flatnonzero(data.y_test == -1):
        difference = data.differences_test[row]
        centre = np.argwhere(difference < -0.3).mean(axis=0)
        grid = np.mgrid[:size, :size]
        y, x = (grid - centre[:, None, None]) * 2 / size
        gaussian = np.exp(-(y**2 + x**2) / (2 * 0.19**2))
        displacement = np.stack([y, x]) * gaussian
        displacement *= 0.1 / np.hypot(*displacement).max()
        healthy = np.maximum(-difference, 0)
        moved = map_coordinates(healthy, grid + displacement * size / 2, order=1)
        expected, found = moved > 0.25, difference > 0.25
        assert (expected & found).sum() / (expected | found).sum() > 0.5


def test_ellipses_grey_levels_do_not_tell_the_class():
    data = make_ellipses(n_train=400, n_test=2)
    healthy, diseased = (data.X_train[data.y_train == label] for label in (1, -1))
    for level in (np.min, np.max, np.median):
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
    images = load_mvtec(shared_data / folder, category, size=64)
    assert images.X_train.shape == (n_train, 64, 64, 3)
    assert images.X_test.shape == (n_good + n_anomalous, 64, 64, 3)
    assert np.sum(images.y_test == 1) == n_good
    if not masked:
        assert images.masks_test is None
        return
    covered = images.masks_test.mean(axis=(1, 2))
    assert not covered[images.y_test == 1].any()
    assert covered[images.y_test == -1].mean() > 0.005
