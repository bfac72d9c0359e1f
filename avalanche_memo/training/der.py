"""DER: Yan et al., "DER: Dynamically Expandable Representation for Class Incremental Learning",
CVPR 2021, without pruning."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import AuxiliaryLossPlugin
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = ["DER", "DER_CLASSIFIER", "DER_REPRESENTATION", "DynamicallyExpandableRepresentation"]

DER_REPRESENTATION = Phase(170, lr=0.1, weight_decay=5e-4, milestones=(100, 120), warmup_epochs=10)
"""Representation learning on CIFAR-100, batches of 128 (the authors' released configuration)."""

DER_CLASSIFIER = Phase(
    30,
    lr=0.1,
    weight_decay=5e-4,
    milestones=(15,),
    learns="classifier",
    data="balanced",
    temperature=5.0,
    reset_classifier=True,
)
"""Classifier learning, section 3.4 (the authors' released configuration)."""


class DynamicallyExpandableRepresentation(ReplayTemplate):
    """Dynamically expandable representation, without pruning (``DER w/o P``).

    Not Avalanche's ``DER``, which is Dark Experience Replay.

    - Network: a whole backbone per experience, nothing shared (section 3.1).
    - Losses: cross-entropy over all classes seen, and the auxiliary loss on the newest block.
    - Phases: representation on all data; from the second experience on, then the classifier alone,
      started afresh, on a class-balanced subset at a higher temperature.
    - Memory: herding.
    - Readout: the classifier; or nearest mean of exemplars.

    This strategy does not use task identities.

    :param model: an :class:`ExpandableNetwork` that shares no stage.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss.
    :param mem_size: exemplars in all.
    :param auxiliary_weight: weight of the auxiliary loss, lambda_a.
    :param base_kwargs: the arguments of :class:`ReplayTemplate`. Without ``later_phases``,
        ``train_epochs`` epochs are followed by :data:`DER_CLASSIFIER`.
    :raises TypeError: if the model is no :class:`ExpandableNetwork`.
    :raises ValueError: if it shares a stage.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008
        mem_size: int = 2000,
        auxiliary_weight: float = 1.0,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "DER", shares="none")
        losses = [AuxiliaryLossPlugin(auxiliary_weight)]
        if base_kwargs.get("later_phases") is None:
            representation = Phase(base_kwargs.get("train_epochs", 1))
            base_kwargs["later_phases"] = (representation, DER_CLASSIFIER)
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            method_plugins=losses,
            **base_kwargs,
        )


DER = DynamicallyExpandableRepresentation
