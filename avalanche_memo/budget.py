"""Bytes of models and exemplars, and the exemplars that a budget of bytes buys.

The accounting of Zhou et al., "A Model or 603 Exemplars" (ICLR 2023): a parameter costs what its
number format takes (4 bytes in float32), an exemplar one byte per pixel and channel. So a
ResNet-32 of 463,504 parameters costs as much as 603 CIFAR images.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = [
    "HasInferenceModules",
    "exemplars_for",
    "image_bytes",
    "inference_bytes",
    "parameter_bytes",
]


@runtime_checkable
class HasInferenceModules(Protocol):
    """A network that needs only some of its modules once training is over."""

    def inference_modules(self) -> Sequence[nn.Module]:
        """Return the modules that inference needs; they alone are counted."""
        ...


def _counted(module: nn.Module) -> nn.Module:
    """Return the part of a module that is counted; shared tensors occur in it once."""
    if isinstance(module, HasInferenceModules):
        return nn.ModuleList(module.inference_modules())
    return module


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters, the published measure of a model's cost.

    Buffers are left out. A parameter used twice counts once. A module with a method
    ``inference_modules()`` is counted by the modules that this returns.
    """
    return _bytes(_counted(module).parameters())


def inference_bytes(module: nn.Module) -> int:
    """Return the bytes of all that inference keeps in memory: parameters and buffers.

    Counts the same modules as :func:`parameter_bytes`. Activations are left out.
    """
    counted = _counted(module)
    return _bytes(counted.parameters()) + _bytes(counted.buffers())


def image_bytes(shape: Sequence[int]) -> int:
    """Return the bytes of one raw uint8 image of shape ``(C, H, W)``.

    :raises ValueError: if the shape is not three positive numbers.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: expected three positive numbers (C, H, W), got {tuple(shape)}")
    return math.prod(shape)


def exemplars_for(budget_bytes: int, image_bytes: int) -> int:
    """Return how many whole images of ``image_bytes`` each fit in ``budget_bytes``.

    :raises ValueError: if the budget is negative or the image's size is not positive.
    """
    if budget_bytes < 0:
        raise ValueError(f"budget_bytes: expected no negative number, got {budget_bytes}")
    if image_bytes < 1:
        raise ValueError(f"image_bytes: expected a positive number, got {image_bytes}")
    return budget_bytes // image_bytes
