"""RIAD: reconstruction by inpainting (Zavrtanik et al., Pattern Recognition 2021).

The cells of a grid are dealt to a few disjoint sets. One set at a time is hidden, and a
U-Net paints what it cannot see from what it can, as normal images have it. The painted
parts make up an image of which no pixel was copied; where its gradients differ from the
input's, at any of several scales, something is anomalous.
"""

from numbers import Integral

import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval
from torch import nn

from .._tensors.filters import mean_filter, scaled_size
from .._tensors.losses import msgms_loss, msgms_map, ssim_loss
from .._tensors.masking import disjoint_masks
from .._tensors.networks import InpaintingUNet
from ..base import NetworkDetector


class RIADNetwork(nn.Module):
    """U-Net that sees an image once for each mask and paints what the mask hides."""

    def __init__(self, channels, width):
        super().__init__()
        self.unet = InpaintingUNet(channels, channels, width)

    def forward(self, images, masks):
        """Return images (b, c, h, w), each pixel painted while a mask hid it."""
        # (n_masks, b, c, h, w) within [-1, 1]; what is hidden is grey, 0
        masked = (2 * images - 1) * (1 - masks[:, None])
        painted = self.unet(masked.flatten(0, 1)).tanh().unflatten(0, masked.shape[:2])
        return (1 + (painted * masks[:, None]).sum(dim=0)) / 2


class RIAD(NetworkDetector):
    """RIAD: hide disjoint parts of an image in turn and paint them anew.

    A network learns on normal images to paint square cells from their surroundings. An
    image is anomalous where the gradients of what was painted differ from its own,
    averaged over several cell sizes and over four scales of the gradients.

    Parameters
    ----------
    cell_sizes : tuple of int, default=(2, 4, 8, 16)
        Side lengths of the hidden cells in pixels. The largest should not be smaller
        than the defects looked for. A training batch draws one of them.
    n_masks : int, default=3
        Number of disjoint sets that the cells are dealt to.
    width : int, default=64
        Number of channels of the first layer; deeper layers have up to eight times as
        many.
    smoothing_size : int, default=21
        Side length of the mean filter of the maps, in pixels of an image of 256 pixels.
        Scaled with the size of the images it becomes an odd number, from 3 on.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=300
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam, reduced to a tenth after five sixths of the epochs.
    batch_size : int, default=4
        Number of images a batch, in training and in prediction.
    validation_fraction : float, default=0.2
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
    InTra : Paints one patch at a time by attention to the others.
    SMAI : Hides superpixels instead of cells.

    Notes
    -----
    Of the paper only its equations were at hand, as a public summary quotes them, and
    its authors published no code; the settings are those that public ports agree on.
    Where these differ:

    - The maps of all cell sizes count alike, as the paper has it. One port divides by
      the number of cells.
    - Gradients are compared channel by channel, and for values in [0, 1], for which
      the constants of both similarities were made. The mean squared error is that of
      values in [-1, 1], as in all ports.
    - Beyond the border the gradient repeats the last pixel, and the mean filter
      averages over fewer pixels. Zeros in either place moved no image AUROC where it
      was measured.
    - Images are padded by replication to a multiple of 16 pixels.

    The same masks are drawn for every image and every call after one fit. The masked
    copies of an image pass the network as one batch, whose statistics they share. The
    loss of an early stop is the mean over all cell sizes. Maps are averaged with a box,
    the paper's mean filter; a port's Gaussian is not offered.

    On a processor, images of 64 pixels, ``width=16``, ``cell_sizes=(2, 4, 8)``,
    ``learning_rate=1e-3``, ``max_epochs=50`` and ``n_iter_no_change=None`` are a good
    start for some fifty images.

    References
    ----------
    V. Zavrtanik, M. Kristan, D. Skočaj. "Reconstruction by inpainting for visual
    anomaly detection". Pattern Recognition 112, 2021, 107706.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import RIAD
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = RIAD(width=4, max_epochs=2, random_state=0)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "cell_sizes": [tuple, list],
        "n_masks": [Interval(Integral, 2, None, closed="left")],
        "width": [Interval(Integral, 1, None, closed="left")],
        "smoothing_size": [Interval(Integral, 1, None, closed="left")],
    }

    _weight_decay = 1e-5

    _judged_by = ("cell_sizes", "n_masks", "smoothing_size")

    def __init__(
        self,
        *,
        cell_sizes=(2, 4, 8, 16),
        n_masks=3,
        width=64,
        smoothing_size=21,
        image_shape=None,
        max_epochs=300,
        learning_rate=1e-4,
        batch_size=4,
        validation_fraction=0.2,
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
        self.cell_sizes = cell_sizes
        self.n_masks = n_masks
        self.width = width
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
        return RIADNetwork(self.image_shape_[2], self.width)

    def _scheduler(self, optimizer):
        milestones = [round(5 / 6 * self.max_epochs)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)

    def _check_settings(self):
        sizes = self.cell_sizes
        if not sizes or not all(isinstance(s, Integral) and s > 0 for s in sizes):
            raise ValueError(f"cell_sizes={sizes!r} must hold one or more sizes >= 1.")

    def _masks(self, images, cell_size, generator):
        return disjoint_masks(
            *images.shape[-2:],
            cell_size=cell_size,
            n_masks=self.n_masks,
            generator=generator,
            device=images.device,
        )

    def _losses(self, network, batch):
        images, generator = batch.images, batch.generator
        sizes = self.cell_sizes
        if network.training:  # else for an early stop, which is to miss none
            sizes = [sizes[int(torch.randint(len(sizes), (), generator=generator))]]
        loss = 0.0
        for size in sizes:
            painted = network(images, self._masks(images, size, generator))
            loss = loss + F.mse_loss(2 * painted, 2 * images)
            loss = loss + msgms_loss(painted, images) + ssim_loss(painted, images)
        yield network, loss / len(sizes)

    def _judge(self, images, *, maps_wanted, generator):
        similarities = []
        for size in self.cell_sizes:
            painted = self.network_(images, self._masks(images, size, generator))
            similarities.append(msgms_map(painted, images))
        similarity = torch.stack(similarities).mean(dim=0)
        size = scaled_size(self.smoothing_size, similarity)
        maps = mean_filter(1 - similarity, size, padding="none")
        return maps.amax(dim=(1, 2)), maps
