"""MemAE: an autoencoder with a memory of normality (Gong et al., ICCV 2019).

Between encoder and decoder stands a table of learned items. The code of an image only
asks for items; what the decoder sees is a sparse mixture of them. The code of something
anomalous is so replaced by that of something normal, and the reconstruction differs.
"""

from numbers import Integral, Real

import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._map_scores import MapScoredDetector
from .._tensors.networks import pad_to_multiple

COSINE_TEMPERATURE = 0.1


class Memory(nn.Module):
    """Table of items that is addressed by content.

    Parameters
    ----------
    n_items, n_features : int
        Size of the table.
    shrink : float
        Weights that are not above it are dropped.
    similarity : {"dot", "cosine"}
        How queries and items are compared.
    """

    def __init__(self, n_items, n_features, shrink, similarity):
        super().__init__()
        bound = n_features**-0.5
        self.items = nn.Parameter(torch.empty(n_items, n_features))
        nn.init.uniform_(self.items, -bound, bound)
        self.shrink = shrink
        self.similarity = similarity

    def forward(self, queries):
        """Return what is read (q, n_features) and the weights (q, n_items)."""
        if self.similarity == "cosine":
            similarity = F.normalize(queries, dim=1) @ F.normalize(self.items, dim=1).T
            similarity = similarity / COSINE_TEMPERATURE
        else:
            similarity = queries @ self.items.T
        weights = similarity.float().softmax(dim=1)
        excess = weights - self.shrink
        kept = excess.relu() * weights / (excess.abs() + 1e-12)
        # a row whose weights are all dropped would pass neither image nor gradient
        largest = weights == weights.amax(dim=1, keepdim=True)
        kept = torch.where(kept.any(dim=1, keepdim=True), kept, weights * largest)
        weights = F.normalize(kept, p=1.0, dim=1)
        return weights.to(self.items.dtype) @ self.items, weights


class MemoryAutoencoder(nn.Module):
    """Strided convolutions, a memory, and transposed convolutions back.

    Parameters
    ----------
    channels : int
        Number of channels of the images.
    widths : tuple of int
        Numbers of channels of the layers.
    memory : Memory
        The memory, whose items are as long as the last layer is wide.
    is_3d : bool
        Whether the images are clips. The first layer then keeps the number of images.
    """

    def __init__(self, channels, widths, memory, is_3d):
        super().__init__()
        convolution, transposed, norm = (
            (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)
            if is_3d
            else (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
        )
        strides = [(2, 2, 2) if is_3d else (2, 2)] * len(widths)
        if is_3d:
            strides[0] = (1, 2, 2)
        self.stride = tuple(
            2 ** sum(stride[axis] == 2 for stride in strides)
            for axis in range(len(strides[0]))
        )

        def unit(layer):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            normalisation = norm(layer.out_channels)
            nn.init.normal_(normalisation.weight, 1.0, 0.02)
            return [layer, normalisation, nn.LeakyReLU(0.2, inplace=True)]

        sides = [channels, *widths]
        down, up = [], []
        for i, stride in enumerate(strides):
            down += unit(convolution(sides[i], sides[i + 1], 3, stride, padding=1))
            grown = tuple(step - 1 for step in stride)
            up = (
                unit(transposed(sides[i + 1], sides[i], 3, stride, 1, grown))[
                    : 3 if i else 1
                ]
                + up
            )
        self.encoder = nn.Sequential(*down)
        self.memory = memory
        self.decoder = nn.Sequential(*up)

    def forward(self, images):
        """Return the rebuilt images, of the given shape, and the memory's weights."""
        codes, weights = self.read(images)
        return self.decoder(codes)[(..., *map(slice, images.shape[2:]))], weights

    def read(self, images):
        """Return what the memory makes of the codes (b, c, ...), and its weights."""
        codes = self.encoder(pad_to_multiple(images, self.stride))
        queries = codes.movedim(1, -1)
        read, weights = self.memory(queries.flatten(0, -2))
        return read.view(queries.shape).movedim(-1, 1), weights


class MemAE(MapScoredDetector):
    """MemAE: rebuild images, or clips of a video, from items of a memory.

    An autoencoder whose code is replaced by a sparse mixture of learned items. An image
    is anomalous where it differs from its reconstruction.

    Parameters
    ----------
    n_items : int, default=None
        Number of items of the memory. None takes 500 for images and 2000 for clips.
    shrink : float or "auto", default="auto"
        Weights of the memory that are not above it are dropped. "auto" takes
        ``1 / n_items``.
    similarity : {"dot", "cosine"}, default="dot"
        How a code is compared with the items: by the inner product, as in the code of
        the paper, or by the cosine divided by 0.1.
    entropy_weight : float, default=2e-4
        Weight of the entropy of the memory's weights beside the mean squared error.
    channels : tuple of int, default=None
        Numbers of channels of the layers, each of which halves the image. None takes
        (64, 128, 128, 256) for images and (96, 128, 256, 256) for clips.
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
    clip_length : int, default=None
        Number T of images a clip, where X holds clips (n, T, H, W, C), (n, T, H, W) or
        their rows; the paper has 16. Maps are then of shape (n, T, H, W). None where X
        holds images.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=100
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam.
    batch_size : int, default=10
        Number of images or clips a batch, in training and in prediction.
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
        Seed of the initial weights and the order of the images.
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
        The trained network; ``network_.memory.items`` are its items.
    item_usage_ : numpy.ndarray of shape (n_items,)
        Mean weight of each item over the training images.
    mean_map_ : numpy.ndarray of shape (H, W) or (T, H, W)
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
    Autoencoder : Without a memory.
    MNAD : A memory of few items that are written instead of learned.

    Notes
    -----
    Departures from the paper and its code:

    - If shrinking would drop all weights of a code, the largest is kept. In the code
      such rows become zero, and most of them are at the start.
    - Codes and items are compared by their inner product as in the code; the paper has
      the cosine. The 0.1 of ``similarity="cosine"`` is ours: with plain cosines all
      weights of a large memory stay near ``1 / n_items``.
    - ``shrink="auto"`` is the lower end of the paper's range from 1 to 3 divided by the
      number of items; the code has 5. It drops what is below the average only: in a
      trained memory of 100 items, codes were mixed of 25, from which a defect can be
      copied.
    - The network for images is one that has been published for CIFAR-10, with the leaky
      rectifiers of the video network, and has one query a position. The paper's network
      for MNIST, which begins with single pixels and does not halve their number, cannot
      be built by ``channels``.
    - Images are padded by replication to a multiple of the network's stride (16 pixels
      and, for clips, 8 images).

    A map is the root of the squared differences summed over the channels, for values
    from -1 to 1. The mean over it is made for frames of videos and their metric,
    :func:`skanomaly.metrics.frame_roc_auc_score`; for defects take
    ``image_score="max"``, ``smoothing_size=21`` and, where all parts are placed alike,
    ``reference="training"``. The code gives the
    score of a clip to the frame behind its middle; of clips by
    :func:`skanomaly.datasets.make_clips` that is frame ``clips.last - T + 1 + T // 2``.

    On a processor, images of 64 pixels, ``channels=(32, 64, 64, 128)``,
    ``n_items=100``, ``batch_size=16`` and ``learning_rate=1e-3`` are a good start.

    References
    ----------
    D. Gong, L. Liu, V. Le, B. Saha, M. Mansour, S. Venkatesh, A. van den Hengel.
    "Memorizing normality to detect anomaly: memory-augmented deep autoencoder for
    unsupervised anomaly detection". ICCV 2019. arXiv 1904.02639.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import MemAE
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = MemAE(n_items=8, channels=(4, 8, 8), max_epochs=2, random_state=0)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **MapScoredDetector._parameter_constraints,
        "n_items": [Interval(Integral, 1, None, closed="left"), None],
        "shrink": [Interval(Real, 0, 1, closed="left"), StrOptions({"auto"})],
        "similarity": [StrOptions({"dot", "cosine"})],
        "entropy_weight": [Interval(Real, 0, None, closed="left")],
        "channels": [tuple, list, None],
        "image_score": [StrOptions({"mean", "max"})],
        "clip_length": [Interval(Integral, 1, None, closed="left"), None],
    }

    def __init__(
        self,
        *,
        n_items=None,
        shrink="auto",
        similarity="dot",
        entropy_weight=2e-4,
        channels=None,
        image_score="mean",
        smoothing_size=1,
        reference="none",
        clip_length=None,
        image_shape=None,
        max_epochs=100,
        learning_rate=1e-4,
        batch_size=10,
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
        self.n_items = n_items
        self.shrink = shrink
        self.similarity = similarity
        self.entropy_weight = entropy_weight
        self.channels = channels
        self.image_score = image_score
        self.smoothing_size = smoothing_size
        self.reference = reference
        self.clip_length = clip_length
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
    def _clip_length(self):
        return self.clip_length

    @property
    def _map_shape(self):
        clip = () if self.clip_length is None else (self.clip_length,)
        return (*clip, *self.image_shape_[:2])

    def _build_network(self):
        is_3d = self.clip_length is not None
        widths, n_items = self.channels, self.n_items
        if widths is None:
            widths = (96, 128, 256, 256) if is_3d else (64, 128, 128, 256)
        if n_items is None:
            n_items = 2000 if is_3d else 500
        shrink = 1 / n_items if self.shrink == "auto" else self.shrink
        memory = Memory(n_items, widths[-1], shrink, self.similarity)
        return MemoryAutoencoder(self.image_shape_[2], widths, memory, is_3d)

    def _check_settings(self):
        channels = self.channels
        if channels is not None and not (
            channels and all(isinstance(n, Integral) and n > 0 for n in channels)
        ):
            raise ValueError(f"channels={channels!r} must hold integers > 0.")

    def _survey(self, images):
        super()._survey(images)
        total, n_queries = 0.0, 0
        for _, weights in self._in_batches(images, self._weights):
            total, n_queries = total + weights.sum(dim=0), n_queries + len(weights)
        self.item_usage_ = (total / n_queries).cpu().numpy()

    def _weights(self, images, generator):
        """Return the weights (q, n_items) of the items in all codes of images."""
        return self.network_.read(2 * images - 1)[1]

    def _losses(self, network, batch):
        images = 2 * batch.images - 1
        rebuilt, weights = network(images)
        entropy = -(weights * (weights + 1e-12).log()).sum(dim=1).mean()
        yield (
            network,
            F.mse_loss(rebuilt.float(), images) + self.entropy_weight * entropy,
        )

    def _raw(self, images, generator):
        images = 2 * images - 1
        rebuilt, _ = self.network_(images)
        maps = (rebuilt - images).square().sum(dim=1).sqrt()
        return maps.flatten(1).mean(dim=1), maps
