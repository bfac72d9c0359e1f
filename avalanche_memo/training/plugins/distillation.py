"""Distillation from the network as it was before the present experience, in three kinds: of pooled
outputs (PODNet), of softened predictions, and of features (UCIR)."""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_memo.models.expandable import ExpandableNetwork, NetworkOutputs
from avalanche_memo.models.fast_path import fold_batch_norm
from avalanche_memo.training.losses import (
    POOLINGS,
    less_forget_loss,
    pod_loss,
    softmax_distillation_loss,
)
from avalanche_memo.training.plugins.checks import BatchOutputs, ExperienceEnd, check_network
from avalanche_memo.training.ranges import at_least_zero, positive

__all__ = [
    "LessForgetPlugin",
    "PODDistillationPlugin",
    "PreviousModel",
    "SoftmaxDistillationPlugin",
]


class PreviousModel:
    """A frozen copy of the network as the last experience left it.

    Plugins that are given the same one share a forward pass per batch.
    """

    def __init__(self) -> None:
        self.network: ExpandableNetwork | None = None
        self._running: ExpandableNetwork | None = None
        self._saved: dict[str, Any] | None = None
        self._images: Tensor | None = None
        self._outputs: NetworkOutputs | None = None

    def keep(self, network: ExpandableNetwork) -> None:
        """Take a copy of a network."""
        self._take(copy.deepcopy(network))

    def restore(self, network: ExpandableNetwork) -> None:
        """Rebuild a copy that was loaded, in the likeness of the network that trains now."""
        if self._saved is not None:
            copied = network.empty_copy()
            copied.load_state_dict(self._saved)
            self._take(copied)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> NetworkOutputs | None:
        """Return what the copy makes of images, or ``None`` before there is a copy."""
        if self._running is None:
            return None
        if self._images is not images:
            self._running(images)
            self._images, self._outputs = images, self._running.outputs
        return self._outputs

    def state_dict(self) -> dict[str, Any]:
        """Return the copy's weights and structure."""
        state = self._saved
        if self.network is not None:
            state = dict(self.network.state_dict())
        return {"network": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; :meth:`restore` makes it effective."""
        self.network = self._running = self._images = self._outputs = None
        self._saved = state["network"]

    def _take(self, network: ExpandableNetwork) -> None:
        network.eval().requires_grad_(False).zero_grad()
        self.network = self._running = network
        if network.fast.fold_frozen:
            # All of the copy is frozen, so all of it is folded.
            self._running = copy.deepcopy(network)
            low = network.runs_in_bfloat16(next(network.parameters()).device)
            dtype = torch.bfloat16 if low else torch.float32
            self._running.generalized = nn.Sequential(
                *(fold_batch_norm(stage, dtype) for stage in network.generalized)
            )
        self._saved = self._images = self._outputs = None


class _Distillation(BatchOutputs, ABC):
    """Adds a loss between the present outputs and the previous network's, once there is one.

    Of an online stream it is the last sub-experience that leaves one (:class:`ExperienceEnd`).
    """

    def __init__(self, teacher: PreviousModel | None) -> None:
        super().__init__()
        self.teacher = PreviousModel() if teacher is None else teacher
        self._end = ExperienceEnd()

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Rebuild the previous network if the run was resumed."""
        self.teacher.restore(strategy.model)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the loss to ``strategy.loss``."""
        new = self.outputs()
        old = self.teacher.outputs(strategy.mb_x) if self.applies(new) else None
        if old is None:
            return
        main = self.main_weight(strategy.model) * strategy.loss
        strategy.loss = main + self.loss(strategy.model, old, new)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the network as it is now."""
        if self._end.comes_with(strategy.experience):
            self.teacher.keep(strategy.model)

    def applies(self, outputs: NetworkOutputs) -> bool:
        """Return whether there is something to learn; a phase may train the classifier alone."""
        return outputs.features.requires_grad

    def main_weight(self, network: ExpandableNetwork) -> float:
        """Return the weight of the loss so far."""
        return 1.0

    @abstractmethod
    def loss(self, network: ExpandableNetwork, old: NetworkOutputs, new: NetworkOutputs) -> Tensor:
        """Return the weighted loss between the previous network's outputs and the present ones."""

    def state_dict(self) -> dict[str, Any]:
        """Return the previous network."""
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.teacher.load_state_dict(state)


class PODDistillationPlugin(_Distillation):
    """Pooled outputs distillation, from the second experience on.

    PODNet (Douillard et al., ECCV 2020), section 3.1:
    ``L = L_main + f (pod_weight * L_POD-spatial + flat_weight * L_POD-flat)`` with
    ``f = sqrt(classes seen / new classes)``; the classes seen include the new ones, as in the
    authors' code. POD-flat is :func:`less_forget_loss` on the features, as there.

    The published stage outputs are those before a stage's last ReLU, and the features those before
    any: a backbone made with ``last_relu=False`` has them. Any other works too, with the outputs
    that it has.

    :param pod_weight: of POD on the stages' outputs, lambda_c: 3 on CIFAR-100.
    :param flat_weight: of POD-flat, lambda_f; 0 leaves it out.
    :param pooling: how :func:`pod_loss` pools.
    :param teacher: the previous network, if several plugins are to share it.
    :raises ValueError: for a negative weight or an unknown pooling; before training, for a network
        that adds blocks.
    :raises TypeError: before training, if the model is no ``ExpandableNetwork``.
    """

    def __init__(
        self,
        pod_weight: float = 3.0,
        flat_weight: float = 1.0,
        *,
        pooling: str = "spatial",
        teacher: PreviousModel | None = None,
    ) -> None:
        super().__init__(teacher)
        at_least_zero("pod_weight", pod_weight)
        at_least_zero("flat_weight", flat_weight)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.weight, self.flat_weight, self.pooling = pod_weight, flat_weight, pooling

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "PODDistillationPlugin", shares="all")

    def loss(self, network: ExpandableNetwork, old: NetworkOutputs, new: NetworkOutputs) -> Tensor:
        """Return both parts, weighted."""
        loss = new.features.new_zeros(())
        if self.weight:
            stages = pod_loss(old.stage_maps, new.stage_maps, self.pooling)
            loss = loss + self.weight * stages
        if self.flat_weight:
            loss = loss + self.flat_weight * less_forget_loss(old.features, new.features)
        return loss * _growth_factor(network)


class SoftmaxDistillationPlugin(_Distillation):
    """Distillation of the old classes' softened predictions, from the second experience on.

    ``L = L_main + kd_weight * T^2 KL(p_old || p_new)`` over the classes that the previous network
    knows (:func:`softmax_distillation_loss`). It also applies where the classifier alone learns.
    Papers that write the cross-entropy with the old predictions for the divergence mean the same
    gradient: the two differ by the old predictions' entropy.

    :param kd_weight: of the loss.
    :param temperature: T.
    :param adaptive: whether the weight is multiplied by ``sqrt(classes seen / new classes)``.
    :param convex: whether to mix instead of to add, as BiC and WA do: the main loss then weighs
        ``1 - lambda`` and this one ``lambda * kd_weight``, ``lambda = old classes / classes seen``.
    :param scaled: whether the factor T^2 is there, by which the gradient keeps its size whatever
        the temperature; iCaRL, BiC and WA have none.
    :param teacher: the previous network, if several plugins are to share it.
    :raises ValueError: for a negative weight or a temperature that is not above 0.
    :raises TypeError: before training, if the model is no ``ExpandableNetwork``.
    """

    def __init__(
        self,
        kd_weight: float = 0.9,
        temperature: float = 10.0,
        *,
        adaptive: bool = False,
        convex: bool = False,
        scaled: bool = True,
        teacher: PreviousModel | None = None,
    ) -> None:
        super().__init__(teacher)
        at_least_zero("kd_weight", kd_weight)
        positive("temperature", temperature)
        self.weight, self.temperature, self.adaptive = kd_weight, temperature, adaptive
        self.convex, self.scaled = convex, scaled

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "SoftmaxDistillationPlugin")

    def applies(self, outputs: NetworkOutputs) -> bool:
        """Return whether there is something to learn."""
        return outputs.logits.requires_grad

    def main_weight(self, network: ExpandableNetwork) -> float:
        """Return the new classes' share of all, where the losses are mixed."""
        return len(network.new_classes) / len(network.classes) if self.convex else 1.0

    def loss(self, network: ExpandableNetwork, old: NetworkOutputs, new: NetworkOutputs) -> Tensor:
        """Return the loss on the old classes' columns, weighted."""
        assert self.teacher.network is not None
        columns = self.teacher.network.columns
        logits = new.logits[:, columns], old.logits[:, columns]
        weight = self.weight * (_growth_factor(network) if self.adaptive else 1.0)
        if self.convex:
            weight *= 1 - self.main_weight(network)
        if not self.scaled:
            weight /= self.temperature**2
        return weight * softmax_distillation_loss(*logits, self.temperature)


class LessForgetPlugin(_Distillation):
    """UCIR's less-forget constraint on the features, from the second experience on.

    Hou et al., CVPR 2019, section 3.3, as the authors' code computes it:
    ``L = L_main + less_forget_weight * sqrt(old / new) * L_dis`` with the numbers of old and new
    classes.

    :param less_forget_weight: lambda_base: 5 on CIFAR-100, 10 on ImageNet.
    :param teacher: the previous network, if several plugins are to share it.
    :raises ValueError: for a negative weight; before training, for a network that adds blocks.
    :raises TypeError: before training, if the model is no ``ExpandableNetwork``.
    """

    def __init__(
        self, less_forget_weight: float = 5.0, *, teacher: PreviousModel | None = None
    ) -> None:
        super().__init__(teacher)
        at_least_zero("less_forget_weight", less_forget_weight)
        self.weight = less_forget_weight

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "LessForgetPlugin", shares="all")

    def loss(self, network: ExpandableNetwork, old: NetworkOutputs, new: NetworkOutputs) -> Tensor:
        """Return the loss, weighted."""
        loss = self.weight * less_forget_loss(old.features, new.features)
        n_new = len(network.new_classes)
        n_old = len(network.classes) - n_new
        return loss * math.sqrt(n_old / n_new)


def _growth_factor(network: ExpandableNetwork) -> float:
    return math.sqrt(len(network.classes) / len(network.new_classes))
