"""torchvision's ImageNet ResNets as four stages, in the depths at which MEMO compares budgets.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1; depths 10 and 26
as in Zhou et al., "A Model or 603 Exemplars" (ICLR 2023), whose ResNet-26 has bottleneck blocks.
"""

from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from avalanche_memo.models.staged import StagedBackbone

__all__ = ["OpenBlock", "imagenet_resnet"]

_BLOCKS = {
    10: (BasicBlock, [1, 1, 1, 1]),
    18: (BasicBlock, [2, 2, 2, 2]),
    26: (Bottleneck, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


class OpenBlock(nn.Module):
    """The layers of a torchvision block, without the ReLU on its output."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.convolutions = 3 if isinstance(block, Bottleneck) else 2
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for a feature map."""
        layers = dict(self.named_children())
        residual = x
        for i in range(1, self.convolutions + 1):
            if i > 1:
                residual = layers["relu"](residual)
            residual = layers[f"bn{i}"](layers[f"conv{i}"](residual))
        shortcut: Tensor = layers["downsample"](x) if "downsample" in layers else x
        return residual + shortcut


def imagenet_resnet(
    depth: int, last_relu: bool = True, stem: Literal["imagenet", "cifar"] = "imagenet"
) -> StagedBackbone:
    """Make an ImageNet ResNet: images ``[B, 3, H, W]`` to features ``[B, 512]``.

    Stages: stem and layer1, layer2, layer3, layer4, whose maps are 1/4, 1/8, 1/16 and 1/32 of the
    image's size; with the stem for small images 1, 1/2, 1/4 and 1/8. Depths 26 and 50 have
    bottleneck blocks and features ``[B, 2048]``. Weights are torchvision's random initialization.
    ResNet-18 has 11,176,512 parameters.

    :param depth: 10, 18, 26, 34 or 50.
    :param last_relu: whether a stage's output has its ReLU, as for :func:`cifar_resnet`.
    :param stem: ``"cifar"`` for small images: a convolution 3x3 of stride 1 and no pooling. With
        depth 18 it is DER's network on CIFAR-100 (the authors' released code, which besides starts
        each residual's last norm at 0); it has 11,168,832 parameters.
    :raises ValueError: for another depth or stem.
    """
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem: expected 'imagenet' or 'cifar', got {stem!r}")
    if depth not in _BLOCKS:
        raise ValueError(f"depth: expected one of {', '.join(map(str, _BLOCKS))}, got {depth}")
    block, layers = _BLOCKS[depth]
    net = ResNet(block, layers, num_classes=1)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    first = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    stages = [nn.Sequential(first, *net.layer1), net.layer2, net.layer3, net.layer4]
    if not last_relu:
        for stage in stages:
            stage[-1] = OpenBlock(stage[-1])
        # Not in place: the maps before it are kept.
        stages[1:] = [nn.Sequential(nn.ReLU(), *stage) for stage in stages[1:]]
    return StagedBackbone(stages, feature_dim=512 * block.expansion)
