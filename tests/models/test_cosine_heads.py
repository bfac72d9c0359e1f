import copy
import logging
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from avalanche.models.dynamic_optimizers import update_optimizer
from sklearn.cluster import KMeans
from torch import nn

from avalanche_memo.models import CosineClassifier, ExpandableNetwork, ProxyCosineClassifier
from avalanche_memo.models.heads import class_proxies
from tests.helpers import assert_same_tensors, tensors_of, tiny_backbone
from tests.reference import losses as plain


def grown(*classes: int, features: int = 5, **options) -> ProxyCosineClassifier:
    torch.manual_seed(0)
    head = ProxyCosineClassifier(**options)
    head.grow(features)
    for new in classes:
        head.grow(0, new)
    return head


def features_of(n: int, dim: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("proxies", "gamma", "scale"), [(1, 1, 1), (3, 1, 1), (4, 2.5, 7)])
def test_computes_the_published_local_similarities(proxies, gamma, scale):
    head = grown(2, 3, proxies=proxies, gamma=gamma, scale=scale, freeze_old=False)
    features = features_of(6).requires_grad_()
    weights = [w.detach().double().requires_grad_() for w in head.weights]
    twin = features.detach().double().requires_grad_()
    proxies_by_class = torch.cat(weights).reshape(5, proxies, 5)
    expected = scale * plain.proxy_similarities(twin, proxies_by_class, gamma)
    logits = head(features)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    head(features).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(features.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)
    for own, other in zip(head.weights, weights, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
    # d(sum logits^2) / d scale = 2 sum logits^2 / scale.
    slope = 2 * expected.square().sum().item() / scale
    assert head.scale.grad.item() == pytest.approx(slope, rel=1e-4)


def test_similarities_are_minus_squared_distances_on_demand():
    head = grown(2, 1, proxies=3, gamma=2.0, scale=1.5, squared_distance=True)
    features = features_of(6)
    proxies = head.weight.detach().reshape(3, 3, 5)
    for feature, logits in zip(features.tolist(), head(features).tolist(), strict=True):
        for own, logit in zip(proxies.tolist(), logits, strict=True):
            similarities = [
                -sum((f / math.hypot(*feature) - p / math.hypot(*proxy)) ** 2 for f, p in pairs)
                for proxy in own
                for pairs in [list(zip(feature, proxy, strict=True))]
            ]
            shares = [math.exp(2.0 * similarity) for similarity in similarities]
            mean = sum(a * b for a, b in zip(shares, similarities, strict=True)) / sum(shares)
            assert logit == pytest.approx(1.5 * mean, rel=1e-4)


def test_one_proxy_is_a_cosine_layer():
    torch.manual_seed(0)
    head = CosineClassifier(scale=3.0)
    head.grow(5, 4)
    features = features_of(6)
    weight = head.weight.detach()
    expected = [[3 * F.cosine_similarity(f, w, dim=0) for w in weight] for f in features]
    torch.testing.assert_close(head(features).detach(), torch.tensor(expected))


def test_growth_keeps_old_proxies_and_adds_a_parameter():
    head = grown(2, proxies=3)
    before = head.weights[0].detach().clone()
    head.grow(0, 4)
    assert [tuple(w.shape) for w in head.weights] == [(6, 5), (12, 5)]
    assert torch.equal(head.weights[0], before)
    assert (head.in_features, head.out_features) == (5, 6)
    assert [name for name, _ in head.named_parameters()] == ["scale", "weights.0", "weights.1"]
    head.grow(2)
    assert [tuple(w.shape) for w in head.weights] == [(6, 7), (12, 7)]
    assert torch.equal(head.weights[0][:, :5], before)


@pytest.mark.parametrize("freeze_old", [True, False])
def test_old_proxies_freeze_when_new_ones_come(freeze_old):
    head = grown(2, proxies=3, freeze_old=freeze_old)
    assert head.weights[0].requires_grad
    head.weights[0].grad = torch.ones(6, 5)
    head.grow(0, 1)
    assert head.weights[0].requires_grad is not freeze_old
    assert (head.weights[0].grad is None) is freeze_old
    assert head.weights[1].requires_grad
    head.grow(3)
    assert head.weights[0].requires_grad is not freeze_old


@pytest.mark.parametrize("freeze_old", [True, False])
def test_proxies_that_freeze_get_none_of_the_new_features(freeze_old):
    head = grown(2, freeze_old=freeze_old)
    old = head.weight.detach().clone()
    head.grow(3, 2)
    assert torch.equal(head.weights[0][:, :5], old)
    assert bool((head.weights[0][:, 5:] == 0).all()) is freeze_old
    assert not (head.weights[1] == 0).any()


def test_random_proxies_have_a_length_of_about_1():
    head = grown(40, features=64)
    assert head.weight.norm(dim=1).mean().item() == pytest.approx(1, rel=0.05)


def test_starts_afresh_on_demand():
    head = grown(2, 1, proxies=3, scale=2.0)
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.scale.fill_(9)
    head.reset_parameters()
    assert head.scale.item() == 2
    assert not (head.weight == before).any()


def clusters(k: int, per_cluster: int = 6, seed: int = 0) -> torch.Tensor:
    """Samples close to k directions."""
    directions = F.normalize(features_of(k, 8, seed), dim=1).repeat_interleave(per_cluster, dim=0)
    return directions + 0.01 * features_of(len(directions), 8, seed + 1)


def test_class_proxies_are_the_centres_of_k_means():
    samples = clusters(4)
    centres = class_proxies(3 * samples, 4).double().numpy()
    unit = F.normalize(samples, dim=1).numpy()
    expected = KMeans(4, n_init=10, random_state=0).fit(unit).cluster_centers_
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(centres, expected, rtol=1e-5, atol=1e-6)
    # And each is next to one of the directions that the samples were made of.
    means = F.normalize(F.normalize(samples, dim=1).reshape(4, 6, 8).mean(dim=1), dim=1)
    cosines = means.double().numpy() @ centres.T
    np.testing.assert_allclose(np.sort(cosines.max(axis=1)), 1, atol=1e-5)
    assert sorted(cosines.argmax(axis=1)) == [0, 1, 2, 3]


def test_a_single_proxy_is_the_normalised_mean():
    samples = features_of(7)
    mean = F.normalize(samples, dim=1).mean(dim=0)
    torch.testing.assert_close(class_proxies(samples, 1)[0], mean / mean.norm())


def test_a_class_with_fewer_samples_than_proxies_uses_them_all_and_says_so(caplog):
    samples = features_of(3)
    unit = F.normalize(samples, dim=1)
    expected = torch.stack([unit[i % 3] for i in range(7)])
    torch.testing.assert_close(class_proxies(samples, 7), expected)
    grown(2, features=5, proxies=7).imprint([features_of(3), features_of(20)])
    (message,) = (r.message for r in caplog.records if r.levelno >= logging.WARNING)
    assert message.startswith("proxies: 1 classes have fewer samples than their 7 proxies")


def test_imprinting_sets_the_newest_proxies_at_the_older_ones_length():
    head = grown(2, 2, features=8, proxies=3)
    with torch.no_grad():
        head.weights[0].mul_(5)
    older = head.weights[0].detach().clone()
    samples = [clusters(3, seed=10), clusters(3, seed=20)]
    head.imprint(samples, seed=4)
    assert torch.equal(head.weights[0], older)
    length = older.norm(dim=1).mean()
    for i, of_class in enumerate(samples):
        expected = length * class_proxies(of_class, 3, 4)
        torch.testing.assert_close(head.weights[1][3 * i : 3 * i + 3], expected)
        # Its own class is the most similar one.
        assert (head.similarities(of_class).argmax(dim=1) == 2 + i).all()


def test_imprinting_refuses_another_number_of_classes():
    with pytest.raises(ValueError, match="features: expected 2 classes, got 3"):
        grown(2).imprint([features_of(4)] * 3)
    with pytest.raises(ValueError, match="features: expected at least one sample, got none"):
        class_proxies(features_of(0), 1)


def test_a_class_without_samples_keeps_its_proxies():
    head = grown(2)
    before = head.weight.detach().clone()
    head.imprint([features_of(0), features_of(4)])
    changed = (head.weight != before).any(dim=1)
    assert changed.view(head.out_features, -1).all(dim=1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proxies": 0}, "proxies: expected a whole number of at least 1, got 0"),
        ({"gamma": 0}, "gamma: expected a positive number, got 0"),
        ({"scale": -1}, "scale: expected a positive number, got -1"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ProxyCosineClassifier(**options)


@pytest.mark.parametrize(("features", "classes"), [(-1, 0), (0, -2)])
def test_refuses_to_shrink(features, classes):
    with pytest.raises(ValueError, match=rf"at least 0, got {features} and {classes}"):
        grown(2).grow(features, classes)


# --- in an expandable network -------------------------------------------------------------------


def network(shared_stages: int = 3, seed: int = 0, **options) -> ExpandableNetwork:
    torch.manual_seed(seed)
    make = partial(ProxyCosineClassifier, 3, **options)
    return ExpandableNetwork(tiny_backbone, shared_stages, make_classifier=make)


@pytest.mark.parametrize("shared_stages", [0, 2, 3])
def test_logits_have_a_column_per_class_id(shared_stages):
    model = network(shared_stages)
    model.grow([7, 2])
    model.grow([4])
    images = torch.rand(5, 1, 8, 8)
    logits = model(images)
    assert logits.shape == (5, 8)
    rows = model.classifier(model.outputs.features)
    assert torch.equal(logits[:, [7, 2, 4]], rows)
    assert (logits[:, [0, 1, 3, 5, 6]] == -1e4).all()


@pytest.mark.parametrize("shared_stages", [0, 3])
def test_a_fresh_network_takes_a_saved_state_with_what_is_frozen(shared_stages):
    model = network(shared_stages)
    for new in ([7, 2], [4], [0, 9]):
        model.grow(new)
    other = network(shared_stages, seed=5)
    other.load_state_dict(model.state_dict())
    assert_same_tensors(tensors_of(other), tensors_of(model))
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == learning
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(other.eval()(images), model.eval()(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_an_avalanche_optimizer_follows_the_proxies():
    model = network()
    model.grow([0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracked = update_optimizer(optimizer, dict(model.named_parameters()), None, True)
    model.grow([2])
    update_optimizer(optimizer, dict(model.named_parameters()), tracked)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), lambda: None])
def test_the_network_refuses_another_classifier(make):
    with pytest.raises(TypeError, match=r"make_classifier: expected .*GrowingClassifier, got"):
        ExpandableNetwork(tiny_backbone, 3, make_classifier=make)
