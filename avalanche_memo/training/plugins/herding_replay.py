"""Replay of herded exemplars by plain concatenation, as the class-incremental papers do it."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_memo.models.expandable import experience_classes
from avalanche_memo.training.compression import Compression, through_codec
from avalanche_memo.training.loading import shuffled_loader
from avalanche_memo.training.ranges import at_least_one
from avalanche_memo.training.storage_policy import (
    HerdingBuffer,
    MemoryRates,
    check_extractor,
    dataset_features,
)

__all__ = ["HerdingReplayPlugin"]


class HerdingReplayPlugin(SupervisedPlugin):
    """Train on new data and exemplars together, shuffled; herd exemplars after each experience.

    Avalanche's ``ReplayPlugin`` fills half of each batch from the memory; here, as in iCaRL and all
    that followed, every sample of both is seen once an epoch. The exemplars' means serve the
    readout by nearest mean of exemplars (NME).

    :param mem_size: exemplars in all.
    :param exemplars_per_class: a fixed number per class instead.
    :param rerank: whether older classes are herded again with the present features.
    :param rates: what the memory may hold beyond that, by experience.
    :param compression: how exemplars are kept, and which new images pass through the same codec.
    :param spend_remainder: whether the first classes hold one more each, so that none of the
        memory is left.
    :raises ValueError: if a number is below 1; before training, if the memory holds less than one
        exemplar for each class of the stream, or has too few rates for it, or rates by which it
        would hold more than there is, or rates and an online stream.
    """

    def __init__(
        self,
        mem_size: int = 2000,
        *,
        exemplars_per_class: int | None = None,
        rerank: bool = False,
        rates: MemoryRates | None = None,
        compression: Compression | None = None,
        spend_remainder: bool = False,
    ) -> None:
        super().__init__()
        at_least_one("mem_size", mem_size)
        self.buffer = HerdingBuffer(
            mem_size,
            exemplars_per_class=exemplars_per_class,
            rerank=rerank,
            rates=rates,
            compression=compression,
            spend_remainder=spend_remainder,
        )
        self._after: HerdingBuffer | None = None
        self._means: tuple[list[int], Tensor] | None = None
        self._means_of: Any = None

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Check the memory against all classes of the stream, before anything is trained."""
        check_extractor(strategy.model)
        if self.buffer.rates is not None and hasattr(strategy.experience, "origin_experience"):
            raise ValueError("rates: expected whole experiences, got a part of one (online stream)")
        self.buffer.check(strategy.experience.dataset, self.n_classes(strategy))
        if self.buffer.rates is not None and not self.buffer.order:
            _check_rates(self.buffer, _stream(strategy.experience))

    def n_classes(self, strategy: Any) -> int:
        """Return how many classes there are, those of the whole stream and those held already.

        Of a stream whose length is not known, the present experience's are taken for all.
        """
        classes = {c for e in _stream(strategy.experience) for c in experience_classes(e)}
        return len(classes | set(self.buffer.order))

    def fewest_exemplars(self, strategy: Any) -> int:
        """Return how many exemplars of a class there are at least when a later experience begins.

        Of a stream whose length is not known, when its classes have been seen.
        """
        seen: set[int] = set()
        quotas = []
        for number, experience in enumerate(_stream(strategy.experience)):
            if seen:
                quotas.append(self.buffer.quota(len(seen), number - 1))
            seen |= set(experience_classes(experience))
        return min(quotas, default=self.buffer.quota(self.n_classes(strategy), 0))

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Add the exemplars to the experience's data, which pass through their codec first."""
        compression = self.buffer.compression
        if compression is not None and compression.new_images > 0:
            strategy.adapted_dataset = through_codec(
                strategy.adapted_dataset, compression, probability=compression.new_images
            )
        if self.buffer.order:
            exemplars = self.buffer.besides(strategy.experience).train()
            strategy.adapted_dataset = strategy.adapted_dataset.concat(exemplars)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Shuffle plainly, whatever the task labels, where Avalanche's default loader would not."""
        if type(strategy.dataloader) is TaskBalancedDataLoader:
            strategy.dataloader = shuffled_loader(strategy, **kwargs)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Forget the means: the features have changed."""
        self._means = None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Choose the exemplars of the classes just learned."""
        self._after = None
        self.buffer.post_adapt(strategy, strategy.experience)
        self._means = None

    def exemplars_after(self, strategy: Any, again: bool = False) -> Any:
        """Return the exemplars that would be held if the present experience ended now.

        They carry the training transforms. The memory itself does not change, so the choice is made
        again when the experience ends.

        :param strategy: the strategy.
        :param again: whether to return those of the last call, which the plugin's state holds.
        """
        if self._after is None or not again:
            self._after = self.buffer.after(strategy, strategy.experience)
        return self._after.buffer.train()

    def class_means(self, strategy: Any) -> tuple[list[int], Tensor] | None:
        """Return class ids and the L2-normalised means ``[C, D]`` of their exemplars' features.

        iCaRL, algorithm 1, with the exemplars' features normalised first, and as in PyCIL without
        mirrored images, which PODNet's code averages in. ``None`` before there are exemplars.
        Computed with the present model when first asked for after a training step or a change of
        the memory.
        """
        exemplars = self.buffer.buffer
        resized = self._means_of is not exemplars
        if self.buffer.order and (self._means is None or resized):
            features = dataset_features(strategy.model, exemplars, strategy.device)
            targets = torch.as_tensor(list(exemplars.targets), device=features.device)
            classes = list(self.buffer.order)
            means = torch.stack([features[targets == c].mean(dim=0) for c in classes])
            self._means = classes, F.normalize(means, dim=1)
            self._means_of = exemplars
        return self._means

    def state_dict(self) -> dict[str, Any]:
        """Return the exemplars' positions, and those of :meth:`exemplars_after`."""
        after = None if self._after is None else self._after.state_dict()
        return {**self.buffer.state_dict(), "after": after}

    def load_state_dict(self, state: dict[str, Any], stream: Any) -> None:
        """Take back saved positions; ``stream`` is the training stream they point into."""
        self.buffer.load_state_dict(state, stream)
        self._means = self._after = None
        if state["after"] is not None:
            self._after = copy.copy(self.buffer)
            self._after.load_state_dict(state["after"], stream)


def _stream(experience: Any) -> Any:
    """Return the stream of an experience, or it alone where the stream may make data on demand.

    Of an online sub-experience, that of the experience that it was cut from.
    """
    experience = getattr(experience, "origin_experience", experience)
    stream = getattr(experience, "origin_stream", None)
    return stream if hasattr(stream, "__len__") else [experience]


def _check_rates(buffer: HerdingBuffer, stream: Any) -> None:
    """Check the rates against the stream, before anything is trained.

    :raises ValueError: if there are too few, or the memory would hold more than there is.
    """
    seen: set[int] = set()
    images = 0
    for number, experience in enumerate(stream):
        seen |= set(experience_classes(experience))
        images += len(experience.dataset)
        held = buffer.quota(len(seen), number) * len(seen)
        assert buffer.rates is not None
        if buffer.rates.rates[number] > 0 and held > images:
            raise ValueError(
                f"rates: expected a memory of at most {images} exemplars, all images seen up to "
                f"experience {number}, got {held} by the rate {buffer.rates.rates[number]}"
            )
