"""SPADE: sub-image anomaly detection with deep pyramid correspondences (Cohen, Hoshen).

The features of normal images are stored, and nothing is trained. A new image is
compared with its nearest normal images as a whole; then every location of it, at
several depths of a pretrained network, with all locations of these images. Where
nothing similar is found, it is anomalous.
"""

from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn
from tqdm.auto import tqdm

from .._fitting.batches import resolve_device
from .._fitting.loop import autocast
from .._fitting.persistence import forget, shared_tensor
from .._fitting.processes import Processes
from .._patches import SIGMA_IMAGE_SIZE, FeatureDetector
from .._tensors.filters import gaussian_blur
from .._tensors.neighbors import ApproximateIndex, nearest_distances

MAP_THRESHOLD_IMAGES = 20
# of the exported search
N_CANDIDATES = 4
QUERIES_AT_ONCE = 256


class SPADE(FeatureDetector):
    """SPADE: distances to the nearest normal images, and to their nearest features.

    Parameters
    ----------
    n_neighbors : int, default=5
        Number of nearest training images whose mean distance is the image score.
    gallery_size : int, default=50
        Number of nearest training images whose features the map of an image is
        computed from. 0 stores image features only, which is the method DN2: images
        can be scored, but not localised.
    n_pixel_neighbors : int, default=1
        Number of nearest features whose mean distance is the value of a map.
    image_score : {"knn", "max"}, default="knn"
        "knn" scores an image by its nearest training images, as the paper does; "max"
        by the maximum of its map, which is slower and mostly better.
    algorithm : {"brute", "nndescent"}, default="brute"
        "brute" searches the nearest features exactly. "nndescent" builds an approximate
        index over the features of all training images, whatever ``gallery_size`` is;
        it pays above about a million of them.
    backbone : str, default="wide_resnet50_2"
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
        Seed of random weights and of the approximate index.
    verbose : int, default=0
        Whether to show progress bars, in fit and in predictions that take a while.

    Attributes
    ----------
    network_ : Backbone
        The network; absent with ``backbone="precomputed"``.
    embeddings_ : numpy.ndarray of shape (n, d)
        Pooled features of the training images.
    gallery_ : dict of str to numpy.ndarray of shape (n, rows, columns, channels)
        Features of the training images by layer.
    indices_ : dict of str to object
        Approximate index by layer, with its measured ``recall_``; only with
        ``algorithm="nndescent"``.
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
    BackboneFeatures : Computes the features once for a whole search.
    DRAEM : Trains on synthetic defects and needs no pretrained network.

    Notes
    -----
    Where paper and public code disagree, and departures. The authors' own code is not
    public; "the code" is that of ports which report figures:

    - Distances are not squared, as in the code; with one pixel neighbour this orders
      the features of a layer in the same way.
    - The paper uses 50 neighbours for images too. Its image AUROC is only reached with
      about 5, the default here; ``gallery_size`` is the paper's 50.
    - Each layer is searched by itself, and the maps are averaged, as in the code.
    - Images are compared by the pooled last stage of the network (``layer4`` of a
      ResNet). If the weights end before it, the last of ``layers`` takes its place; if
      X is precomputed, the last field of X.
    - Thresholds come from leave-one-out scores: a training image has a distance of
      zero to itself, so its own score says nothing about new images. Those that need
      maps (``map_threshold_``, and ``offset_`` with ``image_score="max"``) are computed
      from at most 20 training images, and by exact search. ``gallery_size=0`` saves
      these maps to a fit from which only scores are wanted.
    - Images are taken as they are: the paper resizes the shorter side to 256 pixels
      and crops the centre of 224 (``ResizeImages``, ``CenterCropImages``).
    - If X is precomputed, ``image_shape_`` and the maps are those of the finest layer,
      and ``n_features_in_`` counts the values of all layers.

    The search takes ``2 * channels * positions**2 * gallery_size`` operations for each
    layer of an image. At 224 pixels layer1 has 3136 positions and costs 88 % of the
    time; leaving it out of ``layers`` makes the search eight times as fast.

    References
    ----------
    N. Cohen, Y. Hoshen. "Sub-image anomaly detection with deep pyramid
    correspondences". arXiv 2005.02357, 2020.

    L. Bergman, N. Cohen, Y. Hoshen. "Deep nearest neighbor anomaly detection".
    arXiv 2002.10445, 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import SPADE
    >>> X = np.random.default_rng(0).uniform(size=(8, 32, 32, 3))
    >>> detector = SPADE(backbone="resnet18", weights=None, random_state=0).fit(X)
    >>> X[0, 8:16, 8:16] = 0
    >>> detector.predict(X[:1])
    array([-1])
    >>> detector.localize(X[:1]).shape
    (1, 32, 32)
    """

    _parameter_constraints = {
        **FeatureDetector._parameter_constraints,
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "gallery_size": [Interval(Integral, 0, None, closed="left")],
        "n_pixel_neighbors": [Interval(Integral, 1, None, closed="left")],
        "image_score": [StrOptions({"knn", "max"})],
        "algorithm": [StrOptions({"brute", "nndescent"})],
        "layers": [tuple, list],
        "sigma": [Interval(Real, 0, 1000, closed="both")],
    }

    _judged_by = ("n_neighbors", "n_pixel_neighbors", "image_score", "sigma")

    def __init__(
        self,
        *,
        n_neighbors=5,
        gallery_size=50,
        n_pixel_neighbors=1,
        image_score="knn",
        algorithm="brute",
        backbone="wide_resnet50_2",
        layers=("layer1", "layer2", "layer3"),
        weights="imagenet",
        sigma=4.0,
        image_shape=None,
        batch_size=8,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.n_neighbors = n_neighbors
        self.gallery_size = gallery_size
        self.n_pixel_neighbors = n_pixel_neighbors
        self.image_score = image_score
        self.algorithm = algorithm
        self.backbone = backbone
        self.layers = layers
        self.weights = weights
        self.sigma = sigma
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.contamination = contamination
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    _kept_names = (*FeatureDetector._kept_names, "_groups")

    def _why_no_maps(self):
        of_the_fit = getattr(self, "_built_from", {})
        if of_the_fit.get("gallery_size", self.gallery_size):
            return None
        return "gallery_size=0 keeps no features to localize with"

    def _check_settings(self):
        super()._check_settings()
        if self.image_score == "max" and not self.gallery_size:
            raise ValueError(
                "image_score='max' needs maps, but gallery_size=0 keeps no features "
                "for them; take image_score='knn'."
            )

    def _fit(self, images, labels):
        forget(self, "indices_")
        self._begin_anew()
        self._groups = images.groups
        self._load_backbone(images, with_last_stage=True)
        self._store_features(images)
        if self.algorithm == "nndescent":
            self.indices_ = {
                layer: ApproximateIndex(
                    gallery.reshape(-1, gallery.shape[-1]), self._seed
                )
                for layer, gallery in self.gallery_.items()
            }
        return self._leave_one_out(self._some_rows(), images.device)

    def _store_features(self, images):
        """Fill embeddings and gallery; each process computes its share of them."""
        n = len(images)
        processes = Processes()
        shares = processes.shares(list(gen_batches(n, self.batch_size)))
        own = shares[processes.rank]
        self.gallery_ = {}
        with tqdm(total=n, unit="image", disable=not self.verbose) as progress:
            for rows in own:
                with torch.inference_mode(), autocast(images.device, self.precision):
                    features, pooled = self._describe(images[rows])
                if rows == own[0]:
                    self.embeddings_ = np.empty((n, pooled.shape[1]), np.float32)
                    self.gallery_ = {
                        layer: np.empty((n, *_as_rows(features[layer]).shape[1:]), "f4")
                        for layer in (self.layers if self.gallery_size else ())
                    }
                self.embeddings_[rows] = pooled.cpu()
                for layer, gallery in self.gallery_.items():
                    gallery[rows] = _as_rows(features[layer]).cpu()
                progress.update(len(pooled))
        for array in (self.embeddings_, *self.gallery_.values()):
            processes.gather(shares, array)

    def _describe(self, images):
        """Return the features by layer and the pooled ones (b, d) of the last layer."""
        features = self._features(images)
        return features, features[self._stored_layers[-1]].mean(dim=(2, 3))

    def _judge(self, images, *, maps_wanted, generator):
        features, pooled = self._describe(images)
        n_wanted = max(self.n_neighbors, self.gallery_size)
        embeddings = shared_tensor(self.embeddings_).to(pooled.device)
        distances, neighbors = nearest_distances(
            pooled, embeddings, n_neighbors=min(n_wanted, len(embeddings))
        )
        maps = None
        if maps_wanted or self.image_score == "max":
            search = partial(self._search_gallery, neighbors=neighbors)
            by_index = self.algorithm == "nndescent"
            maps = self._maps(features, self._search_index if by_index else search)
        return self._degrees(distances, maps), maps

    def _degrees(self, distances, maps):
        """Return the degrees of anomaly (b,) by nearest images or by the map."""
        if self.image_score == "max":
            return maps.amax(dim=(1, 2))
        return distances[:, : self.n_neighbors].mean(dim=1)

    def _maps(self, features, search):
        """Average the distances that ``search`` finds over the layers; smooth them."""
        size = self.image_shape_[:2]
        maps = 0.0
        for layer in self.layers:
            queries = _as_rows(features[layer])  # (b, rows, columns, channels)
            distances = search(layer, queries.flatten(1, 2)).mean(dim=-1)
            distances = distances.view(len(queries), 1, *queries.shape[1:3])
            maps = maps + F.interpolate(distances, size, mode="bilinear")[:, 0]
        sigma = self.sigma * min(size) / SIGMA_IMAGE_SIZE
        return gaussian_blur(maps / len(self.layers), sigma)

    def _search_gallery(self, layer, queries, neighbors):
        """Return the distances (b, p, k) of queries (b, p, c) to their galleries."""
        gallery = shared_tensor(self.gallery_[layer])
        neighbors = neighbors[:, : self.gallery_size].cpu()
        n, n_channels = len(gallery), gallery.shape[-1]

        def search(queries, images):
            rows = images.reshape(-1, n_channels).to(queries.device)
            n_neighbors = min(self.n_pixel_neighbors, len(rows))
            return nearest_distances(queries, rows, n_neighbors=n_neighbors)[0]

        if neighbors.shape[1] == n:
            found = search(queries.reshape(-1, n_channels), gallery)
            return found.view(*queries.shape[:2], -1)
        return torch.stack(
            [
                search(own, gallery[rows])
                for own, rows in zip(queries, neighbors, strict=True)
            ]
        )

    def _search_index(self, layer, queries):
        index = self.indices_[layer]
        n_neighbors = min(self.n_pixel_neighbors, len(index.gallery))
        found, _ = index.search(queries.flatten(0, 1), n_neighbors)
        return found.view(*queries.shape[:2], -1)

    def _why_not_leave_one_out(self):
        if self.algorithm == "nndescent":
            return "it searches exactly, but algorithm='nndescent' does not"
        return None

    def _leave_one_out(self, rows=None, device=None):
        """Return degrees and maxima of the maps of the training images, as if new.

        Maps are those of some rows, by default of all.
        """
        everything = np.arange(len(self.embeddings_))
        distances, _ = self._other_images(everything, self.n_neighbors)
        degrees = distances.mean(dim=1).double().numpy()
        if not self.gallery_size:
            return degrees, None
        rows = everything if rows is None else rows
        peaks = self._leave_one_out_peaks(rows, device or resolve_device(self.device))
        return peaks if self.image_score == "max" else degrees, peaks

    def _some_rows(self):
        """Return the rows of the training images whose maps set the thresholds."""
        rng = np.random.default_rng(self._seed)
        return rng.permutation(len(self.embeddings_))[:MAP_THRESHOLD_IMAGES]

    def _other_images(self, rows, n_neighbors):
        """Return distances and rows of the training images nearest to some of them.

        Copies of an image are not others.
        """
        embeddings = shared_tensor(self.embeddings_)
        groups = torch.from_numpy(self._groups)
        most_copies = int(groups.bincount().max())
        # of nothing but copies, they are all that there is
        n_neighbors = max(1, min(n_neighbors, len(embeddings) - most_copies))
        distances, neighbors = nearest_distances(
            embeddings[rows],
            embeddings,
            n_neighbors=min(n_neighbors + most_copies, len(embeddings)),
        )
        is_copy = groups[neighbors] == groups[torch.from_numpy(rows)][:, None]
        order = is_copy.long().argsort(dim=1, stable=True)[:, :n_neighbors]
        return distances.gather(1, order), neighbors.gather(1, order)

    def _leave_one_out_peaks(self, rows, device):
        """Return the maxima of the maps of some training images without themselves."""
        _, neighbors = self._other_images(rows, max(self.gallery_size, 1))
        peaks = []
        for row, others in zip(rows, neighbors, strict=True):
            features = {
                layer: shared_tensor(gallery[[row]]).to(device).permute(0, 3, 1, 2)
                for layer, gallery in self.gallery_.items()
            }

            def search(layer, queries, others=others):
                return self._search_gallery(layer, queries, others[None])

            peaks.append(self._maps(features, search).amax().item())
        return np.array(peaks)

    def _why_not_exported(self):
        if self.algorithm != "brute":
            return "its approximate index is not made of ONNX operators"
        if self.backbone == "precomputed" or not self.gallery_size:
            return "it has no backbone or no gallery of its own"
        return None

    def _as_module(self):
        return SPADEModule(self)


class SPADEModule(nn.Module):
    """SPADE with its search as products with all features of the gallery at once."""

    def __init__(self, detector):
        super().__init__()
        self.network = detector.network_
        self.detector = (detector,)  # hidden from torch
        self.register_buffer("embeddings", torch.from_numpy(detector.embeddings_))
        for i, layer in enumerate(detector.layers):
            gallery = torch.from_numpy(detector.gallery_[layer]).flatten(1, 2)
            # far from the origin, squares would swallow the differences in rounding
            center = gallery.mean(dim=(0, 1))
            gallery = gallery - center
            self.register_buffer(f"center_{i}", center)
            self.register_buffer(f"gallery_{i}", gallery)  # (n, q, c)
            self.register_buffer(f"halves_{i}", gallery.square().sum(dim=2) / 2)

    def forward(self, images):
        """Return maps (b, H, W) and scores (b,) of images (b, H, W, C)."""
        (detector,) = self.detector
        features, pooled = detector._describe(images.permute(0, 3, 1, 2).float() / 255)
        distances = (pooled[:, None] - self.embeddings).norm(dim=2)
        nearest, neighbors = (
            distances.topk(min(n, len(self.embeddings)), largest=False)
            for n in (detector.n_neighbors, detector.gallery_size)
        )
        maps = detector._maps(
            features, partial(self._search, neighbors=neighbors.indices)
        )
        return maps, -detector._degrees(nearest.values, maps)

    def _search(self, layer, queries, neighbors):
        """Return the distances (b, p, k) of queries (b, p, c) to images' features."""
        (detector,) = self.detector
        i = detector.layers.index(layer)
        center, gallery, halves = (
            self.get_buffer(f"{name}_{i}") for name in ("center", "gallery", "halves")
        )
        return torch.stack(
            [
                _nearest_of_all(
                    own - center,
                    gallery[rows].flatten(0, 1),
                    halves[rows].flatten(),
                    detector.n_pixel_neighbors,
                )
                for own, rows in zip(queries.unbind(), neighbors.unbind(), strict=True)
            ]
        )


def _nearest_of_all(queries, gallery, halves, n_neighbors):
    """Return the distances (p, k) of queries (p, c) to the nearest of rows (q, c).

    Given half their squared norms, too, and some queries at a time: the products take
    about as much memory as the rows, and the graph does not grow with their number.
    """
    n_neighbors = min(n_neighbors, len(gallery))
    n_kept = min(n_neighbors + N_CANDIDATES, len(gallery))
    columns, distances = gallery.mT, []
    for some in queries.split(QUERIES_AT_ONCE):
        # half the squared norm of the query less half the squared distance
        closeness = torch.addmm(-halves, some, columns)
        nearest = gallery[closeness.topk(n_kept).indices]  # (p, n_kept, c)
        found = (nearest - some[:, None]).norm(dim=2)
        distances.append(found.topk(n_neighbors, largest=False).values)
    return torch.cat(distances)


def _as_rows(features):
    """View feature maps (b, c, h, w) as (b, h, w, c)."""
    return features.permute(0, 2, 3, 1)
