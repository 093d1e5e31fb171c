"""SCADN: semantic context from normal samples (Yan et al., AAAI 2021).

Stripes of several widths hide half of a normal image; a generator repaints them while a
critic judges the result. Where the repainted image differs from the input, something is
there that normal context does not explain.
"""

from numbers import Integral, Real

import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._fitting.persistence import shared_tensor
from .._map_scores import MapScoredDetector
from .._tensors.masking import stripe_masks
from .._tensors.networks import (
    PatchCritic,
    adversarial_loss,
    critic_loss,
    instance_norm,
    pad_to_multiple,
)

HIDDEN_WEIGHT = 4.0
SMALLEST_SIDE = 32


def _normalised(convolution):
    """Return a convolution with its initial weights, a normalisation and ReLU."""
    nn.init.normal_(convolution.weight, 0.0, 0.02)
    nn.init.zeros_(convolution.bias)
    norm = instance_norm(convolution.out_channels, affine=False)
    return [convolution, norm, nn.ReLU(inplace=True)]


class ResidualBlock(nn.Module):
    """Two convolutions, the first of them dilated, around which the input passes."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(2),
            *_normalised(nn.Conv2d(width, width, 3, dilation=2)),
            nn.ReflectionPad2d(1),
            *_normalised(nn.Conv2d(width, width, 3))[:2],
        )

    def forward(self, features):
        return features + self.layers(features)


class StripeGenerator(nn.Module):
    """Generator without skip connections that repaints white stripes."""

    def __init__(self, channels, width, n_blocks):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), *_normalised(nn.Conv2d(channels, width, 7))]
        for wide in (width, 2 * width, 4 * width):
            layers += _normalised(nn.Conv2d(wide, 2 * wide, 4, stride=2, padding=1))
        layers += [ResidualBlock(8 * width) for _ in range(n_blocks)]
        for wide in (8 * width, 4 * width, 2 * width):
            layers += [
                nn.Upsample(scale_factor=2),
                *_normalised(nn.Conv2d(wide, wide // 2, 3, padding=1)),
            ]
        layers += [nn.ReflectionPad2d(3), _normalised(nn.Conv2d(width, channels, 7))[0]]
        self.layers = nn.Sequential(*layers)

    def forward(self, images, masks):
        """Return the repainted images (b, c, h, w); masks are (b or 1, 1, h, w)."""
        height, width = images.shape[-2:]
        masked = images * (1 - masks) + masks
        painted = self.layers(pad_to_multiple(masked, 8, minimum=SMALLEST_SIDE))
        return (painted.tanh() + 1)[..., :height, :width] / 2


class SCADN(MapScoredDetector):
    """SCADN: hide stripes of an image and let a generator repaint them.

    A generator learns on normal images to repaint vertical and horizontal stripes of
    several widths, against a critic that tells real from repainted images. A pixel is
    anomalous if it differs from what the generator paints there.

    Parameters
    ----------
    stripes : tuple of int, default=(4, 8, 16)
        Even numbers of stripes that an image is divided into; every other stripe is
        hidden.
    width : int, default=64
        Number of channels of the generator's first layer; the inner layers have eight
        times as many.
    n_blocks : int, default=8
        Number of residual blocks of the generator.
    critic_width : int, default=64
        Number of channels of the critic's first layer.
    adversarial_weight : float, default=0.001
        Weight of the adversarial loss of the generator.
    image_score : {"mean", "max"}, default="mean"
        What the score of an image is: "mean" is the mean of the map, as in the paper;
        "max" is the maximum of the map, which finds small defects.
    smoothing_size : int, default=1
        Side length of the mean filter of the maps, in pixels of an image of 256 pixels.
        Scaled with the size of the images it becomes an odd number, from 3 on; 1 leaves
        them as they are.
    reference : {"none", "training"}, default="none"
        What is subtracted from the maps: nothing, or the mean map of the training
        images.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=200
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam for the generator; the critic has a tenth.
    batch_size : int, default=4
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
        Seed of the initial weights, the order of the images and the masks.
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
    network_ : torch.nn.ModuleDict
        The trained generator and critic.
    stripe_errors_ : numpy.ndarray of shape (n_stripes,)
        Mean error of the training images for each member of ``stripes``.
    mean_map_ : numpy.ndarray of shape (H, W)
        Mean map of the training images before it is smoothed; only with
        ``reference="training"``.
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
    RIAD : Hides square cells.

    Notes
    -----
    Each image is repainted under four masks for each number of stripes. A pixel keeps
    the larger error of the two masks that hide it, and an image the map of the number
    of stripes whose mean error exceeds that of the training images most.

    Departures from the paper and its code:

    - The last epoch counts. The code keeps the weights of the lowest error on the
      training images, looked at every tenth epoch.
    - The critic judges the repainted image again after its own step.
    - The error of the hidden half of the pixels is divided by one half, also where
      stripes do not divide a side; an incomplete last batch is used.
    - Stripes are counted, not measured in pixels. The defaults are the widths of 128,
      64 and 32 pixels that the code has for images of 512.
    - Images are padded by replication to a multiple of 8 and at least 32 pixels.

    On a processor, images of 64 pixels, ``width=16``, ``n_blocks=4``,
    ``critic_width=16``, ``learning_rate=5e-4`` and ``max_epochs=50`` are a good start
    for some fifty images. For small defects take ``image_score="max"`` and
    ``smoothing_size=21``.

    References
    ----------
    X. Yan, H. Zhang, X. Xu, X. Hu, P. Heng. "Learning semantic context from normal
    samples for unsupervised anomaly detection". AAAI 2021, pp. 3110-3118.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import SCADN
    >>> X = np.random.default_rng(0).uniform(size=(8, 32, 32, 1))
    >>> detector = SCADN(width=4, n_blocks=1, critic_width=4, max_epochs=2)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **MapScoredDetector._parameter_constraints,
        "stripes": [tuple, list],
        "width": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 1, None, closed="left")],
        "critic_width": [Interval(Integral, 1, None, closed="left")],
        "adversarial_weight": [Interval(Real, 0, None, closed="left")],
        "image_score": [StrOptions({"mean", "max"})],
    }

    def __init__(
        self,
        *,
        stripes=(4, 8, 16),
        width=64,
        n_blocks=8,
        critic_width=64,
        adversarial_weight=0.001,
        image_score="mean",
        smoothing_size=1,
        reference="none",
        image_shape=None,
        max_epochs=200,
        learning_rate=1e-4,
        batch_size=4,
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
        self.stripes = stripes
        self.width = width
        self.n_blocks = n_blocks
        self.critic_width = critic_width
        self.adversarial_weight = adversarial_weight
        self.image_score = image_score
        self.smoothing_size = smoothing_size
        self.reference = reference
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

    def _build_network(self):
        channels = self.image_shape_[2]
        return nn.ModuleDict(
            {
                "generator": StripeGenerator(channels, self.width, self.n_blocks),
                "critic": PatchCritic(channels, self.critic_width),
            }
        )

    def _optimizer(self, part):
        rate = self.learning_rate / (10 if part is self.network_["critic"] else 1)
        return torch.optim.Adam(
            part.parameters(), lr=rate, betas=(0.0, 0.9), fused=True
        )

    def _check_settings(self):
        counts = self.stripes
        valid = (isinstance(n, Integral) and n > 0 and n % 2 == 0 for n in counts)
        if not counts or not all(valid):
            raise ValueError(
                f"stripes={counts!r} must hold one or more even numbers >= 2."
            )

    def _survey(self, images):
        total = 0.0
        for _, errors in self._in_batches(images, self._errors):
            total = total + errors.mean(dim=(2, 3)).sum(dim=0)  # (n_stripes,)
        self.stripe_errors_ = (total / len(images)).cpu().numpy()
        super()._survey(images)

    def _masks(self, images):
        """Return the masks of every number of stripes: (n_stripes, 4, 1, h, w)."""
        return torch.stack(
            [
                stripe_masks(*images.shape[-2:], n_stripes=n, device=images.device)
                for n in self.stripes
            ]
        )

    def _losses(self, network, batch):
        images = batch.images
        masks = self._masks(images).flatten(0, 1)
        drawn = torch.randint(len(masks), (len(images),), generator=batch.generator)
        masks = masks[drawn]  # (b, 1, h, w)
        painted = network["generator"](images, masks)

        yield (
            network["critic"],
            critic_loss(network["critic"], images, painted.detach()),
        )

        visible = F.mse_loss(painted * (1 - masks), images * (1 - masks))
        hidden = F.mse_loss(painted * masks, images * masks)
        yield (
            network["generator"],
            2 * (visible + HIDDEN_WEIGHT * hidden)  # half of the pixels are hidden
            + self.adversarial_weight * adversarial_loss(network["critic"], painted),
        )

    def _errors(self, images, generator):
        """Return the errors of every number of stripes: (b, n_stripes, h, w)."""
        errors = []
        for masks in self._masks(images):
            pairs = images.repeat(4, 1, 1, 1), masks.repeat_interleave(len(images), 0)
            squares = (self.network_["generator"](*pairs) - pairs[0]).square()
            hidden = squares.mean(dim=1) * pairs[1][:, 0]  # (4 * b, h, w)
            errors.append(hidden.unflatten(0, (4, -1)).amax(dim=0))
        return torch.stack(errors, dim=1)

    def _raw(self, images, generator):
        errors = self._errors(images, generator)
        usual = shared_tensor(self.stripe_errors_).to(errors.device)
        chosen = (errors.mean(dim=(2, 3)) - usual).argmax(dim=1)  # (b,)
        maps = errors[torch.arange(len(errors)), chosen]
        return maps.mean(dim=(1, 2)), maps
