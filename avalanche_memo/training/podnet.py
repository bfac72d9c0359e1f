"""PODNet: Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental
Learning", ECCV 2020."""

from typing import Any, Literal

from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork, ProxyCosineClassifier
from avalanche_memo.training.losses import NCALoss
from avalanche_memo.training.plugins import (
    GradientClampPlugin,
    ImprintingPlugin,
    PODDistillationPlugin,
    PreviousModel,
    SoftmaxDistillationPlugin,
)
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.template import Phase, ReplayTemplate

__all__ = ["PODNET_BALANCED", "PODNET_TRAINING", "PODNet"]

PODNET_TRAINING = Phase(160, lr=0.1, weight_decay=5e-4, cosine=True)
"""Each experience's schedule on CIFAR-100, batches of 128 (the authors' released configuration; in
their code the rate is one epoch behind, so that the first two have all of it)."""

PODNET_BALANCED = Phase(
    20,
    lr=0.05,
    weight_decay=5e-4,
    learns="classifier",
    batch_norm="updated",
    data="exemplars",
)
"""The classifier on the exemplars, from the second experience on; BatchNorm's statistics become
those of the exemplars (the authors' released code and configuration). Of each class they are
equally many, but where files differ in size, or a memory has grown since a class was learned. PyCIL
has a rate of 0.005 and trains all but the old proxies in this phase, with the distillation."""


class PODNet(ReplayTemplate):
    """Pooled outputs distillation network.

    - Network: a single one with a :class:`ProxyCosineClassifier`, whose new proxies start as
      centres of K-means.
    - Losses: NCA on the similarities; POD on the stages' outputs and on the features.
    - Phases: all on all data; from the second experience on, then the classifier alone on the
      exemplars, among them those of the new classes. Gradients are clamped.
    - Memory: herding.
    - Readout: the classifier; or nearest mean of exemplars.

    The variants are options: ``flat_distillation="kd"`` (KD), a backbone with
    ``attention="cbam"`` (CBAM), ``memory_rates`` (MEM), and any of them together.

    This strategy does not use task identities. Unlike in the authors' code, the scale of the
    similarities learns in the balanced phase too, as a part of the classifier. Their CIFAR network
    has no ReLU behind any block's sum, starts each block's last BatchNorm at 0, and distils the
    last block's input, too; here only a stage's last ReLU comes after its distilled output. Their
    published NME figures are of a configuration of its own, with a fixed scale of
    the similarities and lambda_c = 5.

    :param model: an :class:`ExpandableNetwork` that shares all stages, with
        ``make_classifier=ProxyCosineClassifier``, and as published a backbone made with
        ``last_relu=False``.
    :param optimizer: an optimizer with one parameter group.
    :param criterion: the main loss; ``None`` for NCA.
    :param mem_size: exemplars in all.
    :param nca: ``"released"`` for :func:`nca_loss_released`, ``"equation"`` for :func:`nca_loss`.
        In a short trial (``experiments/configs/podnet_nca_trial.yaml``: CIFAR-100, 50 classes and
        then 10, 200 images each, ResNet-14, 20 epochs, seed 1993) accuracy by classifier was 49.4
        and then 45.3 with the released form, 46.1 and then 39.3 with the equation, whose scale does
        not stop growing, so that it outweighs the distillation. With 10 classes and then 5, 150
        images each, the equation was ahead, by 48.3 to 45.1 on average over three experiences.
    :param margin: NCA's delta, in the equation.
    :param pod_weight: of POD on the stages' outputs, lambda_c (3 on CIFAR-100).
    :param flat_weight: of POD-flat, lambda_f.
    :param pooling: how :func:`pod_loss` pools.
    :param flat_distillation: ``"pod"`` for POD-flat, ``"kd"`` for softmax distillation in its
        place, or ``"both"``.
    :param kd_weight: of softmax distillation.
    :param temperature: of softmax distillation.
    :param kd_adaptive: whether its weight is multiplied by ``sqrt(classes seen / new classes)``, as
        those of POD are.
    :param gradient_limit: what gradient values are clamped at.
    :param base_kwargs: the arguments of :class:`ReplayTemplate`. Without ``later_phases``,
        ``train_epochs`` epochs are followed by :data:`PODNET_BALANCED`.
    :raises TypeError: if the model is no :class:`ExpandableNetwork` with a cosine classifier.
    :raises ValueError: if it would add blocks, an option is outside its range, or a phase has a
        temperature beside NCA's equation.
    """

    def __init__(
        self,
        *,
        model: ExpandableNetwork,
        optimizer: Optimizer,
        criterion: Any = None,
        mem_size: int = 2000,
        nca: Literal["equation", "released"] = "released",
        margin: float = 0.6,
        pod_weight: float = 3.0,
        flat_weight: float = 1.0,
        pooling: str = "spatial",
        flat_distillation: Literal["pod", "kd", "both"] = "pod",
        kd_weight: float = 0.9,
        temperature: float = 10.0,
        kd_adaptive: bool = False,
        gradient_limit: float = 5.0,
        **base_kwargs: Any,
    ) -> None:
        check_network(model, "PODNet", shares="all", classifier=ProxyCosineClassifier)
        if flat_distillation not in ("pod", "kd", "both"):
            raise ValueError(
                f"flat_distillation: expected 'pod', 'kd' or 'both', got {flat_distillation!r}"
            )
        teacher = PreviousModel()
        flat_weight = 0.0 if flat_distillation == "kd" else flat_weight
        losses: list[Any] = [
            PODDistillationPlugin(pod_weight, flat_weight, pooling=pooling, teacher=teacher)
        ]
        if flat_distillation != "pod":
            losses.append(
                SoftmaxDistillationPlugin(
                    kd_weight, temperature, adaptive=kd_adaptive, teacher=teacher
                )
            )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion or NCALoss(model, margin, nca=nca),
            mem_size=mem_size,
            method_plugins=[
                ImprintingPlugin(),
                *losses,
                GradientClampPlugin(gradient_limit),
            ],
            closing_phases=(PODNET_BALANCED,),
            **base_kwargs,
        )
        for phase in self.first_phases + self.later_phases:
            if criterion is None and nca == "equation" and phase.temperature != 1:
                # The margin is one of similarities that nothing divides.
                raise ValueError(
                    f"temperature: expected 1 with nca='equation', got {phase.temperature}"
                )
