"""MEMO: Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental
Learning", ICLR 2023."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import AuxiliaryLossPlugin, WeightAlignmentPlugin
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = ["MEMO", "MEMO_FIRST", "MEMO_LATER"]

MEMO_FIRST = Phase(200, lr=0.1, weight_decay=5e-4, milestones=(60, 120, 170))
"""The first experience's schedule on CIFAR-100, batches of 128 (the authors' released defaults)."""

MEMO_LATER = Phase(170, lr=0.1, weight_decay=2e-4, milestones=(80, 120, 150))
"""The later experiences' schedule (the authors' released defaults)."""


class MEMO(ReplayTemplate):
    """Memory-efficient expandable model.

    - Network: shared generalized blocks, a specialized block per experience (section 4.4).
    - Losses: cross-entropy over all classes seen, and the auxiliary loss on the newest block.
    - Phases: one, on all data.
    - Memory: herding.
    - Readout: the classifier, its weights aligned after each experience; or nearest mean of
      exemplars.

    This strategy does not use task identities.

    :param model: an :class:`ExpandableNetwork` that shares some but not all stages: all but the
        last for MEMO, all but the last two for MEMO-2.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss.
    :param mem_size: exemplars in all.
    :param auxiliary_weight: weight of the auxiliary loss (the authors' 1).
    :param align_weights: whether to align the classifier's weights, which presumes enough steps;
        see :class:`WA`.
    :param base_kwargs: the arguments of :class:`ReplayTemplate` and what it stands on, such as
        ``exemplars_per_class``, ``first_phases``, ``train_mb_size``, ``train_epochs``, ``device``,
        ``plugins``, ``evaluator``.
    :raises TypeError: if the model is no :class:`ExpandableNetwork`.
    :raises ValueError: if it shares no stage or all.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008
        mem_size: int = 2000,
        auxiliary_weight: float = 1.0,
        align_weights: bool = True,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "MEMO", shares="some")
        losses = [AuxiliaryLossPlugin(auxiliary_weight)]
        readout = [WeightAlignmentPlugin()] if align_weights else []
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            method_plugins=[*losses, *readout],
            **base_kwargs,
        )
