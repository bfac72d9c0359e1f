"""BiC: Wu et al., "Large Scale Incremental Learning", CVPR 2019."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import BiasCorrectedLinear, ExpandableNetwork
from avalanche_memo.training.plugins import BiasCorrectionPlugin, SoftmaxDistillationPlugin
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = ["BIC_TRAINING", "BiC"]

BIC_TRAINING = Phase(170, lr=0.1, weight_decay=2e-4, milestones=(60, 100, 140))
"""Every experience's schedule on CIFAR-100, batches of 128 (PyCIL's released code)."""


class BiC(ReplayTemplate):
    """Bias correction.

    - Network: a single one with a :class:`BiasCorrectedLinear`.
    - Losses: ``(1 - lambda)`` cross-entropy over all classes seen, ``lambda`` distillation of the
      old classes' logits as they were corrected, with ``lambda = old classes / classes seen``.
    - Phases: one, on all data but a held-out part; from the second experience on, two parameters
      are then fitted on that part, which correct the new classes' logits until newer ones come.
    - Memory: herding.
    - Readout: the classifier, corrected; or nearest mean of exemplars.

    This strategy does not use task identities.

    :param model: an :class:`ExpandableNetwork` that shares all stages, with
        ``make_classifier=BiasCorrectedLinear``.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss.
    :param mem_size: exemplars in all, those held out among them.
    :param kd_weight: of the distillation, beside lambda. The distillation has no factor ``T^2``.
    :param temperature: T of the distillation.
    :param held_out: share of each class's exemplars that is held out (the paper's 1 of 10), and
        as many samples of each new class.
    :param base_kwargs: the arguments of :class:`ReplayTemplate`.
    :raises TypeError: if the model is no :class:`ExpandableNetwork` with a
        :class:`BiasCorrectedLinear`.
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
        held_out: float = 0.1,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "BiC", shares="all", classifier=BiasCorrectedLinear)
        distillation = SoftmaxDistillationPlugin(kd_weight, temperature, convex=True, scaled=False)
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            # The correction first: what is distilled from is the corrected network.
            method_plugins=[BiasCorrectionPlugin(held_out), distillation],
            **base_kwargs,
        )
