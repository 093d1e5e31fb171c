from functools import partial

import numpy as np
import pytest
import torch
from method_settings import ROUNDING, TRAINED_BRIEFLY
from sklearn.metrics import roc_auc_score

from skanomaly import Autoencoder, VariationalAutoencoder
from skanomaly._tensors.filters import mean_filter
from skanomaly._tensors.losses import ssim_map
from skanomaly._tensors.networks import pad_to_multiple

BOTH = [Autoencoder, VariationalAutoencoder]


SMALL = {
    "Autoencoder": {"code_size": 8, "width": 4, "batch_size": 8, **TRAINED_BRIEFLY},
    "VariationalAutoencoder": {
        "code_size": 8,
        "width": 4,
        "batch_size": 4,
        **TRAINED_BRIEFLY,
    },
}
EXPECTED_FAILURES = {
    name: {
        "check_methods_sample_order_invariance": ROUNDING,
        "check_methods_subset_invariance": ROUNDING,
    }
    for name in ("Autoencoder", "VariationalAutoencoder")
}


def build(shape, cls=Autoencoder, device="cpu", **settings):
    model = cls(**settings)
    model.image_shape_ = shape
    torch.manual_seed(0)
    with torch.device(device):
        model.network_ = model._build_network()
    return model


@pytest.mark.parametrize(
    ("shape", "code_size", "expected"),
    [
        ((128, 128, 1), 100, 1_048_549),
        ((128, 128, 3), 100, 1_050_599),
        ((256, 256, 3), 500, 2_722_231),
    ],
)
def test_paper_size(shape, code_size, expected):
    network = build(shape, device="meta", code_size=code_size).network_
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    variational = build(
        shape, VariationalAutoencoder, device="meta", code_size=code_size
    ).network_
    more = sum(parameter.numel() for parameter in variational.parameters()) - expected
    assert more == code_size * (8 * 8 * 32 + 1)  # a second code


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (32, 64), (100, 70), (16, 16), (8, 9), (1, 2)]
)
def test_images_of_any_size_pass_a_code_without_extent(height, width):
    network = build((height, width, 2), width=4, code_size=5).network_
    images = torch.rand(3, 2, height, width)
    assert network.encode(images).shape == (3, 5)
    rebuilt = network(images)
    assert rebuilt.shape == images.shape
    assert 0 <= rebuilt.min() <= rebuilt.max() <= 1


def test_no_way_around_the_code():
    network = build((32, 32, 1), width=4, code_size=5).network_
    network.encode = lambda images: torch.zeros(len(images), 5)
    first, second = network(torch.rand(2, 1, 32, 32))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("loss", ["ssim", "l2"])
def test_maps_are_residuals(loss, random_images, small):
    X = random_images(4, 32, 32, 3)
    model = small(Autoencoder, loss=loss).fit(random_images(8, 32, 32, 3))
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    with torch.inference_mode():
        rebuilt = model.network_(images)
    if loss == "l2":
        expected = ((images - rebuilt) ** 2).mean(dim=1)
    else:
        expected = 1 - ssim_map(images, rebuilt, padding="reflect").mean(dim=1)
    np.testing.assert_allclose(model.localize(X), expected, rtol=1e-3, atol=1e-6)
    for given, size in ((11, 3), (40, 5)):
        model.set_params(smoothing_size=given)
        smooth = mean_filter(expected, size, padding="none").amax(dim=(1, 2))
        np.testing.assert_allclose(-model.score_samples(X), smooth, rtol=1e-3)


@pytest.mark.parametrize("side", [16, 64, 100])
def test_initial_weights_keep_the_variance(side):
    network = build((side, side, 3), width=16, code_size=32).network_
    signal = torch.randn(8, 3, side, side)
    deviations = []
    for layer in (*network.encoder, *network.decoder):
        if layer is network.encoder[0]:
            signal = pad_to_multiple(signal, network.stride)
        signal = layer(signal)
        if not isinstance(layer, (torch.nn.LeakyReLU, torch.nn.Sigmoid)):
            deviations.append(signal.std().item())
    assert 0.2 < min(deviations) <= max(deviations) < 5


def test_losses(make_batch):
    images = torch.rand(4, 1, 32, 32)
    model = build((32, 32, 1), width=4, code_size=5)
    rebuilt = model.network_(images)
    batch = make_batch(images)
    ((part, by_ssim),) = model._losses(model.network_, batch)
    expected = (1 - ssim_map(images, rebuilt, padding="reflect")).mean()
    assert part is model.network_
    torch.testing.assert_close(by_ssim, expected)
    ((_, by_square),) = model.set_params(loss="l2")._losses(model.network_, batch)
    torch.testing.assert_close(by_square, ((images - rebuilt) ** 2).sum() / 4)


def test_larger_constants_damp_noise(random_images, small):
    X = 0.5 + 0.02 * random_images(8, 32, 32, 1)
    plain, damped = (
        small(Autoencoder, ssim_constants=constants).fit(X).localize(X).mean()
        for constants in ((1e-4, 9e-4), (0.01, 0.03))
    )
    assert damped < 0.7 * plain


def test_the_variational_loss_is_error_and_divergence(make_batch):
    images = torch.rand(4, 1, 32, 32)
    model = build((32, 32, 1), VariationalAutoencoder, width=4, code_size=5)
    network = model.network_
    ((_, loss),) = model._losses(network, make_batch(images, seed=1))
    means, log_variances = network.encode(images).chunk(2, dim=1)
    draws = torch.randn(means.shape, generator=torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal(means, (log_variances / 2).exp())
    codes = means + draws * normal.scale
    divergence = torch.distributions.kl_divergence(
        normal, torch.distributions.Normal(0.0, 1.0)
    )
    squares = (network.decode(codes, (32, 32)) - images) ** 2
    expected = (squares.sum(dim=(1, 2, 3)) + divergence.sum(dim=1)).mean()
    torch.testing.assert_close(loss, expected)


def test_variational_residuals_are_averaged_over_the_same_samples(random_images, small):
    X = random_images(4, 32, 32, 1)
    model = small(VariationalAutoencoder, n_samples=3).fit(X)
    found = model.localize(X)
    np.testing.assert_array_equal(model.localize(X), found)
    np.testing.assert_allclose(model.localize(X[2:]), found[2:], rtol=1e-4, atol=1e-6)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(model._seed)
    with torch.inference_mode():
        means, log_variances = model.network_.encode(images).chunk(2, dim=1)
        expected = 0
        for draw in torch.randn(3, 1, 8, generator=generator):
            codes = means + draw * (log_variances / 2).exp()
            rebuilt = model.network_.decode(codes, (32, 32))
            expected = expected + ((images - rebuilt) ** 2)[:, 0] / 3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(("height", "width"), [(40, 33), (16, 20), (12, 40)])
def test_overlapping_patches_cover_the_image_and_are_averaged(
    cls, height, width, random_images, small
):
    model = small(cls, patch_size=16).fit(random_images(6, height, width, 1))
    X = random_images(2, height, width, 1, seed=1)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    high, wide = min(16, height), min(16, width)

    residuals = model._residuals
    if cls is VariationalAutoencoder:
        generator = torch.Generator().manual_seed(model._seed)
        draws = torch.randn(model.n_samples, 1, model.code_size, generator=generator)
        residuals = partial(model._residuals, draws=draws)

    def starts(side, patch):
        places = list(range(0, side - patch, 4))
        return [*places, side - patch]

    sums, counts = np.zeros((2, height, width)), np.zeros((height, width))
    with torch.inference_mode():
        for top in starts(height, high):
            for left in starts(width, wide):
                place = (..., slice(top, top + high), slice(left, left + wide))
                sums[place] += residuals(images[place]).numpy()
                counts[place] += 1
    assert counts.min() >= 1
    np.testing.assert_allclose(model.localize(X), sums / counts, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["ssim", "l2"])
def test_a_perfect_reconstruction_leaves_nothing(loss, random_images, small):
    X = random_images(4, 40, 33, 1)
    model = small(Autoencoder, loss=loss, patch_size=16).fit(X)
    model.network_.forward = lambda images: images
    np.testing.assert_allclose(model.localize(X), 0, atol=1e-5)
    np.testing.assert_allclose(model.score_samples(X), 0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 33), (16, 20), (12, 40)])
def test_crops_put_back_are_the_image(size, monkeypatch, random_images, small):
    X = random_images(4, *size, 1)
    model = small(Autoencoder, patch_size=16).fit(X)
    monkeypatch.setattr(Autoencoder, "_residuals", lambda self, images: images[:, 0])
    np.testing.assert_allclose(model.localize(X), X[..., 0], rtol=1e-5)


def test_training_crops_are_drawn_anew():
    model = build((40, 33, 1), width=4, patch_size=16)
    image = torch.arange(40 * 33.0).view(1, 1, 40, 33).expand(64, 1, 40, 33)
    corners = set()
    for crop in model._crop(image, torch.Generator())[:, 0]:
        top, left = divmod(int(crop[0, 0]), 33)
        assert torch.equal(crop, image[0, 0, top : top + 16, left : left + 16])
        corners.add((top, left))
    assert len(corners) > 40


@pytest.mark.parametrize("loss", ["ssim", "l2"])
def test_two_images_can_be_learned_by_heart(loss, small):
    X = np.full((2, 16, 16), 0.2, np.float32)
    X[0, 4:12], X[1, :, 4:12] = 0.8, 0.8
    settings = {"max_epochs": 150, "learning_rate": 1e-2, "code_size": 32, "width": 8}
    model = small(Autoencoder, loss=loss, **settings).fit(X)
    assert model.loss_curve_[-1] < 0.05 * model.loss_curve_[0]


def test_bad_constants_are_refused(random_images, small):
    with pytest.raises(ValueError, match="ssim_constants="):
        small(Autoencoder, ssim_constants=(0.0, 1.0)).fit(random_images(4, 32, 32, 1))


@pytest.mark.parametrize("cls", BOTH)
def test_a_planted_defect_is_found(cls, small):
    rng = np.random.default_rng(0)
    wave = 0.5 + 0.3 * np.sin(np.arange(32) * np.pi / 4)
    X = (wave[:, None] + rng.normal(0, 0.02, (84, 32, 32))).clip(0, 1)
    X, X_test = X[:64], X[64:]
    mask = np.zeros(X_test.shape, bool)
    mask[10:, 8:18, 8:18] = True
    X_test[mask] = 1 - X_test[mask]
    model = small(cls, max_epochs=60, learning_rate=5e-3).fit(X)
    assert roc_auc_score(mask[:, 8, 8], -model.score_samples(X_test)) > 0.95
    assert roc_auc_score(mask[10:].ravel(), model.localize(X_test[10:]).ravel()) > 0.8
