"""Image folders under the Base-x/Inc-y protocols: ImageNet-1000, ImageNet-100 and smaller ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import NCScenario
from torchvision.datasets import ImageFolder

from avalanche_memo.benchmarks.protocol import split_classes
from avalanche_memo.benchmarks.transforms import imagenet_eval_transform, imagenet_train_transform

__all__ = ["split_image_folder"]


def split_image_folder(
    root: str | Path,
    base: int,
    increment: int,
    *,
    seed: int | None = 1993,
    order: Sequence[int] | None = None,
    image_size: int = 224,
    classes: int | None = None,
    original_class_ids: bool = False,
    train_transform: Callable[[Any], Any] | None = None,
    eval_transform: Callable[[Any], Any] | None = None,
) -> NCScenario:
    """Make a benchmark of ``root/train/<class>/<image>`` and ``root/val/<class>/<image>``.

    Class ids follow the sorted names of the class folders. The other options are those of
    :func:`~avalanche_memo.benchmarks.split_classes`.

    :param image_size: width and height of the images that the default transforms give.
    :param train_transform: None for ``imagenet_train_transform(image_size)``.
    :param eval_transform: None for ``imagenet_eval_transform(image_size)``.
    :raises FileNotFoundError: if a folder is missing or a class has no image.
    :raises ValueError: if ``train/`` and ``val/`` have different classes, or the protocol,
        ``classes`` or ``image_size`` is out of range.
    """
    train, test = (_load(Path(root), part) for part in ("train", "val"))
    if train.classes != test.classes:
        alone = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"root: expected the same class folders in train/ and val/ of {root}, got "
            f"{len(alone)} in only one of them: {', '.join(alone[:5])}"
        )
    return split_classes(
        train,
        test,
        base,
        increment,
        seed=seed,
        order=order,
        classes=classes,
        original_class_ids=original_class_ids,
        train_transform=train_transform or imagenet_train_transform(image_size),
        eval_transform=eval_transform or imagenet_eval_transform(image_size),
    )


def _load(root: Path, part: str) -> ImageFolder:
    if not (root / part).is_dir():
        raise FileNotFoundError(
            f"root: expected {root} to hold train/<class>/<image> and val/<class>/<image>, "
            f"got no {part}/"
        )
    return ImageFolder(root / part)
