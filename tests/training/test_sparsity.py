import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import split_online_stream
from avalanche.core import SupervisedPlugin
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_memo.benchmarks import split_digits
from avalanche_memo.budget import inference_bytes, parameter_bytes
from avalanche_memo.evaluation import ChannelMasks, ClassIncrementalAccuracy, MemoryUsage
from avalanche_memo.models import ExpandableNetwork, cifar_resnet
from avalanche_memo.training import DER, MEMO, Phase
from avalanche_memo.training.plugins import HerdingReplayPlugin, SparsityPlugin
from tests.helpers import (
    assert_same_tensors,
    make_benchmark,
    silent,
    tensors_of,
    tiny_backbone,
)
from tests.reference import masks as plain

CLASSIFIER = Phase(2, lr=0.1, learns="classifier", data="balanced", reset_classifier=True)


def masked(shared: int = 0, **options: Any) -> ExpandableNetwork:
    torch.manual_seed(0)
    return ExpandableNetwork(tiny_backbone, shared, masked=True, **options)


def dense() -> ExpandableNetwork:
    return ExpandableNetwork(tiny_backbone, 0)


def sgd(model: torch.nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)


def naive(model: ExpandableNetwork, *plugins: Any, **options: Any) -> Naive:
    return Naive(
        model=model,
        optimizer=sgd(model),
        train_mb_size=4,
        plugins=list(plugins),
        evaluator=silent(),
        **options,
    )


def der(model: ExpandableNetwork, **options: Any) -> DER:
    defaults = {"sparsity_weight": 1.0, "mem_size": 20, "train_mb_size": 6, "evaluator": silent()}
    return DER(model=model, optimizer=sgd(model), **{**defaults, **options})


class Watch(SupervisedPlugin):
    """Writes down what each step's loss is made of and how sharp its masks are."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []
        self.losses: list[tuple[float, float]] = []
        self.soft: list[bool] = []

    def before_backward(self, strategy, **kwargs):
        network = strategy.model
        layers = network.masks()
        self.scales.append(layers[0].norm.scale)
        assert len({layer.norm.scale for layer in layers}) == 1
        used = [
            sum(plain.sigmoid(layer.norm.scale * e) for e in layer.norm.embedding.tolist())
            for layer in layers
        ]
        sparsity = plain.sparsity(used, [4, 5, 6], [9, 9, 9], image_channels=1)
        main = F.cross_entropy(strategy.mb_output, strategy.mb_y).item()
        self.losses.append((strategy.loss.item(), main + 2.5 * sparsity))
        self.soft.append(layers[0].norm.training)


def test_each_epoch_anneals_the_scale_and_each_step_adds_the_loss():
    watch = Watch()
    strategy = naive(masked(), SparsityPlugin(2.5, mask_s_max=20.0), watch, train_epochs=2)
    strategy.train(make_benchmark().train_stream[0])
    # 12 images, 4 at a time: three steps from 1/20 to 20.
    assert watch.scales == pytest.approx([0.05, 10.025, 20.0] * 2)
    for loss, expected in watch.losses:
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_heavier_weight_keeps_fewer_channels():
    kept = []
    for weight in (0.0, 15.0, 1000.0):
        model = masked()
        strategy = naive(model, SparsityPlugin(weight), train_epochs=5)
        strategy.train(make_benchmark().train_stream[0])
        kept.append(sum(map(len, model.kept[0])))
    assert kept[0] > kept[1] > kept[2] == 3


def test_the_rate_is_how_much_faster_embeddings_learn():
    steps = []
    for rate in (1.0, 8.0):
        model = masked()
        layer = model.masks()[1]
        before = layer.norm.embedding.detach().clone()
        # One step, from the same start.
        strategy = naive(model, SparsityPlugin(1.0, mask_rate=rate))
        strategy.train_mb_size = 100
        strategy.train(make_benchmark().train_stream[0])
        steps.append(layer.norm.embedding.detach() - before)
    torch.testing.assert_close(steps[1], 8 * steps[0], rtol=1e-3, atol=1e-6)


def test_embeddings_stay_within_their_limits():
    class Push(SupervisedPlugin):
        def before_update(self, strategy, **kwargs):
            for layer in strategy.model.masks():
                layer.norm.embedding.grad.fill_(-1e4)

    model = masked()
    strategy = naive(model, SparsityPlugin(1.0), Push())
    strategy.train(make_benchmark().train_stream[0])
    assert all((layer.norm.embedding == 6).all() for layer in model.masks())


def test_the_block_is_pruned_after_the_experience_as_its_masks_say():
    model = masked()
    strategy = naive(model, SparsityPlugin(1.0), train_epochs=2)
    strategy.train(make_benchmark().train_stream[0])
    embeddings = [layer.norm.embedding.tolist() for layer in model.masks()]
    assert model.kept == [[[c for c, e in enumerate(row) if e > 0] for row in embeddings]]
    weights = [p.shape for n, p in model.specialized[0].named_parameters() if p.dim() == 4]
    inputs = [1, *(len(k) for k in model.kept[0])]
    assert weights == [(b, a, 3, 3) for a, b in pairwise(inputs)]


@pytest.mark.parametrize("shared", [0, 1, 2], ids=["DER", "MEMO-2", "MEMO"])
def test_with_naive_over_several_experiences(shared):
    """The plugins hold the method; Avalanche's own optimizer follows what is cut and added."""
    model = masked(shared)
    strategy = naive(model, HerdingReplayPlugin(20), SparsityPlugin(0.1), train_epochs=2)
    benchmark = make_benchmark()
    for experience in benchmark.train_stream[:3]:
        frozen = [tensors_of(block) for block in model.specialized[: len(model.kept)]]
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
        for before, block in zip(frozen, model.specialized, strict=False):
            assert_same_tensors(tensors_of(block), before)
    assert len(model.kept) == len(model.specialized) == 3
    strategy.train(benchmark.train_stream[3])
    optimized = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    newest = [layer.norm.embedding for layer in model.masks()]
    assert {id(p) for p in newest} <= optimized


def test_an_experience_trained_again_keeps_its_pruned_block():
    model = masked()
    strategy = der(model, train_epochs=1)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    shapes = [p.shape for p in model.specialized[0].parameters()]
    strategy.train(stream[0])
    assert [p.shape for p in model.specialized[0].parameters()] == shapes
    assert len(model.kept) == 1
    strategy.train(stream[1])
    assert len(model.kept) == 2


@pytest.mark.parametrize("size", [5, 4])  # Of parts of equal size Avalanche marks none as the last.
def test_a_block_is_pruned_after_the_last_sub_experience(size):
    model = masked()
    strategy = naive(model, SparsityPlugin(1.0))
    pruned = []
    stream = make_benchmark().train_stream[:1]
    for experience in split_online_stream(stream, experience_size=size):
        strategy.train(experience)
        pruned.append(len(model.kept))
    assert pruned == [0, 0, 1]


# --- the strategy -------------------------------------------------------------------------------


def test_the_classifier_learns_on_binary_masks():
    class Phases(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, bool, float]] = []

        def before_backward(self, strategy, **kwargs):
            norm = strategy.model.masks()[0].norm
            extra = strategy.loss.item() - strategy.criterion().item()
            soft = not set(norm.mask().tolist()) <= {0.0, 1.0}
            self.seen.append((strategy.phase.learns, soft, extra))

    phases = Phases()
    strategy = der(
        masked(),
        auxiliary_weight=0.0,
        first_phases=[Phase(1), CLASSIFIER],
        plugins=[phases],
        mask_s_max=5.0,
    )
    strategy.train(make_benchmark().train_stream[0])
    assert {(learns, soft) for learns, soft, _ in phases.seen} == {
        ("all", True),
        ("classifier", False),
    }
    assert all((extra > 0) == (learns == "all") for learns, _, extra in phases.seen)


def test_der_on_digits_with_pruning(tmp_path):
    """End to end: it learns, its blocks are small, and everything measured says so."""
    torch.manual_seed(0)
    model = ExpandableNetwork(lambda: cifar_resnet(8, in_channels=1), 0, masked=True)
    accuracy = ClassIncrementalAccuracy()
    logger = TensorboardLogger(str(tmp_path))
    strategy = der(
        model,
        sparsity_weight=1.0,
        mask_rate=100,
        mem_size=100,
        train_mb_size=64,
        first_phases=[Phase(4)],
        later_phases=[Phase(4), CLASSIFIER],
        evaluator=EvaluationPlugin(accuracy, MemoryUsage(), ChannelMasks(), loggers=[logger]),
    )
    benchmark = split_digits(increment=2, classes=4)
    for index, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        strategy.eval(benchmark.test_stream[: index + 1])
        measured = strategy.evaluator.get_last_metrics()
        for name, size in (("Parameter", parameter_bytes), ("Inference", inference_bytes)):
            value = measured[f"{name}Memory_MB/eval_phase/test_stream"]
            assert value * 2**20 == pytest.approx(size(model))
    assert accuracy.overall_accuracies("cnn")[-1] > 0.6
    assert accuracy.overall_accuracies("nme")[-1] > 0.8
    whole = ExpandableNetwork(lambda: cifar_resnet(8, in_channels=1), 0)
    whole.grow([0, 1])
    whole.grow([2, 3])
    assert parameter_bytes(model) < 0.6 * parameter_bytes(whole)
    logger.writer.flush()
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    tags = events.Tags()["histograms"]
    assert len(tags) == len(model.masks()) == 7
    for tag in tags:
        assert "ChannelMask/train_phase/train_stream" in tag
        assert len(events.Histograms(tag)) == 2
    layer = model.masks()[0]
    (stem,) = (tag for tag in tags if tag.endswith(f"/{layer.name}"))
    mask = [plain.sigmoid(100 * e) for e in layer.norm.embedding.clamp(-6, 6).tolist()]
    histogram = events.Histograms(stem)[-1].histogram_value
    assert histogram.num == 16
    assert histogram.sum == pytest.approx(sum(mask), rel=1e-3)


def test_without_a_sparsity_weight_der_is_what_it_was():
    strategy = der(dense(), sparsity_weight=0.0)
    assert not any(isinstance(plugin, SparsityPlugin) for plugin in strategy.plugins)


def test_memo_takes_the_plugin():
    model = masked(2)
    strategy = MEMO(
        model=model,
        optimizer=sgd(model),
        mem_size=20,
        train_mb_size=6,
        plugins=[SparsityPlugin(0.1)],
        evaluator=silent(),
    )
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    assert len(model.kept) == 2


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity_weight": -0.1}, "sparsity_weight: expected a number of at least 0, got -0.1"),
        (
            {"sparsity_weight": math.nan},
            "sparsity_weight: expected a number of at least 0, got nan",
        ),
        ({"sparsity_weight": 1, "mask_s_max": 1}, "mask_s_max: expected a number above 1, got 1"),
        (
            {"sparsity_weight": 1, "mask_s_max": math.inf},
            "mask_s_max: expected a number above 1, got inf",
        ),
        ({"sparsity_weight": 1, "mask_rate": 0}, "mask_rate: expected a positive number, got 0"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SparsityPlugin(**options)


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_der_refuses_a_wrong_sparsity_weight(weight):
    with pytest.raises(ValueError, match=r"^sparsity_weight: expected .*, got"):
        der(masked(), sparsity_weight=weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_s_max": 1}, "mask_s_max: expected .*, got 1"),
        ({"mask_rate": 0}, "mask_rate: expected .*, got 0"),
        ({"auxiliary_weight": -1}, "auxiliary_weight: expected .*, got -1"),
    ],
)
def test_der_names_a_wrong_number_as_its_caller_does(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        der(masked(), **options)


def test_masks_without_the_plugin_are_refused():
    with pytest.raises(ValueError, match=r"^plugins: expected a SparsityPlugin .*, got none"):
        der(masked(), sparsity_weight=0)
    model = masked(2)
    with pytest.raises(ValueError, match=r"^plugins: expected a SparsityPlugin .*, got none"):
        MEMO(model=model, optimizer=sgd(model), evaluator=silent())


def test_der_refuses_a_weight_without_masks_before_training():
    model = ExpandableNetwork(tiny_backbone, 0)
    with pytest.raises(ValueError, match=r"model: .* expected .*masked=True, got False"):
        der(model, sparsity_weight=1.0).train(make_benchmark().train_stream[0])
    assert not model.classes


def test_the_plugin_refuses_a_network_without_masks_before_training():
    model = ExpandableNetwork(tiny_backbone, 0)
    strategy = naive(model, SparsityPlugin(1.0))
    with pytest.raises(ValueError, match=r"model: .* expected .*masked=True, got False"):
        strategy.train(make_benchmark().train_stream[0])
    assert not model.classes
