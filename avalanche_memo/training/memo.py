"""MEMO: Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental
Learning", ICLR 2023."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import (
    AuxiliaryLossPlugin,
    HerdingReplayPlugin,
    WeightAlignmentPlugin,
)
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.storage_policy import MemoryRates
from avalanche_memo.training.template import IncrementalTemplate, Phase

__all__ = ["MEMO", "MEMO_FIRST", "MEMO_LATER"]

MEMO_FIRST = Phase(200, lr=0.1, weight_decay=5e-4, milestones=(60, 120, 170))
"""The first experience's schedule on CIFAR-100, batches of 128 (the authors' released defaults)."""

MEMO_LATER = Phase(170, lr=0.1, weight_decay=2e-4, milestones=(80, 120, 150))
"""The later experiences' schedule (the authors' released defaults)."""


class MEMO(IncrementalTemplate):
    """Memory-efficient expandable model.

    - Network: shared generalized blocks, a specialized block per experience (section 4.2).
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
    :param exemplars_per_class: a fixed number per class instead.
    :param memory_rates: what the memory may hold beyond that, by experience.
    :param auxiliary_weight: weight of the auxiliary loss (the authors' 1).
    :param align_weights: whether to align the classifier's weights.
    :param base_kwargs: the arguments of :class:`IncrementalTemplate`, such as ``first_phases``,
        ``train_mb_size``, ``train_epochs``, ``device``, ``plugins``, ``evaluator``.
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
        exemplars_per_class: int | None = None,
        memory_rates: MemoryRates | None = None,
        auxiliary_weight: float = 1.0,
        align_weights: bool = True,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "MEMO", shares="some")
        replay = HerdingReplayPlugin(
            mem_size, exemplars_per_class=exemplars_per_class, rates=memory_rates
        )
        losses = [AuxiliaryLossPlugin(auxiliary_weight)]
        readout = [WeightAlignmentPlugin()] if align_weights else []
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            method_plugins=[replay, *losses, *readout],
            **base_kwargs,
        )
