"""FCDD: a one-class network that explains its score (Liznerski et al., ICLR 2021).

A network of convolutions and pools alone turns an image into a coarse map. Training
pulls the map to zero on normal images and up on anomalies, which are made by dropping
confetti on normal images, taken from elsewhere, or labelled. The score of an image is
the mean of its map, so that the map explains all of it; a Gaussian at the centre of
each cell's receptive field brings the map to the size of the image.
"""

import math
import os
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._fitting.batches import ImageBatches
from .._fitting.loop import Samples, seeded_generator
from .._fitting.persistence import shared_tensor
from .._tensors.filters import full_precision, gaussian_blur
from .._tensors.networks import pad_to_multiple
from .._tensors.synthesis import uniform
from .._typing import Self, fit_context
from ..backbones import check_backbone_takes, make_backbone
from ..base import NetworkDetector
from ..images import check_pictures, some_pictures

# The sizes in pixels below are those of images of so many pixels a side.
CONFETTI_SIDE = 240
SIGMA_SIDE = 224

MEAN_COLOURED = (
    1.8e-5 * CONFETTI_SIDE**2
)  # blobs an image, before empty ones are redrawn
MEAN_BLACK = 1.2e-5 * CONFETTI_SIDE**2
MOST_BLOBS = 6
BLOB_SIDES = 8, 54
BLUR_SIGMA, BLUR_RADIUS = 5.0, 12
SMALLEST_CHANGE = 0.025 / 255

CROPPED = 224 / 240  # side of a crop, relative to the image
JITTERS = (0.04, 0.04, 0.04, 0.04), (0.005, 0.0005, 0.0005, 0.0005)
NOISE = 0.1

SMALLEST_SCORE = 1e-6
SMALLEST_CONTRAST = 1e-4  # below it is rounding
MAX_ANOMALIES = 2000
LAST_PRETRAINED = "features.14"  # the third pool of torchvision's VGG-11
N_PRETRAINED = 15
OF_THE_FIRST_FIT = "local_contrast", "optimizer", "weight_decay"


# The networks


class Plan(NamedTuple):
    """Layers of a network: a convolution each, or None for a pool.

    Parameters
    ----------
    width : int
        Number of channels of the first convolution in the paper.
    units : tuple
        Of each convolution its channels relative to the first, its kernel, and whether
        a normalisation and a rectifier follow; None stands for a pool.
    pool : tuple of int
        Kernel, stride and padding of the pools.
    """

    width: int
    units: tuple
    pool: tuple[int, int, int]


PLANS = {
    "vgg11": Plan(
        64,
        (
            *((1, 3, True), None),
            *((2, 3, True), None),
            *((4, 3, True), (4, 3, True), None),
            *((8, 3, True), (8, 3, True)),
        ),
        (2, 2, 0),
    ),
    "cnn224": Plan(
        8,
        (
            *((1, 5, True), None),
            *((4, 5, True), None),
            *((8, 3, True), (16, 3, True), None),
            (16, 3, False),
        ),
        (3, 2, 1),
    ),
    "cnn32": Plan(
        128,
        (
            *((1, 3, True), None),
            *((2, 3, True), (2, 3, True), None),
            (1, 3, False),
        ),
        (2, 2, 0),
    ),
    "cnn28": Plan(128, ((1, 5, True), None, (1, 5, False), None), (2, 2, 0)),
}


class ReceptiveField(NamedTuple):
    """What one cell of a network's output sees of the image.

    Parameters
    ----------
    size : int
        Side of the field in pixels.
    stride : int
        Distance between the fields of two neighbours.
    start : float
        Centre of the first cell's field, 0 being the middle of the first pixel.
    """

    size: int
    stride: int
    start: float


def receptive_field(layers):
    """Compute the receptive field of the outputs of some layers.

    Parameters
    ----------
    layers : iterable of torch.nn.Module
        Layers in their order. Convolutions without dilation and maximum pools count.

    Returns
    -------
    ReceptiveField
        The field of the first cell, and the way to the next.

    Examples
    --------
    >>> from torch import nn
    >>> from skanomaly.methods.fcdd import receptive_field
    >>> receptive_field([nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)])
    ReceptiveField(size=4, stride=2, start=0.5)
    """
    size, stride, start = 1, 1, 0.0
    for layer in layers:
        if not isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            continue
        kernel, step, padding = (
            value if isinstance(value, int) else value[0]
            for value in (layer.kernel_size, layer.stride, layer.padding)
        )
        start += ((kernel - 1) / 2 - padding) * stride
        size += (kernel - 1) * stride
        stride *= step
    return ReceptiveField(size, stride, start)


class FCDDNetwork(nn.Module):
    """Fully convolutional network from images to a coarse map.

    Parameters
    ----------
    architecture : str
        One of `PLANS`.
    channels : int
        Number of channels of the images that the network takes; grey ones are taken for
        so many equal channels.
    width : int or None
        Number of channels of the first convolution; None takes the paper's.
    """

    def __init__(self, architecture, channels, width):
        super().__init__()
        plan = PLANS[architecture]
        width = plan.width if width is None else width
        is_vgg = architecture == "vgg11"
        self.channels = channels
        layers, wide = [], channels
        for unit in plan.units:
            if unit is None:
                layers.append(nn.MaxPool2d(*plan.pool))
                continue
            multiple, kernel, is_rectified = unit
            narrow = multiple * width
            layers.append(nn.Conv2d(wide, narrow, kernel, padding=kernel // 2))
            if is_rectified:
                layers += [
                    nn.BatchNorm2d(narrow, eps=1e-5 if is_vgg else 1e-4),
                    nn.ReLU(inplace=True) if is_vgg else nn.LeakyReLU(inplace=True),
                ]
            wide = narrow
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(wide, 1, 1)
        if is_vgg:
            for layer in self.layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                    nn.init.zeros_(layer.bias)
        self.field = receptive_field([*self.layers, self.head])

    def forward(self, images):
        """Return maps (b, u, v) of images (b, c, h, w), of which a cell is a stride."""
        images = images.expand(-1, self.channels, -1, -1)
        features = self.layers(pad_to_multiple(images, self.field.stride))
        return self.head(features)[:, 0].float()


# From the network's output to maps and losses


@full_precision
def pseudo_huber(outputs):
    """Return sqrt(x^2 + 1) - 1, which is exact for small numbers, too."""
    squares = outputs.square()
    return squares / (torch.sqrt(squares + 1) + 1)


@full_precision
def upsample(maps, size, field, sigma):
    """Bring coarse maps to the size of the images.

    Parameters
    ----------
    maps : torch.Tensor of shape (b, u, v)
        Coarse maps.
    size : tuple of int
        Height and width of the images.
    field : ReceptiveField
        What a cell sees of them.
    sigma : float
        Standard deviation in pixels of the Gaussians, which end with the receptive
        fields.

    Returns
    -------
    torch.Tensor of shape (b, h, w)
        Sums of a Gaussian at the centre of each cell's field, divided by those of a map
        of ones: a constant map keeps its value, also at the border.
    """
    rows, columns = (
        _spread(pixels, cells, field, sigma, maps.device)
        for pixels, cells in zip(size, maps.shape[-2:], strict=True)
    )
    return rows @ maps @ columns.T


def _spread(n_pixels, n_cells, field, sigma, device):
    """Return the weights (n_pixels, n_cells) of the cells for each pixel of a line."""
    centres = field.start + field.stride * torch.arange(n_cells, device=device)
    distances = torch.arange(n_pixels, device=device)[:, None] - centres
    exponents = -0.5 * (distances / sigma).square()
    beyond = distances.abs() > (field.size - 1) / 2
    return exponents.masked_fill(beyond, -math.inf).softmax(dim=1)


def _log_chance(degrees):
    """Return the logarithm of the probability that images are anomalous."""
    # the gradient passes the bound: a mask of few pixels would not be learned otherwise
    bounded = degrees + (degrees.clamp(min=SMALLEST_SCORE) - degrees).detach()
    # log(1 - exp(-s)) as it stands would lose all digits of a small s
    return torch.log(-torch.expm1(-bounded))


@full_precision
def image_loss(maps, anomalous):
    """Compute the loss of images that are normal or anomalous as a whole.

    Parameters
    ----------
    maps : torch.Tensor of shape (b, u, v)
        Maps, not negative.
    anomalous : torch.Tensor of shape (b,)
        Which images are anomalous, bool.

    Returns
    -------
    torch.Tensor of shape ()
        Mean over the images of the mean of a normal map, and of the negative logarithm
        of an anomalous one's probability to be so.
    """
    degrees = maps.mean(dim=(1, 2))
    return torch.where(anomalous, -_log_chance(degrees), degrees).mean()


@full_precision
def pixel_loss(maps, masks):
    """Compute the loss of images with masks of their anomalous pixels.

    Parameters
    ----------
    maps : torch.Tensor of shape (b, h, w)
        Maps in the size of the images, not negative.
    masks : torch.Tensor of shape (b, h, w)
        1 where anomalous, 0 elsewhere.

    Returns
    -------
    torch.Tensor of shape ()
        Mean over the images of both terms: that of the normal pixels, and of images
        with anomalous pixels that of those. Both are means over all pixels.
    """
    normal = ((1 - masks) * maps).mean(dim=(1, 2))
    degrees = (masks * maps).mean(dim=(1, 2))
    anomalous = masks.flatten(1).amax(dim=1) > 0
    return (normal - torch.where(anomalous, _log_chance(degrees), 0.0)).mean()


# Images on their way to the network


def normalize_contrast(images):
    """Take an image's mean from it, and divide by its mean absolute value.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        Images whose contrast is 1, but for flat ones, which become about 0.
    """
    images = images - images.mean(dim=(1, 2, 3), keepdim=True)
    contrast = images.abs().mean(dim=(1, 2, 3), keepdim=True)
    return images / contrast.clamp(min=SMALLEST_CONTRAST)


def confetti(n, channels, height, width, *, generator, device="cpu"):
    """Draw blurred confetti: squares that darken an image.

    Parameters
    ----------
    n, channels, height, width : int
        Number and size of the images.
    generator : torch.Generator
        What is drawn from, on the CPU.
    device : torch.device or str, default="cpu"
        Where the confetti are made.

    Returns
    -------
    torch.Tensor of shape (n, channels, height, width)
        Changes of images in [0, 1], whole 255ths from -2 to 0.

    Notes
    -----
    The sum of two fields: squares of random colours, and squares that take all light.
    In a field there is at least one square, and a later one hides an earlier one. They
    measure 8 to 54 pixels in an image of 240, are turned by up to 45 degrees, and scale
    with the image.
    """
    scale = math.sqrt(height * width) / CONFETTI_SIDE
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)
    total = torch.zeros(n, channels, height, width, device=device)
    for mean_number, is_black in ((MEAN_COLOURED, False), (MEAN_BLACK, True)):
        numbers = blob_numbers(mean_number, n, generator=generator)
        shape = n, MOST_BLOBS, 1, 1
        low, high = BLOB_SIDES
        sides = scale * torch.randint(low, high + 1, shape, generator=generator)
        angles = torch.deg2rad(uniform(-45, 45, *shape, generator=generator))
        rows = torch.randint(height, shape, generator=generator)
        columns = torch.randint(width, shape, generator=generator)
        colours = uniform(
            -256, 0, n, MOST_BLOBS, channels, 1, 1, generator=generator
        ).to(device)
        if is_black:
            colours = torch.full_like(colours, -255)
        numbers, halves, sine, cosine, rows, columns = (
            part.to(device)
            for part in (
                numbers.view(n, 1, 1),
                sides.clamp(min=1) / 2,
                angles.sin(),
                angles.cos(),
                rows,
                columns,
            )
        )
        field = torch.zeros_like(total)
        for k in range(MOST_BLOBS):
            down, right = y - rows[:, k], x - columns[:, k]  # (n, h, 1), (n, 1, w)
            along = right * cosine[:, k] + down * sine[:, k]
            across = down * cosine[:, k] - right * sine[:, k]
            inside = torch.maximum(along.abs(), across.abs()) <= halves[:, k]
            inside = (inside & (k < numbers))[:, None]  # (n, 1, h, w)
            field = torch.where(inside, colours[:, k], field)
        total = total + field
    radius = math.ceil(scale * BLUR_RADIUS)
    return gaussian_blur(total, scale * BLUR_SIGMA, radius=radius).trunc() / 255


def blob_numbers(mean_number, n, *, generator):
    """Draw how many squares images get: Poisson numbers, but for 0 and above 6.

    Parameters
    ----------
    mean_number : float
        Mean of the Poisson distribution.
    n : int
        Number of images.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    torch.Tensor of shape (n,)
        Numbers from 1 to 6.
    """
    numbers = torch.arange(1, MOST_BLOBS + 1)
    chances = mean_number**numbers / (numbers + 1.0).lgamma().exp()
    limits = (chances.cumsum(0) / chances.sum())[:-1]
    return 1 + torch.searchsorted(limits, torch.rand(n, generator=generator))


def add_confetti(images, changes):
    """Add confetti to images, bright ones where dark ones would not be seen.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images in [0, 1].
    changes : torch.Tensor of shape (b, c, h, w)
        What `confetti` returns.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        The images with the changes, clamped to [0, 1] where there are some; with the
        other sign in an image whose mean they would change by less than a fortieth of a
        grey level, if that changes it more.
    """
    darker, brighter = (
        torch.where(changes != 0, (images + sign * changes).clamp(0, 1), images)
        for sign in (1, -1)
    )
    loss, gain = (
        (changed - images).mean(dim=(1, 2, 3), keepdim=True).abs()
        for changed in (darker, brighter)
    )
    return torch.where((loss < SMALLEST_CHANGE) & (gain > loss), brighter, darker)


@full_precision
def crop(images, masks, *, generator):
    """Crop half of the images at random, and enlarge them to their size.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images.
    masks : torch.Tensor of shape (b, h, w)
        Their masks, which are cropped in the same way.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    images : torch.Tensor of shape (b, c, h, w)
        Images, sampled at the nearest pixels.
    masks : torch.Tensor of shape (b, h, w)
        Masks.
    """
    n, channels = images.shape[:2]
    is_cropped = torch.rand(n, 1, generator=generator) < 0.5
    shifts = (1 - CROPPED) * uniform(-1, 1, n, 2, generator=generator)
    scales = torch.where(is_cropped, CROPPED, 1.0).expand(-1, 2)
    places = torch.where(is_cropped, shifts, 0.0)
    theta = torch.cat([torch.diag_embed(scales), places[:, :, None]], dim=2)
    both = torch.cat([images, masks[:, None]], dim=1)  # (b, c + 1, h, w)
    grid = F.affine_grid(theta.to(images.device), list(both.shape), align_corners=False)
    both = F.grid_sample(both, grid, mode="nearest", align_corners=False)
    images = both[:, :channels].contiguous(memory_format=torch.channels_last)
    return images, both[:, channels]


@full_precision
def jitter(images, *, generator):
    """Change brightness, contrast, saturation, hue and noise of images a little.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images; the colours of those without three channels are left alone.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        The changed images, of which half have noise.
    """
    n, channels = images.shape[:2]
    strengths = torch.tensor(JITTERS)[torch.randint(2, (n,), generator=generator)]
    changes = strengths * uniform(-1, 1, n, 4, generator=generator)
    brightness, contrast, saturation, hue = changes.T
    is_noisy = torch.rand(n, generator=generator) < 0.5
    noise = torch.randn(images.shape, generator=generator)
    if channels == 3:
        turns = _colour_turns(1 + saturation, 2 * math.pi * hue).to(images.device)
        images = torch.einsum("nij,njhw->nihw", turns, images)
    brightness, contrast, weights = (
        part.view(n, 1, 1, 1).to(images.device)
        for part in (1 + brightness, 1 + contrast, NOISE * is_noisy)
    )
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = brightness * torch.lerp(mean, images, contrast)
    spread = images.std(dim=(1, 2, 3), keepdim=True, correction=0)
    return images + weights * spread * noise.to(images.device)


def _colour_turns(saturation, angles):
    """Return matrices (n, 3, 3) that scale and turn the colours of a fixed grey."""
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
    )
    sine, cosine = saturation * angles.sin(), saturation * angles.cos()
    zero, one = torch.zeros_like(sine), torch.ones_like(sine)
    rows = (one, zero, zero), (zero, cosine, -sine), (zero, sine, cosine)
    turns = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    return torch.linalg.inv(to_yiq) @ turns @ to_yiq


# Anomalies from elsewhere


class Labels(NamedTuple):
    """Labels (n,), the rows (m,) of the anomalies, and their masks (m, h, w) or None.

    Labels are +1 and -1; masks have the size of the images.
    """

    labels: np.ndarray
    rows: np.ndarray
    masks: np.ndarray | None


class Pool(NamedTuple):
    """Anomalies to draw from: images by their rows, and masks (m, h, w) or None."""

    images: Any
    masks: torch.Tensor | None

    def draw(self, n, *, generator):
        """Return images (n, c, h, w) and masks (n, h, w), ones where none are known."""
        rows = torch.randint(len(self.images), (n,), generator=generator)
        images = self.images[rows.numpy()]
        if self.masks is None:
            return images, images.new_ones(n, *images.shape[-2:])
        return images, self.masks[rows].to(images.device).float()


def _masks_in_size(y, size):
    """Return masks (n, h, w) in the size of images; no anomalous pixel gets lost."""
    masks = torch.from_numpy((y != 0).reshape(y.shape[:3]))
    if masks.shape[1:] != tuple(size):
        masks = F.adaptive_max_pool2d(masks[:, None].float(), tuple(size))[:, 0] > 0
    return masks.numpy()


class FCDD(NetworkDetector):
    """FCDD: a network of convolutions whose output is the explanation of its score.

    Each cell of the network's coarse output tells how anomalous the image is there, and
    their mean is the score of the image. The network learns from normal images and from
    anomalies, which need not look like those to be found: confetti on normal images, or
    any other pictures. A few labelled anomalies, best with masks, help more.

    Parameters
    ----------
    anomalies : array-like of shape (n, h, w, c) or (n, h, w), str or path, default=None
        Pictures to learn as anomalies ("outlier exposure"): images (uint8, or real
        numbers in [0, 1]), or a folder that is searched for image files. At most 2,000
        of them, drawn at random, are used. None drops confetti on normal images, unless
        `y` marks anomalies.
    anomaly_probability : float, default=0.5
        Share of the training images that are replaced by anomalies.
    architecture : {"vgg11", "cnn224", "cnn32", "cnn28"}, default="vgg11"
        The network: VGG-11 with batch normalisation up to its fourth pool, or a small
        one for images of about the size in its name. The small ones are always trained
        from random weights.
    width : int, default=None
        Number of channels of the first layer; the others grow with it. None takes that
        of the paper: 64, 8, 128 or 128.
    weights : str, path or None, default="imagenet"
        "imagenet" for the weights that come with the network, downloaded at the first
        fit; the file of a state dict (``.pth``, ``.safetensors``); None for random
        weights.
    loss : {"auto", "image", "pixel"}, default="auto"
        Whether the network learns which images are anomalous, or which pixels. "auto"
        takes pixels if `y` holds masks of anomalies. Confetti know the pixels that they
        change; where masks are unknown, all pixels of an anomaly count.
    local_contrast : bool, default=True
        Whether the mean of each image is taken from it, and the rest divided by its
        mean absolute value.
    augment : bool, default=True
        Whether training images are cropped, jittered and made noisy.
    optimizer : {"sgd", "adam"}, default="sgd"
        Stochastic gradient descent with Nesterov's momentum 0.9, or Adam.
    weight_decay : float, default=1e-4
        Weight decay of the optimiser.
    sigma : float, default=12.0
        Standard deviation of the Gaussians that make maps of the network's output, in
        pixels of an image of 224 pixels. It scales with the size of the images.
    image_score : {"mean", "max"}, default="mean"
        Score of an image: the mean of the network's cells, as in the paper, or their
        maximum, which suits small defects.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=2000
        Largest number of passes over the training images.
    learning_rate : float, default=1e-3
        Learning rate of Adam or of the gradient descent. That of the latter falls
        exponentially to a twentieth; Adam's is a tenth after two thirds of the epochs
        and a hundredth after five sixths.
    batch_size : int, default=128
        Number of images a batch, in training and in prediction.
    validation_fraction : float, default=0.1
        Share of the training images that is held out if there is an early stop.
    n_iter_no_change : int or None, default=None
        Stop after so many epochs without a lower loss of the images held out, and go
        back to the weights of the lowest. None trains all epochs on all images.
    contamination : float, default=0.01
        Share of the training images that ``predict`` is to call anomalous.
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network; the losses are always computed in float32.
    device : str, default="auto"
        Torch device. "auto" takes that of X if it is a tensor, else a GPU if there is
        one.
    random_state : int, RandomState instance or None, default=None
        Seed of the initial weights, the order of the images and the anomalies.
    warm_start : bool, default=False
        Whether a second fit continues the training of the first.
    checkpoint : str or path-like, default=None
        File to which the training writes its progress. A fit that was killed goes on
        from it if it is started again with the same parameters and images, and ends as
        if it had not been. A fit that comes to its end removes the file.
    checkpoint_every : int, default=10
        Number of epochs between two writings of the file.
    verbose : int, default=0
        Whether to show progress bars, in fit and in predictions that take a while.

    Attributes
    ----------
    network_ : torch.nn.Module
        The trained network; ``network_.field`` is the receptive field of its cells.
    channel_range_ : numpy.ndarray of shape (2, C)
        Lowest and highest value of each channel of the normal training images, after
        the normalisation of the contrast. They become 0 and 1.
    loss_curve_ : list of float
        Mean training loss of every epoch.
    validation_curve_ : list of float
        Validation loss of every epoch; empty without an early stop.
    n_iter_ : int
        Number of epochs trained.
    offset_ : float
        Threshold of ``score_samples`` below which ``predict`` calls an image anomalous.
    map_threshold_ : float
        Threshold of the maps above which ``segment`` marks a pixel.
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the columns; only where X was a data frame of rows.

    See Also
    --------
    DRAEM : Learns from synthetic defects, too, by repairing them.
    DeScarGAN : Learns from many labelled anomalies.

    Notes
    -----
    Images labelled -1, or with an anomalous pixel in their masks, are learned as
    anomalies. As in the paper, they take the place of confetti. With `anomalies` given
    as well, half of the replaced images are labelled anomalies. Thresholds come from
    the normal images. A mask of another size than the images is resized; a pixel is
    anomalous if a part of it is. Behind a step that crops, masks must be cropped alike.
    With masks, an image whose defect an augmentation has cropped away counts as normal;
    without, it counts as anomalous.

    An early stop judges images held out of the normal ones, with a fixed share of
    anomalies among them; labelled anomalies and `anomalies` are those of the training.

    Departures from the paper and its code:

    - Without masks of real anomalies the loss is that of whole images, as the paper
      says. The code trains on confetti by pixels, with masks that are all ones.
    - The Gaussians are sampled at the exact centres of the receptive fields (the code's
      even kernels double their middle) and divided by the map of ones. The code's maps
      are 3.69 times larger in the default setting, ripple by 3 % and fall off at the
      border; ranks within an image change most there.
    - The score is the mean of the cells, as in the code; the paper has their sum.
    - A training image is its own 240 pixels: half of the images are cropped to 224 /
      240 of their sides and enlarged. Confetti are dropped after that, so that none is
      cropped away, on a picture of the size of the images. All sizes scale.
    - A square beyond the border is cut off, not moved onto the border line, and each
      has a colour of its own. A field has at most six squares. They are turned without
      what lies about them. What stands beyond the border for the blur is unknown; here
      it is a mirror.
    - Brightness, contrast, saturation and hue change in a fixed order, the latter two
      in the YIQ colours, and values are not clamped afterwards.
    - The class-wise constants of the code are computed in fit, as ``channel_range_``.
    - With pretrained weights, the layers up to the third pool keep their parameters,
      but their batch normalisation goes by the batch in training and goes on to update
      its statistics, as in the code. The layers above begin with torchvision's
      initialisation of a VGG, the last one with torch's own; what the code takes is
      unknown. Without pretrained weights all layers are trained.
    - The network for 32 pixels lacks the batch normalisation of 256 parameters that
      the code never calls. In the small networks no rectifier stands between the last
      two convolutions.
    - ``max_epochs`` counts passes over the images, where an epoch of the code has ten;
      the learning rates fall as in the code, over whatever number of epochs.
    - Images are padded by replication to a multiple of the network's stride.
    - The minimum of the mean that the logarithm sees is 1e-6, and its gradient passes
      that; the code adds 1e-31.

    Pretrained weights see images with that normalisation, not with ImageNet's mean and
    standard deviation. VGG-11 takes images of one or three channels with them, and grey
    ones are three equal channels; without them, images of any number of channels.

    With the default network and images of 224 pixels, training wants a GPU; a smaller
    ``batch_size`` needs less memory. On a processor, images of 64 pixels,
    ``architecture="cnn32"``, ``width=64``, ``weights=None``, ``optimizer="adam"``,
    ``batch_size=16``, ``loss="pixel"``, ``sigma=20.0`` and about 1,500 batches
    (``max_epochs=500`` for 48 images) are a start. In so few batches the loss of whole
    images found the places of defects much worse. For 42 toothbrushes of MVTec AD,
    three seeds, image and pixel AUROC are 0.920 and 0.912, less than those of the
    distance to the mean image (0.969 and 0.965).

    References
    ----------
    P. Liznerski, L. Ruff, R. Vandermeulen, B. Franks, M. Kloft, K.-R. Müller.
    "Explainable deep one-class classification". ICLR 2021. arXiv 2007.01760.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import FCDD
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = FCDD(architecture="cnn32", width=4, weights=None, max_epochs=2)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "anomalies": ["array-like", str, os.PathLike, None],
        "anomaly_probability": [Interval(Real, 0, 1, closed="neither")],
        "architecture": [StrOptions(set(PLANS))],
        "width": [Interval(Integral, 1, None, closed="left"), None],
        "weights": [str, os.PathLike, None],
        "loss": [StrOptions({"auto", "image", "pixel"})],
        "local_contrast": ["boolean"],
        "augment": ["boolean"],
        "optimizer": [StrOptions({"sgd", "adam"})],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "sigma": [Interval(Real, 0.1, 1000, closed="both")],
        "image_score": [StrOptions({"mean", "max"})],
    }

    _judged_by = ("sigma", "image_score")

    def __init__(
        self,
        *,
        anomalies=None,
        anomaly_probability=0.5,
        architecture="vgg11",
        width=None,
        weights="imagenet",
        loss="auto",
        local_contrast=True,
        augment=True,
        optimizer="sgd",
        weight_decay=1e-4,
        sigma=12.0,
        image_score="mean",
        image_shape=None,
        max_epochs=2000,
        learning_rate=1e-3,
        batch_size=128,
        validation_fraction=0.1,
        n_iter_no_change=None,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        warm_start=False,
        checkpoint=None,
        checkpoint_every=10,
        verbose=0,
    ):
        self.anomalies = anomalies
        self.anomaly_probability = anomaly_probability
        self.architecture = architecture
        self.width = width
        self.weights = weights
        self.loss = loss
        self.local_contrast = local_contrast
        self.augment = augment
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.sigma = sigma
        self.image_score = image_score
        self.image_shape = image_shape
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.contamination = contamination
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Learn to tell normal images from anomalies.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Training images, uint8 in [0, 255] or real numbers in [0, 1].
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels, +1 for normal and -1 for anomalous images, or masks, True where
            anomalous. The network learns from both.

        Returns
        -------
        self : object
            The fitted detector.
        """
        return self._fit_to(X, y)

    @property
    def _is_pretrained(self):
        return self.architecture == "vgg11" and self.weights is not None

    def _build_network(self):
        channels = 3 if self._is_pretrained else self.image_shape_[2]
        network = FCDDNetwork(self.architecture, channels, self.width)
        if self._is_pretrained:
            network.layers[:N_PRETRAINED].requires_grad_(False)
        return network

    def _build_pretrained(self):
        if not self._is_pretrained:
            return self._build_network()
        backbone = make_backbone("vgg11_bn", (LAST_PRETRAINED,), self.weights)
        network = self._build_network()
        state = backbone.trunk.features.state_dict()
        network.layers[:N_PRETRAINED].load_state_dict(state)
        return network

    def _optimizer(self, part):
        trainable = [p for p in part.parameters() if p.requires_grad]
        settings = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "adam":
            return torch.optim.Adam(trainable, **settings, fused=True)
        return torch.optim.SGD(
            trainable, **settings, momentum=0.9, nesterov=True, fused=True
        )

    def _scheduler(self, optimizer):
        if self.optimizer == "adam":
            milestones = [round(share * self.max_epochs) for share in (2 / 3, 5 / 6)]
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
        gamma = 0.985 ** (200 / self.max_epochs)
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    def _check_settings(self):
        if self._continues:
            self._refuse_changes()
        if self._is_pretrained:
            check_backbone_takes("vgg11_bn", self.image_shape_)
            if self.width not in (None, PLANS["vgg11"].width):
                raise ValueError(
                    f"width={self.width} is not that of pretrained weights: width=None "
                    "takes theirs, and weights=None random ones."
                )
        elif self.weights not in (None, "imagenet"):
            raise ValueError(
                f"weights={os.fspath(self.weights)!r} are for architecture='vgg11'; "
                f"{self.architecture!r} is trained from random ones, weights=None."
            )

    def _refuse_changes(self):
        for name in OF_THE_FIRST_FIT:
            if getattr(self, name) != self._built_from[name]:
                raise ValueError(
                    f"With warm_start=True a fit goes on as the first one began, with "
                    f"{name}={self._built_from[name]!r}, not {getattr(self, name)!r}. "
                    "Set it back, or warm_start to False."
                )

    def _check_y(self, y, n_samples):
        labels = super()._check_y(y, n_samples)
        if labels is None:
            return None
        # not every type of a tensor is one of NumPy's
        y = np.asarray((y != 0).cpu() if isinstance(y, torch.Tensor) else y)
        rows, masks = np.flatnonzero(labels == -1), None
        if len(rows) and (y.ndim == 3 or (y.ndim == 4 and y.shape[3] == 1)):
            masks = _masks_in_size(y[rows], self.image_shape_[:2])
        return Labels(labels, rows, masks)

    def _training_images(self, X, labels):
        if labels is None:
            return super()._training_images(X, None)
        images, _ = super()._training_images(X, labels.labels)
        return images, labels if len(labels.rows) else None

    def _learn(self, images, labels, progress):
        sources = self.anomalies
        if sources is not None:
            sources = check_pictures("anomalies", sources)
        self._begin(images.device, progress, self._build_pretrained)
        if not progress.goes_on:
            self.channel_range_ = self._find_range(images)
        pools = []
        if labels is not None:
            own = ImageBatches(images.array, images.device, labels.rows)
            masks = None if labels.masks is None else torch.from_numpy(labels.masks)
            pools.append(Pool(own, masks))
        if sources is not None:
            others = some_pictures(
                sources,
                self.image_shape_,
                most=MAX_ANOMALIES,
                generator=seeded_generator(self._seed),
            )
            pools.append(Pool(ImageBatches(others, images.device), None))
        by_pixel = self.loss == "pixel" or (
            self.loss == "auto" and labels is not None and labels.masks is not None
        )
        losses = partial(self._losses, pools=pools, by_pixel=by_pixel)
        self._train(Samples(images, device=images.device), progress, losses=losses)
        return self._evaluate(images, maps_wanted=True)

    def _find_range(self, images):
        """Return the lowest and the highest value (2, C) of each channel."""

        def extremes(batch, generator):
            values = normalize_contrast(batch) if self.local_contrast else batch
            return torch.stack([values.amin(dim=(0, 2, 3)), values.amax(dim=(0, 2, 3))])

        found = [part.cpu().numpy() for _, part in self._in_batches(images, extremes)]
        lows, highs = np.stack(found, axis=1)
        return np.stack([lows.min(axis=0), highs.max(axis=0)])

    def _normalize(self, images):
        """Return images (b, c, h, w) as the network takes them."""
        if self.local_contrast:
            images = normalize_contrast(images)
        low, high = shared_tensor(self.channel_range_).to(images.device)
        low, high = low.view(-1, 1, 1), high.view(-1, 1, 1)
        spread = torch.where(high - low > 1e-6, high - low, 1.0)
        return (images - low) / spread

    def _cells(self, network, images):
        """Return how anomalous each cell (b, u, v) of images is."""
        return pseudo_huber(network(self._normalize(images)))

    def _upsample(self, cells, size):
        sigma = self.sigma * math.sqrt(math.prod(size)) / SIGMA_SIDE
        return upsample(cells, size, self.network_.field, sigma)

    def _disturb(self, images, pools, generator, is_training=True):
        """Return images with anomalies among them, which, and where they are so."""
        n, channels, *size = images.shape
        masks = images.new_zeros(n, *size)
        anomalous = torch.rand(n, generator=generator) < self.anomaly_probability
        if not is_training and n > 1:
            # few images held out would often be all normal, or all anomalous
            n_anomalous = min(max(1, round(self.anomaly_probability * n)), n - 1)
            anomalous = torch.randperm(n, generator=generator) < n_anomalous
        rows = torch.nonzero(anomalous)[:, 0]
        sources = torch.randint(max(1, len(pools)), rows.shape, generator=generator)
        images = images.clone()
        for number, pool in enumerate(pools):
            own = rows[sources == number]
            if len(own):
                images[own], masks[own] = pool.draw(len(own), generator=generator)
        if self.augment:
            images, masks = crop(images, masks, generator=generator)
        anomalous = anomalous.to(images.device)
        if pools:
            anomalous = masks.flatten(1).amax(dim=1) > 0
        elif len(rows):
            clean = images[rows]
            changes = confetti(
                len(rows), channels, *size, generator=generator, device=images.device
            )
            images[rows] = add_confetti(clean, changes)
            masks[rows] = (images[rows] != clean).any(dim=1).float()
        if self.augment:
            images = jitter(images, generator=generator)
        return images, anomalous, masks

    def _losses(self, network, batch, *, pools, by_pixel):
        images, anomalous, masks = self._disturb(
            batch.images, pools, batch.generator, network.training
        )
        cells = self._cells(network, images)
        if by_pixel:
            loss = pixel_loss(self._upsample(cells, images.shape[-2:]), masks)
        else:
            loss = image_loss(cells, anomalous)
        yield network, loss

    def _judge(self, images, *, maps_wanted, generator):
        cells = self._cells(self.network_, images)
        reduce = torch.amax if self.image_score == "max" else torch.mean
        maps = self._upsample(cells, images.shape[-2:]) if maps_wanted else None
        return reduce(cells, dim=(1, 2)), maps
