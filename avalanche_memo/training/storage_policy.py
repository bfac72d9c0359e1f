"""The exemplar memory: herding as in iCaRL (Rebuffi et al., CVPR 2017)."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils import concat_datasets
from avalanche.training.storage_policy import ExemplarsBuffer
from torch import Tensor
from torch.utils.data import DataLoader

from avalanche_memo.training.batch_transforms import UnsupportedError
from avalanche_memo.training.compression import Compression, lowest_quality, through_codec
from avalanche_memo.training.loading import resident_loader
from avalanche_memo.training.ranges import at_least_one
from avalanche_memo.training.samples import original_image, sample_origins

__all__ = [
    "MEMORY_RATES",
    "HerdingBuffer",
    "MemoryRates",
    "balanced_choice",
    "check_extractor",
    "dataset_features",
    "dataset_logits",
    "herding_order",
]

MEMORY_RATES: dict[int, tuple[float, ...]] = {
    steps: (steps / 25,) * (steps + 1) for steps in (5, 10, 25, 50)
}
"""Rates by number of steps after the first experience: 0.2, 0.4, 1 and 2 throughout. On CIFAR-100,
Base-50, each is 1000 exemplars more, half as many again as 20 of each class at the end. A rate that
stays the same lets all classes hold equally many. These lists are this package's own."""


@dataclass(frozen=True)
class MemoryRates:
    """A memory that holds more than its size in some experiences (MEM).

    After experience t, counted from 0, it may hold ``rates[t] * increment * images_per_class``
    exemplars, rounded down, beyond its size.

    :param rates: a rate for each experience.
    :param increment: classes of a later experience.
    :param images_per_class: training images of a class.
    :raises ValueError: if a rate is negative or not finite, or a number below 1.
    """

    rates: tuple[float, ...]
    increment: int
    images_per_class: int

    def __post_init__(self) -> None:
        rates = list(self.rates) if isinstance(self.rates, Sequence) else self.rates
        numbers = isinstance(rates, list) and all(isinstance(r, int | float) for r in rates)
        if not rates or not numbers or not all(0 <= r < math.inf for r in rates):
            raise ValueError(
                f"rates: expected a finite number of at least 0 for each experience, got {rates!r}"
            )
        object.__setattr__(self, "rates", tuple(rates))
        for name in ("increment", "images_per_class"):
            at_least_one(name, getattr(self, name))

    def extra(self, experience: int) -> int:
        """Return how many exemplars more may be held after an experience, counted from 0.

        :raises ValueError: if there is no rate for it.
        """
        if not 0 <= experience < len(self.rates):
            raise ValueError(
                f"rates: expected a rate for experience {experience}, got {len(self.rates)} rates"
            )
        # 0.29 * 100 is 28.999999999999996 in floating point.
        return math.floor(round(self.rates[experience] * self.increment * self.images_per_class, 6))


def herding_order(features: Tensor, m: int) -> Tensor:
    """Choose samples so that the mean of the first k is, for each k, as near the mean as can be.

    iCaRL, algorithm 4: ``p_k = argmin_x || mu - (phi(x) + sum_{j<k} phi(p_j)) / k ||`` over the
    samples not chosen yet. Multiplied by k and expanded, the squared distance differs from
    ``||f||^2 + 2 f.s - 2 k f.mu`` by a term common to all x; ``f.s`` is kept up to date by one
    matrix-vector product a step, so m choices cost ``O(m n D)`` and need no ``n x n`` matrix.

    :param features: ``[n, D]``; iCaRL normalises them first, this function does not.
    :param m: how many to choose; a larger number than n chooses each once.
    :return: ``[min(m, n)]`` row numbers, best first.
    :raises ValueError: if m is negative or the features are not a matrix.
    :raises FloatingPointError: if a feature is not finite.
    """
    if features.ndim != 2:
        raise ValueError(f"features: expected a matrix [n, D], got shape {tuple(features.shape)}")
    if m < 0:
        raise ValueError(f"m: expected a number of at least 0, got {m}")
    if not features.isfinite().all():
        raise FloatingPointError("features: expected finite numbers, got others; lower the rate")
    features = features.double()
    squares = features.square().sum(dim=1)
    to_mean = features @ features.mean(dim=0) if len(features) else squares
    to_sum = torch.zeros_like(squares)
    order = torch.empty(min(m, len(features)), dtype=torch.long, device=features.device)
    for k in range(1, len(order) + 1):
        best = torch.argmin(squares + 2 * to_sum - 2 * k * to_mean)
        order[k - 1] = best
        to_sum += features @ features[best]
        squares[best] = torch.inf
    return order


def balanced_choice(targets: Tensor, share: float, seed: int) -> Tensor:
    """Choose at random as many samples of each class: a share of the rarest's, at least one.

    :param targets: class ids ``[n]``.
    :param share: of the rarest class's samples, rounded down.
    :param seed: of the choice.
    :return: row numbers, class by class.
    """
    classes, counts = torch.unique(targets, return_counts=True)
    # 0.29 * 100 is 28.999999999999996 in floating point.
    per_class = max(1, math.floor(round(share * int(counts.min()), 6)))
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    return torch.cat([shuffled[targets[shuffled] == c][:per_class] for c in classes])


def check_extractor(model: Any) -> None:
    """Check that a model can extract features.

    :raises TypeError: if it can't.
    """
    if not hasattr(model, "extract_features"):
        raise TypeError(
            "model: expected a module with extract_features(images), such as an "
            f"ExpandableNetwork, got {type(model).__name__}"
        )


def dataset_features(model: Any, dataset: Any, device: torch.device | str) -> Tensor:
    """Return the L2-normalised features ``[n, D]`` of a data set, in its order.

    The model runs in evaluation mode, on the data set's evaluation transforms, and each of its
    modules is left in the mode in which it came.

    :param model: a module with ``extract_features``.
    :param dataset: an Avalanche data set of n samples.
    :param device: where to compute.
    :raises TypeError: if the model can't extract features.
    """
    check_extractor(model)
    features = _evaluated(model, model.extract_features, dataset, device)
    return F.normalize(features.float(), dim=1)


def dataset_logits(model: Any, dataset: Any, device: torch.device | str) -> Tensor:
    """Return the logits ``[n, W]`` of a data set, computed as :func:`dataset_features` does."""
    return _evaluated(model, model, dataset, device)


class HerdingBuffer(ExemplarsBuffer):
    """Exemplars of all classes seen, herded on L2-normalised features in evaluation mode.

    Each class holds ``floor(max_size / classes seen)`` exemplars, or a fixed number; a class with
    fewer samples holds each once. Older classes keep the front of their own order. A class that
    comes again is herded anew from its exemplars and its new samples together. Exemplars are
    kept as positions in the experiences' data sets, so nothing is copied and any transform,
    relabelling and task label stays as it was.

    :param max_size: exemplars in all.
    :param exemplars_per_class: a fixed number per class instead.
    :param rerank: whether older classes are ranked again with the present features.
    :param rates: what the memory may hold beyond its size, or beyond the fixed number for each
        class seen, by experience; all classes share it. Exemplars once dropped don't come back, so
        where a rate rises faster than the classes, the older ones stay at what they hold.
    :param spend_remainder: whether the first classes hold one more each, so that none of the
        memory is left.
    :param compression: how exemplars are kept; as raw pixels if not given. Each class then has the
        bytes of its quota of raw images, at the size the network sees, and holds as many of its
        images' files, best first, as fit, and always the best. No pixel of an old class but those
        files is used again; sizes and modes are looked up in the originals, which must be there.
    :raises ValueError: if a number is below 1.
    :raises TypeError: if rates or compression are something else.
    """

    def __init__(
        self,
        max_size: int = 2000,
        *,
        exemplars_per_class: int | None = None,
        rerank: bool = False,
        rates: MemoryRates | None = None,
        compression: Compression | None = None,
        spend_remainder: bool = False,
    ) -> None:
        at_least_one("max_size", max_size)
        if exemplars_per_class is not None:
            at_least_one("exemplars_per_class", exemplars_per_class)
        if rates is not None and not isinstance(rates, MemoryRates):
            raise TypeError(f"rates: expected MemoryRates or None, got {rates!r}")
        if compression is not None and not isinstance(compression, Compression):
            raise TypeError(f"compression: expected a Compression or None, got {compression!r}")
        super().__init__(max_size)
        self.exemplars_per_class = exemplars_per_class
        self.rerank = rerank
        self.rates = rates
        self.compression = compression
        self.spend_remainder = spend_remainder
        self.order: dict[int, Tensor] = {}
        """Per class, ``[m, 2]``: number of the source and position in its data set, best first."""
        self._sources: list[tuple[int, Any]] = []
        self._files: dict[tuple[int, int], bytes] = {}

    @property
    def exemplar_bytes(self) -> int:
        """Bytes of the exemplars' files, or as uint8 pixels at the size the network sees."""
        if self.compression is not None:
            return sum(map(len, self._files.values()))
        return len(self.buffer) * _raw_bytes(self.buffer) if self.order else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "HerdingBuffer":
        # Data sets never change, and a sample is known by the data set that it is of.
        memo |= {id(data): data for data in (self.buffer, *(data for _, data in self._sources))}
        memo[id(self)] = copied = copy.copy(self)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def capacity(self, n_classes: int, experience: int | None = None) -> int:
        """Return how many exemplars may be held in all when ``n_classes`` have been seen.

        :param n_classes: classes seen.
        :param experience: after which experience, counted from 0; the latest if not given.
        :raises ValueError: if the memory has no rate for the experience.
        """
        fixed = self.exemplars_per_class
        exemplars = int(self.max_size if fixed is None else fixed * n_classes)
        if self.rates is not None:
            latest = max(0, len(self._sources) - 1)
            exemplars += self.rates.extra(latest if experience is None else experience)
        return exemplars

    def quota(self, n_classes: int, experience: int | None = None, place: int | None = None) -> int:
        """Return the exemplars a class holds when ``n_classes`` have been seen.

        :param n_classes: classes seen.
        :param experience: after which experience, counted from 0; the latest if not given.
        :param place: of the class in the order of appearance, from 0; the last if not given.
        :raises ValueError: if the memory is smaller than the number of classes, or has no rate for
            the experience.
        """
        if self.exemplars_per_class is None and self.max_size < n_classes:
            raise ValueError(
                f"mem_size: expected at least one exemplar for each of {n_classes} classes, "
                f"got {self.max_size}"
            )
        spent = n_classes - 1 - place if self.spend_remainder and place is not None else 0
        return (self.capacity(n_classes, experience) + spent) // n_classes

    def _quotas(self, classes: Sequence[int]) -> dict[int, int]:
        """Return what each of the classes seen, in order of appearance, holds."""
        return {c: self.quota(len(classes), place=place) for place, c in enumerate(classes)}

    def check(self, dataset: Any, n_classes: int) -> None:
        """Check, before training, that each of ``n_classes`` can hold an exemplar.

        :param dataset: the data of an experience.
        :param n_classes: classes of the stream.
        :raises ValueError: if the memory is smaller than the number of classes, or at last has no
            room for a compressed image in each class; or if the codec can't hold the first image.
        """
        room = self.quota(n_classes, 0 if self.rates is None else len(self.rates.rates) - 1)
        if self.compression is None:
            return
        known = 2 + sum(a.use_in_getitem for a in dataset._data_attributes.values())
        if (fields := len(dataset.eval()[0])) != known:
            raise ValueError(
                f"compression: expected samples of {known} fields, image, target and attributes, "
                f"got {fields}"
            )
        lowest = 1 if self.compression.quality == "auto" else None
        try:
            size = len(self.compression.encode(original_image(dataset, 0), lowest))
            through_codec(dataset.subset([0]), self.compression, quality=lowest)
        except UnsupportedError as reason:
            raise ValueError(f"compression: expected images to encode, but {reason}") from None
        room *= _raw_bytes(dataset)
        if size > room:
            raise ValueError(
                f"mem_size: expected room for a compressed image, such as the first one of {size} "
                f"bytes, in each of {n_classes} classes, got {room} bytes"
            )

    def post_adapt(self, agent_state: Any, exp: Any) -> None:
        """Choose exemplars of an experience's classes and shorten the others'.

        :param agent_state: the strategy, with ``model`` and ``device``.
        :param exp: the experience just learned.
        """
        targets = _targets(exp.dataset)
        source = self._source_of(exp, targets)
        present = [int(c) for c in torch.unique(targets)]
        quotas = self._quotas(list(dict.fromkeys([*self.order, *present])))
        candidates = dict(self.order) if self.rerank else {}
        for c in present:
            positions = torch.nonzero(targets == c).flatten()
            fresh = torch.stack([torch.full_like(positions, source), positions], dim=1)
            old = self.order.get(c, fresh[:0])
            candidates[c] = torch.cat([old, self._not_among(old, fresh)])
        chosen = {c: self._front(order, quotas[c]) for c, order in self.order.items()}
        quality = self._quality(agent_state, exp.dataset)
        for c, rows in candidates.items():
            rows = rows[torch.argsort(rows[:, 0], stable=True)]
            features = dataset_features(agent_state.model, self._dataset(rows), agent_state.device)
            m = quotas[c] if self.compression is None else len(rows)
            chosen[c] = self._front(rows[herding_order(features, m).cpu()], quotas[c], quality)
        self.order = chosen  # Only now, so that an interruption leaves the memory as it was.
        self._rebuild()

    def besides(self, exp: Any) -> Any:
        """Return the exemplars that an experience does not hold itself, as it does if given again.

        :param exp: the experience.
        """
        if self.order.keys().isdisjoint(_targets(exp.dataset).tolist()):
            return self.buffer
        held = set(sample_origins(exp.dataset))
        origins = sample_origins(self._originals(torch.cat(list(self.order.values()))))
        return self.buffer.subset([i for i, own in enumerate(origins) if own not in held])

    def after(self, agent_state: Any, exp: Any) -> "HerdingBuffer":
        """Return a copy that has learned an experience; this buffer stays as it is.

        :param agent_state: the strategy, with ``model`` and ``device``.
        :param exp: the experience.
        """
        copied = copy.copy(self)
        copied._sources, copied._files = list(self._sources), dict(self._files)
        copied.post_adapt(agent_state, exp)
        return copied

    def resize(self, strategy: Any, new_size: int) -> None:
        """Change the number of exemplars in all.

        :param strategy: not used; orders are kept.
        :param new_size: exemplars in all.
        :raises ValueError: if it is smaller than the number of classes held; then nothing changes.
        """
        at_least_one("mem_size", new_size)
        if self.exemplars_per_class is None and new_size < len(self.order):
            raise ValueError(
                f"mem_size: expected at least one exemplar for each of {len(self.order)} classes, "
                f"got {new_size}"
            )
        self.max_size = new_size
        if self.order:
            quotas = self._quotas(list(self.order))
            self.order = {c: self._front(order, quotas[c]) for c, order in self.order.items()}
            self._rebuild()

    def state_dict(self) -> dict[str, Any]:
        """Return the exemplars' positions, and their files: tensors and plain data."""
        return {
            "order": dict(self.order),
            "experiences": [e for e, _ in self._sources],
            "files": {
                "rows": list(self._files),
                "sizes": [len(file) for file in self._files.values()],
                "bytes": torch.from_numpy(
                    np.frombuffer(b"".join(self._files.values()), np.uint8).copy()
                ),
            },
        }

    def load_state_dict(self, state: dict[str, Any], stream: Sequence[Any]) -> None:
        """Take back saved positions.

        :param state: what :meth:`state_dict` returned.
        :param stream: the training stream that the positions point into.
        :raises ValueError: if the stream is another, as one without a seed is in each process.
        """
        _check_stream(state, stream)
        datasets = {e.current_experience: e.dataset for e in stream}
        self._sources = [(e, datasets[e]) for e in state["experiences"]]
        self.order = dict(state["order"])
        files = state["files"]["bytes"].split(state["files"]["sizes"])
        self._files = {
            row: file.numpy().tobytes()
            for row, file in zip(state["files"]["rows"], files, strict=True)
        }
        self._rebuild()

    def _source_of(self, exp: Any, targets: Tensor) -> int:
        number = int(exp.current_experience)
        for source, (known, dataset) in enumerate(self._sources):
            same = known == number and torch.equal(targets, _targets(dataset))
            if same and sample_origins(dataset) == sample_origins(exp.dataset):
                return source
        self._sources.append((number, exp.dataset))
        return len(self._sources) - 1

    def _not_among(self, old: Tensor, fresh: Tensor) -> Tensor:
        """Return the fresh rows whose samples the old ones don't hold already."""
        if not len(old):
            return fresh
        held = set(sample_origins(self._originals(old)))
        origins = sample_origins(self._originals(fresh))
        return fresh[torch.tensor([origin not in held for origin in origins])]

    def _rebuild(self) -> None:
        if self.order:
            rows = torch.cat(list(self.order.values()))
            held = {(source, position) for source, position in rows.tolist()}
            self._files = {row: file for row, file in self._files.items() if row in held}
            self.buffer = self._dataset(rows)

    def _quality(self, agent_state: Any, dataset: Any) -> int | None:
        """Return the quality for an experience's images; ``None`` for the one that is set."""
        compression = self.compression
        if compression is None or compression.quality != "auto":
            return None
        some = dataset.subset(list(range(0, len(dataset), -(-len(dataset) // 256))))

        def features(quality: int | None) -> Tensor:
            images = some if quality is None else through_codec(some, compression, quality=quality)
            return dataset_features(agent_state.model, images, agent_state.device)

        return lowest_quality(features, compression.max_distance)

    def _front(self, rows: Tensor, quota: int, quality: int | None = None) -> Tensor:
        """Return the rows that a class may hold, of those ordered best first."""
        if self.compression is None or not len(rows):
            return rows[:quota]
        room = quota * _raw_bytes(self._originals(rows[:1]))
        for number, (source, position) in enumerate(rows.tolist()):
            row = source, position
            if row not in self._files:
                image = original_image(self._sources[source][1], position)
                self._files[row] = self.compression.encode(image, quality)
            room -= len(self._files[row])
            if room < 0:
                return rows[: max(1, number)]
        return rows

    def _dataset(self, rows: Tensor) -> Any:
        """Return the samples at ``rows``, source by source and otherwise in their order.

        Those that have files are decoded from them.
        """
        originals = self._originals(rows)
        files = [self._files.get((s, p)) for s, p in torch.cat(_by_source(rows)).tolist()]
        if self.compression is None or not any(files):
            return originals
        return through_codec(originals, self.compression, files=files)

    def _originals(self, rows: Tensor) -> Any:
        """Return the samples at ``rows`` as their experiences hold them, in that order."""
        parts = [
            self._sources[int(part[0, 0])][1].subset(part[:, 1].tolist())
            for part in _by_source(rows)
        ]
        return parts[0] if len(parts) == 1 else concat_datasets(parts)


def _targets(dataset: Any) -> Tensor:
    """Return the class ids ``[n]`` of a data set."""
    return torch.as_tensor(list(dataset.targets))


def _check_stream(state: dict[str, Any], stream: Sequence[Any]) -> None:
    """Check that a stream has the samples of a saved memory, as far as their classes tell."""
    found = [e for e in stream if e.current_experience in state["experiences"]]
    targets = {e.current_experience: _targets(e.dataset) for e in found}
    good = len(found) == len(targets) == len(state["experiences"])
    for c, rows in state["order"].items():
        for source, position in rows.tolist() if good else []:
            own = targets[state["experiences"][source]]
            good = good and position < len(own) and int(own[position]) == c
    if not good:
        raise ValueError(
            "stream: expected the training stream that the memory was saved with, its classes in "
            "the same order, got another; a benchmark needs a seed to be the same again"
        )


def _raw_bytes(dataset: Any) -> int:
    return math.prod(dataset.eval()[0][0].shape)


def _by_source(rows: Tensor) -> list[Tensor]:
    return [rows[rows[:, 0] == source] for source in torch.unique(rows[:, 0])]


@torch.no_grad()
def _evaluated(
    model: Any, function: Callable[[Tensor], Tensor], dataset: Any, device: torch.device | str
) -> Tensor:
    """Return what a function of images returns with the model in evaluation mode."""
    dataset, batch_size = dataset.eval(), 128
    loader = resident_loader(dataset, batch_size, device=device)
    # With a generator of its own: a loader draws a seed, whether or not it needs one.
    own = {"collate_fn": dataset.collate_fn, "generator": torch.Generator()}
    batches = loader or DataLoader(dataset, batch_size, **own)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return torch.cat([function(batch[0].to(device)) for batch in batches])
    finally:
        for module, training in modes:
            module.training = training
