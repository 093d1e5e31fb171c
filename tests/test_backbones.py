"""Tests of the pretrained networks and of the features they give."""

import hashlib
import io
import os
import pickle
import re
import shutil
import traceback
import warnings
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.model_selection import GridSearchCV

from skanomaly import SPADE, BackboneFeatures, Pipeline
from skanomaly.backbones import Backbone, make_backbone
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
    with pytest.raises(OSError, match=r"could not be downloaded.*hash.*weights=PATH"):
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


@pytest.mark.parametrize("name", ["swin_t", "vit_b_16", "googlenet"])
def test_networks_that_are_no_chain_are_refused(name):
    with pytest.raises(ValueError, match="children form a chain"):
        Backbone(name, ("features",))


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
