"""Networks and blocks that several methods use."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm

# bytes of the first-level cache of most processors that have AVX2 and not AVX-512
LEVEL_1_CACHE = 32 * 1024


def pad_to_multiple(images, multiple, *, minimum=1):
    """Pad images at their right and lower border by replication.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w) or (b, c, t, h, w)
        Images or clips of any size; clips are padded at their end, too.
    multiple : int or tuple of int
        Each side becomes the next multiple of it, or of its own member of a tuple.
    minimum : int, default=1
        Smallest height and width, a multiple of ``multiple``.

    Returns
    -------
    torch.Tensor of shape (b, c, H, W) or (b, c, T, H, W)
        The padded images; crop what is computed from them by ``[..., :h, :w]``.
    """
    size = images.shape[2:]
    if isinstance(multiple, int):
        multiple = (multiple,) * len(size)
    more = [
        max(-side % step, minimum - side)
        for side, step in zip(size, multiple, strict=True)
    ]
    if not any(more):
        return images
    pads = [pad for extra in reversed(more) for pad in (0, extra)]
    return F.pad(images, pads, mode="replicate")


class GroupNorm(nn.GroupNorm):
    """Group normalisation that is accurate where channels are last, too.

    There torch takes the variance, on a processor, for the mean square less the squared
    mean, which rounding ruins where the mean is large: images of 128 pixels with a mean
    of 20 standard deviations are off by a hundredth of one. The mean is therefore
    subtracted first, which changes nothing of a normalisation, nor of its gradient.
    """

    def forward(self, features):
        """Return normalised features (b, c, h, w)."""
        if not features.is_contiguous():
            means = features.detach().mean(dim=(2, 3), keepdim=True)  # (b, c, 1, 1)
            groups = means.unflatten(1, (self.num_groups, -1))
            means = groups.mean(dim=2, keepdim=True).expand_as(groups).flatten(1, 2)
            features = features - means
        return super().forward(features)


def instance_norm(n_channels, *, affine=True):
    """Return an instance normalisation that is fast where channels are last.

    Parameters
    ----------
    n_channels : int
        Number of channels.
    affine : bool, default=True
        Whether channels are scaled and shifted by learned parameters.

    Returns
    -------
    GroupNorm
        With one channel a group. On a processor, torch's own instance normalisation
        copies images whose channels are last.
    """
    return GroupNorm(n_channels, n_channels, affine=affine)


class Convolution3x3(nn.Conv2d):
    """3 x 3 convolution that keeps the size, and trains fast where channels are last.

    With AVX2 alone the weights' gradient is slow once a row of the images and one of
    the results leave the first-level cache; it is then computed of planes.

    Parameters
    ----------
    in_channels, out_channels : int
        Numbers of channels before and after.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, images):
        if self._needs_planes(images):
            return _ByPlanes.apply(images, self.weight, self.bias)
        return super().forward(images)

    def _needs_planes(self, images):
        row = 4 * images.shape[-1] * (self.in_channels + self.out_channels)
        return (
            self.training
            and row >= LEVEL_1_CACHE
            and images.device.type == "cpu"
            and torch.backends.cpu.get_cpu_capability() == "AVX2"
            and images.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )


class _ByPlanes(torch.autograd.Function):
    """A 3 x 3 convolution whose weights' gradient sees each channel as a plane."""

    @staticmethod
    def forward(ctx, images, weight, bias):
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, weight = ctx.saved_tensors

        def backward_of(*tensors, wanted):
            sizes = [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1
            return torch.ops.aten.convolution_backward(*tensors, *sizes, wanted)

        of_images = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            wanted = [True, False, False]
            of_images, *_ = backward_of(gradient, images, weight, wanted=wanted)
        if ctx.needs_input_grad[1]:
            planes = (_planes(gradient), _planes(images), weight.contiguous())
            _, of_weight, of_bias = backward_of(*planes, wanted=[False, True, True])
        return of_images, of_weight, of_bias


def _planes(images):
    """Copy images so that each channel is a plane; image by image, torch is fast."""
    copied = torch.empty(images.shape)
    for target, image in zip(copied.flatten(2), images.flatten(2), strict=True):
        target.copy_(image)
    return copied


class ConvUnit(nn.Sequential):
    """3 x 3 convolution, batch normalisation and ReLU.

    Parameters
    ----------
    in_channels, out_channels : int
        Numbers of channels before and after.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(
            Convolution3x3(in_channels, out_channels),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        nn.init.normal_(self[0].weight, 0.0, 0.02)
        nn.init.normal_(self[1].weight, 1.0, 0.02)


def conv_block(in_channels, out_channels):
    """Return two convolution units; the first changes the number of channels."""
    return nn.Sequential(
        ConvUnit(in_channels, out_channels), ConvUnit(out_channels, out_channels)
    )


class InpaintingUNet(nn.Module):
    """U-Net with four strided stages and logits of the images' size.

    Parameters
    ----------
    in_channels, out_channels : int
        Numbers of channels of the input and the output.
    width : int
        Number of channels at the full resolution; deeper stages have 2, 4, 8 and 8
        times as many.
    norm : callable, default=torch.nn.BatchNorm2d
        ``norm(channels)`` returns a normalisation layer.

    References
    ----------
    V. Zavrtanik, M. Kristan, D. Skočaj. "Reconstruction by inpainting for visual
    anomaly detection". Pattern Recognition, 2021.
    """

    def __init__(self, in_channels, out_channels, width, norm=nn.BatchNorm2d):
        super().__init__()

        def unit(convolution):
            return [convolution, norm(convolution.out_channels), nn.ReLU(inplace=True)]

        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        first = Convolution3x3(in_channels, width)
        strided = [
            nn.Conv2d(wide, narrow, 4, stride=2, padding=1)
            for wide, narrow in itertools.pairwise(widths)
        ]
        self.down = nn.ModuleList(
            nn.Sequential(*unit(convolution), *unit(Convolution3x3(side, side)))
            for side, convolution in zip(widths, [first, *strided], strict=True)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)
            for wide, narrow in itertools.pairwise(widths[::-1])
        )
        self.merge = nn.ModuleList(
            nn.Sequential(
                *unit(Convolution3x3(2 * side, side)),
                *unit(Convolution3x3(side, side)),
            )
            for side in widths[-2::-1]
        )
        self.head = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images):
        height, width = images.shape[-2:]
        features = pad_to_multiple(images, 16)
        skips = []
        for block in self.down:
            features = block(features)
            skips.append(features)
        skips.pop()  # (b, 8 * width, h / 16, w / 16)
        for up, merge in zip(self.up, self.merge, strict=True):
            features = merge(torch.cat([up(features), skips.pop()], dim=1))
        return self.head(features)[..., :height, :width]  # (b, out_channels, h, w)


class PatchCritic(nn.Module):
    """Discriminator that judges overlapping patches, with spectral normalisation.

    Images of fewer than 32 pixels a side are padded by replication.

    Parameters
    ----------
    channels : int
        Number of channels of the images.
    width : int
        Number of channels of the first layer; the others have 2, 4 and 8 times as many.

    References
    ----------
    P. Isola, J. Zhu, T. Zhou, A. Efros. "Image-to-image translation with conditional
    adversarial networks". CVPR 2017.
    """

    def __init__(self, channels, width):
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width, 8 * width]
        layers = []
        for (wide, narrow), stride in zip(
            itertools.pairwise(widths), (2, 2, 2, 1), strict=True
        ):
            layers += [_critic_layer(wide, narrow, stride), nn.LeakyReLU(0.2, True)]
        self.layers = nn.Sequential(*layers, _critic_layer(8 * width, 1, 1))

    def forward(self, images):
        """Return a logit a patch: (b, 1, h', w'), positive where it looks real."""
        return self.layers(pad_to_multiple(images, 1, minimum=32))


def _critic_layer(in_channels, out_channels, stride):
    convolution = nn.Conv2d(in_channels, out_channels, 4, stride, padding=1, bias=False)
    nn.init.normal_(convolution.weight, 0.0, 0.02)
    return spectral_norm(convolution)


def critic_loss(critic, real, fake):
    """Compute the loss of a critic that tells real from generated images.

    Parameters
    ----------
    critic : torch.nn.Module
        Returns logits.
    real, fake : torch.Tensor of shape (b, c, h, w)
        Real and generated images, the latter detached from their generator.

    Returns
    -------
    torch.Tensor of shape ()
        Mean of both binary cross-entropies.
    """
    on_real, on_fake = critic(real).float(), critic(fake).float()
    return 0.5 * (F.softplus(-on_real).mean() + F.softplus(on_fake).mean())


def adversarial_loss(critic, fake):
    """Compute the loss of a generator that wants to fool a critic.

    Parameters
    ----------
    critic : torch.nn.Module
        Returns logits.
    fake : torch.Tensor of shape (b, c, h, w)
        Generated images.

    Returns
    -------
    torch.Tensor of shape ()
        Binary cross-entropy of the critic against the label "real".
    """
    return F.softplus(-critic(fake).float()).mean()
