import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import CLStream
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import (
    AGEMPlugin,
    EarlyStoppingPlugin,
    EvaluationPlugin,
    GDumbPlugin,
    GSS_greedyPlugin,
    LRSchedulerPlugin,
)
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import DataLoader

from avalanche_memo.evaluation import MemoryUsage, class_incremental_metrics
from avalanche_memo.models import CosineClassifier, ExpandableNetwork, FastPath
from avalanche_memo.models.expandable import experience_classes
from avalanche_memo.training import (
    DER,
    MEMO,
    PODNET_BALANCED,
    PODNET_TRAINING,
    UCIR_BALANCED,
    UCIR_TRAINING,
    Finetune,
    Phase,
    Replay,
)
from avalanche_memo.training.der import (
    DER_CLASSIFIER,
    DER_IMAGENET_REPRESENTATION,
    DER_REPRESENTATION,
    DER_RESNET32_FIRST,
    DER_RESNET32_LATER,
)
from avalanche_memo.training.loading import ResidentLoader
from avalanche_memo.training.memo import MEMO_FIRST, MEMO_LATER
from avalanche_memo.training.plugins import HerdingReplayPlugin, ResidentBatches
from tests.helpers import (
    APIS,
    ORDER,
    assert_same_tensors,
    make_benchmark,
    silent,
    tensors_of,
    tiny_backbone,
)

FAST = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


def sgd(model: torch.nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def make(strategy: Any, shared_stages: int, *plugins: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = ExpandableNetwork(tiny_backbone, shared_stages)
    memory = {} if strategy is Finetune else {"mem_size": 20}
    return strategy(
        model=model,
        optimizer=sgd(model),
        train_mb_size=6,
        plugins=list(plugins),
        **{"fast": False, "evaluator": silent(), **memory, **options},
    )


class Forbid(SupervisedPlugin):
    """Fails at the first step."""

    def before_training_iteration(self, strategy, **kwargs):
        pytest.fail("nothing is to be trained")


class Record(SupervisedPlugin):
    """Writes down the optimizer's settings at each epoch's first step, by experience."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[list[float]] = []
        self.decays: list[list[float]] = []
        self.fresh: list[list[bool]] = []

    def before_training_exp(self, strategy, **kwargs):
        for kind in (self.rates, self.decays, self.fresh):
            kind.append([])

    def before_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_epoch_iterations == 0:
            (group,) = strategy.optimizer.param_groups
            self.rates[-1].append(group["lr"])
            self.decays[-1].append(group["weight_decay"])
            self.fresh[-1].append(not strategy.optimizer.state)


# --- phases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected a whole number of at least 1, got 1.5"),
        ({"lr": 0.0}, "lr: expected a positive rate or None, got 0.0"),
        ({"lr": -1.0}, "lr: .*got -1.0"),
        ({"lr": math.inf}, "lr: .*got inf"),
        ({"weight_decay": math.inf}, "weight_decay: .*got inf"),
        ({"gamma": math.inf}, "gamma: .*got inf"),
        ({"weight_decay": -1e-4}, "weight_decay: .*got -0.0001"),
        ({"milestones": (3, 2)}, r"milestones: expected rising epoch numbers.*got \(3, 2\)"),
        ({"milestones": (2, 2)}, "milestones: "),
        ({"milestones": (0,)}, "milestones: "),
        ({"milestones": (2,), "cosine": True}, "milestones: expected none beside cosine"),
        ({"warmup_epochs": -1}, "warmup_epochs: .*got -1"),
        ({"learns": "head"}, "learns: expected 'all' or 'classifier', got head"),
        ({"data": "some"}, "data: expected 'all', 'balanced' or 'exemplars', got some"),
        ({"data": "exemplars"}, "data: expected 'exemplars' only where learns is 'classifier'"),
        ({"images": 0}, "images: expected a whole number of at least 1 or None, got 0"),
        ({"images": 1.5}, "images: expected a whole number of at least 1 or None, got 1.5"),
        ({"batch_norm": "updated"}, "batch_norm: expected 'frozen', or 'updated' where"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": math.inf}, "temperature: expected a positive number, got inf"),
    ],
)
def test_a_phase_refuses_wrong_values(options, named):
    with pytest.raises(ValueError, match=named):
        Phase(**{"epochs": 5, **options})


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [0.05] * 5),
        ({"lr": 0.2}, [0.2] * 5),
        ({"lr": 1.0, "milestones": (2, 4)}, [1, 1, 0.1, 0.1, 0.01]),
        ({"milestones": (1,), "gamma": 0.5}, [0.05, 0.025, 0.025, 0.025, 0.025]),
        (
            {"lr": 1.0, "cosine": True, "epochs": 4},
            [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
        ({"lr": 0.4, "warmup_epochs": 4}, [0.1, 0.2, 0.3, 0.4, 0.4]),
        ({"lr": 0.4, "warmup_epochs": 2, "milestones": (3,)}, [0.2, 0.4, 0.4, 0.04, 0.04]),
    ],
)
def test_learning_rates_of_a_phase(options, rates):
    record = Record()
    phase = Phase(**{"epochs": 5, **options})
    strategy = make(MEMO, 2, record, first_phases=[phase], later_phases=[phase])
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    assert len(record.rates) == 2
    for found in record.rates:
        assert found == pytest.approx(rates)


@pytest.mark.parametrize(
    ("phase", "epochs", "rates", "weight_decay"),
    # Epoch: rate, as the published schedules say.
    [
        (MEMO_FIRST, 200, {0: 0.1, 59: 0.1, 60: 1e-2, 120: 1e-3, 170: 1e-4, 199: 1e-4}, 5e-4),
        (MEMO_LATER, 170, {0: 0.1, 79: 0.1, 80: 1e-2, 120: 1e-3, 150: 1e-4, 169: 1e-4}, 2e-4),
        (
            DER_REPRESENTATION,
            170,
            {0: 0.01, 9: 0.1, 109: 0.1, 110: 1e-2, 129: 1e-2, 130: 1e-3, 169: 1e-3},
            5e-4,
        ),
        (DER_CLASSIFIER, 30, {0: 0.1, 14: 0.1, 15: 1e-2, 29: 1e-2}, 5e-4),
        (DER_IMAGENET_REPRESENTATION, 220, {0: 5e-3, 79: 0.1, 80: 1e-2, 200: 1e-5}, 5e-4),
        (DER_RESNET32_FIRST, 200, {0: 0.1, 60: 1e-2, 120: 1e-3, 170: 1e-4}, 5e-4),
        (DER_RESNET32_LATER, 170, {0: 0.1, 80: 1e-2, 120: 1e-3, 150: 1e-4}, 2e-4),
        (
            PODNET_TRAINING,
            160,
            {0: 0.1, 40: 0.1 * (2 + 2**0.5) / 4, 80: 0.05, 120: 0.1 * (2 - 2**0.5) / 4},
            5e-4,
        ),
        (PODNET_BALANCED, 20, {0: 0.05, 19: 0.05}, 5e-4),
        (UCIR_TRAINING, 160, {0: 0.1, 79: 0.1, 80: 1e-2, 120: 1e-3, 159: 1e-3}, 5e-4),
        (UCIR_BALANCED, 20, {0: 0.01, 9: 0.01, 10: 1e-3, 19: 1e-3}, 1e-4),
    ],
)
def test_published_schedules(phase, epochs, rates, weight_decay):
    assert phase.epochs == epochs
    assert phase.weight_decay == weight_decay
    assert {epoch: phase.rate(epoch, phase.lr) for epoch in rates} == pytest.approx(rates)


def test_the_optimizer_starts_afresh_at_each_phase():
    record = Record()
    first = [Phase(2, lr=0.3, weight_decay=0.1, milestones=(1,)), Phase(1)]
    later = [Phase(1, lr=0.2), Phase(2, weight_decay=0.0)]
    strategy = make(MEMO, 2, record, first_phases=first, later_phases=later)
    optimizer = strategy.optimizer
    for experience in make_benchmark().train_stream[:3]:
        strategy.train(experience)
    assert record.rates == [pytest.approx([0.3, 0.03, 0.05])] + 2 * [[0.2, 0.05, 0.05]]
    assert record.decays == [[0.1, 0.1, 5e-4]] + 2 * [[5e-4, 0.0, 0.0]]
    assert record.fresh == [[True, False, True]] + 2 * [[True, True, False]]
    assert strategy.optimizer is optimizer


def test_each_phase_has_as_many_epochs_as_it_says():
    class Epochs(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.epochs: list[list[int]] = []

        def before_training_exp(self, strategy, **kwargs):
            self.epochs.append([])

        def before_training_epoch(self, strategy, **kwargs):
            self.epochs[-1].append(strategy.phase_index)

    epochs = Epochs()
    phases = [Phase(2), Phase(1), Phase(3)]
    strategy = make(MEMO, 2, epochs, first_phases=[Phase(1)], later_phases=phases)
    for experience in make_benchmark().train_stream[:3]:
        strategy.train(experience)
    assert epochs.epochs == [[0], [0, 0, 1, 2, 2, 2], [0, 0, 1, 2, 2, 2]]


def test_later_phases_begin_with_the_second_training_whichever_experience_it_is():
    record, stream = Record(), make_benchmark().train_stream
    phases = {"first_phases": [Phase(1, lr=0.03)], "later_phases": [Phase(1, lr=0.07)]}
    strategy = make(Finetune, 3, record, **phases)
    for experience in (stream[1], stream[1], stream[0]):
        strategy.train(experience)
    assert record.rates == [[0.03], [0.07], [0.07]]


def test_without_phases_an_experience_has_train_epochs_epochs():
    record = Record()
    strategy = make(MEMO, 2, record, train_epochs=3)
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    assert record.rates == [[0.05] * 3] * 2


@pytest.mark.parametrize("last", [0, 3])
def test_an_early_stop_ends_a_phase_and_not_the_next(last):
    class Stop(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == last:
                strategy.stop_training()

    record = Record()
    phases = [Phase(4), Phase(3, lr=0.3)]
    strategy = make(MEMO, 2, record, Stop(), first_phases=phases)
    strategy.train(make_benchmark().train_stream[0])
    assert record.rates == [[0.05] * (last + 1) + [0.3] * 3]


def test_an_experience_may_be_stopped_before_it_begins():
    class Stop(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter == 0:
                strategy.stop_training()

    record = Record()
    strategy = make(MEMO, 2, record, Stop(), train_epochs=2)
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    assert record.rates == [[], [0.05] * 2]


def test_a_rate_that_is_a_tensor_starts_afresh_in_each_phase():
    model = ExpandableNetwork(tiny_backbone, 3)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=torch.tensor(0.1))
    scheduler = LRSchedulerPlugin(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    rates = []

    class Rates(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            rates.append(float(strategy.optimizer.param_groups[0]["lr"]))

    strategy = Finetune(
        model=model,
        optimizer=optimizer,
        first_phases=[Phase(3), Phase(2)],
        plugins=[Rates(), scheduler],
        train_mb_size=6,
        evaluator=silent(),
    )
    strategy.train(make_benchmark().train_stream[0])
    assert rates == pytest.approx([0.1, 0.05, 0.025, 0.1, 0.05])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"later_phases": Phase(2)}, "later_phases: expected a list of at least one Phase or None"),
        ({"first_phases": []}, "first_phases: expected a list of at least one Phase or None"),
        ({"first_phases": [60]}, r"first_phases: expected a list of .* or None, got \[60\]"),
        ({"checkpoint": "run.pt"}, "checkpoint: expected a Checkpoint or None, got 'run.pt'"),
        ({"train_epochs": 0}, "train_epochs: expected a whole number of at least 1, got 0"),
        ({"mem_size": 0}, "mem_size: expected a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_by_their_names(options, message):
    with pytest.raises(ValueError, match=message):
        make(Replay, 3, **options)
    with pytest.raises(TypeError, match=r"rates: expected MemoryRates or None, got \(0.1, 0.2\)"):
        make(Replay, 3, memory_rates=(0.1, 0.2))
    with pytest.raises(TypeError, match="compression: expected a Compression or None, got 'webp'"):
        make(Replay, 3, compression="webp")
    with pytest.raises(TypeError, match="fast: expected True, False or a FastPath, got 'none'"):
        make(Replay, 3, fast="none")


def test_a_memory_may_have_a_size_of_numpys():
    assert make(Replay, 3, mem_size=np.int64(20)).plugins[0].buffer.max_size == 20


class Alter(SupervisedPlugin):
    """Changes a setting before the second experience."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value = name, value

    def before_training_exp(self, strategy, **kwargs):
        if strategy.clock.train_exp_counter == 1:
            if self.name == "train_epochs":
                strategy.train_epochs = self.value
            else:
                strategy.optimizer.param_groups[0][self.name] = self.value


@pytest.mark.parametrize("by_plugin", [False, True])
def test_settings_that_change_between_experiences_hold(by_plugin):
    record, stream = Record(), make_benchmark().train_stream
    alter = [Alter("lr", 0.01), Alter("train_epochs", 3)]
    strategy = make(MEMO, 2, *(alter if by_plugin else []), record)
    strategy.train(stream[0])
    if not by_plugin:
        strategy.optimizer.param_groups[0]["lr"] = 0.01
        strategy.train_epochs = 3
    strategy.train(stream[1])
    strategy.train(stream[2])
    assert record.rates == [[0.05], [0.01] * 3, [0.01] * 3]


def test_epochs_that_change_hold_where_a_phase_for_the_classifier_follows():
    stream, record = make_benchmark().train_stream, Record()
    strategy = make(DER, 0, record)
    strategy.train(stream[0])
    strategy.train_epochs = 3
    strategy.train(stream[1])
    assert [len(rates) for rates in record.rates] == [1, 3 + DER_CLASSIFIER.epochs]
    assert strategy.later_phases[1:] == (DER_CLASSIFIER,)


def test_a_phase_leaves_the_users_settings_behind():
    record, stream = Record(), make_benchmark().train_stream
    phases = [Phase(2, lr=0.3, weight_decay=0.1), Phase(1), Phase(3, milestones=(1,))]
    strategy = make(MEMO, 2, record, first_phases=phases)
    strategy.train(stream[0])
    assert record.rates[0] == pytest.approx([0.3, 0.3, 0.05, 0.05, 0.005, 0.005])
    group = strategy.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.05, 5e-4)
    strategy.train(stream[1])
    assert record.rates[1] == [0.05]


def test_a_constant_rate_of_a_phase_stays_beside_a_scheduler():
    record, stream = Record(), make_benchmark().train_stream
    strategy = make(MEMO, 2, record, first_phases=[Phase(2), Phase(3, lr=0.3)])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(strategy.optimizer, 0.5)
    strategy.plugins.append(LRSchedulerPlugin(scheduler))
    strategy.train(stream[0])
    assert record.rates == [pytest.approx([0.05, 0.025, 0.3, 0.3, 0.3])]


def test_a_subclass_may_make_its_own_loader():
    class Few(Replay):
        def make_train_dataloader(self, **kwargs):
            self.dataloader = DataLoader(self.adapted_dataset.subset([0, 1]), batch_size=2)

    class Sizes(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            sizes.append(len(strategy.mb_x))

    sizes: list[int] = []
    strategy = make(Few, 3, Sizes())
    strategy.train(make_benchmark().train_stream[0])
    assert sizes == [2]


@pytest.mark.parametrize("fast", [True, FastPath(resident_batches=False)])
def test_a_users_own_resident_batches_serve_all_phases(fast):
    class Loaders(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.kinds: list[type] = []

        def before_training_epoch(self, strategy, **kwargs):
            self.kinds.append(type(strategy.dataloader))

    loaders, own = Loaders(), ResidentBatches(1 << 20)
    phases = [Phase(1), Phase(1, learns="classifier", data="balanced")]
    strategy = make(DER, 0, own, loaders, first_phases=phases, fast=fast)
    strategy.train(make_benchmark().train_stream[0])
    assert loaders.kinds == [ResidentLoader] * 2
    assert [p for p in strategy.plugins if isinstance(p, ResidentBatches)] == [own]


def test_a_scheduler_may_go_on_through_the_experiences_and_be_made_late():
    stream = make_benchmark().train_stream
    for naive in (False, True):
        record = Record()
        model = ExpandableNetwork(tiny_backbone, 3)
        options = {"model": model, "optimizer": sgd(model), "evaluator": silent()}
        options |= {"train_mb_size": 6, "train_epochs": 2, "plugins": [record]}
        strategy = Naive(**options) if naive else Finetune(**options)
        halving = torch.optim.lr_scheduler.ExponentialLR(strategy.optimizer, 0.5)
        warm = torch.optim.lr_scheduler.LinearLR(strategy.optimizer, 0.1, total_iters=2)
        goes_on = LRSchedulerPlugin(halving, reset_lr=False, reset_scheduler=False)
        strategy.plugins.insert(0, goes_on)
        for experience in stream[:3]:
            strategy.train(experience, reset_optimizer_state=True)
        assert warm.last_epoch == 0
        rates = [rate for rates in record.rates for rate in rates]
        assert rates == pytest.approx([0.005 * 0.5**i for i in range(6)])


def test_the_optimizer_may_be_replaced_and_have_further_groups():
    record, stream = Record(), make_benchmark().train_stream
    other = nn.Parameter(torch.ones(3))

    class Add(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            strategy.optimizer.add_param_group({"params": [other]})

        def before_backward(self, strategy, **kwargs):
            strategy.loss = strategy.loss + other.square().sum()

    strategy = make(MEMO, 2, record)
    strategy.train(stream[0])
    strategy.optimizer = torch.optim.Adam(strategy.model.parameters(), lr=0.001)
    strategy.train(stream[1])
    assert record.rates[1] == [0.001]
    assert strategy.optimizer.param_groups[0]["weight_decay"] == 0
    strategy.plugins.remove(record)  # It expects a single group.
    strategy.plugins.append(Add())
    strategy.train(stream[2])
    assert (other < 1).all()


@pytest.mark.parametrize("plugin", [AGEMPlugin(4, 2), GSS_greedyPlugin(4, 2, [1, 8, 8])])
def test_plugins_that_flatten_gradients_have_contiguous_ones(plugin):
    assert not make(MEMO, 2, plugin, fast=True).model.fast.channels_last
    assert make(MEMO, 2, fast=True).model.fast.channels_last


def test_avalanches_early_stopping_watches_each_phase_by_itself():
    """With a margin that nothing exceeds, a phase's best is what its first epoch has left."""

    class Watch(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.weights: dict[tuple[int, int], torch.Tensor] = {}

        def after_training_epoch(self, strategy, **kwargs):
            weight = strategy.model.classifier.weight.detach().clone()
            self.weights[strategy.phase_index, strategy.phase_epoch] = weight

    watch = Watch()
    strategy = der(
        watch,
        EarlyStoppingPlugin(patience=2, val_stream_name="test_stream", margin=2.0),
        first_phases=[Phase(5), replace(CLASSIFIER, epochs=5)],
        eval_every=1,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    )
    benchmark = make_benchmark()
    strategy.train(benchmark.train_stream[0], eval_streams=[benchmark.test_stream])
    # Evaluated before training, too: the first phase's best is what it began with.
    assert list(watch.weights) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert torch.equal(strategy.model.classifier.weight, watch.weights[1, 0])


# --- DER's second phase -------------------------------------------------------------------------


class SecondPhase(SupervisedPlugin):
    """Writes down how the second phase of each experience begins, and what it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, torch.Tensor] = {}
        self.end_of_first: torch.Tensor = torch.empty(0)
        self.counts: list[Counter] = []
        self.losses: list[tuple] = []
        self.learning: list[str] = []

    def before_training_epoch(self, strategy, **kwargs):
        if strategy.phase_index == 1:
            self.counts.append(Counter())
            if not self.before:
                self.before = tensors_of(strategy.model)

    def after_training_epoch(self, strategy, **kwargs):
        if strategy.phase_index == 0:
            self.end_of_first = strategy.model.classifier.weight.detach().clone()

    def before_backward(self, strategy, **kwargs):
        if strategy.phase_index == 1:
            self.counts[-1].update(strategy.mb_y.tolist())
            logits, targets = strategy.mb_output.detach().clone(), strategy.mb_y.clone()
            self.losses.append((strategy.loss.item(), logits, targets))

    def after_backward(self, strategy, **kwargs):
        if strategy.phase_index == 1:
            self.learning = [n for n, p in strategy.model.named_parameters() if p.grad is not None]


CLASSIFIER = Phase(
    2,
    lr=0.1,
    learns="classifier",
    data="balanced",
    temperature=5.0,
    reset_classifier=True,
)


def der(*plugins: Any, classifier: Phase = CLASSIFIER, **options: Any) -> Any:
    return make(DER, 0, *plugins, later_phases=[Phase(2), classifier], **options)


@FAST
@pytest.mark.parametrize("api", APIS)
def test_the_second_phase_changes_the_classifier_alone(api, fast):
    second = SecondPhase()
    strategy = der(second, fast=fast)
    stream = make_benchmark(api).train_stream
    strategy.train(stream[0])
    assert not second.before  # the first experience has one phase
    strategy.train(stream[1])
    after = tensors_of(strategy.model)
    changed = {name for name in after if not torch.equal(after[name], second.before[name])}
    assert changed == {name for name in after if name.startswith("classifier.")}
    assert set(second.learning) == changed
    # And then all goes on learning.
    assert all(p.requires_grad for p in strategy.model.specialized[-1].parameters())
    assert not any(p.requires_grad for p in strategy.model.specialized[0].parameters())
    strategy.train(stream[2])
    assert not any(p.requires_grad for p in strategy.model.specialized[1].parameters())


class Interrupt(SupervisedPlugin):
    """Stops the classifier's phase at its first step, once."""

    armed = True

    def after_training_iteration(self, strategy, **kwargs):
        if self.armed and strategy.phase.learns == "classifier":
            self.armed = False
            self.inside = strategy.adapted_dataset, strategy.dataloader
            raise KeyboardInterrupt


@FAST
def test_an_interrupted_phase_leaves_nothing_behind(fast):
    interrupt = Interrupt()
    strategy = der(interrupt, fast=fast)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1])
    newest, older = strategy.model.specialized[-1], strategy.model.specialized[0]
    assert all(p.requires_grad for p in newest.parameters())
    assert not any(p.requires_grad for p in older.parameters())
    assert all(p.grad is None for p in strategy.model.parameters())
    assert newest.training
    assert strategy.phase is None
    assert strategy.adapted_dataset is not interrupt.inside[0]
    assert strategy.dataloader is not interrupt.inside[1]
    before = tensors_of(newest)
    strategy.train(stream[2])
    assert_same_tensors(tensors_of(newest), before)  # Frozen now.
    assert all(p.requires_grad for p in strategy.model.specialized[-1].parameters())


def test_an_experience_interrupted_before_it_begins_leaves_nothing_behind():
    class InterruptOnce(SupervisedPlugin):
        armed = True

        def before_training_exp(self, strategy, **kwargs):
            if self.armed and strategy.clock.train_exp_counter:
                self.armed = False
                raise KeyboardInterrupt

    record = Record()
    strategy = make(DER, 0, record, InterruptOnce(), train_epochs=2)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1])
    assert strategy.train_epochs == 2
    strategy.train(stream[1])
    assert [phase.epochs for phase in strategy.later_phases] == [2, DER_CLASSIFIER.epochs]
    assert strategy.clock.train_exp_epochs == 2 + DER_CLASSIFIER.epochs


def test_what_growth_has_frozen_learns_where_the_classifier_starts_afresh():
    second = SecondPhase()
    torch.manual_seed(0)
    model = ExpandableNetwork(tiny_backbone, 3, make_classifier=CosineClassifier)
    phases = [Phase(1), Phase(1, reset_classifier=True)]
    strategy = Replay(
        model=model,
        optimizer=sgd(model),
        mem_size=20,
        later_phases=phases,
        plugins=[second],
        evaluator=silent(),
    )
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    old = "classifier.weights.0"
    assert old in second.learning
    assert not torch.equal(tensors_of(model)[old], second.before[old])


@pytest.mark.parametrize("reset", [True, False])
def test_the_classifier_starts_afresh_on_demand(reset):
    second = SecondPhase()
    strategy = der(second, classifier=Phase(1, learns="classifier", reset_classifier=reset))
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    weights = [n for n in second.before if n.startswith("classifier.weights")]
    start = torch.cat([second.before[name] for name in weights], dim=1)
    assert start.shape == second.end_of_first.shape
    if reset:
        assert not (start == second.end_of_first).any()
        assert start.abs().max() <= 1 / math.sqrt(12)  # as a fresh nn.Linear
    else:
        assert torch.equal(start, second.end_of_first)


@FAST
@pytest.mark.parametrize("labels", [False, True], ids=["no task labels", "task labels"])
def test_the_second_phase_has_as_many_samples_of_each_class(labels, fast):
    second = SecondPhase()
    benchmark = make_benchmark(
        experiences=3, per_class=9, task_labels=labels, per_exp_classes={0: 6, 1: 2, 2: 2}
    )
    strategy = der(second, fast=fast, exemplars_per_class=4)
    strategy.train(benchmark.train_stream[0])
    for experience, seen in zip(benchmark.train_stream[1:], (8, 10), strict=True):
        second.counts.clear()
        strategy.train(experience)
        assert second.counts == [dict.fromkeys(ORDER[:seen], 4)] * 2


class Trained(SupervisedPlugin):
    """Keeps what each epoch of a phase is trained on."""

    def __init__(self, phase: int) -> None:
        super().__init__()
        self.phase = phase
        self.seen: list[Counter] = []

    def before_training_epoch(self, strategy, **kwargs):
        self.epoch: Counter = Counter()
        if strategy.phase_index == self.phase:
            self.seen.append(self.epoch)

    def before_forward(self, strategy, **kwargs):
        for image, label in zip(strategy.mb_x, strategy.mb_y.tolist(), strict=True):
            self.epoch[(label, *(255 * image).round().int().flatten().tolist())] += 1


@FAST
@pytest.mark.parametrize("api", APIS)
def test_a_phase_on_the_exemplars_trains_on_what_is_held_afterwards(api, fast):
    herded = Trained(1)
    phases = [Phase(1), Phase(2, learns="classifier", data="exemplars")]
    strategy = make(Replay, 3, herded, later_phases=phases, fast=fast, mem_size=14)
    for n, experience in enumerate(make_benchmark(api).train_stream[:3]):
        herded.seen.clear()
        strategy.train(experience)
        held = Counter()
        for image, label, *_ in strategy.plugins[0].buffer.buffer.eval():
            held[(int(label), *(255 * image).round().int().flatten().tolist())] += 1
        assert len(held) == [6 * 2, 3 * 4, 2 * 6][n]  # a class has 6 samples
        assert herded.seen == ([held, held] if n else [])


@FAST
def test_an_epoch_has_at_most_so_many_images_drawn_anew(fast):
    """Later experiences have 12 new images and 12 exemplars."""
    part, everything = Trained(0), Trained(1)
    phases = [Phase(3, images=15), Phase(1, images=100)]
    strategy = make(Replay, 3, part, everything, later_phases=phases, fast=fast, mem_size=14)
    for n, experience in enumerate(make_benchmark().train_stream[:3]):
        part.seen.clear()
        everything.seen.clear()
        strategy.train(experience)
        if n:
            (whole,) = everything.seen
            assert whole.total() == 24
            assert [epoch.total() for epoch in part.seen] == [15] * 3
            assert all(epoch <= whole for epoch in part.seen)
            assert part.seen[0] != part.seen[1] != part.seen[2]


@pytest.mark.parametrize("norms", ["frozen", "updated"])
def test_norms_stay_or_follow_the_data_where_the_classifier_alone_learns(norms):
    kinds: list[tuple[bool, bool]] = []

    class Norms(SupervisedPlugin):
        def after_forward(self, strategy, **kwargs):
            parts = (strategy.model.generalized, strategy.model.specialized)
            kinds.append(tuple(part[-1].training for part in parts))

    def statistics(strategy):
        buffers = dict(strategy.model.named_buffers())
        return {name: b.clone() for name, b in buffers.items() if "running" in name}

    strategy = make(
        MEMO, 2, Norms(), later_phases=[Phase(1, learns="classifier", batch_norm=norms)]
    )
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    before, weights = statistics(strategy), tensors_of(strategy.model.generalized)
    kinds.clear()
    strategy.train(stream[1])
    assert set(kinds) == {(norms == "updated",) * 2}
    after = statistics(strategy)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    own = {name for name in before if name.startswith("generalized")}
    assert moved == (own if norms == "updated" else set())
    learned = tensors_of(strategy.model.generalized)
    assert all(torch.equal(weights[k], learned[k]) for k in weights if k.endswith("weight"))


def test_a_phase_on_the_exemplars_needs_a_memory():
    with pytest.raises(ValueError, match=r"data: expected a HerdingReplayPlugin .*got none"):
        make(Finetune, 3, later_phases=[Phase(1, learns="classifier", data="exemplars")])


@pytest.mark.parametrize(
    ("options", "classifier", "message"),
    [
        ({"learns": "classifier"}, None, "one with a `classifier` for a phase that trains it"),
        ({"reset_classifier": True}, None, "one whose `classifier` has reset_parameters"),
        ({"reset_classifier": True}, nn.Sequential(), "one whose `classifier` has reset_param"),
    ],
)
def test_a_phase_about_the_classifier_needs_one(options, classifier, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    if classifier is not None:
        model.classifier = classifier
    with pytest.raises(ValueError, match=f"model: expected {message}.*got Sequential"):
        Finetune(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            later_phases=[Phase(1, **options)],
        )


@FAST
def test_temperature_divides_the_logits_in_the_loss(fast):
    second = SecondPhase()
    strategy = der(second, fast=fast)
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    assert second.losses
    for loss, logits, targets in second.losses:
        # No auxiliary loss either: what it would train is frozen.
        assert loss == pytest.approx(F.cross_entropy(logits / 5, targets).item(), rel=1e-5)
        assert loss != pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-3)


def test_evaluation_has_no_temperature():
    evaluator = EvaluationPlugin(loss_metrics(stream=True), loggers=[])
    torch.manual_seed(0)
    model = ExpandableNetwork(tiny_backbone, 2)
    strategy = MEMO(
        model=model,
        optimizer=sgd(model),
        train_mb_size=6,
        first_phases=[Phase(2, temperature=5.0)],
        evaluator=evaluator,
        fast=False,
    )
    benchmark = make_benchmark()
    strategy.train(benchmark.train_stream[0])
    (loss,) = strategy.eval(benchmark.test_stream[:1]).values()
    x, y = zip(*((x, y) for x, y, _ in benchmark.test_stream[0].dataset.eval()), strict=True)
    with torch.no_grad():
        logits = model.eval()(torch.stack(x))
    expected = F.cross_entropy(logits, torch.tensor(y)).item()
    assert loss == pytest.approx(expected, rel=1e-4)


# --- periodic evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eval_every", "first", "later"),
    # Before training; after epochs 0, k, 2k, ... of 2 and of 2 + 3; and at the end of training.
    [
        (-1, 0, 0),
        (0, 2, 2),
        (1, 4, 7),
        (2, 3, 5),
        (3, 3, 4),
    ],
)
def test_periodic_evaluation_counts_epochs_through_the_phases(eval_every, first, later):
    class Count(SupervisedPlugin):
        evaluations = 0

        def before_eval(self, strategy, **kwargs):
            self.evaluations += 1

    count = Count()
    strategy = make(
        DER,
        0,
        count,
        first_phases=[Phase(2)],
        later_phases=[Phase(2), Phase(3, learns="classifier", data="balanced")],
        eval_every=eval_every,
    )
    benchmark = make_benchmark()
    for experience, expected in zip(benchmark.train_stream[:3], (first, later, later), strict=True):
        count.evaluations = 0
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        assert count.evaluations == expected


def test_the_last_periodic_evaluation_sees_the_readout_and_the_memory_that_stay():
    metrics = [class_incremental_metrics(), MemoryUsage()]
    strategy = make(MEMO, 2, eval_every=1, evaluator=EvaluationPlugin(*metrics, loggers=[]))
    benchmark = make_benchmark()
    for index, experience in enumerate(benchmark.train_stream[:2]):
        test = benchmark.test_stream[: index + 1]
        during = dict(strategy.train(experience, eval_streams=[test]))
        after = strategy.eval(test)
        assert {name.split("/")[0] for name in after} > {"Top1_Acc_NME_Stream", "ExemplarMemory_MB"}
        torch.testing.assert_close({n: during[n] for n in after}, after, equal_nan=True)


def test_evaluation_between_epochs_changes_no_weight():
    """Bit for bit on the fast path, whose evaluation draws no random numbers."""
    states = []
    for eval_every in (-1, 1):
        strategy = der(eval_every=eval_every, fast=True)
        benchmark = make_benchmark()
        for experience in benchmark.train_stream[:2]:
            strategy.train(experience, eval_streams=[benchmark.test_stream[:2]])
        states.append(tensors_of(strategy.model))
    assert_same_tensors(states[0], states[1])


# --- what goes wrong ----------------------------------------------------------------------------


@FAST
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_training(value, fast):
    class Spoil(SupervisedPlugin):
        def before_backward(self, strategy, **kwargs):
            clock = strategy.clock
            place = (clock.train_exp_counter, clock.train_exp_epochs, clock.train_epoch_iterations)
            if place in {(1, 2, 1), (1, 2, 2)}:
                strategy.loss = strategy.loss + value

    strategy = make(MEMO, 2, Spoil(), train_epochs=4, fast=fast)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    message = "loss: not finite in experience 1, epoch 2, step 1"
    with pytest.raises(FloatingPointError, match=message):
        strategy.train(stream[1])


@pytest.mark.parametrize(("strategy", "shared_stages"), [(MEMO, 2), (DER, 0), (Finetune, 3)])
def test_an_experience_without_data_is_refused(strategy, shared_stages):
    trainer = make(strategy, shared_stages)
    full = make_benchmark().train_stream[0].dataset
    stream = benchmark_from_datasets(train=[full, full.subset([])]).train_stream
    message = "experience: expected data to train on, experience 1 has none"
    with pytest.raises(ValueError, match=message):
        trainer.train(stream[1])
    assert not trainer.model.classes


def test_two_parameter_groups_are_refused():
    model = ExpandableNetwork(tiny_backbone, 2)
    groups = [{"params": model.generalized.parameters()}, {"params": model.classifier.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="optimizer: expected one parameter group, got 2"):
        MEMO(model=model, optimizer=optimizer)


def test_parameters_that_the_user_froze_stay_frozen():
    strategy = der()
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    strategy.train(stream[1])
    norm = strategy.model.specialized[-1][0][1]
    norm.requires_grad_(False)
    before = norm.weight.clone()
    strategy.train(stream[1])
    assert torch.equal(norm.weight, before)
    assert not norm.weight.requires_grad


def test_a_weight_decay_needs_an_optimizer_that_has_one():
    model = ExpandableNetwork(tiny_backbone, 1)
    options = {"model": model, "optimizer": torch.optim.Rprop(model.parameters(), lr=0.01)}
    with pytest.raises(ValueError, match=r"^optimizer: expected one with weight_decay .*got Rprop"):
        Finetune(**options, first_phases=[Phase(1, weight_decay=1e-4)])
    Finetune(**options, first_phases=[Phase(1)])


def test_a_network_that_a_plugin_adapts_does_not_grow_in_evaluation():
    # GDumb keeps a copy in training mode, adapts it to what is evaluated and goes on with it.
    strategy = make(MEMO, 1, GDumbPlugin(20))
    benchmark = make_benchmark()
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    strategy.train(benchmark.train_stream[1])
    expected = [experience_classes(experience) for experience in benchmark.train_stream[:2]]
    assert strategy.model.growth == expected
    assert len(strategy.model.specialized) == 2


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers(optimizer):
    torch.manual_seed(0)
    model = ExpandableNetwork(tiny_backbone, 0)
    strategy = DER(
        model=model,
        optimizer=optimizer(model.parameters(), lr=0.01),
        later_phases=[Phase(1), CLASSIFIER],
        mem_size=20,
        train_mb_size=6,
        evaluator=silent(),
    )
    for experience in make_benchmark().train_stream[:3]:
        strategy.train(experience)
    assert isinstance(strategy.optimizer, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_users_batch_size_of_evaluation_holds_on_every_device():
    for size in (None, 16):
        strategy = make(Replay, 3, fast=True, eval_mb_size=size)
        (resident,) = [p for p in strategy.plugins if isinstance(p, ResidentBatches)]
        assert resident.eval_batch_size == size


def test_a_stream_that_makes_its_data_is_not_run_ahead_of():
    experiences, made = make_benchmark().train_stream, []

    def make_data():
        for experience in experiences:
            made.append(experience.current_experience)
            yield DatasetExperience(dataset=experience.dataset)

    strategy = make(Replay, 3)
    for number, experience in enumerate(CLStream("train", make_data())):
        strategy.train(experience)
        assert made == list(range(number + 1))
    assert len(strategy.model.classes) == 10
    with pytest.raises(ValueError, match=r"mem_size: expected at least one .* 2 classes, got 1"):
        make(Replay, 3, mem_size=1).train(next(iter(CLStream("train", make_data()))))


def test_a_model_without_features_is_refused_before_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    strategy = Naive(
        model=model,
        optimizer=sgd(model),
        plugins=[HerdingReplayPlugin(20), Forbid()],
        evaluator=silent(),
    )
    with pytest.raises(TypeError, match=r"model: expected a module with extract_features"):
        strategy.train(make_benchmark().train_stream[0])
