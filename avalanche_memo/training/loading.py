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
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedDataLoader,
    MultiDatasetDataLoader,
    ReplayDataLoader,
    SingleDatasetDataLoader,
    TaskBalancedDataLoader,
)
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from avalanche_memo.training.batch_transforms import (
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Recipe,
    UnsupportedError,
    channels_first,
    parse_chain,
    unfold_transforms,
)
from avalanche_memo.training.compression import EitherImages
from avalanche_memo.training.samples import (
    Part,
    own_transforms,
    pil_image,
    pixel_array,
    sample_parts,
)

__all__ = ["ResidentBatches", "ResidentLoader", "resident_loader", "shuffled_loader"]

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
    :param kwargs: this and the other arguments are those of `strategy.train`.
    """
    dataset = strategy.adapted_dataset
    # What a worker draws depends on the epochs that it has seen, which a resumed run can't make up.
    persistent_workers = persistent_workers and getattr(strategy, "checkpoint", None) is None
    part = images is not None and images < len(dataset)
    return DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        shuffle=None if part else shuffle,
        sampler=RandomSampler(dataset, num_samples=images) if part else None,
        collate_fn=dataset.collate_fn,
        num_workers=num_workers,
        persistent_workers=persistent_workers and num_workers > 0,
        pin_memory=strategy.device.type == "cuda" if pin_memory is None else pin_memory,
        drop_last=drop_last,
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


class _DecodedImages:
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
    :param channels_last: whether x has the channels-last memory format.
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
        channels_last: bool = False,
    ) -> None:
        self.recipe = recipe
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.channels_last = channels_last
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
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
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


@_random_states_kept()
def _make(
    dataset: Any,
    *,
    batch_size: int,
    shuffle: bool,
    samples: int | None = None,
    device: torch.device | str,
    byte_limit: int,
    channels_last: bool,
    decoded: _DecodedImages,
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
    recipes = []
    for part in parts:
        chain = [step for transform in part.chain for step in unfold_transforms(transform)]
        recipes.append(parse_chain(own_transforms(part.leaf) + chain))
    recipe = recipes[0]
    if any(other != recipe for other in recipes[1:]):
        raise UnsupportedError("parts of the data set have different transforms")
    attributes = list(dataset._data_attributes.values())
    targets = [a for a in attributes if a.name == "targets" and not a.use_in_getitem]
    if not targets:
        raise UnsupportedError("the data set has no targets")
    labels = [_attribute(a) for a in targets + [a for a in attributes if a.use_in_getitem]]

    # One image tells the size, before the memory of all is taken.
    probe = _Decoder(parts[0].leaf, parts[0].indices[:1].tolist(), recipe)[0]
    channels, height, width = probe.shape
    parts, others, probability = _with_both(parts, n)
    rows = sum(len(part.positions) for part in parts)
    size = rows * channels * math.prod(recipe.store_size(height, width))
    if size > byte_limit:
        raise UnsupportedError(
            f"{size / 2**20:.0f} MiB of images, over the limit of {byte_limit / 2**20:.0f} MiB"
        )
    images = torch.empty(rows, *probe.shape, dtype=torch.uint8)
    for part in parts:
        array = pixel_array(part.leaf)
        if array is not None and not recipe.prefix:
            chunk = channels_first(torch.as_tensor(array[part.indices]))
            if chunk.shape[1:] != probe.shape:
                raise UnsupportedError("images of different sizes")
            images[part.positions] = chunk
            continue
        for position, image in decoded.load(part, recipe, num_workers):
            if image.shape != probe.shape:
                raise UnsupportedError("images of different sizes")
            images[position] = image
    for op in recipe.ops:
        if isinstance(op, RandomCrop) and any(
            have < want for have, want in zip(op.padded_size(height, width), op.size, strict=True)
        ):
            raise UnsupportedError("a crop larger than the image")
        height, width = op.output_size(height, width)
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
        channels_last=channels_last,
    )


def resident_loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    device: torch.device | str = "cpu",
    byte_limit: int = 2 << 30,
    channels_last: bool = False,
) -> ResidentLoader | None:
    """Return a loader over an Avalanche data set in its current transform group, if possible.

    :param dataset: an `AvalancheDataset` of images; `dataset.eval()` for herding and features.
    :param batch_size: images per batch.
    :param shuffle: whether each epoch has a new order.
    :param device: where the images and the batches live.
    :param byte_limit: the most bytes that the resident images may take.
    :param channels_last: whether batches have the channels-last memory format.
    :return: the loader, or None where the images or their transforms do not allow it.
    """
    try:
        return _make(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            device=device,
            byte_limit=byte_limit,
            channels_last=channels_last,
            decoded=_DecodedImages(0),
            num_workers=0,
        )
    except UnsupportedError as reason:
        logger.debug("no resident loader: %s", reason)
        return None


# --- the plugin -----------------------------------------------------------------------------------

_AVALANCHE_LOADERS = (
    GroupBalancedDataLoader,
    MultiDatasetDataLoader,
    ReplayDataLoader,
    SingleDatasetDataLoader,
    TaskBalancedDataLoader,
)


def _plain(loader: Any) -> tuple[Any, int, bool, int | None]:
    """Return what a loader batches, if it does nothing else.

    :return: the data set, the batch size, whether epochs are shuffled, how many samples one has.

    :raises UnsupportedError: if it mixes groups, samples in its own way or drops samples.
    """
    name = type(loader).__name__
    batch_size: Any
    samples: int | None = None
    if type(loader) in _AVALANCHE_LOADERS:
        if len(loader.datasets) != 1 or loader.never_ending or loader.distributed_sampling:
            raise UnsupportedError(f"{name} composes its batches itself")
        dataset, options = loader.datasets[0], loader.loader_kwargs
        if any(options.get(own) for own in ("drop_last", "sampler", "batch_sampler", "generator")):
            raise UnsupportedError(f"{name} samples in its own way")
        batch_size, shuffle = loader.batch_sizes[0], bool(options.get("shuffle", False))
        collate = options["collate_fn"]
    elif type(loader) is DataLoader:
        sampler: Any = loader.sampler
        once = type(sampler) is SequentialSampler or (
            type(sampler) is RandomSampler
            and not sampler.replacement
            and sampler.num_samples <= len(sampler.data_source)
        )
        # A sampler may go over other data, and a batch sampler of the user's has its own sampler.
        once = once and sampler.data_source is loader.dataset and loader.batch_size is not None
        own = loader.drop_last or loader.generator or getattr(sampler, "generator", None)
        if not once or own or type(loader.batch_sampler) is not BatchSampler:
            raise UnsupportedError("the DataLoader samples in its own way")
        dataset, batch_size, samples = loader.dataset, loader.batch_size, len(sampler)
        shuffle, collate = type(sampler) is RandomSampler, loader.collate_fn
    else:
        raise UnsupportedError(f"{name} composes its batches itself")
    if collate is not default_collate:
        raise UnsupportedError(f"{name} has a collate function of its own")
    return dataset, batch_size, shuffle, samples


def _keep_workers(loader: Any) -> Any:
    """Return a loader with the same batches whose workers live on from epoch to epoch."""
    if type(loader) in _AVALANCHE_LOADERS:
        if loader.loader_kwargs.get("num_workers", 0):
            loader.loader_kwargs["persistent_workers"] = True
    elif type(loader) is DataLoader and loader.num_workers and not loader.persistent_workers:
        return DataLoader(
            loader.dataset,
            batch_sampler=loader.batch_sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=True,
        )
    return loader


class ResidentBatches(SupervisedPlugin, supports_distributed=False):  # type: ignore[call-arg]
    """Replaces the loaders of any strategy by :class:`ResidentLoader` wherever that is certain.

    It recognises RandomCrop, RandomHorizontalFlip, ColorJitter (brightness), RandomResizedCrop,
    ToTensor and Normalize, after any Resize, CenterCrop, Pad and Grayscale, which are applied once.
    Before it takes over, samples are compared with the data set's own from the same random state;
    of a data set that draws no random numbers, an image is taken to be the same each time.
    Otherwise the strategy's loader stays, and its workers, if `train` was given any, are kept
    through the epochs, unless the strategy saves checkpoints. Loaders that compose their batches
    (`ReplayDataLoader`, several task labels) always stay. Put this plugin after those that set the
    loader. The logger "avalanche_memo" says which path is on, once per change.

    :param byte_limit: the most bytes that the resident images of a loader may take; images that
        had to be decoded from files are kept in host memory within the same limit.
    :param train: whether training batches are replaced.
    :param evaluation: whether evaluation batches are replaced.
    :param eval_batch_size: the least batch size of evaluation, where results do not depend on it;
        None for 512 on an accelerator and `eval_mb_size` on the CPU, where larger batches leave
        the caches (ResNet-32: 512 at once was 1.6 to 3 times slower than 32).
    :param channels_last: whether batches have the channels-last memory format.
    """

    def __init__(
        self,
        byte_limit: int = 2 << 30,
        *,
        train: bool = True,
        evaluation: bool = True,
        eval_batch_size: int | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.byte_limit = byte_limit
        self.train = train
        self.evaluation = evaluation
        self.eval_batch_size = eval_batch_size
        self.channels_last = channels_last
        self._decoded = _DecodedImages(byte_limit)
        self._logged: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Decoded images are a cache: copies and checkpoints go without.
        return {**self.__dict__, "_decoded": _DecodedImages(self.byte_limit)}

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the training loader."""
        if self.train:
            self._replace(strategy, "training", 1, kwargs.get("num_workers", 0))

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the evaluation loader."""
        if self.evaluation:
            least = self.eval_batch_size
            if least is None:
                least = 1 if torch.device(strategy.device).type == "cpu" else 512
            self._replace(strategy, "evaluation", least, kwargs.get("num_workers", 0))

    def _replace(self, strategy: Any, what: str, least_batch: int, num_workers: int) -> None:
        try:
            dataset, batch_size, shuffle, samples = _plain(strategy.dataloader)
            strategy.dataloader = loader = _make(
                dataset,
                batch_size=max(batch_size, least_batch),
                shuffle=shuffle,
                samples=samples,
                device=strategy.device,
                byte_limit=self.byte_limit,
                channels_last=self.channels_last,
                decoded=self._decoded,
                num_workers=num_workers,
            )
        except UnsupportedError as reason:
            # An evaluation is one pass: there is nothing to keep. And what a worker draws depends
            # on the epochs that it has seen, which a resumed run could not make up for.
            if what == "training" and getattr(strategy, "checkpoint", None) is None:
                strategy.dataloader = _keep_workers(strategy.dataloader)
            self._log(logging.WARNING, what, "the strategy's own loader", str(reason))
        else:
            sizes = f"{loader.images.nbytes / 2**20:.1f} of at most {self.byte_limit / 2**20:.0f}"
            path = f"a resident tensor on {strategy.device}"
            self._log(logging.INFO, what, path, f"transforms recognised, {sizes} MiB")

    def _log(self, level: int, what: str, path: str, reason: str) -> None:
        """Log one line if the path, or the reason for falling back, has changed."""
        key = path if level == logging.INFO else reason
        if self._logged.get(what) != key:
            self._logged[what] = key
            logger.log(level, "%s batches: %s (%s)", what, path, reason)
