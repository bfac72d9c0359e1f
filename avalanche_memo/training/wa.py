"""WA: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR
2020."""

from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import SoftmaxDistillationPlugin, WeightAlignmentPlugin
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = ["WA", "WA_FIRST", "WA_LATER"]

WA_FIRST = Phase(200, lr=0.1, weight_decay=5e-4, milestones=(60, 120, 170))
"""The first experience's schedule on CIFAR-100, batches of 128 (PyCIL's released code)."""

WA_LATER = Phase(170, lr=0.1, weight_decay=2e-4, milestones=(60, 100, 140))
"""The later experiences' schedule (PyCIL's released code)."""


class WA(ReplayTemplate):
    """Weight aligning.

    - Network: a single one with a linear classifier.
    - Losses: ``(1 - lambda)`` cross-entropy over all classes seen, ``lambda`` distillation of the
      old classes' predictions, with ``lambda = old classes / classes seen``.
    - Phases: one, on all data.
    - Memory: herding.
    - Readout: the classifier, its weights aligned after each experience; or nearest mean of
      exemplars. The aligned network is the one distilled from.

    Either half of the method alone is an option: ``kd_weight=0``, or ``align_weights=False``.

    Aligning presumes that the new classes' weights have outgrown the old ones', and misses after
    few steps. Without clipping they have not, and it enlarges them: by 1.16 after 20 epochs on 5
    new classes of CIFAR-100 with 150 images each. With clipping the old ones have shrunk, as
    nothing else lowers their logits, and it overcorrects: on digits (six classes in pairs, a
    ConvNet-2, 30 exemplars, three seeds) 8 epochs end at 0.33 to 0.34, not clipped at 0.64 to 0.76;
    24 at 0.83 to 0.91, not clipped at 0.91 to 0.93. On 30 classes of CIFAR-100, by
    ``experiments/configs/released_cifar100.yaml`` with seeds 1 to 3, clipped weights end at 39.4 to
    43.5 %, others at 33.1 to 34.8 %.

    This strategy does not use task identities.

    :param model: an :class:`ExpandableNetwork` that shares all stages.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss.
    :param mem_size: exemplars in all.
    :param kd_weight: of the distillation, beside lambda; 0 leaves out distillation and lambda. The
        distillation has no factor ``T^2``.
    :param temperature: T of the distillation.
    :param align_weights: whether to align the classifier's weights.
    :param clip_weights: whether weights that are aligned are also clipped at 0 after each step, as
        in the paper; False is PyCIL's form, by which its published figures were made.
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
        align_weights: bool = True,
        clip_weights: bool = True,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "WA", shares="all")
        distillation = SoftmaxDistillationPlugin(kd_weight, temperature, convex=True, scaled=False)
        losses = [distillation] if kd_weight else []
        readout = [WeightAlignmentPlugin(clip=clip_weights)] if align_weights else []
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            # The readout first: what is distilled from is the network as it was read out.
            method_plugins=[*readout, *losses],
            **base_kwargs,
        )
