import copy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, split_online_stream
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torchvision.transforms import Compose, ToTensor

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training import MEMORY_RATES, MemoryRates, Replay, storage_policy
from avalanche_memo.training.plugins import HerdingReplayPlugin
from avalanche_memo.training.storage_policy import (
    HerdingBuffer,
    dataset_features,
    herding_order,
)
from tests.helpers import APIS, ORDER, grey_images, make_benchmark, silent, tiny_backbone
from tests.reference.herding import class_mean, herding, unit

# --- herding_order ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "dim", "m"), [(30, 8, 12), (30, 8, 30), (7, 3, 20), (1, 4, 1), (40, 1, 5), (12, 64, 6)]
)
def test_herding_order_is_the_published_one(n, dim, m):
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(n))
    order = herding_order(features, m)
    assert order.tolist() == herding(features, m)
    assert len(set(order.tolist())) == min(m, n)


def test_herding_order_of_normalised_features_after_a_relu():
    features = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).relu()
    features = features / features.norm(dim=1, keepdim=True)
    assert herding_order(features, 40).tolist() == herding(features, 40)


def test_herding_order_of_large_float32_features():
    """Where float32 would lose the differences."""
    features = 1e4 + torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
    assert features.dtype == torch.float32
    assert herding_order(features, 20).tolist() == herding(features, 20)


@pytest.mark.parametrize("m", [0, 3])
def test_herding_order_of_nothing(m):
    assert herding_order(torch.zeros(0, 5), m).tolist() == []
    assert herding_order(torch.zeros(2, 5), 0).tolist() == []


def test_herding_order_takes_equal_samples_once():
    assert sorted(herding_order(torch.ones(4, 3), 9).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("features", "m", "message"),
    [
        (torch.zeros(3), 1, r"features: expected a matrix \[n, D\], got shape \(3,\)"),
        (torch.zeros(3, 2), -1, "m: expected a number of at least 0, got -1"),
    ],
)
def test_herding_order_refuses(features, m, message):
    with pytest.raises(ValueError, match=message):
        herding_order(features, m)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_herding_refuses_features_that_are_not_finite(value):
    features = torch.ones(4, 2)
    features[1, 0] = value
    with pytest.raises(FloatingPointError, match="features: expected finite numbers"):
        herding_order(features, 2)


# --- the buffer ---------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Features that are the pixels, times a factor per pixel; it writes down how it was called."""

    def __init__(self, factors: Tensor | None = None) -> None:
        super().__init__()
        self.factors = torch.ones(64) if factors is None else factors
        self.calls: list[tuple[bool, bool, Tensor]] = []

    def extract_features(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled(), x))
        return x.flatten(1) * self.factors


def agent(model: nn.Module | None = None) -> SimpleNamespace:
    return SimpleNamespace(model=model or Pixels(), device=torch.device("cpu"))


def samples(dataset) -> dict[int, list[Tensor]]:
    """The images ``[64]`` of each class, in the data set's order."""
    found: dict[int, list[Tensor]] = {}
    for x, y, *_ in dataset:
        found.setdefault(int(y), []).append(x.flatten())
    return found


def key(image: Tensor) -> tuple[int, ...]:
    """The image's grey levels, which tell it from all others."""
    return tuple((255 * image.flatten()).round().int().tolist())


def exemplars(buffer: HerdingBuffer) -> dict[int, list[Tensor]]:
    return samples(buffer.buffer.eval())


def herded(images: list[Tensor], m: int, factors: Tensor | None = None) -> list[Tensor]:
    """The front of the published order of some images, on L2-normalised pixels."""
    features = torch.stack(images) * (1 if factors is None else factors)
    return [images[i] for i in herding(unit(features), m)]


def same(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return len(ours) == len(expected) and all(map(torch.equal, ours, expected))


def fill(buffer: HerdingBuffer, experiences, model: nn.Module | None = None) -> None:
    for experience in experiences:
        buffer.post_adapt(agent(model), experience)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("options", "quotas"),
    [
        ({"max_size": 15}, [7, 3, 2]),
        ({"max_size": 6}, [3, 1, 1]),
        ({"exemplars_per_class": 3}, [3, 3, 3]),
    ],
)
def test_quotas(api, options, quotas):
    buffer = HerdingBuffer(**options)
    stream = make_benchmark(api, per_class=9).train_stream
    for n, quota in enumerate(quotas, start=1):
        fill(buffer, [stream[n - 1]])
        assert Counter(map(int, buffer.buffer.targets)) == dict.fromkeys(ORDER[: 2 * n], quota)


# Of 9 images in each class, and 2 classes an experience: a rate of 0.5 is 9 exemplars.
@pytest.mark.parametrize(
    ("options", "rates", "held"),
    [
        # (6 + 9) / 2, (6 + 9) / 4 and (6 + 9) / 6 for each class.
        ({"max_size": 6}, (0.5, 0.5, 0.5), [[7], [3, 3], [2, 2, 2]]),
        # 6 / 2, (6 + 18) / 4 of which older classes have 3 left, (6 + 0) / 6.
        ({"max_size": 6}, (0, 1, 0), [[3], [3, 6], [1, 1, 1]]),
        # 1 + 9 / 2, 1 + 9 / 4, 1 + 5 / 6: 0.3 of 18 is 5.4.
        ({"exemplars_per_class": 1}, (0.5, 0.5, 0.3), [[5], [3, 3], [1, 1, 1]]),
    ],
)
def test_rates_add_exemplars_by_experience(options, rates, held):
    buffer = HerdingBuffer(**options, rates=MemoryRates(rates, 2, 9))
    stream = make_benchmark(per_class=9).train_stream
    for n, expected in enumerate(held):
        fill(buffer, [stream[n]])
        counts = [len(images) for images in exemplars(buffer).values()]
        assert counts == [m for m in expected for _ in range(2)]
    # The same from a saved state.
    again = HerdingBuffer(**options, rates=MemoryRates(rates, 2, 9))
    again.load_state_dict(buffer.state_dict(), stream)
    assert again.quota(6) == buffer.quota(6) == held[-1][-1]


def test_extra_exemplars_are_counted_by_hand():
    rates = MemoryRates([0, 0.29, 2], 10, 500)
    assert [rates.extra(n) for n in range(3)] == [0, 1450, 10_000]
    assert MemoryRates((0.29,), 10, 10).extra(0) == 29
    for steps, listed in MEMORY_RATES.items():
        assert len(listed) == steps + 1
        extra = MemoryRates(listed, 50 // steps, 500).extra
        assert {extra(n) for n in range(steps + 1)} == {1000}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.1, -0.5), 2, 9), r"rates: expected .* at least 0 .*got \[0.1, -0.5\]"),
        (((float("nan"),), 2, 9), r"rates: .*got \[nan\]"),
        (((), 2, 9), r"rates: .*got \[\]"),
        ((0.1, 2, 9), r"rates: expected .* for each experience, got 0.1"),
        ((("0.1",), 2, 9), r"rates: .*got \['0.1'\]"),
        (((0.1,), 2.5, 9), "increment: expected a whole number of at least 1, got 2.5"),
        (((0.1,), 0, 9), "increment: expected a whole number of at least 1, got 0"),
        (((0.1,), 2, -3), "images_per_class: expected a whole number of at least 1, got -3"),
    ],
)
def test_memory_rates_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemoryRates(*arguments)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.5, 0.5), "rates: expected a rate for experience 2, got 2 rates"),
        # 2 experiences have 36 images; (10 + 36) // 4 for each of 4 classes are 44.
        ((0, 2.0, 0, 0, 0), "rates: expected a memory of at most 36 .*experience 1, got 44 .*2.0"),
    ],
)
def test_rates_that_do_not_fit_the_stream_are_refused_before_training(rates, message):
    model = network()
    before = [p.clone() for p in model.parameters()]
    strategy = Replay(
        model=model,
        optimizer=sgd(model),
        mem_size=10,
        memory_rates=MemoryRates(rates, 2, 9),
        evaluator=silent(),
    )
    with pytest.raises(ValueError, match=message):
        strategy.train(make_benchmark(per_class=9).train_stream)
    assert all(map(torch.equal, before, model.parameters()))


def test_rates_count_whole_experiences():
    model = network()
    rates = MemoryRates((0, 0.5, 0, 0, 0), 2, 9)
    strategy = Replay(model=model, optimizer=sgd(model), memory_rates=rates, evaluator=silent())
    stream = make_benchmark(per_class=9).train_stream
    with pytest.raises(ValueError, match="rates: expected whole experiences, got a part of one"):
        strategy.train(next(iter(split_online_stream(stream, experience_size=8))))


def test_an_interrupted_choice_leaves_the_memory_as_it_was(monkeypatch):
    stream = make_benchmark().train_stream
    buffer = HerdingBuffer(6)
    fill(buffer, stream[:1])
    before = buffer.state_dict()["order"]
    calls = iter([dataset_features])

    def interrupted(*arguments):
        try:
            return next(calls)(*arguments)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(storage_policy, "dataset_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        buffer.post_adapt(agent(), stream[1])
    assert list(buffer.order) == list(before)
    assert all(torch.equal(order, before[c]) for c, order in buffer.order.items())
    assert len(buffer.besides(stream[1])) == 6


def test_a_look_ahead_leaves_the_memory_as_it_was():
    buffer = HerdingBuffer(9)
    stream = make_benchmark().train_stream
    fill(buffer, [stream[0]])
    before = {c: order.tolist() for c, order in buffer.order.items()}
    ahead = buffer.after(agent(), stream[1])
    assert {c: order.tolist() for c, order in buffer.order.items()} == before
    assert len(buffer.state_dict()["experiences"]) == 1
    fill(buffer, [stream[1]])
    assert ahead.state_dict()["experiences"] == buffer.state_dict()["experiences"]
    assert [o.tolist() for o in ahead.order.values()] == [o.tolist() for o in buffer.order.values()]


@pytest.mark.parametrize("api", APIS)
def test_chooses_by_herding_and_older_classes_keep_the_front_of_their_order(api):
    buffer = HerdingBuffer(12)
    stream = make_benchmark(api, per_class=9).train_stream
    expected: dict[int, list[Tensor]] = {}
    for n, quota in ((1, 6), (2, 3), (3, 2)):
        # Other features each time: they must not reorder older classes.
        factors = torch.rand(64, generator=torch.Generator().manual_seed(n))
        fill(buffer, [stream[n - 1]], Pixels(factors))
        expected = {c: images[:quota] for c, images in expected.items()}
        for c, images in samples(stream[n - 1].dataset.eval()).items():
            expected[c] = herded(images, quota, factors)
        found = exemplars(buffer)
        assert found.keys() == expected.keys()
        assert all(same(found[c], expected[c]) for c in expected)


def test_reranks_older_classes_on_demand():
    stream = make_benchmark(per_class=9).train_stream
    buffer = HerdingBuffer(12, rerank=True)
    fill(buffer, [stream[0]])
    kept = exemplars(buffer)
    factors = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    fill(buffer, [stream[1]], Pixels(factors))
    found = exemplars(buffer)
    for c, images in kept.items():
        # Candidates are the six exemplars kept so far, ranked with the present features.
        positions = sorted(images, key=lambda image: _position(image, stream[0]))
        assert same(found[c], herded(positions, 3, factors))
    assert any(not same(found[c], images[:3]) for c, images in kept.items())


def test_strategies_pass_the_option_on():
    assert not Replay(model=network(), optimizer=sgd(network())).plugins[0].buffer.rerank
    model = network()
    assert Replay(model=model, optimizer=sgd(model), rerank=True).plugins[0].buffer.rerank


def _position(image: Tensor, experience) -> int:
    return next(
        i for i, (x, *_) in enumerate(experience.dataset.eval()) if torch.equal(x.flatten(), image)
    )


@pytest.mark.parametrize("options", [{"max_size": 200}, {"exemplars_per_class": 50}])
def test_a_class_with_fewer_samples_holds_each_once(options):
    buffer = HerdingBuffer(**options)
    stream = make_benchmark(per_class=5).train_stream
    fill(buffer, stream[:2])
    found = exemplars(buffer)
    for experience in stream[:2]:
        for c, images in samples(experience.dataset.eval()).items():
            assert len(found[c]) == 5
            assert {key(x) for x in found[c]} == {key(x) for x in images}


def repeating_stream():
    """Class 0 and 1; then new samples of class 1, and class 2; then the first experience again."""
    parts = []
    for seed, classes in ((1, (0, 1)), (2, (1, 2)), (1, (0, 1))):
        dataset = as_classification_dataset(
            grey_images(6, seed),
            transform_groups={"train": (ToTensor(), None), "eval": (ToTensor(), None)},
        )
        rows = [i for i, c in enumerate(dataset.targets) if c in classes]
        parts.append(dataset.subset(rows))
    parts[2] = parts[0]
    return benchmark_from_datasets(train=parts).train_stream


def test_a_class_that_comes_again_is_herded_from_exemplars_and_new_samples():
    stream = repeating_stream()
    buffer = HerdingBuffer(exemplars_per_class=4)
    fill(buffer, [stream[0]])
    old = exemplars(buffer)
    fill(buffer, [stream[1]])
    found = exemplars(buffer)
    new = samples(stream[1].dataset.eval())
    union = {key(x) for x in old[1] + new[1]}
    assert {key(x) for x in found[1]} <= union
    candidates = sorted(old[1], key=lambda image: _position(image, stream[0])) + new[1]
    expected = {key(x) for x in herded(candidates, 4)}
    assert {key(x) for x in found[1]} == expected
    assert same(found[0], old[0])
    assert same(found[2], herded(new[2], 4))


@pytest.mark.parametrize("again", [0, 2], ids=["same experience", "same data"])
def test_no_sample_is_held_twice_when_an_experience_comes_again(again):
    stream = repeating_stream()
    buffer = HerdingBuffer(exemplars_per_class=100)
    fill(buffer, [stream[0], stream[1], stream[again]])
    held = Counter(key(x) for images in exemplars(buffer).values() for x in images)
    assert set(held.values()) == {1}
    assert Counter(map(int, buffer.buffer.targets)) == {0: 6, 1: 12, 2: 6}


def flip(image):
    return image.transpose(0)


def test_features_are_of_evaluation_mode_and_transforms_and_the_model_is_left_as_it_was():
    experience = make_benchmark(transform=Compose([flip, ToTensor()])).train_stream[0]
    plain = {key(x) for x, *_ in experience.dataset.eval()}
    flipped = {key(x) for x, *_ in experience.dataset.train()}
    assert not plain & flipped
    for training in (True, False):
        model = Pixels().train(training)
        buffer = HerdingBuffer(10)
        fill(buffer, [experience], model)
        assert model.training is training
        assert model.calls
        for was_training, with_gradient, x in model.calls:
            assert not was_training
            assert not with_gradient
            assert {key(image) for image in x} <= plain
    # What is replayed has the training transforms.
    replayed = {key(x) for x, *_ in buffer.buffer.train()}
    assert replayed <= flipped


@pytest.mark.parametrize("own", [False, True], ids=["by growth", "by the user"])
def test_a_frozen_part_of_the_model_stays_in_evaluation_mode(own):
    """What Avalanche's own herding forgets: `train()` is the model's to define."""
    model = ExpandableNetwork(tiny_backbone, 2)
    model.grow([7, 2])
    model.grow([5, 0])
    model.train()
    if own:
        model.generalized.eval()
    modes = [m.training for m in model.modules()]
    fill(HerdingBuffer(10), make_benchmark().train_stream[:2], model)
    assert [m.training for m in model.modules()] == modes
    assert not all(modes)


def test_features_are_normalised():
    """Scaling single images must not change what is chosen."""
    torch.manual_seed(0)
    scale = 0.01 + torch.rand(1000)

    class Scaled(Pixels):
        def extract_features(self, x: Tensor) -> Tensor:
            return super().extract_features(x) * scale[: len(x), None]

    experience = make_benchmark(per_class=9).train_stream[0]
    plain, scaled = HerdingBuffer(8), HerdingBuffer(8)
    fill(plain, [experience])
    fill(scaled, [experience], Scaled())
    for c, images in exemplars(plain).items():
        assert same(exemplars(scaled)[c], images)
        raw = torch.stack(samples(experience.dataset.eval())[c]) * scale[:9, None]
        unnormalised = herding(raw, 4)
        assert not same(images, [samples(experience.dataset.eval())[c][i] for i in unnormalised])


def test_refuses_a_model_without_features():
    with pytest.raises(TypeError, match=r"model: expected .*extract_features.*got Linear"):
        fill(HerdingBuffer(10), make_benchmark().train_stream[:1], nn.Linear(64, 2))


@pytest.mark.parametrize("name", ["max_size", "exemplars_per_class"])
def test_refuses_less_than_one(name):
    with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1, got 0"):
        HerdingBuffer(**{name: 0})


def test_resize_keeps_the_front():
    buffer = HerdingBuffer(12)
    fill(buffer, make_benchmark(per_class=9).train_stream[:1])
    before = exemplars(buffer)
    buffer.resize(agent(), 5)
    assert {c: len(images) for c, images in exemplars(buffer).items()} == {7: 2, 2: 2}
    assert all(same(images, before[c][:2]) for c, images in exemplars(buffer).items())
    assert len(buffer.buffer) == 4
    for size in (1, 0):
        with pytest.raises(ValueError, match=f"mem_size: expected .*got {size}"):
            buffer.resize(agent(), size)
    assert buffer.quota(2) == 2
    assert len(buffer.buffer) == 4


@pytest.mark.parametrize("api", APIS)
def test_saves_and_takes_back_its_exemplars(api, tmp_path):
    buffer, again = HerdingBuffer(9), HerdingBuffer(9)
    fill(buffer, make_benchmark(api).train_stream[:2])
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    stream = make_benchmark(api).train_stream
    again.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True), stream)
    for classes in (4, 6):
        found, expected = exemplars(again), exemplars(buffer)
        assert list(found) == list(expected)
        assert len(found) == classes
        assert all(same(found[c], expected[c]) for c in found)
        fill(buffer, [stream[2]])
        fill(again, [stream[2]])


def test_bytes_of_exemplars():
    buffer = HerdingBuffer(9)
    assert buffer.exemplar_bytes == 0
    fill(buffer, make_benchmark().train_stream[:2])
    assert buffer.exemplar_bytes == 4 * 2 * 8 * 8


@pytest.mark.parametrize("transform", [ToTensor(), Compose([ToTensor(), nn.ReLU()])])
def test_features_are_computed_without_random_numbers(transform):
    groups = {"train": (None, None), "eval": (transform, None)}
    dataset = as_classification_dataset(grey_images(), transform_groups=groups)
    model, state = network(), torch.get_rng_state()
    dataset_features(model, dataset, "cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_means_are_those_of_the_exemplars_held_now():
    strategy = Replay(model=network(), optimizer=sgd(network()), mem_size=12, evaluator=silent())
    plugin = strategy.plugins[0]
    assert plugin.class_means(strategy) is None
    strategy.train(make_benchmark(per_class=9).train_stream[0])
    before = plugin.class_means(strategy)[1]
    assert plugin.class_means(strategy)[1] is before
    plugin.buffer.resize(strategy, 2)
    assert not torch.allclose(plugin.class_means(strategy)[1], before)


def test_a_copied_strategy_sees_a_sample_once_when_an_experience_comes_again():
    model = network()
    strategy = Replay(model=model, optimizer=sgd(model), mem_size=20, evaluator=silent())
    stream = make_benchmark().train_stream
    for experience in stream[:2]:
        strategy.train(experience)
    copied = copy.deepcopy(strategy)
    for each in (strategy, copied):
        seen = each.plugins[0].buffer.besides(stream[0])
        assert {int(t) for t in seen.targets} == set(ORDER[2:4])
    assert copied.plugins[0].buffer.order is not strategy.plugins[0].buffer.order


# --- in strategies ------------------------------------------------------------------------------


def network() -> ExpandableNetwork:
    torch.manual_seed(0)
    return ExpandableNetwork(tiny_backbone, 3)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("api", APIS)
def test_works_inside_avalanches_replay_plugin(api):
    model = network()
    buffer = HerdingBuffer(max_size=9)
    strategy = Naive(
        model=model,
        optimizer=sgd(model),
        train_mb_size=4,
        plugins=[ReplayPlugin(mem_size=9, storage_policy=buffer)],
        evaluator=silent(),
    )
    stream = make_benchmark(api).train_stream
    for n, quota in ((1, 4), (2, 2), (3, 1)):
        strategy.train(stream[n - 1])
        assert Counter(map(int, buffer.buffer.targets)) == dict.fromkeys(ORDER[: 2 * n], quota)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("make", ["Naive", "Replay"])
def test_too_small_a_memory_is_refused_before_training(api, make):
    model = network()
    before = [p.clone() for p in model.parameters()]
    common = {"model": model, "optimizer": sgd(model), "train_mb_size": 4, "evaluator": silent()}
    if make == "Naive":
        strategy = Naive(plugins=[HerdingReplayPlugin(9)], **common)
    else:
        strategy = Replay(mem_size=9, fast=False, **common)
    message = "mem_size: expected at least one exemplar for each of 10 classes, got 9"
    with pytest.raises(ValueError, match=message):
        strategy.train(make_benchmark(api).train_stream)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("api", APIS)
def test_every_sample_of_new_data_and_memory_is_seen_once_an_epoch(api):
    class Record(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.seen: Counter = Counter()
            self.mixed = False

        def after_training_iteration(self, strategy, **kwargs):
            self.seen.update(key(x) for x in strategy.mb_x)
            self.mixed |= len(strategy.mb_y.unique()) > 2

    model, record, stream = network(), Record(), make_benchmark(api).train_stream
    replay = HerdingReplayPlugin(20)
    strategy = Naive(
        model=model,
        optimizer=sgd(model),
        train_mb_size=5,
        train_epochs=2,
        plugins=[replay, record],
        evaluator=silent(),
    )
    strategy.train(stream[0])
    memory = exemplars(replay.buffer)
    record.seen.clear()
    strategy.train(stream[1])
    everything = [*samples(stream[1].dataset.eval()).values(), *memory.values()]
    assert record.seen == {key(x): 2 for images in everything for x in images}
    assert record.mixed


@pytest.mark.parametrize("api", APIS)
def test_class_means(api):
    model, stream = network(), make_benchmark(api).train_stream
    replay = HerdingReplayPlugin(11)
    strategy = Naive(
        model=model, optimizer=sgd(model), train_mb_size=4, plugins=[replay], evaluator=silent()
    )
    assert replay.class_means(strategy) is None
    for experience in stream[:2]:
        strategy.train(experience)
        classes, means = replay.class_means(strategy)
        assert set(classes) == set(exemplars(replay.buffer))
        model.eval()
        for c, mean in zip(classes, means, strict=True):
            images = torch.stack(exemplars(replay.buffer)[c]).view(-1, 1, 8, 8)
            with torch.no_grad():
                expected = class_mean(model.extract_features(images))
            np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)


def test_class_means_are_those_of_the_present_model():
    class Ask(SupervisedPlugin):
        """Asks for the means before an experience, which keeps them, and after each epoch."""

        def before_training_epoch(self, strategy, **kwargs):
            replay.class_means(strategy)

        def after_training_epoch(self, strategy, **kwargs):
            if replay.buffer.order:
                classes, means = replay.class_means(strategy)
                images = torch.stack(exemplars(replay.buffer)[classes[0]]).view(-1, 1, 8, 8)
                was_training = strategy.model.training
                with torch.no_grad():
                    now = class_mean(strategy.model.eval().extract_features(images))
                strategy.model.train(was_training)
                asked.append(np.allclose(means[0], now, rtol=1e-4, atol=1e-6))

    asked = []
    model, stream, replay = network(), make_benchmark().train_stream, HerdingReplayPlugin(11)
    plugins = [replay, Ask()]
    strategy = Naive(model=model, optimizer=sgd(model), plugins=plugins, evaluator=silent())
    strategy.train(stream[:2])
    assert asked == [True]


@pytest.mark.parametrize("size", [11, 12, 19])
def test_the_remainder_goes_to_the_first_classes(size):
    buffer = HerdingBuffer(size, spend_remainder=True)
    before = [size] * 10
    for classes in range(1, 10):
        quotas = [buffer.quota(classes, place=place) for place in range(classes)]
        assert sum(quotas) == size
        more = size % classes
        assert quotas == [size // classes + 1] * more + [size // classes] * (classes - more)
        assert all(now <= then for now, then in zip(quotas, before, strict=False))
        before = quotas
        assert buffer.quota(classes) == HerdingBuffer(size).quota(classes, place=0) == min(quotas)


def streams_of_other_images():
    """Two streams of one experience, alike in number and targets."""
    groups = {name: (ToTensor(), None) for name in ("train", "eval")}
    return [
        benchmark_from_datasets(
            train=[as_classification_dataset(grey_images(4, seed), transform_groups=groups)]
        ).train_stream
        for seed in (1, 2)
    ]


def test_other_images_under_a_known_number_and_targets_are_other_samples():
    first, second = streams_of_other_images()
    buffer = HerdingBuffer(exemplars_per_class=100)
    buffer.post_adapt(agent(), first[0])
    buffer.post_adapt(agent(), second[0])
    held = {key(x) for images in exemplars(buffer).values() for x in images}
    assert held == {key(x) for stream in (first, second) for x, *_ in stream[0].dataset}
    buffer.post_adapt(agent(), first[0])
    assert len(buffer.buffer) == 80


def test_a_memory_goes_with_the_stream_that_it_was_saved_with():
    streams = [make_benchmark(order=order).train_stream for order in (ORDER, ORDER[::-1])]
    buffer = HerdingBuffer(20)
    for experience in streams[0][:2]:
        buffer.post_adapt(agent(), experience)
    again = HerdingBuffer(20)
    again.load_state_dict(buffer.state_dict(), make_benchmark().train_stream)
    assert again.order.keys() == buffer.order.keys()
    for stream in (streams[1], streams[0][:1], [*streams[0], *streams[0]]):
        with pytest.raises(ValueError, match=r"stream: expected the training .* got another"):
            HerdingBuffer(20).load_state_dict(buffer.state_dict(), stream)


class LabelledSubset(Subset):
    """The usual way to give Avalanche a part of a data set."""

    def __init__(self, dataset, indices):
        super().__init__(dataset, indices)
        self.targets = [dataset.targets[i] for i in indices]


@pytest.mark.parametrize("nest", [lambda data: data, as_classification_dataset])
def test_classes_come_again_in_data_sets_of_the_users_own(nest):
    groups = {name: (ToTensor(), None) for name in ("train", "eval")}
    images = grey_images(4)
    halves = [
        as_classification_dataset(LabelledSubset(nest(images), rows), transform_groups=groups)
        for rows in (range(20), range(10, 40))
    ]
    buffer = HerdingBuffer(exemplars_per_class=100)
    for experience in benchmark_from_datasets(train=halves).train_stream:
        buffer.post_adapt(agent(), experience)
    # What is beneath such a subset is not looked at: two are two data sets.
    assert Counter(int(y) for _, y, *_ in buffer.buffer) == dict.fromkeys(range(10), 5)


def test_exemplars_without_height_and_width_have_bytes():
    targets = [0, 1] * 4
    vectors = TensorDataset(torch.randn(8, 6), torch.tensor(targets))
    vectors.targets = targets
    (experience,) = benchmark_from_datasets(train=[as_classification_dataset(vectors)]).train_stream
    buffer = HerdingBuffer(4)
    buffer.post_adapt(agent(Pixels(torch.ones(6))), experience)
    assert buffer.exemplar_bytes == 4 * 6
