"""What the detectors on features of a pretrained network share."""

import os
import warnings
from abc import abstractmethod
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.utils._param_validation import Interval, StrOptions

from ._fitting.batches import ImageBatches, move_network, resolve_device
from ._fitting.loop import autocast, seeded
from ._fitting.persistence import (
    HOW_TO_COMPUTE,
    as_fitted,
    channels_last,
    forget,
    is_other,
    unchanged_if_refused,
)
from ._tensors.filters import gaussian_blur
from ._typing import Self, fit_context
from ._validation import check_default_dtype, check_finite, check_range, normal_rows
from .backbones import (
    Backbone,
    FeatureMemory,
    check_backbone_takes,
    layer_keys,
    make_backbone,
    outline,
    standard_layers,
)
from .base import BaseDetector

SIGMA_IMAGE_SIZE = 224
TOP_SHARE = 0.01


class FeatureDetector(BaseDetector):
    """Base of the detectors that judge an image by the features of a frozen network.

    Features are those of a backbone, or, with ``backbone="precomputed"``, what X holds.
    """

    _parameter_constraints = {
        **BaseDetector._parameter_constraints,
        "backbone": [str],
        "layers": [tuple, list, None],
        "weights": [str, os.PathLike, None],
    }

    _kept_names = (*BaseDetector._kept_names, "_stored_layers", "_feature_shapes")

    @property
    def _wanted_layers(self):
        """Layers whose features are judged."""
        if self.layers is not None:
            return tuple(self.layers)
        if self.backbone == "precomputed":
            return tuple(self._feature_shapes)
        return standard_layers(self.backbone)

    def _build_network(self):
        return Backbone(self.backbone, self._stored_layers)

    def _check_X(self, X, *, reset):
        structured = getattr(getattr(X, "dtype", None), "names", None) is not None
        if structured != (self.backbone == "precomputed"):
            raise ValueError(
                f"backbone={self.backbone!r}, but X is "
                + ("a" if structured else "not a")
                + " structured array of features; backbone='precomputed' takes those "
                "of BackboneFeatures."
            )
        return (
            self._check_features(X, reset=reset)
            if structured
            else super()._check_X(X, reset=reset)
        )

    def _check_features(self, X, *, reset):
        name = type(self).__name__
        unknown = [layer for layer in self.layers or () if layer not in X.dtype.names]
        if unknown:
            raise ValueError(
                f"layers={self.layers!r}: X has no field {unknown[0]!r}, but "
                f"{', '.join(X.dtype.names)}."
            )
        if len(X) < (2 if reset else 1):
            raise ValueError(
                f"X is refused: Found array with {len(X)} sample(s) (shape={X.shape}) "
                f"while a minimum of {2 if reset else 1} is required by {name}."
            )
        for layer in X.dtype.names:
            field = X.dtype[layer]
            if X.ndim != 1 or field.base.kind != "f" or len(field.shape) != 3:
                raise ValueError(
                    f"X has shape {X.shape} and a field {layer!r} of {field}, but "
                    f"{name} wants features (n,) whose fields are floats (h, w, c)."
                )
        if not all(np.isfinite(x[n]).all() for x in X for n in X.dtype.names):
            raise ValueError(f"Input X contains NaN or infinity, which {name} refuses.")
        shapes = {layer: X.dtype[layer].shape for layer in X.dtype.names}
        if reset:
            self._feature_shapes = shapes
            self.image_shape_ = max(
                (shapes[layer] for layer in self._wanted_layers),
                key=lambda s: s[0] * s[1],
            )
            self.n_features_in_ = sum(int(np.prod(s)) for s in shapes.values())
        elif shapes != self._feature_shapes:
            raise ValueError(
                f"X holds features of the shapes {shapes}, but {name} was fitted on "
                f"{self._feature_shapes}."
            )
        return X

    def _check_settings(self):
        layers = self._wanted_layers
        if not layers:
            raise ValueError(
                f"layers is empty; {type(self).__name__} needs at least one layer."
            )
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers={layers!r} names a layer twice.")
        if self.backbone != "precomputed":
            outline(self.backbone, layers)  # refuses unknown names
            check_backbone_takes(self.backbone, self.image_shape_)

    def _load_backbone(self, images, *, with_last_stage=False):
        """Make ``network_``, and note which layers there are."""
        forget(self, "network_")
        if self.backbone == "precomputed":
            self._stored_layers = images.array.dtype.names
            return
        with seeded(self._seed):
            network = make_backbone(
                self.backbone,
                self._wanted_layers,
                self.weights,
                with_last_stage=with_last_stage,
            )
        self.network_ = channels_last(network.to(images.device))
        self._stored_layers = network.layers

    def _features(self, images):
        """Return features (b, c, h, w) of images by layer."""
        return images if self.backbone == "precomputed" else self.network_(images)


class PatchwiseDetector(FeatureDetector):
    """Base of the detectors that judge each cell of a grid of features by itself.

    A method writes ``_patches(images)`` beside ``_fit`` and ``_judge``.
    """

    _parameter_constraints = {
        **FeatureDetector._parameter_constraints,
        "memory": [str, os.PathLike, None],
        "sigma": [Interval(Real, 0, 1000, closed="both")],
    }

    _kept_names = (*FeatureDetector._kept_names, "_layer_keys")
    _judged_by: tuple[str, ...] = ("sigma",)

    @abstractmethod
    def _patches(self, images):
        """Return the features of patches: (b, rows, columns, d)."""

    def _load_backbone(self, images):
        super()._load_backbone(images)
        if self.backbone != "precomputed":
            self._layer_keys = layer_keys(self.network_)
            if self.memory is not None:
                self._remembering().tidy()

    def _remembering(self):
        return FeatureMemory(
            self.memory, self.network_, self._layer_keys, self.precision
        )

    def _features(self, images):
        if self.memory is not None and self.backbone != "precomputed":
            return self._remembering()(images)
        return super()._features(images)

    def _patches_in_batches(self, images):
        """Return an iterator over the rows and the patches of each batch of images."""

        def patches(batch, generator):
            return self._patches(batch)

        return self._in_batches(images, patches)

    def _to_maps(self, values):
        """Bring values (b, rows, columns) of patches to the size of the images."""
        size = self.image_shape_[:2]
        maps = F.interpolate(values[:, None], size, mode="bilinear")[:, 0]
        return gaussian_blur(maps, self.sigma * min(size) / SIGMA_IMAGE_SIZE)


class GrowingDetector(PatchwiseDetector):
    """Base of the detectors of patches to which further images can be added.

    A method writes ``_update(images)`` beside ``_fit``, which ends with ``_learned``,
    and ``_judge``.
    """

    _parameter_constraints = {
        **PatchwiseDetector._parameter_constraints,
        "patch_size": [Interval(Integral, 1, None, closed="left")],
        "image_score": [StrOptions({"max", "top"})],
    }

    _kept_names = (*PatchwiseDetector._kept_names, "_seen")
    _judged_by = (*PatchwiseDetector._judged_by, "image_score")

    def _learned(self, images, degrees, peaks):
        """Note what `partial_fit` goes on with; return what ``_fit`` does."""
        self._seen = np.unique(images.keys)
        return degrees, peaks

    @abstractmethod
    def _update(self, images):
        """Learn from further images; return their degrees and maxima of maps."""

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Add images to those learned from.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Further training images. The first ones are those of a fit.
        y : array-like of shape (n,) or (n, H, W), default=None
            Labels or masks, as in `fit`; anomalous images are left out.

        Returns
        -------
        self : object
            The fitted detector. Its thresholds go by the scores that images had when
            they were learned from.
        """
        if not self.__sklearn_is_fitted__():
            return self._fit_to(X, y)
        self._refuse_changes()
        with unchanged_if_refused(self):
            check_default_dtype()
            X = self._check_X(X, reset=False)
            check_range(self, X, seen=self._value_range)
            images = self._unseen_images(X, self._check_y(y, len(X)))
            if not len(images):
                return self
            if hasattr(self, "network_"):
                move_network(self.network_, images.device)
            with torch.inference_mode(False), autocast(images.device, "float32"):
                degrees, peaks = self._update(images)
            check_finite(self, degrees, peaks)
            self._seen = np.concatenate([self._seen, images.keys])
        self._set_thresholds(
            np.concatenate([self._training_degrees, degrees]),
            np.concatenate([self._training_peaks, peaks]),
        )
        return self

    def _unseen_images(self, X, labels):
        """Return the normal images among X, each once, that were not learned before."""
        rows = np.arange(len(X))
        if labels is not None:
            rows = normal_rows(self, labels, least=1)
        images = ImageBatches(X, resolve_device(self.device, X), rows)
        _, first = np.unique(images.keys, return_index=True)
        is_new = np.isin(np.arange(len(rows)), first)
        is_new &= ~np.isin(images.keys, self._seen)
        if n_known := int((~is_new).sum()):
            warnings.warn(
                f"{n_known} of the {len(rows)} images are copies of others, here or "
                "among those learned before, and are left out.",
                stacklevel=4,
            )
        return ImageBatches(X, images.device, rows[is_new])

    def _refuse_changes(self):
        as_fitted(self)  # refuses what fit would refuse
        for name, value in self._built_from.items():
            if name not in (*HOW_TO_COMPUTE, "contamination") and is_other(
                getattr(self, name), value
            ):
                raise ValueError(
                    f"partial_fit goes on with what was fitted, but {name}="
                    f"{getattr(self, name)!r} was {value!r} then. Set it back, or call "
                    "fit."
                )

    def _check_settings(self):
        super()._check_settings()
        if self.patch_size % 2 == 0:
            raise ValueError(
                f"patch_size={self.patch_size} must be odd, so that a patch has a "
                "centre."
            )

    def _patches(self, images):
        features = self._features(images)
        return joined_patches(
            [features[layer] for layer in self._wanted_layers], self.patch_size
        )

    def _degrees_and_maps(self, values, maps_wanted):
        """Return degrees (b,) and maps of images by values (b, rows, columns)."""
        by_maps = self.image_score == "top"
        maps = self._to_maps(values) if maps_wanted or by_maps else None
        if not by_maps:
            return values.amax(dim=(1, 2)), maps
        pixels = maps.flatten(1)
        n_top = max(1, round(TOP_SHARE * pixels.shape[1]))
        return pixels.topk(n_top, dim=1).values.mean(dim=1), maps


def joined_patches(layers, patch_size):
    """Average features over patches, and join those of several layers.

    Parameters
    ----------
    layers : list of torch.Tensor of shape (b, channels, rows, columns)
        Features of each layer. All are brought to the finest of their grids.
    patch_size : int
        Side of the patches in cells of each layer's grid. Beyond the border lie zeros.

    Returns
    -------
    torch.Tensor of shape (b, rows, columns, d)
        Features of the patches; ``d`` is the number of channels of all layers.
    """
    size = max((maps.shape[-2:] for maps in layers), key=lambda size: size[0] * size[1])
    parts = []
    for maps in layers:
        if patch_size > 1:
            # zeros beyond the border count: padding makes features at the border
            # unusual in every image, and this takes their weight
            maps = F.avg_pool2d(maps, patch_size, stride=1, padding=patch_size // 2)
        if maps.shape[-2:] != size:
            maps = F.interpolate(maps, size, mode="bilinear")
        parts.append(maps)
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1)
