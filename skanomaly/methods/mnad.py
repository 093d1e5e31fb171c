"""MNAD: memory-guided normality (Park et al., CVPR 2020).

A few items stand for what normal features look like. They are not learned but written:
each moves to the features that are nearest to it. A decoder sees the features and what
they read from the items, and rebuilds the image or predicts the next image of a video.
Images that come back badly, or whose features are far from all items, are anomalous.
"""

import itertools
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.utils import Bunch
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._map_scores import MapScoredDetector
from .._tensors.filters import full_precision
from .._tensors.networks import Convolution3x3, pad_to_multiple

MARGIN = 1.0
# weights of the two losses of the items, weight of the PSNR in the score, and threshold
# of the update while scoring, by task
DEFAULTS = {"reconstruction": (0.01, 0.7, 0.015), "prediction": (0.1, 0.6, 0.01)}


def _units(*sides):
    """Return convolutions with normalisation and ReLU, from side to side."""
    layers = []
    for wide, narrow in itertools.pairwise(sides):
        layers += [
            Convolution3x3(wide, narrow),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
        ]
    return layers


class MemoryNetwork(nn.Module):
    """Encoder, memory and decoder.

    Parameters
    ----------
    in_channels, out_channels : int
        Numbers of channels of input and output.
    width : int
        Number of channels of the first layer; the features have eight times as many.
    n_items : int
        Number of items of the memory.
    skips : bool
        Whether the decoder sees the encoder's features of all resolutions.
    """

    def __init__(self, in_channels, out_channels, width, n_items, skips):
        super().__init__()
        self.skips = skips
        sides = [width, 2 * width, 4 * width, 8 * width]
        self.encoder = nn.ModuleList(
            [
                nn.Sequential(*_units(in_channels, width, width)),
                nn.Sequential(*_units(width, 2 * width, 2 * width)),
                nn.Sequential(*_units(2 * width, 4 * width, 4 * width)),
                # negative features survive
                nn.Sequential(*_units(4 * width, 8 * width, 8 * width)[:-2]),
            ]
        )
        items = F.normalize(torch.rand(n_items, 8 * width), dim=1)
        self.register_buffer("memory", items)
        blocks, ups = [_units(16 * width, 8 * width, 8 * width)], []
        for wide, narrow in zip(sides[:0:-1], sides[-2::-1], strict=True):
            grown = narrow if skips else wide
            ups.append(
                nn.Sequential(
                    nn.ConvTranspose2d(wide, grown, 3, 2, padding=1, output_padding=1),
                    nn.BatchNorm2d(grown),
                    nn.ReLU(inplace=True),
                )
            )
            blocks.append(_units(wide, narrow, narrow))
        blocks[-1].append(nn.Conv2d(width, out_channels, 3, padding=1))
        self.decoder = nn.ModuleList(nn.Sequential(*block) for block in blocks)
        self.up = nn.ModuleList(ups)

    def encode(self, images):
        """Return normalised features (b, d, h', w') and those of the skips."""
        features, skips = pad_to_multiple(images, 8), []
        for block in self.encoder[:-1]:
            features = block(features)
            skips.append(features)
            features = F.max_pool2d(features, 2)
        return F.normalize(self.encoder[-1](features).float(), dim=1), skips

    def read(self, queries, memory):
        """Return what queries (b, d, h', w') read from items (m, d)."""
        similarity = torch.einsum("bdhw,md->bmhw", queries.detach(), memory)
        return torch.einsum("bmhw,md->bdhw", similarity.softmax(dim=1), memory)

    def decode(self, queries, read, skips, size):
        """Return images (b, c, h, w) with values in [-1, 1]."""
        features = self.decoder[0](torch.cat([queries, read], dim=1))
        for up, block, skip in zip(self.up, self.decoder[1:], skips[::-1], strict=True):
            features = up(features)
            if self.skips:
                features = torch.cat([features, skip], dim=1)
            features = block(features)
        return features.tanh()[..., : size[0], : size[1]]

    def forward(self, images, memory):
        """Return images (b, c, h, w) and the queries (b, d, h', w') for them."""
        queries, skips = self.encode(images)
        read = self.read(queries, memory)
        return self.decode(queries, read, skips, images.shape[-2:]), queries


@full_precision
def updated_memory(memory, queries):
    """Move each item to the queries that are nearest to it.

    Parameters
    ----------
    memory : torch.Tensor of shape (m, d)
        Items of unit norm.
    queries : torch.Tensor of shape (k, d)
        Queries of unit norm.

    Returns
    -------
    torch.Tensor of shape (m, d)
        The new items. Those that are nearest to no query have not moved.
    """
    similarity = queries @ memory.T  # (k, m)
    nearest = F.one_hot(similarity.argmax(dim=1), len(memory)).to(queries.dtype)
    # the softmax over the queries, divided by its maximum over the queries of an item
    peaks = similarity.masked_fill(nearest == 0, -torch.inf).amax(dim=0)
    weights = nearest * (similarity - peaks).clamp(max=0.0).exp()
    return F.normalize(memory + weights.T @ queries, dim=1)


class MNAD(MapScoredDetector):
    """MNAD: rebuild images, or predict those of a video, with the help of a memory.

    An autoencoder whose decoder also sees, for each feature, a mixture of a few items
    that stand for normal features. The score of an image weighs the error of the
    result and the distance of the features from the items.

    Parameters
    ----------
    task : {"reconstruction", "prediction"}, default="reconstruction"
        Rebuild images, or predict the last image of a clip from those before.
    n_items : int, default=10
        Number of items of the memory.
    width : int, default=64
        Number of channels of the first layer; the features have eight times as many.
    compactness_weight, separateness_weight : float, default=None
        Weights of the losses that draw a feature to the nearest item and push it from
        the second nearest. None takes 0.01 for reconstruction and 0.1 for prediction.
    score_weight : float, default=None
        Weight of the error in the score; the distance from the items has the rest. None
        takes 0.7 for reconstruction and 0.6 for prediction.
    image_score : {"mixture", "max"}, default="mixture"
        What the score of an image is: "mixture" is that of error and distance, as in
        the paper; "max" is the maximum of the map, which finds small defects.
    smoothing_size : int, default=1
        Side length of the mean filter of the maps, in pixels of an image of 256 pixels.
        Scaled with the size of the images it becomes an odd number, from 3 on; 1 leaves
        them as they are.
    reference : {"none", "training"}, default="none"
        What is subtracted from the maps: nothing, or the mean map of the training
        images.
    update_at_test : bool, default=False
        Whether the memory goes on to be written while images are scored, one by one.
        Scores then depend on the order of the images in a call, and on the images
        before, but not on earlier calls: each begins with the memory of the fit.
    update_threshold : float, default=None
        Images write the memory only if their weighted error is below. None takes 0.015
        for reconstruction and 0.01 for prediction.
    clip_length : int, default=5
        Number T of images a clip for prediction, where X holds clips (n, T, H, W, C),
        (n, T, H, W) or their rows. Maps are of the last image of a clip.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=60
        Largest number of passes over the training images.
    learning_rate : float, default=2e-4
        Learning rate of Adam, reduced to zero along half a cosine.
    batch_size : int, default=4
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
        Seed of the initial weights, the items and the order of the images.
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
        The trained network; ``network_.memory`` are its items.
    psnr_range_, distance_range_ : tuple of float
        Smallest and largest peak signal-to-noise ratio in decibels, and distance from
        the items, of the training images. Scores are relative to them.
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
    MemAE : A memory of many items that are learned.

    Notes
    -----
    Departures from the paper and its code:

    - The score is relative to the range of the training images, not of the video that
      is scored, so that an image has the same score in any company.
    - The encoder ends in a bare convolution, without the batch normalisation that the
      code builds and never calls (1,024 parameters at full width).
    - The weights of an update are relative to the largest among the features that are
      nearest to an item, as in the paper; the code takes the largest of all.
    - A distance is the Euclidean one in the score, as in the paper, and the mean of
      squares in the loss, as in the code.
    - With ``update_at_test=True`` the memory of scoring begins anew with every call; in
      the code it goes on through all test videos. The error that decides on an
      update is that of the mean over the colours.
    - The learning rate is that of the paper for prediction; for reconstruction it has
      2e-5.
    - Images are padded by replication to a multiple of 8 pixels.

    The score of the paper is made for frames of videos. For defects take
    ``image_score="max"``, ``smoothing_size=21`` and, where all parts are placed alike,
    ``reference="training"``. For whole videos,
    :func:`skanomaly.metrics.video_scores` mixes what :meth:`measure` returns as the
    paper does.

    On a processor, images of 64 pixels, ``width=16``, ``batch_size=8`` and
    ``learning_rate=1e-3`` are a good start.

    References
    ----------
    H. Park, J. Noh, B. Ham. "Learning memory-guided normality for anomaly detection".
    CVPR 2020, pp. 14372-14381. arXiv 2003.13228.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import MNAD
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = MNAD(width=4, max_epochs=2, random_state=0)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **MapScoredDetector._parameter_constraints,
        "task": [StrOptions(set(DEFAULTS))],
        "n_items": [Interval(Integral, 2, None, closed="left")],
        "width": [Interval(Integral, 1, None, closed="left")],
        "compactness_weight": [Interval(Real, 0, None, closed="left"), None],
        "separateness_weight": [Interval(Real, 0, None, closed="left"), None],
        "score_weight": [Interval(Real, 0, 1, closed="both"), None],
        "image_score": [StrOptions({"mixture", "max"})],
        "update_at_test": ["boolean"],
        "update_threshold": [Interval(Real, 0, None, closed="left"), None],
        "clip_length": [Interval(Integral, 2, None, closed="left")],
    }

    _judged_by = (
        *MapScoredDetector._judged_by,
        "score_weight",
        "update_at_test",
        "update_threshold",
    )

    def __init__(
        self,
        *,
        task="reconstruction",
        n_items=10,
        width=64,
        compactness_weight=None,
        separateness_weight=None,
        score_weight=None,
        image_score="mixture",
        smoothing_size=1,
        reference="none",
        update_at_test=False,
        update_threshold=None,
        clip_length=5,
        image_shape=None,
        max_epochs=60,
        learning_rate=2e-4,
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
        self.task = task
        self.n_items = n_items
        self.width = width
        self.compactness_weight = compactness_weight
        self.separateness_weight = separateness_weight
        self.score_weight = score_weight
        self.image_score = image_score
        self.smoothing_size = smoothing_size
        self.reference = reference
        self.update_at_test = update_at_test
        self.update_threshold = update_threshold
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
        return self.clip_length if self.task == "prediction" else None

    def _default(self, value, number):
        return DEFAULTS[self.task][number] if value is None else value

    def _build_network(self):
        channels = self.image_shape_[2]
        predicts = self.task == "prediction"
        n_seen = self.clip_length - 1 if predicts else 1
        return MemoryNetwork(
            n_seen * channels, channels, self.width, self.n_items, skips=predicts
        )

    def _scheduler(self, optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_epochs)

    def _survey(self, images):
        found = [
            torch.stack(measures, dim=1)
            for _, (_, *measures, _) in self._in_batches(images, self._examine)
        ]
        psnr, distance = torch.cat(found).cpu().numpy().T
        self.psnr_range_ = float(psnr.min()), float(psnr.max())
        self.distance_range_ = float(distance.min()), float(distance.max())
        super()._survey(images)

    def measure(self, X: ArrayLike) -> Bunch:
        """Return the two measures that the score is a mixture of.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C), or clips
            Images, or clips of the shape seen in fit.

        Returns
        -------
        sklearn.utils.Bunch
            ``psnr`` of shape (n,), the peak signal-to-noise ratio of the result in
            decibels, and ``distance`` of shape (n,), the mean distance of the features
            from the nearest items of the memory of the fit.
        """
        fitted, images = self._prepare(X)
        found = [
            (psnr.cpu(), distance.cpu())
            for _, (_, psnr, distance, _) in fitted._in_batches(images, fitted._examine)
        ]
        psnr, distance = (torch.cat(part).numpy() for part in zip(*found, strict=True))
        return Bunch(psnr=psnr, distance=distance)

    def _seen_and_wanted(self, images):
        """Return what the network sees and what it should return, within [-1, 1]."""
        images = 2 * images - 1
        if self.task == "reconstruction":
            return images, images
        return images[:, :, :-1].transpose(1, 2).flatten(1, 2), images[:, :, -1]

    def _losses(self, network, batch):
        seen, wanted = self._seen_and_wanted(batch.images)
        memory = network.memory
        result, queries = network(seen, memory)
        flat = queries.movedim(1, -1).flatten(0, -2)  # (k, d)
        first, second = memory[(flat.detach() @ memory.T).topk(2, dim=1).indices.T]
        compactness = F.mse_loss(flat, first)
        separateness = F.triplet_margin_loss(flat, first, second, margin=MARGIN)
        yield (
            network,
            F.mse_loss(result.float(), wanted)
            + self._default(self.compactness_weight, 0) * compactness
            + self._default(self.separateness_weight, 0) * separateness,
        )
        if network.training:
            network.memory = updated_memory(memory, flat.detach())

    def _examine(self, images, memory=None, generator=None):
        """Return what a memory, by default the trained one, leads to.

        These are squared errors (b, h, w) of values in [0, 1], the PSNR (b,) in
        decibels, the distance from the items (b,) and the queries (b, k, d).
        """
        memory = self.network_.memory if memory is None else memory
        seen, wanted = self._seen_and_wanted(images)
        result, queries = self.network_(seen, memory)
        squares = ((result - wanted) / 2).square().mean(dim=1)
        psnr = -10 * squares.mean(dim=(1, 2)).clamp(min=1e-10).log10()
        queries = queries.movedim(1, -1).flatten(1, 2)
        nearest = (queries @ memory.T).argmax(dim=2)
        distance = (queries - memory[nearest]).norm(dim=2).mean(dim=1)
        return squares, psnr, distance, queries

    def _raw(self, images, generator):
        squares, psnr, distance, _ = self._examine(images)
        return self._degrees(psnr, distance), squares

    def _evaluate(self, images, *, maps_wanted, judge=None):
        if self.update_at_test:
            judge = self._updating_judge()
        return super()._evaluate(images, maps_wanted=maps_wanted, judge=judge)

    def _updating_judge(self):
        """Return a `_judge` whose memory takes in what it has called normal."""
        memory = self.network_.memory

        def judge(images, *, maps_wanted, generator):
            nonlocal memory
            found = []
            for image in images.split(1):
                squares, psnr, distance, queries = self._examine(image, memory)
                found.append((self._degrees(psnr, distance), squares))
                weights = 1 - (-squares).exp()
                error = (weights * squares).sum() / weights.sum().clamp(min=1e-12)
                if error < self._default(self.update_threshold, 2):
                    memory = updated_memory(memory, queries.flatten(0, 1))
            raw = map(torch.cat, zip(*found, strict=True))
            return self._rated(*raw, maps_wanted=maps_wanted)

        return judge

    def _degrees(self, psnr, distance):
        """Mix both measures, relative to their ranges in the training images: (b,)."""
        weight = self._default(self.score_weight, 1)
        error = 1 - _relative(psnr, self.psnr_range_)
        return weight * error + (1 - weight) * _relative(distance, self.distance_range_)

    def _why_not_exported(self):
        if self.update_at_test:
            return "with update_at_test=True its memory changes from image to image"
        return None


def _relative(values, limits):
    low, high = limits
    return (values - low) / max(high - low, np.finfo(np.float32).eps)
