"""UCIR's inter-class separation: Hou et al., "Learning a Unified Classifier Incrementally via
Rebalancing" (CVPR 2019), section 3.4."""

from typing import Any

from avalanche_memo.models.heads import ProxyCosineClassifier
from avalanche_memo.training.losses import margin_ranking_loss
from avalanche_memo.training.plugins.checks import BatchOutputs, check_network
from avalanche_memo.training.ranges import at_least_one, at_least_zero

__all__ = ["MarginRankingPlugin"]


class MarginRankingPlugin(BatchOutputs):
    """Keep old classes' samples apart from the new classes, from the second experience on.

    ``L = L_main + ranking_weight * L_mr`` (:func:`margin_ranking_loss`) on the similarities before
    scaling.

    :param hard_negatives: of a sample, K (the authors' 2); no more than there are new classes.
    :param margin: the margin (the authors' 0.5).
    :param ranking_weight: of the loss (the authors' 1).
    :raises ValueError: if a number is out of range.
    :raises TypeError: before training, if the model is no ``ExpandableNetwork`` with a cosine
        classifier.
    """

    def __init__(
        self, hard_negatives: int = 2, margin: float = 0.5, ranking_weight: float = 1.0
    ) -> None:
        super().__init__()
        at_least_one("hard_negatives", hard_negatives)
        at_least_zero("margin", margin)
        at_least_zero("ranking_weight", ranking_weight)
        self.k, self.margin, self.weight = hard_negatives, margin, ranking_weight

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "MarginRankingPlugin", classifier=ProxyCosineClassifier)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the loss to ``strategy.loss``."""
        network, outputs = strategy.model, self.outputs()
        if len(network.growth) < 2:
            return
        old_classes = network.columns[: -len(network.new_classes)]
        similarities = outputs.logits / network.classifier.scale
        k = min(self.k, len(network.new_classes))
        loss = margin_ranking_loss(similarities, strategy.mb_y, old_classes, k, self.margin)
        strategy.loss = strategy.loss + self.weight * loss
