"""Blocks that several networks are built from."""

import torch.nn.functional as F
from torch import nn


def pad_to_multiple(images, multiple):
    """Pad images at their right and lower border by replication.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images of any size.
    multiple : int
        Height and width become the next multiple of it.

    Returns
    -------
    torch.Tensor of shape (b, c, H, W)
        The padded images; crop what is computed from them by ``[..., :h, :w]``.
    """
    bottom, right = (-side % multiple for side in images.shape[-2:])
    if not (bottom or right):
        return images
    return F.pad(images, (0, right, 0, bottom), mode="replicate")


class ConvUnit(nn.Sequential):
    """3 x 3 convolution, batch normalisation and ReLU.

    Parameters
    ----------
    in_channels, out_channels : int
        Numbers of channels before and after.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
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
