"""Attention: Woo et al., "CBAM: Convolutional Block Attention Module" (ECCV 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CBAM", "ChannelAttention", "SpatialAttention"]


class ChannelAttention(nn.Module):
    """Scale each channel, section 3: ``sigmoid(MLP(average) + MLP(maximum))``.

    Average and maximum are over space; the MLP is shared, with one hidden layer and no biases.
    ``[B, C, H, W]`` to the same shape. It has ``2 C hidden`` parameters.

    :param channels: C.
    :param ratio: how many times fewer the hidden units are, of which there is at least one.
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // ratio)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled feature map."""
        pixels = _pixels(x)
        each_pixel = pixels.new_ones(1, pixels.shape[1]).expand(len(x), 1, -1)
        average = (each_pixel / pixels.shape[1] @ pixels)[:, 0]
        # Unlike amax's, this pooling's gradient keeps the channels_last layout.
        maximum = F.max_pool2d(x, x.shape[2:]).flatten(1)
        gate = torch.sigmoid(self.mlp(average) + self.mlp(maximum))
        return _maps(pixels * (each_pixel.mT @ gate[:, None]), x)


class SpatialAttention(nn.Module):
    """Scale each pixel, section 3: ``sigmoid(conv([average, maximum]))``.

    Average and maximum are over the channels; the convolution has no bias. ``[B, C, H, W]`` to the
    same shape. It has 98 parameters with the published kernel.

    :param kernel_size: side of the convolution's kernel (the paper's 7).
    """

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled feature map."""
        pixels = _pixels(x)
        each_channel = pixels.new_ones(1, x.shape[1]).expand(len(x), 1, -1)
        average = pixels @ (each_channel / x.shape[1]).mT
        # Unlike amax's, the gradient of max does not look for ties, which took ten times as long.
        maximum = pixels.max(dim=2, keepdim=True).values
        pooled = torch.cat([average, maximum], dim=2).view(len(x), *x.shape[2:], 2)
        gate = torch.sigmoid(self.conv(pooled.permute(0, 3, 1, 2))).flatten(1)[:, :, None]
        return _maps(pixels * (gate @ each_channel), x)


def _pixels(maps: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H W, C]``; a view of maps in channels_last layout.

    Sums over pixels or channels, and what repeats a value over them, are matrix products with ones
    here: elementwise operations on shapes that differ take ten times as long on a CPU.
    """
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _maps(pixels: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


class CBAM(nn.Sequential):
    """Channel attention, then spatial attention: ``[B, C, H, W]`` to the same shape.

    As in the paper's equations; the authors' code adds a BatchNorm after the convolution and biases
    to the MLP.

    :param channels: C.
    :param ratio: reduction of the channel attention's MLP.
    :param kernel_size: of the spatial attention's convolution.
    """

    def __init__(self, channels: int, ratio: int = 16, kernel_size: int = 7) -> None:
        super().__init__(ChannelAttention(channels, ratio), SpatialAttention(kernel_size))
