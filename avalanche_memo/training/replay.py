"""The two plain baselines: one network, trained on new data alone or with replayed exemplars."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import IncrementalTemplate, ReplayTemplate

__all__ = ["Finetune", "Replay"]


class Replay(ReplayTemplate):
    """Experience replay of herded exemplars: a single network, cross-entropy, one phase.

    Unlike Avalanche's ``Replay``, new data and exemplars are concatenated and shuffled, as in the
    class-incremental papers. This strategy does not use task identities.

    :param model: an :class:`ExpandableNetwork` that shares all stages, so that only its classifier
        grows.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the loss.
    :param mem_size: exemplars in all.
    :param base_kwargs: the arguments of :class:`ReplayTemplate`.
    :raises TypeError: if the model is no :class:`ExpandableNetwork`.
    :raises ValueError: if it would add blocks.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008
        mem_size: int = 2000,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "Replay", shares="all")
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            **base_kwargs,
        )


class Finetune(IncrementalTemplate):
    """Plain fine-tuning on each experience's data: Avalanche's ``Naive``, in phases and resumable.

    The lower bound of every comparison; takes the arguments of :class:`IncrementalTemplate`.
    """
