"""Batches gathered from one resident uint8 tensor and augmented whole, for any Avalanche strategy.

Per-image PIL transforms, not the network, bound class-incremental training on small images. Here
the images of an experience, exemplars included, are laid out once as a uint8 tensor on the device;
an epoch draws one set of random parameters per image, and each batch is cropped, flipped, jittered
and normalised in a handful of tensor operations. Whatever is not understood with certainty keeps
the strategy's own loader, and the log says so.
"""

import logging
import math
import pickle
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from avalanche.benchmarks.utils.data import AvalancheDataset
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    default_collate,
)

from avalanche_memo.training.batch_transforms import (
    Normalize,
    RandomResizedCrop,
    Recipe,
    UnsupportedError,
    channels_first,
    parse_transforms,
)
from avalanche_memo.training.compression import EitherImages, EncodedImages, OriginalImages
from avalanche_memo.training.samples import (
    Part,
    own_transforms,
    pil_image,
    pixel_array,
    sample_parts,
)

__all__ = [
    "DecodedImages",
    "ResidentLoader",
    "make_resident",
    "resident_loader",
    "shuffled_loader",
]

logger = logging.getLogger("avalanche_memo")


def shuffled_loader(
    strategy: Any,
    images: int | None = None,
    num_workers: int = 0,
    shuffle: bool = True,
    pin_memory: bool | None = None,
    persistent_workers: bool = False,
    drop_last: bool = False,
    **kwargs: Any,
) -> DataLoader[Any]:
    """Return a loader of a strategy's adapted data, every sample once an epoch.

    Avalanche's default loader instead fixes each task label's share of a batch, and repeats the
    samples of the smaller tasks.

    :param strategy: the strategy.
    :param images: how many samples an epoch has at most, drawn anew each time.
    :param persistent_workers: whether workers live on from epoch to epoch; not in a strategy that
        saves checkpoints.
    :param drop_last: whether a smaller last batch is left out, unless it is the only one.
    :param kwargs: this and the other arguments are those of `strategy.train`.
    """
    dataset = strategy.adapted_dataset
    # What a worker draws depends on the epochs that it has seen, which a resumed run can't make up.
    persistent_workers = persistent_workers and getattr(strategy, "checkpoint", None) is None
    samples = len(dataset) if images is None else min(images, len(dataset))
    part = samples < len(dataset)
    return DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        shuffle=None if part else shuffle,
        sampler=RandomSampler(dataset, num_samples=samples) if part else None,
        collate_fn=dataset.collate_fn,
        num_workers=num_workers,
        persistent_workers=persistent_workers and num_workers > 0,
        pin_memory=strategy.device.type == "cuda" if pin_memory is None else pin_memory,
        drop_last=drop_last and samples >= strategy.train_mb_size,
    )


def _attribute(attribute: Any) -> Tensor:
    """Return an integer data attribute (targets, task labels) as int64 ``[N]``."""
    values = np.empty(len(attribute), np.int64)
    everything = np.arange(len(attribute))
    try:
        for part in sample_parts(attribute.data, everything, everything, None):
            if isinstance(part.leaf, (Tensor, np.ndarray)):
                values[part.positions] = np.asarray(part.leaf[part.indices])
            else:
                values[part.positions] = [int(part.leaf[i]) for i in part.indices.tolist()]
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"the attribute {attribute.name} is not integer") from error
    return torch.from_numpy(values)


class _Decoder(Dataset[Tensor]):
    """The images of a leaf, made ready to be resident; a data set, so that workers can share it."""

    def __init__(self, leaf: Any, indices: Sequence[int], recipe: Recipe) -> None:
        self.leaf, self.indices, self.recipe = leaf, indices, recipe

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        """Return one image, uint8 ``[C, H, W]``."""
        return self.recipe.prepare(pil_image(self.leaf, self.indices[position]))


class DecodedImages:
    """The images most lately decoded, up to a byte limit, so that each is decoded once per run."""

    def __init__(self, byte_limit: int) -> None:
        self.byte_limit = byte_limit
        self._images: OrderedDict[tuple[int, str, int], tuple[Any, Tensor]] = OrderedDict()
        self._bytes = 0

    def load(self, part: Part, recipe: Recipe, num_workers: int) -> Iterator[tuple[int, Tensor]]:
        """Yield a position in the outer data set and its image ``[C, H, W]``, in any order."""
        missing: list[tuple[int, int]] = []
        for position, index in zip(part.positions.tolist(), part.indices.tolist(), strict=True):
            key = (id(part.leaf), recipe.prefix_key, index)
            if key in self._images:
                self._images.move_to_end(key)
                yield position, self._images[key][1]
            else:
                missing.append((position, index))
        loader: DataLoader[Any] = DataLoader(
            _Decoder(part.leaf, [index for _, index in missing], recipe),
            batch_size=32,
            collate_fn=_as_arrays,  # tensors would keep a file descriptor open each
            num_workers=num_workers,
        )
        images = (torch.from_numpy(array) for batch in loader for array in batch)
        for (position, index), image in zip(missing, images, strict=False):
            if isinstance(part.leaf, EncodedImages | OriginalImages):
                yield position, image  # The leaf is of one experience: none asks for it again.
                continue
            # The leaf goes along, so that its id is not used again.
            key = (id(part.leaf), recipe.prefix_key, index)
            self._bytes += image.nbytes if key not in self._images else 0
            self._images[key] = part.leaf, image
            while self._bytes > self.byte_limit:
                self._bytes -= self._images.popitem(last=False)[1][1].nbytes
            yield position, image


def _as_arrays(batch: list[Tensor]) -> list[npt.NDArray[np.uint8]]:
    """Return the tensors of a batch as arrays."""
    return [image.numpy() for image in batch]


class ResidentLoader:
    """Batches of a data set whose images are resident, as its default DataLoader gives them.

    Iterating yields lists ``[x, y]``, or ``[x, y, t]`` where samples carry task labels: x float32
    ``[B, C, H, W]``, y and t int64 ``[B]``, all on the device; the last batch may be smaller. All
    random numbers of an epoch are drawn from torch's global CPU generator when iteration begins,
    so the generator's state at an epoch's start determines the epoch.

    :param images: uint8 images ``[N, C, H, W]``, before the recipe's batched transforms.
    :param labels: int64 tensors ``[N]``: targets, then task labels if there are any.
    :param recipe: the transforms.
    :param others: int64 ``[N]``: which row of the images may stand in for an image, which it does
        with ``probability``, drawn anew each epoch; there are then more images than labels.
    :param probability: see ``others``.
    :param batch_size: images per batch.
    :param shuffle: whether each epoch has a new order.
    :param samples: how many samples an epoch has, drawn anew each time if it is shuffled; all where
        it is not given.
    :param device: where the images and the batches live.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[Tensor],
        recipe: Recipe,
        *,
        others: Tensor | None = None,
        probability: float = 0.0,
        batch_size: int,
        shuffle: bool,
        samples: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.image_size: tuple[int, int] = (images.shape[2], images.shape[3])
        self.images = recipe.store(images.to(device))
        self.labels = [label.to(device) for label in labels]
        self.samples = len(self.labels[0]) if samples is None else samples
        self.others, self.probability = others, probability

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        n, device = self.samples, self.images.device
        everything = len(self.labels[0])
        order = (torch.randperm(everything) if self.shuffle else torch.arange(everything))[:n]
        source = order
        if self.others is not None:
            source = torch.where(torch.rand(n) < self.probability, self.others[order], order)
        draws = self.recipe.draw(n, *self.image_size)
        # One transfer per epoch rather than one per batch.
        return self._batches(
            order.to(device),
            source.to(device),
            [None if drawn is None else drawn.to(device) for drawn in draws],
        )

    def _batches(
        self, order: Tensor, source: Tensor, draws: list[Tensor | None]
    ) -> Iterator[list[Tensor]]:
        for start in range(0, len(order), self.batch_size):
            rows = slice(start, start + self.batch_size)
            index = order[rows]
            drawn = [None if d is None else d[rows] for d in draws]
            x = self.recipe.gather(self.images, source[rows], drawn)
            yield [x, *(label[index] for label in self.labels)]


def _same(ours: list[Tensor], reference: Any, recipe: Recipe) -> bool:
    """Tell whether one sample's batch equals the data set's own, up to rounding."""
    if not isinstance(reference, list) or len(ours) != len(reference):
        return False
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(ours, reference, strict=True)):
        return False
    resized = any(isinstance(op, RandomResizedCrop) for op in recipe.ops)
    normalize = cast(Normalize, recipe.ops[-1])
    atol = (1.01 / 255 if resized else 1e-6) / min(1.0, *normalize.std)
    same_images = torch.allclose(ours[0], reference[0], rtol=1e-5, atol=atol)
    return same_images and all(map(torch.equal, ours[1:], reference[1:]))


def _check(
    dataset: Any,
    images: Tensor,
    labels: Sequence[Tensor],
    recipe: Recipe,
    others: Tensor,
    probability: float,
    samples: set[int],
) -> None:
    """Compare samples, and the random numbers drawn for them, with the data set's own.

    :param others: the row that may stand in for each image, with a probability; its own for none.
    :param probability: see ``others``.
    :param samples: the positions of the samples to compare.
    :raises UnsupportedError: if a sample differs, or is drawn with other random numbers.
    """
    state = torch.get_rng_state()
    for i in sorted(samples):
        before = _other_random_states()
        reference = default_collate([dataset[i]])
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        row = i
        if others[i] != i and torch.rand(1) < probability:
            row = int(others[i])
        drawn = recipe.draw(1, images.shape[2], images.shape[3])
        if not torch.equal(torch.get_rng_state(), after) or _other_random_states() != before:
            raise UnsupportedError("the data set draws random numbers of its own")
        torch.set_rng_state(state)
        index = torch.zeros(1, dtype=torch.int64)
        x = recipe.gather(recipe.store(images[row : row + 1]), index, drawn)
        if not _same([x, *(label[i : i + 1] for label in labels)], reference, recipe):
            raise UnsupportedError(f"sample {i} differs from the data set's own")


def _other_random_states() -> bytes:
    """Return the states of Python's and numpy's global generators."""
    return pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: NPY002


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave no trace in the global generators."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _with_both(parts: list[Part], n: int) -> tuple[list[Part], Tensor, float]:
    """Lay out, for images that others may replace, both: the others after all ``n`` images.

    :return: the parts, the row that may stand in for each image, and the probability.
    :raises UnsupportedError: if there are several probabilities.
    """
    both: list[Part] = []
    others, rows = torch.arange(n), n
    probabilities = {p.leaf.probability for p in parts if isinstance(p.leaf, EitherImages)}
    for part in parts:
        if isinstance(part.leaf, EitherImages):
            added = np.arange(rows, rows + len(part.positions))
            others[part.positions] = torch.from_numpy(added)
            rows += len(added)
            both.append(replace(part, leaf=part.leaf.others, positions=added))
            part = replace(part, leaf=part.leaf.originals)
        both.append(part)
    if len(probabilities) > 1:
        raise UnsupportedError("several probabilities of a replacement")
    return both, others, max(probabilities, default=0.0)


def _labels(dataset: Any) -> list[Tensor]:
    """Return the targets, then what else samples carry, each int64 ``[N]``."""
    attributes = list(dataset._data_attributes.values())
    targets = [a for a in attributes if a.name == "targets" and not a.use_in_getitem]
    if not targets:
        raise UnsupportedError("the data set has no targets")
    return [_attribute(a) for a in targets + [a for a in attributes if a.use_in_getitem]]


def _fill(
    images: Tensor, part: Part, recipe: Recipe, decoded: DecodedImages, num_workers: int
) -> None:
    """Write a part's images into their rows of all images ``[N, C, H, W]``."""
    array = pixel_array(part.leaf)
    found: Any = decoded.load(part, recipe, num_workers)
    if array is not None and not recipe.prefix:
        chunk = channels_first(torch.as_tensor(array[part.indices]))
        found = zip([part.positions], chunk[None], strict=True)
    for rows, image in found:
        if image.shape[-3:] != images.shape[1:]:
            raise UnsupportedError("images of different sizes")
        images[rows] = image


@_random_states_kept()
def make_resident(
    dataset: Any,
    *,
    batch_size: int,
    shuffle: bool,
    samples: int | None = None,
    device: torch.device | str,
    byte_limit: int,
    decoded: DecodedImages,
    num_workers: int,
) -> ResidentLoader:
    """Make the images of a data set resident; see :func:`resident_loader`.

    :raises UnsupportedError: with the reason, if they cannot be.
    """
    if not isinstance(dataset, AvalancheDataset) or not len(dataset):
        raise UnsupportedError(f"{type(dataset).__name__} is not an Avalanche data set, or empty")
    if dataset.collate_fn is not default_collate:
        raise UnsupportedError("a collate function of the data set's own")
    n = len(dataset)
    everything = np.arange(n)
    flat = dataset._flat_data
    parts = list(sample_parts(flat, everything, everything, flat._transform_groups.current_group))
    recipe, *other_recipes = [parse_transforms([*own_transforms(p.leaf), *p.chain]) for p in parts]
    if any(other != recipe for other in other_recipes):
        raise UnsupportedError("parts of the data set have different transforms")
    labels = _labels(dataset)

    # One image tells the size, before the memory of all is taken.
    probe = _Decoder(parts[0].leaf, parts[0].indices[:1].tolist(), recipe)[0]
    parts, others, probability = _with_both(parts, n)
    rows = sum(len(part.positions) for part in parts)
    size = rows * recipe.store(probe[None]).nbytes
    if size > byte_limit:
        raise UnsupportedError(
            f"{size / 2**20:.0f} MiB of images, over the limit of {byte_limit / 2**20:.0f} MiB"
        )
    images = torch.empty(rows, *probe.shape, dtype=torch.uint8)
    for part in parts:
        _fill(images, part, recipe, decoded, num_workers)
    first_of_leaf = {id(part.leaf): int(part.positions[0]) for part in reversed(parts)}
    compared = {0, n // 2, n - 1, *(first for first in first_of_leaf.values() if first < n)}
    _check(dataset, images, labels, recipe, others, probability, compared)
    return ResidentLoader(
        images,
        labels,
        recipe,
        others=others if probability > 0 else None,
        probability=probability,
        batch_size=batch_size,
        shuffle=shuffle,
        samples=samples,
        device=device,
    )


def resident_loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    device: torch.device | str = "cpu",
    byte_limit: int = 2 << 30,
) -> ResidentLoader | None:
    """Return a loader over an Avalanche data set in its current transform group, if possible.

    :param dataset: an `AvalancheDataset` of images; `dataset.eval()` for herding and features.
    :param batch_size: images per batch.
    :param shuffle: whether each epoch has a new order.
    :param device: where the images and the batches live.
    :param byte_limit: the most bytes that the resident images may take.
    :return: the loader, or None where the images or their transforms do not allow it.
    """
    try:
        return make_resident(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            device=device,
            byte_limit=byte_limit,
            decoded=DecodedImages(0),
            num_workers=0,
        )
    except UnsupportedError as reason:
        logger.debug("no resident loader: %s", reason)
        return None
