"""Exemplars as JPEG or WebP files: more of them in the same bytes.

Where only exemplars have a codec's artefacts, these tell old classes from new ones; so new images
can pass through the same codec.
"""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import resize

from avalanche_memo.training.samples import Part, pil_image, with_images

__all__ = [
    "Compression",
    "EitherImages",
    "EncodedImages",
    "OriginalImages",
    "lowest_quality",
    "through_codec",
]

logger = logging.getLogger("avalanche_memo")

_SETTINGS: dict[str, dict[str, Any]] = {"jpeg": {"optimize": True}, "webp": {"method": 6}}
"""Smaller at the same pixels: on CIFAR-100 at quality 75 a JPEG has 602 bytes instead of 920."""


@dataclass(frozen=True)
class Compression:
    """How exemplars are kept, and which new images look like them.

    Mean bytes of a CIFAR-100 image, which has 3072 raw, at quality 50, 75 and 90: JPEG 505, 602 and
    784; WebP 266, 336 and 568.

    :param codec: ``"jpeg"`` or ``"webp"``.
    :param quality: 1 to 100; or ``"auto"``: after each experience the lowest by which the features
        of its images move by at most ``max_distance``.
    :param new_images: the part of the new images that passes through the codec too: 0 for none, 1
        for all, between them a random part that is drawn anew each epoch. In a trial
        (``experiments/results/compression_trial.md``: MEMO, 10 classes an experience, WebP at 75)
        accuracy by classifier after three experiences was 37.9 with 0, 59.2 with 0.5 and 60.9 with
        1, and 46.0 with raw exemplars.
    :param max_distance: mean Euclidean distance of the L2-normalised features, 0 to 2.
    :param short_side: pixels of an image's shorter side, to which a larger image is scaled down
        before it is encoded. Photographs of which the network sees a part, or fewer pixels, have
        files that take more than the pixels seen.
    :raises ValueError: if a value is outside its range, or new images shall pass through a codec
        whose quality is chosen only after they were learned.
    """

    codec: Literal["jpeg", "webp"] = "webp"
    quality: int | Literal["auto"] = 75
    new_images: float = 1.0
    max_distance: float = 0.1
    short_side: int | None = None

    def __post_init__(self) -> None:
        if self.codec not in _SETTINGS:
            raise ValueError(f"codec: expected 'jpeg' or 'webp', got {self.codec!r}")
        number = isinstance(self.quality, int) and not isinstance(self.quality, bool)
        if self.quality != "auto" and not (number and 1 <= int(self.quality) <= 100):
            raise ValueError(f"quality: expected 1 to 100 or 'auto', got {self.quality!r}")
        if not 0 <= self.new_images <= 1:
            raise ValueError(f"new_images: expected a part from 0 to 1, got {self.new_images}")
        if self.quality == "auto" and self.new_images > 0:
            raise ValueError(
                "new_images: expected 0 where the quality is chosen after an experience, "
                f"got {self.new_images}"
            )
        if not 0 < self.max_distance <= 2:
            raise ValueError(f"max_distance: expected above 0, to 2, got {self.max_distance}")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side: expected at least 1 pixel, got {self.short_side}")
        for name in ("new_images", "max_distance"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def encode(self, image: Image.Image, quality: int | None = None) -> bytes:
        """Return an image's file.

        :param image: of mode ``RGB`` or ``L``.
        :param quality: 1 to 100; this one's own if it is not given.
        :raises ValueError: if the image has another mode.
        """
        if image.mode not in ("RGB", "L"):
            raise ValueError(
                f"compression: expected images of 8 bits a pixel in 1 or 3 channels, which "
                f"{self.codec} can hold, got mode {image.mode}"
            )
        if self.short_side is not None and self.short_side < min(image.size):
            image = resize(image, self.short_side)
        file = io.BytesIO()
        own = self.quality if quality is None else quality
        image.save(file, self.codec, quality=own, **_SETTINGS[self.codec])
        return file.getvalue()


class OriginalImages(Dataset[tuple[Image.Image, int]]):
    """The images of a part of a data set, before any transform, and their classes."""

    def __init__(self, part: Part, targets: Sequence[int]) -> None:
        self.leaf, self.indices, self.targets = part.leaf, part.indices.tolist(), targets

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return pil_image(self.leaf, self.indices[index]), self.targets[index]


class EncodedImages(Dataset[tuple[Image.Image, int]]):
    """Images that are decoded from files in memory at each access.

    :param originals: the images before they were encoded, and their ``targets``; an image is taken
        from here alone where it has no file.
    :param files: the files' bytes, or ``None``, in the same order.
    """

    def __init__(self, originals: Any, files: Sequence[bytes | None]) -> None:
        self.originals, self.files = originals, files
        self._modes: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its class."""
        file = self.files[index]
        if file is None:
            image, target = self.originals[index]
            return image, target
        image = Image.open(io.BytesIO(file))
        if image.format == "WEBP":  # It has no grey images: they come back as RGB.
            if index not in self._modes:
                self._modes[index] = self.originals[index][0].mode
            image = image.convert(self._modes[index])
        return image, self.originals.targets[index]


class EitherImages(Dataset[tuple[Image.Image, int]]):
    """Images that are replaced by others with a probability, drawn at each access.

    :param originals: the images.
    :param others: what replaces them, in the same order.
    :param probability: of the replacement.
    """

    def __init__(self, originals: Dataset[Any], others: Dataset[Any], probability: float) -> None:
        self.originals, self.others, self.probability = originals, others, probability

    def __len__(self) -> int:
        return len(self.originals)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its class; draws from torch's global generator."""
        chosen = bool(torch.rand(1) < self.probability)
        sample: tuple[Image.Image, int] = (self.others if chosen else self.originals)[index]
        return sample


def through_codec(
    dataset: Any,
    compression: Compression,
    *,
    quality: int | None = None,
    files: Sequence[bytes | None] | None = None,
    probability: float = 1.0,
) -> Any:
    """Return a data set of the images as a codec leaves them.

    :param dataset: an Avalanche data set of PIL images.
    :param compression: the codec.
    :param quality: in place of the compression's own.
    :param files: the images' files, in order, where they are encoded already; ``None`` for an image
        that stays as it is.
    :param probability: with which an image, each time it is taken, is the codec's.
    :raises ValueError: if the codec can't hold the images.
    :raises UnsupportedError: if they can't be reached, or their transforms are not known.
    """

    def leaf(part: Part, targets: list[int]) -> Any:
        originals = OriginalImages(part, targets)
        own: list[bytes | None]
        if files is None:
            own = [compression.encode(originals[i][0], quality) for i in range(len(targets))]
        else:
            own = [files[position] for position in part.positions]
        encoded = EncodedImages(originals, own)
        return encoded if probability == 1 else EitherImages(originals, encoded, probability)

    return with_images(dataset, leaf)


def lowest_quality(features: Callable[[int | None], Tensor], max_distance: float) -> int:
    """Return the lowest quality that keeps features near those of the clean images.

    By bisection, as if the distance fell with the quality throughout.

    :param features: returns L2-normalised features ``[n, D]`` of the images at a quality, or clean.
    :param max_distance: the largest mean Euclidean distance allowed.
    """
    clean = features(None)

    def near(quality: int) -> bool:
        return bool((features(quality) - clean).norm(dim=1).mean() <= max_distance)

    low, high = 1, 100
    if not near(high):
        logger.warning("quality: features move by more than %s even at 100", max_distance)
        return high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if near(middle) else (middle + 1, high)
    return low
