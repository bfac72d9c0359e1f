"""A convolutional network as an ordered list of stages, which expandable networks share or grow."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["StagedBackbone", "in_order", "stage_maps"]


def in_order(stages: nn.Module) -> list[nn.Module]:
    """Return the stages of a block; ``children()`` would skip one that stands there again."""
    return [stage for stage in stages._modules.values() if stage is not None]


def stage_maps(stages: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output of each stage of a block, first to last."""
    maps = []
    for stage in in_order(stages):
        x = stage(x)
        maps.append(x)
    return maps


class StagedBackbone(nn.Module):
    """A CNN cut into stages: images ``[B, C, H, W]`` to features ``[B, feature_dim]``.

    Each stage maps a feature map to a feature map; the first one holds the stem. After the last
    stage, global average pooling makes the features. There is no classifier.

    :param stages: the stages, first to last; at least one.
    :param feature_dim: channels of the last stage's output.
    :raises ValueError: if there is no stage or the feature dimension is not positive.
    """

    def __init__(self, stages: Sequence[nn.Module], feature_dim: int) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages: expected at least one stage, got none")
        if feature_dim < 1:
            raise ValueError(f"feature_dim: expected a positive number, got {feature_dim}")
        self.stages = nn.ModuleList(stages)
        self.feature_dim = feature_dim

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """Return the output of every stage, first to last, each ``[B, C_s, H_s, W_s]``."""
        return stage_maps(self.stages, x)

    @staticmethod
    def pool(maps: Tensor) -> Tensor:
        """Average over space: ``[B, C, H, W]`` to ``[B, C]``."""
        # Unlike the adaptive one, this pooling's gradient keeps the channels_last layout.
        return F.avg_pool2d(maps, maps.shape[2:]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``[B, feature_dim]`` of images ``[B, C, H, W]``."""
        return self.pool(self.stage_maps(x)[-1])
