import copy
import logging
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST
from avalanche.benchmarks.utils import as_classification_dataset, make_avalanche_dataset
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedDataLoader,
    ReplayDataLoader,
    TaskBalancedDataLoader,
)
from avalanche.benchmarks.utils.flat_data import FlatData
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training import Naive
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from PIL import Image
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler
from torchvision import transforms as T
from torchvision.datasets import CIFAR10

from avalanche_memo.training.batch_transforms import (
    Brightness,
    HorizontalFlip,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    UnsupportedError,
    parse_transforms,
)
from avalanche_memo.training.loading import ResidentLoader, resident_loader, shuffled_loader
from avalanche_memo.training.plugins import ResidentBatches
from avalanche_memo.training.samples import sample_parts

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
CIFAR = T.Compose(
    [
        T.RandomCrop(16, padding=2),
        T.RandomHorizontalFlip(),
        T.ColorJitter(brightness=63 / 255),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ]
)
EVAL = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
FOLDER = T.Compose([T.RandomResizedCrop(12), T.RandomHorizontalFlip(), T.ToTensor()])


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


class ArrayImages(CIFAR10):
    """uint8 images in memory."""

    def __init__(self, n=60, shape=(16, 16, 3), classes=6, seed=0):
        self.data = pixels(n, *shape, seed=seed)
        self.targets = [i % classes for i in range(n)]
        self.transforms = self.transform = self.target_transform = None


class FileImages(Dataset):
    """Like torchvision's ImageFolder: images that are made at each access."""

    def __init__(self, sizes, classes=2):
        self.sizes = sizes
        self.targets = [i % classes for i in range(len(sizes))]
        self.accesses = []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        self.accesses.append(i)
        return Image.fromarray(pixels(1, *self.sizes[i], 3, seed=i)[0]), self.targets[i]


class Inverted(ArrayImages):
    def __getitem__(self, i):
        return Image.fromarray(255 - self.data[i]), self.targets[i]


class Drawn(ArrayImages):
    """Images that are dark now and then."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def __getitem__(self, i):
        return Image.fromarray(self.data[i] // (1 + int(self.draw() < 0.1))), self.targets[i]


def nc(train=None, test=None, n=3, train_transform=CIFAR, eval_transform=EVAL, **kwargs):
    return nc_benchmark(
        train or ArrayImages(),
        test or train or ArrayImages(30, seed=1),
        n,
        task_labels=False,
        seed=1,
        train_transform=train_transform,
        eval_transform=eval_transform,
        **kwargs,
    )


def incremental():
    def data(*args):
        transforms = {"train": (CIFAR, None), "eval": (EVAL, None)}
        return as_classification_dataset(ArrayImages(*args), transform_groups=transforms)

    return class_incremental_benchmark({"train": data(60), "test": data(30)}, num_experiences=3)


def stacked(loader) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*loader, strict=True)]


def assert_same_batches(loader, reference, atol=1e-6):
    assert isinstance(loader, ResidentLoader)
    assert len(loader) == len(reference)
    for ours, theirs in zip(loader, reference, strict=True):
        assert type(ours) is type(theirs) is list
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=atol)
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def naive(plugins, **kwargs):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16 * 3, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kwargs = {"train_mb_size": 8, "eval_mb_size": 7, "evaluator": None, **kwargs}
    return Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        plugins=plugins,
        **kwargs,
    )


class Spy(ResidentBatches):
    """Remembers the loaders that training and evaluation got."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.trained, self.evaluated = [], []

    def before_training_exp(self, strategy, *args, **kwargs):
        super().before_training_exp(strategy, *args, **kwargs)
        self.trained.append(strategy.dataloader)

    def before_eval_exp(self, strategy, *args, **kwargs):
        super().before_eval_exp(strategy, *args, **kwargs)
        self.evaluated.append(strategy.dataloader)


# --- transforms, for given draws ------------------------------------------------------------------


def as_batch(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([TF.pil_to_tensor(image) for image in images])


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.fromarray(array) for array in pixels(200, 20, 16, 3)]


@pytest.mark.parametrize(("padding", "fill"), [(0, 0), (3, 0), ((2, 1), 77), ((1, 2, 3, 4), 255)])
def test_crop_equals_torchvision(images, padding, fill):
    op = parse_transforms([T.RandomCrop((12, 10), padding, fill=fill), T.ToTensor()]).ops[0]
    assert isinstance(op, RandomCrop)
    draws = op.draw(len(images), 20, 16)
    expected = as_batch(
        [
            TF.crop(TF.pad(image, padding, fill), top, left, 12, 10)
            for image, (top, left) in zip(images, draws.tolist(), strict=True)
        ]
    )
    assert torch.equal(op.apply(as_batch(images), draws), expected)


def test_flip_equals_torchvision(images):
    op = HorizontalFlip(0.5)
    draws = op.draw(len(images), 20, 16)
    expected = [TF.hflip(i) if f else i for i, f in zip(images, draws.tolist(), strict=True)]
    assert torch.equal(op.apply(as_batch(images), draws), as_batch(expected))


def test_brightness_equals_pil_on_every_value():
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    op = Brightness(0.0, 2.5)
    draws = torch.cat([op.draw(2000, 16, 16), torch.tensor([0.0, 1.0, 2.0])])
    expected = [TF.adjust_brightness(every, factor) for factor in draws.tolist()]
    batch = as_batch([every]).expand(len(draws), -1, -1, -1)
    assert torch.equal(op.apply(batch, draws), as_batch(expected))


@pytest.mark.parametrize(("size", "levels"), [((12, 10), 1), ((30, 24), 0)])
def test_resized_crop_equals_pil_up_to_the_order_of_axes(images, size, levels):
    op = RandomResizedCrop(size)
    draws = op.draw(len(images), 20, 16)
    expected = as_batch(
        [
            TF.resized_crop(image, *box, list(size))
            for image, box in zip(images, draws.tolist(), strict=True)
        ]
    )
    difference = (op.apply(as_batch(images), draws).int() - expected.int()).abs()
    assert difference.max() <= levels
    assert (difference > 0).float().mean() < 0.05


def test_normalize_equals_torchvision(images):
    expected = torch.stack([EVAL(image) for image in images])
    ours = Normalize(MEAN, STD).apply(as_batch(images))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    # Two normalisations in a row are one.
    chain = T.Compose([EVAL, T.Normalize((0.1,), (2.0,))])
    (op,) = parse_transforms([chain]).ops
    expected = torch.stack([chain(image) for image in images])
    torch.testing.assert_close(op.apply(as_batch(images)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "chain",
    [
        [CIFAR],
        [T.RandomHorizontalFlip(0.3), T.RandomCrop(10, 2), T.ColorJitter((0.2, 3.0)), EVAL],
        [T.Resize(14), T.CenterCrop(12), T.Pad(1), T.RandomCrop(9), T.ToTensor()],
        [T.Grayscale(), T.RandomCrop(16, 4), T.ToTensor(), T.Normalize((0.5,), (0.5,))],
    ],
)
def test_one_image_from_the_same_random_state_equals_the_chain(images, chain):
    recipe = parse_transforms(chain)
    for seed, image in enumerate(images[:50]):
        torch.manual_seed(seed)
        expected = T.Compose(chain)(image)
        torch.manual_seed(seed)
        ready = recipe.prepare(image)[None]
        draws = recipe.draw(1, *ready.shape[2:])
        ours = recipe.gather(recipe.store(ready), torch.tensor([0]), draws)
        torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([T.RandomRotation(5), T.ToTensor()], "RandomRotation"),
        ([T.RandomHorizontalFlip()], "no ToTensor"),
        ([T.ToTensor(), T.RandomHorizontalFlip()], "RandomHorizontalFlip after ToTensor"),
        ([T.RandomHorizontalFlip(), T.Resize(8), T.ToTensor()], "Resize after"),
        ([T.ColorJitter(0.1, 0.1), T.ToTensor()], "ColorJitter"),
        ([T.RandomCrop(8, padding=1, padding_mode="reflect"), T.ToTensor()], "padding mode"),
        ([T.RandomResizedCrop(8, interpolation=TF.InterpolationMode.BICUBIC), EVAL], "BICUBIC"),
        ([lambda image: image, T.ToTensor()], "function"),
        ([type("Mine", (T.RandomCrop,), {})(8), T.ToTensor()], "Mine"),
    ],
)
def test_unknown_chains_have_a_reason(chain, reason):
    with pytest.raises(UnsupportedError, match=reason):
        parse_transforms(chain)


def test_data_without_transform_groups_has_a_reason():
    nested = FlatData([nc().train_stream[0].dataset._flat_data], indices=[2, 0])
    index = np.arange(2)
    with pytest.raises(UnsupportedError, match="a nested FlatData"):
        list(sample_parts(nested, index, index, "train"))
    assert sum(len(part.indices) for part in sample_parts(nested, index, index, None)) == 2


# --- transforms, in distribution ------------------------------------------------------------------


def test_crops_are_uniform_and_flips_fair():
    torch.manual_seed(0)
    n = 81_000
    draws = RandomCrop((32, 32), (4, 4, 4, 4)).draw(n, 32, 32)
    counts = torch.bincount(draws[:, 0] * 9 + draws[:, 1], minlength=81)
    chi2 = ((counts - n / 81) ** 2 / (n / 81)).sum()
    assert len(counts) == 81
    assert 40 < chi2 < 135  # 80 degrees of freedom: beyond once in 10,000
    for p in (0.5, 0.2):
        assert abs(HorizontalFlip(p).draw(n, 8, 8).float().mean() - p) < 0.01


def test_brightness_is_uniform_in_its_range():
    torch.manual_seed(0)
    op = parse_transforms([CIFAR]).ops[2]
    factors = op.draw(100_000, 16, 16)
    low, high = 1 - 63 / 255, 1 + 63 / 255
    assert factors.min() >= low
    assert factors.max() <= high
    quantiles = torch.quantile(factors, torch.linspace(0, 1, 11))
    torch.testing.assert_close(quantiles, torch.linspace(low, high, 11), rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (64, 64, (0.08, 1.0), (3 / 4, 4 / 3)),
        (40, 90, (0.5, 1.0), (3 / 4, 4 / 3)),  # often falls back to the central crop
        (90, 20, (0.9, 1.0), (3 / 4, 4 / 3)),  # always does
    ],
)
def test_resized_crops_are_distributed_as_torchvision(height, width, scale, ratio):
    torch.manual_seed(0)
    ours = RandomResizedCrop((8, 8), scale, ratio).draw(20_000, height, width).float()
    like = torch.empty(1, height, width)
    boxes = [T.RandomResizedCrop.get_params(like, list(scale), list(ratio)) for _ in range(2500)]
    theirs = torch.tensor(boxes).float()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0.03, atol=0.5)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.05, atol=0.3)


def test_each_image_of_a_batch_has_its_own_draw():
    data = ArrayImages(200)
    data.data[:] = data.data[0]
    (x, *_), *_ = resident_loader(nc(data).train_stream[0].dataset, 64)
    assert len(x.flatten(1).unique(dim=0)) == 64


# --- data sets ------------------------------------------------------------------------------------


def datasets():
    plain, relabelled, two = nc(), nc(class_ids_from_zero_from_first_exp=True), incremental()
    first, second = plain.train_stream[0].dataset, plain.train_stream[1].dataset
    foreign = nc(ArrayImages(24, seed=5)).train_stream[0].dataset
    return {
        "test experience": plain.test_stream[1].dataset,
        "training experience": second,
        "relabelled": relabelled.train_stream[2].dataset,
        "each from zero": nc(class_ids_from_zero_in_each_exp=True).train_stream[1].dataset,
        "without task labels": two.train_stream[1].dataset,
        "exemplars": second.concat(first.subset([7, 0, 3, 3])),
        "exemplars without task labels": two.train_stream[2].dataset.concat(
            two.train_stream[0].dataset.subset([5, 1])
        ),
        "two leaves": second.concat(foreign.subset([2, 1])),
        "shuffled subset": second.subset([9, 2, 4]),
        "frozen": second.eval().freeze_transforms(),
        "grey": nc(ArrayImages(shape=(16, 16)), train_transform=FOLDER, eval_transform=T.ToTensor())
        .train_stream[1]
        .dataset,
        "resized": nc(eval_transform=T.Compose([T.Resize(8), EVAL])).test_stream[0].dataset,
    }


@pytest.mark.parametrize("name", datasets())
def test_eval_batches_equal_the_data_loader(name):
    # Avalanche's single_flat_dataset would report the training transforms of training experiences.
    dataset = datasets()[name].eval()
    reference = DataLoader(dataset, 7, collate_fn=dataset.collate_fn)
    assert_same_batches(resident_loader(dataset, 7), reference)


@pytest.mark.parametrize("name", datasets())
def test_training_batches_hold_every_sample_once(name):
    dataset = datasets()[name].train()
    _, *labels = stacked(resident_loader(dataset, 7, shuffle=True))
    # Labels in another order are the same samples.
    expected = torch.tensor([[int(v) for v in dataset[i][1:]] for i in range(len(dataset))])
    rows = torch.stack(labels, dim=1).tolist()
    assert sorted(rows) == sorted(expected.tolist())


def test_images_and_labels_stay_together():
    data = ArrayImages()
    data.data[:] = np.asarray(data.targets, np.uint8)[:, None, None, None]
    dataset = nc(data, train_transform=T.ToTensor()).train_stream[0].dataset.train()
    x, y, t = stacked(resident_loader(dataset, 7, shuffle=True))
    assert torch.equal((x * 255).round()[:, 0, 0, 0].long(), y)
    assert not torch.equal(y, torch.tensor(list(dataset.targets)))  # shuffled
    assert torch.equal(t, torch.zeros_like(y))


def test_torchvision_leaf_transforms_and_avalanche_mnist():
    class Bytes(TensorMNIST):
        def __init__(self):
            self.data = torch.from_numpy(pixels(20, 9, 9))
            self.targets = torch.arange(20) % 4
            self.transforms = self.transform = self.target_transform = None

    normalize = T.Normalize((0.13,), (0.31,))
    scenario = nc(Bytes(), Bytes(), 2, normalize, normalize)
    dataset = scenario.train_stream[1].dataset.eval()
    assert_same_batches(resident_loader(dataset, 4), DataLoader(dataset, 4))

    leaf = ArrayImages()
    leaf.transform = EVAL
    dataset = nc(leaf, leaf, 3, None, None).test_stream[0].dataset.eval()
    assert_same_batches(resident_loader(dataset, 4), DataLoader(dataset, 4))


def test_same_seed_same_batches_and_an_epoch_can_be_resumed():
    dataset = nc().train_stream[0].dataset.train()
    loader = resident_loader(dataset, 7, shuffle=True)
    torch.manual_seed(3)
    first = stacked(loader)
    state = torch.get_rng_state()
    second = stacked(loader)
    assert not torch.equal(first[0], second[0])

    torch.manual_seed(3)
    assert all(map(torch.equal, stacked(loader), first))
    torch.set_rng_state(state)
    again = stacked(copy.deepcopy(resident_loader(dataset, 7, shuffle=True)))
    assert all(map(torch.equal, again, second))


def test_making_a_loader_leaves_the_random_state_alone():
    files = FileImages([(16, 16)] * 12)
    for dataset in (nc().train_stream[0].dataset, nc(files, files, 2).train_stream[0].dataset):
        before = torch.get_rng_state()
        assert resident_loader(dataset.train(), 7) is not None
        assert torch.equal(torch.get_rng_state(), before)


def doubtful():
    return {
        "unknown transform": nc(train_transform=T.Compose([T.RandomErasing(), CIFAR])),
        "target transform": nc(train_transform=(CIFAR, lambda y: y)),
        "sizes differ": nc(FileImages([(16, 16), (16, 16), (16, 17)] * 4), n=2),
    }


@pytest.mark.parametrize("name", doubtful())
def test_doubtful_data_sets_have_no_resident_loader(name):
    assert resident_loader(doubtful()[name].train_stream[0].dataset.train(), 7) is None


def test_images_are_those_that_a_class_of_the_users_makes_of_its_data():
    first, other = nc().train_stream[0].dataset, nc(Inverted()).train_stream[0].dataset
    both = other.subset([0, 1]).concat(first).eval()
    assert_same_batches(resident_loader(both, 7), DataLoader(both, 7))


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random, np.random.rand])
def test_a_leaf_that_draws_random_numbers_has_no_resident_loader(draw):
    first, other = nc().train_stream[0].dataset, nc(Drawn(draw)).train_stream[0].dataset
    both = other.subset([0]).concat(first)
    both = both.subset([*range(1, 18), 0, 18, 19])  # neither first, last nor in the middle
    RNGManager.set_random_seeds(0)
    expected = draw()
    RNGManager.set_random_seeds(0)
    assert resident_loader(both.eval(), 7) is None
    assert draw() == expected


def test_other_data_sets_have_no_resident_loader():
    assert resident_loader(make_avalanche_dataset(ArrayImages()), 7) is None  # no targets
    assert resident_loader(ArrayImages(), 7) is None


# --- the plugin -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nc, incremental])
def test_results_are_those_of_the_strategys_own_loaders(make):
    results = []
    for plugins in ([], [ResidentBatches()]):
        torch.manual_seed(0)
        metrics = accuracy_metrics(experience=True), loss_metrics(experience=True)
        strategy = naive(plugins, evaluator=EvaluationPlugin(*metrics))
        results.append(strategy.eval(make().test_stream))
    assert results[0].keys() == results[1].keys()
    assert list(results[1].values()) == pytest.approx(list(results[0].values()), abs=1e-6)


@pytest.mark.parametrize("make", [nc, incremental])
def test_both_loaders_are_replaced_and_it_is_said_once(make, caplog):
    caplog.set_level(logging.INFO, "avalanche_memo")
    spy, benchmark = Spy(eval_batch_size=512), make()
    strategy = naive([spy], train_epochs=2)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    assert all(isinstance(loader, ResidentLoader) for loader in spy.trained + spy.evaluated)
    assert {loader.batch_size for loader in spy.trained} == {8}
    assert {loader.batch_size for loader in spy.evaluated} == {512}
    assert all(loader.shuffle for loader in spy.trained)
    assert not any(loader.shuffle for loader in spy.evaluated)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages[0].startswith("training batches: a resident tensor on cpu (")
    assert caplog.messages[1].startswith("evaluation batches: a resident tensor on cpu (")


@pytest.mark.parametrize(
    ("transform", "byte_limit", "reason"),
    [
        (T.Compose([T.RandomRotation(5), EVAL]), 2 << 30, "unknown transform RandomRotation"),
        (CIFAR, 20 * 3 * 20 * 20 - 1, "over the limit"),
    ],
)
def test_fallback_keeps_the_loader_and_says_why_once(transform, byte_limit, reason, caplog):
    caplog.set_level(logging.INFO, "avalanche_memo")
    spy = Spy(byte_limit=byte_limit)
    strategy = naive([spy])
    for experience in nc(train_transform=transform).train_stream:
        strategy.train(experience)
    assert {type(loader) for loader in spy.trained} == {TaskBalancedDataLoader}
    (record,) = (record for record in caplog.records if "training" in record.message)
    assert reason in record.message
    assert record.levelname == "WARNING"


def test_byte_limit_is_inclusive():
    dataset = nc().train_stream[0].dataset.train()
    assert resident_loader(dataset, 7, byte_limit=20 * 3 * 20 * 20) is not None
    assert resident_loader(dataset, 7, byte_limit=20 * 3 * 20 * 20 - 1) is None


def test_replay_mixing_is_left_alone(caplog):
    spy, benchmark = Spy(), nc()
    strategy = naive([ReplayPlugin(12), spy])
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience)
    first, second = spy.trained
    assert isinstance(first, ResidentLoader)
    assert type(second) is ReplayDataLoader
    assert "ReplayDataLoader composes its batches itself" in caplog.text
    assert {len(batch[1]) for batch in second} == {16, 12}  # new and old, half each


def loader_cases():
    dataset = nc().train_stream[0].dataset.train()
    half = dataset.subset(range(10))
    return {
        "plain": (DataLoader(dataset, 4, shuffle=True), True),
        "in order": (DataLoader(dataset, 4), True),
        "one group": (GroupBalancedDataLoader([dataset], batch_size=4), True),
        "two groups": (GroupBalancedDataLoader([half, half], batch_size=4), False),
        "drop last": (DataLoader(dataset, 4, drop_last=True), False),
        "with replacement": (
            DataLoader(dataset, 4, sampler=RandomSampler(dataset, replacement=True)),
            False,
        ),
        "a part": (DataLoader(dataset, 4, sampler=RandomSampler(dataset, num_samples=5)), True),
        "more than all": (
            DataLoader(dataset, 4, sampler=RandomSampler(dataset, num_samples=99)),
            False,
        ),
        "collate": (DataLoader(dataset, 4, collate_fn=list), False),
        "batch sampler": (
            DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 4, False)),
            False,
        ),
        "other data": (DataLoader(dataset, 4, sampler=RandomSampler(range(4))), False),
        "generator": (DataLoader(dataset, 4, shuffle=True, generator=torch.Generator()), False),
        "group drops last": (
            TaskBalancedDataLoader(dataset, batch_size=4, drop_last=True),
            False,
        ),
        "unknown": ([], False),
    }


@pytest.mark.parametrize("name", loader_cases())
def test_only_plain_loaders_are_replaced(name):
    loader, replaced = loader_cases()[name]
    strategy = SimpleNamespace(dataloader=loader, device=torch.device("cpu"))
    ResidentBatches().before_training_exp(strategy)
    assert isinstance(strategy.dataloader, ResidentLoader) is replaced
    assert replaced or strategy.dataloader is loader
    if replaced:
        assert strategy.dataloader.batch_size == 4
        assert strategy.dataloader.shuffle is (name in ("plain", "a part"))
        assert len(strategy.dataloader) == len(loader)
        assert sum(len(y) for _, y, *_ in strategy.dataloader) == (5 if name == "a part" else 20)


def test_workers_do_not_live_on_beside_checkpoints():
    dataset = nc().train_stream[0].dataset.train()
    strategy = SimpleNamespace(adapted_dataset=dataset, train_mb_size=6, device=torch.device("cpu"))
    assert shuffled_loader(strategy, num_workers=1, persistent_workers=True).persistent_workers
    strategy.checkpoint = object()
    loader = shuffled_loader(strategy, num_workers=1, persistent_workers=True)
    assert not loader.persistent_workers


@pytest.mark.parametrize(("batch_size", "batches"), [(6, 2), (10, 1), (12, 1), (13, 1)])
def test_the_only_batch_is_not_dropped(batch_size, batches):
    strategy = SimpleNamespace(
        adapted_dataset=nc().train_stream[0].dataset.subset(range(12)),
        train_mb_size=batch_size,
        device=torch.device("cpu"),
    )
    assert len(shuffled_loader(strategy, drop_last=True)) == batches


def options_of(loader):
    return loader.loader_kwargs if isinstance(loader, TaskBalancedDataLoader) else vars(loader)


@pytest.mark.parametrize("make", [DataLoader, TaskBalancedDataLoader])
def test_fallback_keeps_workers_alive(make):
    unknown = T.Compose([T.RandomRotation(5), EVAL])
    dataset = nc(train_transform=unknown).train_stream[0].dataset.train()
    loader = make(dataset, batch_size=6, shuffle=True, num_workers=1)
    strategy = SimpleNamespace(dataloader=loader, device=torch.device("cpu"))
    # A worker's random numbers depend on the epochs before, which a resumed run has not seen.
    strategy.checkpoint = object()
    ResidentBatches().before_training_exp(strategy, num_workers=1)
    assert not options_of(strategy.dataloader).get("persistent_workers")
    strategy.checkpoint = None
    ResidentBatches().before_training_exp(strategy, num_workers=1)
    kept = strategy.dataloader
    assert options_of(kept)["persistent_workers"]
    for _ in range(2):
        _, y, _ = stacked(kept)
        assert sorted(y.tolist()) == sorted(dataset.targets)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=2, num_workers=1),
        DataLoader(range(10), batch_size=None, sampler=[3, 1, 2], num_workers=1),
    ],
)
def test_fallback_leaves_loaders_alone_that_have_no_batch_sampler_of_their_own(loader):
    strategy = SimpleNamespace(dataloader=loader, device=torch.device("cpu"), checkpoint=None)
    ResidentBatches().before_training_exp(strategy, num_workers=1)
    assert strategy.dataloader is loader


def test_files_are_decoded_once_where_sizes_agree_after_the_prefix():
    prefix = T.Compose([T.Resize((14, 14)), FOLDER])
    files = FileImages([(20, 16), (18, 18), (15, 30)] * 4)
    benchmark = nc(files, files, 2, prefix, T.Compose([T.Resize((14, 14)), EVAL]))
    spy = Spy()
    strategy = naive([spy])
    strategy.model = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(768, 2))
    strategy.eval(benchmark.test_stream)
    files.accesses.clear()
    strategy.eval(benchmark.test_stream)
    # Six images per experience: the probe and the check (in which the first is again) remain.
    assert len(files.accesses) == 2 * (1 + 3)
    dataset = benchmark.test_stream[1].dataset.eval()
    assert_same_batches(spy.evaluated[1], DataLoader(dataset, 7))


def test_of_the_decoded_images_those_used_last_are_kept_up_to_the_limit():
    files = FileImages([(16, 16)] * 8)
    stream = nc(files, files, 2).test_stream
    plugin = ResidentBatches(byte_limit=6 * 3 * 16 * 16)
    accesses = []
    for number in (0, 1, 1, 0):
        dataset = stream[number].dataset.eval()
        strategy = SimpleNamespace(dataloader=DataLoader(dataset, 4), device=torch.device("cpu"))
        files.accesses.clear()
        plugin.before_eval_exp(strategy)
        accesses.append(len(files.accesses))
        assert_same_batches(strategy.dataloader, DataLoader(dataset, 4))
    # Beside the probe and the check: all four; all four; none; the two that had to go.
    assert accesses == [4 + 4, 4 + 4, 4, 4 + 2]


def test_training_batches_of_files_are_within_rounding_of_the_chain():
    files = FileImages([(20, 20)] * 8)
    dataset = nc(files, files, 1, FOLDER).train_stream[0].dataset.train()
    loader = resident_loader(dataset, 1)
    # Each sample is a batch of one, so that it draws as torchvision does.
    for seed in range(20):
        torch.manual_seed(seed)
        expected = dataset[seed % 8][0]
        torch.manual_seed(seed)
        index = torch.tensor([seed % 8])
        ours = loader.recipe.gather(loader.images, index, loader.recipe.draw(1, 20, 20))
        torch.testing.assert_close(ours[0], expected, rtol=0, atol=1.01 / 255)


def test_plugin_can_be_copied_without_its_cache():
    plugin = ResidentBatches(byte_limit=10_000)
    files = FileImages([(16, 16)] * 8)
    dataset = nc(files, files, 1).train_stream[0].dataset
    strategy = SimpleNamespace(dataloader=DataLoader(dataset, 4), device=torch.device("cpu"))
    plugin.before_eval_exp(strategy)
    for twin in (copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
        assert twin.byte_limit == 10_000
        assert len(pickle.dumps(twin)) < 1000


def test_cifar100_evaluation_equals_the_data_loader(cifar100_root):
    from torchvision.datasets import CIFAR100

    data = CIFAR100(str(cifar100_root), train=False)
    benchmark = nc(data, data, 10, T.Compose([T.RandomCrop(32, 4), CIFAR]))
    new, old = (benchmark.train_stream[k].dataset for k in (1, 0))
    dataset = new.concat(old.subset(range(0, 1000, 20))).eval()
    assert_same_batches(resident_loader(dataset, 128), DataLoader(dataset, 128))
    assert resident_loader(dataset.train(), 128, shuffle=True) is not None
