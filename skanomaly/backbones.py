"""Pretrained networks of torchvision as sources of features."""

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from http.client import HTTPException
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
)
from ._typing import Self, StrPath, fit_context
from ._validation import check_images, check_range

__all__ = ["Backbone", "BackboneFeatures"]

MIN_SIDE = 32
WANTED_WEIGHTS = (
    "Wanted is a state dict of tensors, as torch.save(model.state_dict(), PATH) writes "
    "it, or a .safetensors file; nothing else is loaded, since it might run code."
)
FOREIGN_CLASS = re.compile(r"GLOBAL (\S+) (?:was|whose)")
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")
HEADS = ("avgpool", "classifier", "fc", "heads")
STANDARD_LAYERS = {
    ("resnet", "resnext", "wide_resnet"): ("layer2", "layer3"),
    ("shufflenet",): ("stage2", "stage3"),
    ("efficientnet_lite0",): ("blocks.4", "blocks.10"),
}
NOT_CHAINS = ("googlenet", "inception", "maxvit", "swin", "vit")


class Backbone(nn.Module):
    """A torchvision network, cut off behind the last layer wanted.

    Parameters
    ----------
    name : str
        Name of a torchvision classification network whose children form a chain, such
        as "resnet18", "wide_resnet50_2", "vgg16" or "efficientnet_b0".
    layers : tuple of str
        Names of the children whose outputs are wanted, such as "layer2"; inside of a
        sequential child, "features.4".

    Attributes
    ----------
    trunk : torch.nn.Module
        The network without the layers behind the last one wanted; the names of its
        parameters are torchvision's.
    stages : tuple of str
        Names of the modules that are run, in their order.

    Raises
    ------
    ValueError
        If the name or a layer is unknown.

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
        import torchvision

        known = [
            model
            for model in torchvision.models.list_models(torchvision.models)
            if not model.startswith(NOT_CHAINS)
        ]
        if name not in known:
            raise ValueError(
                f"backbone={name!r} is no convolutional network of torchvision whose "
                f"children form a chain; those are {', '.join(known)}."
            )
        self.name = name
        self.layers = tuple(layers)
        self.trunk = _whole(name)
        stages = _chain(self.trunk, self.layers)
        unknown = [layer for layer in self.layers if layer not in stages]
        if unknown or not self.layers:
            raise ValueError(
                f"layers={self.layers!r} of {name}: "
                + (f"{unknown[0]!r} is unknown" if unknown else "none is named")
                + f"; there are {', '.join(_chain(self.trunk, ()))}, and the children "
                "of those that are sequential ('features.4')."
            )
        last = max(map(stages.index, self.layers))
        self.stages = tuple(stages[: last + 1])
        _cut(self.trunk, self.stages)
        for module in self.trunk.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # it would overwrite the features of a layer
        self.register_buffer("mean", _channels(0.485, 0.456, 0.406))
        self.register_buffer("std", _channels(0.229, 0.224, 0.225))
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute features.

        Parameters
        ----------
        images : torch.Tensor of shape (b, 1 or 3, h, w)
            Images in [0, 1]; grey ones are taken for three equal channels. ImageNet's
            mean and standard deviation are applied here.

        Returns
        -------
        dict of str to torch.Tensor of shape (b, channels, rows, columns)
            Features by layer, float32.
        """
        height, width = images.shape[-2:]
        bottom, right = max(0, MIN_SIDE - height), max(0, MIN_SIDE - width)
        features = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        features = F.pad(features, (0, right, 0, bottom), mode="replicate")
        result = {}
        for stage in self.stages:
            features = self.trunk.get_submodule(stage)(features)
            if stage in self.layers:
                rows = -(-features.shape[2] * height // (height + bottom))
                columns = -(-features.shape[3] * width // (width + right))
                result[stage] = features[..., :rows, :columns].float()
        return {layer: result[layer] for layer in self.layers}

    def load_weights(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """Load a state dict that was made for the whole network.

        Parameters
        ----------
        state : dict of str to torch.Tensor
            Parameters and buffers under torchvision's names. Those of layers behind
            the last one wanted may be missing.
        source : str
            Where the state dict comes from; named in the errors.

        Raises
        ------
        ValueError
            If a parameter is missing, unknown, of another shape, NaN or infinite, or if
            a running variance is negative.
        """
        own = self.trunk.state_dict()
        with torch.device("meta"):
            known = _whole(self.name).state_dict()
        missing = [
            key
            for key in own
            if key not in state and not key.endswith("num_batches_tracked")
        ]
        unexpected = [key for key in state if key not in known]
        misshapen = [
            key for key in own if key in state and state[key].shape != own[key].shape
        ]
        for problem, keys in (
            ("lacks", missing),
            ("holds the unknown", unexpected),
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


def _whole(name):
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def last_stage(name: str, layers: Iterable[str] = ()) -> str:
    """Return the name of the last module of a torchvision network before its head.

    Sequential children that hold one of ``layers`` are opened.
    """
    with torch.device("meta"):
        return _chain(_whole(name), layers)[-1]


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


def _channels(*values):
    return torch.tensor(values).view(1, 3, 1, 1)


def _chain(module, layers, prefix=""):
    """Return the names of the children, opening those that hold a layer wanted."""
    names = []
    for name, child in module.named_children():
        path = prefix + name
        if not prefix and name in HEADS:
            break
        opened = isinstance(child, nn.Sequential) and any(
            layer.startswith(path + ".") for layer in layers
        )
        names += _chain(child, layers, path + ".") if opened else [path]
    return names


def _cut(module, stages, prefix=""):
    """Delete all children that are not run."""
    for name, child in list(module.named_children()):
        path = prefix + name
        if path in stages:
            continue
        if any(stage.startswith(path + ".") for stage in stages):
            _cut(child, stages, path + ".")
        else:
            delattr(module, name)


def _download(name):
    """Read torchvision's weights of a network, downloaded unless torch hub has them."""
    import torchvision

    versions = torchvision.models.get_model_weights(name)
    weights = getattr(versions, "IMAGENET1K_V1", versions.DEFAULT)
    file = weights.url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    named_hash = HASH_IN_NAME.search(file)
    prefix = named_hash.group(1) if named_hash else None
    if not path.exists():
        what = f"weights='imagenet' of {name} could not be downloaded"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                weights.url, str(path), prefix, progress=False
            )
        # broken connections raise all kinds, another hash a RuntimeError
        except (OSError, RuntimeError, HTTPException) as error:
            raise OSError(
                f"{what} ({error}). Give the path of a state dict, weights=PATH, or "
                f"put {file} into {path.parent}; weights=None takes random ones."
            ) from error
    if prefix is not None:
        _compare_hash(path, prefix)
    return _read_weights(path)


def _compare_hash(path, prefix):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    if not digest.hexdigest().startswith(prefix):
        raise ValueError(
            f"weights='imagenet': {str(path)!r} is damaged or another file, for its "
            f"SHA-256 begins with {digest.hexdigest()[: len(prefix)]} and not with "
            f"{prefix} as its name says. Delete it to have it downloaded again."
        )


def _read_weights(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(path)!r} is not a file; it must be 'imagenet', the path of "
            "a state dict, or None."
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as read
    else:
        read = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        state = read(path)
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(
            f"weights={str(path)!r} cannot be read: {_what_is_wrong(error)}. "
            f"{WANTED_WEIGHTS}"
        ) from None  # torch's own words advise to switch the protection off
    if not isinstance(state, dict):
        held = f"an object of type {type(state).__name__}"
    else:
        foreign = [key for key in state if not _is_plain(key, state[key])]
        if not foreign:
            return state
        held = f"{foreign[0]!r} of type {type(state[foreign[0]]).__name__}"
    raise ValueError(
        f"weights={str(path)!r} holds no state dict, a dictionary of plain tensors by "
        f"name, but {held}. {WANTED_WEIGHTS}"
    )


def _what_is_wrong(error):
    words = str(error)
    if named := FOREIGN_CLASS.search(words):
        return f"it holds {named.group(1)}"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or was not written by torch.save"
    if "weights_only" in words:
        return "it is a TorchScript archive or a tar file of an old torch"
    if isinstance(error, EOFError):
        return "it is empty or cut short"
    return re.split(r"\.\s|\n", words)[0].rstrip(".") or type(error).__name__


def _is_plain(key, value):
    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


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
        Name of a torchvision network.
    layers : tuple of str
        Layers whose features are wanted.
    weights : str, path or None
        "imagenet" for torchvision's own (version 1, which papers use), downloaded or
        taken from torch hub's cache, where the SHA-256 that begins in its name is
        compared; the file of a state dict with torchvision's names,
        ``.pth`` or ``.safetensors``; or None for random weights, drawn from torch's
        generator.
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
    ValueError
        If name or layers are unknown, or if the file is damaged, holds no state dict,
        one of another network, NaN, infinity or a negative variance.
    """
    with torch.device("meta"):
        Backbone(name, layers)  # refuses unknown names before weights are fetched
    state = None
    if weights is not None:
        state = _download(name) if weights == "imagenet" else _read_weights(weights)
    last = last_stage(name, layers)
    within_reach = state is None or any(key.startswith(f"{last}.") for key in state)
    if with_last_stage and last not in layers and within_reach:
        layers = (*layers, last)
    backbone = Backbone(name, layers)
    if state is not None:
        backbone.load_weights(state, str(weights))
    return backbone.eval()


def check_channels(estimator: Any) -> None:
    """Refuse images that are neither grey nor RGB.

    Parameters
    ----------
    estimator : BaseEstimator
        An estimator that has seen images.

    Raises
    ------
    ValueError
        If its images have another number of channels than 1 or 3.
    """
    channels = estimator.image_shape_[2]
    if channels not in (1, 3):
        raise ValueError(
            f"X holds images of {channels} channels, but a backbone takes grey (1) or "
            "RGB (3) images."
        )


class BackboneFeatures(PersistentNetwork, TransformerMixin, BaseEstimator):
    """Turn images into the features of a pretrained network.

    Parameters
    ----------
    backbone : str, default="wide_resnet50_2"
        Name of a torchvision network.
    layers : tuple of str, default=("layer1", "layer2", "layer3")
        Layers whose outputs are taken.
    weights : str, path or None, default="imagenet"
        "imagenet" for torchvision's weights, downloaded at the first fit; the file of a
        state dict (``.pth``, ``.safetensors``); None for random weights.
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

    _judged_by = ("pool", "memory")

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
        check_channels(self)
        with seeded(check_random_state(self.random_state).randint(2**31 - 1)):
            network = make_backbone(self.backbone, self.layers, self.weights)
        self.network_ = channels_last(network.to(resolve_device(self.device, X)))
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
            keys = layer_keys(self.network_)
            read = FeatureMemory(
                self.memory, self.network_, keys, self.precision, pool=self.pool
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
            layer: Path(folder) / f"{key}-{kind}" for layer, key in keys.items()
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
        with torch.device("meta"):
            own = Backbone(network.name, (layer,)).trunk.state_dict()
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
