"""Pretrained networks as sources of features."""

import functools
import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ._backbones.sources import find_source
from ._backbones.weights import read_weights
from ._fitting.batches import (
    ImageBatches,
    content_key,
    move_network,
    resolve_device,
)
from ._fitting.files import (
    DamagedFileError,
    named_write_errors,
    read_summed,
    remove_leftovers,
    replacing_summed,
)
from ._fitting.loop import autocast, seeded
from ._fitting.persistence import (
    PersistentNetwork,
    as_fitted,
    channels_last,
    network_to_arrays,
    plain_parameters,
    without_data,
)
from ._typing import Self, StrPath, available_if, fit_context
from ._validation import check_images, check_range

__all__ = ["Backbone", "BackboneFeatures"]

MIN_SIDE = 32
STANDARD_LAYERS = {
    ("resnet", "resnext", "wide_resnet"): ("layer2", "layer3"),
    ("shufflenet",): ("stage2", "stage3"),
    ("efficientnet_lite0",): ("blocks.4", "blocks.10"),
}


class Backbone(nn.Module):
    """A network, cut off behind the last layer wanted.

    Parameters
    ----------
    name : str
        Name of a classification network of torchvision, such as "resnet18",
        "efficientnet_b0", "swin_t" or "vit_b_16"; "efficientnet_lite0"; or "timm/NAME"
        for one of timm, such as "timm/vit_small_patch14_dinov2.lvd142m".
    layers : tuple of str
        Names of the layers whose outputs are wanted, such as "layer2"; inside of a
        sequential one, "features.4". The blocks of transformers are
        "encoder.layers.encoder_layer_3" (torchvision's ViT), "features.3" (its Swin)
        or "blocks.3" (timm), those of EfficientNet-Lite0 "blocks.0" to "blocks.15". An
        unknown name raises an error that lists all.

    Attributes
    ----------
    trunk : torch.nn.Module
        The network without the layers behind the last one wanted; the names of its
        parameters are those of torchvision, of timm or of the package of the weights.
    stages : tuple of str
        Names of the layers that are run, in their order.

    Raises
    ------
    ValueError
        If the name or a layer is unknown.
    ImportError
        If the network is timm's, which is not installed.

    Examples
    --------
    >>> import torch
    >>> from skanomaly.backbones import Backbone
    >>> backbone = Backbone("resnet18", ("layer1", "layer2")).eval()
    >>> features = backbone(torch.rand(1, 3, 64, 64))
    >>> features["layer2"].shape
    torch.Size([1, 128, 8, 8])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name, layers):
        super().__init__()
        self.name = name
        self.layers = tuple(layers)
        self._source = find_source(name)
        self.trunk = self._source.whole()
        stages = self._source.layer_names(self.trunk, self.layers)
        unknown = [layer for layer in self.layers if layer not in stages]
        if unknown or not self.layers:
            known = self._source.layer_names(self.trunk, ())
            raise ValueError(
                f"layers={self.layers!r} of {name}: "
                + (f"{unknown[0]!r} is unknown" if unknown else "none is named")
                + f"; there are {', '.join(known)}, and the children of those that are "
                "sequential ('features.4')."
            )
        last = max(map(stages.index, self.layers))
        self.stages = tuple(stages[: last + 1])
        self._source.cut(self.trunk, self.stages)
        for module in self.trunk.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # it would overwrite the features of a layer
            # what is left out of files would be lost with them
            module._non_persistent_buffers_set.clear()
        self.register_buffer("mean", _channels(self._source.mean))
        self.register_buffer("std", _channels(self._source.std))
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute features.

        Parameters
        ----------
        images : torch.Tensor of shape (b, 1 or 3, h, w)
            Images in [0, 1]; grey ones are taken for three equal channels. The mean and
            standard deviation that the network wants are applied here.

        Returns
        -------
        dict of str to torch.Tensor of shape (b, channels, rows, columns)
            Features by layer, float32. Of a transformer these are its patches, without
            class and register tokens.

        Raises
        ------
        ValueError
            If the network takes other sizes only.
        """
        height, width = images.shape[-2:]
        self._source.check_size(height, width)
        bottom, right = max(0, MIN_SIDE - height), max(0, MIN_SIDE - width)
        if not self._source.pads:
            bottom = right = 0
        features = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        features = F.pad(features, (0, right, 0, bottom), mode="replicate")
        result = {}
        for layer, found in self._source.run(
            self.trunk, self.stages, self.layers, features
        ):
            rows = -(-found.shape[2] * height // (height + bottom))
            columns = -(-found.shape[3] * width // (width + right))
            result[layer] = found[..., :rows, :columns].float()
        return {layer: result[layer] for layer in self.layers}

    def load_weights(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """Load a state dict that was made for the whole network.

        Parameters
        ----------
        state : dict of str to torch.Tensor
            Parameters and buffers under the names of torchvision, of timm or of the
            package of the weights. Those of layers behind the last one wanted may be
            missing.
        source : str
            Where the state dict comes from; named in the errors.

        Raises
        ------
        ValueError
            If a parameter is missing, unknown, of another shape, NaN or infinite, or if
            a running variance is negative.
        """
        own, known = self.trunk.state_dict(), self._source.known
        misshapen = [
            key for key in own if key in state and state[key].shape != own[key].shape
        ]
        for problem, keys in (
            ("lacks", self._missing(state)),
            ("holds the unknown", [key for key in state if key not in known]),
            ("has another shape of", misshapen),
        ):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ValueError(
                    f"weights={source!r} do not fit {self.name} up to "
                    f"{self.stages[-1]!r}: the state dict {problem} {keys[0]!r}{more}."
                )
        loaded = {key: state.get(key, value).to(value) for key, value in own.items()}
        for key, value in loaded.items():
            if not value.isfinite().all():
                problem = "NaN or infinity"
            elif key.endswith("running_var") and (value < 0).any():
                problem = "a negative variance"
            else:
                continue
            raise ValueError(f"weights={source!r} hold {problem} in {key!r}.")
        self.trunk.load_state_dict(loaded)

    def _missing(self, state):
        """Return the names that a state dict lacks for the layers that are run."""
        return [
            key
            for key in self.trunk.state_dict()
            if key in self._source.known
            and key not in state
            and not key.endswith("num_batches_tracked")
        ]


@functools.cache
def outline(name: str, layers: tuple[str, ...]) -> Backbone:
    """Return a backbone without data, to be looked at only: a process builds it once.

    Raises
    ------
    ValueError
        If the name or a layer is unknown.
    """
    with without_data():
        return Backbone(name, layers).eval()


@functools.cache
def last_stage(name: str, layers: tuple[str, ...] = ()) -> str:
    """Return the name of the last layer of a network before its head.

    Sequential children that hold one of ``layers`` are opened.
    """
    source = find_source(name)
    with without_data():
        return source.layer_names(source.whole(), layers)[-1]


def standard_layers(name: str) -> tuple[str, ...]:
    """Return the layers of a backbone that detectors of patches take by default.

    Parameters
    ----------
    name : str
        Name of the network.

    Returns
    -------
    tuple of str
        The last layers whose grids are an eighth and a sixteenth of the image.

    Raises
    ------
    ValueError
        If the network is not one of the families whose layers are known.
    """
    for families, layers in STANDARD_LAYERS.items():
        if name.startswith(families):
            return layers
    raise ValueError(
        f"layers=None: backbone={name!r} has no usual ones; name them, such as "
        f"layers=({last_stage(name)!r},)."
    )


def _channels(values):
    return torch.tensor(values).view(1, 3, 1, 1)


def make_backbone(
    name: str,
    layers: Iterable[str],
    weights: StrPath | None,
    *,
    with_last_stage: bool = False,
) -> Backbone:
    """Build a backbone for inference.

    Parameters
    ----------
    name : str
        Name of a network, as `Backbone` takes it.
    layers : tuple of str
        Layers whose features are wanted.
    weights : str, path or None
        "imagenet" for the pretrained ones: torchvision's own (version 1, which papers
        use), downloaded or taken from torch hub's cache, where the SHA-256 that begins
        in its name is compared; those that timm has for the name, downloaded by timm;
        those in the package of the extra ``[offline]``, for "efficientnet_lite0". Or
        the file of a state dict with the same names, ``.pth`` or ``.safetensors``; or
        None for random weights, drawn from torch's generator.
    with_last_stage : bool, default=False
        Whether the network's last stage is wanted too, behind ``layers``, if the
        weights reach so far.

    Returns
    -------
    Backbone
        The network in evaluation mode.

    Raises
    ------
    OSError
        If there is no such file, or if the download fails.
    ImportError
        If timm or the package of the weights is missing.
    ValueError
        If name or layers are unknown, or if the file is damaged, holds no state dict,
        one of another network, NaN, infinity or a negative variance.
    """
    layers = tuple(layers)
    outline(name, layers)  # refuses unknown names before weights are fetched
    state = None
    if weights is not None:
        fetched = weights == "imagenet"
        state = find_source(name).pretrained() if fetched else read_weights(weights)
    if with_last_stage and (last := last_stage(name, layers)) not in layers:
        longer = outline(name, (*layers, last))
        if state is None or not longer._missing(state):
            layers = longer.layers
    backbone = Backbone(name, layers)
    if state is not None:
        backbone.load_weights(state, str(weights))
    return backbone.eval()


def check_backbone_takes(name: str, image_shape: tuple[int, int, int]) -> None:
    """Refuse images that a backbone does not take.

    Parameters
    ----------
    name : str
        Name of the network.
    image_shape : tuple of int
        Height, width and number of channels of the images.

    Raises
    ------
    ValueError
        If the images have another number of channels than 1 or 3, or a size that the
        backbone does not take.
    """
    *size, channels = image_shape
    if channels not in (1, 3):
        raise ValueError(
            f"X holds images of {channels} channels, but a backbone takes grey (1) or "
            "RGB (3) images."
        )
    find_source(name).check_size(*size)


def _gives_rows(features):
    """Return True, or raise unless features are pooled; for ``available_if``."""
    if not features.pool:
        raise AttributeError(
            "With pool=False each image has grids of features, which go into no data "
            "frame; pool=True gives rows."
        )
    return True


class BackboneFeatures(PersistentNetwork, TransformerMixin, BaseEstimator):
    """Turn images into the features of a pretrained network.

    Parameters
    ----------
    backbone : str, default="wide_resnet50_2"
        Name of a network of torchvision, "efficientnet_lite0", or "timm/NAME";
        `Backbone` says more.
    layers : tuple of str, default=("layer1", "layer2", "layer3")
        Layers whose outputs are taken.
    weights : str, path or None, default="imagenet"
        "imagenet" for the weights that come with the network, downloaded at the first
        fit; the file of a state dict (``.pth``, ``.safetensors``); None for random
        weights.
    pool : bool, default=False
        Whether to average each layer over all positions, which gives rows that any
        scikit-learn estimator takes.
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
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network.
    device : str, default="auto"
        Torch device. "auto" takes that of X if it is a tensor, else a GPU if there is
        one.
    random_state : int, RandomState instance or None, default=None
        Seed of random weights.

    Attributes
    ----------
    network_ : Backbone
        The network, cut off behind the last of the layers.
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the columns; only where X was a data frame of rows.

    See Also
    --------
    SPADE : Takes these features by ``backbone="precomputed"``.

    Notes
    -----
    The layers of an image stand together in one record of a structured array, which can
    be sliced, pickled, memory-mapped and split for cross-validation like any array.
    With ``pool=True``, ``set_output(transform="pandas")`` gives data frames.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import BackboneFeatures
    >>> X = np.zeros((2, 64, 64, 3), np.uint8)
    >>> features = BackboneFeatures(backbone="resnet18", weights=None).fit_transform(X)
    >>> features.shape, features["layer2"].shape
    ((2,), (2, 8, 8, 128))
    """

    _parameter_constraints = {
        "backbone": [str],
        "layers": [tuple, list],
        "weights": [str, os.PathLike, None],
        "pool": ["boolean"],
        "memory": [str, os.PathLike, None],
        "image_shape": ["array-like", None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "precision": [StrOptions({"float32", "bfloat16"})],
        "device": [str],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        *,
        backbone="wide_resnet50_2",
        layers=("layer1", "layer2", "layer3"),
        weights="imagenet",
        pool=False,
        memory=None,
        image_shape=None,
        batch_size=8,
        precision="float32",
        device="auto",
        random_state=None,
    ):
        self.backbone = backbone
        self.layers = layers
        self.weights = weights
        self.pool = pool
        self.memory = memory
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.precision = precision
        self.device = device
        self.random_state = random_state

    _judged_by = ("pool",)
    _kept_names = (*PersistentNetwork._kept_names, "_layer_keys")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"] if self.pool else []
        return tags

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Load the backbone.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images, uint8 in [0, 255] or real numbers in [0, 1].
        y : None
            Ignored.

        Returns
        -------
        self : object
            The fitted transformer.
        """
        X = check_images(self, X, reset=True, image_shape=self.image_shape)
        check_backbone_takes(self.backbone, self.image_shape_)
        with seeded(check_random_state(self.random_state).randint(2**31 - 1)):
            network = make_backbone(self.backbone, self.layers, self.weights)
        self.network_ = channels_last(network.to(resolve_device(self.device, X)))
        self._layer_keys = layer_keys(self.network_)
        self._built_from = plain_parameters(self)
        self._value_range = tuple(check_range(self, X))
        return self

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """Compute the features of images.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.

        Returns
        -------
        numpy.ndarray of shape (n,) or (n, channels)
            A structured array, one record an image and one field a layer of the shape
            (rows, columns, channels), float32; or with ``pool=True`` the averages of
            all layers side by side.
        """
        check_is_fitted(self)
        fitted = as_fitted(self)
        X = check_images(fitted, X, reset=False, image_shape=fitted.image_shape)
        check_range(self, X, seen=self._value_range)
        images = ImageBatches(X, resolve_device(self.device, X))
        move_network(self.network_, images.device)
        return _collect(len(images), fitted._compute(images))

    @available_if(_gives_rows)
    def get_feature_names_out(
        self, input_features: ArrayLike | None = None
    ) -> NDArray[np.object_]:
        """Name the columns of pooled features.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        numpy.ndarray of shape (channels,)
            A name for each channel of each layer, such as "layer1_0".
        """
        check_is_fitted(self)
        height, width, channels = self.image_shape_
        with torch.device("meta"), torch.inference_mode():  # which computes nothing
            network = as_fitted(self)._build_network()
            features = network(torch.empty(1, channels, height, width))
        names = [
            f"{layer}_{channel}"
            for layer, values in features.items()
            for channel in range(values.shape[1])
        ]
        return np.array(names, object)

    @available_if(_gives_rows)
    def set_output(self, *, transform: str | None = None) -> Self:
        """Choose what `transform` returns; only where features are pooled.

        Parameters
        ----------
        transform : {"default", "pandas", "polars"}, default=None
            An array or a data frame. None changes nothing.

        Returns
        -------
        self : object
            The transformer.
        """
        return super().set_output(transform=transform)

    def inverse_transform_maps(
        self, maps: ArrayLike, X: ArrayLike
    ) -> NDArray[np.float32]:
        """Bring maps from the grid of the features back to the size of the images.

        Parameters
        ----------
        maps : array-like of shape (n, rows, columns)
            Anomaly maps of the features.
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            The images that were transformed.

        Returns
        -------
        numpy.ndarray of shape (n, H, W)
            The maps at the resolution of the images, interpolated bilinearly, float32.
        """
        check_is_fitted(self)
        maps = torch.from_numpy(np.array(maps, dtype=np.float32))[:, None]
        size = self.image_shape_[:2]
        return F.interpolate(maps, size, mode="bilinear")[:, 0].numpy()

    def _build_network(self):
        return Backbone(self.backbone, self.layers)

    def _compute(self, images):
        """Yield the features of one batch after the other."""
        read = self.network_
        if self.memory is not None:
            read = FeatureMemory(
                self.memory,
                self.network_,
                self._layer_keys,
                self.precision,
                pool=self.pool,
            )
            read.tidy()
        for rows in gen_batches(len(images), self.batch_size):
            with torch.inference_mode(), autocast(images.device, self.precision):
                features = read(images[rows])
            yield self._to_records(features)

    def _to_records(self, features):
        if self.pool:
            pooled = [
                values if values.ndim == 2 else values.mean(dim=(2, 3))
                for values in features.values()
            ]
            return torch.cat(pooled, dim=1).cpu().numpy()
        arrays = {
            layer: maps.permute(0, 2, 3, 1).cpu().numpy()
            for layer, maps in features.items()
        }
        dtype = [(layer, np.float32, a.shape[1:]) for layer, a in arrays.items()]
        records = np.empty(len(next(iter(arrays.values()))), dtype)
        for layer, array in arrays.items():
            records[layer] = array
        return records


class FeatureMemory:
    """A backbone that keeps what it has computed, in files by image and layer.

    Parameters
    ----------
    folder : str or path
        Where the files are; several processes may share it.
    network : Backbone
        The network.
    keys : dict of str to str
        What `layer_keys` returns of it.
    precision : str
        Precision that it computes in.
    pool : bool, default=False
        Whether the mean of each layer over all positions is wanted.

    Notes
    -----
    The name of a file depends on the content of the image, the layer, the weights up
    to there and the precision: networks that are cut off elsewhere share it.
    """

    def __init__(self, folder, network, keys, precision, *, pool=False):
        self.network = network
        self.pool = pool
        kind = f"{precision}-means" if pool else precision
        self.folders = {
            layer: Path(os.path.expanduser(folder), f"{key}-{kind}")
            for layer, key in keys.items()
        }
        with named_write_errors(f"memory={os.fspath(folder)!r}"):
            for own in self.folders.values():
                own.mkdir(parents=True, exist_ok=True)

    def tidy(self):
        """Remove what killed processes have left."""
        for own in self.folders.values():
            remove_leftovers(own)

    def __call__(self, images):
        """Return the features of images (b, c, h, w) by layer.

        They have the shape (b, channels, rows, columns), or (b, channels) if pooled.
        """
        keys = [content_key(image) for image in images.cpu()]
        damaged = []
        found = {key: self._read(key, damaged) for key in dict.fromkeys(keys)}
        if damaged:
            warnings.warn(
                f"memory: {len(damaged)} files are damaged, such as {damaged[0]}; "
                "their features are computed anew.",
                stacklevel=2,
            )
        missing = [key for key, features in found.items() if features is None]
        if missing:
            features = self.network(images[[keys.index(key) for key in missing]])
            for number, key in enumerate(missing):
                own = {layer: values[number] for layer, values in features.items()}
                found[key] = self._keep(key, own)
        return {
            layer: torch.from_numpy(np.stack([found[key][layer] for key in keys]))
            .movedim(-1, 1)
            .to(images.device)
            for layer in self.folders
        }

    def _read(self, key, damaged):
        """Return the features of an image by layer, or None if a file is missing."""
        features = {}
        for layer, folder in self.folders.items():
            file = folder / f"{key}.npy"
            try:
                features[layer] = read_summed(file)
            except FileNotFoundError:
                return None
            except DamagedFileError as error:
                damaged.append(f"{str(file)!r} ({error})")
                return None
        return features

    def _keep(self, key, features):
        """Write the features (channels, rows, columns) of an image; return arrays."""
        arrays = {}
        for layer, values in features.items():
            values = values.mean(dim=(1, 2)) if self.pool else values.permute(1, 2, 0)
            arrays[layer] = values.contiguous().cpu().numpy()
            file = self.folders[layer] / f"{key}.npy"
            with replacing_summed(file, f"memory: {str(file)!r}") as stream:
                np.save(stream, arrays[layer])
        return arrays


def layer_keys(network: Backbone) -> dict[str, str]:
    """Return a key of all that a layer's features depend on beside the image.

    Parameters
    ----------
    network : Backbone
        A network.

    Returns
    -------
    dict of str to str
        A key for each of its layers: names of network and layer, and a checksum of the
        weights up to there.
    """
    arrays = network_to_arrays(network.trunk)
    keys = {}
    for layer in network.layers:
        own = outline(network.name, (layer,)).trunk.state_dict()
        digest = hashlib.sha256()
        for name in own:
            digest.update(name.encode())
            digest.update(arrays[name])
        name = network.name.replace("/", "-")
        keys[layer] = f"{name}-{layer}-{digest.hexdigest()[:24]}"
    return keys


def _collect(n, batches):
    """Gather batches of arrays in one array of length n."""
    result, start = None, 0
    for batch in batches:
        if result is None:
            result = np.empty((n, *batch.shape[1:]), batch.dtype)
        result[start : start + len(batch)] = batch
        start += len(batch)
    return result
