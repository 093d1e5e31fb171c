"""DRAEM: a discriminatively trained reconstruction (Zavrtanik et al., ICCV 2021).

Foreign textures are pasted into normal images under random masks. One network repairs
the corrupted image; a second one sees the repaired and the corrupted image side by side
and marks where they differ in a way that matters. Judging the pair, it learns a
distance from normality rather than the look of the pasted defects.
"""

import itertools
import os
from functools import partial
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval
from torch import nn

from .._fitting.loop import Samples, seeded_generator
from .._tensors.filters import mean_filter, scaled_size
from .._tensors.losses import focal_loss, ssim_loss
from .._tensors.networks import ConvUnit, conv_block, pad_to_multiple
from .._tensors.synthesis import (
    augment_textures,
    blend,
    perlin_masks,
    procedural_textures,
    rotate,
    uniform,
)
from ..base import NetworkDetector
from ..images import check_pictures, some_pictures

IMAGE_ROTATION_PROBABILITY = 0.3
MAX_TEXTURES = 500
PROCEDURAL_TEXTURES = 256


def _upsample(features):
    return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=True)


class ReconstructiveNetwork(nn.Module):
    """Autoencoder without skip connections, which repairs corrupted images."""

    def __init__(self, channels, width):
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.encoder = nn.ModuleList(map(conv_block, widths[:-1], widths[1:]))
        sides = [8 * width, 4 * width, 2 * width, width, width]
        self.up = nn.ModuleList(ConvUnit(side, side) for side in sides[:-1])
        self.decoder = nn.ModuleList(
            nn.Sequential(ConvUnit(wide, wide), ConvUnit(wide, narrow))
            for wide, narrow in itertools.pairwise(sides)
        )
        self.head = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.normal_(self.head.weight, 0.0, 0.02)

    def forward(self, images):
        features = self.encoder[0](images)  # (b, width, h, w)
        for block in self.encoder[1:]:
            features = block(F.max_pool2d(features, 2))
        # (b, 8 * width, h / 16, w / 16)
        for up, block in zip(self.up, self.decoder, strict=True):
            features = block(up(_upsample(features)))
        return self.head(features)  # (b, channels, h, w)


class DiscriminativeNetwork(nn.Module):
    """U-Net that marks the anomalous pixels of a repaired and a corrupted image."""

    def __init__(self, channels, width):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        self.encoder = nn.ModuleList(map(conv_block, [channels, *widths[:-1]], widths))
        skips = widths[-2::-1]  # 8, 8, 4, 2 and 1 times the width
        narrow = [8 * width, 4 * width, 2 * width, width, width]
        self.up = nn.ModuleList(map(ConvUnit, [8 * width, *narrow[:-1]], narrow))
        self.decoder = nn.ModuleList(
            conv_block(side + skip, side)
            for side, skip in zip(narrow, skips, strict=True)
        )
        self.head = nn.Conv2d(width, 2, 3, padding=1)
        nn.init.normal_(self.head.weight, 0.0, 0.02)

    def forward(self, pairs):
        features = self.encoder[0](pairs)  # (b, width, h, w)
        skips = []
        for block in self.encoder[1:]:
            skips.append(features)
            features = block(F.max_pool2d(features, 2))
        # (b, 8 * width, h / 32, w / 32)
        for up, block in zip(self.up, self.decoder, strict=True):
            features = block(torch.cat([up(_upsample(features)), skips.pop()], dim=1))
        return self.head(features)  # (b, 2, h, w)


class DRAEMNetwork(nn.Module):
    """Both networks of DRAEM, one after the other."""

    def __init__(self, channels, reconstructive_width, discriminative_width):
        super().__init__()
        self.reconstructive = ReconstructiveNetwork(channels, reconstructive_width)
        self.discriminative = DiscriminativeNetwork(2 * channels, discriminative_width)

    def forward(self, images):
        """Return the repaired images (b, c, h, w) and the logits (b, 2, h, w)."""
        height, width = images.shape[-2:]
        images = pad_to_multiple(images, 32)
        repaired = self.reconstructive(images)
        logits = self.discriminative(torch.cat([repaired, images], dim=1))
        return repaired[..., :height, :width], logits[..., :height, :width]


class DRAEM(NetworkDetector):
    """DRAEM: repair synthetic defects and learn to see what was repaired.

    Two networks are trained together on normal images into which foreign textures are
    pasted: a reconstructive network restores the normal image, and a discriminative
    network finds the pasted region in the pair of restored and corrupted image. No
    real defect is needed.

    Parameters
    ----------
    textures : array-like of shape (n, h, w, c) or (n, h, w), str or path, default=None
        Sources of the pasted patches: images (uint8, or real numbers in [0, 1]), or a
        folder that is searched for image files, such as the Describable Textures
        Dataset. At most 500 of them, drawn at random, are used. None takes procedural
        textures.
    anomaly_probability : float, default=0.5
        Share of the training images that are corrupted.
    opacity : tuple of float, default=(0.1, 1.0)
        Range of the weight of the pasted texture; 1 hides the image below.
    rotation : float, default=90.0
        Three in ten training images are rotated by up to this angle, in degrees. 0 is
        right for objects that always stand the same way.
    reconstructive_width, discriminative_width : int, default=128 and 64
        Number of channels of the first layers of the two networks; the deeper layers
        have up to eight times as many.
    pooling_size : int, default=21
        Side length of the mean filter between the map and the image score, in pixels of
        an image of 256 pixels. Scaled with the size of the images it becomes an odd
        number, from 3 on.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=700
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam, reduced to a fifth after 80 % and again after 90 % of the
        epochs.
    batch_size : int, default=8
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
        Seed of the initial weights, the order of the images and the defects.
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
        The two trained networks.
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
    SPADE : Needs no training where pretrained features are at hand.

    Notes
    -----
    Departures from the paper and its code:

    - The learning rate follows the code (a fifth at 80 % and 90 % of the epochs), not
      the paper (a tenth at epochs 400 and 600), since it scales with ``max_epochs``.
      The fixed threshold 0.5 of the noise and the range of rotations are the code's,
      too; the opacity begins at 0.1 as in the paper, not at 0.2.
    - An epoch is one permutation of the images instead of as many draws with
      replacement.
    - Cells of the noise are at least 8 pixels wide, as they are at 256 pixels in the
      paper; there are up to 32 a side.
    - An empty mask is drawn again, up to 10 times.
    - ``pooling_size`` scales with the size of the images.
    - The focal loss is computed from the logarithm of the softmax, without the code's
      smoothing of 1e-5, which stops the gradient where the network is surely wrong.
    - Images are padded by replication to a multiple of 32 pixels.

    The map is the probability of the anomalous class, the image score the maximum of
    the map after the mean filter.

    With the default widths the networks have 97 million parameters and want a GPU. On a
    processor, images of 64 pixels, ``reconstructive_width=16``,
    ``discriminative_width=16``, ``learning_rate=1e-3`` and about 2,400 batches of 8
    (``max_epochs=400`` for 48 images) are a good start; the noise then has up to 8
    cells a side. Objects that stand upright want a small ``rotation``, such as 15
    degrees: with 90 a narrow network reconstructs them poorly, and with 0 it had false
    alarms in the background of some images. Fewer batches leave reconstructions blurred
    and maps spotted.

    References
    ----------
    V. Zavrtanik, M. Kristan, D. Skočaj. "DRAEM - A discriminatively trained
    reconstruction embedding for surface anomaly detection". ICCV 2021, pp. 8330-8339.
    arXiv 2108.07610.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import DRAEM
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = DRAEM(
    ...     reconstructive_width=4, discriminative_width=4, max_epochs=2, random_state=0
    ... )
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "textures": ["array-like", str, os.PathLike, None],
        "anomaly_probability": [Interval(Real, 0, 1, closed="both")],
        "opacity": [tuple, list],
        "rotation": [Interval(Real, 0, 180, closed="both")],
        "reconstructive_width": [Interval(Integral, 1, None, closed="left")],
        "discriminative_width": [Interval(Integral, 1, None, closed="left")],
        "pooling_size": [Interval(Integral, 1, None, closed="left")],
    }

    _judged_by = ("pooling_size",)

    def __init__(
        self,
        *,
        textures=None,
        anomaly_probability=0.5,
        opacity=(0.1, 1.0),
        rotation=90.0,
        reconstructive_width=128,
        discriminative_width=64,
        pooling_size=21,
        image_shape=None,
        max_epochs=700,
        learning_rate=1e-4,
        batch_size=8,
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
        self.textures = textures
        self.anomaly_probability = anomaly_probability
        self.opacity = opacity
        self.rotation = rotation
        self.reconstructive_width = reconstructive_width
        self.discriminative_width = discriminative_width
        self.pooling_size = pooling_size
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
        return DRAEMNetwork(
            self.image_shape_[2], self.reconstructive_width, self.discriminative_width
        )

    def _scheduler(self, optimizer):
        milestones = [round(share * self.max_epochs) for share in (0.8, 0.9)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)

    def _check_settings(self):
        opacity = tuple(self.opacity)
        if len(opacity) != 2 or not 0 <= opacity[0] <= opacity[1] <= 1:
            raise ValueError(
                f"opacity={self.opacity!r} must be a range (low, high) within [0, 1]."
            )

    def _learn(self, images, labels, progress):
        sources = self.textures
        if sources is not None:
            sources = check_pictures("textures", sources)
        self._begin(images.device, progress)
        textures = self._load_textures(sources, seeded_generator(self._seed))
        losses = partial(self._losses, textures=textures)
        self._train(Samples(images, device=images.device), progress, losses=losses)
        return self._evaluate(images, maps_wanted=True)

    def _load_textures(self, sources, generator):
        """Return textures (n, c, h, w), uint8, in the images' size."""
        if sources is None:
            *size, channels = self.image_shape_
            shape = PROCEDURAL_TEXTURES, channels, *size
            return procedural_textures(*shape, generator=generator)
        textures = some_pictures(
            sources, self.image_shape_, most=MAX_TEXTURES, generator=generator
        )
        return torch.from_numpy(textures).permute(0, 3, 1, 2)

    def _synthesize(self, images, textures, generator):
        """Return rotated images, corrupted images and masks of what was corrupted."""
        n, _, height, width = images.shape
        device = images.device

        def rows_drawn(probability):
            drawn = torch.rand(n, generator=generator) < probability
            return torch.nonzero(drawn)[:, 0]

        turned = rows_drawn(IMAGE_ROTATION_PROBABILITY)
        if self.rotation and len(turned):
            most = self.rotation
            angles = uniform(-most, most, len(turned), generator=generator)
            images = images.index_copy(
                0, turned.to(device), rotate(images[turned], angles)
            )

        corrupted, masks = images.clone(), images.new_zeros(n, 1, height, width)
        chosen = rows_drawn(self.anomaly_probability)
        if n_chosen := len(chosen):
            sources = torch.randint(len(textures), (n_chosen,), generator=generator)
            textures = textures[sources].to(device) / 255
            textures = augment_textures(textures, generator=generator)
            opacity = uniform(*self.opacity, n_chosen, 1, 1, 1, generator=generator)
            masks[chosen] = perlin_masks(
                n_chosen, height, width, generator=generator, device=device
            )
            corrupted[chosen] = blend(
                images[chosen], textures, masks[chosen], opacity.to(device)
            )
        return images, corrupted, masks

    def _losses(self, network, batch, textures):
        images, corrupted, masks = self._synthesize(
            batch.images, textures, batch.generator
        )
        repaired, logits = network(corrupted)

        # the code guesses the range of SSIM from what the network returns
        lowest, highest = repaired.detach().amin(), repaired.detach().amax()
        data_range = torch.where(highest > 128, 255.0, 1.0) + (lowest < -0.5).float()
        yield (
            network,
            F.mse_loss(repaired, images)
            + ssim_loss(repaired, images, data_range=data_range)
            + focal_loss(logits, masks[:, 0].long()),
        )

    def _judge(self, images, *, maps_wanted, generator):
        _, logits = self.network_(images)
        maps = logits.float().softmax(dim=1)[:, 1]
        size = scaled_size(self.pooling_size, maps)
        return mean_filter(maps, size).amax(dim=(1, 2)), maps
