import pytest
import torch
import torch.nn.functional as F

from skanomaly._tensors.networks import (
    Convolution3x3,
    ConvUnit,
    GroupNorm,
    conv_block,
    instance_norm,
    pad_to_multiple,
)


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((32, 64), (32, 64)),
        ((33, 47), (64, 64)),
        ((1, 2), (32, 32)),
        ((31, 32), (32, 32)),
    ],
)
def test_padding_repeats_the_last_pixels(size, padded):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    result = pad_to_multiple(images, 32)
    assert result.shape == (2, 3, *padded)
    height, width = size
    rows = torch.arange(padded[0]).clamp(max=height - 1)
    columns = torch.arange(padded[1]).clamp(max=width - 1)
    assert torch.equal(result, images[..., rows, :][..., columns])


def test_a_unit_convolves_normalises_and_rectifies():
    torch.manual_seed(0)
    unit = ConvUnit(2, 64)
    images = torch.rand(4, 2, 6, 6)
    result = unit(images)
    convolved = F.conv2d(images, unit[0].weight, unit[0].bias, padding=1)
    mean = convolved.mean(dim=(0, 2, 3), keepdim=True)
    deviation = (convolved.var(dim=(0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    normalised = (convolved - mean) / deviation * unit[1].weight.view(1, -1, 1, 1)
    torch.testing.assert_close(result, normalised.clamp(min=0))


def test_a_block_has_two_units_and_the_initial_weights_of_the_paper():
    torch.manual_seed(0)
    first, second = conv_block(64, 128)
    assert (first[0].in_channels, first[0].out_channels) == (64, 128)
    assert (second[0].in_channels, second[0].out_channels) == (128, 128)
    for convolution, normalisation, _ in (first, second):
        assert convolution.weight.mean().item() == pytest.approx(0.0, abs=5e-4)
        assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert normalisation.weight.mean().item() == pytest.approx(1.0, abs=0.01)
        assert normalisation.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert not normalisation.bias.any()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("mean", "atol"), [(0.0, 1e-5), (100.0, 1e-4)])
def test_instance_norm_is_that_of_torch(affine, layout, mean, atol):
    torch.manual_seed(0)
    features = (torch.randn(3, 5, 8, 6) + mean).contiguous(memory_format=layout)
    expected = torch.nn.InstanceNorm2d(5)(features.double()).float()
    found = instance_norm(5, affine=affine)(features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("n_groups", [1, 3, 6])
def test_group_norm_and_its_gradient_are_accurate(n_groups):
    torch.manual_seed(0)
    features = torch.randn(3, 6, 8, 7) + 100
    features = features.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(3, 6, 8, 7, dtype=torch.float64)
    results = []
    for norm, own in (
        (GroupNorm(n_groups, 6), features),
        (torch.nn.GroupNorm(n_groups, 6).double(), features.double()),
    ):
        own.requires_grad_()
        normalised = norm(own)
        (back,) = torch.autograd.grad(normalised, own, gradient.to(own.dtype))
        results.append([normalised.double(), back.double()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_by_planes_are_those_of_a_convolution(layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    torch.manual_seed(0)
    convolution = Convolution3x3(24, 40).to(memory_format=layout)
    images = torch.rand(2, 24, 5, 128).contiguous(memory_format=layout)
    images.requires_grad_()
    gradient = torch.randn(2, 40, 5, 128)
    wanted = [images, convolution.weight, convolution.bias]

    def gradients(result):
        return torch.autograd.grad(result, wanted, gradient)

    by_planes = convolution(images)
    assert "ByPlanes" in type(by_planes.grad_fn).__name__
    plain = F.conv2d(images, convolution.weight, convolution.bias, padding=1)
    assert torch.equal(by_planes, plain)
    pairs = zip(gradients(by_planes), gradients(plain), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert "ByPlanes" not in type(convolution(images[..., :127]).grad_fn).__name__
    assert "ByPlanes" not in type(convolution.eval()(images).grad_fn).__name__
