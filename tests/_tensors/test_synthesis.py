import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from skanomaly._tensors import synthesis
from skanomaly._tensors.synthesis import (
    augment_textures,
    blend,
    perlin_masks,
    perlin_noise,
    procedural_textures,
    random_lattices,
    rotate,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def slow_perlin(angles, cells, height, width, row, column):
    """Blend the ramps of the four corners around one pixel."""
    y, x = row * cells[0] / height, column * cells[1] / width

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    value = 0.0
    for corner_y, corner_x in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        angle = angles[corner_y, corner_x].item()
        ramp = math.sin(angle) * (y - corner_y) + math.cos(angle) * (x - corner_x)
        value += fade(1 - abs(y - corner_y)) * fade(1 - abs(x - corner_x)) * ramp
    return math.sqrt(2) * value


@pytest.mark.parametrize(
    ("cells", "size"), [((1, 1), (8, 8)), ((4, 2), (33, 47)), ((2, 4), (20, 50))]
)
def test_perlin_noise_equals_the_formula(cells, size, generator):
    noise = perlin_noise(torch.tensor([cells]), *size, generator=generator)[0]
    generator.manual_seed(0)
    shape = max(cells) + 1, max(cells) + 1
    angles = 2 * math.pi * torch.rand(shape, generator=generator)
    for row, column in itertools.product(range(0, size[0], 3), range(0, size[1], 5)):
        expected = slow_perlin(angles, cells, *size, row, column)
        assert noise[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_perlin_noise_is_bounded_and_vanishes_at_the_corners(generator):
    cells = torch.tensor([[1, 1], [2, 8], [8, 4]]).repeat(20, 1)
    noise = perlin_noise(cells, 64, 32, generator=generator)
    assert 0.8 < noise.abs().max() <= 1
    for field, (rows, columns) in zip(noise, cells.tolist(), strict=True):
        assert not field[:: 64 // rows, :: 32 // columns].any()
        assert field.any()


def test_the_seed_alone_decides_the_noise(generator):
    cells = torch.tensor([[4, 4], [2, 1]])
    first, other = (perlin_noise(cells, 32, 32, generator=generator) for _ in range(2))
    generator.manual_seed(0)
    assert torch.equal(perlin_noise(cells, 32, 32, generator=generator), first)
    assert not torch.equal(first, other)


def test_finer_lattices_give_more_components(generator):
    def mean_components(n_cells):
        cells = torch.full((30, 2), n_cells)
        noise = perlin_noise(cells, 64, 64, generator=generator)
        return np.mean([ndimage.label(field > 0.3)[1] for field in noise.numpy()])

    counts = [mean_components(n_cells) for n_cells in (1, 2, 4, 8)]
    for coarse, fine in itertools.pairwise(counts):
        assert fine > 2 * coarse


@pytest.mark.parametrize("size", [(256, 256), (100, 33), (64, 15), (1024, 7), (1, 2)])
def test_no_cell_is_below_eight_pixels(size, generator):
    lattices = random_lattices(300, *size, generator=generator)
    assert lattices.shape == (300, 2)
    for side, counts in zip(size, lattices.T, strict=True):
        drawn = counts.unique().tolist()
        allowed = [n for n in (1, 2, 4, 8, 16, 32) if n == 1 or side / n >= 8]
        assert drawn == allowed


def test_lattices_of_both_axes_are_independent(generator):
    lattices = random_lattices(400, 64, 64, generator=generator).log2()
    assert abs(torch.corrcoef(lattices.T)[0, 1]) < 0.15


def test_masks_are_binary_and_rarely_empty(generator):
    masks = perlin_masks(200, 64, 48, generator=generator)
    assert masks.shape == (200, 1, 64, 48)
    assert masks.dtype == torch.float32
    assert masks.unique().tolist() == [0.0, 1.0]
    coverage = masks.mean(dim=(1, 2, 3))
    assert (coverage > 0).float().mean() > 0.99
    assert 0.02 < coverage.mean() < 0.12
    assert len({mask.numpy().tobytes() for mask in masks}) > 190


def test_masks_of_the_paper_size_cover_as_much_as_in_the_paper(generator):
    """Measured on the code of the paper: 4.8 % of the pixels."""
    masks = perlin_masks(80, 256, 256, generator=generator)
    assert masks.mean().item() == pytest.approx(0.048, abs=0.01)


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
def test_rotating_by_right_angles_equals_rot90(quarters):
    images = torch.rand(2, 3, 9, 9)
    rotated = rotate(images, torch.full((2,), 90.0 * quarters))
    torch.testing.assert_close(rotated, torch.rot90(images, quarters, (2, 3)))


def test_each_image_has_its_own_angle_and_zero_changes_nothing():
    images = torch.rand(2, 1, 8, 8)
    rotated = rotate(images, torch.tensor([0.0, 90.0]))
    torch.testing.assert_close(rotated[0], images[0])
    torch.testing.assert_close(rotated[1], torch.rot90(images[1], 1, (1, 2)))
    oblong = torch.rand(1, 2, 5, 8)
    torch.testing.assert_close(rotate(oblong, torch.zeros(1)), oblong)


@pytest.mark.parametrize("degrees", [30.0, -75.0])
def test_rotating_an_oblong_image_moves_points_rigidly(degrees):
    height, width = 60, 90
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    points = centre + np.array([[0, 0], [12, 0], [0, 18], [-10, 9]])
    y, x = np.mgrid[:height, :width]
    blobs = [np.exp(-((y - a) ** 2 + (x - b) ** 2) / 8) for a, b in points]
    images = torch.tensor(np.array([blobs]), dtype=torch.float32)
    rotated = rotate(images, torch.tensor([degrees]))[0].numpy()
    found = [ndimage.center_of_mass(blob) for blob in rotated]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    anticlockwise = np.array([[cosine, -sine], [sine, cosine]])  # of (row, column)
    np.testing.assert_allclose(
        found, centre + (points - centre) @ anticlockwise.T, atol=0.02
    )


def test_rotation_keeps_its_precision_under_autocast():
    images, degrees = torch.rand(1, 1, 16, 16), torch.tensor([20.0])
    expected = rotate(images, degrees)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotate(images, degrees), expected)


def test_blending_leaves_what_the_mask_leaves():
    images, textures = torch.rand(2, 3, 3, 16, 16)
    masks = (torch.rand(3, 1, 16, 16) > 0.5).float()
    opacity = torch.tensor([1.0, 0.25, 0.0]).view(3, 1, 1, 1)
    blended = blend(images, textures, masks, opacity)
    inside = masks.expand_as(images) == 1
    assert torch.equal(blended[~inside], images[~inside])
    torch.testing.assert_close(blended[0][inside[0]], textures[0][inside[0]])
    mixed = 0.25 * textures[1] + 0.75 * images[1]
    torch.testing.assert_close(blended[1][inside[1]], mixed[inside[1]])
    assert torch.equal(blended[2], images[2])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_augmented_textures_differ_and_stay_in_range(channels, generator):
    textures = torch.rand(60, channels, 16, 20)
    augmented = augment_textures(textures, generator=generator)
    assert augmented.shape == textures.shape
    assert augmented.min() >= 0
    assert augmented.max() <= 1
    change = (augmented - textures).abs().mean(dim=(1, 2, 3))
    assert (change > 0.02).float().mean() > 0.9


def test_stretching_leaves_out_a_share_of_pixels_at_either_end():
    image = torch.rand(1, 3, 20, 20)
    image[:, 2] = 0.4
    stretched = synthesis._stretched(image, 0.1)
    for channel, wanted in zip(image[0, :2], stretched[0], strict=False):
        low, high = np.sort(channel, axis=None)[[40, -41]]
        np.testing.assert_allclose(wanted, (channel - low) / (high - low), atol=1e-5)
    assert torch.equal(stretched[0, 2], image[0, 2])  # flat ones stay as they are


def test_augmentation_depends_on_the_seed_alone(generator):
    textures = torch.rand(5, 3, 16, 16)
    before = textures.clone()
    first = augment_textures(textures, generator=generator)
    generator.manual_seed(0)
    assert torch.equal(augment_textures(textures, generator=generator), first)
    assert not torch.equal(augment_textures(textures, generator=generator), first)
    assert torch.equal(textures, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_procedural_textures_vary(channels, generator):
    textures = procedural_textures(70, channels, 32, 24, generator=generator)
    assert textures.shape == (70, channels, 32, 24)
    assert textures.dtype == torch.uint8
    assert len({texture.numpy().tobytes() for texture in textures}) == 70
    contrast = textures.float().std(dim=(2, 3)).amax(dim=1)
    assert contrast.min() < 5
    assert contrast.max() > 60
    level = textures.float().mean(dim=(1, 2, 3))
    assert level.min() < 80
    assert level.max() > 175
