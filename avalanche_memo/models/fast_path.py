"""What makes an expandable network fast: bfloat16, channels_last, cheap frozen blocks, graphs."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from avalanche_memo.models.fused import fuse
from avalanche_memo.models.pruning import RESIDUAL_BLOCKS, Residual

__all__ = [
    "FastPath",
    "FoldedBlock",
    "fold_batch_norm",
    "has_bfloat16",
]

_RUN_IN_ORDER = (nn.Sequential, *RESIDUAL_BLOCKS)


@dataclass(frozen=True)
class FastPath:
    """The parts of the fast path, each with its switch; all on by default.

    :param resident_batches: gather and augment batches from one tensor in memory.
    :param channels_last: keep feature maps as ``[B, H, W, C]`` in memory.
    :param bfloat16: run blocks under autocast to bfloat16, on hardware that has it. The
        classifier, the losses and the features that herding and NME see stay in float32.
    :param fold_frozen: run frozen blocks from a copy of their weights, with BatchNorm folded into
        the convolutions, that is ready in the type they run in; on an x86 processor the
        convolutions do the sums and ReLUs behind them, too. The model keeps the originals, which
        run themselves as long as one of their modules has a forward hook.
    :param cuda_graphs: on a GPU, record the blocks' forward and backward pass once, as CUDA graphs,
        and launch them whole from then on, which gives the same numbers. The blocks must do the
        same to each batch, whatever it shows; masks do not, whose temperature changes, and go
        without. The stage maps of a forward pass are then valid until the next one.
    """

    resident_batches: bool = True
    channels_last: bool = True
    bfloat16: bool = True
    fold_frozen: bool = True
    cuda_graphs: bool = True

    @classmethod
    def of(cls, fast: "bool | FastPath") -> "FastPath":
        """Return the parts that ``True`` (all), ``False`` (none) or a choice of them stands for.

        :raises TypeError: for anything else.
        """
        if isinstance(fast, FastPath):
            return fast
        if not isinstance(fast, bool):
            raise TypeError(f"fast: expected True, False or a FastPath, got {fast!r}")
        return cls() if fast else cls(False, False, False, False, False)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Not in older releases of torch.
        read: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
        return any(read().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def fold_batch_norm(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy of a block with each BatchNorm folded into the convolution before it.

    Only where the one is known to follow the other: right behind it in an ``nn.Sequential`` or in a
    residual block of torchvision's or this package's. Every other BatchNorm stays.
    Where pruning has left a residual fewer channels than its sum, it gets them back as zeros.
    The convolutions are fused with what follows them (:func:`.fuse`).

    :param block: a block in evaluation mode.
    :param dtype: the type of the copy's weights; folding itself is done in float32.
    """
    folded = copy.deepcopy(block).eval().requires_grad_(False)
    for parent in folded.modules():
        # No subclasses: they may compute something else. named_children() would skip a module that
        # occurs again, and so show some side by side that are not.
        children = parent._modules.items() if type(parent) in _RUN_IN_ORDER else ()
        for (name, first), (next_name, second) in pairwise(list(children)):
            if (
                type(first) is nn.Conv2d
                and type(second) is nn.BatchNorm2d
                and second.track_running_stats
            ):
                setattr(parent, name, fuse_conv_bn_eval(first, second))
                setattr(parent, next_name, nn.Identity())
    for module in folded.modules():
        if isinstance(module, Residual):
            module.widen_residual()
    return fuse(folded.to(dtype))


class FoldedBlock:
    """What runs in a frozen block's place: its copy by :func:`fold_batch_norm`.

    :param block: the block.
    :param dtype: the type of the copy's weights.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        self._block, self._dtype = block, dtype
        self._modules = list(block.modules())
        self._versions: list[tuple[int, int]] = []

    def hooked(self) -> bool:
        """Return whether someone watches the block run, which then has to run itself."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)

    def current(self) -> nn.Module:
        """Return the copy; a new one where the block's tensors were changed or replaced.

        Writing through ``tensor.data`` is not noticed, as autograd does not notice it.
        """
        versions = [
            (tensor.data_ptr(), tensor._version)
            for module in self._modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if versions != self._versions:
            # An inference tensor could not be used in training later.
            with torch.inference_mode(False):
                self._copy = fold_batch_norm(self._block, self._dtype)
            self._versions = versions
        return self._copy
