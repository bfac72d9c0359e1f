import numpy as np
import pytest
import torch
from PIL import Image

from avalanche_memo.benchmarks import (
    BRIGHTNESS,
    cifar_eval_transform,
    cifar_train_transform,
    digits_eval_transform,
    digits_train_transform,
    imagenet_eval_transform,
    imagenet_train_transform,
)

CIFAR_MEAN = torch.tensor([0.5071, 0.4867, 0.4408])[:, None, None]
CIFAR_STD = torch.tensor([0.2675, 0.2565, 0.2761])[:, None, None]
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def grey(width: int, height: int, level: int) -> Image.Image:
    return Image.new("RGB", (width, height), (level, level, level))


def levels(image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Undo a normalization: uint8 levels of the pixels."""
    return ((image * std + mean) * 255).round().int()


def test_cifar_eval_normalizes_and_nothing_else():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - CIFAR_MEAN) / CIFAR_STD
    torch.testing.assert_close(cifar_eval_transform()(Image.fromarray(pixels)), expected)


def test_cifar_train_jitters_brightness_by_63_255():
    torch.manual_seed(0)
    transform = cifar_train_transform()
    centres = torch.stack(
        [levels(transform(grey(32, 32, 100)), CIFAR_MEAN, CIFAR_STD)[:, 16, 16] for _ in range(300)]
    )
    low, high = 100 * (1 - 63 / 255), 100 * (1 + 63 / 255)
    assert low - 1 <= centres.min() < low + 3
    assert high - 3 < centres.max() <= high + 1
    assert (centres[:, 0] == centres[:, 1]).all()


def test_cifar_train_shifts_by_up_to_four_black_pixels_and_flips():
    torch.manual_seed(0)
    transform = cifar_train_transform()
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 200
    half[:, 16:] = 100
    left_is_brighter, borders = [], set()
    for _ in range(200):
        image = levels(transform(Image.fromarray(half)), CIFAR_MEAN, CIFAR_STD)[0]
        left_is_brighter.append(bool(image[16, 5] > image[16, 26]))
        borders.add(int((image[:, 16] == 0).sum()))
    assert borders == {0, 1, 2, 3, 4}
    assert 0.35 < np.mean(left_is_brighter) < 0.65


@pytest.mark.parametrize("size", [64, 224])
def test_imagenet_eval_keeps_the_centre(size):
    # 32 of 256 pixels are cut off in all, at any size: 1/16 at either side.
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, 64:192] = 255
    image = imagenet_eval_transform(size)(Image.fromarray(stripes))
    assert image.shape == (3, size, size)
    white = levels(image, IMAGENET_MEAN, IMAGENET_STD)[0, size // 2] > 127
    assert white.float().mean().item() == pytest.approx(128 / 224, abs=1.5 / size)


def test_imagenet_eval_resizes_the_shorter_side():
    assert imagenet_eval_transform(64)(grey(300, 150, 50)).shape == (3, 64, 64)
    image = imagenet_eval_transform()(grey(256, 400, 50))
    torch.testing.assert_close(
        image, ((50 / 255 - IMAGENET_MEAN) / IMAGENET_STD).expand(3, 224, 224)
    )


def test_imagenet_train_crops_flips_and_jitters_on_demand():
    torch.manual_seed(0)
    plain = imagenet_train_transform(64)
    jittered = imagenet_train_transform(64, brightness=BRIGHTNESS)
    seen = {
        name: {
            int(levels(transform(grey(90, 70, 100)), IMAGENET_MEAN, IMAGENET_STD)[0, 0, 0])
            for _ in range(50)
        }
        for name, transform in (("plain", plain), ("jittered", jittered))
    }
    assert seen["plain"] == {100}
    assert max(seen["jittered"]) > 115
    assert min(seen["jittered"]) < 85
    assert plain(grey(90, 70, 100)).shape == (3, 64, 64)
    sides = np.zeros((64, 64, 3), np.uint8)
    sides[:, :32] = 255
    means = [plain(Image.fromarray(sides))[0].mean(dim=0) for _ in range(200)]
    assert 0.3 < np.mean([bool(mean[0] >= mean[-1]) for mean in means]) < 0.9


def test_digits_eval_and_train():
    white = Image.new("L", (8, 8), 255)
    expected = (1 - 0.305) / 0.376
    image = digits_eval_transform()(white)
    torch.testing.assert_close(image, torch.full((1, 8, 8), expected))
    torch.manual_seed(0)
    shifted = torch.stack([digits_train_transform()(white) for _ in range(50)])
    assert shifted.shape == (50, 1, 8, 8)
    dark_rows = (shifted[:, 0, :, 4] < 0).sum(dim=1)
    assert set(dark_rows.tolist()) == {0, 1}


@pytest.mark.parametrize("transform", [imagenet_train_transform, imagenet_eval_transform])
def test_image_size_is_checked(transform):
    with pytest.raises(ValueError, match="image_size: expected a positive number, got 0"):
        transform(0)
