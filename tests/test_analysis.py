import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from avalanche_memo.analysis import (
    block_features,
    block_gradients,
    block_shift,
    linear_cka,
    network_blocks,
)
from avalanche_memo.models import ExpandableNetwork, cifar_resnet, convnet2, imagenet_resnet
from avalanche_memo.models.channel_mask import MaskedBatchNorm2d
from tests.helpers import assert_same_tensors, randomize_norms, tensors_of, tiny_backbone


def cka_by_gram_matrices(x, y):
    """Kornblith et al. (2019): HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), with linear kernels."""
    n = len(x)
    centring = torch.eye(n, dtype=x.dtype) - torch.ones(n, n, dtype=x.dtype) / n

    def hsic(k, m):
        return torch.trace(k @ centring @ m @ centring) / (n - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return float(hsic(k, m) / torch.sqrt(hsic(k, k) * hsic(m, m)))


def features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Far from centred, so that centring shows.
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + 3


@pytest.mark.parametrize(("n", "d", "e"), [(20, 3, 5), (6, 30, 40), (10, 4, 60), (10, 60, 4)])
def test_cka_is_the_ratio_of_hsics(n, d, e):
    x = features(n, d)
    y = features(n, e, seed=1) + x[:, :1]
    assert linear_cka(x, y) == pytest.approx(cka_by_gram_matrices(x, y), rel=1e-9)
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), rel=1e-9)


@pytest.mark.parametrize("d", [4, 40])
def test_cka_knows_no_rotation_scale_or_origin(d):
    x, y = features(12, d), features(12, 7, seed=1)
    orthogonal = torch.linalg.qr(features(d, d, seed=2))[0]
    assert linear_cka(-5 * x @ orthogonal + 100, x) == pytest.approx(1)
    assert linear_cka(-5 * x @ orthogonal + 100, y) == pytest.approx(linear_cka(x, y))
    # Scaling features one by one is another matter.
    assert linear_cka(x * torch.linspace(0.1, 9, d), y) != pytest.approx(linear_cka(x, y), abs=1e-3)


def test_cka_of_uncorrelated_features_is_zero():
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert linear_cka(x, y) == 0


class Largest(TorchFunctionMode):
    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(("n", "d", "e"), [(100, 3, 5), (3, 100, 80)])
def test_cka_forms_the_smaller_products(n, d, e):
    with Largest() as largest:
        linear_cka(features(n, d), features(n, e, seed=1))
    assert largest.elements == n * max(d, e)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (features(4, 2), features(5, 2), r"x, y: .* shapes \(4, 2\) and \(5, 2\)"),
        (features(4, 2), features(4), r"x, y: .* shapes \(4, 2\) and \(4,\)"),
        (torch.full((7, 2), 0.1), features(7, 2), "x: expected finite features that vary"),
        (features(4, 2), features(4, 2) / 0, "y: expected finite features that vary"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        linear_cka(x, y)


def test_residual_blocks_are_named_by_stage():
    def names(make, stages):
        return list(network_blocks(ExpandableNetwork(make, stages)))

    stem_and_15 = [f"{s}.{b}" for s in (1, 2, 3) for b in range(s > 1, 6)]
    assert stem_and_15[0] == "1.0"
    assert len(stem_and_15) == 16
    assert names(lambda: cifar_resnet(32), 3) == stem_and_15
    assert names(lambda: cifar_resnet(8, last_relu=False), 0) == ["1.0", "1.1", "2.1", "3.1"]
    assert names(lambda: imagenet_resnet(10), 4) == ["1.0", "1.1", "2.1", "3.1", "4.1"]
    assert names(convnet2, 1) == ["1", "2"]


@pytest.mark.parametrize("last_relu", [True, False])
def test_pruned_blocks_keep_their_names(last_relu):
    network = ExpandableNetwork(lambda: cifar_resnet(8, last_relu=last_relu), 0, masked=True)
    network.grow([0])
    names = list(network_blocks(network))
    for norm in network.modules():
        if isinstance(norm, MaskedBatchNorm2d):
            torch.nn.init.normal_(norm.embedding)
    network.prune()
    network.eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        network(images)
    found = block_features(network, images)
    assert list(found) == names == ["1.0", "1.1", "2.1", "3.1"]
    torch.testing.assert_close(found["3.1"], network.outputs.stage_maps[-1].mean(dim=(2, 3)))


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
@pytest.mark.parametrize("last_relu", [True, False])
def test_blocks_in_a_row_are_the_newest_backbone(shared, last_relu):
    network = ExpandableNetwork(lambda: cifar_resnet(14, last_relu=last_relu), shared)
    randomize_norms(network)
    network.grow([0])
    network.grow([1, 2])
    for block in network.specialized:
        randomize_norms(block)
    network.eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        network(images)
    found = block_features(network, images)
    assert list(found) == ["1.0", "1.1", "1.2", "2.1", "2.2", "3.1", "3.2"]
    for name, maps in zip(("1.2", "2.2", "3.2"), network.outputs.stage_maps, strict=True):
        torch.testing.assert_close(found[name], maps.mean(dim=(2, 3)))
    own = {id(p) for stage in network.generalized for p in stage.parameters()}
    own |= {id(p) for block in network.specialized[-1:] for p in block.parameters()}
    assert {id(p) for b in network_blocks(network).values() for p in b.parameters()} == own


def tiny_network(shared_stages, **options):
    torch.manual_seed(0)
    network = ExpandableNetwork(tiny_backbone, shared_stages, **options)
    network.grow([0, 1])
    network.grow([2])
    randomize_norms(network)
    return network


def norm_by_hand(loss, block):
    gradients = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
    return math.sqrt(sum(float(value) ** 2 for g in gradients for value in g.flatten()))


@pytest.mark.parametrize("shared_stages", [3, 2])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_mean_loss(shared_stages, training):
    network = tiny_network(shared_stages).train(training)
    images, targets = torch.randn(5, 1, 6, 6), torch.tensor([0, 1, 2, 2, 1])
    # In training mode a batch's statistics are part of the function.
    cuts = [5] if training else [3, 2]
    batches = list(zip(images.split(cuts), targets.split(cuts), strict=True))
    before = tensors_of(network)
    found = block_gradients(network, batches)
    assert_same_tensors(tensors_of(network), before)
    assert all(p.grad is None for p in network.parameters())
    loss = F.cross_entropy(network(images), targets)
    blocks = [*network.generalized, *(s for b in network.specialized[-1:] for s in b)]
    expected = {str(i): norm_by_hand(loss, block) for i, block in enumerate(blocks, start=1)}
    assert found == pytest.approx(expected, rel=1e-4)


def test_frozen_blocks_have_no_gradient():
    network = tiny_network(2, train_generalized=False)
    batch = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 2])
    assert list(block_gradients(network, [batch])) == ["3"]


def test_gradients_need_a_sample():
    with pytest.raises(ValueError, match="batches: expected at least one sample"):
        block_gradients(tiny_network(3), [])


def test_shift_is_the_mean_squared_difference_of_weights():
    first, last = tiny_network(2), tiny_network(2)
    assert block_shift(first, last) == {"1": 0, "2": 0, "3": 0}
    with torch.no_grad():
        # 36 weights and 4 biases, then 4 factors and 4 offsets of the norm.
        last.generalized[0][0].weight += 0.5
        last.generalized[0][1].bias -= 2
        last.generalized[0][1].running_mean += 100
        # 270 weights and 6 biases, then 12 parameters of the norm, of the newest block.
        last.specialized[1][0][0].bias += 3
        last.specialized[0][0][0].bias += 100
    sums = {"1": 36 * 0.25 + 4 * 4, "2": 0, "3": 6 * 9}
    means = {"1": sums["1"] / 48, "2": 0, "3": sums["3"] / 288}
    assert block_shift(first, last) == pytest.approx(means, rel=1e-5)
    assert block_shift(first, last, "sum") == pytest.approx(sums, rel=1e-5)


def test_networks_of_other_blocks_have_no_shift():
    other = ExpandableNetwork(lambda: tiny_backbone((4, 5, 7)), 2)
    with pytest.raises(ValueError, match=r"last: expected blocks of the sizes .*'3': 288.*, got"):
        block_shift(tiny_network(2), other)
