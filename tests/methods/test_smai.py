import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from torch import nn

from skanomaly import SMAI
from skanomaly._tensors.filters import mean_filter
from skanomaly._tensors.losses import ssim_loss

SMALL = {
    "SMAI": {"n_segments": 16, "width": 4, **TRAINED_BRIEFLY, "learning_rate": 3e-3}
}
TINY = {"SMAI": {"n_segments": 2}}
PLANTED = {"SMAI": (32, 12)}


def slopes(n, seed=0):
    """Return tints of a bent slope, which SLIC divides into superpixels."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 1, 24)[:, None] * np.linspace(0, 1, 20) ** 2
    images = slope[..., None] * rng.uniform(0.5, 1, (n, 1, 1, 3))
    return (images + rng.normal(0, 0.01, images.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(small):
    return small(SMAI).fit(slopes(8))


class Logits(nn.Module):
    """Paints one value everywhere and remembers what it saw."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return torch.full_like(images[:, :-1], self.value)


def test_paper_size():
    model = SMAI()
    model.image_shape_ = (256, 256, 3)
    with torch.device("meta"):
        network = model._build_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == 28_806_275


def test_visible_pixels_are_copied_and_hidden_ones_not_seen(fitted):
    images = torch.rand(2, 3, 24, 20)
    masks = torch.zeros(2, 1, 24, 20)
    masks[:, :, 3:9, 5:12] = 1
    network = fitted.network_
    painted = network(images, masks)
    visible = (masks == 0).expand_as(images)
    assert torch.equal(painted[visible], images[visible])
    assert not torch.equal(painted, images)
    other = torch.where(masks == 1, 1 - images, images)
    assert torch.equal(network(other, masks)[~visible], painted[~visible])


@pytest.mark.parametrize("fraction", [(0.0, 0.0), (0.02, 0.3), (1.0, 1.0)])
def test_training_hides_whole_superpixels_but_never_none_or_all(fraction, small):
    model = small(SMAI, hidden_fraction=fraction)
    images = torch.from_numpy(slopes(5)).permute(0, 3, 1, 2)
    labels = model._segments(images).long()
    labels[4].clamp_(max=1)  # one image of two superpixels
    generator, n_hidden = torch.Generator().manual_seed(0), []
    for _ in range(20):
        masks = model._hide_superpixels(labels, generator)
        assert masks.shape == (5, 1, 24, 20)
        for own, mask in zip(labels, masks[:, 0], strict=True):
            n = int(own.max()) + 1
            hidden = [mask[own == q].unique() for q in range(n)]
            assert all(len(values) == 1 for values in hidden)
            n_hidden.append((int(sum(hidden)), n))
    assert all(0 < k < n for k, n in n_hidden)
    if fraction == (0.0, 0.0):
        assert {k for k, _ in n_hidden} == {1}
    if fraction == (1.0, 1.0):
        assert all(k == n - 1 for k, n in n_hidden)


def test_loss_is_divided_by_the_hidden_area(make_batch, small):
    images = torch.rand(2, 3, 24, 20)
    labels = torch.zeros(2, 24, 20)
    labels[:, 12:] = 1
    losses = {}
    for kind in ("l2", "ssim", "both"):
        model = small(SMAI, loss=kind)
        model.image_shape_ = (24, 20, 3)
        torch.manual_seed(0)
        network = model._build_network()
        network.unet = Logits()
        batch = make_batch(images, notes=labels, seed=1)
        ((part, losses[kind]),) = model._losses(network, batch)
        assert part is network
    masks = network.unet.seen[0][:, -1:]
    painted = torch.where(masks == 1, 0.5, images)
    hidden = masks.expand_as(images) == 1
    expected = (0.5 - images)[hidden].square().mean()
    torch.testing.assert_close(losses["l2"], expected)
    torch.testing.assert_close(losses["ssim"], ssim_loss(painted, images))
    torch.testing.assert_close(losses["both"], losses["l2"] + losses["ssim"])


def with_stub(model, stub):
    model.network_.unet.forward = stub.forward
    return model


def test_maps_are_made_of_one_pass_a_superpixel(small):
    X = slopes(3)
    stub = Logits(0.4)
    model = with_stub(small(SMAI, smoothing_size=1).fit(slopes(8)), stub)
    value = 1 / (1 + np.exp(-0.4))
    np.testing.assert_allclose(
        model.localize(X), ((X - value) ** 2).mean(axis=3), rtol=1e-4
    )
    masks = torch.cat([images[:, -1] for images in stub.seen])
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    labels = model._segments(images).numpy()
    assert len(masks) == sum(own.max() + 1 for own in labels)
    assert len(stub.seen) == -(-len(masks) // 32)
    start = 0
    for own in labels:
        n = own.max() + 1
        own_masks = masks[start : start + n]
        assert torch.equal(own_masks.sum(dim=0), torch.ones(24, 20))
        for q in range(n):
            assert np.array_equal(own_masks[q] == 1, own == q)
        start += n


def test_scores_are_the_largest_mean_error_of_a_superpixel(fitted):
    X = slopes(3, seed=1)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    smooth = fitted.set_params(smoothing_size=60).localize(X)
    scores = fitted.score_samples(X)
    raw = fitted.set_params(smoothing_size=1).localize(X)
    np.testing.assert_allclose(
        smooth, mean_filter(torch.from_numpy(raw), 5, padding="none"), atol=1e-6
    )
    labels = fitted._segments(images).numpy()
    expected = [
        max(errors[own == q].mean() for q in range(own.max() + 1))
        for errors, own in zip(raw, labels, strict=True)
    ]
    # the score is taken before the maps are smoothed
    np.testing.assert_allclose(-scores, expected, rtol=1e-4)
    fitted.set_params(smoothing_size=21)


def test_superpixels_at_once_do_not_change_maps(fitted, monkeypatch):
    X = slopes(3, seed=1)
    expected = fitted.localize(X)
    monkeypatch.setattr("skanomaly.methods.smai.SUPERPIXELS_AT_ONCE", 1)
    np.testing.assert_allclose(fitted.localize(X), expected, rtol=1e-4, atol=1e-6)


def test_optimiser_and_schedule(small):
    model = small(SMAI, max_epochs=300, learning_rate=1e-3)
    model.image_shape_ = (24, 20, 3)
    model.network_ = model._build_network()
    optimizer = model._optimizer(model.network_)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0)
    assert dict(model._scheduler(optimizer).milestones) == {240: 1}


def test_a_perfect_painter_leaves_nothing(small):
    X = slopes(3)
    model = small(SMAI).fit(X)
    assert model.localize(X).any()
    model.network_.forward = lambda images, masks: images
    assert not model.localize(X).any()
    assert not model.score_samples(X).any()


def test_superpixels_of_a_training_are_found_once(monkeypatch, small):
    X = slopes(6)
    calls = []
    original = SMAI._segments

    def counting(self, images, generator=None):
        calls.append(len(images))
        return original(self, images)

    monkeypatch.setattr(SMAI, "_segments", counting)
    small(SMAI, max_epochs=4, batch_size=2).fit(X)
    assert sum(calls) == 6


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_images_of_one_colour_do_not_crash(small):
    X = np.full((4, 24, 20, 1), 0.5)
    assert np.isfinite(small(SMAI).fit(X).localize(X)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_segments": 1}, "n_segments"),
        ({"hidden_fraction": (0.5, 0.1)}, "hidden_fraction="),
        ({"hidden_fraction": (0.5,)}, "hidden_fraction="),
        ({"hidden_fraction": ("a", "b")}, "hidden_fraction="),
        ({"loss": "l1"}, "loss"),
    ],
)
def test_bad_settings_are_refused(settings, message, small):
    with pytest.raises(ValueError, match=message):
        small(SMAI, **settings).fit(slopes(4))
