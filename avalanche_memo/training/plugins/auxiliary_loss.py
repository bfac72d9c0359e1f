"""The auxiliary loss of DER, section 3.2, which makes a new block's features tell the new classes
from the old ones and from each other."""

from typing import Any

import torch.nn.functional as F

from avalanche_memo.training.losses import auxiliary_targets
from avalanche_memo.training.plugins.checks import BatchOutputs, check_network
from avalanche_memo.training.ranges import at_least_zero

__all__ = ["AuxiliaryLossPlugin"]


class AuxiliaryLossPlugin(BatchOutputs):
    """Add the auxiliary classifier's cross-entropy, from the second experience on.

    ``L = L_main + w * L_aux``.

    :param auxiliary_weight: w.
    :raises ValueError: if the weight is negative.
    :raises TypeError: before training, if the model is no expanding ``ExpandableNetwork``.
    """

    def __init__(self, auxiliary_weight: float = 1.0) -> None:
        super().__init__()
        at_least_zero("auxiliary_weight", auxiliary_weight)
        self.weight = auxiliary_weight

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
        strategy.loss = strategy.loss + self.weight * loss
