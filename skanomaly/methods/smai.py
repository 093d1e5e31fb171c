"""SMAI: superpixel masking and inpainting (Li et al., BMVC 2020).

An image is divided into superpixels, pieces of similar colour with natural borders. A
network learns on normal images to repaint hidden superpixels. In a new image each one
is hidden by itself; a defect is repainted as something normal and so betrays itself.
"""

import math
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._fitting.loop import Samples
from .._map_scores import MapScoredDetector
from .._tensors.losses import ssim_loss
from .._tensors.masking import superpixels
from .._tensors.networks import GroupNorm, InpaintingUNet

SUPERPIXELS_AT_ONCE = 32


def _group_norm(channels):
    # of one channel a group, a map of one pixel would be normalised to nothing
    return GroupNorm(math.gcd(max(1, channels // 2), 8), channels)


class SMAINetwork(nn.Module):
    """U-Net that repaints what a mask hides and copies the rest."""

    def __init__(self, channels, width):
        super().__init__()
        self.unet = InpaintingUNet(channels + 1, channels, width, norm=_group_norm)

    def forward(self, images, masks):
        """Return the repainted images (b, c, h, w); masks are (b, 1, h, w)."""
        painted = self.unet(torch.cat([images * (1 - masks), masks], dim=1)).sigmoid()
        return torch.where(masks == 1, painted, images)


class SMAI(MapScoredDetector):
    """SMAI: hide one superpixel after the other and repaint it.

    A network learns on normal images to repaint hidden superpixels from the visible
    rest. A superpixel is anomalous if it differs from what the network paints there.

    Parameters
    ----------
    n_segments : int, default=200
        Number of superpixels asked for; there may be fewer or more. Defects larger
        than a superpixel are harder to see, and an image takes one pass of the network
        for each superpixel.
    compactness : float, default=10.0
        Weight of nearness against similar colour in the division; high values give
        square superpixels.
    hidden_fraction : tuple of float, default=(0.02, 0.3)
        Range of the share of the superpixels that is hidden in training.
    loss : {"both", "l2", "ssim"}, default="both"
        Squared error of the hidden pixels, structural similarity, or their sum.
    width : int, default=64
        Number of channels of the first layer; deeper layers have up to eight times as
        many.
    image_score : {"superpixel", "max"}, default="superpixel"
        What the score of an image is: "superpixel" is the largest mean error of a
        superpixel; "max" is the maximum of the map, which finds small defects.
    smoothing_size : int, default=21
        Side length of the mean filter of the maps, in pixels of an image of 256 pixels.
        Scaled with the size of the images it becomes an odd number, from 3 on; 1 leaves
        them as they are.
    reference : {"none", "training"}, default="none"
        What is subtracted from the maps: nothing, or the mean map of the training
        images.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=300
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam, reduced to a tenth for the last fifth of the epochs.
    batch_size : int, default=8
        Number of images a batch, in training and in prediction, where 32 masked images
        pass the network at once.
    validation_fraction : float, default=0.1
        Share of the training images that is held out if there is an early stop.
    n_iter_no_change : int or None, default=20
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
    network_ : torch.nn.Module
        The trained network.
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
    RIAD : Hides square cells, with a fixed number of passes an image.

    Notes
    -----
    No code of the method is public, and of the paper little more than the abstract was
    at hand. The procedure is the paper's: mask superpixels at random in training, one
    by one in prediction, and compare what is repainted with what was there. All else is
    our design: SLIC superpixels, a U-Net that is told the mask, group normalisation
    (training hides many superpixels and prediction one, so that statistics of batches
    would not match), all numbers, and the scores. The score of an image is the largest
    mean squared error of a superpixel, before the maps are smoothed. The smallest
    superpixels, of a dozen pixels, are so the ones that decide: for small defects take
    ``image_score="max"`` and, where all parts are placed alike,
    ``reference="training"``. Masks are not dilated, and images are not smoothed before
    SLIC.

    Images are padded by replication to a multiple of 16 pixels.

    On a processor, images of 64 pixels, ``n_segments=80``, ``width=16``,
    ``learning_rate=1e-3``, ``max_epochs=100`` and ``n_iter_no_change=None`` are a good
    start for some fifty images.

    References
    ----------
    Z. Li, N. Li, K. Jiang, Z. Ma, X. Wei, X. Hong, Y. Gong. "Superpixel masking and
    inpainting for self-supervised anomaly detection". BMVC 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import SMAI
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = SMAI(n_segments=8, width=4, max_epochs=2, random_state=0)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **MapScoredDetector._parameter_constraints,
        "n_segments": [Interval(Integral, 2, 2**16, closed="left")],
        "compactness": [Interval(Real, 0, None, closed="neither")],
        "hidden_fraction": [tuple, list],
        "loss": [StrOptions({"both", "l2", "ssim"})],
        "width": [Interval(Integral, 1, None, closed="left")],
        "image_score": [StrOptions({"superpixel", "max"})],
    }

    _judged_by = (*MapScoredDetector._judged_by, "n_segments", "compactness")

    def __init__(
        self,
        *,
        n_segments=200,
        compactness=10.0,
        hidden_fraction=(0.02, 0.3),
        loss="both",
        width=64,
        image_score="superpixel",
        smoothing_size=21,
        reference="none",
        image_shape=None,
        max_epochs=300,
        learning_rate=1e-4,
        batch_size=8,
        validation_fraction=0.1,
        n_iter_no_change=20,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        warm_start=False,
        checkpoint=None,
        checkpoint_every=10,
        verbose=0,
    ):
        self.n_segments = n_segments
        self.compactness = compactness
        self.hidden_fraction = hidden_fraction
        self.loss = loss
        self.width = width
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
        return SMAINetwork(self.image_shape_[2], self.width)

    def _scheduler(self, optimizer):
        milestones = [round(0.8 * self.max_epochs)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)

    def _check_settings(self):
        fraction = tuple(self.hidden_fraction)
        is_pair = len(fraction) == 2 and all(isinstance(f, Real) for f in fraction)
        if not is_pair or not 0 <= fraction[0] <= fraction[1] <= 1:
            raise ValueError(
                f"hidden_fraction={self.hidden_fraction!r} must be a range (low, high) "
                "within [0, 1]."
            )

    def _learn(self, images, labels, progress):
        self._begin(images.device, progress)
        segments = torch.cat([s for _, s in self._in_batches(images, self._segments)])
        samples = Samples(images, notes=segments.int(), device=images.device)
        self._train(samples, progress)
        self._survey(images)
        known = iter(segments.split(int(self.batch_size)))

        def judge(batch, *, maps_wanted, generator):
            raw = self._raw(batch, generator, segments=next(known))
            return self._rated(*raw, maps_wanted=maps_wanted)

        return self._evaluate(images, maps_wanted=True, judge=judge)

    def _segments(self, images, generator=None):
        """Return the numbers (b, h, w) of the superpixels of images, on the CPU."""
        labels = [
            superpixels(image, n_segments=self.n_segments, compactness=self.compactness)
            for image in images.permute(0, 2, 3, 1).cpu().numpy()
        ]
        return torch.from_numpy(np.stack(labels).astype(np.int32))

    def _hide_superpixels(self, labels, generator):
        """Draw masks (b, 1, h, w) that hide superpixels of each image, but not all."""
        counts = labels.amax(dim=(1, 2)) + 1  # (b,)
        low, high = self.hidden_fraction
        share = low + (high - low) * torch.rand(len(labels), generator=generator)
        n_hidden = (share * counts.cpu()).round().clamp(min=1)
        n_hidden = torch.minimum(n_hidden, (counts.cpu() - 1).clamp(min=1))
        lots = torch.rand(len(labels), int(counts.max()), generator=generator)
        lots[torch.arange(lots.shape[1]) >= counts.cpu()[:, None]] = 2.0
        hidden = lots.argsort(dim=1).argsort(dim=1) < n_hidden[:, None]
        hidden = hidden.to(labels.device).gather(1, labels.flatten(1))
        return hidden.view(labels.shape)[:, None].float()

    def _losses(self, network, batch):
        images = batch.images
        masks = self._hide_superpixels(batch.notes.long(), batch.generator)
        painted = network(images, masks)
        loss = 0.0
        if self.loss != "ssim":
            squares = (painted - images).square().sum()
            loss = squares / (images.shape[1] * masks.sum())
        if self.loss != "l2":
            loss = loss + ssim_loss(painted, images)
        yield network, loss

    def _errors(self, images, labels):
        """Return the squared errors (b, h, w) where each superpixel is repainted."""
        counts = labels.amax(dim=(1, 2)) + 1
        owners = torch.arange(len(images), device=images.device)
        owners = owners.repeat_interleave(counts)  # (n,): whose superpixel it is
        numbers = torch.cat([torch.arange(n, device=images.device) for n in counts])
        errors = images.new_zeros(labels.shape)
        for chunk in gen_batches(len(owners), SUPERPIXELS_AT_ONCE):
            owner, number = owners[chunk], numbers[chunk, None, None]
            masks = (labels[owner] == number)[:, None].float()  # (m, 1, h, w)
            painted = self.network_(images[owner], masks)
            squares = (painted - images[owner]).square().mean(dim=1)
            errors.index_add_(0, owner, squares)
        return errors

    def _raw(self, images, generator, segments=None):
        if segments is None:
            segments = self._segments(images)
        labels = segments.to(images.device).long()
        errors = self._errors(images, labels)
        return _largest_mean(errors.flatten(1), labels.flatten(1)), errors

    def _why_not_exported(self):
        return "its superpixels differ in number from image to image"


def _largest_mean(errors, labels):
    """Return the largest of the mean errors of superpixels: (b,) of (b, h * w)."""
    sums = errors.new_zeros(len(labels), int(labels.max()) + 1)
    areas = torch.zeros_like(sums).scatter_add_(1, labels, torch.ones_like(errors))
    sums.scatter_add_(1, labels, errors)
    return (sums / areas.clamp(min=1)).amax(dim=1)
