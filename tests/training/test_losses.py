import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_memo.training.losses import (
    NCALoss,
    less_forget_loss,
    margin_ranking_loss,
    nca_loss,
    nca_loss_released,
    pod_loss,
    softmax_distillation_loss,
    sparsity_loss,
)
from tests.reference import losses as plain
from tests.reference import masks as plain_masks


def normal(*shape, seed=0, learns=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_(learns)


def doubles(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def assert_same(ours, expected, inputs, expected_inputs):
    """Compare two losses and their gradients to 1e-5."""
    assert ours.shape == ()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    ours_gradients = torch.autograd.grad(ours, inputs)
    gradients = torch.autograd.grad(expected, expected_inputs)
    for own, other in zip(ours_gradients, gradients, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["spatial", "width", "height", "channels", "gap"])
def test_pod_is_the_published_formula(pooling, normalize):
    shapes = [(3, 2, 4, 3), (3, 3, 2, 2)]
    old = [normal(*shape, seed=i, learns=False) for i, shape in enumerate(shapes)]
    new = [normal(*shape, seed=9 + i) for i, shape in enumerate(shapes)]
    twins = doubles(new)
    expected = plain.pod(doubles(old), twins, pooling, normalize)
    assert_same(pod_loss(old, new, pooling, normalize), expected, new, twins)


def test_pod_of_equal_maps_is_0_with_a_gradient_of_0():
    maps = normal(2, 3, 4, 4)
    loss = pod_loss([maps.detach()], [maps])
    loss.backward()
    assert loss == 0
    assert torch.equal(maps.grad, torch.zeros_like(maps))


def test_pod_of_bfloat16_maps_is_computed_in_float32():
    old, new = normal(2, 8, 4, 4).bfloat16(), normal(2, 8, 4, 4, seed=1).bfloat16()
    loss = pod_loss([old], [new])
    assert loss.dtype == torch.float32
    assert loss == pod_loss([old.float()], [new.float()])


@pytest.mark.parametrize(
    ("old", "new", "pooling", "message"),
    [
        ([(2, 3, 4, 4)], [(2, 3, 4, 4)], "depth", "pooling: expected one of spatial, .*'depth'"),
        ([], [], "spatial", r"old_maps, new_maps: .*got \[\] and \[\]"),
        ([(2, 3, 4, 4)], [(2, 3, 4, 5)], "gap", r"old_maps, new_maps: .*4, 5"),
        ([(2, 3)], [(2, 3)], "gap", r"old_maps, new_maps: .*\(2, 3\)"),
    ],
)
def test_pod_refuses(old, new, pooling, message):
    with pytest.raises(ValueError, match=message):
        pod_loss([torch.ones(s) for s in old], [torch.ones(s) for s in new], pooling)


@pytest.mark.parametrize("hinge", [True, False])
@pytest.mark.parametrize(("scale", "margin"), [(1.0, 0.6), (4.0, 0.6), (2.5, 0.0)])
def test_nca_is_the_published_equation(scale, margin, hinge):
    similarities, targets = normal(12, 4), torch.arange(12) % 4
    eta = torch.tensor(scale, requires_grad=True)
    (twin, twin_eta) = doubles([similarities, eta])
    ours = nca_loss(similarities, targets, eta, margin, hinge)
    expected = plain.nca(twin, targets, twin_eta, margin, hinge)
    assert_same(ours, expected, [similarities, eta], [twin, twin_eta])


def test_nca_stops_at_0_and_ignores_columns_of_unseen_classes():
    similarities = torch.tensor([[9.0, 0.0, -1e4], [0.0, 1.0, -1e4]])
    # -log(exp(9 - 0.6) / exp(0)) = -8.4, and -log(exp(1 - 0.6) / exp(0)) = -0.4.
    assert nca_loss(similarities, torch.tensor([0, 1])) == 0
    value = nca_loss(similarities, torch.tensor([0, 1]), hinge=False)
    assert value.item() == pytest.approx((-8.4 - 0.4) / 2, rel=1e-6)


@pytest.mark.parametrize(("scale", "margin"), [(1.0, 0.6), (4.0, 0.0), (4.0, 0.6)])
def test_released_nca_is_the_authors_code(scale, margin):
    similarities, targets = normal(12, 4), torch.arange(12) % 4
    eta = torch.tensor(scale, requires_grad=True)
    (twin, twin_eta) = doubles([similarities, eta])
    ours = nca_loss_released(similarities, targets, eta)
    expected = plain.nca_released(twin, targets, twin_eta, margin)
    assert_same(ours, expected, [similarities, eta], [twin, twin_eta])


def test_released_nca_is_cross_entropy_where_the_right_class_is_ahead():
    similarities = normal(8, 5)
    ahead = similarities.argmax(dim=1)
    torch.testing.assert_close(
        nca_loss_released(similarities, ahead, 3.0), F.cross_entropy(3 * similarities, ahead)
    )


@pytest.mark.parametrize("loss", [nca_loss, nca_loss_released])
def test_nca_of_a_class_alone_is_0_with_a_gradient_of_0(loss):
    similarities = torch.ones(3, 1, requires_grad=True)
    value = loss(similarities, torch.zeros(3, dtype=torch.long))
    value.backward()
    assert value == 0
    assert torch.equal(similarities.grad, torch.zeros(3, 1))


@pytest.mark.parametrize("loss", [nca_loss, nca_loss_released])
def test_nca_refuses_other_shapes(loss):
    with pytest.raises(ValueError, match=r"similarities: .*one column, got shape \(3, 0\)"):
        loss(torch.ones(3, 0), torch.zeros(3, dtype=torch.long))


def test_the_criterion_reads_the_scale_from_the_network():
    model = nn.Module()
    model.classifier = nn.Module()
    model.classifier.scale = nn.Parameter(torch.tensor([2.5]))
    similarities, targets = normal(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    logits = model.classifier.scale * similarities
    (twin, twin_eta) = doubles([similarities, model.classifier.scale])
    # exp(eta y - c) with c = eta delta held constant: a margin of c / eta.
    constant = 2.5 * 0.3
    expected = plain.nca(twin_eta * twin, targets, 1.0, constant, True)
    ours = NCALoss(model, 0.3)(logits, targets)
    assert_same(ours, expected, [similarities, model.classifier.scale], [twin, twin_eta])
    assert ours.item() == pytest.approx(nca_loss(similarities, targets, 2.5, 0.3).item())
    released = NCALoss(model, nca="released")(logits, targets)
    assert released.item() == pytest.approx(
        nca_loss_released(similarities, targets, 2.5).item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "margin: expected a number of at least 0, got -0.1"),
        ({"nca": "code"}, "nca: expected 'equation' or 'released', got 'code'"),
    ],
)
def test_the_criterion_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        NCALoss(nn.Module(), **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_distillation_is_the_published_formula(temperature):
    old, new = normal(5, 4, learns=False), normal(5, 4, seed=1)
    twins = doubles([new])
    expected = plain.distillation(twins[0], old.double(), temperature)
    assert_same(softmax_distillation_loss(new, old, temperature), expected, [new], twins)


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((2, 3), (2, 3)), 0, "temperature: expected a positive number, got 0"),
        (((2, 3), (2, 3)), -1.5, "temperature: .*got -1.5"),
        (((2, 3), (2, 4)), 2, r"new_logits, old_logits: .*\(2, 3\) and \(2, 4\)"),
    ],
)
def test_distillation_refuses(shapes, temperature, message):
    with pytest.raises(ValueError, match=message):
        softmax_distillation_loss(torch.ones(shapes[0]), torch.ones(shapes[1]), temperature)


def test_less_forget_is_the_published_formula_and_half_a_squared_distance():
    old, new = normal(6, 5, learns=False), normal(6, 5, seed=1)
    twins = doubles([new])
    ours = less_forget_loss(old, new)
    assert_same(ours, plain.less_forget(old.double(), twins[0]), [new], twins)
    gap = F.normalize(old, dim=1) - F.normalize(new, dim=1)
    assert less_forget_loss(old, new).item() == pytest.approx(
        gap.square().sum(dim=1).mean().item() / 2, rel=1e-5
    )


def test_less_forget_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"old_features, new_features: .*\(2, 3\) and \(3, 2\)"):
        less_forget_loss(torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("old", [[0, 1, 2], [5, 1, 3]])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_margin_ranking_is_the_published_formula(old, k, margin):
    similarities, targets = normal(9, 6), torch.tensor([0, 1, 2, 3, 4, 5, 5, 0, 2])
    twins = doubles([similarities])
    ours = margin_ranking_loss(similarities, targets, old, k, margin)
    expected = plain.margin_ranking(twins[0], targets, old, k, margin)
    assert_same(ours, expected, [similarities], twins)


def test_margin_ranking_of_new_samples_alone_is_0():
    similarities = normal(3, 4)
    loss = margin_ranking_loss(similarities, torch.tensor([2, 3, 2]), [0, 1])
    loss.backward()
    assert loss == 0
    assert torch.equal(similarities.grad, torch.zeros(3, 4))


@pytest.mark.parametrize(("old", "k"), list(itertools.product([[0, 1]], [0, 3])))
def test_margin_ranking_refuses_more_negatives_than_new_classes(old, k):
    with pytest.raises(ValueError, match=f"k: expected 1 to 2, .*got {k}"):
        margin_ranking_loss(torch.ones(2, 4), torch.tensor([0, 1]), old, k)


# --- sparsity -----------------------------------------------------------------------------------


def test_sparsity_by_hand():
    """Two layers of 4 and 2 channels on 3: 9*3*1.5 + 25*1.5*0.5 of 9*3*4 + 25*4*2 weights."""
    masks = [torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([0.25, 0.25])]
    loss = sparsity_loss(masks, [9, 25], [None, 0])
    assert loss.item() == pytest.approx(59.25 / 308)


def test_sparsity_of_a_chain():
    masks = [torch.rand(c).requires_grad_() for c in (16, 32, 8, 64)]
    areas = [9, 1, 49, 9]
    loss = sparsity_loss(masks, areas, [None, 0, 1, 2], in_channels=5)
    used = [mask.sum().item() for mask in masks]
    expected = plain_masks.sparsity(used, [16, 32, 8, 64], areas, 5)
    assert loss.item() == pytest.approx(expected)
    assert sparsity_loss([torch.ones(c) for c in (16, 32)], [9, 9], [None, 0]).item() == 1
    loss.backward()
    # By hand, for a channel of the second layer: what it feeds and what feeds it.
    weights = 9 * 5 * 16 + 16 * 32 + 49 * 32 * 8 + 9 * 8 * 64
    slope = (used[0] + 49 * used[2]) / weights
    torch.testing.assert_close(masks[1].grad, torch.full((32,), slope))


def test_sparsity_where_two_layers_read_the_same():
    """A shortcut's convolution: 9*3*2 + 9*2*3 + 1*2*3 of 9*3*4 + 9*4*6 + 4*6 weights."""
    masks = [torch.full((4,), 0.5), torch.full((6,), 0.5), torch.full((6,), 0.5)]
    assert sparsity_loss(masks, [9, 9, 1], [None, 0, 0]).item() == pytest.approx(114 / 348)
