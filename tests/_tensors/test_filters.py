import numpy as np
import pytest
import torch
from scipy import ndimage

from skanomaly._tensors.filters import gaussian_blur, mean_filter, prewitt, scaled_size

SIZES = [(12, 12), (9, 14), (5, 3), (1, 2)]


def rectangle_mean(image, size):
    """Sum each neighbourhood pixel by pixel, with zeros that count outside."""
    height, width = image.shape
    half = size // 2
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            for r in range(row - half, row + half + 1):
                for c in range(column - half, column + half + 1):
                    if 0 <= r < height and 0 <= c < width:
                        result[row, column] += image[r, c] / size**2
    return result


def prewitt_of(image):
    height, width = image.shape
    dy, dx = np.zeros_like(image), np.zeros_like(image)

    def at(row, column):
        return image[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]

    for r in range(height):
        for c in range(width):
            for k in (-1, 0, 1):
                dy[r, c] += (at(r + 1, c + k) - at(r - 1, c + k)) / 3
                dx[r, c] += (at(r + k, c + 1) - at(r + k, c - 1)) / 3
    return dy, dx


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5, 6.0])
def test_gaussian_blur_equals_scipy(size, sigma, random_images):
    """Kernels of sigma 2.5 and 6 are wider than the small images."""
    images = torch.from_numpy(random_images(2, 3, *size)).double()
    expected = ndimage.gaussian_filter(
        images.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=4
    )
    np.testing.assert_allclose(gaussian_blur(images, sigma), expected, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [2, 5, 9])
def test_gaussian_blur_with_zeros_equals_scipy(size, radius, random_images):
    images = torch.from_numpy(random_images(2, *size)).double()
    expected = ndimage.gaussian_filter(
        images.numpy(), (0, 1.5, 1.5), mode="constant", radius=(0, radius, radius)
    )
    blurred = gaussian_blur(images, 1.5, radius=radius, padding="zeros")
    np.testing.assert_allclose(blurred, expected, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_gaussian_blur_keeps_the_mean_and_commutes_with_constants(size, random_images):
    images = torch.from_numpy(random_images(3, *size)).double()
    blurred = gaussian_blur(images, 3.0)
    torch.testing.assert_close(blurred.mean(dim=(1, 2)), images.mean(dim=(1, 2)))
    torch.testing.assert_close(gaussian_blur(images + 5.0, 3.0), blurred + 5.0)


def test_gaussian_blur_without_width_changes_nothing(random_images):
    images = torch.from_numpy(random_images(2, 4, 5)).double()
    assert torch.equal(gaussian_blur(images, 0), images)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [1, 3, 7])
def test_mean_filter_equals_the_loop(size, width, random_images):
    images = torch.from_numpy(random_images(2, *size)).double()
    expected = [rectangle_mean(image, width) for image in images.numpy()]
    np.testing.assert_allclose(mean_filter(images, width), expected, atol=1e-12)


def test_mean_filter_reaches_121_of_441_in_a_corner():
    filtered = mean_filter(torch.ones(1, 32, 32, dtype=torch.float64), 21)
    assert filtered[0, 0, 0].item() == pytest.approx(121 / 441)
    assert filtered[0, 16, 16].item() == pytest.approx(1.0)


@pytest.mark.parametrize("size", SIZES)
def test_prewitt_equals_the_loop(size, random_images):
    images = torch.from_numpy(random_images(2, 2, *size)).double()
    dy, dx = prewitt(images)
    for index in np.ndindex(2, 2):
        expected_dy, expected_dx = prewitt_of(images[index].numpy())
        np.testing.assert_allclose(dy[index], expected_dy, atol=1e-12)
        np.testing.assert_allclose(dx[index], expected_dx, atol=1e-12)


def test_prewitt_of_a_ramp_is_its_slope_and_of_a_constant_nothing():
    rows = torch.arange(6.0).view(6, 1).expand(6, 5)
    dy, dx = prewitt(rows)
    assert torch.equal(dy[1:-1], torch.full((4, 5), 2.0))
    assert not dx.any()
    assert not any(gradient.any() for gradient in prewitt(torch.full((4, 4), 0.7)))


@pytest.mark.parametrize(
    "function",
    [
        lambda images: gaussian_blur(images, 2.0),
        lambda images: mean_filter(images, 3),
        lambda images: torch.stack(prewitt(images)),
    ],
    ids=["gaussian_blur", "mean_filter", "prewitt"],
)
def test_autocast_does_not_lower_the_precision(function, random_images):
    images = torch.from_numpy(random_images(2, 9, 9))
    expected = function(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(images), expected)
        assert function(images.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_gradients_of_a_blur_in_blocks_are_those_of_a_convolution(padding):
    images = torch.rand(2, 70, 9, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.rand(2, 70, 9, generator=torch.Generator().manual_seed(1)).double()
    images.requires_grad_()
    blurred = gaussian_blur(images, 1.5, radius=3, padding=padding)
    (found,) = torch.autograd.grad((weights * blurred).sum(), images)

    kernel = torch.exp(-0.5 * (torch.arange(-3, 4.0).double() / 1.5) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    if padding == "zeros":
        padded = torch.nn.functional.pad(images, (3, 3, 3, 3))
    else:  # mirrored with the outermost pixels, which torch's padding leaves out
        rows = [2, 1, 0, *range(70), 69, 68, 67]
        columns = [2, 1, 0, *range(9), 8, 7, 6]
        padded = images[:, rows][:, :, columns]
    expected = torch.nn.functional.conv2d(padded[:, None], kernel[None, None])[:, 0]
    torch.testing.assert_close(blurred, expected)
    (expected,) = torch.autograd.grad((weights * expected).sum(), images)
    torch.testing.assert_close(found, expected)


def test_mean_filter_without_padding_averages_the_pixels_inside():
    images = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(0))
    found = mean_filter(images, 5, padding="none")
    for row in range(7):
        for column in range(9):
            window = images[
                :, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3
            ]
            torch.testing.assert_close(found[:, row, column], window.mean(dim=(1, 2)))


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [
        (21, (256, 256), 21),
        (21, (256, 512), 21),
        (21, (128, 128), 11),
        (21, (64, 64), 5),
        (11, (64, 64), 3),
        (21, (24, 24), 3),
        (1, (1024, 1024), 1),
        (1, (64, 64), 1),
    ],
)
def test_filters_scale_with_the_images(size, sides, expected):
    assert scaled_size(size, torch.empty(1, *sides)) == expected
