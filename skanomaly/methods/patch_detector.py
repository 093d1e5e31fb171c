"""Any one-class estimator on the features of patches, as in SubspaceAD.

A pretrained network turns an image into a grid of patches with some hundred features
each. Whether a patch is like those of good parts is an ordinary question for an
estimator that knows rows; its answers, laid out on the grid, are the map.
"""

import copy
import functools
from numbers import Integral

import numpy as np
import torch
from sklearn.base import clone, is_classifier, is_clusterer, is_regressor
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.pipeline import Pipeline
from sklearn.utils._param_validation import HasMethods, Interval

from .._fitting.batches import degrees_and_peaks
from .._fitting.loop import seeded_generator
from .._fitting.persistence import forget, shared_tensor
from .._patches import GrowingDetector
from .._tensors.filters import full_precision
from .._tensors.moments import Moments
from .._typing import available_if

EXPLAINED_VARIANCE = 0.99
N_FOLDS = 5
CHECKED_ROWS = 1000
ROUNDING = 1e-10  # of float32, squared and with some room


def _can_grow(detector):
    estimator = detector.estimator
    if estimator is None or hasattr(estimator, "partial_fit"):
        return True
    raise AttributeError(f"{type(estimator).__name__} has no partial_fit.")


def _last(estimator):
    """Return the last step of a pipeline, or the estimator itself."""
    while isinstance(estimator, Pipeline):
        estimator = estimator[-1]
    return estimator


def _by_residual(estimator, rows):
    residuals = rows - estimator.inverse_transform(estimator.transform(rows))
    return np.square(residuals).sum(axis=1)


def _by_score(estimator, rows):
    return -estimator.score_samples(rows)


def _by_decision(estimator, rows):
    decisions = estimator.decision_function(rows)
    # PyOD's estimators, which have these scores, call high what is anomalous
    return decisions if hasattr(_last(estimator), "decision_scores_") else -decisions


def _by_neighbors(estimator, rows):
    return estimator.kneighbors(rows)[0].mean(axis=1)


def _by_centers(estimator, rows):
    return estimator.transform(rows).min(axis=1)


RULES = {
    "inverse_transform": _by_residual,
    "score_samples": _by_score,
    "decision_function": _by_decision,
    "kneighbors": _by_neighbors,
}


def rule_of(estimator):
    """Return the function that makes an estimator tell how anomalous rows are.

    Parameters
    ----------
    estimator : estimator
        An estimator, fitted or not.

    Returns
    -------
    callable
        A function of the fitted estimator and rows (n, d) that returns values (n,),
        high where anomalous.

    Raises
    ------
    ValueError
        If the estimator has no method that tells.

    Examples
    --------
    >>> from sklearn.decomposition import PCA
    >>> from skanomaly.methods.patch_detector import rule_of
    >>> rule_of(PCA()).__name__
    '_by_residual'
    """
    name, last = type(estimator).__name__, _last(estimator)
    if getattr(last, "novelty", None) is False:
        raise ValueError(
            f"estimator={name}: {type(last).__name__} judges only what it was fitted "
            "on; set novelty=True."
        )
    if getattr(last, "fit_inverse_transform", None) is False:
        raise ValueError(
            f"estimator={name}: {type(last).__name__} gives nothing back that could "
            "be compared; set fit_inverse_transform=True."
        )
    # estimators of other packages need not have tags
    has_tags = hasattr(estimator, "__sklearn_tags__")
    if has_tags and (is_classifier(estimator) or is_regressor(estimator)):
        raise ValueError(
            f"estimator={name} learns from labels of its rows, and patches of normal "
            "images have none."
        )
    for method, rule in RULES.items():
        if hasattr(estimator, method):
            return rule
    if has_tags and is_clusterer(estimator) and hasattr(estimator, "transform"):
        return _by_centers
    raise ValueError(
        f"estimator={name} has none of the methods {', '.join(RULES)}, and no centres "
        "of clusters, so that it cannot tell how anomalous a patch is."
    )


class PatchDetector(GrowingDetector):
    """Any estimator that judges rows, on the patches of pretrained features.

    The features of all patches of the training images are rows to fit an estimator on:
    one that detects outliers, one that gives back what it knows (then the squared
    residual counts), one that finds neighbours, or one that finds clusters. Its
    answers for the patches of an image are the image's map.

    Parameters
    ----------
    estimator : estimator, default=None
        An estimator of scikit-learn's kind, which is cloned. Of its methods the first
        of ``inverse_transform``, ``score_samples``, ``decision_function`` and
        ``kneighbors`` counts, else of a clusterer the distance to the nearest centre.
        None is a PCA that keeps 99 % of the variance of all patches.
    backbone : str, default="resnet18"
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
    max_patches : int or None, default=20000
        Largest number of patches that the estimator is fitted on; of more, so many are
        drawn. None takes all. Without an estimator, all are taken in any case.
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
        Precision of the network; all else is computed in float32 or more.
    device : str, default="auto"
        Torch device. "auto" takes that of X if it is a tensor, else a GPU if there is
        one.
    random_state : int, RandomState instance or None, default=None
        Seed of random weights, of the patches drawn, and of the estimator where its own
        ``random_state`` is None.
    verbose : int, default=0
        Whether to show progress bars, in fit and in predictions that take a while.

    Attributes
    ----------
    network_ : Backbone
        The network; absent with ``backbone="precomputed"``.
    estimator_ : estimator
        The fitted estimator.
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
    PatchCore : The nearest of a well-chosen share of all patches.
    PaDiM : A Gaussian for each position.
    SPADE : Patches of the most similar images.

    Notes
    -----
    Without an estimator, mean and covariance of all patches are summed up in float64
    (products of a thousand at a time in float32) while the images pass once; no array
    of all patches is made. In a second pass each image is judged by a PCA of the
    others, fifth by fifth, for the thresholds. PCA and IncrementalPCA, given or not,
    are evaluated by torch on the device: the residual is what the features have along
    the directions left out.

    Averages over patches count zeros beyond the border of the image. The padding of the
    network makes features there unusual in every image, and averages of what lies
    inside raise false alarms: on magnetic tile at 128 pixels they lowered the image
    AUROC from 0.895 to 0.854, and the pixel AP from 0.375 to 0.285. The price is that
    defects in the outermost patches get a lower value.

    Departures from SubspaceAD: any network in place of DINOv2, features averaged over
    patches as in PatchCore instead of a mean of layers, no turned copies of the
    training images, and the maximum as the score of an image (``image_score="top"`` is
    the paper's).

    Estimators of scikit-learn compute on the processor. With one of one's own,
    thresholds go by the training images that it was fitted on. One that remembers rows,
    such as NearestNeighbors, finds many of them again, so that its thresholds are too
    strict; ``ThresholdCalibrator`` sets honest ones.

    Training images that overlap, such as crops of one photograph, know each other:
    thresholds are then too strict for images from elsewhere, whatever the estimator.

    In a search over ``layers`` with a ``memory``, an image passes the backbone once if
    the largest set of layers comes first.

    References
    ----------
    C. Lendering, E. Akdag, E. Bondarev. "SubspaceAD". CVPR 2026. arXiv 2602.23013.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import IsolationForest
    >>> from skanomaly import PatchDetector
    >>> X = np.random.default_rng(0).uniform(size=(8, 64, 64, 3))
    >>> detector = PatchDetector(IsolationForest(), weights=None).fit(X)
    >>> detector.localize(X[:2]).shape
    (2, 64, 64)
    """

    _parameter_constraints = {
        **GrowingDetector._parameter_constraints,
        "estimator": [HasMethods(["fit"]), None],
        "max_patches": [Interval(Integral, 2, None, closed="left"), None],
    }

    _kept_names = (
        *GrowingDetector._kept_names,
        "_moments",
        "_left_out",
        "_estimator_was",
    )

    def __init__(
        self,
        estimator=None,
        *,
        backbone="resnet18",
        layers=None,
        weights="imagenet",
        patch_size=3,
        max_patches=20000,
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
        self.estimator = estimator
        self.backbone = backbone
        self.layers = layers
        self.weights = weights
        self.patch_size = patch_size
        self.max_patches = max_patches
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

    partial_fit = available_if(_can_grow)(GrowingDetector.partial_fit)

    def _check_settings(self):
        super()._check_settings()
        if self.estimator is not None:
            rule_of(clone(self.estimator))

    def _fit(self, images, labels):
        forget(self, "_moments", "_left_out", "estimator_")
        self._begin_anew()
        self._load_backbone(images)
        if self.estimator is None:
            judged = self._fit_subspace(images)
        else:
            rows = self._drawn_patches(images)
            self.estimator_ = self._seeded_clone()
            self.estimator_.fit(rows)
            self._find_left_out()
            check_that_something_is_lost(self.estimator_, rows)
            judged = degrees_and_peaks(self._evaluate(images, maps_wanted=True))
        self._estimator_was = _described(self.estimator)
        return self._learned(images, *judged)

    def _refuse_changes(self):
        super()._refuse_changes()
        if _described(self.estimator) != self._estimator_was:
            raise ValueError(
                f"partial_fit goes on with what was fitted, but estimator="
                f"{self.estimator!r} was {self._estimator_was[0]} then, or had other "
                "parameters. Set it back, or call fit."
            )

    def _update(self, images):
        if self.estimator is None:
            return self._fit_subspace(images)
        self.estimator_ = copy.deepcopy(self.estimator_)
        self.estimator_.partial_fit(self._drawn_patches(images))
        self._find_left_out()
        return degrees_and_peaks(self._evaluate(images, maps_wanted=True))

    def _seeded_clone(self):
        estimator = clone(self.estimator)
        seeds = {
            name: self._seed
            for name, value in estimator.get_params().items()
            if name.rpartition("__")[2] == "random_state" and value is None
        }
        return estimator.set_params(**seeds)

    def _drawn_patches(self, images):
        """Return the features (m, d) of at most ``max_patches`` patches, drawn."""
        found, chosen, start = [], None, 0
        for _, patches in self._patches_in_batches(images):
            rows = patches.flatten(0, 2)
            if chosen is None:
                n = len(images) * patches[0, :, :, 0].numel()
                generator = seeded_generator(self._seed)
                chosen = torch.zeros(n, dtype=torch.bool)
                chosen[torch.randperm(n, generator=generator)[: self.max_patches]] = (
                    True
                )
            own = chosen[start : start + len(rows)]
            found.append(rows[own.to(rows.device)].cpu().numpy())
            start += len(rows)
        return np.concatenate(found)

    def _fit_subspace(self, images):
        """Fit a PCA to the patches of images and of those seen before.

        Return degrees and maxima of the maps of the images, each by a PCA of all but a
        fifth of them, in which it and its copies are.
        """
        folds = drawn_folds(images.groups, seeded_generator(self._seed))
        of_folds = {fold: None for fold in np.unique(folds)}
        for rows, patches in self._patches_in_batches(images):
            for fold in np.unique(folds[rows]):
                own = patches[torch.from_numpy(folds[rows] == fold).to(patches.device)]
                if of_folds[fold] is None:
                    of_folds[fold] = Moments.empty(
                        1, own.shape[-1], dtype=torch.float64, device=own.device
                    )
                of_folds[fold].add(own.flatten(0, 2)[None])
        is_first = not hasattr(self, "_moments")
        device = next(iter(of_folds.values())).mean.device
        before = [] if is_first else [self._known_moments(device)]
        known = functools.reduce(Moments.merged, [*before, *of_folds.values()])
        self._moments = {
            "mean": known.mean.cpu().numpy(),
            "scatter": known.scatter.cpu().numpy(),
            "count": known.count,
        }
        self.estimator_ = fitted_pca(known)
        self._find_left_out()

        subspaces = {}
        for fold in of_folds:
            others = [moments for other, moments in of_folds.items() if other != fold]
            others = functools.reduce(Moments.merged, [*before, *others] or [known])
            subspaces[fold] = left_out_of(fitted_pca(others))
        degrees, peaks = np.empty(len(images)), np.empty(len(images))
        for rows, patches in self._patches_in_batches(images):
            values = patches.new_empty(patches.shape[:3])
            for fold in np.unique(folds[rows]):
                own = torch.from_numpy(folds[rows] == fold).to(patches.device)
                values[own] = squared_residuals(patches[own], *subspaces[fold])
            own, maps = self._degrees_and_maps(values, maps_wanted=True)
            degrees[rows], peaks[rows] = own.cpu(), maps.amax(dim=(1, 2)).cpu()
        return degrees, peaks

    def _known_moments(self, device):
        mean, scatter = (
            torch.tensor(self._moments[name], device=device)
            for name in ("mean", "scatter")
        )
        return Moments(mean, scatter, self._moments["count"])

    def _find_left_out(self):
        """Note mean (d,) and left-out directions (d, m) of a PCA."""
        if type(self.estimator_) in (PCA, IncrementalPCA):
            subspace = left_out_of(self.estimator_)
            self._left_out = tuple(part.numpy() for part in subspace)

    def _judge(self, images, *, maps_wanted, generator):
        values = self._values(self._patches(images))
        return self._degrees_and_maps(values, maps_wanted)

    def _values(self, patches):
        """Return how anomalous patches (b, h, w, d) are: (b, h, w)."""
        if hasattr(self, "_left_out"):
            return squared_residuals(patches, *map(shared_tensor, self._left_out))
        rows = patches.flatten(0, 2).cpu().numpy()
        values = np.asarray(rule_of(self.estimator_)(self.estimator_, rows))
        name = type(self.estimator_).__name__
        if values.shape != (len(rows),):
            raise ValueError(
                f"estimator={name} has answered {len(rows)} rows by an array of shape "
                f"{values.shape}; wanted is one value a row."
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"estimator={name} has answered NaN or infinity to the features of "
                "patches."
            )
        values = torch.from_numpy(values.astype(np.float32)).to(patches.device)
        return values.view(patches.shape[:3])

    def _why_not_exported(self):
        if self.backbone == "precomputed":
            return "it has no backbone of its own"
        if not hasattr(self, "_left_out"):
            return "only PCA and IncrementalPCA are made of ONNX operators"
        return None


def check_that_something_is_lost(estimator, rows):
    """Refuse an estimator that gives back whatever it is given.

    Parameters
    ----------
    estimator : estimator
        A fitted estimator.
    rows : numpy.ndarray of shape (n, d)
        The rows of its fit.

    Raises
    ------
    ValueError
        If residuals count, and are nothing but rounding.
    """
    if rule_of(estimator) is _by_residual:
        rows = rows[:CHECKED_ROWS]
        residuals = _by_residual(estimator, rows)
        if residuals.max() <= ROUNDING * np.square(rows).sum(axis=1).max():
            raise ValueError(
                f"estimator={estimator} gives back all patches as they are, so that "
                "no patch has a residual; give it fewer components."
            )


@full_precision
def squared_residuals(patches, mean, left_out):
    """Return the squared norms of patches along the directions left out.

    Parameters
    ----------
    patches : torch.Tensor of shape (..., d)
        Features.
    mean : torch.Tensor of shape (d,)
        Their mean.
    left_out : torch.Tensor of shape (d, m)
        Orthonormal directions. A difference of squared norms would cost digits where
        the residual is small.

    Returns
    -------
    torch.Tensor of shape (...)
        Squared norms.
    """
    mean, left_out = (part.to(patches.device) for part in (mean, left_out))
    return ((patches - mean) @ left_out).square().sum(dim=-1)


def _described(estimator):
    """Return what tells an estimator from another: its name, and its parameters."""
    if estimator is None:
        return "None", ""
    return type(estimator).__name__, repr(clone(estimator).get_params())


def drawn_folds(groups, generator):
    """Draw a number from 0 to 4 for each image (n,), the same for equal groups."""
    n_groups = int(groups.max()) + 1
    of_groups = torch.randperm(n_groups, generator=generator) % N_FOLDS
    return of_groups.numpy()[groups]


def left_out_of(pca):
    """Return the mean (d,) and the directions (d, m) that a PCA leaves out."""
    directions, _ = np.linalg.qr(pca.components_.T, mode="complete")
    left_out = directions[:, len(pca.components_) :]
    return tuple(
        torch.from_numpy(part.astype(np.float32)) for part in (pca.mean_, left_out)
    )


def fitted_pca(moments):
    """Return a PCA that keeps 99 % of the variance.

    Parameters
    ----------
    moments : Moments
        Moments of one group of rows.

    Returns
    -------
    PCA
        What scikit-learn's would be if it had been fitted on the rows.
    """
    count = moments.count
    covariance = moments.scatter[0].cpu().numpy() / max(1, count - 1)
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1].clip(min=0), directions[:, ::-1]
    total = variances.sum()
    shares = variances / total if total > 0 else np.zeros_like(variances)
    n_kept = int(np.searchsorted(shares.cumsum(), EXPLAINED_VARIANCE)) + 1
    n_kept = min(n_kept, len(shares) - 1)
    pca = PCA(EXPLAINED_VARIANCE)
    pca.mean_ = moments.mean[0].cpu().numpy()
    pca.components_ = np.ascontiguousarray(directions[:, :n_kept].T)
    pca.explained_variance_ = variances[:n_kept]
    pca.explained_variance_ratio_ = shares[:n_kept]
    pca.singular_values_ = np.sqrt(variances[:n_kept] * max(1, count - 1))
    left_out = variances[n_kept : min(count, len(shares))]
    pca.noise_variance_ = left_out.mean() if len(left_out) else 0.0
    pca.n_components_ = n_kept
    pca.n_samples_ = count
    pca.n_features_in_ = len(shares)
    return pca
