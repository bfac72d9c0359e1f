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
        # Unlike mean and amax, these poolings' gradients keep the channels_last layout.
        average, maximum = (
            self.mlp(pool(x, x.shape[2:]).flatten(1)) for pool in (F.avg_pool2d, F.max_pool2d)
        )
        return x * torch.sigmoid(average + maximum)[:, :, None, None]


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
        # Unlike amax's, the gradient of max does not look for ties, which took ten times as long.
        maximum = x.max(dim=1, keepdim=True).values
        pooled = torch.cat([x.mean(dim=1, keepdim=True), maximum], dim=1)
        return x * torch.sigmoid(self.conv(pooled))


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
