"""Masks and pruning of DER, section 3.3: the newest block's channels are kept only if they pay."""

import math
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from avalanche_memo.models.channel_mask import EMBEDDING_LIMIT, annealed_scale
from avalanche_memo.training.losses import sparsity_loss
from avalanche_memo.training.plugins.checks import ExperienceEnd, check_network
from avalanche_memo.training.ranges import at_least_zero, positive

__all__ = ["SparsityPlugin"]


class SparsityPlugin(SupervisedPlugin):
    """Learn which channels of the newest block are needed, and cut the others out.

    ``L = L_others + sparsity_weight * L_s``. While the block learns, the masks' scale rises within
    each epoch; in evaluation, and while the classifier learns alone, masks are 0 or 1; after the
    experience the block is pruned accordingly. The masks' embeddings are parameters like others:
    the optimizer's rate, momentum and weight decay hold for them, too.

    In an epoch of fewer than about six batches most masks are half open, and so the running
    statistics are those of half-open masks, which evaluation does not have: choose smaller batches.

    :param sparsity_weight: the sparsity loss's weight, lambda_s.
    :param mask_s_max: the masks' scale at an epoch's end.
    :param mask_rate: how much faster than others the embeddings learn: 1 in DER's equation,
        ``s_max`` in HAT's. With Adam, whose steps do not depend on a gradient's size, it has no
        effect. Embeddings start 1 from closing, on average, which is far for a short schedule: over
        15 epochs on ten classes of CIFAR-100 (ResNet-32), it took a weight of 10 at rate 1 to close
        half of the parameters. Higher rates need less weight and cost accuracy: noise then closes
        channels that are needed (experiments/results/mask_rate_trial.md).
    :raises ValueError: if the weight is negative, the scale not above 1 or the rate not positive;
        before training, if the model has no masks.
    :raises TypeError: before training, if it is no expanding ``ExpandableNetwork``.
    """

    def __init__(
        self, sparsity_weight: float, *, mask_s_max: float = 100.0, mask_rate: float = 1.0
    ) -> None:
        super().__init__()
        at_least_zero("sparsity_weight", sparsity_weight)
        if not 1 < mask_s_max < math.inf:
            raise ValueError(f"mask_s_max: expected a number above 1, got {mask_s_max}")
        positive("mask_rate", mask_rate)
        self.weight = sparsity_weight
        self.s_max = mask_s_max
        self.rate = mask_rate
        self._layers: list[Any] = []
        self._end = ExperienceEnd()

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        network = check_network(strategy.model, "SparsityPlugin", shares="not all")
        if not network.masked:
            raise ValueError(
                "model: SparsityPlugin expected an ExpandableNetwork with masked=True, got False"
            )

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Set the scale of this batch."""
        self._layers = [m for m in strategy.model.masks() if m.norm.embedding.requires_grad]
        batch = strategy.clock.train_epoch_iterations + 1
        scale = annealed_scale(batch, len(strategy.dataloader), self.s_max)
        for layer in self._layers:
            layer.norm.scale, layer.norm.rate = scale, self.rate

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the loss to ``strategy.loss``, unless the block is not learning."""
        if self._layers:
            loss = sparsity_loss(
                [layer.norm.mask() for layer in self._layers],
                [math.prod(layer.convolution.kernel_size) for layer in self._layers],
                [layer.source for layer in self._layers],
                self._layers[0].convolution.in_channels,
            )
            strategy.loss = strategy.loss + self.weight * loss

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the embeddings within their limits."""
        for layer in self._layers:
            layer.norm.embedding.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Prune the block, at the end of the last sub-experience where there are some."""
        self._layers = []
        if not self._end.comes_with(strategy.experience):
            return
        for layer in strategy.model.masks():
            layer.norm.scale = self.s_max
        strategy.model.prune()
