"""Blocks with masked channels, and the smaller blocks that are left once closed channels are cut.

DER (Yan et al., CVPR 2021), section 3.3. The paper does not say what residual sums do: here each
convolution has a mask of its own, a sum has the channels that any of its summands has, and a
convolution that reads a sum has weights for all of these.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from avalanche_memo.models.channel_mask import MaskedBatchNorm2d
from avalanche_memo.models.cifar_resnet import CifarBlock, ZeroPadShortcut
from avalanche_memo.models.imagenet_resnet import OpenBlock

__all__ = [
    "RESIDUAL_BLOCKS",
    "MaskedLayer",
    "Residual",
    "as_residual",
    "mask_channels",
    "masked_layers",
    "prune_channels",
]

RESIDUAL_BLOCKS = (CifarBlock, BasicBlock, Bottleneck, OpenBlock)
"""The residual blocks of torchvision and of this package. A subclass may compute something else."""
# What maps a channel of zeros to a channel of zeros.
_CHANNELWISE = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Identity, ZeroPadShortcut)


class Residual(nn.Module):
    """A residual block whose residual may have fewer channels than the sum.

    ``[B, C, H, W]`` to ``[B, C', H', W']``.

    :param residual: the residual's layers.
    :param shortcut: the shortcut's; its channels come first in the sum.
    :param last_relu: whether the sum has a ReLU on it.
    :param width: C', where the shortcut may have fewer channels, too.
    :param residual_channels: the residual's channels in the sum; ``None`` for all, in order.
    """

    residual_channels: Tensor | None

    def __init__(
        self,
        residual: nn.Module,
        shortcut: nn.Module,
        last_relu: bool,
        width: int = 0,
        residual_channels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = shortcut
        self.last_relu = last_relu
        self.width = width
        # Not saved: they follow from the structure.
        self.register_buffer("residual_channels", residual_channels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for a feature map."""
        residual, output = self.residual(x), self.shortcut(x)
        more_channels = self.width - output.shape[1]
        if more_channels > 0:
            output = F.pad(output, (0, 0, 0, 0, 0, more_channels))
        if self.residual_channels is None:
            output = output + residual
        else:
            output = _add_channels(output, self.residual_channels, residual)
        return F.relu(output, inplace=True) if self.last_relu else output

    @torch.no_grad()
    def widen_residual(self) -> None:
        """Give the residual all channels of the sum, zeros where it had none; same outputs.

        A sum of all channels takes less time than the larger convolution costs. The residual's
        BatchNorm must have been folded into that one, its last layer.
        """
        if self.residual_channels is None:
            return
        *_, last = (m for m in self.residual.modules() if isinstance(m, nn.Conv2d))
        assert last.bias is not None
        for name, parameter in list(last.named_parameters()):
            wide = parameter.new_zeros(self.width, *parameter.shape[1:])
            wide.index_copy_(0, self.residual_channels, parameter)
            setattr(last, name, nn.Parameter(wide, requires_grad=parameter.requires_grad))
        last.out_channels = self.width
        self.residual_channels = None


class _Widen(nn.Module):
    """Put the present channels in their places among zeros: ``[B, C, H, W]`` to ``[B, D, H, W]``.

    :param present: the C channels, out of D.
    :param width: D.
    """

    order: Tensor

    def __init__(self, present: Sequence[int], width: int, device: torch.device) -> None:
        super().__init__()
        self.closed = width - len(present)
        order = [*present, *sorted(set(range(width)) - set(present))]
        places = torch.tensor(order, device=device).argsort()
        self.register_buffer("order", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the wide feature map."""
        return F.pad(x, (0, 0, 0, 0, 0, self.closed)).index_select(1, self.order)


def _add_channels(x: Tensor, channels: Tensor, addend: Tensor) -> Tensor:
    addend = addend.to(x.dtype)
    if x.is_contiguous(memory_format=torch.channels_last):
        # Along the dimension that lies densest in memory, index_add is up to 8 times as fast.
        total = x.permute(0, 2, 3, 1).index_add(3, channels, addend.permute(0, 2, 3, 1))
        return total.permute(0, 3, 1, 2)
    return x.index_add(1, channels, addend)


def mask_channels(block: nn.Module) -> nn.Module:
    """Return a block, made of the given one's layers, in which every convolution has a mask.

    It computes the same as the given one where all channels are open.

    :param block: stages in an ``nn.Sequential``: sequences of convolutions, each with its BatchNorm
        right behind it, ReLUs, poolings, and the residual blocks of this package's ResNets.
    :raises ValueError: if a part can't be masked: a convolution of several groups or without a
        BatchNorm, or a layer of another kind, such as attention.
    """
    if type(block) in RESIDUAL_BLOCKS:
        return mask_channels(as_residual(block))
    if isinstance(block, Residual):
        residual, shortcut = mask_channels(block.residual), mask_channels(block.shortcut)
        return Residual(residual, shortcut, block.last_relu)
    if type(block) in _CHANNELWISE:
        return copy.deepcopy(block)  # One layer may stand in several places of a sequence.
    if type(block) is not nn.Sequential:
        raise ValueError(
            "backbone: expected layers whose channels can be masked (convolutions, each followed "
            "by a BatchNorm2d, ReLU, pooling, this package's residual blocks without attention), "
            f"got {type(block).__name__}"
        )
    masked: list[nn.Module] = []
    layers = iter(block)
    for layer in layers:
        if type(layer) is nn.Conv2d:
            masked += [layer, _masked_norm(layer, next(layers, None))]
        else:
            masked.append(mask_channels(layer))
    return nn.Sequential(*masked)


def _masked_norm(convolution: nn.Conv2d, norm: nn.Module | None) -> MaskedBatchNorm2d:
    if convolution.groups != 1:
        raise ValueError(
            "backbone: expected convolutions of one group for channel masks, "
            f"got one of {convolution.groups} groups"
        )
    if (
        type(norm) is not nn.BatchNorm2d
        or not norm.affine
        or not norm.track_running_stats
        or norm.momentum is None
    ):
        raise ValueError(
            "backbone: expected a BatchNorm2d with scale, shift, running statistics and momentum "
            f"right behind each convolution for channel masks, got {norm}"
        )
    return MaskedBatchNorm2d.of(norm)


def as_residual(block: nn.Module) -> Residual:
    """Return one of :data:`RESIDUAL_BLOCKS`, of the same layers, as a :class:`Residual`.

    :raises ValueError: if it has attention or other layers.
    """
    children = dict(block.named_children())
    attention = children.pop("attention", None) or nn.Identity()
    if not isinstance(attention, nn.Identity):
        raise ValueError(
            f"backbone: expected no attention beside channel masks, got {type(attention).__name__}"
        )
    relu = children.pop("relu", None) or nn.ReLU()
    shortcut = children.pop("shortcut", None) or children.pop("downsample", None) or nn.Identity()
    layers: list[nn.Module] = []
    for i in range(1, 4):
        if f"conv{i}" in children:
            layers += [children.pop(f"conv{i}"), children.pop(f"bn{i}"), nn.ReLU(inplace=True)]
    if children or type(relu) is not nn.ReLU:
        raise ValueError(
            "backbone: expected residual blocks of convolutions, BatchNorm2d, ReLU and a shortcut "
            f"for channel masks, got {block}"
        )
    last_relu = getattr(block, "last_relu", not isinstance(block, OpenBlock))
    return Residual(nn.Sequential(*layers[:-1]), shortcut, last_relu)


@dataclass(frozen=True)
class MaskedLayer:
    """A convolution and its mask.

    :param name: the convolution's name within the block.
    :param convolution: the convolution.
    :param norm: the BatchNorm behind it, which has the mask.
    :param source: which layer feeds it, by its number among the block's; ``None`` for the block's
        input. Behind a residual sum it is the last layer of the residual; a shortcut's convolution
        has the same source as the first one of its residual.
    """

    name: str
    convolution: nn.Conv2d
    norm: MaskedBatchNorm2d
    source: int | None


def masked_layers(block: nn.Module) -> list[MaskedLayer]:
    """Return the layers of a masked block in the order of computing, residuals before shortcuts."""
    names = {module: name for name, module in block.named_modules()}
    layers: list[MaskedLayer] = []

    def visit(module: nn.Module, source: int | None) -> int | None:
        """Note the module's layers; return what feeds the next module."""
        if isinstance(module, Residual):
            last = visit(module.residual, source)
            visit(module.shortcut, source)
            return last
        if isinstance(module, nn.Sequential):
            for layer, following in pairwise([*module.children(), nn.Identity()]):
                if isinstance(layer, nn.Conv2d):
                    assert isinstance(following, MaskedBatchNorm2d)
                    layers.append(MaskedLayer(names[layer], layer, following, source))
                    source = len(layers) - 1
                else:
                    source = visit(layer, source)
        return source

    visit(block, None)
    return layers


def prune_channels(block: nn.Module, kept: Sequence[Sequence[int]]) -> nn.Module:
    """Return a smaller block that computes what a masked one does in evaluation.

    Channels that are not kept are cut out of convolutions, norms and what reads them; the output
    alone has all its channels, in order.

    :param block: the masked block, an ``nn.Sequential`` of stages. Parameters get other names
        than here: Avalanche's regularisers follow them by name and refuse any that shrinks.
    :param kept: for each of :func:`masked_layers`, the numbers of the channels to keep.
    :raises ValueError: if these are not some of each layer's channels, at least one, each once.
    """
    layers = masked_layers(block)
    if len(kept) != len(layers):
        raise ValueError(f"kept: expected channels of {len(layers)} layers, got of {len(kept)}")
    for layer, channels in zip(layers, kept, strict=True):
        width = layer.norm.num_features
        known = set(channels) & set(range(width))
        if not known or len(known) < len(channels):
            raise ValueError(
                f"kept: expected at least one of the channels 0 to {width - 1} of layer "
                f"{layer.name}, each once, got {list(channels)}"
            )
    chosen = {layer.convolution: list(k) for layer, k in zip(layers, kept, strict=True)}
    device = layers[0].convolution.weight.device

    def cut(module: nn.Module, present: list[int]) -> tuple[nn.Module, list[int]]:
        """Return what is left of a module, and the channels present in its output."""
        if isinstance(module, nn.Conv2d):
            return _cut_convolution(module, present, chosen[module]), chosen[module]
        if isinstance(module, MaskedBatchNorm2d):
            return module.pruned(present), present
        if isinstance(module, ZeroPadShortcut):
            return ZeroPadShortcut(len(present), len(present)), present
        if isinstance(module, Residual):
            residual, added = cut(module.residual, present)
            shortcut, passed = cut(module.shortcut, present)
            total = passed + [c for c in added if c not in set(passed)]
            places = [total.index(c) for c in added]
            in_order = places == list(range(len(total)))
            channels = None if in_order else torch.tensor(places, device=device)
            return Residual(residual, shortcut, module.last_relu, len(total), channels), total
        if isinstance(module, nn.Sequential):
            parts = []
            for child in module.children():
                part, present = cut(child, present)
                parts.append(part)
            return nn.Sequential(*parts), present
        return copy.deepcopy(module), present

    pruned, present = cut(block, list(range(layers[0].convolution.in_channels)))
    stages = [nn.Sequential(OrderedDict(pruned=stage)) for stage in pruned.children()]
    width = layers[-1].norm.num_features
    if present != list(range(width)):
        stages[-1].add_module("wide", _Widen(present, width, device))
    return nn.Sequential(*stages)


def _cut_convolution(layer: nn.Conv2d, inputs: list[int], outputs: list[int]) -> nn.Conv2d:
    cut = copy.deepcopy(layer)
    cut.in_channels, cut.out_channels = len(inputs), len(outputs)
    cut.weight = nn.Parameter(layer.weight.detach()[outputs][:, inputs])
    if layer.bias is not None:
        cut.bias = nn.Parameter(layer.bias.detach()[outputs])
    return cut
