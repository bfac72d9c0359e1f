"""Weight aligning: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental
Learning", CVPR 2020, equations 5 to 7."""

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from avalanche_memo.models.expandable import experience_classes
from avalanche_memo.models.heads import GrowingLinear
from avalanche_memo.training.plugins.checks import ExperienceEnd, check_network

__all__ = ["WeightAlignmentPlugin", "align_weights"]


@torch.no_grad()
def align_weights(classifier: GrowingLinear, n_new: int) -> float:
    """Scale the new classes' weights so that their mean norm is the old classes'.

    :param classifier: weight ``[C, D]`` whose last ``n_new`` rows are the new classes; biases are
        left alone.
    :param n_new: number of new classes; nothing happens where there is no old one, or where the
        new ones' weights are all 0.
    :return: the factor ``gamma = mean old norm / mean new norm``.
    """
    norms = classifier.weight.norm(dim=1)
    n_old = len(norms) - n_new
    if n_old < 1 or n_new < 1 or not norms[n_old:].any():
        return 1.0
    gamma = norms[:n_old].mean() / norms[n_old:].mean()
    for weight in classifier.weights:
        weight[n_old:] *= gamma
    return float(gamma)


class WeightAlignmentPlugin(SupervisedPlugin):
    """Align the classifier's weights after each experience that brought new classes.

    And each time again where it is trained more than once. Of an online stream it is the last
    sub-experience that counts (:class:`ExperienceEnd`).

    :param clip: whether weights below 0 are set to 0 after each step, so that, the features being
        positive, a weight's norm tells how large its logits are: as in WA's paper, not in MEMO's.
    :raises TypeError: before training, if the model is no ``ExpandableNetwork`` with a linear
        classifier.
    """

    def __init__(self, *, clip: bool = False) -> None:
        super().__init__()
        self.clip = clip
        self._end = ExperienceEnd()

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "WeightAlignmentPlugin", classifier=GrowingLinear)

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Clip."""
        if self.clip:
            for weight in strategy.model.classifier.weights:
                weight.clamp_(min=0)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Align, at the end of the last sub-experience where there are some."""
        network, experience = strategy.model, strategy.experience
        brought_new = set(network.new_classes) & set(experience_classes(experience))
        if self._end.comes_with(experience) and brought_new:
            align_weights(network.classifier, len(network.new_classes))
