import numpy as np
import pytest
import torch

from skanomaly._tensors.masking import (
    disjoint_masks,
    stripe_masks,
    superpixels,
    windows,
)


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (3, 2)])
@pytest.mark.parametrize("cell_size", [1, 2, 4, 16])
def test_disjoint_masks_hide_each_pixel_once_by_whole_cells(size, cell_size):
    generator = torch.Generator().manual_seed(0)
    masks = disjoint_masks(*size, cell_size=cell_size, n_masks=3, generator=generator)
    assert masks.shape == (3, 1, *size)
    assert torch.equal(masks.sum(dim=0), torch.ones(1, *size))
    corners = masks[..., ::cell_size, ::cell_size]
    n_cells = corners.sum(dim=(1, 2, 3))
    assert n_cells.max() - n_cells.min() <= 1
    rows = torch.arange(size[0]) // cell_size
    columns = torch.arange(size[1]) // cell_size
    assert torch.equal(masks, corners[..., rows, :][..., columns])


def test_disjoint_masks_are_drawn_anew():
    settings = {"cell_size": 2, "n_masks": 3, "generator": torch.Generator()}
    first, second = (disjoint_masks(8, 8, **settings) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("n_stripes", [4, 8, 16])
def test_stripes(n_stripes):
    vertical, inverse, horizontal, other = stripe_masks(64, 64, n_stripes=n_stripes)
    ones = torch.ones(1, 64, 64)
    assert torch.equal(vertical + inverse, ones)
    assert torch.equal(horizontal + other, ones)
    assert torch.equal(horizontal, vertical.transpose(1, 2))
    assert vertical.mean() == 0.5
    width = 64 // n_stripes
    expected = torch.tensor([1.0] * width + [0.0] * width).repeat(n_stripes // 2)
    assert torch.equal(vertical, expected.expand(1, 64, 64))


@pytest.mark.parametrize("size", [(1, 2), (5, 7), (30, 64)])
def test_stripes_of_any_size_hide_each_pixel_twice(size):
    masks = stripe_masks(*size, n_stripes=4)
    assert torch.equal(masks.sum(dim=0), torch.full((1, *size), 2.0))


@pytest.mark.parametrize(("grid", "length"), [((5, 6), 3), ((4, 4), 4), ((6, 3), 2)])
def test_windows_have_their_cell_as_near_to_the_centre_as_can_be(grid, length):
    n_rows, n_columns = grid
    found = windows(n_rows, n_columns, length)
    assert found.shape == (n_rows * n_columns, length**2)
    for cell, window in enumerate(found.tolist()):
        row, column = divmod(cell, n_columns)
        top = min(max(row - length // 2, 0), n_rows - length)
        left = min(max(column - length // 2, 0), n_columns - length)
        assert window == [
            (top + i) * n_columns + left + j
            for i in range(length)
            for j in range(length)
        ]
        assert cell in window


def test_windows_at_given_corners():
    found = windows(5, 6, 2, corners=torch.tensor([[0, 0], [3, 4]]))
    assert found.tolist() == [[0, 1, 6, 7], [22, 23, 28, 29]]


def blocks():
    image = np.zeros((24, 30, 3))
    image[:12, 15:] = (1, 0, 0)
    image[12:] = (0, 0.5, 0)
    return image + np.random.default_rng(0).normal(0, 0.01, image.shape)


def test_superpixels_follow_edges():
    labels = superpixels(blocks(), n_segments=20)
    assert labels.shape == (24, 30)
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))
    np.testing.assert_array_equal(labels, superpixels(blocks(), n_segments=20))
    areas = np.zeros((24, 30), int)
    areas[:12, 15:], areas[12:] = 1, 2
    # of each superpixel nearly all pixels lie in one of the three areas
    purity = [
        np.bincount(areas[labels == q]).max() / (labels == q).sum()
        for q in range(labels.max() + 1)
    ]
    assert np.mean(purity) > 0.97


def test_superpixels_of_grey_images_follow_edges_as_those_of_coloured_ones():
    grey = blocks().mean(axis=2, keepdims=True)
    labels = superpixels(grey, n_segments=20)
    np.testing.assert_array_equal(
        labels, superpixels(grey.repeat(3, axis=2), n_segments=20)
    )
    grid = superpixels(np.zeros_like(grey), n_segments=20)
    assert not np.array_equal(labels, grid)
    two = superpixels(grey.repeat(2, axis=2), n_segments=20)
    assert not np.array_equal(two, grid)


def test_noise_is_divided_into_a_grid():
    noise = np.random.default_rng(0).random((32, 32, 3))
    labels = superpixels(noise, n_segments=16)
    assert 4 < labels.max() + 1 <= 24


def test_superpixels_of_one_colour_are_a_grid():
    labels = superpixels(np.full((32, 32, 1), 0.5), n_segments=16)
    assert 8 <= labels.max() + 1 <= 24
