from functools import partial

import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from torch import nn

from skanomaly import SCADN
from skanomaly._tensors.masking import stripe_masks
from skanomaly._tensors.networks import adversarial_loss, critic_loss

SMALL = {"SCADN": {"width": 4, "n_blocks": 1, "critic_width": 4, **TRAINED_BRIEFLY}}
TINY = {"SCADN": {"stripes": (2,), "width": 1, "critic_width": 1}}
PLANTED = {"SCADN": (32, 12)}


@pytest.fixture(scope="module")
def detector(small):
    """Return a function that makes a small detector of two numbers of stripes."""
    return partial(small, SCADN, stripes=(4, 8))


@pytest.fixture
def build(detector):
    """Return a function that makes a detector with an untrained network."""

    def make(**settings):
        model = detector(**settings)
        model.image_shape_ = (32, 32, 3)
        torch.manual_seed(0)
        model.network_ = model._build_network()
        return model

    return make


class Constant(nn.Module):
    """Paints one value everywhere and remembers what it was asked."""

    def __init__(self, value):
        super().__init__()
        self.value = value
        self.masks = []

    def forward(self, images, masks):
        self.masks.append(masks)
        return torch.full_like(images, self.value)


class Copies(nn.Module):
    """Paints what was there."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, images, masks):
        return self.images.repeat(4, 1, 1, 1)


@pytest.fixture(scope="module")
def fitted(detector, random_images):
    return detector().fit(random_images(8, 32, 32, 3))


def test_paper_size():
    model = SCADN()
    model.image_shape_ = (512, 512, 3)
    with torch.device("meta"):
        network = model._build_network()
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in network.items()
    }
    assert counts == {"generator": 42_077_955, "critic": 2_763_776}


def test_hidden_stripes_are_not_seen(fitted):
    generator = fitted.network_["generator"]
    images, masks = torch.rand(1, 3, 32, 32), stripe_masks(32, 32, n_stripes=4)[:1]
    other = torch.where(masks == 1, 1 - images, images)
    painted = generator(images, masks)
    assert torch.equal(generator(other, masks), painted)
    assert painted.shape == images.shape
    assert 0 <= painted.min() <= painted.max() <= 1
    # holes are white
    white = torch.where(masks == 1, 1.0, images)
    assert torch.equal(generator(white, masks), painted)


def test_loss(build, make_batch):
    model = build(adversarial_weight=0.0)
    images = torch.rand(2, 3, 32, 32)
    masks = torch.stack([stripe_masks(32, 32, n_stripes=n) for n in (4, 8)]).flatten(
        0, 1
    )

    def losses(model):
        return dict(model._losses(model.network_.eval(), make_batch(images, seed=1)))

    drawn = torch.randint(8, (2,), generator=torch.Generator().manual_seed(1))
    drawn = masks[drawn]
    generator, critic = model.network_["generator"], model.network_["critic"]
    painted = generator(images, drawn)
    hidden = (drawn == 1).expand_as(images)
    errors = (painted - images).square()
    plain = losses(model)
    expected = errors[~hidden].mean() + 4 * errors[hidden].mean()
    torch.testing.assert_close(plain[generator], expected)
    torch.testing.assert_close(plain[critic], critic_loss(critic, images, painted))
    with_critic = losses(model.set_params(adversarial_weight=0.5))
    torch.testing.assert_close(
        with_critic[generator], expected + 0.5 * adversarial_loss(critic, painted)
    )


def test_without_its_weight_the_critic_does_not_touch_the_generator(
    detector, random_images
):
    X = random_images(8, 32, 32, 3)
    wide, narrow = (
        detector(adversarial_weight=0.0, max_epochs=2, critic_width=width).fit(X)
        for width in (8, 4)
    )
    assert wide.loss_curve_ != narrow.loss_curve_  # the critics' losses are in it
    other = detector(adversarial_weight=10.0, max_epochs=2).fit(X)
    weights = [m.network_["generator"].layers[1].weight for m in (wide, narrow, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_momentum(build):
    model = build()
    for part in model.network_.values():
        assert model._optimizer(part).param_groups[0]["betas"] == (0.0, 0.9)


def test_the_critic_learns_ten_times_as_slowly(build):
    model = build(learning_rate=1e-3)
    rates = {
        name: model._optimizer(part).param_groups[0]["lr"]
        for name, part in model.network_.items()
    }
    assert rates == {"generator": 1e-3, "critic": pytest.approx(1e-4)}


def errors_by_stripes(model, X):
    """Return the larger errors of both repaints of each pixel: (n, 2, h, w)."""
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    generator = model.network_["generator"]
    every = []
    with torch.inference_mode():
        for n in (4, 8):
            errors = [
                (generator(images, m[None]) - images).square().mean(dim=1) * m
                for m in stripe_masks(32, 32, n_stripes=n)
            ]
            every.append(torch.stack(errors).amax(dim=0))
    return torch.stack(every, dim=1).numpy()


def test_maps_keep_the_worse_of_both_repaints_and_the_most_unusual_scale(
    fitted, random_images
):
    X = random_images(3, 32, 32, 3, seed=1)
    every = errors_by_stripes(fitted, X)
    excess = every.mean(axis=(2, 3)) - fitted.stripe_errors_
    expected = every[np.arange(3), excess.argmax(axis=1)]
    np.testing.assert_allclose(fitted.localize(X), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        -fitted.score_samples(X), expected.mean(axis=(1, 2)), rtol=1e-4
    )


def test_the_usual_errors_are_those_of_the_training_images(detector, random_images):
    X = random_images(6, 32, 32, 3)
    model = detector().fit(X)
    shifted = model.localize(X)
    model.stripe_errors_ = model.stripe_errors_ + 7
    np.testing.assert_array_equal(model.localize(X), shifted)
    expected = errors_by_stripes(model, X).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(model.stripe_errors_ - 7, expected, rtol=1e-3)


def test_a_constant_painter_leaves_the_difference(fitted, detector, random_images):
    model = detector().fit(random_images(4, 32, 32, 3))
    stub = Constant(0.4)
    model.network_["generator"] = stub
    X = random_images(2, 32, 32, 3, seed=1)
    np.testing.assert_allclose(
        model.localize(X), ((X - 0.4) ** 2).mean(axis=3), rtol=1e-5
    )
    np.testing.assert_allclose(model.localize(np.full_like(X, 0.4)), 0, atol=1e-12)
    assert len(stub.masks) == 4  # all four masks of a scale, and all images, at once


def test_the_maximum_of_a_smoothed_map_may_be_the_score(
    fitted, detector, random_images
):
    X = random_images(3, 32, 32, 3, seed=1)
    model = detector(image_score="max", smoothing_size=40).fit(
        random_images(8, 32, 32, 3)
    )
    np.testing.assert_allclose(
        -model.score_samples(X), model.localize(X).max(axis=(1, 2)), rtol=1e-6
    )


@pytest.mark.parametrize("size", [(32, 32), (40, 52), (37, 45)])
def test_a_perfect_painter_leaves_nothing_whatever_the_size(
    size, detector, random_images
):
    X = random_images(4, *size, 3)
    model = detector().fit(X)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    model.network_["generator"] = Copies(images)
    np.testing.assert_array_equal(model.localize(X), np.zeros((4, *size)))


@pytest.mark.parametrize("stripes", [(), (1,), (3,), (2.5,)])
def test_bad_stripes_are_refused(stripes, detector, random_images):
    with pytest.raises(ValueError, match="stripes="):
        detector(stripes=stripes).fit(random_images(4, 32, 32, 3))
