import copy
import weakref
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from avalanche_memo.models import (
    cifar_resnet,
    convnet2,
    convnet4,
    fast_path,
    fused,
    imagenet_resnet,
)
from avalanche_memo.models.fast_path import fold_batch_norm, has_bfloat16
from avalanche_memo.models.fused import FusedConvolutions, fuse
from avalanche_memo.models.pruning import mask_channels, masked_layers, prune_channels
from tests.helpers import randomize_norms

pytestmark = pytest.mark.skipif(
    not isinstance(fuse(nn.Sequential(nn.Conv2d(3, 3, 1)))[0], FusedConvolutions),
    reason="convolutions are fused on an x86 processor alone",
)


def block(make) -> nn.Module:
    torch.manual_seed(0)
    stages = nn.Sequential(*make().stages)
    randomize_norms(stages)
    return stages.eval().requires_grad_(False)


def both_ways(run, image_size: int = 32, dtype: torch.dtype = torch.float32):
    """Return a block's output and its gradient by the images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, image_size, image_size, generator=generator)
    images = images.to(dtype).requires_grad_()
    output = run(images)
    gradient = torch.randn(output.shape, generator=generator).to(output.dtype)
    before = gradient.clone()
    output.backward(gradient)
    assert torch.equal(gradient, before)
    return output.detach(), images.grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (partial(cifar_resnet, 14), ["FusedConvolutions"] * 3),
        (partial(cifar_resnet, 8, "cbam"), ["FusedConvolutions", *["CifarBlock"] * 3]),
        (partial(cifar_resnet, 8, last_relu=False), ["FusedConvolutions"] * 3),
        (
            partial(imagenet_resnet, 10),
            ["FusedConvolutions", "MaxPool2d", *["FusedConvolutions"] * 4],
        ),
        (
            partial(imagenet_resnet, 26, last_relu=False),
            ["FusedConvolutions", "MaxPool2d", *["FusedConvolutions"] * 4],
        ),
        (convnet2, ["FusedConvolutions", "MaxPool2d"] * 2),
        (convnet4, ["FusedConvolutions", "MaxPool2d"] * 4),
    ],
    ids=["cifar", "cbam", "no_relu", "basic", "bottleneck_no_relu", "convnet2", "convnet4"],
)
def test_a_fused_block_computes_the_same(make, parts, layout):
    plain = block(make).to(memory_format=layout)
    folded = fold_batch_norm(plain, torch.float32)
    assert [type(part).__name__ for part in folded] == parts
    for got, expected in zip(both_ways(folded), both_ways(plain), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_fused_block_of_pruned_residuals_computes_the_same():
    """As DER's pruning leaves them: some fusable, some of other widths."""
    masked = mask_channels(block(partial(cifar_resnet, 14))).eval().requires_grad_(False)
    kept = [list(range(layer.norm.num_features)) for layer in masked_layers(masked)]
    kept[1], kept[4] = kept[1][1:], kept[4][::2]
    pruned = prune_channels(masked, kept).eval().requires_grad_(False)
    folded = fold_batch_norm(pruned, torch.float32)
    assert any(isinstance(part, FusedConvolutions) for part in folded)
    for got, expected in zip(both_ways(folded), both_ways(pruned), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
def test_in_bfloat16_it_is_as_exact_as_unfused(monkeypatch):
    plain = block(partial(cifar_resnet, 14))
    folded = fold_batch_norm(plain, torch.bfloat16)
    monkeypatch.setattr(fast_path, "fuse", lambda folded: folded)
    unfused = fold_batch_norm(plain, torch.bfloat16)
    exact = both_ways(plain)
    got = both_ways(folded, dtype=torch.bfloat16)
    assert got[0].dtype == torch.bfloat16
    for a, b, expected in zip(got, both_ways(unfused, dtype=torch.bfloat16), exact, strict=True):
        assert (a - expected).norm() <= 1.2 * (b - expected).norm()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 6, 3, groups=3),
        nn.Conv2d(3, 4, 3).double(),
        nn.GELU(),
    ],
    ids=["reflected", "same", "groups", "float64", "other"],
)
def test_what_cannot_be_fused_stays(layer):
    assert fuse(nn.Sequential(layer))[0] is layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.Conv2d(3, 5, 3, padding=3),
        nn.Conv2d(3, 5, (3, 1), padding=(0, 0), dilation=2),
        nn.Conv2d(3, 5, 5, padding=2),
    ],
    ids=["strided", "wide_padding", "dilated", "large"],
)
def test_gradients_of_all_kinds_of_convolutions(layer):
    layers = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(5, 2, 3)).requires_grad_(False)
    chain = fuse(copy.deepcopy(layers))
    assert len(chain) == 1
    for size in (8, 9):
        for got, expected in zip(both_ways(chain, size), both_ways(layers, size), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_fused_where_the_kernels_differ(monkeypatch):
    """They are not public, so another release of PyTorch may not have them."""
    layers = nn.Sequential(nn.Conv2d(3, 3, 1))
    state = torch.get_rng_state()
    for result in (AttributeError("gone"), torch.zeros(1)):
        fused._kernels_work.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(fused, "_convolve", Mock(side_effect=[result] * 2))
            assert fuse(layers) is layers
    fused._kernels_work.cache_clear()
    assert fuse(layers) is not layers
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_gradient_maps_are_freed_as_soon_as_a_residual_ends(monkeypatch):
    alive, convolve = [], fused._convolve

    def watched(*args, **kwargs):
        output = convolve(*args, **kwargs)
        alive.append(weakref.ref(output))
        most.append(sum(reference() is not None for reference in alive))
        return output

    folded = fold_batch_norm(block(partial(cifar_resnet, 20)), torch.float32)
    monkeypatch.setattr(fused, "_convolve", watched)
    for needs_gradient, expected in ((False, 4), (True, 19)):
        most: list[int] = []
        alive.clear()
        folded(torch.randn(1, 3, 32, 32, requires_grad=needs_gradient))
        assert max(most) == expected
