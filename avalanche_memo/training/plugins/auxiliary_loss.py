"""The auxiliary loss of DER, section 3.2, which makes a new block's features tell the new classes
from the old ones and from each other."""

import math
from typing import Any

import torch.nn.functional as F

from avalanche_memo.training.losses import auxiliary_targets
from avalanche_memo.training.plugins.checks import BatchOutputs, check_network

__all__ = ["AuxiliaryLossPlugin"]


class AuxiliaryLossPlugin(BatchOutputs):
    """Add the auxiliary classifier's cross-entropy, from the second experience on.

    ``L = L_main + w * L_aux`` (DER, MEMO), or with ``convex`` the mix
    ``L = (1 - w) * L_main + w * L_aux``.

    :param auxiliary_weight: w, the auxiliary loss's weight; 0 to 1 for the mix.
    :param convex: whether to mix instead of to add.
    :raises ValueError: if the weight is outside its range.
    :raises TypeError: before training, if the model is no expanding ``ExpandableNetwork``.
    """

    def __init__(self, auxiliary_weight: float = 1.0, *, convex: bool = False) -> None:
        super().__init__()
        if not 0 <= auxiliary_weight < math.inf or (convex and auxiliary_weight > 1):
            expected = "0 to 1 for the convex mix" if convex else "a number of at least 0"
            raise ValueError(f"auxiliary_weight: expected {expected}, got {auxiliary_weight}")
        self.weight = auxiliary_weight
        self.convex = convex

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "AuxiliaryLossPlugin", shares="not all")

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the loss to ``strategy.loss``."""
        network = strategy.model
        logits = self.outputs().auxiliary_logits
        if logits is None or not logits.requires_grad:  # A phase may train the classifier alone.
            return
        new_classes = network.columns[-len(network.new_classes) :]
        loss = F.cross_entropy(logits, auxiliary_targets(strategy.mb_y, new_classes))
        main_weight = 1 - self.weight if self.convex else 1
        strategy.loss = main_weight * strategy.loss + self.weight * loss
