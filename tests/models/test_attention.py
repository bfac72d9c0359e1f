from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_memo.models import (
    CBAM,
    ExpandableNetwork,
    cifar_resnet,
    four_stage_resnet,
    imagenet_resnet,
)
from avalanche_memo.models.cifar_resnet import CifarBlock
from tests.helpers import randomize_norms


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cbam(x, first, second, kernel):
    """CBAM, section 3, in float64, sample by sample and pixel by pixel."""

    def mlp(vector):
        return second @ (first @ vector).clamp(min=0)

    refined = []
    for sample in x:
        by_channel = sample.flatten(1)
        attention = mlp(by_channel.mean(dim=1)) + mlp(by_channel.max(dim=1).values)
        sample = sample / (1 + torch.exp(-attention))[:, None, None]
        pooled = torch.stack([sample.mean(dim=0), sample.max(dim=0).values])
        padded = F.pad(pooled, (3, 3, 3, 3))
        pixels = [
            [(padded[:, h : h + 7, w : w + 7] * kernel).sum() for w in range(sample.shape[2])]
            for h in range(sample.shape[1])
        ]
        attention = torch.stack([torch.stack(row) for row in pixels])
        refined.append(sample / (1 + torch.exp(-attention)))
    return torch.stack(refined)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(16, 5, 4), (32, 9, 11), (8, 1, 2), (8, 3, 1)]
)
def test_cbam_is_the_published_formula(channels, height, width, layout):
    torch.manual_seed(0)
    module = CBAM(channels).to(memory_format=layout)
    x = torch.randn(2, channels, height, width).to(memory_format=layout).requires_grad_()
    twin = x.detach().double().requires_grad_()
    weights = [p.detach().double().requires_grad_() for p in module.parameters()]
    ours, expected = module(x), cbam(twin, weights[0], weights[1], weights[2][0])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)
    for own, other in zip(module.parameters(), weights, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "hidden"), [(16, 1), (32, 2), (64, 4), (128, 8), (8, 1)])
def test_cbam_has_the_parameters_of_an_mlp_and_a_convolution(channels, hidden):
    assert n_parameters(CBAM(channels)) == 2 * channels * hidden + 2 * 7 * 7


def test_every_block_has_attention():
    # 5 blocks each of 16, 32 and 64 channels: 32 + 98, 128 + 98 and 512 + 98 parameters.
    backbone = cifar_resnet(32, attention="cbam")
    assert n_parameters(backbone) == 463_504 + 5 * (130 + 226 + 610) == 468_334
    assert sum(isinstance(module, CBAM) for module in backbone.modules()) == 15
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 64)


def test_the_block_refines_its_residual_before_the_shortcut():
    torch.manual_seed(0)
    block = CifarBlock(16, 16, CBAM(16)).eval()
    x = torch.randn(2, 16, 6, 6)
    residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    weights = [p.detach().double() for p in block.attention.parameters()]
    refined = cbam(residual.detach().double(), weights[0], weights[1], weights[2][0])
    expected = (refined + x).clamp(min=0)
    torch.testing.assert_close(block(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_four_stages_have_the_parameters_counted_by_hand():
    def block(a, b):
        return 9 * a * b + 9 * b * b + 2 * 2 * b

    stages = [
        3 * 16 * 9 + 2 * 16 + 5 * block(16, 16),
        block(16, 32) + 3 * block(32, 32),
        block(32, 64) + 2 * block(64, 64),
        block(64, 128) + block(128, 128),
    ]
    assert stages == [23_824, 69_632, 203_520, 517_120]
    backbone = four_stage_resnet()
    assert [n_parameters(stage) for stage in backbone.stages] == stages
    assert n_parameters(backbone) == 814_096
    # C^2 / 8 + 98 for each of 5, 4, 3 and 2 blocks.
    attention = 5 * 130 + 4 * 226 + 3 * 610 + 2 * 2146
    assert n_parameters(four_stage_resnet("cbam")) == 814_096 + attention == 821_772
    maps = backbone.stage_maps(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
    ]
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize(
    "make",
    [
        partial(cifar_resnet, 14),
        partial(cifar_resnet, 14, "cbam"),
        partial(imagenet_resnet, 10),
        partial(imagenet_resnet, 26),
    ],
    ids=["cifar", "cbam", "basic", "bottleneck"],
)
def test_without_the_last_relu_the_maps_are_those_before_it(make):
    torch.manual_seed(0)
    usual = make()
    randomize_norms(usual)
    bare = make(last_relu=False)
    for own, other in zip(bare.state_dict().values(), usual.state_dict().values(), strict=True):
        own.copy_(other)
    images = torch.randn(2, 3, 32, 32)
    expected, maps = usual.eval().stage_maps(images), bare.eval().stage_maps(images)
    for after, before in zip(expected, maps, strict=True):
        assert (before < 0).any()
        torch.testing.assert_close(before.clamp(min=0), after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bare(images), maps[-1].mean(dim=(2, 3)))
    network = ExpandableNetwork(lambda: bare, len(maps)).eval()
    network.grow([0, 1])
    network.eval()(images)
    # Kept as they are, not overwritten by the ReLU that the next stage begins with.
    for kept, own in zip(network.outputs.stage_maps, maps, strict=True):
        torch.testing.assert_close(kept, own)


def test_four_stages_refuse_what_the_usual_ones_refuse():
    with pytest.raises(ValueError, match=r"attention: expected 'cbam' or None, got 'se'"):
        four_stage_resnet("se")
    with pytest.raises(ValueError, match=r"in_channels: expected a positive number, got 0"):
        four_stage_resnet(in_channels=0)
