"""Joint training, the upper bound of every comparison."""

import sys
from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import FreshStartPlugin, HerdingReplayPlugin
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import IncrementalTemplate, Phase

__all__ = ["JOINT_TRAINING", "Joint"]

JOINT_TRAINING = Phase(200, lr=0.1, weight_decay=5e-4, milestones=(60, 120, 170))
"""The schedule of a first experience on CIFAR-100, batches of 128 (PyCIL's released code): in joint
training every experience is one."""


class Joint(IncrementalTemplate):
    """A network trained from scratch, in each experience, on all data of the experiences so far.

    The memory holds everything, and is accounted as such. This strategy does not use task
    identities.

    :param model: an :class:`ExpandableNetwork` that shares all stages; each experience starts from
        its first weights, with a new classifier.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the loss.
    :param base_kwargs: the arguments of :class:`IncrementalTemplate`.
    :raises TypeError: if the model is no :class:`ExpandableNetwork`.
    :raises ValueError: if it would add blocks, or freeze its generalized ones.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "Joint", shares="all")
        everything = HerdingReplayPlugin(exemplars_per_class=sys.maxsize)
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            method_plugins=[everything, FreshStartPlugin(model)],
            **base_kwargs,
        )
