"""Separable image filters on tensors of shape ``(..., h, w)``."""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F

BLOCK = 32


def no_autocast(device_type):
    """Return the context that ends autocast; not every device knows autocast."""
    if device_type in ("cpu", "cuda"):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def full_precision(function):
    """Run ``function`` in float32, whatever autocast region it is called from.

    Tensors of half precision among the arguments are converted first.
    """

    def convert(value):
        if isinstance(value, torch.Tensor) and value.dtype in (
            torch.bfloat16,
            torch.float16,
        ):
            return value.float()
        return value

    @functools.wraps(function)
    def wrapper(first, *args, **kwargs):
        with no_autocast(first.device.type):
            return function(
                convert(first),
                *map(convert, args),
                **{name: convert(value) for name, value in kwargs.items()},
            )

    return wrapper


def _banded_matrix(size, kernel, padding):
    """Return the ``(size, size)`` matrix that filters a vector of length ``size``."""
    radius = len(kernel) // 2
    rows = torch.arange(size, device=kernel.device)[:, None]
    columns = rows + torch.arange(-radius, radius + 1, device=kernel.device)
    weights = kernel.expand(columns.shape)  # (size, 2 * radius + 1)
    if padding == "reflect":
        columns = columns.remainder(2 * size)
        columns = torch.minimum(columns, 2 * size - 1 - columns)
    else:
        weights = weights * ((columns >= 0) & (columns < size))
        columns = columns.clamp(0, size - 1)
    matrix = kernel.new_zeros(size, size).scatter_add_(1, columns, weights)
    return matrix / matrix.sum(dim=1, keepdim=True) if padding == "none" else matrix


@full_precision
def gaussian_blur(images, sigma, *, radius=None, padding="reflect"):
    """Blur images with a Gaussian.

    Parameters
    ----------
    images : torch.Tensor of shape (..., h, w)
        Floating-point images or maps.
    sigma : float
        Standard deviation in pixels; 0 returns the images unchanged.
    radius : int, default=None
        Half width of the kernel in pixels. None cuts the kernel at four standard
        deviations.
    padding : {"reflect", "zeros"}, default="reflect"
        What stands beyond the border: the image mirrored at the edge of its outermost
        pixels (which keeps the mean), or zeros.

    Returns
    -------
    torch.Tensor of shape (..., h, w)
        The blurred images.

    Notes
    -----
    Each axis is blurred by a banded matrix, of which only the blocks along the band are
    multiplied. A matrix product is fast on every device and, unlike a padded
    convolution, takes kernels wider than the image.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.filters import gaussian_blur
    >>> image = torch.zeros(1, 5, 5)
    >>> image[0, 2, 2] = 1.0
    >>> round(gaussian_blur(image, 1.0).sum().item(), 4)
    1.0
    """
    if radius is None:
        radius = math.ceil(4 * sigma)
    return make_gaussian_filter(images, sigma, radius, padding)(images)


def make_gaussian_filter(like, sigma, radius, padding):
    """Return a function that blurs images of the size, type and device of ``like``."""
    if sigma == 0:
        return lambda images: images
    offsets = torch.arange(-radius, radius + 1, device=like.device).to(like.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    return full_precision(_separable_filter(like.shape[-2:], kernel, padding))


def _separable_filter(size, kernel, padding):
    """Return a function that filters images of a size (h, w) along both axes."""
    height, width = size
    vertical = _banded_matrix(height, kernel, padding)
    horizontal = vertical if width == height else _banded_matrix(width, kernel, padding)
    radius = len(kernel) // 2
    return lambda images: _BandedProduct.apply(images, vertical, horizontal, radius)


class _BandedProduct(torch.autograd.Function):
    """``vertical @ images @ horizontal.T``, of whose matrices only bands are not zero.

    Parts of a result that autograd records would have to be joined by a copy.
    """

    @staticmethod
    def forward(ctx, images, vertical, horizontal, radius):
        ctx.save_for_backward(vertical, horizontal)
        ctx.radius = radius
        return _banded_product(images, vertical, horizontal, radius)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradients):
        vertical, horizontal = ctx.saved_tensors
        found = _banded_product(gradients, vertical.T, horizontal.T, ctx.radius)
        return found, None, None, None


def _banded_product(images, vertical, horizontal, radius):
    planes = images.reshape(-1, *images.shape[-2:])
    # what is made of a subclass would be a view, which nobody may overwrite later
    with torch._C.DisableTorchFunctionSubclass():
        half, whole = images.new_empty(planes.shape), images.new_empty(images.shape)
    lines, results = half.flatten(0, 1), whole.view(planes.shape)
    for own, reached in _blocks(len(horizontal), radius):
        columns = planes.flatten(0, 1)[:, reached]
        torch.mm(columns, horizontal[own, reached].T, out=lines[:, own])
    for own, reached in _blocks(len(vertical), radius):
        torch.matmul(vertical[own, reached], half[:, reached], out=results[:, own])
    return whole


def _blocks(size, radius):
    """Yield slices of the rows and the columns where a banded matrix is not zero."""
    step = BLOCK if size > 2 * BLOCK else size
    for start in range(0, size, step):
        stop = min(size, start + step)
        yield slice(start, stop), slice(max(0, start - radius), stop + radius)


@full_precision
def mean_filter(images, size, *, padding="zeros"):
    """Average every pixel with its square neighbourhood.

    Parameters
    ----------
    images : torch.Tensor of shape (b, h, w)
        Images or maps.
    size : int
        Odd side length of the neighbourhood in pixels.
    padding : {"zeros", "none"}, default="zeros"
        What stands beyond the border: zeros that count in the mean, so that maps fall
        off towards the border, or nothing, so that the mean is over fewer pixels.

    Returns
    -------
    torch.Tensor of shape (b, h, w)
        The averaged images.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.filters import mean_filter
    >>> mean_filter(torch.ones(1, 3, 3), 3)[0, 1]
    tensor([0.6667, 1.0000, 0.6667])
    """
    if size == 1:
        return images
    kernel = images.new_full((size,), 1 / size)
    return _separable_filter(images.shape[-2:], kernel, padding)(images)


def scaled_size(size, images):
    """Scale the side length of a filter with the size of the images.

    Parameters
    ----------
    size : int
        Side length in pixels of an image of 256 pixels.
    images : torch.Tensor of shape (..., h, w)
        Images or maps to be filtered; the shorter side counts.

    Returns
    -------
    int
        The nearest odd side length, at least 3; 1, no filter, for a size of 1.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.filters import scaled_size
    >>> scaled_size(21, torch.ones(1, 64, 128))
    5
    """
    if size == 1:
        return 1
    return max(3, 2 * round((size * min(images.shape[-2:]) / 256 - 1) / 2) + 1)


@full_precision
def prewitt(images):
    """Return the Prewitt gradients of images along both axes.

    The border is padded by replication, so that a constant image has no gradient
    anywhere. Kernels are divided by 3.

    Parameters
    ----------
    images : torch.Tensor of shape (..., h, w)
        Images.

    Returns
    -------
    dy, dx : torch.Tensor of shape (..., h, w)
        Differences along the vertical and the horizontal axis.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.filters import prewitt
    >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    >>> dy, dx = prewitt(ramp)
    >>> dx[0, 0, 0]
    tensor([1., 2., 2., 1.])
    """
    flat = images.reshape(-1, 1, *images.shape[-2:])
    padded = F.pad(flat, (1, 1, 1, 1), mode="replicate")  # (n, 1, h + 2, w + 2)
    smooth_y = (padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]) / 3
    smooth_x = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    dy = smooth_x[..., 2:, :] - smooth_x[..., :-2, :]
    dx = smooth_y[..., 2:] - smooth_y[..., :-2]
    return dy.view(images.shape), dx.view(images.shape)
