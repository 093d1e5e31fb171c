import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_settings import TRAINED_BRIEFLY
from PIL import Image
from sklearn.metrics import roc_auc_score

from skanomaly import PNet
from skanomaly._fitting.batches import ImageBatches
from skanomaly._tensors.networks import adversarial_loss, critic_loss

SMALL = {
    "PNet": {"structure_epochs": 1, "width": 4, "critic_width": 4, **TRAINED_BRIEFLY}
}
TINY = {"PNet": {"width": 2, "critic_width": 1}}
PLANTED = {"PNet": (48, 20)}


def stripes(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    wave = 0.5 + 0.3 * np.sign(np.sin(np.arange(size) * np.pi / 8 + 0.1))
    return (wave[:, None] + rng.normal(0, 0.02, (n, size, size))).clip(0, 1)


@pytest.fixture
def build(small):
    """Return a function that makes a detector with an untrained network."""

    def make(**settings):
        model = small(PNet, **settings)
        model.image_shape_ = (32, 32, 1)
        torch.manual_seed(0)
        model.network_ = model._build_network().eval()
        return model

    return make


@pytest.fixture
def batch(make_batch):
    """Return a batch of two images and their structures."""
    return make_batch(torch.rand(2, 1, 32, 32), notes=torch.rand(2, 32, 32))


@pytest.fixture(scope="module")
def fitted(small):
    return small(PNet, structure_epochs=2, max_epochs=2).fit(stripes(16))


def test_paper_size():
    model = PNet()
    model.image_shape_ = (224, 224, 1)
    with torch.device("meta"):
        network = model._build_network()
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in network.items()
    }
    assert counts == {
        "extractor": 13_394_177,
        "structure_critic": 2_761_728,
        "reconstructor": 24_085_121,
        "critic": 2_761_728,
    }
    with torch.device("meta"):
        patches = network["critic"](torch.empty(1, 1, 224, 224))
    assert patches.shape == (1, 1, 26, 26)


def test_the_image_passes_the_bottleneck_only(build):
    network = build().network_["reconstructor"].train()
    network.image_encoder.blocks[-1].register_forward_hook(
        lambda module, inputs, output: torch.zeros_like(output)
    )
    structure, first, second = torch.rand(3, 2, 1, 32, 32)
    assert torch.equal(network(structure, first), network(structure, second))
    assert not torch.equal(network(structure, first), network(second, first))


def test_no_skip_at_full_resolution(build):
    network = build().network_["reconstructor"]
    seen = []
    network.decoder[-1].register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape)
    )
    network(*torch.rand(2, 1, 1, 32, 32))
    assert seen == [(1, 6, 32, 32)]  # what comes from below, 3 / 2 of the width


def test_structures_lie_between_0_and_1(fitted):
    found = fitted._structure(torch.rand(2, 1, 32, 32))
    assert found.shape == (2, 1, 32, 32)
    assert 0 <= found.min() <= found.max() <= 1


def test_the_extractor_is_frozen_but_passes_gradients(batch, build, small):
    X = stripes(16)
    short, long = (small(PNet, max_epochs=n).fit(X).network_ for n in (1, 3))
    for name, tensor in short["extractor"].state_dict().items():
        assert torch.equal(tensor, long["extractor"].state_dict()[name])

    model = build(structure_weight=1.0, adversarial_weight=0.0)
    parts = dict(model._losses(model.network_, batch))
    loss = parts[model.network_["reconstructor"]]
    images, structure = batch.images, batch.notes[:, None]
    rebuilt = model.network_["reconstructor"](structure, images)
    by_structure = loss - (rebuilt - images).abs().mean()
    weight = model.network_["reconstructor"].head.weight
    (slope,) = torch.autograd.grad(by_structure, weight, retain_graph=True)
    assert slope.abs().sum() > 0
    expected = (model._structure(rebuilt) - structure).abs().mean()
    torch.testing.assert_close(by_structure, expected, rtol=1e-4, atol=1e-6)


def test_without_other_weights_the_loss_is_the_absolute_error(batch, build):
    model = build(structure_weight=0.0, adversarial_weight=0.0)
    loss = dict(model._losses(model.network_, batch))[model.network_["reconstructor"]]
    rebuilt = model.network_["reconstructor"](batch.notes[:, None], batch.images)
    torch.testing.assert_close(loss, (rebuilt - batch.images).abs().mean())


def test_maps_mix_both_differences(fitted):
    X = stripes(3, seed=1).astype(np.float32)
    maps = {}
    for weight in (0.0, 0.3, 1.0):
        fitted.set_params(score_weight=weight)
        maps[weight] = fitted.localize(X)
        np.testing.assert_allclose(
            fitted.score_samples(X), -maps[weight].mean(axis=(1, 2)), rtol=1e-5
        )
    fitted.set_params(score_weight=0.5)
    np.testing.assert_allclose(maps[0.3], 0.7 * maps[0.0] + 0.3 * maps[1.0], rtol=1e-4)
    images = torch.from_numpy(X)[:, None]
    with torch.inference_mode():
        structure = fitted._structure(images)
        rebuilt = fitted.network_["reconstructor"](structure, images)
        again = fitted._structure(rebuilt)
    np.testing.assert_allclose(
        maps[0.0], (images - rebuilt).abs()[:, 0], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        maps[1.0], (structure - again).abs()[:, 0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("structure", ["edges", "ridges"])
def test_structures_are_computed_without_a_source(structure, small):
    model = small(PNet, structure=structure)
    model._seed = 0
    X = np.full((4, 32, 32, 3), 0.3, np.float32)
    assert not model._computed_structures(ImageBatches(X, "cpu")).any()
    X[:, :, 16:18, 1] = 0.9  # a line of one colour
    found = model._computed_structures(ImageBatches(X, "cpu"))
    assert found.shape == (4, 32, 32)
    assert found[:, :, 14:20].max() == 1.0
    assert found[:, :, :10].max() < 0.3


def test_the_extractor_learns_the_structures_of_a_source(small):
    rng = np.random.default_rng(0)
    source = 0.2 + 0.1 * rng.random((24, 40, 40))
    masks = np.zeros(source.shape, bool)
    for image, mask, row in zip(source, masks, rng.integers(4, 36, 24), strict=True):
        mask[row : row + 3] = True
        image[mask] += 0.5
    X = 0.2 + 0.1 * rng.random((16, 32, 32))
    X[:, 10:12] += 0.5
    model = small(PNet, structure_epochs=10, width=4, learning_rate=2e-2)
    model.fit(X, structure_images=source, structure_masks=masks)
    assert model.structure_loss_curve_[-1] < model.structure_loss_curve_[0] - 0.1
    found = model.extract_structure(X)
    assert found.dtype == np.float32
    assert 0 <= found.min() < found.max() <= 1
    expected = np.zeros(X.shape, bool)
    expected[:, 10:12] = True
    assert roc_auc_score(expected.ravel(), found.ravel()) > 0.95


def test_a_source_may_be_two_folders(tmp_path, small):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 32, 32), dtype=np.uint8)
    masks = 255 * (images > 128).astype(np.uint8)
    for name, array in (("images", images), ("masks", masks)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(array):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    X = stripes(8)
    folders = (tmp_path / "images", str(tmp_path / "masks"))
    by_path = small(PNet, structure_source=folders).fit(X)
    by_array = small(PNet).fit(X, structure_images=images, structure_masks=masks)
    np.testing.assert_array_equal(by_path.score_samples(X), by_array.score_samples(X))
    (tmp_path / "masks" / "3.png").unlink()
    with pytest.raises(ValueError, match="4 images, but 3 masks"):
        small(PNet, structure_source=folders).fit(X)


@pytest.mark.parametrize("n_channels", [1, 3])
def test_a_source_may_have_another_number_of_channels(n_channels, small):
    rng = np.random.default_rng(0)
    X = np.repeat(stripes(8)[..., None], n_channels, axis=3)
    source = rng.integers(0, 256, (4, 32, 32, 4 - n_channels), dtype=np.uint8)
    masks = source.mean(axis=3) > 128
    by_bytes = small(PNet).fit(X, structure_images=source, structure_masks=masks)
    for images, own_masks in (
        (source / 255, 255 * masks.astype(np.uint8)),
        (source / 255, masks.astype(np.uint8)),
        (source / 255, masks.astype(np.int64)),
    ):
        other = small(PNet).fit(X, structure_images=images, structure_masks=own_masks)
        assert other.structure_loss_curve_[0] == pytest.approx(
            by_bytes.structure_loss_curve_[0], rel=1e-3
        )


def test_stage_one_learns_from_the_source_and_from_the_critic(batch, build):
    model = build(adaptation_weight=0.5)
    source = [torch.rand(4, 1, 32, 32), torch.rand(4, 1, 32, 32).round()]
    extractor, critic = (
        model.network_[name] for name in ("extractor", "structure_critic")
    )
    losses = dict(model._transfer(model.network_, batch, source))

    drawn = torch.randint(4, (2,), generator=torch.Generator().manual_seed(0))
    images, masks = (part[drawn] for part in source)
    found = extractor(batch.images).sigmoid()
    known = extractor(images).sigmoid()
    torch.testing.assert_close(losses[critic], critic_loss(critic, known, found))
    supervised = F.binary_cross_entropy(extractor(images).sigmoid(), masks)
    torch.testing.assert_close(
        losses[extractor], supervised + 0.5 * adversarial_loss(critic, found)
    )
    weight = extractor.head.weight
    (slope,) = torch.autograd.grad(losses[extractor] - supervised, weight)
    assert slope.abs().sum() > 0


def test_the_reconstructor_learns_from_its_critic(batch, build):
    model = build(structure_weight=0.0, adversarial_weight=0.5)
    reconstructor, critic = (model.network_[n] for n in ("reconstructor", "critic"))
    images, structure = batch.images, batch.notes[:, None]
    losses = dict(model._losses(model.network_, batch))
    rebuilt = reconstructor(structure, images)
    torch.testing.assert_close(losses[critic], critic_loss(critic, images, rebuilt))
    torch.testing.assert_close(
        losses[reconstructor],
        (rebuilt - images).abs().mean() + 0.5 * adversarial_loss(critic, rebuilt),
    )


def test_equal_images_and_structures_have_empty_maps(build, random_images):
    model = build()
    model.network_["reconstructor"].forward = lambda structure, images: images
    model._seed, model.offset_ = 0, 0.0
    model._built_from, model._value_range = {}, (False, 0.0, 1.0)
    model.n_features_in_ = 32 * 32
    X = random_images(2, 32, 32)
    np.testing.assert_array_equal(model.localize(X), np.zeros((2, 32, 32)))
    np.testing.assert_array_equal(model.score_samples(X), np.zeros(2))


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, {"structure_images": np.zeros((2, 8, 8))}, "belong together"),
        ({"structure_source": ("a",)}, {}, "two folders"),
        ({"structure": "texture"}, {}, "structure"),
        (
            {},
            {
                "structure_images": np.zeros((2, 8, 8)),
                "structure_masks": np.full((2, 8, 8), 255),
            },
            "structure_masks holds values from 0 to 255",
        ),
        (
            {},
            {
                "structure_images": np.zeros((2, 8, 8)),
                "structure_masks": np.full((2, 8, 8), -1),
            },
            "structure_masks holds values from -1 to 0",
        ),
        (
            {},
            {
                "structure_images": np.full((2, 8, 8), 200.0),
                "structure_masks": np.zeros((2, 8, 8)),
            },
            "structure_images holds values from 0 to 200",
        ),
    ],
)
def test_bad_sources_are_refused(settings, given, message, small):
    with pytest.raises(ValueError, match=message):
        small(PNet, **settings).fit(stripes(4), **given)


def test_an_interrupt_of_the_first_stage_does_not_start_the_second(monkeypatch, small):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(PNet, "_imitate", interrupt)
    model = small(PNet)
    with pytest.warns(UserWarning, match="interrupted after 0 epochs"):
        model.fit(stripes(8))
    assert model.loss_curve_ == []
    assert np.isfinite(model.score_samples(stripes(8))).all()
    assert set(model.predict(stripes(8))) <= {-1, 1}
    monkeypatch.undo()
    model.set_params(warm_start=True).fit(stripes(8))
    assert len(model.structure_loss_curve_) == len(model.loss_curve_) == 1
    model.fit(stripes(8))
    assert len(model.structure_loss_curve_) == 1
    assert len(model.loss_curve_) == 2
