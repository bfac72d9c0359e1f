"""Networks for class-incremental learning: backbones in stages, and what grows on them."""

from avalanche_memo.models.attention import CBAM
from avalanche_memo.models.cifar_resnet import cifar_resnet, four_stage_resnet
from avalanche_memo.models.convnet import convnet2, convnet4
from avalanche_memo.models.expandable import ExpandableNetwork
from avalanche_memo.models.fast_path import FastPath
from avalanche_memo.models.heads import (
    BiasCorrectedLinear,
    CosineClassifier,
    GrowingClassifier,
    GrowingLinear,
    ProxyCosineClassifier,
)
from avalanche_memo.models.imagenet_resnet import imagenet_resnet
from avalanche_memo.models.staged import StagedBackbone

__all__ = [
    "CBAM",
    "BiasCorrectedLinear",
    "CosineClassifier",
    "ExpandableNetwork",
    "FastPath",
    "GrowingClassifier",
    "GrowingLinear",
    "ProxyCosineClassifier",
    "StagedBackbone",
    "cifar_resnet",
    "convnet2",
    "convnet4",
    "four_stage_resnet",
    "imagenet_resnet",
]
