import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from torch import nn

from skanomaly import RIAD
from skanomaly._tensors.filters import mean_filter
from skanomaly._tensors.losses import msgms_loss, msgms_map, ssim_loss
from skanomaly._tensors.masking import disjoint_masks

SMALL = {"RIAD": {"cell_sizes": (4, 8), "width": 4, **TRAINED_BRIEFLY}}
TINY = {"RIAD": {"cell_sizes": (1,), "n_masks": 2}}
PLANTED = {"RIAD": (32, 12)}


@pytest.fixture
def build(small):
    """Return a function that makes a detector with an untrained network."""

    def make(**settings):
        model = small(RIAD, **settings)
        model.image_shape_ = (24, 20, 3)
        torch.manual_seed(0)
        model.network_ = model._build_network().eval()
        return model

    return make


def masks_of_cells(cell_size, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return disjoint_masks(24, 20, cell_size=cell_size, n_masks=3, generator=generator)


class Same(nn.Module):
    def forward(self, images):
        return images


class Constant(nn.Module):
    def forward(self, images):
        return torch.full_like(images, 0.3)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(64, 28_805_699), (32, 7_206_179), (16, 1_803_923), (8, 452_171)],
)
def test_paper_size(width, expected):
    model = RIAD(width=width)
    model.image_shape_ = (256, 256, 3)
    with torch.device("meta"):
        network = model._build_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_no_visible_pixel_is_copied(build):
    network = build().network_
    images = torch.rand(2, 3, 24, 20)
    masks = masks_of_cells(4)
    network.unet = Same()
    # what the stub sees of a hidden pixel is the grey fill
    torch.testing.assert_close(network(images, masks), torch.full_like(images, 0.5))
    network.unet = Constant()
    expected = torch.full_like(images, (np.tanh(0.3) + 1) / 2)
    torch.testing.assert_close(network(images, masks), expected)


def test_hidden_pixels_do_not_change_what_is_painted(build):
    network = build().network_
    images = torch.rand(1, 3, 24, 20)
    masks = masks_of_cells(4)
    other = torch.where(masks[:1] == 1, 1 - images, images)
    found, expected = (network(x, masks) * masks[0] for x in (other, images))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.equal(network(other, masks), network(images, masks))


@pytest.mark.parametrize("training", [True, False])
def test_loss(training, build, make_batch):
    model = build(cell_sizes=(4,))
    model.network_.train(training)
    images = torch.rand(2, 3, 24, 20)
    ((part, loss),) = model._losses(model.network_, make_batch(images, seed=1))
    generator = torch.Generator().manual_seed(1)
    if training:
        torch.randint(1, (), generator=generator)
    masks = masks_of_cells(4, generator)
    painted = model.network_(images, masks)
    expected = (
        ((2 * painted - 2 * images) ** 2).mean()
        + msgms_loss(painted, images)
        + ssim_loss(painted, images)
    )
    assert part is model.network_
    torch.testing.assert_close(loss, expected)


def test_optimiser_and_schedule(build):
    model = build(max_epochs=300)
    optimizer = model._optimizer(model.network_)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-5
    assert dict(model._scheduler(optimizer).milestones) == {250: 1}


def test_one_cell_size_a_batch_but_all_to_stop_early(build, make_batch):
    model = build(cell_sizes=(1, 2, 4, 8))
    model.network_.train()
    seen = []
    model._masks = lambda images, size, generator: (
        seen.append(size) or RIAD._masks(model, images, size, generator)
    )
    batch = make_batch(torch.rand(2, 3, 24, 20))
    for _ in range(30):
        list(model._losses(model.network_, batch))
    assert len(seen) == 30
    assert set(seen) == {1, 2, 4, 8}
    seen.clear()
    model.network_.eval()
    ((_, loss),) = model._losses(model.network_, batch)
    assert seen == [1, 2, 4, 8]
    ((_, again),) = model._losses(model.network_, batch)
    assert loss != again  # the generator went on


def test_maps_average_all_cell_sizes(random_images, small):
    X = random_images(6, 24, 20, 3)
    model = small(RIAD, cell_sizes=(2, 4), smoothing_size=40).fit(X)
    images = torch.from_numpy(X[:2]).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(model._seed)
    with torch.inference_mode():
        maps = [
            1 - msgms_map(model.network_(images, masks_of_cells(k, generator)), images)
            for k in (2, 4)
        ]
        expected = mean_filter((maps[0] + maps[1]) / 2, 3, padding="none")
    np.testing.assert_allclose(model.localize(X[:2]), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        model.score_samples(X[:2]), -expected.amax(dim=(1, 2)), rtol=1e-4
    )


def test_an_image_equal_to_what_is_painted_has_an_empty_map(build, random_images):
    model = build()
    model.network_.unet.forward = Constant().forward
    model._seed, model.offset_, model.map_threshold_ = 0, 0.0, 0.0
    model._built_from, model._value_range = {}, (False, 0.0, 1.0)
    model.n_features_in_ = 24 * 20 * 3
    X = np.full((1, 24, 20, 3), (np.tanh(0.3) + 1) / 2, np.float32)
    np.testing.assert_allclose(model.localize(X), 0.0, atol=1e-5)
    maps = model.localize(random_images(2, 24, 20, 3))
    assert maps.min() > 0
    assert maps.max() < 1
    # a constant offset has no gradients either
    np.testing.assert_allclose(model.localize(X - 0.2), 0.0, atol=1e-5)


def test_flat_images_have_finite_gradients(build, make_batch):
    model = build().network_.train()
    for parameter in model.parameters():  # what is painted is flat, too
        torch.nn.init.zeros_(parameter)
    images = torch.full((2, 3, 24, 20), 0.3)
    ((_, loss),) = build()._losses(model, make_batch(images))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_default_recipe_stops_early(random_images, small):
    X = random_images(10, 24, 20, 3)
    assert RIAD().n_iter_no_change == 20
    model = small(RIAD, n_iter_no_change=1, max_epochs=50, learning_rate=1e-12).fit(X)
    assert model.n_iter_ < 50
    assert len(model.validation_curve_) == model.n_iter_


@pytest.mark.parametrize("cell_sizes", [(), (0,), (2.5,), ("a",)])
def test_bad_cell_sizes_are_refused(cell_sizes, small):
    with pytest.raises(ValueError, match="cell_sizes="):
        small(RIAD, cell_sizes=cell_sizes).fit(np.zeros((4, 8, 8)))
