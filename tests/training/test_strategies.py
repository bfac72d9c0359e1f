import logging
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.benchmarks.classic import (
    SplitCIFAR10,
    SplitCIFAR100,
    SplitImageNet,
    SplitMNIST,
    SplitTinyImageNet,
)
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training.plugins import (
    EvaluationPlugin,
    EWCPlugin,
    LRSchedulerPlugin,
    LwFPlugin,
)
from avalanche.training.supervised import Naive
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_memo.evaluation import TrainingAverages
from avalanche_memo.models import (
    BiasCorrectedLinear,
    CosineClassifier,
    ExpandableNetwork,
    GrowingLinear,
    ProxyCosineClassifier,
    cifar_resnet,
    convnet2,
)
from avalanche_memo.training import (
    DER,
    DER_CLASSIFIER,
    MEMO,
    UCIR,
    WA,
    BiC,
    Finetune,
    ICaRL,
    Joint,
    Phase,
    PODNet,
    Replay,
)
from avalanche_memo.training.plugins import (
    AuxiliaryLossPlugin,
    HerdingReplayPlugin,
    WeightAlignmentPlugin,
)
from tests.helpers import (
    APIS,
    ORDER,
    accuracies,
    assert_same_tensors,
    make_benchmark,
    silent,
    tensors_of,
    tiny_backbone,
)

BALANCED = Phase(1, lr=0.1, learns="classifier", data="balanced", reset_classifier=True)

EXEMPLARS = (Phase(1), Phase(1, learns="classifier", data="exemplars"))

CLASSIFIERS = {
    "PODNet": partial(ProxyCosineClassifier, 2),
    "UCIR": partial(CosineClassifier, scale=10.0),
    "BiC": BiasCorrectedLinear,
}

METHODS: dict[str, tuple[Any, Any, int, dict[str, Any]]] = {
    # strategy, backbone of one input channel, shared stages, options
    "MEMO": (MEMO, partial(convnet2, 1), 1, {"mem_size": 20}),
    "MEMO-2": (MEMO, partial(cifar_resnet, 8, in_channels=1), 1, {"exemplars_per_class": 2}),
    "DER": (DER, tiny_backbone, 0, {"mem_size": 20, "later_phases": (Phase(1), BALANCED)}),
    "DER pruned": (
        DER,
        tiny_backbone,
        0,
        {"mem_size": 20, "later_phases": (Phase(1), BALANCED), "sparsity_weight": 0.1},
    ),
    "PODNet": (PODNet, tiny_backbone, 3, {"mem_size": 20, "later_phases": EXEMPLARS}),
    "UCIR": (UCIR, tiny_backbone, 3, {"mem_size": 20}),
    "ICaRL": (ICaRL, tiny_backbone, 3, {"mem_size": 20}),
    "WA": (WA, tiny_backbone, 3, {"mem_size": 20}),
    "BiC": (BiC, tiny_backbone, 3, {"mem_size": 20}),
    "Replay": (Replay, tiny_backbone, 3, {"mem_size": 20}),
    "Finetune": (Finetune, tiny_backbone, 3, {}),
    "Joint": (Joint, tiny_backbone, 3, {}),
}


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def make(method: str, *, seed: int = 0, wide: bool = False, **options: Any) -> Any:
    """A strategy on a fresh network, after seeding."""
    torch.manual_seed(seed)
    strategy, backbone, shared_stages, own = METHODS[method]
    if wide and backbone is tiny_backbone:
        backbone = partial(tiny_backbone, (16, 24, 32))
    classifier = CLASSIFIERS.get(method, GrowingLinear)
    masked = "sparsity_weight" in own
    model = ExpandableNetwork(backbone, shared_stages, make_classifier=classifier, masked=masked)
    defaults = {"train_mb_size": 6, "evaluator": silent()}
    return strategy(model=model, optimizer=sgd(model), **{**defaults, **own, **options})


def seen_accuracy() -> EvaluationPlugin:
    return EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])


def matrix(strategy: Any, benchmark: Any, experiences: int = 3, **train: Any) -> list[list[float]]:
    """Train on the first experiences; each one's accuracies on all test experiences."""
    rows = []
    for experience in benchmark.train_stream[:experiences]:
        strategy.train(experience, **train)
        rows.append(list(accuracies(strategy.eval(benchmark.test_stream)).values()))
    return rows


# --- every method, however the benchmark is made ------------------------------------------------


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("method", METHODS)
def test_learns_arbitrary_class_ids(method, api, fast):
    strategy = make(method, train_epochs=2, fast=fast, evaluator=seen_accuracy())
    rows = matrix(strategy, make_benchmark(api))
    assert [len(row) for row in rows] == [5, 5, 5]
    # Unseen classes are never predicted, and there is no task whose classes come for free.
    assert [row[n + 1 :] for n, row in enumerate(rows)] == [[0.0] * (4 - n) for n in range(3)]
    assert set(strategy.model.classes) == set(ORDER[:6])
    predictions = strategy.model.eval()(torch.rand(20, 1, 8, 8)).argmax(dim=1)
    assert set(predictions.tolist()) <= set(ORDER[:6])


@pytest.mark.parametrize(
    "method", ["MEMO", "DER", "Replay", "PODNet", "UCIR", "ICaRL", "WA", "BiC"]
)
def test_learns(method):
    """Well over the chance of a sixth, on all classes, the first ones included.

    The rate falls, so that it does not hang on a seed or a rounding.
    """
    second = {"DER": BALANCED, "PODNet": EXEMPLARS[1]}
    falling = Phase(15, lr=0.05, milestones=(9,))
    options = {"mem_size": 60, "first_phases": (falling,), "evaluator": seen_accuracy()}
    options["later_phases"] = (falling,)
    if method in second:
        options["later_phases"] += (replace(second[method], epochs=15),)
    strategy = make(method, wide=True, **options)
    last = matrix(strategy, make_benchmark(per_class=10))[-1][:3]
    assert sum(last) / 3 > 0.6
    assert min(last) > 0.2


def test_options_of_memo():
    plugins = {type(p): p for p in make("MEMO", auxiliary_weight=0.3, align_weights=False).plugins}
    assert plugins[AuxiliaryLossPlugin].weight == 0.3
    assert WeightAlignmentPlugin not in plugins
    usual = {type(p): p for p in make("MEMO").plugins}
    assert usual[AuxiliaryLossPlugin].weight == 1
    assert WeightAlignmentPlugin in usual


@pytest.mark.parametrize("method", METHODS)
def test_task_labels_are_not_used(method):
    with_labels = make(method, fast=False, evaluator=seen_accuracy())
    rows = matrix(with_labels, make_benchmark(task_labels=True))
    without = make(method, fast=False, evaluator=seen_accuracy())
    assert matrix(without, make_benchmark()) == rows
    assert_same_tensors(tensors_of(with_labels.model), tensors_of(without.model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("api", APIS)
def test_a_stream_can_be_trained_at_once(method, api):
    strategy = make(method)
    strategy.train(make_benchmark(api).train_stream[:2])
    assert set(strategy.model.classes) == set(ORDER[:4])


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_larger_than_the_data(method, fast):
    strategy = make(method, train_mb_size=1000, eval_mb_size=1000, fast=fast)
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    assert strategy.model.train()(torch.rand(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("api", APIS)
def test_evaluation_before_training(method, api):
    strategy = make(method, eval_every=0, evaluator=seen_accuracy())
    benchmark = make_benchmark(api)
    assert len(accuracies(strategy.eval(benchmark.test_stream))) == 5
    assert not strategy.model.classes
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
    assert len(accuracies(strategy.evaluator.get_last_metrics())) == 5


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_numbers(method, fast):
    states = []
    for seed in (1, 1, 2):
        strategy = make(method, seed=seed, fast=fast)
        for experience in make_benchmark().train_stream[:2]:
            strategy.train(experience)
        states.append(tensors_of(strategy.model))
    assert_same_tensors(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


class ReadBacks(TorchDispatchMode, SupervisedPlugin):
    """Record, epoch by epoch, what makes the host wait for the device."""

    OPERATIONS = frozenset(
        {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "_unique2"}
    )
    METHODS = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.epochs: list[list[str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in self.OPERATIONS or any(m is not None and m.dtype == torch.bool for m in masks):
            self.epochs[-1].append(name)
        return func(*args, **(kwargs or {}))

    def before_training_epoch(self, strategy, **kwargs):
        self.epochs.append([])
        for name in self.METHODS:
            self.patches.setattr(torch.Tensor, name, self.recorded(name))
        self.__enter__()

    def recorded(self, name):
        original = getattr(torch.Tensor, name)

        def call(*args, **kwargs):
            self.epochs[-1].append(name)
            return original(*args, **kwargs)

        return call

    def after_training_epoch(self, strategy, **kwargs):
        self.__exit__(None, None, None)
        self.patches.undo()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_back_from_the_device_within_an_epoch(method):
    reads = ReadBacks()
    evaluator = EvaluationPlugin(TrainingAverages(), loggers=[])
    strategy = make(method, plugins=[reads], evaluator=evaluator)
    for experience in make_benchmark().train_stream[:2]:
        strategy.train(experience)
    assert len(reads.epochs) >= 2
    for epoch in reads.epochs:
        assert epoch == ["_local_scalar_dense"]  # at its end: whether every loss was finite


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_the_loaders_arguments_are_those_of_train(fast):
    batches = []

    class Targets(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            batches.append(strategy.mb_y.tolist())

    experience = make_benchmark().train_stream[0]
    strategy = make("Finetune", plugins=[Targets()], fast=fast, train_mb_size=5)
    strategy.train(experience, shuffle=False, drop_last=True)
    targets = list(experience.dataset.targets)
    assert len(targets) == 12
    assert batches == [targets[:5], targets[5:10]]


# --- beside Avalanche's own parts ---------------------------------------------------------------


class LossIsFinite(SupervisedPlugin):
    steps = 0

    def after_backward(self, strategy, **kwargs):
        assert strategy.loss.isfinite()
        self.steps += 1


@pytest.mark.parametrize(
    ("plugin", "api"),
    # Avalanche's LwF wants task labels, which its newer benchmarks do not have.
    [(LwFPlugin, "nc"), (partial(EWCPlugin, 0.1), "nc"), (partial(EWCPlugin, 0.1), "ci")],
    ids=["LwF", "EWC nc", "EWC ci"],
)
@pytest.mark.parametrize("method", METHODS)
def test_works_beside_avalanches_regularisers(method, api, plugin):
    finite = LossIsFinite()
    strategy = make(method, plugins=[plugin(), finite], evaluator=seen_accuracy())
    assert len(matrix(strategy, make_benchmark(api))) == 3
    assert finite.steps >= 6


def test_regularisers_take_effect():
    states = []
    for plugins in ([], [LwFPlugin(alpha=5)], [EWCPlugin(1000)]):
        strategy = make("MEMO", plugins=plugins, fast=False)
        for experience in make_benchmark().train_stream[:2]:
            strategy.train(experience)
        states.append(tensors_of(strategy.model))
    assert list(states[0]) == list(states[1]) == list(states[2])
    for other in states[1:]:
        assert any(not torch.equal(states[0][name], other[name]) for name in other)


@pytest.mark.parametrize("method", METHODS)
def test_all_of_avalanches_loggers(method, tmp_path, capsys):
    with (tmp_path / "log.txt").open("w") as text:
        csv = CSVLogger(tmp_path / "csv")
        evaluator = EvaluationPlugin(
            accuracy_metrics(epoch=True, experience=True, stream=True),
            loss_metrics(epoch=True, experience=True),
            loggers=[
                InteractiveLogger(),
                TextLogger(text),
                TensorboardLogger(tmp_path / "tensorboard"),
                csv,
            ],
        )
        strategy = make(method, evaluator=evaluator)
        matrix(strategy, make_benchmark(), experiences=2)
        csv.close()
    printed = capsys.readouterr().out
    for log in (printed, (tmp_path / "log.txt").read_text()):
        assert "-- >> End of training phase << --" in log
        assert "Top1_Acc_Stream/eval_phase/test_stream" in log
    rows = (tmp_path / "csv" / "training_results.csv").read_text().splitlines()
    assert len(rows) >= 3
    assert len((tmp_path / "csv" / "eval_results.csv").read_text().splitlines()) == 1 + 2 * 5
    assert list((tmp_path / "tensorboard").rglob("events*"))


@pytest.mark.parametrize("method", METHODS)
def test_the_users_plugins_run_and_their_list_is_not_changed(method):
    class Count(SupervisedPlugin):
        steps = 0

        def after_update(self, strategy, **kwargs):
            self.steps += 1

    plugins = [Count()]
    strategy = make(method, plugins=plugins)
    strategy.train(make_benchmark().train_stream[0])
    assert len(plugins) == 1
    assert plugins[0].steps == 2  # 12 images, 6 at a time


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "MultiStepLR"])
@pytest.mark.parametrize("api", APIS)
def test_naive_with_memos_plugins_is_memo(api, scheduled):
    """The plugins hold the method: swapped into Avalanche's Naive, the numbers are the same."""
    results = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = ExpandableNetwork(tiny_backbone, 2)
        optimizer = sgd(model)
        plugins: list[Any] = []
        if scheduled:
            plugins.append(LRSchedulerPlugin(MultiStepLR(optimizer, [1, 2], gamma=0.3)))
        common = {
            "model": model,
            "optimizer": optimizer,
            "train_mb_size": 6,
            "train_epochs": 3,
            "evaluator": seen_accuracy(),
        }
        if whole:
            strategy = MEMO(mem_size=20, plugins=plugins, fast=False, **common)
            rows = matrix(strategy, make_benchmark(api))
        else:
            method = [HerdingReplayPlugin(20), AuxiliaryLossPlugin(), WeightAlignmentPlugin()]
            strategy = Naive(plugins=[*method, *plugins], **common)
            rows = matrix(strategy, make_benchmark(api), reset_optimizer_state=True)
        results.append((rows, tensors_of(model)))
    assert results[0][0] == results[1][0]
    assert_same_tensors(results[0][1], results[1][1])


# --- the model and its refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "shared_stages", "expected"),
    [
        (MEMO, 0, r"1 or 2 of 3, got 0"),
        (MEMO, 3, r"1 or 2 of 3, got 3"),
        (DER, 1, r"0 of 3, got 1"),
        (Replay, 2, r"3 of 3, got 2"),
        (ICaRL, 2, r"3 of 3, got 2"),
        (WA, 2, r"3 of 3, got 2"),
        (BiC, 2, r"3 of 3, got 2"),
        (Joint, 2, r"3 of 3, got 2"),
    ],
)
def test_refuses_a_network_of_another_method(strategy, shared_stages, expected):
    model = ExpandableNetwork(tiny_backbone, shared_stages)
    with pytest.raises(ValueError, match=rf"model: .*shared_stages {expected}"):
        strategy(model=model, optimizer=sgd(model))


@pytest.mark.parametrize("strategy", [MEMO, DER, Replay, PODNet, UCIR, ICaRL, WA, BiC, Joint])
def test_refuses_another_model(strategy):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model: .* expected .*ExpandableNetwork, got Linear"):
        strategy(model=model, optimizer=sgd(model))


class Monitor(SupervisedPlugin):
    """Runs the model on other images, between a batch's forward pass and its loss."""

    def after_forward(self, strategy, **kwargs):
        modes = [(module, module.training) for module in strategy.model.modules()]
        with torch.no_grad():
            strategy.model.eval()(torch.zeros(4, 1, 8, 8))
        for module, training in modes:
            module.training = training


@pytest.mark.parametrize("method", METHODS)
def test_a_plugin_may_run_the_model_between_forward_pass_and_loss(method):
    trained = []
    for plugins in ([], [Monitor()]):
        strategy = make(method, plugins=plugins)
        for experience in make_benchmark().train_stream[:2]:
            strategy.train(experience)
        trained.append(tensors_of(strategy.model))
    assert_same_tensors(*trained)


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("method", METHODS.keys() - {"Joint"})
def test_online_streams(method, boundaries):
    benchmark = make_benchmark(experiences=2, per_class=12)
    strategy = make(method, evaluator=seen_accuracy())
    for experience in benchmark.train_stream:
        parts = split_online_stream(
            [experience], experience_size=20, access_task_boundaries=boundaries, seed=0
        )
        for part in parts:
            strategy.train(part)
            strategy.eval(benchmark.test_stream)
    assert strategy.model.growth == [sorted(ORDER[:5]), sorted(ORDER[5:])]


def test_der_has_its_long_name():
    """Avalanche's own DER is another method."""
    assert DER.__name__ == "DynamicallyExpandableRepresentation"


def test_der_learns_the_classifier_again_by_default():
    strategy = make("DER", train_epochs=3, later_phases=None)
    assert list(strategy.later_phases) == [Phase(3), DER_CLASSIFIER]


# --- Avalanche's classic benchmarks, on stand-ins of the same files -----------------------------


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_images(folder: Path, names: list[str], size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in zip(names, pixels(len(names), size, size, 3), strict=True):
        Image.fromarray(data).save(folder / name)


def mnist(root: Path, monkeypatch) -> Any:
    """Idx files: magic number (uint8, dimensions), sizes, data."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, per_class in (("train", 3), ("t10k", 1)):
        labels = np.tile(np.arange(10, dtype=np.uint8), per_class)
        for kind, data in (
            ("images-idx3-ubyte", pixels(len(labels), 28, 28)),
            ("labels-idx1-ubyte", labels),
        ):
            header = np.array([0x0800 + data.ndim, *data.shape], dtype=">i4").tobytes()
            (folder / f"{part}-{kind}").write_bytes(header + data.tobytes())
    return SplitMNIST(5, seed=1, dataset_root=root)


def cifar(classes: int, root: Path, monkeypatch) -> Any:
    """Pickled dictionaries, whose checksums are torchvision's business."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    if classes == 10:
        folder, labels, meta, names = "cifar-10-batches-py", "labels", "batches.meta", "label_names"
        train, test = [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
    else:
        folder, labels, meta, names = "cifar-100-python", "fine_labels", "meta", "fine_label_names"
        train, test = ["train"], "test"
    (root / folder).mkdir(parents=True)
    content: dict[str, Any] = {meta: {names: [f"class {c}" for c in range(classes)]}}
    for file in (*train, test):
        repeats = 1 if file == test or classes == 10 else 2
        content[file] = {
            "data": pixels(classes * repeats, 3072),
            labels: list(range(classes)) * repeats,
        }
    for file, value in content.items():
        (root / folder / file).write_bytes(pickle.dumps(value))
    split = SplitCIFAR10 if classes == 10 else SplitCIFAR100
    return split(classes // 2 if classes == 10 else 10, seed=1, dataset_root=root)


def tiny_imagenet(root: Path, monkeypatch) -> Any:
    """200 class folders, and a table of the validation images' classes."""
    folder = root / "tiny-imagenet-200"
    wnids = [f"n{c:08d}" for c in range(200)]
    for wnid in wnids:
        write_images(folder / "train" / wnid / "images", [f"{wnid}_0.JPEG"], 64)
    names = [f"val_{c}.JPEG" for c in range(200)]
    write_images(folder / "val" / "images", names, 64)
    rows = [f"{name}\t{wnid}\t0\t0\t62\t62\n" for name, wnid in zip(names, wnids, strict=True)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    return SplitTinyImageNet(20, seed=1, dataset_root=root)


def imagenet(root: Path, monkeypatch) -> Any:
    """Class folders in train/ and val/, and the extracted meta file."""
    wnids = [f"n{c:08d}" for c in range(6)]
    for part, per_class in (("train", 2), ("val", 1)):
        for wnid in wnids:
            names = [f"{wnid}_{i}.JPEG" for i in range(per_class)]
            write_images(root / part / wnid, names, 40)
    torch.save(({wnid: (wnid,) for wnid in wnids}, wnids), root / "meta.bin")
    return SplitImageNet(root, n_experiences=3, seed=1)


CLASSIC = {
    "SplitMNIST": (mnist, 1),
    "SplitCIFAR10": (partial(cifar, 10), 3),
    "SplitCIFAR100": (partial(cifar, 100), 3),
    "SplitTinyImageNet": (tiny_imagenet, 3),
    "SplitImageNet": (imagenet, 3),
}


@pytest.mark.parametrize("name", CLASSIC)
def test_runs_on_avalanches_classic_benchmarks(name, tmp_path, monkeypatch, caplog):
    stand_in, channels = CLASSIC[name]
    benchmark = stand_in(tmp_path, monkeypatch)
    test_stream = benchmark.test_stream[:2]
    for fast in (False, True):
        torch.manual_seed(0)
        model = ExpandableNetwork(partial(tiny_backbone, in_channels=channels), 2)
        strategy = MEMO(
            model=model,
            optimizer=sgd(model),
            mem_size=200,
            train_mb_size=16,
            eval_mb_size=16,
            evaluator=seen_accuracy(),
            fast=fast,
        )
        seen: list[int] = []
        with caplog.at_level(logging.INFO, "avalanche_memo"):
            for experience in benchmark.train_stream[:2]:
                strategy.train(experience)
                seen += experience.classes_in_this_experience
        assert set(model.classes) == set(seen)
        assert model.feature_dim == 12
        assert len(accuracies(strategy.eval(test_stream))) == 2
    # The fast path says whether it is on.
    assert "training batches: " in caplog.text
