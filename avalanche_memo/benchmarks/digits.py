"""Split digits: scikit-learn's bundled 8x8 grey digits, a class-incremental benchmark for seconds.

Nothing is downloaded: 1,797 images of 10 classes come with scikit-learn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from avalanche.benchmarks import NCScenario
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

from avalanche_memo.benchmarks.protocol import split_classes
from avalanche_memo.benchmarks.transforms import digits_eval_transform, digits_train_transform

__all__ = ["GreyImages", "split_digits"]


class GreyImages(Dataset[tuple[Image.Image, int]]):
    """Grey images in memory; samples are ``(PIL image of mode L, class id)``.

    :param data: uint8 array ``[N, H, W]``.
    :param targets: N class ids.
    :raises ValueError: if the array has another type or shape, or the lengths differ.
    """

    def __init__(self, data: npt.NDArray[np.uint8], targets: Sequence[int]) -> None:
        if data.dtype != np.uint8 or data.ndim != 3:
            raise ValueError(f"data: expected uint8 [N, H, W], got {data.dtype} {data.shape}")
        if len(targets) != len(data):
            raise ValueError(f"targets: expected {len(data)} class ids, got {len(targets)}")
        self.data = data
        self.targets = [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), self.targets[index]


def split_digits(
    base: int = 0,
    increment: int = 2,
    *,
    seed: int | None = 1993,
    order: Sequence[int] | None = None,
    test_fraction: float = 0.25,
    classes: int | None = None,
    original_class_ids: bool = False,
    train_transform: Callable[[Any], Any] | None = None,
    eval_transform: Callable[[Any], Any] | None = None,
) -> NCScenario:
    """Make the digits benchmark; images ``[1, 8, 8]``.

    The split into training and test set is stratified by class and always the same for a
    ``test_fraction``, whatever the ``seed``, which is that of the class order alone. The options
    are those of :func:`~avalanche_memo.benchmarks.split_classes`.

    :param test_fraction: part of the images that is the test set, between 0 and 1.
    :param train_transform: None for ``digits_train_transform()``.
    :param eval_transform: None for ``digits_eval_transform()``.
    :raises ValueError: if the fraction, the protocol or ``classes`` is out of range.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: expected a number between 0 and 1, got {test_fraction}")
    digits = load_digits()
    # The bundled grey levels are whole numbers from 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=test_fraction, stratify=digits.target, random_state=0
    )
    return split_classes(
        GreyImages(pixels[train], digits.target[train]),
        GreyImages(pixels[test], digits.target[test]),
        base,
        increment,
        seed=seed,
        order=order,
        classes=classes,
        original_class_ids=original_class_ids,
        train_transform=train_transform or digits_train_transform(),
        eval_transform=eval_transform or digits_eval_transform(),
    )
