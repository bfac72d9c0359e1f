"""iCaRL: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017,
with the losses that the class-incremental literature compares it by."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import SoftmaxDistillationPlugin
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = ["ICARL_FIRST", "ICARL_LATER", "ICaRL"]

ICARL_FIRST = Phase(200, lr=0.1, weight_decay=5e-4, milestones=(60, 120, 170))
"""The first experience's schedule on CIFAR-100, batches of 128 (PyCIL's released code)."""

ICARL_LATER = Phase(170, lr=0.1, weight_decay=2e-4, milestones=(80, 120))
"""The later experiences' schedule (PyCIL's released code)."""


class ICaRL(ReplayTemplate):
    """Incremental classifier and representation learning.

    - Network: a single one with a linear classifier.
    - Losses: cross-entropy over all classes seen; distillation of the old classes' predictions.
    - Phases: one, on all data.
    - Memory: herding.
    - Readout: nearest mean of exemplars.

    The losses are those of PyCIL's code, on softmax. In the paper each class is a sigmoid of its
    own: the old classes' targets, exemplars or not, are the old network's outputs alone, and the
    new classes' the labels, all by binary cross-entropy.

    This strategy does not use task identities.

    :param model: an :class:`ExpandableNetwork` that shares all stages.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss.
    :param mem_size: exemplars in all.
    :param kd_weight: of the distillation, which has no factor ``T^2``.
    :param temperature: T of the distillation.
    :param base_kwargs: the arguments of :class:`ReplayTemplate`.
    :raises TypeError: if the model is no :class:`ExpandableNetwork`.
    :raises ValueError: if it would add blocks, or an option is outside its range.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008
        mem_size: int = 2000,
        kd_weight: float = 1.0,
        temperature: float = 2.0,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "ICaRL", shares="all")
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            method_plugins=[SoftmaxDistillationPlugin(kd_weight, temperature, scaled=False)],
            **base_kwargs,
        )
