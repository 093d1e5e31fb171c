"""Autoencoders (Bergmann et al., VISAPP 2019), the baselines of reconstruction.

Normal images pass through a narrow code and are rebuilt from it. What was never seen in
training should come back badly, so that the residual marks it. The residual is a
squared difference or, since that fires on misplaced edges and misses defects of equal
brightness, one minus the structural similarity.
"""

import itertools
import math
from functools import partial
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._tensors.filters import mean_filter, scaled_size
from .._tensors.losses import gaussian_divergence, ssim_map
from .._tensors.networks import pad_to_multiple
from ..base import NetworkDetector

CODE_GRID = 8
SLOPE = 0.2


def _activated(convolution):
    return [convolution, nn.LeakyReLU(SLOPE, inplace=True)]


def _same(wide, narrow):
    return _activated(nn.Conv2d(wide, narrow, 3, padding=1))


def _initialise(layer):
    """Draw weights that keep the variance through leaky rectifiers (He et al.)."""
    n_inputs = layer.weight.numel() / layer.out_channels
    if isinstance(layer, nn.ConvTranspose2d):
        n_inputs /= math.prod(layer.stride)
    gain = nn.init.calculate_gain("leaky_relu", SLOPE)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(n_inputs))
    nn.init.zeros_(layer.bias)


class Codec(nn.Module):
    """Encoder to a code without spatial extent, and decoder.

    Parameters
    ----------
    shape : tuple of int
        Height, width and channels of the images.
    width : int
        Number of channels of the first layer; the inner layers have up to four times as
        many.
    code_size, n_codes : int
        Length of the code that is decoded, and how many of them the encoder returns.
    """

    def __init__(self, shape, width, code_size, n_codes=1):
        super().__init__()
        self.code_size = code_size
        *size, channels = shape
        n_halvings = max(0, round(math.log2(min(size) / CODE_GRID)))
        self.stride = 2**n_halvings
        grid = [-(-side // self.stride) for side in size]

        # stages by which the side is halved, and the convolutions behind each of them
        sides = [width] * (n_halvings - 2) + [2 * width, 4 * width]
        sides = sides[-n_halvings:] if n_halvings else []
        layers, wide = [], channels
        for i, narrow in enumerate(sides):
            layers += _activated(nn.Conv2d(wide, narrow, 4, stride=2, padding=1))
            wide = narrow
            if n_halvings - i in (2, 3):
                layers += _same(wide, wide)
        layers += [*_same(wide, 2 * width), *_same(2 * width, width)]
        self.encoder = nn.Sequential(
            *layers, nn.Conv2d(width, n_codes * code_size, grid)
        )

        layers = [
            *_activated(nn.ConvTranspose2d(code_size, width, grid, stride=grid)),
            *_same(width, 2 * width),
            *_same(2 * width, 4 * width),
        ]
        sides = [4 * width, 2 * width, *[width] * (n_halvings - 2)][:n_halvings]
        for i, (wide, narrow) in enumerate(itertools.pairwise(sides)):
            layers += _activated(nn.ConvTranspose2d(wide, narrow, 4, 2, padding=1))
            if i < 2:
                layers += _same(narrow, narrow)
        last = (
            nn.ConvTranspose2d(sides[-1], channels, 4, 2, padding=1)
            if sides
            else nn.Conv2d(4 * width, channels, 3, padding=1)
        )
        self.decoder = nn.Sequential(*layers, last, nn.Sigmoid())
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                _initialise(layer)

    def encode(self, images):
        """Return the codes of images: (b, n_codes * code_size)."""
        return self.encoder(pad_to_multiple(images, self.stride)).flatten(1)

    def decode(self, codes, size):
        """Return images (b, c, h, w) of a size (h, w) with values in [0, 1]."""
        images = self.decoder(codes[..., None, None])
        return images[..., : size[0], : size[1]]

    def forward(self, images):
        return self.decode(self.encode(images), images.shape[-2:])


class _ReconstructionDetector(NetworkDetector):
    """What the autoencoders share: crops, residual maps and scores."""

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "patch_size": [Interval(Integral, 1, None, closed="left"), None],
        "code_size": [Interval(Integral, 1, None, closed="left")],
        "width": [Interval(Integral, 1, None, closed="left")],
        "smoothing_size": [Interval(Integral, 1, None, closed="left")],
    }

    _weight_decay = 1e-5

    @property
    def _patch_shape(self):
        """Shape (h, w, c) of what the network sees."""
        *size, channels = self.image_shape_
        if self.patch_size is not None:
            size = [min(side, self.patch_size) for side in size]
        return (*size, channels)

    def _crop(self, images, generator):
        """Cut a patch out of each image, at a place drawn at random."""
        height, width, _ = self._patch_shape
        if (height, width) == images.shape[-2:]:
            return images
        n = len(images)
        free = images.shape[-2] - height, images.shape[-1] - width
        tops, lefts = (
            torch.randint(side + 1, (n,), generator=generator).tolist() for side in free
        )
        return torch.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, top, left in zip(images, tops, lefts, strict=True)
            ]
        ).contiguous(memory_format=torch.channels_last)

    def _maps(self, images, residuals):
        """Return residuals (b, h, w) of images, averaged over overlapping crops."""
        height, width, _ = self._patch_shape
        rows, columns = (
            _starts(side, patch)
            for side, patch in zip(images.shape[-2:], (height, width), strict=True)
        )
        total = images.new_zeros(len(images), *images.shape[-2:])
        counts = images.new_zeros(images.shape[-2:])
        places = [
            (..., slice(top, top + height), slice(left, left + width))
            for top, left in itertools.product(rows, columns)
        ]
        n_together = max(1, self.batch_size // len(images))
        for chunk in gen_batches(len(places), n_together):
            crops = torch.cat([images[place] for place in places[chunk]])
            found = residuals(crops).split(len(images))
            for place, own in zip(places[chunk], found, strict=True):
                total[place] += own
                counts[place] += 1
        return total / counts

    def _degrees(self, maps):
        """Return the degrees of anomaly (b,) of images with such maps."""
        size = scaled_size(self.smoothing_size, maps)
        return mean_filter(maps, size, padding="none").amax(dim=(1, 2))


def _starts(side, patch):
    """Return where patches begin that overlap by three quarters and cover a side."""
    starts = list(range(0, side - patch + 1, max(1, patch // 4)))
    return starts if starts[-1] == side - patch else [*starts, side - patch]


class Autoencoder(_ReconstructionDetector):
    """Convolutional autoencoder with squared or structural residuals.

    A network rebuilds normal images from a short code. An image is anomalous where it
    differs from its reconstruction.

    Parameters
    ----------
    loss : {"ssim", "l2"}, default="ssim"
        Structural similarity or squared differences, for the training and the maps.
    ssim_constants : tuple of float, default=(1e-4, 9e-4)
        Stabilisers of the structural similarity. The paper's text has (0.01, 0.03),
        which damp regions of low contrast such as noise.
    code_size : int, default=100
        Length of the code. 500 is the choice for objects of 256 pixels.
    width : int, default=32
        Number of channels of the first layer; the inner layers have up to four times as
        many.
    patch_size : int, default=None
        Side length in pixels of the crops that the network sees, for textures larger
        than it. Prediction averages overlapping crops. None takes whole images.
    smoothing_size : int, default=11
        Side length of the mean filter between the map and the image score, in pixels of
        an image of 256 pixels. Scaled with the size of the images it becomes an odd
        number, from 3 on.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=200
        Largest number of passes over the training images.
    learning_rate : float, default=2e-4
        Learning rate of Adam.
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
        Seed of the initial weights, the order of the images and the crops.
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
        The trained network.
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
    VariationalAutoencoder : The code is a distribution.
    RIAD : Hides what it rebuilds, so that defects cannot be copied.

    Notes
    -----
    The network halves the image until its shorter side is about 8 pixels; for 128
    pixels it is that of the paper, for 256 that of public ports. Other sizes are padded
    by replication.

    The initial weights, which no source gives, keep the variance from layer to layer
    [2]_. With the smaller ones of torch the squared loss can stay for a hundred epochs
    where all reconstructions are alike.

    Public ports train on 10,000 random crops of the images, which are also rotated and
    flipped. Here an epoch takes one crop of each image, and there is no augmentation.
    The paper defines no score of an image; here it is the maximum of the smoothed map.
    The structural similarity weighs windows of 11 pixels by a Gaussian of 1.5, as the
    libraries do that public code uses; the paper names the side of the window only. It
    mirrors the image at its border. There is no early stop
    unless ``n_iter_no_change`` asks for it; public code has 20 or 12 epochs.

    On a processor, images of 64 pixels, ``code_size=32``, ``batch_size=16`` and
    ``learning_rate=1e-3`` are a good start.

    References
    ----------
    .. [1] P. Bergmann, S. Löwe, M. Fauser, D. Sattlegger, C. Steger. "Improving
       unsupervised defect segmentation by applying structural similarity to
       autoencoders". VISAPP 2019, pp. 372-380. arXiv 1807.02011.
    .. [2] K. He, X. Zhang, S. Ren, J. Sun. "Delving deep into rectifiers". ICCV 2015.
       arXiv 1502.01852.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import Autoencoder
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = Autoencoder(code_size=8, width=4, max_epochs=2, random_state=0)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **_ReconstructionDetector._parameter_constraints,
        "loss": [StrOptions({"ssim", "l2"})],
        "ssim_constants": [tuple, list],
    }

    _judged_by = ("loss", "ssim_constants", "smoothing_size")

    def __init__(
        self,
        *,
        loss="ssim",
        ssim_constants=(1e-4, 9e-4),
        code_size=100,
        width=32,
        patch_size=None,
        smoothing_size=11,
        image_shape=None,
        max_epochs=200,
        learning_rate=2e-4,
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
        self.loss = loss
        self.ssim_constants = ssim_constants
        self.code_size = code_size
        self.width = width
        self.patch_size = patch_size
        self.smoothing_size = smoothing_size
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
        return Codec(self._patch_shape, self.width, self.code_size)

    def _check_settings(self):
        constants = self.ssim_constants
        valid = (isinstance(c, Real) and 0 < c < math.inf for c in constants)
        if len(constants) != 2 or not all(valid):
            raise ValueError(f"ssim_constants={constants!r} must be two numbers > 0.")

    def _losses(self, network, batch):
        images = self._crop(batch.images, batch.generator)
        rebuilt = network(images)
        if self.loss == "ssim":
            yield network, self._structural_residuals(images, rebuilt).mean()
        else:
            yield network, _squared_error(rebuilt, images).mean()

    def _structural_residuals(self, images, rebuilt):
        similarity = ssim_map(
            images, rebuilt, constants=self.ssim_constants, padding="reflect"
        )
        return 1 - similarity.mean(dim=1)

    def _residuals(self, images):
        rebuilt = self.network_(images)
        if self.loss == "ssim":
            return self._structural_residuals(images, rebuilt)
        return (images - rebuilt).square().mean(dim=1)

    def _judge(self, images, *, maps_wanted, generator):
        maps = self._maps(images, self._residuals)
        return self._degrees(maps), maps


class VariationalAutoencoder(_ReconstructionDetector):
    """Convolutional variational autoencoder with squared residuals.

    A network encodes normal images as Gaussian distributions of a short code, which are
    drawn towards the standard one, and rebuilds the images from samples of them. An
    image is anomalous where it differs from what is rebuilt.

    Parameters
    ----------
    divergence_weight : float, default=1.0
        Weight of the Kullback-Leibler divergence beside the squared error, summed over
        the pixels.
    n_samples : int, default=6
        Number of samples of the code over which residuals are averaged.
    code_size : int, default=100
        Length of the code. 500 is the choice for objects of 256 pixels.
    width : int, default=32
        Number of channels of the first layer; the inner layers have up to four times as
        many.
    patch_size : int, default=None
        Side length in pixels of the crops that the network sees, for textures larger
        than it. Prediction averages overlapping crops. None takes whole images.
    smoothing_size : int, default=11
        Side length of the mean filter between the map and the image score, in pixels of
        an image of 256 pixels. Scaled with the size of the images it becomes an odd
        number, from 3 on.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=200
        Largest number of passes over the training images.
    learning_rate : float, default=2e-4
        Learning rate of Adam.
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
        Seed of the initial weights, the order of the images, the crops and the samples.
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
        The trained network.
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
    Autoencoder : The code is a point.

    Notes
    -----
    The network is that of :class:`~skanomaly.Autoencoder`, with two codes: means and
    logarithms of variances. Residuals are averaged over samples, as in the paper on
    autoencoders. The same ones are drawn for every image and every call after one fit,
    so that scores are deterministic. (The mean code is no substitute: along coordinates
    that carry no information it is zero, where the decoder was hardly ever trained.)
    Logarithms of variances are kept between -20 and 10. Initial weights, images and
    crops are treated as there.

    On a processor, images of 64 pixels, ``code_size=32``, ``batch_size=16`` and
    ``learning_rate=1e-3`` are a good start.

    References
    ----------
    D. Kingma, M. Welling. "Auto-encoding variational Bayes". ICLR 2014.
    arXiv 1312.6114.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import VariationalAutoencoder
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = VariationalAutoencoder(code_size=8, width=4, max_epochs=2)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **_ReconstructionDetector._parameter_constraints,
        "divergence_weight": [Interval(Real, 0, None, closed="left")],
        "n_samples": [Interval(Integral, 1, None, closed="left")],
    }

    _judged_by = ("n_samples", "smoothing_size")

    def __init__(
        self,
        *,
        divergence_weight=1.0,
        n_samples=6,
        code_size=100,
        width=32,
        patch_size=None,
        smoothing_size=11,
        image_shape=None,
        max_epochs=200,
        learning_rate=2e-4,
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
        self.divergence_weight = divergence_weight
        self.n_samples = n_samples
        self.code_size = code_size
        self.width = width
        self.patch_size = patch_size
        self.smoothing_size = smoothing_size
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
        return Codec(self._patch_shape, self.width, self.code_size, n_codes=2)

    def _losses(self, network, batch):
        images = self._crop(batch.images, batch.generator)
        means, log_variances = self._distributions(network, images)
        noise = torch.randn(means.shape, generator=batch.generator).to(means.device)
        codes = means + noise * (log_variances / 2).exp()
        rebuilt = network.decode(codes, images.shape[-2:])
        divergence = gaussian_divergence(means, log_variances)
        loss = _squared_error(rebuilt, images) + self.divergence_weight * divergence
        yield network, loss.mean()

    def _distributions(self, network, images):
        """Return means and logarithms of the variances of the codes, (b, d) each."""
        means, log_variances = network.encode(images).float().chunk(2, dim=1)
        # an early spike of the loss must not overflow the exponential
        return means, log_variances.clamp(-20, 10)

    def _residuals(self, images, draws):
        """Return residuals (b, h, w), means over samples; draws (n_samples, 1, d)."""
        means, log_variances = self._distributions(self.network_, images)
        spread = (log_variances / 2).exp()
        codes = means + draws.to(means.device) * spread  # (n_samples, b, d)
        rebuilt = self.network_.decode(codes.flatten(0, 1), images.shape[-2:])
        rebuilt = rebuilt.float().unflatten(0, (self.n_samples, -1))
        return rebuilt.sub_(images).square_().mean(dim=0).mean(dim=1)

    def _judge(self, images, *, maps_wanted, generator):
        shape = self.n_samples, 1, self.network_.code_size
        # all images and crops see the same
        draws = torch.randn(shape, generator=generator)
        maps = self._maps(images, partial(self._residuals, draws=draws))
        return self._degrees(maps), maps


def _squared_error(rebuilt, images):
    """Return the squared error of each image, summed over its values: (b,)."""
    errors = F.mse_loss(rebuilt.float(), images, reduction="none")
    return errors.flatten(1).sum(dim=1)
