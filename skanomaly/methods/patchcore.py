"""PatchCore: the nearest of a well-chosen share of normal patches (Roth et al., 2022).

The features of all patches of normal images are stored, thinned out so that no patch
lies far from a stored one. A patch is as anomalous as it is far from all of them, and
an image as its most anomalous patch.
"""

from functools import partial
from itertools import islice
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, Options
from torch import nn
from tqdm.auto import tqdm

from .._fitting.loop import seeded_generator
from .._fitting.persistence import shared_tensor
from .._patches import GrowingDetector
from .._tensors.neighbors import (
    farthest_rows,
    nearest_distances,
    traceable_nearest_distances,
)

PROJECTED_FEATURES = 128


class PatchCore(GrowingDetector):
    """PatchCore: distances to the nearest of a coreset of normal patches.

    Parameters
    ----------
    coreset : float, default=0.1
        Share of the training images' patches that are kept, each the farthest from
        those kept before.
    n_reweighting_neighbors : int, default=0
        Number of kept patches, the nearest one and those about it, by which the score
        of an image is weighted: it falls where they are as near to the image's patch.
        2 or more; 0 takes the distance as it is.
    backbone : str, default="wide_resnet50_2"
        Name of a network of torchvision, "efficientnet_lite0", "timm/NAME", or
        "precomputed" if X is the structured array that ``BackboneFeatures`` returns;
        :class:`~skanomaly.backbones.Backbone` says more.
    layers : tuple of str, default=None
        Layers whose features make the map. None takes those of the family of the
        backbone that have an eighth and a sixteenth of the image's side.
    weights : str, path or None, default="imagenet"
        "imagenet" for the weights that come with the network, downloaded at the first
        fit; the file of a state dict (``.pth``, ``.safetensors``); None for random
        weights.
    patch_size : int, default=3
        Side of the patches over which features are averaged, in cells of the grid of
        each layer; odd.
    image_score : {"max", "top"}, default="max"
        Score of an image: the highest value of its patches, or the mean of the highest
        hundredth of its map.
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
        Precision of the network; the search is always made in float32.
    device : str, default="auto"
        Torch device. "auto" takes that of X if it is a tensor, else a GPU if there is
        one.
    random_state : int, RandomState instance or None, default=None
        Seed of random weights, and of the projection and the first patches by which
        the others are chosen.
    verbose : int, default=0
        Whether to show progress bars, in fit and in predictions that take a while.

    Attributes
    ----------
    network_ : Backbone
        The network; absent with ``backbone="precomputed"``.
    bank_ : numpy.ndarray of shape (m, d)
        Features of the patches kept.
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
    PatchDetector : Any estimator in place of the nearest patch.
    SPADE : Keeps all patches, and searches those of similar images.

    Notes
    -----
    Departures from the paper and its code:

    - The channels of the layers stand side by side, averaged over patches; the code
      pools neighbourhoods and channels to 1024 numbers. Beyond the border lie zeros in
      both.
    - The search is exact. Distances by which patches are chosen are those after a
      random projection to 128 numbers, and the first patch is the farthest on average
      from ten drawn ones, as in the code; with fewer features there is no projection.
    - The weight of the score is that of the paper, off by default as in its code.
    - Thresholds come from distances to the patches of other images, and copies are no
      others: the distance of a training image to its own patches says little.

    A fit holds the features of all patches and their projections: 240 images of 256
    pixels and 384 channels take 380 and 126 MB. ``partial_fit`` adds the
    patches of new images to those kept and thins them out to the same share of all
    that were seen.

    References
    ----------
    K. Roth, L. Pemula, J. Zepeda, B. Schölkopf, T. Brox, P. Gehler. "Towards total
    recall in industrial anomaly detection". CVPR 2022. arXiv 2106.08265.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import PatchCore
    >>> X = np.random.default_rng(0).uniform(size=(8, 64, 64, 3))
    >>> detector = PatchCore(backbone="resnet18", weights=None).fit(X)
    >>> detector.localize(X[:2]).shape
    (2, 64, 64)
    """

    _parameter_constraints = {
        **GrowingDetector._parameter_constraints,
        "coreset": [Interval(Real, 0, 1, closed="right")],
        "n_reweighting_neighbors": [
            Options(Integral, {0}),
            Interval(Integral, 2, None, closed="left"),
        ],
    }

    _kept_names = (*GrowingDetector._kept_names, "_groups", "_n_patches")

    def __init__(
        self,
        *,
        coreset=0.1,
        n_reweighting_neighbors=0,
        backbone="wide_resnet50_2",
        layers=None,
        weights="imagenet",
        patch_size=3,
        image_score="max",
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
        self.coreset = coreset
        self.n_reweighting_neighbors = n_reweighting_neighbors
        self.backbone = backbone
        self.layers = layers
        self.weights = weights
        self.patch_size = patch_size
        self.image_score = image_score
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
        self.bank_ = np.empty((0, 0), np.float32)
        self._groups = np.empty(0, np.int64)
        self._n_patches = 0
        return self._learned(images, *self._update(images))

    def _update(self, images):
        """Add the patches of images, thin out, and judge the images by others."""
        features = self._all_patches(images)  # (n, rows, columns, d)
        n, *_, d = features.shape
        rows = features.view(-1, d)
        groups = images.groups + self._groups.max(initial=-1) + 1  # (n,)
        of_rows = np.repeat(groups, len(rows) // n)
        self._n_patches += len(rows)
        if len(self.bank_):
            kept = shared_tensor(self.bank_).to(rows.device)
            rows = torch.cat([kept, rows])
            of_rows = np.concatenate([self._groups, of_rows])
        n_kept = max(1, round(self.coreset * self._n_patches))
        if n_kept < len(rows):
            chosen = self._coreset(rows, n_kept)
            rows, of_rows = rows[chosen.to(rows.device)], of_rows[chosen.numpy()]
        self.bank_ = rows.cpu().numpy()
        self._groups = of_rows
        return self._judged_by_others(features, groups)

    def _all_patches(self, images):
        """Return the features (n, rows, columns, d) of all patches of images."""
        features = None
        for rows, patches in self._patches_in_batches(images):
            if features is None:
                features = patches.new_empty(len(images), *patches.shape[1:])
            features[rows] = patches
        return features

    def _coreset(self, rows, n_kept):
        """Return the indices, in their order, of ``n_kept`` of the rows (n, d)."""
        generator = seeded_generator(self._seed)
        center = rows.mean(dim=0)
        if rows.shape[1] > PROJECTED_FEATURES:
            shape = rows.shape[1], PROJECTED_FEATURES
            projection = torch.randn(shape, generator=generator)
            projection = (projection / PROJECTED_FEATURES**0.5).to(rows.device)
            rows = torch.addmm(-center @ projection, rows, projection)
        else:
            rows = rows - center
        found = islice(farthest_rows(rows, generator=generator), n_kept)
        shown = tqdm(found, total=n_kept, unit="patch", disable=not self.verbose)
        return torch.tensor(sorted(shown))

    def _judged_by_others(self, features, groups):
        """Return degrees and maxima of maps of images, by the patches of others.

        Copies of an image, which have its number, are no others.
        """
        bank = shared_tensor(self.bank_).to(features.device)
        degrees, peaks = [], []
        for patches, group in zip(features.split(1), groups, strict=True):
            others = self._groups != group
            # of nothing but copies, they are all that there is
            parts = runs_of(others) if others.any() else [slice(None)]
            search = partial(search_in_parts, parts=parts)
            own, maps = self._judged_patches(patches, bank, search=search)
            degrees.append(own.item())
            peaks.append(maps.amax().item())
        return np.array(degrees), np.array(peaks)

    def _judge(self, images, *, maps_wanted, generator):
        patches = self._patches(images)
        bank = shared_tensor(self.bank_).to(patches.device)
        return self._judged_patches(patches, bank, maps_wanted=maps_wanted)

    def _judged_patches(
        self, patches, bank, *, maps_wanted=True, search=nearest_distances
    ):
        """Return degrees (b,) and maps of images by their patches and a bank (m, d)."""
        distances, nearest = search(patches.flatten(0, 2), bank)
        values = distances.view(patches.shape[:3])
        degrees, maps = self._degrees_and_maps(values, maps_wanted)
        if self.n_reweighting_neighbors and len(bank) > 1:
            worst = values.flatten(1).argmax(dim=1)
            rows = torch.arange(len(worst), device=worst.device)
            queries = patches.flatten(1, 2)[rows, worst]  # (b, d)
            centers = bank[nearest.view(len(worst), -1)[rows, worst]]
            n_others = min(self.n_reweighting_neighbors, len(bank))
            _, others = search(centers, bank, n_neighbors=n_others)
            distances = (queries[:, None] - bank[others]).norm(dim=2)
            # the nearest is the first of them
            degrees = degrees * (1 - distances.softmax(dim=1)[:, 0])
        return degrees, maps

    def _why_not_exported(self):
        if self.backbone == "precomputed":
            return "it has no backbone of its own"
        return None

    def _as_module(self):
        return PatchCoreModule(self)


def runs_of(mask):
    """Return the slices within which a mask (n,) is True."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [slice(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def search_in_parts(queries, gallery, *, parts, n_neighbors=1):
    """Find what `nearest_distances` finds, in some parts of a gallery.

    Parameters
    ----------
    queries : torch.Tensor of shape (n_queries, d)
        Vectors whose neighbours are sought.
    gallery : torch.Tensor of shape (n_gallery, d)
        Vectors among which they are sought; it is not copied.
    parts : list of slice
        Rows of the gallery that count.
    n_neighbors : int, default=1
        Number of neighbours, at most that of the rows.

    Returns
    -------
    distances : torch.Tensor of shape (n_queries, n_neighbors)
        Distances in ascending order.
    indices : torch.Tensor of shape (n_queries, n_neighbors)
        Rows of the gallery.
    """
    found, rows = [], []
    for part in parts:
        own = gallery[part]
        distances, indices = nearest_distances(
            queries, own, n_neighbors=min(n_neighbors, len(own))
        )
        found.append(distances)
        rows.append(indices + (part.start or 0))
    n_neighbors = min(n_neighbors, sum(own.shape[1] for own in found))
    distances, order = torch.cat(found, dim=1).topk(n_neighbors, dim=1, largest=False)
    return distances, torch.cat(rows, dim=1).gather(1, order)


class PatchCoreModule(nn.Module):
    """PatchCore with its search as one product."""

    def __init__(self, detector):
        super().__init__()
        self.network = detector.network_
        self.detector = (detector,)  # hidden from torch
        self.register_buffer("bank", shared_tensor(detector.bank_))

    def forward(self, images):
        """Return maps (b, H, W) and scores (b,) of images (b, H, W, C)."""
        (detector,) = self.detector
        patches = detector._patches(images.permute(0, 3, 1, 2).float() / 255)
        degrees, maps = detector._judged_patches(
            patches, self.bank, search=traceable_nearest_distances
        )
        return maps, -degrees
