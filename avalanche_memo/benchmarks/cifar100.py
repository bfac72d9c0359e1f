"""Split CIFAR-100 under the Base-x/Inc-y protocols, in the class order of published results."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import NCScenario
from torchvision.datasets import CIFAR100

from avalanche_memo.benchmarks.protocol import first_of_each_class, split_classes
from avalanche_memo.benchmarks.transforms import cifar_eval_transform, cifar_train_transform

__all__ = ["DATA_VARIABLE", "split_cifar100"]

DATA_VARIABLE = "AVALANCHE_MEMO_DATA"
"""Environment variable with the folder of the data sets, used where no ``root`` is given."""


def split_cifar100(
    base: int = 0,
    increment: int = 10,
    *,
    root: str | Path | None = None,
    seed: int | None = 1993,
    order: Sequence[int] | None = None,
    classes: int | None = None,
    samples_per_class: int | None = None,
    original_class_ids: bool = False,
    train_transform: Callable[[Any], Any] | None = None,
    eval_transform: Callable[[Any], Any] | None = None,
) -> NCScenario:
    """Make the CIFAR-100 benchmark; images ``[3, 32, 32]``. Nothing is downloaded.

    The options are those of :func:`~avalanche_memo.benchmarks.split_classes`, and:

    :param root: folder that holds ``cifar-100-python/``; None for the environment variable
        ``AVALANCHE_MEMO_DATA``.
    :param samples_per_class: for quick tests, keep the first so many images of each class in the
        training and in the test set; None for all (500 and 100).
    :param train_transform: None for ``cifar_train_transform()``.
    :param eval_transform: None for ``cifar_eval_transform()``.
    :raises FileNotFoundError: if the data set is not there.
    :raises RuntimeError: if its files are incomplete or corrupt.
    :raises ValueError: if the protocol, ``classes`` or ``samples_per_class`` is out of range.
    """
    folder = _find(root)
    train, test = (_load(folder, part, samples_per_class) for part in (True, False))
    return split_classes(
        train,
        test,
        base,
        increment,
        seed=seed,
        order=order,
        classes=classes,
        original_class_ids=original_class_ids,
        train_transform=train_transform or cifar_train_transform(),
        eval_transform=eval_transform or cifar_eval_transform(),
    )


def _find(root: str | Path | None) -> Path:
    """Return the folder that holds the data set's folder."""
    root = root or os.environ.get(DATA_VARIABLE)
    if not root:
        raise FileNotFoundError(
            f"root: expected the folder that holds {CIFAR100.base_folder}/, got none; pass root "
            f"(experiments.run: --data_root) or set {DATA_VARIABLE}"
        )
    folder = Path(root)
    if not (folder / CIFAR100.base_folder).is_dir():
        raise FileNotFoundError(
            f"root: expected a folder that holds {CIFAR100.base_folder}/, got {folder}; "
            f"{_how_to_download(folder)}"
        )
    return folder


def _load(folder: Path, train: bool, samples_per_class: int | None) -> CIFAR100:
    try:
        dataset = CIFAR100(folder, train=train)
    except RuntimeError as error:
        raise RuntimeError(
            f"root: {folder / CIFAR100.base_folder} is incomplete or corrupt; delete it and "
            f"{_how_to_download(folder)}"
        ) from error
    if samples_per_class is not None:
        keep = first_of_each_class(dataset.targets, samples_per_class)
        dataset.data = dataset.data[keep]
        dataset.targets = [dataset.targets[index] for index in keep]
    return dataset


def _how_to_download(folder: Path) -> str:
    return f"get it with torchvision.datasets.CIFAR100({str(folder)!r}, download=True)"
