"""Class-incremental benchmarks: protocols, class orders, data sets and their transforms."""

from avalanche_memo.benchmarks.cifar100 import split_cifar100
from avalanche_memo.benchmarks.digits import split_digits
from avalanche_memo.benchmarks.image_folder import split_image_folder
from avalanche_memo.benchmarks.protocol import class_order, experience_sizes, split_classes
from avalanche_memo.benchmarks.transforms import (
    BRIGHTNESS,
    cifar_eval_transform,
    cifar_train_transform,
    digits_eval_transform,
    digits_train_transform,
    imagenet_eval_transform,
    imagenet_train_transform,
)

__all__ = [
    "BRIGHTNESS",
    "cifar_eval_transform",
    "cifar_train_transform",
    "class_order",
    "digits_eval_transform",
    "digits_train_transform",
    "experience_sizes",
    "imagenet_eval_transform",
    "imagenet_train_transform",
    "split_cifar100",
    "split_classes",
    "split_digits",
    "split_image_folder",
]
