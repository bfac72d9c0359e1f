import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from avalanche_memo.budget import inference_bytes, parameter_bytes
from avalanche_memo.models import (
    ExpandableNetwork,
    FastPath,
    StagedBackbone,
    cifar_resnet,
    convnet2,
    convnet4,
    four_stage_resnet,
    imagenet_resnet,
)
from avalanche_memo.models.channel_mask import MaskedBatchNorm2d
from avalanche_memo.models.cifar_resnet import CifarBlock
from avalanche_memo.models.fast_path import fold_batch_norm, has_bfloat16
from avalanche_memo.models.pruning import mask_channels, masked_layers, prune_channels
from tests.helpers import assert_same_tensors, randomize_norms, tensors_of, tiny_backbone

BACKBONES: dict[str, Any] = {
    "cifar": partial(cifar_resnet, 14),
    "cifar no_relu": partial(cifar_resnet, 8, last_relu=False),
    "four stages": four_stage_resnet,
    "basic": partial(imagenet_resnet, 18),
    "cifar_stem": partial(imagenet_resnet, 10, stem="cifar"),
    "bottleneck": partial(imagenet_resnet, 26),
    "bottleneck no_relu": partial(imagenet_resnet, 26, last_relu=False),
    "convnet2": convnet2,
    "convnet4": convnet4,
}
NONE = dict.fromkeys(("resident_batches", "channels_last", "bfloat16", "fold_frozen"), False)


@pytest.fixture(autouse=True)
def half_closed(monkeypatch):
    """Begin with every second channel closed, more or less, so that there is what to cut out."""
    monkeypatch.setattr(
        MaskedBatchNorm2d, "reset_mask", lambda norm: nn.init.normal_(norm.embedding)
    )


def block_of(backbone: StagedBackbone) -> nn.Sequential:
    """Its stages, each norm with a shift and statistics of its own."""
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias)
    randomize_norms(backbone)
    return nn.Sequential(*backbone.stages)


def open_channels(block: nn.Module) -> list[list[int]]:
    return [
        [c for c, e in enumerate(layer.norm.embedding.tolist()) if e > 0]
        for layer in masked_layers(block)
    ]


def set_masks(block: nn.Module, kept: Any) -> None:
    """Open the channels that ``kept`` has for each layer, and close the others."""
    for layer, channels in zip(masked_layers(block), kept, strict=True):
        embedding = -torch.ones(layer.norm.num_features)
        embedding[list(channels)] = 1
        layer.norm.embedding.data.copy_(embedding)


# --- blocks with masks --------------------------------------------------------------------------


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_a_masked_block_with_open_channels_computes_what_the_block_computes(make):
    torch.manual_seed(0)
    block = block_of(make())
    x = torch.randn(2, 3, 32, 32)
    expected = block.eval()(x)
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    masked = mask_channels(copy.deepcopy(block)).eval()
    layers = masked_layers(masked)
    assert len(layers) == len(convolutions)
    assert all(masked.get_submodule(layer.name) is layer.convolution for layer in layers)
    set_masks(masked, [range(layer.norm.num_features) for layer in layers])
    torch.testing.assert_close(masked(x), expected)


def test_a_layer_may_stand_in_several_places():
    torch.manual_seed(0)
    relu, norms = nn.ReLU(), [nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    layers = [nn.Conv2d(1, 4, 3), norms[0], relu, nn.Conv2d(4, 4, 3), norms[1], relu]
    block = nn.Sequential(nn.Sequential(*layers)).eval()
    x = torch.randn(2, 1, 8, 8)
    masked = mask_channels(block).eval()
    set_masks(masked, [range(4), range(4)])
    torch.testing.assert_close(masked(x), block(x))
    pruned = prune_channels(masked, [range(4), range(4)]).eval()
    torch.testing.assert_close(pruned(x), block(x))


def test_which_layer_feeds_which():
    """By hand: stem, then pairs; the shortcut of a wider block reads what the block reads."""
    layers = masked_layers(mask_channels(nn.Sequential(*imagenet_resnet(10).stages)))
    shapes = [(layer.convolution.in_channels, layer.convolution.out_channels) for layer in layers]
    assert shapes == [
        (3, 64),
        *[(64, 64), (64, 64)],
        *[(64, 128), (128, 128), (64, 128)],
        *[(128, 256), (256, 256), (128, 256)],
        *[(256, 512), (512, 512), (256, 512)],
    ]
    assert [layer.source for layer in layers] == [None, 0, 1, 2, 3, 2, 4, 6, 4, 7, 9, 7]
    chain = masked_layers(mask_channels(nn.Sequential(*cifar_resnet(14).stages)))
    assert [layer.source for layer in chain] == [None, *range(12)]


class Grouped(nn.Module):
    """A layer of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class SqueezeBlock(BasicBlock):
    """A residual block that computes more than the one it is a subclass of."""

    def __init__(self, *channels: int) -> None:
        super().__init__(*channels)
        self.se = nn.Linear(*channels)


def with_child(block: nn.Module, name: str, child: nn.Module) -> nn.Module:
    block.add_module(name, child)
    return block


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)], "one group .* got one of 2 groups"),
        ([nn.Conv2d(4, 4, 3), nn.ReLU()], r"right behind each .* got ReLU"),
        ([nn.Conv2d(4, 4, 3)], "right behind each .* got None"),
        ([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)], "with scale, shift"),
        ([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Grouped()], "can be masked .* got Grouped"),
        (
            [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)],
            "running statistics .* track_running_stats=False",
        ),
        ([CifarBlock(4, 4), SqueezeBlock(4, 4)], "can be masked .* got SqueezeBlock"),
        ([with_child(BasicBlock(4, 4), "relu", nn.SiLU())], r"blocks of .* ReLU .*\(relu\): SiLU"),
        ([with_child(BasicBlock(4, 4), "se", nn.Linear(4, 4))], r"blocks of .*\(se\): Linear"),
        ([nn.BatchNorm2d(4)], "can be masked .* got BatchNorm2d"),
        ([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()], "can be masked .* got Sigmoid"),
    ],
)
def test_refuses_layers_that_cannot_be_masked(layers, message):
    backbone = StagedBackbone([nn.Sequential(nn.Conv2d(1, 4, 1), *layers)], 4)
    backbone.stages[0].insert(1, nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=f"(?s)^backbone: expected .*{message}"):
        ExpandableNetwork(lambda: backbone, 0, masked=True)


def test_refuses_attention():
    with pytest.raises(ValueError, match=r"backbone: expected no attention .* got CBAM"):
        ExpandableNetwork(partial(cifar_resnet, 8, "cbam"), 0, masked=True)


def test_refuses_masks_where_no_block_is_added():
    with pytest.raises(ValueError, match=r"masked: expected False .* got True"):
        ExpandableNetwork(tiny_backbone, 3, masked=True)


def test_refuses_masks_where_there_is_nothing_to_mask():
    stages = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU())]
    with pytest.raises(ValueError, match=r"masked: expected False .* no convolution, got True"):
        ExpandableNetwork(lambda: StagedBackbone(stages, 4), 1, masked=True)


# --- pruned blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_a_pruned_block_equals_the_masked_block(make, layout, dtype):
    """Half of the channels at random, so that residual sums have summands of all kinds."""
    torch.manual_seed(0)
    masked = mask_channels(block_of(make())).to(dtype, memory_format=layout).eval()
    pruned = prune_channels(masked, open_channels(masked)).eval()
    x = torch.randn(3, 3, 32, 32, dtype=dtype).contiguous(memory_format=layout)
    expected = masked(x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(pruned(x), expected, rtol=tolerance, atol=tolerance)
    assert expected.abs().max() > 0.1
    small, large = (sum(p.numel() for p in b.parameters()) for b in (pruned, masked))
    assert small < 0.6 * large
    assert not any(isinstance(m, MaskedBatchNorm2d) for m in pruned.modules())


def test_a_residual_sum_by_hand():
    """What is left of a ResNet-8 whose summands share some channels, none or all."""
    masked = mask_channels(block_of(cifar_resnet(8)))
    kept = [
        [0, 1, 2],  # the stem
        [5],
        [1, 2],  # of the sum 0 1 2: no new channel
        [0, 9],
        [30, 2, 3],  # of the sum 0 1 2 and now 3 30
        [7, 8, 9, 10],
        range(64),  # all
    ]
    kept = [sorted(channels) for channels in kept]
    set_masks(masked, kept)
    pruned = prune_channels(masked, kept).eval()
    shapes = [tuple(m.weight.shape) for m in pruned.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [
        (3, 3, 3, 3),
        *[(1, 3, 3, 3), (2, 1, 3, 3)],
        *[(2, 3, 3, 3), (3, 2, 3, 3)],
        *[(4, 5, 3, 3), (64, 4, 3, 3)],
    ]
    norms = [m.num_features for m in pruned.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [3, 1, 2, 2, 3, 4, 64]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(pruned(x), masked.eval()(x), rtol=1e-5, atol=1e-5)


def test_buffers_of_positions_are_counted_and_not_saved():
    masked = mask_channels(block_of(cifar_resnet(8)))
    kept = [[0, 1, 2], [5], [1, 2], [0, 9], [2, 3, 30], [7], [0]]
    pruned = prune_channels(masked, kept)
    # Norms: mean, variance and a counter. Positions of [1, 2], [2, 3, 30] and [0] in their sums,
    # and of all 64 output channels.
    norms = sum(2 * 4 * len(k) + 8 for k in kept)
    buffers = inference_bytes(pruned) - parameter_bytes(pruned)
    assert buffers == norms + 8 * (2 + 3 + 1 + 64)
    assert not [name for name in pruned.state_dict() if "channels" in name or "order" in name]


@pytest.mark.parametrize("make", [BACKBONES["cifar"], BACKBONES["basic"], convnet2])
@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
def test_a_pruned_block_can_be_folded(make, whole):
    torch.manual_seed(0)
    masked = mask_channels(block_of(make())).double().eval()
    if whole:
        for norm in (m for m in masked.modules() if isinstance(m, MaskedBatchNorm2d)):
            nn.init.ones_(norm.embedding)
    pruned = prune_channels(masked, open_channels(masked)).eval()
    folded = fold_batch_norm(pruned, torch.float64)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(getattr(m, "residual_channels", None) is not None for m in folded.modules())
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(x), masked(x), rtol=1e-9, atol=1e-9)


# --- in the expandable network ------------------------------------------------------------------


def network(shared: int = 0, experiences: int = 1, **options: Any) -> ExpandableNetwork:
    torch.manual_seed(0)
    made = ExpandableNetwork(partial(cifar_resnet, 8), shared, masked=True, **options)
    for i in range(experiences):
        made.grow([2 * i, 2 * i + 1])
        randomize_norms(made)
    return made


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shared", [0, 1, 2], ids=["DER", "MEMO-2", "MEMO"])
@pytest.mark.parametrize("experiences", [1, 3])
def test_pruning_changes_the_bytes_and_not_the_outputs(shared, experiences):
    model = network(shared, experiences).eval()
    expected = model(images())
    features = model.outputs.features
    before = parameter_bytes(model), inference_bytes(model)
    embeddings = 4 * sum(layer.norm.num_features for layer in model.masks())
    model.prune()
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.outputs.features, features, rtol=1e-5, atol=1e-5)
    assert parameter_bytes(model) < before[0] - embeddings
    assert inference_bytes(model) < before[1] - embeddings
    # By hand: what the masks leave of the newest block's convolutions and norms.
    blocks = [p.numel() for p in model.specialized[-1].parameters()]
    counted = 4 * (sum(blocks) + sum(p.numel() for p in model.generalized.parameters()))
    counted += 4 * sum(p.numel() for p in model.specialized[:-1].parameters())
    assert parameter_bytes(model) == counted + parameter_bytes(model.classifier)


def test_pruning_twice_is_pruning_once():
    model = network()
    model.prune()
    tensors = tensors_of(model)
    model.prune()
    assert_same_tensors(tensors_of(model), tensors)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([[0], [0]], "channels of 3 layers, got of 2"),
        ([[0], [], [0]], r"0 to 4 of layer 1\.0, each once, got \[\]"),
        ([[0], [0], [6]], r"0 to 5 of layer 2\.0, each once, got \[6\]"),
        ([[0], [0], [-1]], r"0 to 5 of layer 2\.0, each once, got \[-1\]"),
        ([[0, 0], [0], [0]], r"0 to 3 of layer 0\.0, each once, got \[0, 0\]"),
    ],
)
def test_refuses_to_keep_channels_that_are_not_there(kept, message):
    model = ExpandableNetwork(tiny_backbone, 0, masked=True)
    before = tensors_of(model)
    with pytest.raises(ValueError, match=f"^kept: expected .*{message}"):
        model.prune(kept)
    assert_same_tensors(tensors_of(model), before)
    assert not model.kept


def test_a_layer_whose_channels_all_close_keeps_its_best_one(caplog):
    model = network()
    layer = model.masks()[3]
    layer.norm.embedding.data.copy_(torch.linspace(-2, -1, layer.norm.num_features))
    best = layer.norm.num_features - 1
    expected = model.eval()(images())
    model.prune()
    assert model.kept[0][3] == [best]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING  # Seen without any logging set up.
    assert f"block 1 would keep no channel of layer {layer.name};" in record.getMessage()
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


def test_a_new_block_starts_from_the_weights_before_pruning_with_new_masks():
    model = network()
    before = tensors_of(model.specialized[0])
    model.prune()
    model.grow([2, 3])
    after = tensors_of(model.specialized[1])
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != name.endswith("embedding"), name
    assert not model.unpruned
    assert all(p.requires_grad for p in model.specialized[1].parameters())
    frozen = list(model.specialized[0].parameters())
    assert frozen
    assert not any(p.requires_grad for p in frozen)


def test_a_block_is_pruned_when_it_is_frozen_at_the_latest():
    model, pruned_before = network(), network()
    pruned_before.prune()
    for each in (model, pruned_before):
        torch.manual_seed(1)
        each.grow([2, 3])
    assert len(model.kept) == 1
    assert_same_tensors(tensors_of(model), tensors_of(pruned_before))


def test_what_is_kept_for_the_next_block_neither_learns_nor_counts():
    model = network()
    model.prune()
    assert not any(p.requires_grad for p in model.unpruned.parameters())
    counted = {id(p) for module in model.inference_modules() for p in module.parameters()}
    assert not counted & {id(p) for p in model.unpruned.parameters()}


def test_without_masks_nothing_is_saved_of_them():
    model = ExpandableNetwork(tiny_backbone, 1)
    model.grow([0])
    model.grow([1])
    model.prune()
    assert model.get_extra_state() == {"growth": [[0], [1]]}
    assert not [name for name in model.state_dict() if "unpruned" in name or "embed" in name]


# --- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("pruned", [False, True], ids=["learning", "pruned"])
@pytest.mark.parametrize("experiences", [1, 3])
@pytest.mark.parametrize("into", ["fresh", "used", "empty copy"])
def test_a_network_takes_a_saved_state(tmp_path, shared, pruned, experiences, into):
    model = network(shared, experiences)
    if pruned:
        model.prune()
    torch.save(model.state_dict(), tmp_path / "network.pt")
    other = {
        "fresh": network(shared, 0),
        "used": network(shared, experiences),
        "empty copy": model.empty_copy(),
    }[into]
    random_state = torch.get_rng_state()
    if into == "used":
        other.load_state_dict(model.state_dict())
    else:
        other.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_tensors(tensors_of(other), tensors_of(model))
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == learning
    assert other.kept == model.kept
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    assert inference_bytes(other) == inference_bytes(model)
    for each in (model, other):
        torch.manual_seed(5)
        each.train().grow([8, 9])
    assert_same_tensors(tensors_of(other), tensors_of(model))


@pytest.mark.parametrize("masked", [False, True])
def test_a_state_of_another_kind_is_refused(masked):
    plain = ExpandableNetwork(partial(cifar_resnet, 8), 0)
    given, other = (network(0, 0), plain) if masked else (plain, network(0, 0))
    with pytest.raises(ValueError, match=f"state_dict: expected .* masked={masked}"):
        given.load_state_dict(other.state_dict())


def test_a_state_that_was_pruned_otherwise_is_refused():
    model, other = network(), network()
    model.prune()
    other.masks()[0].norm.embedding.data.neg_()
    other.prune()
    with pytest.raises(ValueError, match=r"state_dict: expected .* pruned as this one was"):
        model.load_state_dict(other.state_dict())


# --- the fast path ------------------------------------------------------------------------------


def learn(model: ExpandableNetwork) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of a training step, with masks half closed."""
    for layer in model.masks():
        layer.norm.scale = 3.0
    logits = model.train()(images(16))
    F.cross_entropy(logits, torch.arange(16) % 6).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(
    ("part", "tolerance"), [("channels_last", 1e-4), ("fold_frozen", 1e-4), ("bfloat16", 0.1)]
)
def test_masked_and_pruned_blocks_learn_alike_on_the_fast_path(shared, part, tolerance):
    if part == "bfloat16" and not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16")
    logits, gradients = learn(network(shared, 3))
    assert any(name.endswith("embedding") for name in gradients)
    assert any(name.startswith("generalized") for name in gradients) == (shared > 0)
    fast = network(shared, 3).use(FastPath(**NONE | {part: True}))
    fast_logits, fast_gradients = learn(fast)
    assert fast_gradients.keys() == gradients.keys()
    assert (fast_logits - logits).abs().max() <= tolerance * logits.abs().max()
    for kind in ("embedding", "weight", "bias"):
        ours, expected = (
            torch.cat([g.flatten() for name, g in each.items() if name.endswith(kind)])
            for each in (fast_gradients, gradients)
        )
        assert (ours - expected).norm() <= 2 * tolerance * expected.norm(), kind


def test_pruning_keeps_the_layout_of_the_fast_path():
    model = network().use(True)
    model.prune()
    for module in (model.specialized, model.unpruned):
        weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
