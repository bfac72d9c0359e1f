"""Frozen convolutions that do the sums and ReLUs behind them, too, by oneDNN on an x86 processor.

A convolution's output is added to and clamped while it is in the cache, which takes less time than
reading it again for each. PyTorch runs compiled inference on the same kernels; here the gradient by
the input can pass, too.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import skip_init

from avalanche_memo.models.pruning import RESIDUAL_BLOCKS, Residual, as_residual
from avalanche_memo.models.staged import in_order

__all__ = ["FusedConvolutions", "fuse"]


@dataclass
class _Layer:
    """A frozen convolution and what follows it.

    :param convolution: the convolution.
    :param relu: whether the output, or the sum, has a ReLU.
    :param residual_from: how many layers come before the residual that ends here, if one does.
    """

    convolution: nn.Conv2d
    relu: bool = False
    residual_from: int | None = None

    @cached_property
    def transposed(self) -> nn.Conv2d | None:
        """The convolution that gives the gradient by the input; ``None`` if no ordinary one does.

        Made when the first gradient comes: many frozen networks never get one.
        """
        layer = self.convolution
        assert not isinstance(layer.padding, str)
        axes = zip(layer.dilation, layer.kernel_size, layer.padding, strict=True)
        padding = [dilation * (size - 1) - before for dilation, size, before in axes]
        if layer.stride != (1, 1) or min(padding) < 0:
            return None
        transposed = copy.deepcopy(layer)
        weight = layer.weight.detach().flip(2, 3).transpose(0, 1)
        transposed.weight = nn.Parameter(
            weight.contiguous(memory_format=torch.channels_last), requires_grad=False
        )
        transposed.bias, transposed.padding = None, tuple(padding)
        return transposed


class FusedConvolutions(nn.Module):
    """Frozen convolutions in a row, with ReLUs and residual sums between them.

    Feature map ``[B, C, H, W]`` to ``[B, C', H', W']``, of the convolutions' type.

    :param shortcut: what the residual at the input is added to; ``None`` for the input itself.
    """

    def __init__(self, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.layers: list[_Layer] = []

    def append(self, module: nn.Module) -> None:
        """Append a convolution, or put a ReLU on the last one's output."""
        if isinstance(module, nn.Conv2d):
            # The kernels are for this layout alone.
            self.layers.append(_Layer(module.to(memory_format=torch.channels_last)))
        else:
            self.layers[-1].relu = True

    def append_residual(self, modules: Iterable[nn.Module], last_relu: bool) -> None:
        """Append a residual, of convolutions and ReLUs, and its sum."""
        start = len(self.layers)
        for module in modules:
            self.append(module)
        self.layers[-1].residual_from = start
        self.layers[-1].relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a feature map."""
        x = x.to(self.layers[0].convolution.weight.dtype)
        shortcut = None if self.shortcut is None else self.shortcut(x)
        output: Tensor = _Fused.apply(x, shortcut, self.layers)
        return output


class _Fused(torch.autograd.Function):
    """Convolutions whose weights get no gradient, and the sums and ReLUs between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor | None, layers: list[_Layer]) -> Tensor:
        maps: list[Tensor | None] = [x]
        for layer in layers:
            start = layer.residual_from
            addend = None if start is None else maps[start]
            if start == 0 and shortcut is not None:
                addend = shortcut
            x = _convolve(layer.convolution, x, addend, layer.relu)
            if start is not None and not ctx.needs_input_grad[0]:
                maps = [None] * len(maps)  # Nobody needs them any more.
            maps.append(x)
        ctx.layers, ctx.adds_input = layers, shortcut is None
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*maps)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        maps, sums = ctx.saved_tensors, {}
        for i, layer in reversed(list(enumerate(ctx.layers))):
            if layer.relu:
                gradient = _behind_relu(gradient, maps[i + 1], own=i + 1 < len(ctx.layers))
            if layer.residual_from is not None:
                sums[layer.residual_from] = gradient
            addend = sums.pop(i, None) if i > 0 or ctx.adds_input else None
            gradient = _by_input(layer, gradient, maps[i], addend)
        return gradient, sums.get(0), None


def _convolve(layer: nn.Conv2d, x: Tensor, addend: Tensor | None, relu: bool = False) -> Tensor:
    rest = (layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups)
    run = torch.ops.mkldnn._convolution_pointwise
    output: Tensor
    if addend is None:
        output = run(x, *rest, "relu" if relu else "none", [], "")
    else:
        output = run.binary(x, addend, *rest, "add", None, "relu" if relu else None, [], "")
    return output


def _behind_relu(gradient: Tensor, output: Tensor, own: bool) -> Tensor:
    """Return the gradient behind a ReLU; in place if nobody else has this one."""
    run = torch.ops.aten.threshold_backward
    behind: Tensor
    if own:
        behind = run.grad_input(gradient, output, 0, grad_input=gradient)
    else:
        behind = run(gradient, output, 0)
    return behind


def _by_input(layer: _Layer, gradient: Tensor, x: Tensor, addend: Tensor | None) -> Tensor:
    """Return the gradient by a convolution's input, and an addend."""
    if layer.transposed is not None:
        return _convolve(layer.transposed, gradient, addend)
    convolution = layer.convolution
    geometry = (convolution.stride, convolution.padding, convolution.dilation)
    by_input: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, convolution.weight, None, *geometry, False, [0, 0], 1, [True, False, False]
    )[0]
    return by_input if addend is None else by_input.add_(addend)


def fuse(block: nn.Module) -> nn.Module:
    """Return a frozen block with its convolutions fused, as far as they can be.

    These are the convolutions in sequences and in residual blocks, torchvision's or this package's,
    into which BatchNorm was folded, without attention; in float32 or bfloat16, on an x86 CPU.

    :param block: a block nobody else runs: the convolutions are taken out of it.
    """
    types = {(p.device.type, p.dtype) for p in block.parameters()}
    if not types or not all(kind == "cpu" and _kernels_work(dtype) for kind, dtype in types):
        return block
    fused: list[nn.Module] = []
    chain = None
    for module in _in_sequence(block):
        residual = _residual(module)
        relu = type(module) is nn.ReLU and chain is not None
        if residual is None and not relu and not _is_plain(module):
            fused.append(module)
            chain = None
            continue
        shortcut = None if residual is None else residual.shortcut
        if type(shortcut) is nn.Identity:
            shortcut = None
        if chain is None or shortcut is not None:
            chain = FusedConvolutions(shortcut)
            fused.append(chain)
        if residual is None:
            chain.append(module)
        else:
            chain.append_residual(_in_sequence(residual.residual), residual.last_relu)
    return nn.Sequential(*fused)


@cache
def _kernels_work(dtype: torch.dtype) -> bool:
    """Return whether the kernels, which are not in PyTorch's public interface, work here."""
    if (
        dtype not in (torch.float32, torch.bfloat16)
        or not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        or not torch.backends.cpu.get_cpu_capability().startswith("AVX")
    ):
        return False
    x = torch.arange(8, device="cpu").reshape(1, 2, 2, 2).to(dtype)
    layer = skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, 2, 2, 3, padding=1, device="cpu", dtype=dtype
    )
    layer.to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        layer.weight.fill_(1)
        layer.bias.fill_(-30)
        try:
            alone, last = _convolve(layer, x, None), _convolve(layer, x, x, relu=True)
            expected = layer(x)
        except (AttributeError, RuntimeError, TypeError):
            return False
        return torch.equal(alone, expected) and torch.equal(last, (expected + x).relu())


def _in_sequence(module: nn.Module) -> list[nn.Module]:
    """Return what a sequence runs, sequences within it resolved."""
    if type(module) is nn.Sequential:
        return [inner for child in in_order(module) for inner in _in_sequence(child)]
    return [] if type(module) is nn.Identity else [module]


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.groups == 1
    )


def _residual(module: nn.Module) -> Residual | None:
    """Return a residual block of convolutions and ReLUs alone."""
    if type(module) in RESIDUAL_BLOCKS:
        try:
            module = as_residual(module)
        except ValueError:
            return None
    if type(module) is not Residual or module.width:
        return None
    layers = _in_sequence(module.residual)
    plain = [_is_plain(layer) for layer in layers]
    whole = all(p or type(layer) is nn.ReLU for p, layer in zip(plain, layers, strict=True))
    return module if whole and plain[0] and plain[-1] else None
