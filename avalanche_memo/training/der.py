"""DER: Yan et al., "DER: Dynamically Expandable Representation for Class Incremental Learning",
CVPR 2021."""

from dataclasses import replace
from typing import Any

from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import AuxiliaryLossPlugin, SparsityPlugin
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = [
    "DER",
    "DER_CLASSIFIER",
    "DER_IMAGENET_CLASSIFIER",
    "DER_IMAGENET_REPRESENTATION",
    "DER_REPRESENTATION",
    "DER_RESNET32_FIRST",
    "DER_RESNET32_LATER",
    "DynamicallyExpandableRepresentation",
]

DER_REPRESENTATION = Phase(170, lr=0.1, weight_decay=5e-4, milestones=(110, 130), warmup_epochs=10)
"""Representation learning on CIFAR-100 with a ResNet-18, batches of 128 (the authors' released
configuration, whose milestones, 100 and 120, count from the end of the warm-up on). Their code
starts both classifiers, which have no bias, afresh in each experience and when the warm-up ends;
this does not. Base-50's first experience has 200 epochs there, milestones 60, 120 and 160, and no
warm-up."""

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

DER_IMAGENET_REPRESENTATION = Phase(
    220, lr=0.1, weight_decay=5e-4, milestones=(80, 140, 180, 200), warmup_epochs=20
)
"""Representation learning on ImageNet-100 with a ResNet-18 (theirs has pre-activation), batches of
256 (the authors' released configuration, whose milestones, 60, 120, 160 and 180, count from the end
of the warm-up on)."""

DER_IMAGENET_CLASSIFIER = replace(DER_CLASSIFIER, temperature=1.0)
"""Classifier learning on ImageNet-100 (the authors' released configuration)."""

DER_RESNET32_FIRST = Phase(200, lr=0.1, weight_decay=5e-4, milestones=(60, 120, 170))
"""The first experience on CIFAR-100 with a ResNet-32, batches of 128: PyCIL's, the authors have
released none. PyCIL aligns the classifier's weights instead of learning the classifier again, as
``plugins=[WeightAlignmentPlugin()], later_phases=[DER_RESNET32_LATER]`` makes this one do."""

DER_RESNET32_LATER = Phase(170, lr=0.1, weight_decay=2e-4, milestones=(80, 120, 150))
"""The later experiences (PyCIL's)."""


class DynamicallyExpandableRepresentation(ReplayTemplate):
    """Dynamically expandable representation, with pruning or without (``DER w/o P``).

    Not Avalanche's ``DER``, which is Dark Experience Replay.

    - Network: a whole backbone per experience, nothing shared (section 3.2).
    - Losses: cross-entropy over all classes seen, the auxiliary loss on the newest block, and, with
      pruning, the sparsity loss of the newest block's masks.
    - Phases: representation on all data; from the second experience on, then the classifier alone,
      started afresh, on a class-balanced subset at a higher temperature. With pruning, the
      classifier learns from the features that pruning leaves; channels are cut out thereafter.
    - Memory: herding.
    - Readout: the classifier; or nearest mean of exemplars.

    This strategy does not use task identities.

    :param model: an :class:`ExpandableNetwork` that shares no stage; for pruning ``masked=True``.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss.
    :param mem_size: exemplars in all.
    :param auxiliary_weight: weight of the auxiliary loss, lambda_a.
    :param sparsity_weight: weight of the sparsity loss, lambda_s; 0 is without pruning.
    :param mask_s_max: scale of the masks at an epoch's end.
    :param mask_rate: how much faster than weights the masks learn; see :class:`SparsityPlugin`.
    :param base_kwargs: the arguments of :class:`ReplayTemplate`. Without ``later_phases``,
        ``train_epochs`` epochs are followed by :data:`DER_CLASSIFIER`, whose rate is meant for SGD:
        with Adam, give phases of your own.
    :raises TypeError: if the model is no :class:`ExpandableNetwork`.
    :raises ValueError: if it shares a stage, if a weight is outside its range, or, before training
        at the latest, if it has masks without a sparsity weight or the reverse.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008
        mem_size: int = 2000,
        auxiliary_weight: float = 1.0,
        sparsity_weight: float = 0.0,
        mask_s_max: float = 100.0,
        mask_rate: float = 1.0,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "DER", shares="none")
        losses: list[Any] = [AuxiliaryLossPlugin(auxiliary_weight)]
        if sparsity_weight != 0:
            losses.append(
                SparsityPlugin(sparsity_weight, mask_s_max=mask_s_max, mask_rate=mask_rate)
            )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            mem_size=mem_size,
            method_plugins=losses,
            closing_phases=(DER_CLASSIFIER,),
            **base_kwargs,
        )


DER = DynamicallyExpandableRepresentation
