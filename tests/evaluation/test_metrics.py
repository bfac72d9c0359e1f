import io
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    nc_benchmark,
)
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.models import DynamicModule, IncrementalClassifier
from avalanche.training import ICaRL, Naive
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_memo.budget import inference_bytes, parameter_bytes
from avalanche_memo.evaluation import (
    ClassIncrementalAccuracy,
    MemoryUsage,
    TrainingAverages,
    class_incremental_metrics,
    memory_metrics,
)
from avalanche_memo.evaluation.metrics import _Counter
from tests.reference import metrics as reference

# Four experiences of three classes: seen ids have gaps and come in no order.
ORDER = [11, 4, 7, 0, 2, 9, 1, 3, 10, 5, 8, 6]
APIS = ["nc", "class_incremental"]


class Data(TensorDataset):
    """Four random features that tell the class a little; not equally many samples of each class."""

    def __init__(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        y = torch.cat([torch.arange(12), torch.randint(12, (n - 12,), generator=generator)])
        x = torch.randn(n, 4, generator=generator)
        x[:, 0] += y / 2
        x[:, 1] += y % 3
        super().__init__(x, y)
        self.targets = y.tolist()

    def __getitem__(self, index):
        return self.tensors[0][index], self.targets[index]


def make_benchmark(api):
    train, test = Data(72, seed=0), Data(60, seed=1)
    if api == "nc":
        return nc_benchmark(train, test, 4, task_labels=False, fixed_class_order=ORDER)
    datasets = {"train": as_classification_dataset(train), "test": as_classification_dataset(test)}
    return class_incremental_benchmark(datasets, class_order=ORDER, num_experiences=4)


class Stub(DynamicModule):
    """A network with ``classes`` and ``outputs``; it evaluates unseen classes highest."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 12)
        self.register_buffer("unseen", torch.ones(12))
        self.classes = []
        self.outputs = None

    def adaptation(self, experience):
        if self.training:
            new = set(experience.classes_in_this_experience) - set(self.classes)
            self.classes += sorted(new, key=ORDER.index)
            self.unseen[self.classes] = 0

    def forward(self, x):
        features = self.body(x).relu() + 0.1
        self.outputs = SimpleNamespace(features=features)
        logits = self.head(features)
        return logits if self.training else logits + 1000 * self.unseen


class Plain(nn.Module):
    """Any Avalanche model: no ``classes``, no features."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), IncrementalClassifier(6, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())


class Means(SupervisedPlugin):
    """Class means of random directions for the classes trained so far."""

    def __init__(self, dimension=6):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.vectors = F.normalize(torch.rand(12, dimension, generator=generator))
        self.classes = []
        self.calls = 0

    def after_training_exp(self, strategy, **kwargs):
        self.classes = list(reversed(strategy.model.classes))

    def class_means(self, strategy):
        self.calls += 1
        return (self.classes, self.vectors[self.classes]) if self.classes else None


class Recorder(SupervisedPlugin):
    """Keep every evaluated sample: (experience, target, logits, features)."""

    def before_eval(self, strategy, **kwargs):
        self.samples = []

    def after_eval_iteration(self, strategy, **kwargs):
        features = strategy.model.outputs.features.tolist()
        for sample in zip(
            strategy.mb_y.tolist(), strategy.mb_output.tolist(), features, strict=True
        ):
            self.samples.append((strategy.experience.current_experience, *sample))


def make_strategy(*metrics, model=None, plugins=(), loggers=(), **kwargs):
    torch.manual_seed(0)
    model = model or Stub()
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=8,
        eval_mb_size=7,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(*metrics, loggers=list(loggers) or [TextLogger(io.StringIO())]),
        **kwargs,
    )


def evaluate(strategy, experiences):
    """Return what this evaluation alone emitted."""
    strategy.evaluator.reset_last_metrics()
    strategy.eval(experiences)
    return strategy.evaluator.get_last_metrics()


def rankings_of(samples, seen, means):
    """Return each readout's classes for each sample, best first."""
    return {
        "CNN": [reference.cnn_ranking(logits, seen) for _, _, logits, _ in samples],
        "NME": [
            reference.nme_ranking(f, means.classes, means.class_means(None)[1]) for *_, f in samples
        ],
    }


def expected_values(samples, seen, means, api, past):
    """Return names and values by the reference; ``past`` collects overall and per class."""
    values = {}
    rankings = rankings_of(samples, seen, means)
    experiences, targets = [s[0] for s in samples], [s[1] for s in samples]
    end = "/eval_phase/test_stream"
    for label, ranking in rankings.items():

        def accuracy(keep, top=1, ranking=ranking):
            kept = [i for i in range(len(samples)) if keep(i)]
            chosen = [ranking[i] for i in kept], [targets[i] for i in kept]
            return reference.accuracy(*chosen, seen, top)

        for e in sorted(set(experiences)):
            task = "/Task000" if api == "nc" else ""
            name = f"Top1_Acc_{label}_Exp{end}{task}/Exp{e:03d}"
            values[name] = accuracy(lambda i, e=e: experiences[i] == e)
        values[f"Top1_Acc_{label}_Stream{end}"] = accuracy(lambda i: True)
        if len(seen) > 5:
            values[f"Top5_Acc_{label}_Stream{end}"] = accuracy(lambda i: True, 5)
        for start in range(0, len(seen), 10):
            group = seen[start : start + 10]
            name = f"Top1_Acc_{label}_Group{end}/Classes{start:02d}-{start + 9:02d}"
            values[name] = accuracy(lambda i, group=group: targets[i] in group)
        overall, classes = past.setdefault(label, ([], []))
        overall.append(values[f"Top1_Acc_{label}_Stream{end}"])
        classes.append({c: accuracy(lambda i, c=c: targets[i] == c) for c in seen})
        values[f"AverageIncrementalAcc_{label}{end}"] = sum(overall) / len(overall)
        values[f"ForgettingRate_{label}{end}"] = reference.forgetting(classes)
    return {name: value for name, value in values.items() if not math.isnan(value)}


@pytest.mark.parametrize("api", APIS)
def test_every_value_equals_the_reference(api):
    benchmark = make_benchmark(api)
    metric, means, recorder = ClassIncrementalAccuracy(), Means(), Recorder()
    strategy = make_strategy(metric, plugins=[means, recorder], train_epochs=10)
    past = {}
    for trained, experience in enumerate(benchmark.train_stream, start=1):
        strategy.train(experience)
        calls = means.calls
        emitted = evaluate(strategy, benchmark.test_stream)
        assert means.calls == calls + 1
        expected = expected_values(recorder.samples, ORDER[: 3 * trained], means, api, past)
        assert emitted == pytest.approx(expected)
        assert all(type(value) is float for value in emitted.values())
        assert metric.result() == emitted
        for label, ranking in rankings_of(recorder.samples, ORDER[: 3 * trained], means).items():
            assert metric.confusion_matrix(label.lower()) == reference.confusion_matrix(
                ranking, [s[1] for s in recorder.samples], ORDER[: 3 * trained]
            )
    # Not trivially: the readouts differ, and something was forgotten.
    assert len(set(past["CNN"][0]) | set(past["NME"][0])) > 4
    assert emitted["ForgettingRate_CNN/eval_phase/test_stream"] > 0
    for readout in ("cnn", "nme"):
        overall, classes = past[readout.upper()]
        assert metric.overall_accuracies(readout) == pytest.approx(overall)
        for row, by_class in zip(metric.class_accuracies(readout), classes, strict=True):
            assert row == pytest.approx(by_class)
        last = [
            next(
                v for k, v in emitted.items() if f"{readout.upper()}_Exp/" in k and f"Exp00{e}" in k
            )
            for e in range(4)
        ]
        assert metric.accuracy_matrix(readout)[-1] == pytest.approx(last)
        groups = [v for k, v in emitted.items() if f"{readout.upper()}_Group" in k]
        assert metric.group_accuracies(readout)[-1] == pytest.approx(groups)
    assert metric.evaluated_after() == [1, 2, 3, 4]
    assert metric.evaluated_experiences() == [0, 1, 2, 3]
    upper = [[math.isnan(a) for a in row] for row in metric.accuracy_matrix()]
    assert upper == [[column > row for column in range(4)] for row in range(4)]
    assert [math.isnan(a) for a in metric.overall_accuracies(top=5)] == [True, False, False, False]


@pytest.mark.parametrize("api", APIS)
def test_agrees_with_avalanche_on_seen_classes_for_any_model(api):
    benchmark = make_benchmark(api)
    avalanche = accuracy_metrics(experience=True, stream=True)
    strategy = make_strategy(class_incremental_metrics(), avalanche, model=Plain())
    task = "/Task000" if api == "nc" else ""
    for trained, experience in enumerate(benchmark.train_stream, start=1):
        strategy.train(experience)
        emitted = evaluate(strategy, benchmark.test_stream[:trained])
        assert emitted["Top1_Acc_CNN_Stream/eval_phase/test_stream"] == pytest.approx(
            emitted[f"Top1_Acc_Stream/eval_phase/test_stream{task}"]
        )
        for e in range(trained):
            end = f"/eval_phase/test_stream{task}/Exp00{e}"
            assert emitted["Top1_Acc_CNN_Exp" + end] == pytest.approx(emitted["Top1_Acc_Exp" + end])
    assert not any("NME" in name for name in emitted)


def test_nothing_seen_nothing_emitted():
    benchmark = make_benchmark("nc")
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric, plugins=[Means()])
    assert evaluate(strategy, benchmark.test_stream) == {}
    strategy.train(benchmark.train_stream[0])
    assert evaluate(strategy, benchmark.test_stream[1:]) == {}
    assert metric.evaluated_after() == []


def test_means_that_lie_close_together_are_told_apart():
    torch.manual_seed(0)
    classes = list(range(30))
    means = F.normalize(torch.ones(30, 8) + 1e-4 * torch.randn(30, 8))
    counter = _Counter(classes, (classes, means), "cpu")
    counter.update(torch.zeros(30, 30), torch.arange(30), means)
    assert counter.read_confusions()["nme"] == {c: {c: 1} for c in classes}


def test_means_of_another_dimension_give_no_nme():
    benchmark = make_benchmark("nc")
    strategy = make_strategy(class_incremental_metrics(), plugins=[Means(dimension=5)])
    strategy.train(benchmark.train_stream[0])
    emitted = evaluate(strategy, benchmark.test_stream)
    assert any("CNN" in name for name in emitted)
    assert not any("NME" in name for name in emitted)


def test_other_streams_keep_their_own_history():
    benchmark = make_benchmark("class_incremental")
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric)
    strategy.train(benchmark.train_stream[:2])
    before = evaluate(strategy, benchmark.test_stream)
    history = metric.accuracy_matrix()
    emitted = evaluate(strategy, benchmark.train_stream[:1])
    assert emitted.keys().isdisjoint(before)
    assert metric.accuracy_matrix() == history
    assert metric.accuracy_matrix(stream="train") == [
        [emitted["Top1_Acc_CNN_Exp/eval_phase/train_stream/Exp000"]]
    ]


def test_periodic_evaluation_overwrites_the_present_row():
    benchmark = make_benchmark("nc")
    metric, means = ClassIncrementalAccuracy(), Means()
    strategy = make_strategy(metric, plugins=[means], train_epochs=3, eval_every=1)
    overall = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        emitted = evaluate(strategy, benchmark.test_stream)
        overall.append(emitted["Top1_Acc_CNN_Stream/eval_phase/test_stream"])
    assert metric.evaluated_after() == [1, 2, 3, 4]
    assert metric.overall_accuracies() == pytest.approx(overall)
    assert emitted["AverageIncrementalAcc_CNN/eval_phase/test_stream"] == pytest.approx(
        sum(overall) / 4
    )


def test_experiences_evaluated_one_by_one_make_one_row():
    benchmark = make_benchmark("nc")
    whole, parts = ClassIncrementalAccuracy(), ClassIncrementalAccuracy()
    strategy = make_strategy(whole)
    strategy.train(benchmark.train_stream[:2])
    strategy.eval(benchmark.test_stream)
    strategy.evaluator.metrics = [parts]
    parts.load_state_dict({**whole.state_dict(), "history": {}})
    for experience in benchmark.test_stream:
        strategy.eval(experience)
    assert parts.state_dict() == whole.state_dict()


def test_forgetting_is_that_of_the_classes_evaluated_now():
    benchmark = make_benchmark("nc")
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric, train_epochs=10)
    for experience, part in zip(
        benchmark.train_stream[:3], (slice(2), slice(2), slice(1, 2)), strict=True
    ):
        strategy.train(experience)
        emitted = evaluate(strategy, benchmark.test_stream[part])
    history = [
        {c: a for c, a in row.items() if c in ORDER[3:6]} for row in metric.class_accuracies()
    ]
    forgetting = emitted["ForgettingRate_CNN/eval_phase/test_stream"]
    assert forgetting == pytest.approx(reference.forgetting(history))
    assert forgetting > 0


def test_resumes_from_plain_data(tmp_path):
    benchmark = make_benchmark("nc")
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric, plugins=[Means()])
    for trained, experience in enumerate(benchmark.train_stream, start=1):
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
        if trained == 2:
            torch.save(metric.state_dict(), tmp_path / "metric.pt")
            resumed = ClassIncrementalAccuracy()
            resumed.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
            strategy.evaluator.metrics.append(resumed)
    assert resumed.state_dict() == metric.state_dict()
    assert resumed.result() == metric.result()
    assert resumed.confusion_matrix("nme") == metric.confusion_matrix("nme")
    assert len(resumed.overall_accuracies("nme")) == 4
    state = resumed.state_dict()
    metric.reset()
    assert metric.evaluated_after() == []
    with pytest.raises(ValueError, match=r"state: expected the keys .* got \['classes'"):
        metric.load_state_dict({"classes": [], "history": {}})
    assert resumed.state_dict() == state


def test_online_sub_experiences_count_as_one_experience():
    benchmark = make_benchmark("nc")
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric, model=nn.Linear(4, 12))
    for experience in benchmark.train_stream[:2]:
        for part in split_online_stream([experience], experience_size=8):
            strategy.train(part)
    emitted = evaluate(strategy, benchmark.test_stream)
    assert metric.evaluated_after() == [2]
    assert metric.evaluated_experiences() == [0, 1]
    assert "Top5_Acc_CNN_Stream/eval_phase/test_stream" in emitted


def test_an_experience_trained_several_times_in_a_row_counts_once():
    benchmark = make_benchmark("nc")
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric)
    strategy.train(benchmark.train_stream[0])
    resumed = ClassIncrementalAccuracy()
    resumed.load_state_dict(metric.state_dict())
    strategy.evaluator.metrics.append(resumed)
    for index in (0, 0, 1, 1):
        strategy.train(benchmark.train_stream[index])
    strategy.eval(benchmark.test_stream)
    assert resumed.evaluated_after() == [2]
    assert metric.evaluated_after() == [2]


def by_hand(logits, targets, *, classes, features=None, means=None):
    """Feed one batch to a metric, without a strategy's loop."""
    plugin = SimpleNamespace(class_means=lambda strategy: means)
    strategy = SimpleNamespace(
        model=SimpleNamespace(classes=classes, outputs=SimpleNamespace(features=features)),
        plugins=[plugin],
        device="cpu",
        mb_output=logits,
        mb_y=torch.tensor(targets),
        clock=SimpleNamespace(train_iterations=0),
        experience=SimpleNamespace(
            current_experience=0, origin_stream=SimpleNamespace(name="test")
        ),
        is_eval=True,
    )
    metric = ClassIncrementalAccuracy()
    metric.before_eval(strategy)
    metric.before_eval_exp(strategy)
    metric.after_eval_iteration(strategy)
    metric.after_eval_exp(strategy)
    metric.after_eval(strategy)
    return metric


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_lowest_class_id_wins(dtype):
    seen = [9, 2, 7, 4, 30, 12]
    metric = by_hand(torch.zeros(7, 31, dtype=dtype), [9, 2, 7, 4, 30, 12, 3], classes=seen)
    assert metric.class_accuracies() == [{c: float(c == 2) for c in seen}]
    # Of six, the class with the greatest id is not among the first five.
    assert metric.class_accuracies(top=5) == [{c: float(c != 30) for c in seen}]


def test_a_class_without_a_column_cannot_be_right():
    metric = by_hand(torch.zeros(2, 3), [1, 5], classes=[1, 5])
    assert metric.class_accuracies() == [{1: 1.0, 5: 0.0}]
    assert metric.confusion_matrix() == [[1, 0], [1, 0]]
    metric = by_hand(torch.zeros(2, 1), [1, 5], classes=[1, 5])
    assert metric.class_accuracies() == [{1: 0.0, 5: 0.0}]
    assert metric.confusion_matrix() == [[0, 0], [0, 0]]


def test_nearest_mean_by_hand():
    features = torch.tensor([[0.1, 0.0], [1.0, 9.0], [0.0, 1.0]])
    means = [3, 5, 8], torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    metric = by_hand(
        torch.zeros(3, 9), [3, 8, 6], classes=[8, 6, 3], features=features, means=means
    )
    # Class 5, as near as class 8, has not been seen; class 6 has no mean yet.
    assert metric.class_accuracies("nme") == [{3: 1.0, 8: 1.0, 6: 0.0}]
    # Rows and columns in order of appearance: 8, 6, 3.
    assert metric.confusion_matrix("nme") == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("read", ["accuracy_matrix", "overall_accuracies", "class_accuracies"])
def test_errors_name_the_argument(read):
    metric = ClassIncrementalAccuracy()
    for method in (read, "confusion_matrix"):
        with pytest.raises(ValueError, match=r"readout: expected one of .* got 'ncm'"):
            getattr(metric, method)("ncm")
    with pytest.raises(ValueError, match="top: expected 1 or 5, got 3"):
        getattr(metric, read)(top=3)


@pytest.mark.parametrize("api", APIS)
def test_loggers_show_every_value(api, tmp_path, capsys):
    benchmark = make_benchmark(api)
    text = io.StringIO()
    loggers = [
        TextLogger(text),
        InteractiveLogger(),
        CSVLogger(tmp_path / "csv"),
        TensorboardLogger(tmp_path / "tb"),
    ]
    strategy = make_strategy(
        class_incremental_metrics(), memory_metrics(), plugins=[Means()], loggers=loggers
    )
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience)
        emitted = evaluate(strategy, benchmark.test_stream)
    loggers[-1].writer.flush()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    # 2 readouts: 2 experiences, top 1, top 5, a group, average, forgetting. 2 kinds of memory.
    assert len(emitted) == 2 * 7 + 2
    for name, value in emitted.items():
        assert f"{name} = {value:.4f}" in text.getvalue()
        assert events.Scalars(name)[-1].value == pytest.approx(value)
        assert events.Scalars(name)[-1].step == strategy.clock.train_iterations
    assert "Top1_Acc_NME_Stream" in capsys.readouterr().out


def test_memory_in_megabytes():
    benchmark = make_benchmark("nc")
    replay = SupervisedPlugin()
    replay.buffer = SimpleNamespace(exemplar_bytes=3 * 2**20)
    strategy = make_strategy(MemoryUsage(), plugins=[replay])
    strategy.train(benchmark.train_stream[0])
    emitted = evaluate(strategy, benchmark.test_stream)
    # Weights and biases of 4 -> 6 -> 12 in float32, and a buffer of 12 numbers.
    parameters = 4 * (4 * 6 + 6 + 6 * 12 + 12)
    assert parameter_bytes(strategy.model) == parameters
    assert inference_bytes(strategy.model) == parameters + 4 * 12
    expected = {
        "ParameterMemory_MB": parameters / 2**20,
        "InferenceMemory_MB": (parameters + 48) / 2**20,
        "ExemplarMemory_MB": 3.0,
        "TotalMemory_MB": 3 + parameters / 2**20,
    }
    assert emitted == {f"{name}/eval_phase/test_stream": mb for name, mb in expected.items()}


def test_a_memory_that_nobody_accounts_for_is_not_reported_as_empty():
    benchmark = make_benchmark("nc")
    strategy = make_strategy(memory_metrics(), plugins=[ReplayPlugin(mem_size=6)])
    strategy.train(benchmark.train_stream[0])
    emitted = evaluate(strategy, benchmark.test_stream)
    assert sorted(name.split("/")[0] for name in emitted) == [
        "InferenceMemory_MB",
        "ParameterMemory_MB",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counting_does_not_wait_for_the_gpu():
    seen = list(range(0, 20, 2))
    features = torch.rand(64, 6, device="cuda")
    means = seen, F.normalize(torch.rand(10, 6))
    strategy = SimpleNamespace(
        model=SimpleNamespace(classes=seen, outputs=SimpleNamespace(features=features)),
        plugins=[SimpleNamespace(class_means=lambda strategy: means)],
        device="cuda",
        mb_output=torch.rand(64, 20, device="cuda"),
        mb_y=torch.randint(30, (64,), device="cuda"),
    )
    metric = ClassIncrementalAccuracy()
    metric.before_eval(strategy)
    metric.before_eval_exp(strategy)
    metric.after_eval_iteration(strategy)  # Loads kernels.
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.after_eval_iteration(strategy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_averages_of_an_epoch_weigh_samples_alike():
    """By hand: batches of two and of one; the third column wins where it is the largest."""
    averages = TrainingAverages()
    strategy = SimpleNamespace()
    strategy.mb_output = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]])
    strategy.mb_y, strategy.loss = torch.tensor([0, 2]), torch.tensor(1.5)
    averages.before_training_epoch(strategy)
    averages.after_training_iteration(strategy)
    strategy.mb_output, strategy.mb_y = torch.tensor([[0.0, 4.0, 1.0]]), torch.tensor([0])
    strategy.loss = torch.tensor(6.0)
    averages.after_training_iteration(strategy)
    assert averages.result() == pytest.approx([(2 * 1.5 + 6) / 3, 2 / 3])
    averages.before_training_epoch(strategy)
    assert averages.result() == [0, 0]


def test_beside_avalanches_icarl():
    """Whose plugin has an attribute `class_means` that is no function."""
    torch.manual_seed(0)
    body, head = nn.Linear(4, 6), nn.Linear(6, 12)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.05)
    metric = ClassIncrementalAccuracy()
    options = {"train_mb_size": 8, "evaluator": EvaluationPlugin(metric, loggers=[])}
    strategy = ICaRL(body, head, optimizer, 20, None, True, **options)
    benchmark = make_benchmark("nc")
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream[:1])
    assert len(metric.overall_accuracies()) == 1


def test_class_ids_of_one_byte():
    counter = _Counter([0, 1, 2], None, "cpu")
    counter.start()
    counter.update(torch.eye(3), torch.tensor([0, 1, 1], dtype=torch.uint8), None)
    assert counter.read()["cnn_top1"] == {0: 1, 1: 1}


def test_classes_are_known_from_the_data_where_nothing_else_tells():
    parts = [as_classification_dataset(Data(36, seed)) for seed in (0, 1)]
    benchmark = benchmark_from_datasets(train=parts, test=parts)
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric, model=nn.Linear(4, 12))
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    assert list(metric.class_accuracies()[0]) == list(range(12))


def test_the_first_experience_of_another_benchmark_counts():
    metric = ClassIncrementalAccuracy()
    strategy = make_strategy(metric)
    first, second = make_benchmark("nc").train_stream[:2]
    strategy.train(first)
    second.current_experience = 0
    strategy.train(second)
    strategy.eval([second])
    assert metric.evaluated_after("train") == [2]
