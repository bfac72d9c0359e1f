import numpy as np
import pytest
import torch

from avalanche_memo.benchmarks import class_order, experience_sizes, split_classes
from avalanche_memo.benchmarks.digits import GreyImages


def dataset(targets: list[int]) -> GreyImages:
    """Images whose every pixel is their class id."""
    data = np.empty((len(targets), 4, 4), np.uint8)
    data[:] = np.array(targets, np.uint8)[:, None, None]
    return GreyImages(data, targets)


def pixel(image) -> int:
    return image.getpixel((0, 0))


def test_class_order_of_the_published_results():
    # The order that PyCIL logs for seed 1993.
    assert class_order(100, 1993)[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert sorted(class_order(100, 1993)) == list(range(100))
    assert all(type(class_id) is int for class_id in class_order(100, 1993))


def test_class_order_without_seed_is_ascending():
    assert class_order(4, None) == [0, 1, 2, 3]


def test_class_order_leaves_global_random_states_alone():
    torch_state = torch.get_rng_state()
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    class_order(100, 1993)
    assert np.random.random() == expected  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize(
    ("base", "increment", "sizes"),
    [
        (0, 10, [10] * 10),
        (0, 5, [5] * 20),
        (50, 10, [50] + [10] * 5),
        (50, 1, [50] + [1] * 50),
        (20, 40, [20, 40, 40]),
        (0, 100, [100]),
        (100, 10, [100]),
    ],
)
def test_experience_sizes(base, increment, sizes):
    assert experience_sizes(100, base, increment) == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 0, 7), "increment: expected a divisor of the 100 classes.*got 7"),
        ((100, 50, 20), "increment: expected a divisor of the 50 classes.*got 20"),
        ((100, 50, 0), "increment: expected a positive number, got 0"),
        ((100, -1, 10), "base: expected 0 to 100 classes, got -1"),
        ((100, 101, 10), "base: expected 0 to 100 classes, got 101"),
        ((0, 0, 10), "n_classes: expected a positive number, got 0"),
    ],
)
def test_experience_sizes_refuses_what_does_not_divide(arguments, message):
    with pytest.raises(ValueError, match=message):
        experience_sizes(*arguments)


@pytest.mark.parametrize(("base", "sizes"), [(0, [2, 2, 2]), (4, [4, 2])], ids=["base 0", "base 4"])
def test_classes_are_split_and_relabelled_in_order(base, sizes):
    order = class_order(6, 1993)
    benchmark = split_classes(dataset([5, 4, 3, 2, 1, 0] * 3), dataset(list(range(6))), base, 2)
    assert len(benchmark.train_stream) == len(benchmark.test_stream) == len(sizes)
    start = 0
    for size, train, test in zip(sizes, benchmark.train_stream, benchmark.test_stream, strict=True):
        ids = list(range(start, start + size))
        assert sorted(train.classes_in_this_experience) == ids
        assert sorted(train.dataset.targets) == sorted(ids * 3)
        assert sorted(test.dataset.targets) == ids
        for split in (train, test):
            for image, label, task in split.dataset:
                assert pixel(image) == order[label]
                assert task == 0
        start += size


def test_original_class_ids_are_kept_on_demand():
    data = dataset(list(range(6)))
    benchmark = split_classes(data, data, 0, 3, original_class_ids=True)
    for experience, ids in zip(
        benchmark.train_stream, [class_order(6, 1993)[:3], class_order(6, 1993)[3:]], strict=True
    ):
        assert set(experience.classes_in_this_experience) == set(ids)
        assert all(pixel(image) == label for image, label, _ in experience.dataset)


def test_only_the_first_classes_of_the_order_are_learned():
    data = dataset(list(range(100)))
    benchmark = split_classes(data, data, 0, 2, classes=4)
    pixels = [
        {label: pixel(image) for image, label, _ in experience.dataset}
        for experience in benchmark.train_stream
    ]
    assert pixels == [{0: 68, 1: 56}, {2: 78, 3: 8}]


def test_classes_may_come_in_an_order_of_ones_own():
    data = dataset(list(range(4)))
    benchmark = split_classes(data, data, 0, 2, order=(2, 0, 3, 1), classes=2)
    assert [(pixel(image), label) for image, label, _ in benchmark.test_stream[0].dataset] == [
        (0, 1),
        (2, 0),
    ]
    assert len(benchmark.test_stream) == 1


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], []])
def test_an_order_has_each_class_once(order):
    data = dataset(list(range(4)))
    with pytest.raises(ValueError, match=r"order: expected each class id from 0 to 3 once, got"):
        split_classes(data, data, 0, 2, order=order)


def test_transforms_of_each_stream():
    data = dataset([0, 1])
    benchmark = split_classes(
        data, data, 0, 1, train_transform=lambda _: "train", eval_transform=lambda _: "eval"
    )
    train, test = benchmark.train_stream[0].dataset, benchmark.test_stream[0].dataset
    assert train[0][0] == "train"
    assert train.eval()[0][0] == "eval"
    assert test[0][0] == "eval"


def test_split_leaves_torch_random_state_alone():
    data = dataset(list(range(6)))
    state = torch.get_rng_state()
    split_classes(data, data, 0, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("train", "test", "options", "named"),
    [
        ([0, 2], [0, 2], {}, "train: expected samples of every class id from 0 to 1"),
        ([0, 1], [0, 0], {}, "test: expected samples of every class id from 0 to 1"),
        ([0, 1], [0, 1], {"classes": 3}, "classes: expected 1 to 2, got 3"),
        ([0, 1], [0, 1], {"classes": 0}, "classes: expected 1 to 2, got 0"),
    ],
)
def test_split_refuses_what_does_not_fit(train, test, options, named):
    with pytest.raises(ValueError, match=named):
        split_classes(dataset(train), dataset(test), 0, 1, **options)
