from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from avalanche_memo.benchmarks import class_order, split_digits
from avalanche_memo.benchmarks.digits import GreyImages


def as_set(stream) -> Counter[tuple[int, bytes]]:
    """Label and grey levels (0 to 16) of every sample of a stream, in eval mode."""
    return Counter(
        (label, ((image * 0.376 + 0.305) * 16).round().byte().numpy().tobytes())
        for experience in stream
        for image, label, _ in experience.dataset.eval()
    )


def test_streams_hold_every_digit_once_with_its_label():
    benchmark = split_digits()
    order = class_order(10, 1993)
    digits = load_digits()
    everything = Counter(
        (order.index(target), image.astype(np.uint8).tobytes())
        for image, target in zip(digits.images, digits.target, strict=True)
    )
    assert as_set(benchmark.train_stream) + as_set(benchmark.test_stream) == everything


def test_split_is_stratified_and_does_not_depend_on_the_class_order():
    first, second = (split_digits(seed=seed, original_class_ids=True) for seed in (1993, None))
    assert as_set(first.test_stream) == as_set(second.test_stream)
    per_class = Counter(target for e in first.test_stream for target in e.dataset.targets)
    total = Counter(load_digits().target.tolist())
    assert all(abs(per_class[c] - total[c] / 4) <= 1 for c in range(10))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, [2] * 5), ({"base": 4, "increment": 3}, [4, 3, 3]), ({"classes": 4}, [2, 2])],
)
def test_protocols(options, sizes):
    benchmark = split_digits(**options)
    assert [len(e.classes_in_this_experience) for e in benchmark.train_stream] == sizes
    image, _, _ = benchmark.train_stream[0].dataset[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_test_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        split_digits(test_fraction=fraction)


def test_grey_images_are_checked():
    with pytest.raises(ValueError, match="data: expected uint8"):
        GreyImages(np.zeros((2, 8, 8)), [0, 1])
    with pytest.raises(ValueError, match="targets: expected 2 class ids, got 1"):
        GreyImages(np.zeros((2, 8, 8), np.uint8), [0])
