"""The CIFAR ResNet of iCaRL, PyCIL and MEMO: 6n+2 layers in three stages, without shortcut weights.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2, shortcuts of
option A. UCIR's own has 1x1 convolutions as shortcuts (option B). Beside it, a variant of four
stages.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_memo.models.attention import CBAM
from avalanche_memo.models.staged import StagedBackbone

__all__ = ["CifarBlock", "ZeroPadShortcut", "cifar_resnet", "four_stage_resnet"]


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

    :param in_channels: channels of the input.
    :param channels: channels of the output.
    :param attention: what the residual passes through before the shortcut is added.
    :param last_relu: whether the output has its ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        attention: nn.Module | None = None,
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        widens = channels != in_channels
        self.conv1 = nn.Conv2d(
            in_channels, channels, 3, stride=2 if widens else 1, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.attention = attention or nn.Identity()
        self.last_relu = last_relu
        self.shortcut = ZeroPadShortcut(in_channels, channels) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for a feature map."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.attention(self.bn2(self.conv2(residual)))
        output = residual + self.shortcut(x)
        return F.relu(output, inplace=True) if self.last_relu else output


def cifar_resnet(
    depth: int, attention: str | None = None, in_channels: int = 3, last_relu: bool = True
) -> StagedBackbone:
    """Make a CIFAR ResNet: images ``[B, in_channels, 32, 32]`` to features ``[B, 64]``.

    The stages have 16, 32 and 64 channels and n blocks each; their maps are 32, 16 and 8 pixels
    wide. Other image sizes work too: the features are averages over space. Parameters at depths
    14, 20, 26 and 32: 171,856, 269,072, 366,288 and 463,504.

    :param depth: 6n+2 for n from 1 to 18: 8, 14, 20, 26, 32, ..., 110.
    :param attention: ``"cbam"`` puts a :class:`CBAM` into every block: 468,334 parameters at depth
        32.
    :param in_channels: channels of an image.
    :param last_relu: whether a stage's output has its ReLU. Without, the next stage begins with it
        instead, so that the network computes the same but for the features, to which none is
        applied: the stage maps that PODNet distils and the features that it and UCIR classify.
    :raises ValueError: for another depth or attention, or no input channel.
    """
    if not 8 <= depth <= 110 or depth % 6 != 2:
        raise ValueError(f"depth: expected 6n+2 from 8 to 110, got {depth}")
    return _resnet((16, 32, 64), [(depth - 2) // 6] * 3, attention, in_channels, last_relu)


def four_stage_resnet(
    attention: str | None = None, in_channels: int = 3, last_relu: bool = True
) -> StagedBackbone:
    """Make a CIFAR ResNet of four stages: images ``[B, in_channels, 32, 32]`` to ``[B, 128]``.

    The stages have 16, 32, 64 and 128 channels and 5, 4, 3 and 2 blocks; their maps are 32, 16, 8
    and 4 pixels wide. It has 814,096 parameters, with CBAM 821,772.

    :param attention: as for :func:`cifar_resnet`.
    :param in_channels: channels of an image.
    :param last_relu: as for :func:`cifar_resnet`.
    :raises ValueError: for another attention, or no input channel.
    """
    return _resnet((16, 32, 64, 128), (5, 4, 3, 2), attention, in_channels, last_relu)


def _resnet(
    widths: Sequence[int],
    blocks: Sequence[int],
    attention: str | None,
    in_channels: int,
    last_relu: bool,
) -> StagedBackbone:
    if attention not in (None, "cbam"):
        raise ValueError(f"attention: expected 'cbam' or None, got {attention!r}")
    if in_channels < 1:
        raise ValueError(f"in_channels: expected a positive number, got {in_channels}")
    stages: list[nn.Sequential] = []
    previous = widths[0]
    for width, n_blocks in zip(widths, blocks, strict=True):
        layers: list[nn.Module] = []
        if not stages:
            stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            layers.append(nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
        elif not last_relu:
            layers.append(nn.ReLU())  # Not in place: the maps before it are kept.
        for i in range(n_blocks):
            layers.append(
                CifarBlock(
                    previous if i == 0 else width,
                    width,
                    CBAM(width) if attention else None,
                    last_relu or i < n_blocks - 1,
                )
            )
        stages.append(nn.Sequential(*layers))
        previous = width
    backbone = StagedBackbone(stages, feature_dim=widths[-1])
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone
