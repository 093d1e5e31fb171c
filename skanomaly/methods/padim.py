"""PaDiM: a Gaussian of normal features at each position (Defard et al., 2020).

Where parts lie aligned, the features at a position vary little from image to image. A
Gaussian for each position knows how, and a patch is as anomalous as it is far from the
mean, measured by the covariance.
"""

from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval

from .._fitting.batches import ImageBatches
from .._fitting.loop import seeded_generator
from .._fitting.persistence import shared_tensor
from .._patches import PatchwiseDetector
from .._tensors.filters import full_precision
from .._tensors.moments import Moments

REGULARIZATION = 0.01
POSITIONS_AT_ONCE = 256


class PaDiM(PatchwiseDetector):
    """PaDiM: Mahalanobis distances to a Gaussian for each position.

    Parameters
    ----------
    n_features : int or None, default=100
        Number of channels, drawn from those of all layers. None takes them all.
    backbone : str, default="resnet18"
        Name of a network of torchvision, "efficientnet_lite0", "timm/NAME", or
        "precomputed" if X is the structured array that ``BackboneFeatures`` returns;
        :class:`~skanomaly.backbones.Backbone` says more.
    layers : tuple of str, default=("layer1", "layer2", "layer3")
        Layers whose features make the map.
    weights : str, path or None, default="imagenet"
        "imagenet" for the weights that come with the network, downloaded at the first
        fit; the file of a state dict (``.pth``, ``.safetensors``); None for random
        weights.
    sigma : float, default=4.0
        Standard deviation of the Gaussian that smooths the map, in pixels of an image
        of 224 pixels. It scales with the size of the images.
    memory : str or path, default=None
        Folder in which features are kept, image by image, under a key of the image's
        content and the backbone's weights. Folds, candidates and clones of a search
        share it, and each image passes the backbone once. A file carries a checksum,
        and a damaged one is computed anew, with a warning.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    batch_size : int, default=8
        Number of images a batch.
    contamination : float, default=0.01
        Share of the training images that ``predict`` is to call anomalous.
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network; all else is computed in float32 or more.
    device : str, default="auto"
        Torch device. "auto" takes that of X if it is a tensor, else a GPU if there is
        one.
    random_state : int, RandomState instance or None, default=None
        Seed of random weights, and of the channels drawn.
    verbose : int, default=0
        Whether to show progress bars, in fit and in predictions that take a while.

    Attributes
    ----------
    network_ : Backbone
        The network; absent with ``backbone="precomputed"``.
    channels_ : numpy.ndarray of shape (d,)
        Which channels are looked at, counted through all layers.
    mean_ : numpy.ndarray of shape (rows, columns, d)
        Mean of the features at each position.
    whitening_ : numpy.ndarray of shape (rows, columns, d, d)
        Inverse of the Cholesky factor of the covariance at each position.
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
    PatchDetector : One estimator for the patches of all positions.
    PatchCore : Patches need not lie where they lay in training.

    Notes
    -----
    The score of an image is the maximum of its smoothed map. Layers are brought to the
    finest grid by repetition, and 0.01 is added to the variances, as in the public
    code; without that, covariances of fewer images than channels have no inverse.

    Departures: features are summed up while the images pass once, so that no array of
    all features is made, and the map is smoothed after it was enlarged. Thresholds are
    those of each image by the Gaussians of all others, which follow from the distances
    at hand; copies of an image are no others. Their 0.01 is larger by the share of the
    image and its copies, which makes the thresholds of n images up to
    ``sqrt((n - 2) / (n - 1))`` too low where there are more channels than images.

    A fitted detector holds ``d**2`` numbers for each position: 160 MB for images of
    256 pixels and 100 channels. Images must be aligned.

    References
    ----------
    T. Defard, A. Setkov, A. Loesch, R. Audigier. "PaDiM: a patch distribution modeling
    framework for anomaly detection and localization". ICPR workshops, 2020. arXiv
    2011.08785.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import PaDiM
    >>> X = np.random.default_rng(0).uniform(size=(8, 64, 64, 3))
    >>> detector = PaDiM(n_features=20, weights=None).fit(X)
    >>> detector.localize(X[:2]).shape
    (2, 64, 64)
    """

    _parameter_constraints = {
        **PatchwiseDetector._parameter_constraints,
        "n_features": [Interval(Integral, 1, None, closed="left"), None],
        "layers": [tuple, list],
    }

    def __init__(
        self,
        *,
        n_features=100,
        backbone="resnet18",
        layers=("layer1", "layer2", "layer3"),
        weights="imagenet",
        sigma=4.0,
        memory=None,
        image_shape=None,
        batch_size=8,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.n_features = n_features
        self.backbone = backbone
        self.layers = layers
        self.weights = weights
        self.sigma = sigma
        self.memory = memory
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.contamination = contamination
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _fit(self, images, labels):
        self._begin_anew()
        self._load_backbone(images)
        self.channels_ = self._drawn_channels(images)
        moments = None
        for _, patches in self._patches_in_batches(images):
            rows = patches.flatten(1, 2).transpose(0, 1)  # (positions, b, d)
            if moments is None:
                grid = patches.shape[1:]
                moments = Moments.empty(
                    len(rows), rows.shape[2], dtype=torch.float32, device=rows.device
                )
            moments.add(rows)
        whitening = inverse_factors(moments)
        self.mean_ = moments.mean.view(grid).cpu().numpy()
        self.whitening_ = whitening.view(*grid, grid[-1]).cpu().numpy()
        return self._judged_by_others(images)

    def _drawn_channels(self, images):
        """Return the numbers (d,) of the channels to look at."""
        first = ImageBatches(images.array, images.device, images.rows[:1])

        def count(batch, generator):
            features = self._features(batch)
            return sum(features[layer].shape[1] for layer in self.layers)

        ((_, n_channels),) = self._in_batches(first, count)
        if self.n_features is None:
            return np.arange(n_channels)
        if self.n_features > n_channels:
            raise ValueError(
                f"n_features={self.n_features}, but layers={tuple(self.layers)!r} of "
                f"{self.backbone!r} have {n_channels} channels; None takes them all."
            )
        generator = seeded_generator(self._seed)
        drawn = torch.randperm(n_channels, generator=generator)[: self.n_features]
        return np.sort(drawn.numpy())

    def _patches(self, images):
        features, first, parts = self._features(images), 0, []
        layers = [features[layer] for layer in self.layers]
        size = max((maps.shape[-2:] for maps in layers), key=lambda s: s[0] * s[1])
        for maps in layers:
            own = self.channels_ - first
            first += maps.shape[1]
            own = torch.from_numpy(own[(own >= 0) & (own < maps.shape[1])])
            if not len(own):  # none of this layer was drawn
                continue
            # channels stay last, where the distances want them
            drawn = maps.permute(0, 2, 3, 1).index_select(3, own.to(maps.device))
            parts.append(F.interpolate(drawn.permute(0, 3, 1, 2), size))
        return torch.cat(parts, dim=1).permute(0, 2, 3, 1)

    def _judge(self, images, *, maps_wanted, generator):
        maps = self._to_maps(self._distances(self._patches(images)))
        return maps.amax(dim=(1, 2)), maps

    def _distances(self, patches):
        """Return the Mahalanobis distances (b, rows, columns) of patches."""
        mean, whitening = (
            shared_tensor(array).to(patches.device)
            for array in (self.mean_, self.whitening_)
        )
        return mahalanobis(patches, mean, whitening)

    def _judged_by_others(self, images):
        """Return degrees and maxima of maps of training images, by all the others."""
        groups, n = images.groups, len(images)
        n_copies = torch.from_numpy(np.bincount(groups)[groups])
        peaks = []
        for rows, patches in self._patches_in_batches(images):
            distances = self._distances(patches)
            copies = n_copies[rows].to(distances.device)[:, None, None]
            maps = self._to_maps(without_itself(distances, n, copies))
            peaks.append(maps.amax(dim=(1, 2)).cpu().double().numpy())
        peaks = np.concatenate(peaks)
        return peaks, peaks

    def _why_not_exported(self):
        if self.backbone == "precomputed":
            return "it has no backbone of its own"
        return None


@full_precision
def mahalanobis(patches, mean, whitening):
    """Return the Mahalanobis distances of patches to the Gaussians of their positions.

    Parameters
    ----------
    patches : torch.Tensor of shape (b, rows, columns, d)
        Features.
    mean : torch.Tensor of shape (rows, columns, d)
        Means.
    whitening : torch.Tensor of shape (rows, columns, d, d)
        Inverse Cholesky factors of the covariances.

    Returns
    -------
    torch.Tensor of shape (b, rows, columns)
        Distances.
    """
    centred = (patches - mean).flatten(1, 2).permute(1, 2, 0)  # (positions, d, b)
    # in this order one image takes half the time that it does in the other
    whitened = whitening.flatten(0, 1) @ centred
    return whitened.norm(dim=1).T.reshape(patches.shape[:3])


def inverse_factors(moments):
    """Turn the scatter of each position into the inverse factor of its covariance.

    Parameters
    ----------
    moments : Moments
        Moments of the features at each of g positions; the scatter is overwritten.

    Returns
    -------
    torch.Tensor of shape (g, d, d)
        ``W``, lower triangular, such that ``W.T @ W`` is the inverse of the covariance
        plus 0.01 on its diagonal.
    """
    d = moments.scatter.shape[2]
    device = moments.scatter.device
    device = "cpu" if device.type == "mps" else device  # which has no float64
    identity = torch.eye(d, dtype=torch.float64, device=device)
    for part in moments.scatter.split(POSITIONS_AT_ONCE):
        covariance = part.to(identity) / (moments.count - 1) + REGULARIZATION * identity
        factors, failed = torch.linalg.cholesky_ex(covariance)
        if failed.any():
            raise ValueError(
                "The features have a covariance that cannot be inverted: their scale "
                f"is {covariance.abs().max().sqrt():.2g}, and in float32 0.01 beside "
                "it is lost. Other weights or layers, or features divided by it, help."
            )
        part.copy_(torch.linalg.solve_triangular(factors, identity, upper=False))
    return moments.scatter


def without_itself(distances, n, n_copies):
    """Return what distances would be, had the image not been among n training images.

    Parameters
    ----------
    distances : torch.Tensor
        Mahalanobis distances of features to the Gaussian of all images.
    n : int
        Number of the images.
    n_copies : torch.Tensor
        How many of them are the image, 1 or more; broadcast against the distances.

    Returns
    -------
    torch.Tensor
        Distances to the Gaussian of the others. They are left as they are where fewer
        than two others would remain.
    """
    others = n - n_copies
    # the formula of Sherman and Morrison for the covariance, whose scatter loses
    # n_copies * n / others times the product of the centred features
    lost = n_copies * n / (others * (n - 1.0))
    squares = distances.square()
    squares = squares / (1 - lost * squares).clamp(min=torch.finfo(torch.float32).eps)
    squares = squares * (n / others) ** 2 * (others - 1) / (n - 1)
    return torch.where(others > 1, squares.sqrt(), distances)
