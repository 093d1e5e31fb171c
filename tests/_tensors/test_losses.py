import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from skanomaly._tensors.losses import (
    focal_loss,
    gaussian_divergence,
    gms_map,
    msgms_loss,
    msgms_map,
    ssim_loss,
    ssim_map,
)


def random_pair(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, *shape, dtype=dtype, generator=generator)


def slow_ssim(x, y, data_range, window_size, sigma):
    """Weigh the window around each pixel; zeros lie outside of the image."""
    half = window_size // 2
    axis = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    weights = np.outer(axis, axis) / axis.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    x, y = np.pad(x, half), np.pad(y, half)
    height, width = (side - 2 * half for side in x.shape)
    result = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            window = slice(row, row + window_size), slice(column, column + window_size)
            a, b = x[window], y[window]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a = (weights * a * a).sum() - mean_a**2
            variance_b = (weights * b * b).sum() - mean_b**2
            covariance = (weights * a * b).sum() - mean_a * mean_b
            result[row, column] = (
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )
    return result


def slow_magnitude(image):
    padded = np.pad(image, 1, mode="edge")
    kernel = np.array([[-1, -1, -1], [0, 0, 0], [1, 1, 1]]) / 3
    result = np.empty_like(image)
    for row, column in np.ndindex(*image.shape):
        window = padded[row : row + 3, column : column + 3]
        result[row, column] = math.hypot(
            (kernel * window).sum(), (kernel.T * window).sum()
        )
    return result


def slow_gms(x, y, constant=0.0026):
    a, b = slow_magnitude(x), slow_magnitude(y)
    return (2 * a * b + constant) / (a**2 + b**2 + constant)


def halved(image):
    height, width = image.shape
    return image.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))


def slow_msgms(x, y, n_scales):
    losses = [1 - slow_gms(x, y).mean()]
    for _ in range(n_scales - 1):
        x, y = halved(x), halved(y)
        losses.append(1 - slow_gms(x, y).mean())
    return np.mean(losses)


def slow_focal(logits, targets, gamma):
    values = []
    for b, row, column in np.ndindex(*targets.shape):
        exponentials = np.exp(logits[b, :, row, column])
        p = exponentials[targets[b, row, column]] / exponentials.sum()
        values.append(-((1 - p) ** gamma) * math.log(p))
    return np.mean(values)


@pytest.mark.parametrize(
    ("data_range", "window_size", "sigma"),
    [(1.0, 11, 1.5), (2.0, 11, 1.5), (torch.tensor(255.0), 5, 0.8)],
)
def test_ssim_map_equals_the_loop_over_windows(data_range, window_size, sigma):
    x, y = random_pair(2, 2, 9, 13)
    settings = dict(data_range=data_range, window_size=window_size, sigma=sigma)
    result = ssim_map(x, y, **settings)
    for index in np.ndindex(2, 2):
        expected = slow_ssim(
            x[index].numpy(), y[index].numpy(), float(data_range), window_size, sigma
        )
        np.testing.assert_allclose(result[index], expected, atol=1e-9)
    assert ssim_loss(x, y, **settings).item() == pytest.approx(1 - result.mean().item())


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_gradients_of_ssim_equal_differences(padding):
    pair = [image.requires_grad_() for image in random_pair(2, 1, 6, 7)]
    assert torch.autograd.gradcheck(
        lambda x, y: ssim_map(x, y, window_size=3, padding=padding), pair
    )


def test_ssim_without_a_window_compares_pixels():
    x, y = random_pair(1, 1, 4, 4)
    expected = (2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4)
    torch.testing.assert_close(ssim_map(x, y, sigma=0), expected)


def test_ssim_of_equal_images_is_one_and_symmetric():
    x, y = random_pair(2, 3, 16, 12, dtype=torch.float32)
    torch.testing.assert_close(ssim_map(x, x), torch.ones_like(x))
    assert ssim_loss(x, x).item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(ssim_map(x, y), ssim_map(y, x))
    assert (ssim_map(x, y) <= 1).all()
    assert ssim_loss(x, y) > 0.3


def test_ssim_falls_when_a_constant_is_added():
    images = torch.rand(2, 3, 16, 16)
    assert ssim_map(images, images + 0.2, padding="reflect").max() < 1 - 1e-3
    similarity = ssim_map(images, 1 - images, padding="reflect")
    assert similarity.min() >= -1
    assert similarity.mean() < 0  # the structure is the opposite


def test_gms_map_equals_the_loop():
    x, y = random_pair(2, 2, 7, 10)
    result = gms_map(x, y)
    for index in np.ndindex(2, 2):
        expected = slow_gms(x[index].numpy(), y[index].numpy())
        np.testing.assert_allclose(result[index], expected, atol=1e-7)


def test_gms_map_ignores_a_constant_but_not_structure():
    x, y = random_pair(2, 3, 8, 8)
    torch.testing.assert_close(gms_map(x, x + 0.3), torch.ones_like(x))
    torch.testing.assert_close(gms_map(x + 0.3, y - 0.2), gms_map(x, y))
    assert torch.equal(gms_map(x, y), gms_map(y, x))
    assert gms_map(x, y).min() < 0.5


@pytest.mark.parametrize("n_scales", [1, 4])
def test_msgms_loss_equals_the_loop(n_scales):
    x, y = random_pair(2, 1, 16, 24)
    expected = np.mean(
        [
            slow_msgms(a, b, n_scales)
            for a, b in zip(x[:, 0].numpy(), y[:, 0].numpy(), strict=True)
        ]
    )
    assert msgms_loss(x, y, n_scales=n_scales).item() == pytest.approx(expected)
    assert msgms_loss(x, x, n_scales=n_scales).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_loss_equals_the_loop(gamma):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 3, (2, 5, 4), generator=generator)
    expected = slow_focal(logits.numpy(), targets.numpy(), gamma)
    assert focal_loss(logits, targets, gamma=gamma).item() == pytest.approx(expected)


def test_focal_loss_without_focus_is_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 2, 8, 8, generator=generator)
    targets = torch.randint(0, 2, (4, 8, 8), generator=generator)
    expected = F.cross_entropy(logits, targets).item()
    assert focal_loss(logits, targets, gamma=0).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_focal_loss_is_nowhere_above_the_cross_entropy():
    logits = torch.linspace(-20, 20, 201)
    pairs = torch.stack([torch.zeros_like(logits), logits])
    for target in (0, 1):
        for pair in pairs.T.reshape(-1, 1, 2, 1, 1):
            label = torch.full((1, 1, 1), target)
            assert focal_loss(pair, label) <= focal_loss(pair, label, gamma=0)


@pytest.mark.parametrize("scale", [50.0, 500.0])
def test_focal_loss_has_a_gradient_where_it_is_surely_wrong(scale):
    logits = torch.tensor([scale, -scale]).view(1, 2, 1, 1).requires_grad_()
    focal_loss(logits, torch.ones(1, 1, 1, dtype=torch.int64)).backward()
    # the slope of the cross-entropy, which the focal loss approaches there
    assert logits.grad.flatten().tolist() == pytest.approx([1.0, -1.0])


def test_focal_loss_has_no_slope_where_it_is_surely_right():
    logits = torch.tensor([500.0, -500.0]).view(1, 2, 1, 1).requires_grad_()
    focal_loss(logits, torch.zeros(1, 1, 1, dtype=torch.int64)).backward()
    assert not logits.grad.any()


@pytest.mark.parametrize(
    "loss",
    [ssim_loss, lambda x, y: 1 - gms_map(x, y).mean(), msgms_loss],
    ids=["ssim_loss", "gms_map", "msgms_loss"],
)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradients_are_finite_on_constant_images(loss, value):
    _, reference = random_pair(2, 3, 16, 16, dtype=torch.float32)
    for other in (reference, torch.full_like(reference, value)):
        images = torch.full_like(reference, value, requires_grad=True)
        loss(images, other).backward()
        assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss", [ssim_map, ssim_loss, gms_map, msgms_loss], ids=lambda loss: loss.__name__
)
def test_losses_keep_their_precision_under_autocast(loss):
    x, y = random_pair(2, 3, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(x.bfloat16(), y).dtype == torch.float32
        assert loss(x, references=y.bfloat16()).dtype == torch.float32
        inside = loss(x, y)
    assert torch.equal(inside, loss(x, y))


def test_focal_loss_keeps_its_precision_under_autocast():
    logits = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(2, 4, 4, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert focal_loss(logits.bfloat16(), targets).dtype == torch.float32
        inside = focal_loss(logits, targets)
    assert torch.equal(inside, focal_loss(logits, targets))


def test_msgms_map_averages_levels_that_are_interpolated():
    x, y = random_pair(2, 3, 16, 24, dtype=torch.float32)
    expected = 0
    levels = (x, y)
    for _ in range(3):
        level = gms_map(*levels).mean(dim=1, keepdim=True)
        expected = expected + F.interpolate(level, (16, 24), mode="bilinear")[:, 0] / 3
        levels = [F.avg_pool2d(image, 2) for image in levels]
    torch.testing.assert_close(msgms_map(x, y, n_scales=3), expected)
    # without interpolation errors its mean is the loss
    torch.testing.assert_close(
        1 - msgms_map(x, y, n_scales=1).mean(), msgms_loss(x, y, n_scales=1)
    )


def test_msgms_of_lines_and_pixels():
    x, y = random_pair(1, 1, 1, 5, dtype=torch.float32)
    assert msgms_map(x, y).shape == (1, 1, 5)
    assert torch.isfinite(msgms_loss(x, y))


def test_reflection_keeps_a_frame_out_of_the_map():
    image = torch.rand(1, 1, 24, 24)
    other = image**2
    mirrored = torch.cat([image.flip(3), image, image.flip(3)], dim=3)
    mirrored = torch.cat([mirrored.flip(2), mirrored, mirrored.flip(2)], dim=2)
    expected = ssim_map(mirrored, mirrored**2)[..., 24:48, 24:48]
    found = ssim_map(image, other, padding="reflect")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ssim_map(image, other), expected, atol=1e-2)


def test_ssim_constants():
    x, y = random_pair(1, 1, 16, 16)
    np.testing.assert_allclose(
        ssim_map(x, y, constants=(4e-4, 36e-4)), ssim_map(x / 2, y / 2), rtol=1e-9
    )


def test_gaussian_divergence():
    means, log_variances = random_pair(4, 6)
    normal = torch.distributions.Normal(means, (log_variances / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=1)
    torch.testing.assert_close(gaussian_divergence(means, log_variances), expected)
    assert (expected > 0).all()
    assert not gaussian_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).any()


def test_similarities_of_a_few_images_at_a_time_are_those_of_all(monkeypatch):
    values, gradients = [], []
    for n_values in (10**9, 2 * 3 * 20 * 16):  # all five images, or 2 + 2 + 1
        monkeypatch.setattr("skanomaly._tensors.losses.CACHED_VALUES", n_values)
        x, y = random_pair(5, 3, 20, 16)
        y.requires_grad_()
        found = ssim_map(x, y)
        found.square().sum().backward()
        values.append(found.detach())
        gradients.append(y.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
