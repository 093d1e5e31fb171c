import pytest
import torch
import torch.nn.functional as F

from skanomaly._tensors.networks import PatchCritic, adversarial_loss, critic_loss


@pytest.mark.parametrize(("size", "side"), [(512, 62), (256, 30), (128, 14), (64, 6)])
def test_number_of_patches(size, side):
    with torch.device("meta"):
        patches = PatchCritic(3, 4)(torch.empty(1, 3, size, size))
    assert patches.shape == (1, 1, side, side)


def test_small_images_are_padded():
    assert PatchCritic(1, 2)(torch.rand(2, 1, 1, 2)).shape == (2, 1, 2, 2)


def test_layers_have_a_spectral_norm_of_one():
    torch.manual_seed(0)
    critic = PatchCritic(1, 4)
    images = torch.rand(2, 1, 32, 32)
    for _ in range(100):
        critic(images)
    for layer in critic.eval().layers[::2]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == (
            pytest.approx(1.0, abs=0.02)
        )


def test_losses_are_cross_entropies():
    torch.manual_seed(0)
    critic = PatchCritic(1, 4).eval()
    real, fake = torch.rand(2, 3, 1, 32, 32)
    on_real, on_fake = critic(real).sigmoid(), critic(fake).sigmoid()
    ones, zeros = torch.ones_like(on_real), torch.zeros_like(on_real)
    expected = 0.5 * (
        F.binary_cross_entropy(on_real, ones) + F.binary_cross_entropy(on_fake, zeros)
    )
    torch.testing.assert_close(critic_loss(critic, real, fake), expected)
    torch.testing.assert_close(
        adversarial_loss(critic, fake), F.binary_cross_entropy(on_fake, ones)
    )
