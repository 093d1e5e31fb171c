import math
from functools import partial

import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY

from skanomaly import DifferNet
from skanomaly._tensors.synthesis import rotate
from skanomaly.methods.differnet import Coupling, Flow, describe

SMALL = {
    "DifferNet": {
        "backbone": "shufflenet_v2_x0_5",
        "layer": "stage2",
        "weights": None,
        "n_scales": 1,
        "n_blocks": 2,
        "hidden_features": 16,
        "n_transforms_test": 4,
        "standardize": True,
        **TRAINED_BRIEFLY,
    }
}
TINY = {"DifferNet": {"n_transforms_test": 1, "n_transforms": 1, "n_blocks": 1}}
PLANTED = {"DifferNet": (48, 20)}


@pytest.fixture(scope="module")
def detector(small):
    """Return a function that makes a small detector of two scales."""
    return partial(small, DifferNet, n_scales=2, standardize=False)


@pytest.fixture(scope="module")
def fitted(detector, random_images):
    return detector(max_epochs=3, learning_rate=1e-2).fit(random_images(12, 32, 32, 3))


@pytest.fixture
def flow():
    torch.manual_seed(0)
    flow = Flow(8, n_blocks=3, hidden_features=16, clamp=3.0).double()
    flow.mean += 0.5
    flow.std *= 2.0
    return flow


def test_paper_size():
    model = DifferNet()
    model.image_shape_ = (448, 448, 3)
    with torch.device("meta"):
        network = model._build_network()
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in network.named_children()
    }
    assert counts == {"backbone": 2_469_696, "flow": 172_077_056}
    assert not any(p.requires_grad for p in network.backbone.parameters())


def test_permutations_are_those_of_the_published_code():
    orders = Flow(768, n_blocks=2, hidden_features=1, clamp=3.0).orders
    assert orders[:, :3].tolist() == [[661, 122, 113], [285, 101, 581]]


def test_the_inverse_undoes_the_flow(flow):
    vectors = torch.randn(5, 8, dtype=torch.float64)
    latent, _ = flow(vectors)
    assert not torch.allclose(latent, vectors)
    torch.testing.assert_close(flow.inverse(latent), vectors, rtol=0, atol=1e-12)


def test_the_inverse_is_accurate_in_single_precision(flow):
    vectors = torch.randn(50, 8)
    found = flow.float().inverse(flow(vectors)[0])
    torch.testing.assert_close(found, vectors, rtol=1e-5, atol=1e-5)


def test_determinants_add_up_over_the_blocks(flow):
    vectors = torch.randn(5, 8, dtype=torch.float64)
    latent, total = (vectors - flow.mean) / flow.std, 0.0
    for order, block in zip(flow.orders, flow.blocks, strict=True):
        latent, own = block(latent[:, order])
        total = total + own
    torch.testing.assert_close(flow(vectors), (latent, total), rtol=0, atol=0)


def test_determinants_are_those_of_the_jacobian(flow):
    flow.std.fill_(1.0)
    vectors = torch.randn(3, 8, dtype=torch.float64)
    _, found = flow(vectors)
    for vector, log_determinant in zip(vectors, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: flow(v[None])[0][0], vector
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_determinant, expected, rtol=0, atol=1e-12)


def test_the_clamp_bounds_scales_and_has_its_slope_at_zero():
    coupling = Coupling(4, hidden_features=4, clamp=3.0)

    def clamp(scale):
        both = torch.cat([scale, torch.full_like(scale, 100.0)], dim=1)
        clamped, shift = coupling._scale_and_shift(lambda half: both, None)
        assert torch.equal(shift, torch.full_like(scale, 100.0))  # it is not clamped
        return clamped

    values = torch.linspace(-1e6, 1e6, 101, dtype=torch.float64)[:, None]
    clamped = clamp(values)
    assert clamped.abs().max() < 3.0
    torch.testing.assert_close(clamped, -clamped.flip(0))
    assert (clamped.diff(dim=0) > 0).all()
    zero = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(clamp(zero), zero)
    assert slope.item() == pytest.approx(2 / math.pi)


def test_without_subnets_the_flow_permutes(flow):
    for block in flow.blocks:
        for net in (block.net1, block.net2):
            torch.nn.init.zeros_(net[-1].weight)
            torch.nn.init.zeros_(net[-1].bias)
    flow.mean.zero_()
    flow.std.fill_(1.0)
    vectors = torch.randn(5, 8, dtype=torch.float64)
    latent, log_determinants = flow(vectors)
    assert not log_determinants.any()
    expected = vectors
    for order in flow.orders:
        expected = expected[:, order]
    assert torch.equal(latent, expected)


def test_descriptions_are_means_of_features_at_every_scale(fitted):
    batch = torch.rand(2, 3, 32, 32)
    backbone = fitted.network_.backbone
    found = describe(backbone, batch, 2)
    half = batch[..., ::2, ::2]
    expected = [backbone(x)["stage2"].mean(dim=(2, 3)) for x in (batch, half)]
    torch.testing.assert_close(found, torch.cat(expected, dim=1))


def test_scores_are_mean_squares_over_fixed_rotations(fitted, random_images):
    X = random_images(2, 32, 32, 3, seed=1)
    batch = torch.from_numpy(X).permute(0, 3, 1, 2)
    squares = []
    with torch.inference_mode():
        for angle in (0.0, 90.0, 180.0, 270.0):
            views = rotate(batch, torch.full((2,), angle), mode="nearest")
            squares.append(fitted.network_(views)[0].square().mean(dim=1))
    np.testing.assert_allclose(
        fitted.score_samples(X), -torch.stack(squares).mean(dim=0), rtol=1e-4
    )


def test_with_one_view_and_no_flow_the_score_is_the_mean_square_of_the_features(
    detector, random_images
):
    X = random_images(3, 32, 32, 3, seed=1)
    model = detector(n_transforms_test=1).fit(random_images(12, 32, 32, 3))
    model.network_.flow.blocks = torch.nn.ModuleList()
    model.network_.flow.orders = model.network_.flow.orders[:0]
    batch = torch.from_numpy(X).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = describe(model.network_.backbone, batch, 2)
    np.testing.assert_allclose(
        -model.score_samples(X), features.square().mean(dim=1), rtol=1e-4
    )


def test_right_angles_do_not_change_the_score(fitted, random_images):
    X = random_images(3, 32, 32, 3, seed=1)
    turned = np.rot90(X, axes=(1, 2)).copy()
    np.testing.assert_allclose(
        fitted.score_samples(turned), fitted.score_samples(X), rtol=1e-4
    )
    np.testing.assert_allclose(
        fitted.localize(turned), np.rot90(fitted.localize(X), axes=(1, 2)), rtol=1e-2
    )


def test_maps_are_gradients_of_the_likelihood(detector, random_images):
    single = detector(n_transforms_test=1, sigma=0.0).fit(random_images(12, 32, 32, 3))
    X = random_images(1, 32, 32, 3, seed=1)
    batch = torch.from_numpy(X).permute(0, 3, 1, 2).requires_grad_()
    latent, log_determinants = single.network_(batch)
    loss = (latent.square().sum() / 2 - log_determinants.sum()) / latent.shape[1]
    (gradients,) = torch.autograd.grad(loss, batch)
    np.testing.assert_allclose(
        single.localize(X)[0], gradients[0].abs().mean(dim=0), rtol=1e-3, atol=1e-9
    )


def test_only_the_flow_is_trained(detector, random_images):
    X = random_images(8, 32, 32, 3)
    short, long = (detector(max_epochs=n).fit(X).network_ for n in (1, 3))
    for name, tensor in short.backbone.state_dict().items():
        assert torch.equal(tensor, long.backbone.state_dict()[name])
    assert not torch.equal(
        short.flow.blocks[0].net1[0].weight, long.flow.blocks[0].net1[0].weight
    )


def test_training_lowers_the_loss_and_other_images_score_lower(detector, random_images):
    X = 0.5 + 0.1 * random_images(24, 32, 32, 3)
    model = detector(max_epochs=40, learning_rate=1e-2, standardize=True).fit(X)
    assert np.mean(model.loss_curve_[-5:]) < model.loss_curve_[0]
    assert model.score_samples(1 - X).max() < np.median(model.score_samples(X))


def test_standardised_features_have_no_mean_and_unit_variance(detector, random_images):
    X = random_images(12, 32, 32, 3)
    model = detector(standardize=True).fit(X)
    batch = torch.from_numpy(X).permute(0, 3, 1, 2)
    with torch.inference_mode():
        views = [
            describe(
                model.network_.backbone,
                rotate(batch, torch.full((12,), angle), mode="nearest"),
                2,
            )
            for angle in (0.0, 90.0, 180.0, 270.0)
        ]
    views = (torch.cat(views) - model.network_.flow.mean) / model.network_.flow.std
    torch.testing.assert_close(
        views.mean(dim=0), torch.zeros(views.shape[1]), rtol=0, atol=1e-3
    )
    alive = views.std(dim=0) > 1e-5  # some features are zero everywhere
    assert 80 < alive.sum() < len(alive)
    # and must not weigh a million times as much where they are not
    assert (model.network_.flow.std[~alive] == 1).all()
    std = views.std(dim=0)[alive]
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-3, atol=0)


def test_a_warm_start_keeps_the_backbone(detector, random_images):
    X = random_images(8, 32, 32, 3)
    model = detector(warm_start=True).fit(X)
    backbone = model.network_.backbone
    assert model.fit(X).network_.backbone is backbone
    assert model.n_iter_ == 2


def test_small_images_are_refused(detector, random_images):
    with pytest.raises(ValueError, match=r"16 x 16 pixels are too small.*ResizeImages"):
        detector(backbone="alexnet", layer=None).fit(random_images(4, 16, 16, 3))


def test_scales_that_a_network_does_not_take_are_refused(detector, random_images):
    model = detector(backbone="vit_b_16", layer=None, n_scales=2)
    with pytest.raises(ValueError, match=r"n_scales=2.*112 x 112.*224 x 224.*scales=1"):
        model.fit(random_images(4, 224, 224, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "nonsense"}, "is unknown; there are"),
        ({"layer": "nonsense"}, "'nonsense' is unknown"),
        ({"weights": "missing.pth"}, "is not a file"),
    ],
)
def test_bad_backbones_are_refused(settings, message, detector, random_images):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        detector(**settings).fit(random_images(4, 32, 32, 3))
