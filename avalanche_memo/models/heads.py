"""Classifiers that grow with the classes and with the features of an expandable network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GrowingLinear"]


class GrowingLinear(nn.Module):
    """A linear layer that grows in both directions: features ``[B, D]`` to logits ``[B, C]``.

    A new class adds a row, a new block adds columns; the weight of an old (class, feature) pair is
    kept, and everything new starts as in a fresh ``nn.Linear`` of the grown size. The weight is
    held as one parameter per block of features: Avalanche's optimizers and regularisers follow
    parameters by name and accept growth along one dimension only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def in_features(self) -> int:
        """The number of features D."""
        return sum(weight.shape[1] for weight in self.weights)

    @property
    def out_features(self) -> int:
        """The number of classes C."""
        return len(self.bias)

    @property
    def weight(self) -> Tensor:
        """The whole weight ``[C, D]``."""
        return torch.cat(list(self.weights), dim=1)

    def grow(self, new_features: int = 0, new_classes: int = 0) -> None:
        """Add a block of features, rows for classes, or both.

        :param new_features: columns to add as a new block, 0 for none.
        :param new_classes: rows to add.
        :raises ValueError: if a number is negative.
        """
        if new_features < 0 or new_classes < 0:
            raise ValueError(
                "new_features, new_classes: expected numbers of at least 0, "
                f"got {new_features} and {new_classes}"
            )
        old_classes = self.out_features
        if new_features:
            self.weights.append(nn.Parameter(self.bias.new_empty(old_classes, new_features)))
        bound = 1 / math.sqrt(max(1, self.in_features))
        for index, weight in enumerate(self.weights):
            grown = weight.new_empty(old_classes + new_classes, weight.shape[1])
            grown.uniform_(-bound, bound)
            if not (new_features and index == len(self.weights) - 1):
                grown[:old_classes] = weight.detach()
            self.weights[index] = nn.Parameter(grown)
        bias = self.bias.new_empty(old_classes + new_classes).uniform_(-bound, bound)
        bias[:old_classes] = self.bias.detach()
        self.bias = nn.Parameter(bias)

    def reset_parameters(self) -> None:
        """Start afresh, as a new ``nn.Linear`` of this size."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound)

    @torch.no_grad()
    def scale_rows(self, rows: Tensor, factor: Tensor | float) -> None:
        """Multiply the weights, not the biases, of some classes.

        :param rows: row numbers ``[R]``.
        :param factor: what to multiply by.
        """
        for weight in self.weights:
            weight[rows] *= factor

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of features ``[B, D]``."""
        return F.linear(features, self.weight, self.bias)
