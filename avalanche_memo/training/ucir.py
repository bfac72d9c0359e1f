"""UCIR: Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing", CVPR 2019."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork, ProxyCosineClassifier
from avalanche_memo.training.plugins import (
    ImprintingPlugin,
    LessForgetPlugin,
    MarginRankingPlugin,
)
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = ["UCIR", "UCIR_BALANCED", "UCIR_TRAINING"]

UCIR_TRAINING = Phase(160, lr=0.1, weight_decay=5e-4, milestones=(80, 120))
"""Every experience's schedule on CIFAR-100, batches of 128 (the authors' released defaults)."""

UCIR_BALANCED = Phase(
    20, lr=0.01, weight_decay=1e-4, milestones=(10,), learns="classifier", data="exemplars"
)
"""Class-balance finetuning, which the authors' code offers for ImageNet: an optional second phase
from the second experience on. There the scale of the similarities stays as it is, here it learns as
a part of the classifier."""


class UCIR(ReplayTemplate):
    """Unified classifier, rebalanced.

    - Network: a single one with a :class:`CosineClassifier`, whose new vectors start as the means
      of their classes' features.
    - Losses: cross-entropy; the less-forget constraint on the features; the margin ranking loss.
    - Phases: one, on all data; :data:`UCIR_BALANCED` may follow.
    - Memory: herding.
    - Readout: the classifier; or nearest mean of exemplars.

    This strategy does not use task identities. The authors' code on CIFAR-100 has shortcuts with
    weights in its ResNet-32, no brightness jitter, and vectors that start at about half the length.

    :param model: an :class:`ExpandableNetwork` that shares all stages, with
        ``make_classifier=CosineClassifier``, and as published a backbone made with
        ``last_relu=False``.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss.
    :param mem_size: exemplars in all.
    :param less_forget_weight: lambda_base, which ``sqrt(old / new classes)`` multiplies.
    :param ranking_weight: of the margin ranking loss; 0 leaves it out.
    :param hard_negatives: K, the new classes that an old sample is kept apart from.
    :param margin: of the margin ranking loss.
    :param base_kwargs: the arguments of :class:`ReplayTemplate`.
    :raises TypeError: if the model is no :class:`ExpandableNetwork` with a cosine classifier.
    :raises ValueError: if it would add blocks, or an option is outside its range.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008
        mem_size: int = 2000,
        less_forget_weight: float = 5.0,
        ranking_weight: float = 1.0,
        hard_negatives: int = 2,
        margin: float = 0.5,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "UCIR", shares="all", classifier=ProxyCosineClassifier)
        ranking = MarginRankingPlugin(hard_negatives, margin, ranking_weight)
        losses = [LessForgetPlugin(less_forget_weight), *([ranking] if ranking_weight else [])]
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            method_plugins=[ImprintingPlugin(), *losses],
            **base_kwargs,
        )
