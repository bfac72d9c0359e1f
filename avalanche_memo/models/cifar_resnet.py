"""The CIFAR ResNet of iCaRL, PyCIL and MEMO: 6n+2 layers in three stages, without shortcut weights.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2, shortcuts of
option A. At depth 32 it is the "modified ResNet-32" of the class-incremental literature.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_memo.models.staged import StagedBackbone

__all__ = ["CifarBlock", "ZeroPadShortcut", "cifar_resnet"]

_WIDTHS = (16, 32, 64)


class ZeroPadShortcut(nn.Module):
    """A shortcut without parameters: every second pixel, and zeros as the channels that are new.

    ``[B, in_channels, H, W]`` to ``[B, out_channels, ceil(H/2), ceil(W/2)]``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut of a feature map; the zeros follow the old channels."""
        # Pooling over single pixels is x[:, :, ::2, ::2] with a gradient in channels_last layout.
        return F.pad(F.avg_pool2d(x, 1, stride=2), (0, 0, 0, 0, 0, self.new_channels))


class CifarBlock(nn.Module):
    """A residual block of two 3x3 convolutions, with a ReLU on its output.

    ``[B, in_channels, H, W]`` to ``[B, channels, H, W]``; where the width changes, H and W are
    halved (rounded up).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        widens = channels != in_channels
        self.conv1 = nn.Conv2d(
            in_channels, channels, 3, stride=2 if widens else 1, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = ZeroPadShortcut(in_channels, channels) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for a feature map."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x), inplace=True)


def cifar_resnet(depth: int, attention: str | None = None, in_channels: int = 3) -> StagedBackbone:
    """Make a CIFAR ResNet: images ``[B, in_channels, 32, 32]`` to features ``[B, 64]``.

    The stages have 16, 32 and 64 channels and n blocks each; their maps are 32, 16 and 8 pixels
    wide. Other image sizes work too: the features are averages over space. Parameters at depths
    14, 20, 26 and 32: 171,856, 269,072, 366,288 and 463,504.

    :param depth: 6n+2 for n from 1 to 18: 8, 14, 20, 26, 32, ..., 110.
    :param attention: the attention module of every block; there is none yet, so only None.
    :param in_channels: channels of an image.
    :raises ValueError: for another depth or attention, or no input channel.
    """
    if not 8 <= depth <= 110 or depth % 6 != 2:
        raise ValueError(f"depth: expected 6n+2 from 8 to 110, got {depth}")
    if attention is not None:
        raise ValueError(f"attention: expected None, got {attention!r}")
    if in_channels < 1:
        raise ValueError(f"in_channels: expected a positive number, got {in_channels}")
    stem = nn.Sequential(
        nn.Conv2d(in_channels, _WIDTHS[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(_WIDTHS[0]),
        nn.ReLU(inplace=True),
    )
    n_blocks = (depth - 2) // 6
    stages: list[nn.Sequential] = []
    previous = _WIDTHS[0]
    for width in _WIDTHS:
        blocks = [CifarBlock(previous if i == 0 else width, width) for i in range(n_blocks)]
        stages.append(nn.Sequential(*blocks) if stages else nn.Sequential(stem, *blocks))
        previous = width
    backbone = StagedBackbone(stages, feature_dim=_WIDTHS[-1])
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone
