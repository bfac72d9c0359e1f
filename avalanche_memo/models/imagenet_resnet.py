"""torchvision's ImageNet ResNets as four stages, in the depths at which MEMO compares budgets.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1; depths 10 and 26
as in Zhou et al., "A Model or 603 Exemplars" (ICLR 2023), whose ResNet-26 has bottleneck blocks.
"""

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from avalanche_memo.models.staged import StagedBackbone

__all__ = ["imagenet_resnet"]

_BLOCKS = {
    10: (BasicBlock, [1, 1, 1, 1]),
    18: (BasicBlock, [2, 2, 2, 2]),
    26: (Bottleneck, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


def imagenet_resnet(depth: int) -> StagedBackbone:
    """Make an ImageNet ResNet: images ``[B, 3, H, W]`` to features ``[B, 512]``.

    Stages: stem and layer1, layer2, layer3, layer4, whose maps are 1/4, 1/8, 1/16 and 1/32 of the
    image's size. Depths 26 and 50 have bottleneck blocks and features ``[B, 2048]``. Weights are
    torchvision's random initialization. ResNet-18 has 11,176,512 parameters.

    :param depth: 10, 18, 26, 34 or 50.
    :raises ValueError: for another depth.
    """
    if depth not in _BLOCKS:
        raise ValueError(f"depth: expected one of {', '.join(map(str, _BLOCKS))}, got {depth}")
    block, layers = _BLOCKS[depth]
    net = ResNet(block, layers, num_classes=1)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    first = nn.Sequential(stem, *net.layer1)
    return StagedBackbone(
        [first, net.layer2, net.layer3, net.layer4], feature_dim=512 * block.expansion
    )
