from functools import partial

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_memo.models import CosineClassifier, ExpandableNetwork, ProxyCosineClassifier
from avalanche_memo.training import UCIR, Phase, PODNet
from avalanche_memo.training.losses import NCALoss
from avalanche_memo.training.plugins import (
    GradientClampPlugin,
    HerdingReplayPlugin,
    ImprintingPlugin,
    LessForgetPlugin,
    MarginRankingPlugin,
    PODDistillationPlugin,
    PreviousModel,
    SoftmaxDistillationPlugin,
)
from tests.helpers import assert_same_tensors, make_benchmark, silent, tensors_of, tiny_backbone

CLASSIFIERS = {PODNet: partial(ProxyCosineClassifier, 2), UCIR: CosineClassifier}
BALANCED = Phase(1, learns="classifier", data="exemplars")


def network(strategy, shared_stages=3) -> ExpandableNetwork:
    torch.manual_seed(0)
    return ExpandableNetwork(tiny_backbone, shared_stages, make_classifier=CLASSIFIERS[strategy])


def make(strategy, **options):
    model = network(strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    defaults = {"mem_size": 20, "train_mb_size": 6, "evaluator": silent(), "fast": False}
    return strategy(model=model, optimizer=optimizer, **{**defaults, **options})


def parts(strategy) -> list[str]:
    return [type(p).__name__ for p in strategy.plugins if "avalanche_memo" in type(p).__module__]


@pytest.mark.parametrize(
    ("form", "flat_weight", "kd"), [("pod", 0.7, False), ("kd", 0.0, True), ("both", 0.7, True)]
)
def test_flat_distillation_is_of_features_or_predictions_or_both(form, flat_weight, kd):
    softened = {"kd_weight": 0.2, "temperature": 3, "kd_adaptive": kd}
    strategy = make(PODNet, flat_distillation=form, flat_weight=0.7, pod_weight=4, **softened)
    (pod,) = [p for p in strategy.plugins if isinstance(p, PODDistillationPlugin)]
    softmax = [p for p in strategy.plugins if isinstance(p, SoftmaxDistillationPlugin)]
    assert (pod.weight, pod.flat_weight) == (4, flat_weight)
    assert [(p.weight, p.temperature, p.adaptive) for p in softmax] == [(0.2, 3, True)] * kd
    assert all(p.teacher is pod.teacher for p in softmax)


def test_the_strategies_are_their_plugins():
    """Plain Naive with the plugins and the criterion learns what the strategies learn."""
    for method, plugins, criterion in (
        (
            PODNet,
            lambda teacher: [
                ImprintingPlugin(),
                PODDistillationPlugin(3.0, 0.0, teacher=teacher),
                SoftmaxDistillationPlugin(0.9, 10.0, teacher=teacher),
                GradientClampPlugin(5.0),
            ],
            partial(NCALoss, nca="released"),
        ),
        (
            UCIR,
            lambda teacher: [
                ImprintingPlugin(),
                LessForgetPlugin(5.0, teacher=teacher),
                MarginRankingPlugin(2, 0.5, 1.0),
            ],
            lambda model: torch.nn.CrossEntropyLoss(),
        ),
    ):
        options = {"flat_distillation": "kd", "nca": "released"} if method is PODNet else {}
        strategy = make(method, later_phases=[Phase(1)], **options)
        model = network(method)
        naive = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
            criterion=criterion(model),
            train_mb_size=6,
            plugins=[HerdingReplayPlugin(20), *plugins(PreviousModel())],
            evaluator=silent(),
        )
        for learner in (strategy, naive):
            torch.manual_seed(1)
            for experience in make_benchmark().train_stream[:3]:
                learner.train(experience, reset_optimizer_state=True)
        assert_same_tensors(tensors_of(strategy.model), tensors_of(model))


class Moved(SupervisedPlugin):
    """Notes which of the classifier's parameters each phase of an experience moves."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[tuple[int, int], set[str]] = {}

    def before_training_epoch(self, strategy, **kwargs):
        self.start = tensors_of(strategy.model.classifier)

    def after_training_epoch(self, strategy, **kwargs):
        now = tensors_of(strategy.model.classifier)
        key = (strategy.clock.train_exp_counter, strategy.phase_index)
        self.moved[key] = {n for n in now if not torch.equal(now[n], self.start[n])}


@pytest.mark.parametrize("method", [PODNet, UCIR])
def test_old_proxies_rest_until_the_balanced_phase(method):
    moved = Moved()
    strategy = make(method, later_phases=[Phase(1), BALANCED, Phase(1)], plugins=[moved])
    for experience in make_benchmark().train_stream[:3]:
        strategy.train(experience)
    assert moved.moved == {
        (0, 0): {"scale", "weights.0"},
        (1, 0): {"scale", "weights.1"},
        (1, 1): {"scale", "weights.0", "weights.1"},
        (1, 2): {"scale", "weights.1"},
        (2, 0): {"scale", "weights.2"},
        (2, 1): {"scale", "weights.0", "weights.1", "weights.2"},
        (2, 2): {"scale", "weights.2"},
    }


def test_the_criterion_is_nca_or_the_users():
    strategy = make(PODNet, nca="equation", margin=0.2)
    assert isinstance(strategy._criterion, NCALoss)
    assert (strategy._criterion.nca, strategy._criterion.margin) == ("equation", 0.2)
    own = torch.nn.CrossEntropyLoss()
    assert make(PODNet, criterion=own)._criterion is own


def test_the_balanced_phase_follows_by_default():
    assert [p.epochs for p in make(PODNet, train_epochs=3).later_phases] == [3, 20]
    assert [p.epochs for p in make(UCIR, train_epochs=3).later_phases] == [3]


def test_options_reach_the_plugins():
    podnet = make(PODNet, pod_weight=2.0, pooling="gap", gradient_limit=0.5)
    ucir = make(UCIR, less_forget_weight=3.0, ranking_weight=0.5, hard_negatives=1, margin=0.2)
    found = {type(p): p for strategy in (podnet, ucir) for p in strategy.plugins}
    pod, ranking = found[PODDistillationPlugin], found[MarginRankingPlugin]
    assert (pod.weight, pod.pooling) == (2.0, "gap")
    usual = {type(p): p for p in make(PODNet).plugins}
    assert usual[PODDistillationPlugin].flat_weight == 1
    assert usual[GradientClampPlugin].limit == 5
    assert found[GradientClampPlugin].limit == 0.5
    assert found[LessForgetPlugin].weight == 3.0
    assert (ranking.weight, ranking.k, ranking.margin) == (0.5, 1, 0.2)


def test_one_class_an_experience():
    strategy = make(PODNet)
    for experience in make_benchmark(experiences=10, order=range(10)).train_stream[:2]:
        strategy.train(experience)
    assert len(strategy.model.classes) == 2


def test_ucir_can_leave_out_the_ranking_loss():
    assert "MarginRankingPlugin" in parts(make(UCIR))
    assert "MarginRankingPlugin" not in parts(make(UCIR, ranking_weight=0))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (PODNet, {"flat_distillation": "none"}, "flat_distillation: expected 'pod', .*'none'"),
        (PODNet, {"nca": "paper"}, "nca: expected 'equation' or 'released', got 'paper'"),
        (PODNet, {"margin": -1}, "margin: .*got -1"),
        (
            PODNet,
            {"nca": "equation", "later_phases": [Phase(1, temperature=2)]},
            "temperature: expected 1 with nca='equation', got 2.0",
        ),
        (PODNet, {"pooling": "sum"}, "pooling: expected one of spatial"),
        (
            PODNet,
            {"flat_distillation": "kd", "temperature": 0},
            "temperature: .*positive number, got 0",
        ),
        (PODNet, {"gradient_limit": 0}, "^gradient_limit: expected a positive number, got 0"),
        (
            UCIR,
            {"less_forget_weight": -1},
            "^less_forget_weight: expected a number of at least 0, got -1",
        ),
        (
            UCIR,
            {"hard_negatives": 0},
            "hard_negatives: expected a whole number of at least 1, got 0",
        ),
    ],
)
def test_refuses_options_out_of_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        make(method, **options)


@pytest.mark.parametrize("method", [PODNet, UCIR])
def test_refuses_other_networks(method):
    def strategy(model):
        return method(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(ValueError, match=rf"model: {method.__name__} .*3 of 3, got 2"):
        strategy(network(method, shared_stages=2))
    with pytest.raises(TypeError, match=rf"model: {method.__name__} .*got a GrowingLinear"):
        strategy(ExpandableNetwork(tiny_backbone, 3))
