import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import split_online_stream
from avalanche.core import SupervisedPlugin
from avalanche.models import SimpleMLP
from avalanche.training.supervised import Naive

from avalanche_memo.models import ExpandableNetwork, GrowingLinear
from avalanche_memo.training.losses import auxiliary_targets
from avalanche_memo.training.plugins import (
    AuxiliaryLossPlugin,
    HerdingReplayPlugin,
    WeightAlignmentPlugin,
)
from avalanche_memo.training.plugins.weight_alignment import align_weights
from tests.helpers import APIS, make_benchmark, silent, tiny_backbone


class Losses(SupervisedPlugin):
    """Writes down, for each step, what a loss is made of and what it came to."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def before_backward(self, strategy, **kwargs):
        outputs = strategy.model.outputs
        auxiliary = outputs.auxiliary_logits
        self.steps.append(
            (
                strategy.loss.item(),
                strategy.mb_output.detach().clone(),
                None if auxiliary is None else auxiliary.detach().clone(),
                strategy.mb_y.clone(),
                list(strategy.model.new_classes),
            )
        )


class WithoutMainLoss(SupervisedPlugin):
    def before_backward(self, strategy, **kwargs):
        strategy.loss = 0 * strategy.loss


def naive(model, *plugins) -> Naive:
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=6,
        plugins=list(plugins),
        evaluator=silent(),
    )


def network(shared_stages: int = 2) -> ExpandableNetwork:
    torch.manual_seed(0)
    return ExpandableNetwork(tiny_backbone, shared_stages)


# --- the auxiliary loss -------------------------------------------------------------------------


def plain_targets(targets, new_classes):
    """All old classes as class 0, each new one alone (DER, section 3.2)."""
    return [new_classes.index(t) + 1 if t in new_classes else 0 for t in targets]


@pytest.mark.parametrize(
    ("targets", "new_classes"),
    [
        ([7, 2, 5, 0, 9, 5], [5, 0]),
        ([1, 1, 1], [1]),
        ([3, 4], [98, 99]),
        ([0, 1, 2, 3], [3, 2, 1, 0]),
        (np.random.default_rng(0).integers(0, 100, 500).tolist(), list(range(90, 40, -1))),
    ],
)
def test_auxiliary_targets(targets, new_classes):
    found = auxiliary_targets(torch.tensor(targets), new_classes)
    assert found.dtype == torch.int64
    assert found.tolist() == plain_targets(targets, new_classes)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 1),
        ({"auxiliary_weight": 0.3}, 0.3),
        ({"auxiliary_weight": 2.5}, 2.5),
        ({"auxiliary_weight": 0}, 0),
    ],
)
def test_the_auxiliary_loss_is_added_from_the_second_experience_on(api, options, share):
    losses = Losses()
    strategy = naive(network(), HerdingReplayPlugin(20), AuxiliaryLossPlugin(**options), losses)
    for n, experience in enumerate(make_benchmark(api).train_stream[:3]):
        losses.steps.clear()
        strategy.train(experience)
        assert losses.steps
        for loss, logits, auxiliary, targets, new_classes in losses.steps:
            main = F.cross_entropy(logits, targets).item()
            if n == 0:
                assert loss == pytest.approx(main, rel=1e-6)
                continue
            assert set(new_classes) == set(experience.classes_in_this_experience)
            wanted = plain_targets(targets.tolist(), new_classes)
            log_shares = auxiliary.double().log_softmax(dim=1)
            expected = -np.mean([log_shares[i, t].item() for i, t in enumerate(wanted)])
            assert loss == pytest.approx(main + share * expected, rel=1e-5)


def test_the_auxiliary_loss_reaches_the_newest_block_and_not_the_classifier():
    strategy = naive(network(), WithoutMainLoss(), AuxiliaryLossPlugin())
    stream = make_benchmark().train_stream
    for experience in stream[:2]:
        strategy.train(experience)
    # Now without growth.
    classifier, newest = strategy.model.classifier, strategy.model.specialized[-1]
    before = [[p.detach().clone() for p in module.parameters()] for module in (classifier, newest)]
    strategy.train(stream[1])
    assert all(map(torch.equal, before[0], classifier.parameters()))
    assert not any(map(torch.equal, before[1], newest.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_weight": -0.1}, "auxiliary_weight: expected a number of at least 0, got -0.1"),
        ({"auxiliary_weight": math.nan}, "auxiliary_weight: expected a number .* got nan"),
        ({"auxiliary_weight": math.inf}, "auxiliary_weight: expected a number .* got inf"),
    ],
)
def test_refuses_a_wrong_auxiliary_weight(options, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryLossPlugin(**options)


# --- weight alignment ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2])
def test_weight_alignment_is_the_published_formula(blocks, n_new):
    torch.manual_seed(0)
    head = GrowingLinear()
    head.grow(5, 4 - n_new)
    head.grow(3 if blocks == 2 else 0, 2 + n_new)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().clone()
    factor = align_weights(head, n_new)
    # WA, equations 5 to 7: gamma = mean norm of old rows / mean norm of new rows, on the new ones.
    norms = [np.sqrt((row**2).sum()) for row in weight]
    old, new = norms[:-n_new], norms[-n_new:]
    gamma = (sum(old) / len(old)) / (sum(new) / len(new))
    assert factor == pytest.approx(gamma, rel=1e-5)
    np.testing.assert_allclose(head.weight[-n_new:].detach(), gamma * weight[-n_new:], rtol=1e-5)
    np.testing.assert_array_equal(head.weight[:-n_new].detach(), weight[:-n_new])
    assert torch.equal(head.bias, bias)


def test_weights_that_are_all_zero_are_not_aligned():
    head = GrowingLinear()
    head.grow(5, 3)
    with torch.no_grad():
        head.weights[0][2:] = 0
    before = head.weight.detach().clone()
    assert align_weights(head, 1) == 1.0
    assert torch.equal(head.weight, before)


class Weights(SupervisedPlugin):
    """Keeps the classifier's weight as it is when training ends."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.empty(0)

    def after_training_exp(self, strategy, **kwargs):
        self.norms = strategy.model.classifier.weight.detach().norm(dim=1)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("shared_stages", [2, 3])
def test_weights_are_aligned_after_each_growth_but_the_first(api, shared_stages):
    model, trained = network(shared_stages), Weights()
    strategy = naive(model, trained, WeightAlignmentPlugin())
    for n, experience in enumerate(make_benchmark(api).train_stream[:3]):
        strategy.train(experience)
        norms = model.classifier.weight.detach().norm(dim=1)
        if n == 0:
            assert torch.equal(norms, trained.norms)
        else:
            assert torch.equal(norms[:-2], trained.norms[:-2])
            assert norms[-2:].mean().item() == pytest.approx(norms[:-2].mean().item(), rel=1e-5)
            ratio = norms[-2:] / trained.norms[-2:]
            assert ratio[0].item() == pytest.approx(ratio[1].item(), rel=1e-5)


def test_weights_are_aligned_each_time_that_new_classes_are_trained():
    model, trained = network(), Weights()
    strategy = naive(model, trained, WeightAlignmentPlugin())
    stream = make_benchmark().train_stream
    for experience in (stream[0], stream[1], stream[1]):
        strategy.train(experience)
    norms = model.classifier.weight.detach().norm(dim=1)
    assert not torch.equal(norms, trained.norms)
    assert norms[-2:].mean().item() == pytest.approx(norms[:-2].mean().item(), rel=1e-5)
    strategy.train(stream[0])  # Brings no class that is new.
    assert torch.equal(model.classifier.weight.detach().norm(dim=1), trained.norms)


@pytest.mark.parametrize("size", [5, 4])  # Of parts of equal size Avalanche marks none as the last.
def test_weights_are_aligned_after_the_last_sub_experience(size):
    model, trained = network(), Weights()
    strategy = naive(model, trained, WeightAlignmentPlugin())
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    aligned = []
    for experience in split_online_stream(stream[1:2], experience_size=size):
        strategy.train(experience)
        norms = model.classifier.weight.detach().norm(dim=1)
        aligned.append(not torch.equal(norms, trained.norms))
    assert aligned == [False, False, True]


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [AuxiliaryLossPlugin, WeightAlignmentPlugin])
def test_refuses_another_model_before_training(plugin):
    model = SimpleMLP(input_size=64)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        TypeError, match=rf"model: {plugin.__name__} .*ExpandableNetwork.*SimpleMLP"
    ):
        naive(model, plugin()).train(make_benchmark().train_stream[0])
    assert all(map(torch.equal, before, model.parameters()))


def test_the_auxiliary_loss_refuses_a_network_that_adds_no_blocks():
    with pytest.raises(ValueError, match=r"model: AuxiliaryLossPlugin .*got 3"):
        naive(network(3), AuxiliaryLossPlugin()).train(make_benchmark().train_stream[0])


def test_herding_refuses_a_model_without_features():
    with pytest.raises(TypeError, match=r"model: .*extract_features.*SimpleMLP"):
        naive(SimpleMLP(input_size=64), HerdingReplayPlugin(20)).train(
            make_benchmark().train_stream[0]
        )
