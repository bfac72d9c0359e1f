"""The plain ConvNets at the low end of MEMO's budgets: ConvNet2 for CIFAR, ConvNet4 for ImageNet.

Zhou et al., "A Model or 603 Exemplars" (ICLR 2023). Layer sizes as in its released code; each
convolution keeps its bias, which the published parameter counts include.
"""

from torch import nn

from avalanche_memo.models.staged import StagedBackbone

__all__ = ["convnet2", "convnet4"]


def _stage(in_channels: int, channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )


def _check(in_channels: int) -> None:
    if in_channels < 1:
        raise ValueError(f"in_channels: expected a positive number, got {in_channels}")


def convnet2(in_channels: int = 3) -> StagedBackbone:
    """Make ConvNet2: images ``[B, in_channels, H, W]``, H and W at least 4, to ``[B, 64]``.

    Two stages of 64 channels; each halves H and W. With 3 input channels it has 38,976 parameters:
    1,920 and 37,056.

    :raises ValueError: if there is no input channel.
    """
    _check(in_channels)
    return StagedBackbone([_stage(in_channels, 64), _stage(64, 64)], feature_dim=64)


def convnet4(in_channels: int = 3) -> StagedBackbone:
    """Make ConvNet4: images ``[B, in_channels, H, W]``, H and W at least 31, to ``[B, 512]``.

    Four stages of 128, 128, 128 and 512 channels; the first divides H and W by 4, the others by 2.

    :raises ValueError: if there is no input channel.
    """
    _check(in_channels)
    stages = [
        _stage(in_channels, 128, kernel_size=7, stride=2),
        _stage(128, 128),
        _stage(128, 128),
        _stage(128, 512),
    ]
    return StagedBackbone(stages, feature_dim=512)
