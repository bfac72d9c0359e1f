"""Bytes of models and exemplars, and the exemplars that a budget of bytes buys.

The accounting of Zhou et al., "A Model or 603 Exemplars" (ICLR 2023): a parameter costs what its
number format takes (4 bytes in float32), an exemplar one byte per pixel and channel. So a
ResNet-32 of 463,504 parameters costs as much as 603 CIFAR images.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

__all__ = [
    "aligned_budget",
    "aligned_exemplars",
    "exemplars_for",
    "image_bytes",
    "inference_bytes",
    "parameter_bytes",
]

_ONE_NETWORK = ("replay", "icarl", "wa", "bic", "podnet", "ucir", "finetune")


def _counted(module: Any) -> nn.ModuleList:
    """Return the modules that are counted; shared tensors occur in them once."""
    own = hasattr(module, "inference_modules")
    return nn.ModuleList(module.inference_modules() if own else [module])


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


def exemplars_for(budget_bytes: float, image_bytes: float) -> int:
    """Return how many whole images of ``image_bytes`` each, or on average, fit in a budget.

    :raises ValueError: if the budget is negative, the image is smaller than a byte, or one of them
        is not finite.
    """
    if not 0 <= budget_bytes < math.inf:
        raise ValueError(f"budget_bytes: expected no negative number, got {budget_bytes}")
    if not 1 <= image_bytes < math.inf:
        raise ValueError(f"image_bytes: expected at least 1, got {image_bytes}")
    return int(budget_bytes // image_bytes)


def aligned_exemplars(
    method: str,
    backbone: nn.Module,
    base: int,
    increment: int,
    budget: float,
    *,
    classes: int,
    image: Sequence[int] | float,
    shared_stages: int | None = None,
) -> int:
    """Return how many exemplars a method may hold so that all fits a budget at the stream's end.

    ``floor((budget - model) / image)``, the model being what has grown over the whole stream:
    parameters alone, without the classifier and without what only training needs, such as masks, an
    auxiliary head or a copy of the previous network. This is how the budgets of MEMO's comparison
    are aligned: on CIFAR-100 in ten experiences, MEMO with ResNet-32 may hold 3312 exemplars beside
    DER's 2000.

    :param method: ``"memo"``, which shares all stages but the last; ``"der"``, which shares none;
        or one with a single network: replay, icarl, wa, bic, podnet, ucir, finetune.
    :param backbone: one backbone without classifier, :class:`~avalanche_memo.models.StagedBackbone`
        or else any module with its ``stages``; for a method that shares all or nothing, any module.
        Only its parameters' sizes matter, so it may live on the device ``"meta"``.
    :param base: classes of the first experience; 0 for as many as in the later ones.
    :param increment: classes of each later experience.
    :param budget: bytes for model and exemplars together.
    :param classes: classes of the whole stream.
    :param image: shape ``(C, H, W)`` of a raw uint8 exemplar, or the bytes of one; for compressed
        exemplars, the mean.
    :param shared_stages: stages shared, instead of the method's own; MEMO-2's are all but two.
    :return: exemplars in all, ``mem_size`` of the strategies; at least one per class, and two for
        BiC, which holds out one of them. A memory that gives each class equally many leaves up to
        ``classes - 1`` of them unspent, unless it is told to spend them
        (:class:`~avalanche_memo.training.storage_policy.HerdingBuffer`).
    :raises ValueError: if the budget is too small for the model and so many exemplars (the message
        says which one would do), or an argument is out of range.
    :raises TypeError: if the backbone is no module, or its stages are not modules.
    """
    model = _model_bytes(method, backbone, base, increment, classes, shared_stages)
    size = _exemplar_bytes(image)
    each = 2 if method == "bic" else 1
    least = model + math.ceil(each * classes * Fraction(size))
    if not least <= budget < math.inf:
        raise ValueError(
            f"budget: expected at least {least} bytes, {model} for the model of {method} and the "
            f"rest for {each} exemplars of each of {classes} classes, got {budget}"
        )
    return exemplars_for(budget - model, size)


def aligned_budget(
    method: str,
    backbone: nn.Module,
    base: int,
    increment: int,
    exemplars: int,
    *,
    classes: int,
    image: Sequence[int] | float,
    shared_stages: int | None = None,
) -> int:
    """Return the bytes of a method's model and exemplars at the end of the stream.

    The inverse of :func:`aligned_exemplars`, with the same arguments: the smallest budget for so
    many exemplars. The published budgets are those of DER with 2000 exemplars.

    :param exemplars: exemplars in all.
    :raises ValueError: if an argument is out of range.
    :raises TypeError: if the backbone is no module, or its stages are not modules.
    """
    if exemplars < 0:
        raise ValueError(f"exemplars: expected a number of at least 0, got {exemplars}")
    model = _model_bytes(method, backbone, base, increment, classes, shared_stages)
    return model + math.ceil(exemplars * Fraction(_exemplar_bytes(image)))


def _model_bytes(
    method: str,
    backbone: nn.Module,
    base: int,
    increment: int,
    classes: int,
    shared_stages: int | None,
) -> int:
    """Return the bytes of shared stages, and of the others once for each experience."""
    if method not in ("memo", "der", *_ONE_NETWORK):
        raise ValueError(f"method: expected memo, der, {', '.join(_ONE_NETWORK)}, got {method!r}")
    if classes < 1 or not 0 <= base <= classes or increment < 1 or (classes - base) % increment:
        raise ValueError(
            f"base, increment: expected numbers that cut {classes} classes into experiences, "
            f"got {base} and {increment}"
        )
    stages = getattr(backbone, "stages", [backbone])
    known = isinstance(stages, Iterable) and isinstance(backbone, nn.Module)
    if not known or not all(isinstance(stage, nn.Module) for stage in stages):
        raise TypeError(
            "backbone: expected a StagedBackbone or another module, its stages modules, "
            f"got {type(backbone).__name__}"
        )
    sizes = [parameter_bytes(stage) for stage in stages]
    if method == "memo" and len(sizes) < 2:
        raise ValueError(f"backbone: expected at least two stages for memo, got {len(sizes)}")
    if shared_stages is None:
        shared_stages = {"memo": len(sizes) - 1, "der": 0}.get(method, len(sizes))
    if not 0 <= shared_stages <= len(sizes):
        raise ValueError(f"shared_stages: expected 0 to {len(sizes)}, got {shared_stages}")
    experiences = (base > 0) + (classes - base) // increment
    return sum(sizes[:shared_stages]) + experiences * sum(sizes[shared_stages:])


def _exemplar_bytes(image: Sequence[int] | float) -> float:
    size = image_bytes(image) if isinstance(image, Sequence) else image
    if not 1 <= size < math.inf:
        raise ValueError(f"image: expected a shape (C, H, W) or at least one byte, got {image}")
    return size
