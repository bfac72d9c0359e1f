import math

import pytest
import torch
from torch import nn

from avalanche_memo.budget import parameter_bytes
from avalanche_memo.models import BiasCorrectedLinear, ExpandableNetwork, GrowingLinear
from tests.helpers import tiny_backbone


def grown(*steps: tuple[int, int]) -> GrowingLinear:
    """A head after growing by (features, classes), step by step."""
    head = GrowingLinear()
    for features, classes in steps:
        head.grow(features, classes)
    return head


def test_computes_a_linear_layer():
    head = grown((3, 2), (4, 5))
    assert (head.in_features, head.out_features) == (7, 7)
    assert head.weight.shape == (7, 7)
    features = torch.randn(6, 7)
    expected = [
        [
            sum(w * f for w, f in zip(row, sample, strict=True)) + b
            for row, b in zip(head.weight.tolist(), head.bias.tolist(), strict=True)
        ]
        for sample in features.tolist()
    ]
    torch.testing.assert_close(head(features), torch.tensor(expected))


@pytest.mark.parametrize(("features", "classes"), [(4, 0), (0, 3), (4, 3)])
def test_keeps_the_weights_of_old_pairs(features, classes):
    head = grown((3, 2), (2, 2))
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    head.grow(features, classes)
    assert head.weight.shape == (4 + classes, 5 + features)
    assert torch.equal(head.weight[:4, :5], weight)
    assert torch.equal(head.bias[:4], bias)


def test_what_is_new_starts_as_in_a_fresh_linear_layer():
    torch.manual_seed(0)
    head = grown((300, 40))
    old = head.weight.detach().clone()
    head.grow(100, 60)
    bound = 1 / math.sqrt(400)  # nn.Linear: uniform within 1 / sqrt(in_features)
    new = torch.cat([head.weight[40:].flatten(), head.weight[:40, 300:].flatten()])
    assert new.abs().max() <= bound
    assert new.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert new.mean().item() == pytest.approx(0, abs=1e-3)
    assert head.bias[40:].min() < -bound / 2
    assert head.bias[40:].max() > bound / 2
    assert head.bias[40:].abs().max() <= bound
    assert torch.equal(head.weight[:40, :300], old)


def test_every_entry_learns():
    head = grown((2, 2), (3, 1))
    head(torch.randn(4, 5)).square().sum().backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert sum(g.numel() for g in gradients) == 3 * 5 + 3
    assert all((g != 0).all() for g in gradients)


def test_starts_afresh_on_demand():
    torch.manual_seed(0)
    head = grown((100, 50))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(9)
    head.reset_parameters()
    fresh = nn.Linear(100, 50)
    assert head.weight.abs().max() <= 0.1
    assert head.bias.abs().max() <= 0.1
    assert head.weight.std().item() == pytest.approx(fresh.weight.std().item(), rel=0.05)


@pytest.mark.parametrize(("features", "classes"), [(-1, 0), (0, -2)])
def test_refuses_to_shrink(features, classes):
    with pytest.raises(ValueError, match=rf"at least 0, got {features} and {classes}"):
        grown((2, 2)).grow(features, classes)


# --- BiC's -------------------------------------------------------------------------------------


def corrected() -> BiasCorrectedLinear:
    """Two features, classes 0 and 1 and then 2, all weights and biases 1; in evaluation mode."""
    head = BiasCorrectedLinear()
    head.grow(2)
    head.grow(0, 2)
    head.grow(0, 1)
    with torch.no_grad():
        for parameter in (*head.weights, head.bias):
            parameter.fill_(1.0)
    return head.eval()


def test_a_correction_is_linear_in_the_newest_classes_logits():
    head, features = corrected(), torch.tensor([[1.0, 2.0], [0.0, -3.0]])
    assert head(features).tolist() == [[4, 4, 4], [-2, -2, -2]]
    head.correct(0.5, -1.0)
    assert head(features).tolist() == [[4, 4, 1], [-2, -2, -2]]
    # In training, and once new classes have come, the logits are those that learned.
    assert head.train()(features).tolist() == [[4, 4, 4], [-2, -2, -2]]
    head.eval().grow(0, 2)
    head.correct(2.0, 3.0)
    with torch.no_grad():
        head.weights[0].fill_(1.0)
        head.bias.fill_(1.0)
    assert head(features).tolist() == [[4, 4, 4, 11, 11], [-2, -2, -2, -1, -1]]
    # A second correction is one of what the first has made: 0.5 (2 o + 3) + 1.
    head.correct(0.5, 1.0)
    assert head(features).tolist() == [[4, 4, 4, 6.5, 6.5], [-2, -2, -2, 0.5, 0.5]]


def test_corrections_are_learned_by_no_optimizer_but_differentiated_through():
    head = corrected()
    head.correct(0.5, -1.0)
    features = torch.ones(1, 2, requires_grad=True)
    head(features).sum().backward()
    head.requires_grad_(True)
    assert not head.correction.requires_grad
    assert features.grad.tolist() == [[2.5, 2.5]]
    assert head.bias.grad.tolist() == [1, 1, 0.5]


def test_a_corrected_classifier_starts_afresh_uncorrected():
    head = corrected()
    head.correct(0.5, -1.0)
    head.reset_parameters()
    assert head.correction.tolist() == [1, 0]
    assert not (head.weight == 1).any()
    linear = grown((2, 2), (0, 1))
    torch.manual_seed(0)
    linear.reset_parameters()
    torch.manual_seed(0)
    head.reset_parameters()
    features = torch.randn(4, 2)
    torch.testing.assert_close(head(features), linear(features))


def test_corrections_are_saved_and_counted():
    networks = [
        ExpandableNetwork(tiny_backbone, 3, make_classifier=kind)
        for kind in (BiasCorrectedLinear, BiasCorrectedLinear, GrowingLinear)
    ]
    for network in (networks[0], networks[2]):
        network.grow([7, 2])
        network.grow([5])
    networks[0].classifier.correct(0.25, -2.0)
    networks[1].load_state_dict(networks[0].state_dict())
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(networks[1].eval()(images), networks[0].eval()(images))
    assert parameter_bytes(networks[0]) - parameter_bytes(networks[2]) == 2 * 4
