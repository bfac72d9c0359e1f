"""The image transforms of the published results, from PIL images to normalized float tensors.

As in PyCIL and in the released code of MEMO (Zhou et al., ICLR 2023). All are plain torchvision
``Compose`` chains.
"""

from torchvision import transforms

__all__ = [
    "BRIGHTNESS",
    "cifar_eval_transform",
    "cifar_train_transform",
    "digits_eval_transform",
    "digits_train_transform",
    "imagenet_eval_transform",
    "imagenet_train_transform",
]

BRIGHTNESS = 63 / 255
"""Brightness jitter of published results: factors from ``1 - 63/255`` to ``1 + 63/255``."""

_CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DIGITS_STATISTICS = ((0.305,), (0.376,))


def cifar_train_transform() -> transforms.Compose:
    """Return CIFAR-100's training transform: crop, flip, brightness; to ``[3, 32, 32]``."""
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=BRIGHTNESS),
            transforms.ToTensor(),
            transforms.Normalize(*_CIFAR100_STATISTICS),
        ]
    )


def cifar_eval_transform() -> transforms.Compose:
    """Return CIFAR-100's test transform; to ``[3, 32, 32]``."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(*_CIFAR100_STATISTICS)])


def imagenet_train_transform(
    image_size: int = 224, *, brightness: float = 0.0
) -> transforms.Compose:
    """Return ImageNet's training transform; to ``[3, image_size, image_size]``.

    :param brightness: PyCIL jitters by :data:`BRIGHTNESS` on ImageNet-1000, but not on
        ImageNet-100.
    :raises ValueError: if the image size is not positive.
    """
    _check_size(image_size)
    jitter = [transforms.ColorJitter(brightness=brightness)] if brightness else []
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size),
            transforms.RandomHorizontalFlip(),
            *jitter,
            transforms.ToTensor(),
            transforms.Normalize(*_IMAGENET_STATISTICS),
        ]
    )


def imagenet_eval_transform(image_size: int = 224) -> transforms.Compose:
    """Return ImageNet's test transform; to ``[3, image_size, image_size]``.

    The shorter side is resized to 256 pixels and the central 224 are kept, or the same ratio for
    another image size.

    :raises ValueError: if the image size is not positive.
    """
    _check_size(image_size)
    return transforms.Compose(
        [
            transforms.Resize(round(image_size * 256 / 224)),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(*_IMAGENET_STATISTICS),
        ]
    )


def digits_train_transform() -> transforms.Compose:
    """Return the training transform of the 8x8 digits: shifts by a pixel; to ``[1, 8, 8]``."""
    return transforms.Compose(
        [
            transforms.RandomCrop(8, padding=1),
            transforms.ToTensor(),
            transforms.Normalize(*_DIGITS_STATISTICS),
        ]
    )


def digits_eval_transform() -> transforms.Compose:
    """Return the test transform of the 8x8 digits; to ``[1, 8, 8]``."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(*_DIGITS_STATISTICS)])


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size: expected a positive number, got {image_size}")
