"""Batches from a resident tensor, in the place of a strategy's own loaders."""

import logging
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedDataLoader,
    MultiDatasetDataLoader,
    ReplayDataLoader,
    SingleDatasetDataLoader,
    TaskBalancedDataLoader,
)
from avalanche.training.plugins import SupervisedPlugin
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from avalanche_memo.training.batch_transforms import UnsupportedError
from avalanche_memo.training.loading import DecodedImages, make_resident

__all__ = ["ResidentBatches"]

logger = logging.getLogger("avalanche_memo")

_AVALANCHE_LOADERS = (
    GroupBalancedDataLoader,
    MultiDatasetDataLoader,
    ReplayDataLoader,
    SingleDatasetDataLoader,
    TaskBalancedDataLoader,
)


def _batching(loader: Any) -> tuple[Any, int, bool, int | None]:
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
    elif (
        type(loader) is DataLoader
        and loader.num_workers
        and not loader.persistent_workers
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    ):
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
    :param eval_batch_size: the least batch size of evaluation, where results do not depend on it;
        None for 512 on an accelerator and `eval_mb_size` on the CPU, where larger batches leave
        the caches (ResNet-32: 512 at once was 1.6 to 3 times slower than 32).
    """

    def __init__(
        self,
        byte_limit: int = 2 << 30,
        *,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.byte_limit = byte_limit
        self.eval_batch_size = eval_batch_size
        self._decoded = DecodedImages(byte_limit)
        self._logged: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Decoded images are a cache: copies and checkpoints go without.
        return {**self.__dict__, "_decoded": DecodedImages(self.byte_limit)}

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the training loader."""
        self._replace(strategy, "training", 1, kwargs.get("num_workers", 0))

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the evaluation loader."""
        least = self.eval_batch_size
        if least is None:
            least = 1 if torch.device(strategy.device).type == "cpu" else 512
        self._replace(strategy, "evaluation", least, kwargs.get("num_workers", 0))

    def _replace(self, strategy: Any, what: str, least_batch: int, num_workers: int) -> None:
        try:
            dataset, batch_size, shuffle, samples = _batching(strategy.dataloader)
            strategy.dataloader = loader = make_resident(
                dataset,
                batch_size=max(batch_size, least_batch),
                shuffle=shuffle,
                samples=samples,
                device=strategy.device,
                byte_limit=self.byte_limit,
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
