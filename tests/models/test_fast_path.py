import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from avalanche_memo.budget import inference_bytes, parameter_bytes
from avalanche_memo.models import (
    ExpandableNetwork,
    FastPath,
    cifar_resnet,
    convnet2,
    convnet4,
    imagenet_resnet,
)
from avalanche_memo.models.fast_path import fold_batch_norm, has_bfloat16
from tests.helpers import randomize_norms

PARTS = ("resident_batches", "channels_last", "bfloat16", "fold_frozen", "cuda_graphs")
NONE = dict.fromkeys(PARTS, False)


def grown(shared: int, experiences: int = 3) -> ExpandableNetwork:
    torch.manual_seed(0)
    network = ExpandableNetwork(partial(cifar_resnet, 8), shared)
    randomize_norms(network)
    for i in range(experiences):
        network.grow([2 * i, 2 * i + 1])
    return network


def learn(network: ExpandableNetwork) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits and gradients of a training step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    targets = torch.randint(0, 6, (16,), generator=generator)
    logits = network.train()(images)
    F.cross_entropy(logits, targets).backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize(
    "make",
    [
        partial(cifar_resnet, 14),
        partial(cifar_resnet, 8, "cbam"),
        partial(cifar_resnet, 8, last_relu=False),
        partial(imagenet_resnet, 10),
        partial(imagenet_resnet, 26),
        partial(imagenet_resnet, 26, last_relu=False),
        convnet2,
        convnet4,
    ],
    ids=[
        "cifar",
        "cbam",
        "no_relu",
        "basic",
        "bottleneck",
        "bottleneck_no_relu",
        "convnet2",
        "convnet4",
    ],
)
def test_a_folded_block_equals_the_block_and_has_no_batch_norm(make):
    torch.manual_seed(0)
    backbone = make()
    randomize_norms(backbone)
    backbone.double().eval()
    folded = fold_batch_norm(backbone, torch.float64)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(images), backbone(images), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


class NormFirst(nn.Module):
    """A convolution, then a BatchNorm, by registration alone."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.convolution(self.norm(x))


class Shifted(nn.Conv2d):
    """A convolution with other weights than the ones it holds."""

    def forward(self, x):
        return F.conv2d(x, self.weight + 1, self.bias)


RELU = nn.ReLU()


@pytest.mark.parametrize(
    "block",
    [
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2), nn.BatchNorm2d(3)),
        nn.Sequential(RELU, nn.Conv2d(3, 3, 1), RELU, nn.BatchNorm2d(3)),
        NormFirst(),
        nn.Sequential(Shifted(3, 3, 1), nn.BatchNorm2d(3)),
        nn.Sequential(weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ],
    ids=[
        "relu_between",
        "pooling_between",
        "relu_again_between",
        "own_order",
        "other_convolution",
        "parametrized_convolution",
        "no_statistics",
    ],
)
def test_a_batch_norm_that_cannot_be_folded_stays(block):
    randomize_norms(block)
    block.double().eval()
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    folded = fold_batch_norm(block, torch.float64)
    torch.testing.assert_close(folded(images), block(images))


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize(
    ("part", "tolerance"), [("channels_last", 1e-4), ("fold_frozen", 1e-4), ("bfloat16", 0.1)]
)
def test_each_part_learns_what_the_plain_network_learns(shared, part, tolerance):
    if part == "bfloat16" and not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16")
    logits, gradients = learn(grown(shared))
    fast_logits, fast_gradients = learn(grown(shared).use(FastPath(**NONE | {part: True})))
    assert fast_gradients.keys() == gradients.keys()
    scale = logits.abs().max()
    assert (fast_logits - logits).abs().max() <= tolerance * scale
    for name, gradient in gradients.items():
        error = (fast_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error <= 2 * tolerance, name


@pytest.mark.parametrize("shared", [0, 2])
def test_all_parts_together_evaluate_as_the_plain_network(shared):
    plain, fast = grown(shared).eval(), grown(shared).use(True).eval()
    images = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        expected, got = plain(images), fast(images)
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    assert got.dtype == fast.outputs.features.dtype == torch.float32


@pytest.mark.parametrize("fast", [False, FastPath(bfloat16=False)], ids=["plain", "folded"])
def test_a_users_own_autocast_stays_in_force(fast):
    network = grown(0, experiences=2).use(fast).eval()
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(2, 3, 16, 16))
    assert {maps.dtype for maps in network.outputs.stage_maps} == {torch.bfloat16}


def test_nothing_is_recorded_for_backward_where_nothing_behind_a_frozen_block_learns():
    network = grown(0).use(FastPath(**NONE | {"fold_frozen": True})).train()
    network(torch.randn(4, 3, 16, 16))
    older = network._frozen_maps(torch.randn(4, 3, 16, 16), low=False)
    assert not any(output.requires_grad for output in older)


def test_folded_copies_are_no_part_of_the_model():
    network = grown(2).use(True)
    before = (parameter_bytes(network), inference_bytes(network), list(network.state_dict()))
    learn(network)
    after = (parameter_bytes(network), inference_bytes(network), list(network.state_dict()))
    assert after == before


@pytest.mark.parametrize("change", ["load", "move", "copy", "edit", "assign", "vector"])
def test_folded_copies_follow_the_weights(change):
    network = grown(2).use(FastPath(**NONE | {"fold_frozen": True})).eval()
    images = torch.randn(4, 3, 16, 16)
    network(images)
    if change == "load":
        state = network.state_dict()
        state = {k: 2 * v if torch.is_tensor(v) and "conv1" in k else v for k, v in state.items()}
        network.load_state_dict(state)
    elif change == "move":
        network.double()
        network.float()
        with torch.no_grad():
            for parameter in network.specialized[0].parameters():
                parameter *= 2
        network.to("cpu")
    elif change == "edit":
        with torch.no_grad():
            network.specialized[0][0][0].conv1.weight *= 2
    elif change == "assign":
        block = network.specialized[0]
        state = {k: 2 * v if "conv1" in k else v.clone() for k, v in block.state_dict().items()}
        block.load_state_dict(state, assign=True)
    elif change == "vector":
        own = list(network.specialized[0].parameters())
        nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(own), own)
    else:
        network = copy.deepcopy(network)
    plain = copy.deepcopy(network).use(False)
    torch.testing.assert_close(network(images), plain(images), rtol=1e-4, atol=1e-4)


def test_training_goes_on_after_inference_mode():
    network = grown(2).use(FastPath(**NONE | {"fold_frozen": True}))
    with torch.inference_mode():
        network.eval()(torch.randn(4, 3, 16, 16))
    _, gradients = learn(network)
    _, expected = learn(grown(2))
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


def test_a_block_that_someone_watches_runs_itself():
    network = grown(2).use(True).eval()
    images, seen = torch.randn(4, 3, 16, 16), []
    with torch.no_grad():
        folded = network.extract_features(images)
        layer = network.specialized[0][0][0].conv1
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        watched = network.extract_features(images)
        handle.remove()
        assert torch.equal(network.extract_features(images), folded)
    assert seen == [1]
    assert (watched - folded).abs().max() <= 0.05 * folded.abs().max()


def test_switches():
    assert FastPath.of(True) == FastPath()
    assert FastPath.of(False) == FastPath(**NONE)
    chosen = FastPath(bfloat16=False)
    assert FastPath.of(chosen) is chosen


@pytest.mark.skipif(
    not (Path("/proc/cpuinfo").exists() and hasattr(torch.cpu, "get_capabilities")),
    reason="needs /proc/cpuinfo to compare, and a torch that tells",
)
def test_bfloat16_is_found_where_the_processor_has_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert has_bfloat16(torch.device("cpu")) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
