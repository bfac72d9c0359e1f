"""Torchvision's usual image transforms for whole batches, with random draws per image.

Each one equals its torchvision original, exactly for given draws and in distribution, but works on
uint8 images ``[B, C, H, W]`` at once, on any device.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils.classification_dataset import lookup
from avalanche.benchmarks.utils.transforms import MultiParamCompose, TupleTransform
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.datasets.vision import StandardTransform

__all__ = [
    "BatchedOp",
    "Brightness",
    "HorizontalFlip",
    "Normalize",
    "RandomCrop",
    "RandomResizedCrop",
    "Recipe",
    "UnsupportedError",
    "channels_first",
    "parse_transforms",
    "unfold_transforms",
]


class UnsupportedError(Exception):
    """The reason why images or transforms cannot be served from a resident tensor."""


@dataclass(frozen=True)
class BatchedOp(ABC):
    """A transform of images ``[B, C, H, W]`` whose random parameters are drawn per image.

    A draw of one image consumes torch's global random numbers exactly as the torchvision
    transform does, so that the two can be compared from the same random state.
    """

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width, in pixels, of the images that :meth:`apply` makes."""
        return height, width

    def draw(self, n: int, height: int, width: int) -> Tensor | None:
        """Draw the parameters of `n` images of one size; None if there is nothing to draw."""
        return None

    @abstractmethod
    def apply(self, batch: Tensor, draws: Tensor | None) -> Tensor:
        """Transform images ``[B, C, H, W]`` with the parameters of :meth:`draw`, on any device."""


@dataclass(frozen=True)
class RandomCrop(BatchedOp):
    """Crop a window of `size` (height, width) at a uniform place of the padded image.

    :param size: height and width of the window in pixels.
    :param padding: pixels added on the left, top, right and bottom.
    :param fill: value of the added pixels, 0 to 255.
    """

    size: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    fill: int = 0

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the window."""
        return self.size

    def draw(self, n: int, height: int, width: int) -> Tensor | None:
        """Draw the top and left of the windows in the padded images: int64 ``[n, 2]``."""
        left, top, right, bottom = self.padding
        height, width = height + top + bottom, width + left + right
        if self.size == (height, width):
            return torch.zeros(n, 2, dtype=torch.int64)
        tops = torch.randint(0, height - self.size[0] + 1, (n,))
        return torch.stack([tops, torch.randint(0, width - self.size[1] + 1, (n,))], dim=1)

    def pad(self, images: Tensor) -> Tensor:
        """Return images ``[N, C, H, W]`` with the padding added."""
        left, top, right, bottom = self.padding
        return F.pad(images, (left, right, top, bottom), value=self.fill)

    def gather(self, padded: Tensor, index: Tensor, draws: Tensor) -> Tensor:
        """Return the windows ``[B, C, h, w]`` of the padded images that `index` ``[B]`` names."""
        height, width = self.size
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return windows[index, :, draws[:, 0], draws[:, 1]]

    def apply(self, batch: Tensor, draws: Tensor | None) -> Tensor:
        """Pad and crop every image of the batch."""
        assert draws is not None
        return self.gather(self.pad(batch), torch.arange(len(batch), device=batch.device), draws)


@dataclass(frozen=True)
class HorizontalFlip(BatchedOp):
    """Mirror each image left to right with probability `p`."""

    p: float = 0.5

    def draw(self, n: int, height: int, width: int) -> Tensor | None:
        """Draw which images are mirrored: bool ``[n]``."""
        return torch.rand(n) < self.p

    def apply(self, batch: Tensor, draws: Tensor | None) -> Tensor:
        """Mirror the images where the draw is true."""
        assert draws is not None
        return torch.where(draws[:, None, None, None], batch.flip(-1), batch)


@dataclass(frozen=True)
class Brightness(BatchedOp):
    """Multiply each uint8 image by a factor that is uniform in ``[low, high]``, as PIL does."""

    low: float
    high: float

    def draw(self, n: int, height: int, width: int) -> Tensor | None:
        """Draw the factors: float32 ``[n]``."""
        torch.randperm(4)  # ColorJitter draws the order of its four adjustments first
        return torch.empty(n).uniform_(self.low, self.high)

    def apply(self, batch: Tensor, draws: Tensor | None) -> Tensor:
        """Scale the images; PIL clips and then truncates (checked on all values)."""
        assert draws is not None
        return (batch * draws[:, None, None, None]).clamp_(max=255).to(torch.uint8)


@dataclass(frozen=True)
class RandomResizedCrop(BatchedOp):
    """Crop a random area and aspect ratio, and resize it to `size` with PIL's bilinear filter.

    Each image's crop and resize is two small matrices, one per axis, so that a batch is two
    batched products. As in PIL, weights are fixed-point numbers of 22 bits and each axis is rounded
    to uint8, and float64 holds all of it exactly. Enlarged images equal PIL's; where it shrinks
    them, PIL may take the axes in the other order, which moves some values by a level.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that every crop is resized to."""
        return self.size

    def draw(self, n: int, height: int, width: int) -> Tensor | None:
        """Draw top, left, height and width of the crops: int64 ``[n, 4]``.

        As torchvision: up to ten tries per image, then the largest central crop that has an
        allowed aspect ratio.
        """
        ratio_range = list(self.ratio)
        if n == 1:
            like = torch.empty(1, height, width)
            box = T.RandomResizedCrop.get_params(like, list(self.scale), ratio_range)
            return torch.tensor([box])
        allowed = min(max(width / height, min(self.ratio)), max(self.ratio))
        w = width if width / height <= allowed else round(height * allowed)
        h = height if width / height >= allowed else round(width / allowed)
        boxes = torch.tensor([(height - h) // 2, (width - w) // 2, h, w]).repeat(n, 1)
        pending = torch.arange(n)
        low, high = (math.log(r) for r in ratio_range)
        for _ in range(10):
            m = len(pending)
            area = height * width * torch.empty(m).uniform_(*self.scale)
            ratio = torch.empty(m).uniform_(low, high).exp()
            ws, hs = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
            fits = (ws > 0) & (ws <= width) & (hs > 0) & (hs <= height)
            tops = (torch.rand(m) * (height - hs + 1)).floor()
            lefts = (torch.rand(m) * (width - ws + 1)).floor()
            drawn = torch.stack([tops, lefts, hs, ws], dim=1).long()
            boxes[pending[fits]] = drawn[fits]
            pending = pending[~fits]
        return boxes

    @staticmethod
    def _weights(start: Tensor, length: Tensor, size: int, source: int) -> Tensor:
        """Return the triangle filter's weights ``[B, size, source]`` along one axis, times 2**22.

        The filter never reaches outside the crop, whose first pixel is `start` and which has
        `length` pixels, both ``[B]``.
        """
        pixel = torch.arange(source, device=start.device)
        start, length = start[:, None, None], length[:, None, None]
        scale = length.double() / size
        centre = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale
        distance = (pixel - start + 0.5 - centre).abs() / scale.clamp(min=1)
        inside = (pixel >= start) & (pixel < start + length)
        weights = (1 - distance).clamp(min=0) * inside
        return (weights / weights.sum(-1, keepdim=True) * 2**22 + 0.5).floor()

    def apply(self, batch: Tensor, draws: Tensor | None) -> Tensor:
        """Crop and resize uint8 images to uint8 ``[B, C, h, w]``; along x first, as PIL does."""
        assert draws is not None
        top, left, height, width = draws.unbind(1)
        along_x = self._weights(left, width, self.size[1], batch.shape[3])[:, None]
        along_y = self._weights(top, height, self.size[0], batch.shape[2])[:, None]
        narrow = (batch.double() @ along_x.mT / 2**22 + 0.5).floor().clamp_(max=255)
        return (along_y @ narrow / 2**22 + 0.5).clamp_(max=255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ToTensor and Normalize as one multiply-add: two float32 ``[1, C, 1, 1]``."""
    mean_, std_ = torch.tensor([mean, std], dtype=torch.float64).view(2, 1, -1, 1, 1)
    return (1 / (255 * std_)).float().to(device), (-mean_ / std_).float().to(device)


@dataclass(frozen=True)
class Normalize(BatchedOp):
    """Map uint8 values to float32 ``(value / 255 - mean) / std``; one entry or one per channel."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def apply(self, batch: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return float32 images of the same shape."""
        scale, shift = _scale_and_shift(self.mean, self.std, batch.device)
        return torch.mul(batch, scale).add_(shift)


@dataclass(frozen=True)
class Recipe:
    """A transform chain: what is done once to each PIL image, then what is done to each batch.

    :param ops: the batched transforms, in order; the last one is :class:`Normalize`.
    :param prefix: deterministic torchvision transforms of PIL images that come before them.
    :param prefix_key: the prefix as text, which stands for it in comparisons.
    """

    ops: tuple[BatchedOp, ...]
    prefix: tuple[Any, ...] = field(default=(), compare=False)
    prefix_key: str = ""

    def prepare(self, image: Image.Image) -> Tensor:
        """Apply the prefix to one image and return it as uint8 ``[C, H, W]``."""
        for transform in self.prefix:
            image = transform(image)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise UnsupportedError(f"images of mode {image.mode}")
        return channels_first(torch.from_numpy(pixels.copy())[None])[0]

    def draw(self, n: int, height: int, width: int) -> list[Tensor | None]:
        """Draw the parameters of `n` images, one entry per transform."""
        draws = []
        for op in self.ops:
            draws.append(op.draw(n, height, width))
            height, width = op.output_size(height, width)
        return draws

    def store(self, images: Tensor) -> Tensor:
        """Return images ``[N, C, H, W]`` as :meth:`gather` wants them: padded if need be."""
        first = self.ops[0]
        return first.pad(images) if isinstance(first, RandomCrop) else images

    def gather(self, stored: Tensor, index: Tensor, draws: Sequence[Tensor | None]) -> Tensor:
        """Return the transformed float32 images ``[B, C, h, w]`` that `index` ``[B]`` names."""
        first, ops = self.ops[0], self.ops
        if isinstance(first, RandomCrop):
            assert draws[0] is not None
            batch, ops, draws = first.gather(stored, index, draws[0]), ops[1:], draws[1:]
        else:
            batch = stored[index]
        for op, drawn in zip(ops, draws, strict=True):
            batch = op.apply(batch, drawn)
        return batch


# Deterministic, so that torchvision itself applies them, once per image.
_ONCE_PER_IMAGE = (T.Resize, T.CenterCrop, T.Pad, T.Grayscale)


def parse_transforms(transforms: Sequence[Any]) -> Recipe:
    """Translate a chain of torchvision transforms of PIL images into batched ones.

    :param transforms: applied first to last; `Compose` may be nested.
    :raises UnsupportedError: with the reason, if the chain is not understood.
    """
    chain = [step for transform in transforms for step in unfold_transforms(transform)]
    prefix: list[Any] = []
    ops: list[BatchedOp] = []
    normalize: Normalize | None = None
    for transform in chain:
        kind = type(transform)  # a subclass may do anything: only the very classes are known
        if kind is T.ToTensor and normalize is None:
            normalize = Normalize()
        elif kind is T.Normalize and normalize is not None:
            normalize = _compose(normalize, transform)
        elif normalize is not None:
            raise UnsupportedError(f"{kind.__name__} after ToTensor")
        elif kind in _ONCE_PER_IMAGE:
            if ops:
                raise UnsupportedError(f"{kind.__name__} after a random transform")
            prefix.append(transform)
        elif kind is T.RandomCrop:
            ops.append(_parse_crop(transform))
        elif kind is T.RandomHorizontalFlip:
            ops.append(HorizontalFlip(float(transform.p)))
        elif kind is T.ColorJitter:
            ops.append(_parse_jitter(transform))
        elif kind is T.RandomResizedCrop:
            if transform.interpolation is not T.InterpolationMode.BILINEAR:
                raise UnsupportedError(f"RandomResizedCrop with {transform.interpolation}")
            height, width = transform.size
            ops.append(
                RandomResizedCrop((height, width), tuple(transform.scale), tuple(transform.ratio))
            )
        else:
            raise UnsupportedError(f"unknown transform {kind.__name__}")
    if normalize is None:
        raise UnsupportedError("no ToTensor in the transforms")
    return Recipe((*ops, normalize), tuple(prefix), repr(prefix))


def _compose(first: Normalize, second: Any) -> Normalize:
    """Return one normalisation that equals `first` and then the torchvision `second`."""
    means = np.asarray(first.mean) + np.asarray(first.std) * np.atleast_1d(second.mean)
    stds = np.asarray(first.std) * np.atleast_1d(second.std)
    return Normalize(tuple(means.tolist()), tuple(stds.tolist()))


def _parse_crop(crop: Any) -> RandomCrop:
    """Translate torchvision's RandomCrop."""
    if crop.pad_if_needed or crop.padding_mode != "constant":
        raise UnsupportedError("RandomCrop with pad_if_needed or a padding mode but constant")
    if not isinstance(crop.fill, int):
        raise UnsupportedError("RandomCrop with a fill per channel")
    padding = crop.padding if crop.padding is not None else 0
    sides = (padding,) if isinstance(padding, int) else tuple(padding)
    left, top, right, bottom = sides * (4 // len(sides))
    height, width = crop.size
    return RandomCrop((height, width), (left, top, right, bottom), crop.fill)


def _parse_jitter(jitter: Any) -> Brightness:
    """Translate torchvision's ColorJitter."""
    if jitter.contrast or jitter.saturation or jitter.hue or not jitter.brightness:
        raise UnsupportedError("ColorJitter of anything but brightness")
    return Brightness(*jitter.brightness)


def unfold_transforms(transform: Any) -> list[Any]:
    """Return the image transforms of Avalanche's and torchvision's containers, in order.

    :raises UnsupportedError: for a target transform that is not one of Avalanche's class mappings.
    """
    if transform is None:
        return []
    if isinstance(transform, StandardTransform):
        return unfold_transforms(TupleTransform([transform.transform, transform.target_transform]))
    if type(transform) is TupleTransform:
        for other in transform.transforms[1:]:
            mapping = isinstance(other, functools.partial) and other.func is lookup
            if other is not None and not mapping:
                raise UnsupportedError("a target transform that is not a class mapping")
        return unfold_transforms(transform.transforms[0])
    if type(transform) in (T.Compose, MultiParamCompose):
        return [step for inner in transform.transforms for step in unfold_transforms(inner)]
    return [transform]


def channels_first(images: Tensor) -> Tensor:
    """Return ``[N, H, W]`` or ``[N, H, W, C]`` images as contiguous ``[N, C, H, W]``."""
    if images.ndim == 3:
        return images[:, None].contiguous()
    return images.permute(0, 3, 1, 2).contiguous()
