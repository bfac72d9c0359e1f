"""Clamping of gradients, as PODNet's released code does it."""

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch.nn.utils import clip_grad_value_

__all__ = ["GradientClampPlugin"]


class GradientClampPlugin(SupervisedPlugin):
    """Clamp each value of each parameter's gradient before the step.

    :param gradient_limit: the largest magnitude (5 in PODNet's code).
    :raises ValueError: if the limit is not positive.
    """

    def __init__(self, gradient_limit: float = 5.0) -> None:
        super().__init__()
        if not gradient_limit > 0:
            raise ValueError(f"gradient_limit: expected a positive number, got {gradient_limit}")
        self.limit = gradient_limit

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Clamp."""
        clip_grad_value_(strategy.model.parameters(), self.limit)
