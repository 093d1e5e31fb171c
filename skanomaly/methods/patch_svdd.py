"""Patch SVDD: one-class features of patches (Yi, Yoon, ACCV 2020).

An encoder of patches learns two things on normal images: that patches which nearly
cover each other are alike, and on which side of a patch its neighbour lies. The
features of all normal patches are stored, at two sizes. A patch is as anomalous as it
is far from the nearest of them.
"""

import math
import warnings
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._fitting.loop import Samples
from .._fitting.persistence import forget, shared_tensor
from .._tensors.filters import full_precision
from .._tensors.neighbors import ApproximateIndex, nearest_distances
from .._tensors.networks import pad_to_multiple
from ..base import NetworkDetector

NOISE = 0.02
SLOPE = 0.1
LARGEST_PATCH = 32
# channels of the inner layers at the largest patch size, in widths
INNER_WIDTHS = (1, 2, 4, 4, 2, 1, 1)
# of the second patch around the first, row by row
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
# sides of an image, in patch sizes, that leave room for the pairs of large patches
ROOM = 3.5
# of the graph: rows of the gallery compared at a time, and how many are looked at twice
GALLERY_ROWS = 8192
N_CANDIDATES = 4


class PatchEncoder(nn.Sequential):
    """Convolutions without padding that turn a patch into one vector in (-1, 1).

    Parameters
    ----------
    channels : int
        Number of channels of the images.
    patch_size : int
        Side length of a patch, a multiple of 4; a quarter of it is the number of
        layers.
    width : int
        Number of channels of the first layer.
    n_features : int
        Number of features.
    """

    def __init__(self, channels, patch_size, width, n_features):
        inner = [times * width for times in INNER_WIDTHS[: patch_size // 4 - 1]]
        widths = [channels, *inner, n_features]
        layers = []
        for number in range(len(widths) - 1):
            stride = 1 if number else 2
            layers += [
                nn.Conv2d(widths[number], widths[number + 1], 3, stride),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        super().__init__(*layers[:-1], nn.Tanh())


class PatchSVDDNetwork(nn.Module):
    """Encoder of small patches, head that joins four of them, position classifiers.

    Parameters
    ----------
    channels : int
        Number of channels of the images.
    patch_size : int
        Side length of a small patch; that of a large one is twice as long.
    width : int
        Number of channels of the encoder's first layer.
    n_features : int
        Number of features of a patch.
    mean_size : tuple of int
        Height and width of the mean image.
    """

    def __init__(self, channels, patch_size, width, n_features, mean_size):
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("mean", torch.zeros(channels, *mean_size))
        self.encoder = PatchEncoder(channels, patch_size, width, n_features)
        self.head = nn.Sequential(
            nn.Conv2d(n_features, 2 * n_features, 2),
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Conv2d(2 * n_features, n_features, 1),
            nn.Tanh(),
        )
        self.classifiers = nn.ModuleDict(
            {name: _position_classifier(n_features) for name in ("small", "large")}
        )

    def forward(self, small, large):
        """Return the features (n, d) of small and large patches (n, c, side, side)."""
        # one pass for all: (n, c, size, size) and (4 * n, c, size, size)
        both = torch.cat([small, _quarters(large)])
        features = self.encoder(both).flatten(1)
        of_small, of_quarters = features.split([len(small), 4 * len(large)])
        grid = of_quarters.unflatten(0, (len(large), 2, 2)).permute(0, 3, 1, 2)
        return of_small, self.head(grid).flatten(1)

    def dense(self, images, strides):
        """Return the features of all patches of images: two of (b, d, rows, columns).

        The encoder has one strided layer, the first. So one pass over the image gives
        the features of the small patches at every second pixel, and the quarters of a
        large patch are among them.
        """
        grid = self.encoder(images)
        small, large = (grid[..., :: s // 2, :: s // 2] for s in strides)
        join, *others = self.head
        apart = self.patch_size // strides[1]  # quarters, in places of the grid
        large = F.conv2d(large, join.weight, join.bias, dilation=apart)
        for layer in others:
            large = layer(large)
        return small, large


def _position_classifier(n_features):
    hidden = 2 * n_features
    return nn.Sequential(
        nn.Linear(n_features, hidden),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Linear(hidden, len(DIRECTIONS)),
    )


def _quarters(patches):
    """Cut patches (n, c, 2 * size, 2 * size) into quarters (4 * n, c, size, size)."""
    size = patches.shape[-1] // 2
    parts = patches.unflatten(3, (2, size)).unflatten(2, (2, size))
    parts = parts.permute(0, 2, 4, 1, 3, 5)  # (n, 2, 2, c, size, size)
    return parts.flatten(0, 2)


def position_pairs(n, size, side, generator):
    """Draw places of pairs of patches that are neighbours.

    Parameters
    ----------
    n : int
        Number of pairs.
    size : tuple of int
        Height and width of the images.
    side : int
        Side length of the patches.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    places : torch.Tensor of shape (2, n, 2)
        Row and column of the upper left corners; both patches lie inside the image.
    directions : torch.Tensor of shape (n,)
        Where the second patch lies: numbers of the eight directions around the first,
        row by row.
    """
    directions = torch.randint(len(DIRECTIONS), (n,), generator=generator)
    nearest = 3 * side // 4
    farthest = torch.tensor([min(side - 1, length - side) for length in size])
    lengths = nearest + _draw_below((farthest - nearest + 1).expand(n, 2), generator)
    offsets = torch.tensor(DIRECTIONS)[directions] * lengths  # (n, 2)
    return _places(offsets, size, side, generator), directions


def near_pairs(n, size, side, generator):
    """Draw places of pairs of patches that nearly cover each other.

    Parameters
    ----------
    n : int
        Number of pairs.
    size : tuple of int
        Height and width of the images.
    side : int
        Side length of the patches.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    torch.Tensor of shape (2, n, 2)
        Row and column of the upper left corners; both patches lie inside the image, and
        they are never the same.
    """
    reach = max(1, side // 32)
    n_columns = 2 * reach + 1
    middle = n_columns**2 // 2
    numbers = torch.randint(n_columns**2 - 1, (n,), generator=generator)
    numbers += numbers >= middle
    offsets = torch.stack([numbers // n_columns, numbers % n_columns], dim=1) - reach
    return _places(offsets, size, side, generator)


def _places(offsets, size, side, generator):
    """Draw places (2, n, 2) of pairs that are offsets (n, 2) apart."""
    n_free = torch.tensor(size) - side + 1 - offsets.abs()  # (n, 2)
    firsts = (-offsets).clamp(min=0) + _draw_below(n_free, generator)
    return torch.stack([firsts, firsts + offsets])


def _draw_below(limits, generator):
    """Draw integers from 0 to below limits."""
    drawn = torch.rand(limits.shape, generator=generator, dtype=torch.float64)
    return (drawn * limits).long()


def crop(images, places, side):
    """Cut patches out of images.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        The images.
    places : torch.Tensor of shape (k, b, 2)
        Row and column of the upper left corner of each of k patches an image.
    side : int
        Side length of the patches.

    Returns
    -------
    torch.Tensor of shape (k, b, c, side, side)
        The patches.
    """
    steps = torch.arange(side)
    # one copy to the device: (2, k, b, side)
    rows, columns = (places.movedim(2, 0)[..., None] + steps).to(images.device)
    own = torch.arange(len(images), device=images.device)[:, None, None]
    # an index on either side of a slice puts what they select first
    patches = images[own, :, rows[..., :, None], columns[..., None, :]]
    return patches.permute(0, 1, 4, 2, 3)


@full_precision
def spread(values, side, stride):
    """Give every pixel the mean of the values of all patches that cover it.

    Parameters
    ----------
    values : torch.Tensor of shape (b, rows, columns)
        Values of the patches.
    side, stride : int
        Side length of the patches and distance from one to the next, in pixels.

    Returns
    -------
    torch.Tensor of shape (b, h, w)
        The maps, with ``(rows - 1) * stride + side`` rows.
    """
    vertical, horizontal = (
        _coverage(n, side, stride, values) for n in values.shape[1:]
    )
    return vertical @ values @ horizontal.T


def _coverage(n_patches, side, stride, like):
    """Return the shares (h, n_patches) that patches of one axis have in its pixels."""
    starts = stride * torch.arange(n_patches, device=like.device)
    length = (n_patches - 1) * stride + side
    pixels = torch.arange(length, device=like.device)[:, None]
    covers = ((pixels >= starts) & (pixels < starts + side)).to(like.dtype)
    return covers / covers.sum(dim=1, keepdim=True)


class RepeatedSamples(Samples):
    """Images each of which an epoch visits several times.

    Parameters
    ----------
    images : sequence
        ``images[indices]`` returns a tensor of shape (b, ...).
    n_repeats : int
        Number of visits.
    device : torch.device, default="cpu"
        Where batches are wanted.
    """

    def __init__(self, images, n_repeats, device="cpu"):
        super().__init__(images, device=device)
        self.n_repeats = n_repeats

    def __len__(self):
        return len(self.images) * self.n_repeats

    def batch(self, indices, step, generator):
        """Return the batch of some rows."""
        return super().batch(indices % len(self.images), step, generator)

    def split(self, fraction, seed):
        """Return the rows to train on and those of the images that are held out."""
        visits = len(self.images) * np.arange(self.n_repeats)[:, None]
        once = Samples(self.images, device=self.device).split(fraction, seed)
        return tuple((visits + rows).ravel() for rows in once)


class PatchSVDD(NetworkDetector):
    """Patch SVDD: distances to the nearest features of normal patches.

    An encoder of patches is trained by two tasks: patches that nearly cover each other
    are to have nearly the same features, and from the features of two neighbours a
    classifier is to tell on which side of the first the second lies. A patch is
    anomalous if its features are far from those of all patches of the training images,
    and a pixel if the patches of two sizes that cover it are.

    Parameters
    ----------
    patch_size : int, default=32
        Side length of the small patches in pixels, a multiple of 4 and at most 32; the
        large ones have twice the side. A quarter of it is the number of the encoder's
        layers. An eighth to a quarter of the images' side is a good choice.
    strides : tuple of int, default=(4, 16)
        Distances in pixels from one small and one large patch to the next in
        prediction, even numbers that divide ``patch_size``. The time of the search
        falls with their fourth power, its memory with their square.
    width : int, default=32
        Number of channels of the encoder's first layer; inner layers have up to four
        times as many.
    n_features : int, default=64
        Number of features of a patch.
    svdd_weight : float, default=1e-3
        Weight of the distance between patches that nearly cover each other, against the
        cross-entropy of the positions. Where it is too large, all features become
        equal.
    n_repeats : int, default=100
        Number of times that an epoch visits each image, with other patches each time.
    center : {"pixel", "channel"}, default="pixel"
        What is subtracted from images: the mean image, which suits images that are
        aligned, or the mean of each channel.
    combination : {"product", "sum"}, default="product"
        How the maps of both patch sizes become one.
    algorithm : {"brute", "nndescent"}, default="brute"
        "brute" searches the nearest features exactly. "nndescent" builds an approximate
        index over the features of all training images; it pays above about a million
        of them.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=300
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam.
    batch_size : int, default=64
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
        Seed of the initial weights, the order of the images, the patches and their
        noise, and of the approximate index.
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
        The trained network and the mean image.
    gallery_ : dict of str to numpy.ndarray of shape (n, rows, columns, n_features)
        Features of the "small" and the "large" patches of the training images.
    indices_ : dict of str to object
        Approximate index by patch size, with its measured ``recall_``; only with
        ``algorithm="nndescent"``.
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

    Warns
    -----
    UserWarning
        If the images are so small that they are padded to ``3.5 * patch_size``.

    See Also
    --------
    SPADE : Compares features of a pretrained network, without training.
    DifferNet : Learns the density of features.

    Notes
    -----
    Departures from the paper and its code:

    - Pairs of patches are drawn inside of the image: first their offset, then a place
      where both fit. The code moves a patch that sticks out back into the image, which
      shortens a third of the offsets of large patches at 256 pixels, makes the two
      patches of some pairs the same, and contradicts the direction of a few.
    - The last layer of the position classifiers is trained. In the code its weights are
      normalised where no gradient reaches them, so that only its biases are.
    - The nearest features are searched exactly at both sizes; the code searches the
      small patches approximately.
    - The weight of the SVDD term was chosen for each class of images and not published;
      1e-3 is that of the code's example.
    - The last epoch counts. The code reports the best one on the test set.
    - Images are not resized (the paper has 256 pixels, the filter of its code depends
      on the version of Pillow) and grey ones keep their one channel.
    - Encoders of patches below 32 pixels have fewer layers, and patches that nearly
      cover each other are at least one pixel apart.
    - Images are padded by replication to a multiple of both strides and to 3.5
      ``patch_size``, where the pairs have room. Small patches that suit the images
      avoid it.
    - Thresholds come from distances to the patches of the other images: those of a
      training image are stored themselves, so that its own score is 0. Copies are no
      others. The encoder has seen all of them.

    All patches of an image are evaluated in one pass, which gives the same features as
    one after the other. The search takes ``2 * n_features * positions**2 * n``
    operations for an image, with ``positions`` of the small patches (3249 at 256
    pixels). The training at the paper's size is one for a GPU.

    The untrained encoder (``max_epochs=1`` with a vanishing ``learning_rate``) is what
    a trained one has to beat. Where all features become equal, a lower ``svdd_weight``
    helps; where the loss stays at 4.16, twice the logarithm of 8, no position has been
    learned yet.

    On a processor, images of 64 pixels, ``patch_size=16``, ``strides=(2, 8)``,
    ``center="channel"``, ``svdd_weight=0.1``, ``batch_size=32``, ``n_repeats=8``,
    ``learning_rate=1e-3`` and ``max_epochs=15`` are a good start for some fifty images:
    half a minute. For 128 pixels ``strides=(4, 8)`` and ``max_epochs=45`` take about as
    long. Small images of aligned objects suit the untrained encoder very well: for 42
    toothbrushes of MVTec AD at 64 pixels, three seeds, its image and pixel AUROC are
    0.995 and 0.978, those after this training 0.982 and 0.917.

    References
    ----------
    J. Yi, S. Yoon. "Patch SVDD: patch-level SVDD for anomaly detection and
    segmentation". ACCV 2020. arXiv 2006.16067.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import PatchSVDD
    >>> X = np.random.default_rng(0).uniform(size=(8, 32, 32, 1))
    >>> detector = PatchSVDD(
    ...     patch_size=8, strides=(4, 8), width=4, n_features=8, n_repeats=1,
    ...     max_epochs=2, random_state=0
    ... )
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "patch_size": [Interval(Integral, 4, LARGEST_PATCH, closed="both")],
        "strides": [tuple, list],
        "width": [Interval(Integral, 1, None, closed="left")],
        "n_features": [Interval(Integral, 1, None, closed="left")],
        "svdd_weight": [Interval(Real, 0, None, closed="left")],
        "n_repeats": [Interval(Integral, 1, None, closed="left")],
        "center": [StrOptions({"pixel", "channel"})],
        "combination": [StrOptions({"product", "sum"})],
        "algorithm": [StrOptions({"brute", "nndescent"})],
    }

    _judged_by = ("combination",)

    def __init__(
        self,
        *,
        patch_size=32,
        strides=(4, 16),
        width=32,
        n_features=64,
        svdd_weight=1e-3,
        n_repeats=100,
        center="pixel",
        combination="product",
        algorithm="brute",
        image_shape=None,
        max_epochs=300,
        learning_rate=1e-4,
        batch_size=64,
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
        self.patch_size = patch_size
        self.strides = strides
        self.width = width
        self.n_features = n_features
        self.svdd_weight = svdd_weight
        self.n_repeats = n_repeats
        self.center = center
        self.combination = combination
        self.algorithm = algorithm
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
        height, width, channels = self.image_shape_
        return PatchSVDDNetwork(
            channels,
            int(self.patch_size),
            int(self.width),
            int(self.n_features),
            (height, width) if self.center == "pixel" else (1, 1),
        )

    def _check_settings(self):
        size, strides = self.patch_size, self.strides
        if size % 4:
            raise ValueError(f"patch_size={size!r} must be a multiple of 4.")
        valid = (
            isinstance(s, Integral) and s > 0 and s % 2 == 0 and size % s == 0
            for s in strides
        )
        if len(strides) != 2 or not all(valid):
            raise ValueError(
                f"strides={strides!r} must be two even numbers that divide "
                f"patch_size={size!r}."
            )

    # training

    def _learn(self, images, labels, progress):
        forget(self, "gallery_", "indices_")
        self._warn_of_small_images()
        self._begin(images.device, progress)
        if not progress.goes_on:
            self.network_.mean.copy_(self._mean(images))
        samples = RepeatedSamples(images, self.n_repeats, images.device)
        self._train(samples, progress)
        self._store_features(images)
        return self._judge_without_own(images)

    def _warn_of_small_images(self):
        height, width, _ = self.image_shape_
        room = math.ceil(ROOM * self.patch_size)
        if min(height, width) < room:
            warnings.warn(
                f"Images of {height} x {width} pixels are padded to sides of {room}, "
                f"the least for patch_size={self.patch_size}. A smaller one suits them "
                "better.",
                stacklevel=2,
            )

    def _mean(self, images):
        """Return the mean of the training images, in the shape of the network's."""
        sums = [s for _, s in self._in_batches(images, _sum_of_images)]
        mean = torch.stack(sums).sum(dim=0) / len(images)  # (c, h, w)
        if self.center == "channel":
            mean = mean.mean(dim=(1, 2), keepdim=True)
        return mean

    def _prepared(self, network, images):
        """Subtract the mean from images and pad them."""
        multiple = math.lcm(*map(int, self.strides))
        minimum = multiple * math.ceil(ROOM * self.patch_size / multiple)
        return pad_to_multiple(images - network.mean, multiple, minimum=minimum)

    def _losses(self, network, batch):
        images = self._prepared(network, batch.images)
        small, small_directions = self._draw(images, self.patch_size, batch.generator)
        large, directions = self._draw(images, 2 * self.patch_size, batch.generator)
        features = network(small, large)  # of each (4 * b, d)
        loss = 0.0
        for name, own, wanted in zip(
            ("small", "large"), features, (small_directions, directions), strict=True
        ):
            first, second, third, fourth = own.float().unflatten(0, (4, -1))
            logits = network.classifiers[name](first - second).float()  # (b, 8)
            apart = torch.linalg.vector_norm(third - fourth, dim=1).mean()
            loss = loss + F.cross_entropy(logits, wanted) + self.svdd_weight * apart
        yield network, loss

    def _draw(self, images, side, generator):
        """Draw patches (4 * b, c, side, side) and directions (b,) of the first pairs.

        They are the first and second of neighbours, with noise, and of those that
        nearly cover each other.
        """
        n, n_channels, *size = images.shape
        neighbors, directions = position_pairs(n, size, side, generator)
        near = near_pairs(n, size, side, generator)
        patches = crop(images, torch.cat([neighbors, near]), side)
        shift = torch.randn(2, n, n_channels, 1, 1, generator=generator)
        noise = torch.randn(2, n, n_channels, side, side, generator=generator)
        noise = (NOISE * (shift + noise)).to(images.device)
        patches = torch.cat([patches[:2] + noise, patches[2:]])
        return patches.flatten(0, 1), directions.to(images.device)

    def _store_features(self, images):
        found = {"small": [], "large": []}
        for _, features in self._in_batches(images, self._features):
            for name, own in features.items():
                found[name].append(own.cpu().numpy())
        self.gallery_ = {name: np.concatenate(own) for name, own in found.items()}
        if self.algorithm == "nndescent":
            self.indices_ = {
                name: ApproximateIndex(
                    gallery.reshape(-1, gallery.shape[-1]), self._seed
                )
                for name, gallery in self.gallery_.items()
            }

    def _judge_without_own(self, images):
        """Yield rows, degrees and maps of the training images, as if they were new.

        Copies of an image are not others.
        """
        for row, group in enumerate(images.groups):
            others = images.groups != group
            if not others.any():  # of nothing but copies, they are all that there is
                others[:] = True
            features = {
                name: shared_tensor(gallery[[row]]).to(images.device)
                for name, gallery in self.gallery_.items()
            }
            search = partial(self._search_gallery, others=torch.from_numpy(others))
            maps = self._maps(features, search)
            degrees = maps.amax(dim=(1, 2)).cpu().double().numpy()
            yield slice(row, row + 1), degrees, maps.cpu().numpy()

    # judgement

    def _features(self, images, generator=None):
        """Return the features of all patches: (b, rows, columns, d) by patch size."""
        images = self._prepared(self.network_, images)
        found = self.network_.dense(images, self.strides)
        return {
            name: own.permute(0, 2, 3, 1).float()
            for name, own in zip(("small", "large"), found, strict=True)
        }

    def _judge(self, images, *, maps_wanted, generator):
        by_index = self.algorithm == "nndescent"
        search = self._search_index if by_index else self._search_gallery
        maps = self._maps(self._features(images), search)
        return maps.amax(dim=(1, 2)), maps

    def _maps(self, features, search):
        """Spread the distances that ``search`` finds to pixels; combine both sizes."""
        height, width, _ = self.image_shape_
        maps = []
        for (name, queries), stride in zip(features.items(), self.strides, strict=True):
            side = self.patch_size * (1 if name == "small" else 2)
            distances = search(name, queries.flatten(0, 2)).view(queries.shape[:3])
            maps.append(spread(distances, side, stride)[:, :height, :width])
        small, large = maps
        return small * large if self.combination == "product" else small + large

    def _search_gallery(self, name, queries, others=None):
        """Return the distances (q,) of queries (q, d) to the nearest stored features.

        Those of some training images (n,), by default of all.
        """
        gallery = shared_tensor(self.gallery_[name])
        gallery = gallery if others is None else gallery[others]
        rows = gallery.flatten(0, 2).to(queries.device)
        return nearest_distances(queries, rows)[0][:, 0]

    def _search_index(self, name, queries):
        return self.indices_[name].search(queries, 1)[0][:, 0]

    def _why_not_exported(self):
        if self.algorithm != "brute":
            return "its approximate index is not made of ONNX operators"
        return None

    def _as_module(self):
        return PatchSVDDModule(self)


def _sum_of_images(images, generator):
    return images.sum(dim=0)


class PatchSVDDModule(nn.Module):
    """Patch SVDD with its search as plain products, some stored rows at a time."""

    def __init__(self, detector):
        super().__init__()
        self.network = detector.network_
        self.detector = (detector,)  # hidden from torch
        for name, gallery in detector.gallery_.items():
            rows = gallery.reshape(-1, gallery.shape[-1])
            self.register_buffer(f"gallery_{name}", shared_tensor(rows))

    def forward(self, images):
        """Return maps (b, H, W) and scores (b,) of images (b, H, W, C)."""
        (detector,) = self.detector
        features = detector._features(images.permute(0, 3, 1, 2).float() / 255)
        maps = detector._maps(features, self._search)
        return maps, -maps.amax(dim=(1, 2))

    def _search(self, name, queries):
        """Return the distances (q,) of queries (q, d) to the nearest stored ones."""
        gallery = getattr(self, f"gallery_{name}")
        center = gallery.mean(dim=0)
        nearest = []
        for rows in gallery.split(GALLERY_ROWS):
            others = rows - center  # (rows, d)
            # half the squared norm of the query less half the squared distance
            closeness = (queries - center) @ others.T - others.square().sum(dim=1) / 2
            kept = closeness.topk(min(N_CANDIDATES, len(rows)), dim=1).indices
            found = (rows[kept] - queries[:, None]).norm(dim=2)  # (q, n_candidates)
            nearest.append(found.amin(dim=1))
        return torch.stack(nearest).amin(dim=0)
