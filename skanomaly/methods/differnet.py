"""DifferNet: a normalizing flow on pooled features (Rudolph et al., WACV 2021).

A pretrained network describes an image by the means of its feature maps at a few sizes
of the image. An invertible network learns to map the descriptions of normal images to a
Gaussian. Images whose descriptions, under many rotations, end up far from its centre
are anomalous, and the gradient of their likelihood tells which pixels are to blame.
"""

import functools
import math
import os
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval
from torch import nn

from .._fitting.loop import Samples
from .._fitting.persistence import without_data
from .._tensors.filters import gaussian_blur
from .._tensors.synthesis import rotate
from ..backbones import (
    Backbone,
    check_backbone_takes,
    last_stage,
    make_backbone,
    outline,
)
from ..base import NetworkDetector


class Coupling(nn.Module):
    """Affine coupling: each half of a vector is scaled and shifted by the other."""

    def __init__(self, n_features, hidden_features, clamp):
        super().__init__()
        self.sizes = [n_features // 2, n_features - n_features // 2]
        self.clamp = clamp
        first, second = self.sizes
        self.net1 = _subnet(first, second, hidden_features)
        self.net2 = _subnet(second, first, hidden_features)

    def _scale_and_shift(self, net, half):
        scale, shift = net(half).chunk(2, dim=1)
        return self.clamp * 2 / math.pi * torch.atan(scale / self.clamp), shift

    def forward(self, vectors):
        """Return the mapped vectors (b, d) and the logarithms of the determinants."""
        first, second = vectors.split(self.sizes, dim=1)
        scale2, shift2 = self._scale_and_shift(self.net2, second)
        first = first * scale2.exp() + shift2
        scale1, shift1 = self._scale_and_shift(self.net1, first)
        second = second * scale1.exp() + shift1
        return torch.cat([first, second], 1), scale1.sum(dim=1) + scale2.sum(dim=1)

    def inverse(self, vectors):
        """Undo ``forward``."""
        first, second = vectors.split(self.sizes, dim=1)
        scale1, shift1 = self._scale_and_shift(self.net1, first)
        second = (second - shift1) * (-scale1).exp()
        scale2, shift2 = self._scale_and_shift(self.net2, second)
        first = (first - shift2) * (-scale2).exp()
        return torch.cat([first, second], dim=1)


def _subnet(n_in, n_out, hidden_features):
    return nn.Sequential(
        nn.Linear(n_in, hidden_features),
        nn.ReLU(),
        nn.Linear(hidden_features, hidden_features),
        nn.ReLU(),
        nn.Linear(hidden_features, hidden_features),
        nn.ReLU(),
        nn.Linear(hidden_features, 2 * n_out),
    )


class Flow(nn.Module):
    """Invertible network: fixed permutations and coupling blocks in turn.

    Parameters
    ----------
    n_features : int
        Length of the vectors.
    n_blocks : int
        Number of coupling blocks.
    hidden_features : int
        Width of the networks in the blocks.
    clamp : float
        Bound of the logarithm of a block's scales.
    """

    def __init__(self, n_features, n_blocks, hidden_features, clamp):
        super().__init__()
        self.blocks = nn.ModuleList(
            Coupling(n_features, hidden_features, clamp) for _ in range(n_blocks)
        )
        orders = np.stack(
            [np.random.RandomState(k).permutation(n_features) for k in range(n_blocks)]
        )
        self.register_buffer("orders", torch.from_numpy(orders))
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))

    def forward(self, vectors):
        """Return latent vectors (b, d) and the logarithms of the determinants (b,).

        The determinants are those of the blocks, without the constant standardisation.
        """
        vectors = (vectors - self.mean) / self.std
        log_determinants = 0.0
        for order, block in zip(self.orders, self.blocks, strict=True):
            vectors, log_determinant = block(vectors[:, order])
            log_determinants = log_determinants + log_determinant
        return vectors, log_determinants

    def inverse(self, latent):
        """Return the vectors (b, d) that ``forward`` maps to some latent ones."""
        for order, block in reversed(list(zip(self.orders, self.blocks, strict=True))):
            latent = block.inverse(latent)[:, order.argsort()]
        return latent * self.std + self.mean


class DifferNetwork(nn.Module):
    """Frozen backbone and flow."""

    def __init__(self, backbone, flow, n_scales):
        super().__init__()
        self.backbone = backbone
        self.flow = flow
        self.n_scales = n_scales

    def forward(self, images):
        """Return latent vectors (b, d) and the logarithms of the determinants (b,)."""
        return self.flow(describe(self.backbone, images, self.n_scales))


def describe(backbone, images, n_scales):
    """Return the means of a backbone's feature maps at some scales of the images.

    Parameters
    ----------
    backbone : Backbone
        A backbone of one layer.
    images : torch.Tensor of shape (b, c, h, w)
        Images.
    n_scales : int
        Number of scales; each takes every second pixel of the one before.

    Returns
    -------
    torch.Tensor of shape (b, n_scales * channels)
        Means, the largest scale first.
    """
    means = []
    for scale in range(n_scales):
        size = [max(1, side // 2**scale) for side in images.shape[-2:]]
        (features,) = backbone(F.interpolate(images, size)).values()
        means.append(features.mean(dim=(2, 3)))
    return torch.cat(means, dim=1)


class DifferNet(NetworkDetector):
    """DifferNet: the density of an image's features by a normalizing flow.

    A flow learns the distribution of a pretrained network's features of normal images.
    An image is anomalous if its features, averaged over rotations of the image, are
    unlikely. Only the flow is trained.

    Parameters
    ----------
    n_scales : int, default=3
        Number of sizes that an image is described at, each half of the one before.
    n_blocks : int, default=8
        Number of coupling blocks of the flow.
    hidden_features : int, default=2048
        Width of the networks in the blocks. A few hundred do for small sets.
    clamp : float, default=3.0
        Bound of the logarithm of a block's scales.
    n_transforms : int, default=4
        Number of rotated views of each image in an epoch.
    n_transforms_test : int, default=64
        Number of equally spaced angles: of the views that scores and maps are averaged
        over, and from which training draws. Time and memory grow with it; 8 to 16 give
        a little less stable scores.
    standardize : bool, default=False
        Whether each feature is scaled to zero mean and unit variance first.
    weight_decay : float, default=1e-5
        Weight decay of Adam.
    backbone : str, default="alexnet"
        Name of a network of torchvision, "efficientnet_lite0", or "timm/NAME";
        :class:`~skanomaly.backbones.Backbone` says more.
    layer : str, default=None
        The layer whose features are pooled, such as "layer3". None takes the last one
        before the classifier.
    weights : str, path or None, default="imagenet"
        "imagenet" for the weights that come with the network, downloaded at the first
        fit; the file of a state dict (``.pth``, ``.safetensors``); None for random
        weights.
    sigma : float, default=3.0
        Standard deviation of the Gaussian filter of the gradients in pixels. It does
        not scale with the images: the smallest scale looks at every fourth pixel of any
        image, and a filter much narrower than that leaves a grid of dots.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=192
        Largest number of passes over the training images.
    learning_rate : float, default=2e-4
        Learning rate of Adam.
    batch_size : int, default=24
        Number of images a batch in training, and of views in prediction.
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
        Seed of the initial weights, the order of the images and the views.
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
        The backbone and the flow; ``network_.flow.inverse`` inverts it.
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
    SPADE : Compares features with stored ones, without training.

    Notes
    -----
    Departures from the paper and its code:

    - Training draws rotations from the equally spaced angles of prediction, so that
      the backbone sees each view once for all epochs (and once more for the
      thresholds, with gradients). There is no other augmentation.
    - Scores are computed after the last epoch. The code reports the best epoch on the
      test set.
    - The flow has no batch normalisation; the code builds one that it never calls.
    - The clamp's constant is 2 / pi, which the code rounds to 0.636.
    - Maps are rotated back by bilinear interpolation. They average absolute gradients
      over rotations and channels, without the code's squares, and are those of pixels
      in [0, 1], before the backbone's scaling.

    Images are not resized. With AlexNet and three scales their shorter side must
    measure 252 pixels or more; the paper has 448.

    On a processor, images of 128 pixels, ``backbone="resnet18"``, ``layer="layer3"``,
    ``n_scales=1``, ``n_blocks=4``, ``hidden_features=256``, ``n_transforms_test=4``,
    ``standardize=True`` and ``max_epochs=60`` are a good start. Images so small have
    little to say at half their size, and rotations by right angles leave no corners
    empty. ``n_transforms_test=16``, which planted defects chose for magnetic tiles of
    64 pixels, takes four times as long to score: three seeds have an image AUROC of
    0.856 there, and of 0.818 with 4.

    References
    ----------
    M. Rudolph, B. Wandt, B. Rosenhahn. "Same same but DifferNet: semi-supervised
    defect detection with normalizing flows". WACV 2021, pp. 1907-1916.
    arXiv 2008.12577.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import DifferNet
    >>> X = np.random.default_rng(0).uniform(size=(16, 64, 64, 1))
    >>> detector = DifferNet(
    ...     backbone="resnet18", layer="layer1", weights=None, n_scales=2, n_blocks=2,
    ...     hidden_features=16, n_transforms_test=4, max_epochs=2
    ... )
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 64, 64)
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "n_scales": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 1, None, closed="left")],
        "hidden_features": [Interval(Integral, 1, None, closed="left")],
        "clamp": [Interval(Real, 0, None, closed="neither")],
        "n_transforms": [Interval(Integral, 1, None, closed="left")],
        "n_transforms_test": [Interval(Integral, 1, None, closed="left")],
        "standardize": ["boolean"],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "backbone": [str],
        "layer": [str, None],
        "weights": [str, os.PathLike, None],
        "sigma": [Interval(Real, 0, 1000, closed="both")],
    }

    _judged_by = ("n_transforms_test", "sigma")

    def __init__(
        self,
        *,
        n_scales=3,
        n_blocks=8,
        hidden_features=2048,
        clamp=3.0,
        n_transforms=4,
        n_transforms_test=64,
        standardize=False,
        weight_decay=1e-5,
        backbone="alexnet",
        layer=None,
        weights="imagenet",
        sigma=3.0,
        image_shape=None,
        max_epochs=192,
        learning_rate=2e-4,
        batch_size=24,
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
        self.n_scales = n_scales
        self.n_blocks = n_blocks
        self.hidden_features = hidden_features
        self.clamp = clamp
        self.n_transforms = n_transforms
        self.n_transforms_test = n_transforms_test
        self.standardize = standardize
        self.weight_decay = weight_decay
        self.backbone = backbone
        self.layer = layer
        self.weights = weights
        self.sigma = sigma
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

    @property
    def _layers(self):
        return (last_stage(self.backbone) if self.layer is None else self.layer,)

    def _build_network(self):
        flow = Flow(
            _n_features(self.backbone, self._layers, self.n_scales, self.image_shape_),
            self.n_blocks,
            self.hidden_features,
            self.clamp,
        )
        with without_data():
            backbone = Backbone(self.backbone, self._layers)
        return DifferNetwork(backbone, flow, self.n_scales)

    def _optimizer(self, part):
        return torch.optim.Adam(
            part.parameters(),
            lr=self.learning_rate,
            betas=(0.8, 0.8),
            eps=1e-4,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def _check_settings(self):
        check_backbone_takes(self.backbone, self.image_shape_)
        _n_features(self.backbone, self._layers, self.n_scales, self.image_shape_)

    def _learn(self, images, labels, progress):
        self._begin(images.device, progress, self._build_pretrained)
        found = [views for _, views in self._in_batches(images, self._describe_views)]
        # what inference mode made takes no part in a training
        descriptions = torch.cat(found).clone()  # (n, n_transforms_test, d)
        if self.standardize and not progress.goes_on:
            std, mean = torch.std_mean(descriptions.flatten(0, 1), dim=0)
            self.network_.flow.mean.copy_(mean)
            self.network_.flow.std.copy_(torch.where(std < 1e-6, 1.0, std))
        self._train(Samples(descriptions, device=images.device), progress)
        return self._evaluate(images, maps_wanted=True)

    def _build_pretrained(self):
        backbone = make_backbone(self.backbone, self._layers, self.weights)
        network = self._build_network()
        network.backbone = backbone
        return network

    def _describe_views(self, images, generator):
        """Return the descriptions (b, n_transforms_test, d) of rotated images."""
        found = [
            describe(self.network_.backbone, views, self.n_scales).cpu()
            for views, _, _ in self._views(images)
        ]
        return torch.cat(found).unflatten(0, (-1, len(images))).transpose(0, 1)

    def _views(self, images):
        """Yield rotated images, some at a time, whose they are and their angles."""
        step = 360 / self.n_transforms_test
        for chunk in gen_batches(len(images) * self.n_transforms_test, self.batch_size):
            numbers = torch.arange(chunk.start, chunk.stop)
            owners, degrees = numbers % len(images), numbers // len(images) * step
            yield rotate(images[owners], degrees, mode="nearest"), owners, degrees

    def _losses(self, network, batch):
        n_images, n_views = batch.images.shape[:2]
        shape = n_images, self.n_transforms
        drawn = torch.randint(n_views, shape, generator=batch.generator)
        views = batch.images[torch.arange(n_images)[:, None], drawn].flatten(0, 1)
        latent, log_determinants = network.flow(views)
        yield network.flow, _negative_log_likelihood(latent, log_determinants).mean()

    def _judge(self, images, *, maps_wanted, generator):
        maps = images.new_zeros(len(images), *images.shape[-2:])
        degrees = images.new_zeros(len(images))
        for views, owners, angles in self._views(images):
            owners = owners.to(images.device)
            if maps_wanted:
                latent, gradients = self._latent_and_gradients(views)
                blame = gaussian_blur(rotate(gradients, -angles), self.sigma)
                maps.index_add_(0, owners, blame.abs().mean(dim=1))
            else:
                latent, _ = self.network_(views)
            degrees.index_add_(0, owners, latent.float().square().mean(dim=1))
        return degrees / self.n_transforms_test, maps / self.n_transforms_test

    def _latent_and_gradients(self, views):
        """Return latent vectors (b, d) and the gradients (b, c, h, w) of the loss."""
        with torch.inference_mode(False), torch.enable_grad():
            views = views.clone().requires_grad_()
            latent, log_determinants = self.network_(views)
            loss = _negative_log_likelihood(latent, log_determinants).sum()
            (gradients,) = torch.autograd.grad(loss, views)
            return latent.detach(), gradients

    def _why_not_exported(self):
        return "its maps are gradients, and ONNX graphs only go forward"


@functools.cache
def _n_features(backbone, layers, n_scales, image_shape):
    """Return how many features describe images of a shape (h, w, c)."""
    height, width, channels = image_shape
    try:
        with torch.device("meta"):
            images = torch.empty(1, channels, height, width)
            features = describe(outline(backbone, layers), images, n_scales)
    except RuntimeError as error:
        raise ValueError(
            f"Images of {height} x {width} pixels are too small for backbone="
            f"{backbone!r} and n_scales={n_scales}. ResizeImages makes them larger."
        ) from error
    except ValueError as error:  # the images fit, their smaller scales do not
        raise ValueError(
            f"n_scales={n_scales} halves images of {height} x {width} pixels. {error} "
            "n_scales=1 leaves them as they are."
        ) from None
    return features.shape[1]


def _negative_log_likelihood(latent, log_determinants):
    """Return the loss of each vector (b,), up to a constant, per dimension."""
    squares = latent.float().square().sum(dim=1)
    return (squares / 2 - log_determinants.float()) / latent.shape[1]
