import pytest
import torch
from torch import nn

from avalanche_memo.budget import (
    aligned_budget,
    aligned_exemplars,
    exemplars_for,
    image_bytes,
    inference_bytes,
    parameter_bytes,
)
from avalanche_memo.models import (
    ExpandableNetwork,
    cifar_resnet,
    convnet2,
    convnet4,
    imagenet_resnet,
)
from tests.helpers import tiny_backbone

CIFAR = 3072
IMAGENET = 150528
ON_CIFAR = {"classes": 100, "image": (3, 32, 32)}
ON_IMAGENET = {"classes": 100, "image": (3, 224, 224)}
ONE_NETWORK = ("replay", "icarl", "wa", "bic", "podnet", "ucir", "finetune")


class WithAuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.auxiliary = nn.Linear(3, 100)

    def inference_modules(self) -> list[nn.Module]:
        return [self.body, self.body]


def test_parameters_are_counted_without_buffers():
    norm = nn.BatchNorm2d(5)
    assert parameter_bytes(norm) == 2 * 5 * 4
    # Buffers: two float32 statistics and one int64 counter of batches.
    assert inference_bytes(norm) == 2 * 5 * 4 + 2 * 5 * 4 + 8


def test_bytes_follow_the_number_format():
    assert parameter_bytes(nn.Linear(4, 2).to(torch.bfloat16)) == (4 * 2 + 2) * 2


def test_frozen_parameters_count_and_shared_ones_count_once():
    layer = nn.Linear(4, 2).requires_grad_(False)
    assert parameter_bytes(nn.ModuleList([layer, nn.Sequential(layer)])) == (4 * 2 + 2) * 4


def test_only_the_modules_that_inference_needs_are_counted():
    network = WithAuxiliaryHead()
    assert parameter_bytes(network) == (3 * 2 + 2) * 4
    assert inference_bytes(network) == (3 * 2 + 2) * 4


def test_image_bytes():
    assert image_bytes((3, 32, 32)) == CIFAR
    assert image_bytes((3, 224, 224)) == IMAGENET
    assert image_bytes(torch.Size([1, 8, 8])) == 64


@pytest.mark.parametrize("shape", [(32, 32), (3, 0, 32), (3, 32, -32), ()])
def test_image_bytes_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match="shape"):
        image_bytes(shape)


def test_exemplars_are_rounded_down():
    assert [exemplars_for(n, 10) for n in (0, 9, 10, 29)] == [0, 0, 1, 2]
    assert exemplars_for(30, 2.5) == 12


@pytest.mark.parametrize(
    ("budget", "image", "named"),
    [
        *[(-1, 10, "budget_bytes"), (float("inf"), 10, "budget_bytes")],
        *[(1, 0, "image_b"), (1, -1, "image_b"), (1, float("nan"), "image_b")],
    ],
)
def test_exemplars_for_refuses_negative_numbers(budget, image, named):
    with pytest.raises(ValueError, match=named):
        exemplars_for(budget, image)


def test_a_model_or_603_exemplars():
    assert exemplars_for(parameter_bytes(cifar_resnet(32)), CIFAR) == 603


@pytest.mark.parametrize(
    ("make", "total", "single", "der", "memo"),
    [
        (convnet2, 7_998_016, 2000, 2096, 2118),
        (lambda: cifar_resnet(14), 13_018_240, 3634, 2000, 2495),
        (lambda: cifar_resnet(20), 16_906_880, 4900, 2000, 2768),
        (lambda: cifar_resnet(26), 20_795_520, 6165, 2000, 3040),
        (lambda: cifar_resnet(32), 24_684_160, 7431, 2000, 3312),
    ],
)
def test_published_exemplars_on_cifar100_base0_inc10(make, total, single, der, memo):
    """The budget of every point is DER's, but of the first: one ResNet-32 and 2000 exemplars."""
    backbone, large = make(), cifar_resnet(32)
    if make is convnet2:
        budget = aligned_budget("replay", large, 0, 10, 2000, **ON_CIFAR)
    else:
        budget = aligned_budget("der", backbone, 0, 10, 2000, **ON_CIFAR)
    assert budget == total
    for method in ONE_NETWORK:
        assert aligned_exemplars(method, large, 0, 10, total, **ON_CIFAR) == single
    assert aligned_exemplars("der", backbone, 0, 10, total, **ON_CIFAR) == der
    assert aligned_exemplars("memo", backbone, 0, 10, total, **ON_CIFAR) == memo


@pytest.mark.parametrize(
    ("base", "increment", "single", "memo"),
    [(0, 5, 13466, 4771), (0, 20, 4414, 2583), (50, 10, 5017, 2729), (50, 5, 8035, 3458)],
)
def test_published_exemplars_of_other_splits_with_resnet32(base, increment, single, memo):
    split = cifar_resnet(32), base, increment
    budget = aligned_budget("der", *split, 2000, **ON_CIFAR)
    assert aligned_exemplars("wa", *split, budget, **ON_CIFAR) == single
    assert aligned_exemplars("memo", *split, budget, **ON_CIFAR) == memo


@pytest.mark.parametrize(
    ("depth", "single", "der", "memo"),
    [
        (None, 2000, 2032, 2115),
        (10, 3136, 2000, 2327),
        (18, 4969, 2000, 2739),
        (26, 5779, 2000, 2915),
        (34, 7924, 2000, 4171),
        (50, 8574, 2000, 4270),
    ],
)
def test_published_exemplars_on_imagenet100_base50_inc5(depth, single, der, memo):
    """As on CIFAR-100; the first point, ConvNet4, has the budget of one ResNet-18."""
    with torch.device("meta"):
        backbone = convnet4() if depth is None else imagenet_resnet(depth)
        usual = imagenet_resnet(18)
    if depth is None:
        budget = aligned_budget("replay", usual, 50, 5, 2000, **ON_IMAGENET)
    else:
        budget = aligned_budget("der", backbone, 50, 5, 2000, **ON_IMAGENET)
    assert aligned_exemplars("icarl", usual, 50, 5, budget, **ON_IMAGENET) == single
    assert aligned_exemplars("der", backbone, 50, 5, budget, **ON_IMAGENET) == der
    assert aligned_exemplars("memo", backbone, 50, 5, budget, **ON_IMAGENET) == memo


# Three stages of 1x1 convolutions: 2, 6 and 12 parameters, 8, 24 and 48 bytes.
def three_stages() -> nn.Module:
    backbone = nn.Module()
    sizes = [(1, 2), (2, 3), (3, 4)]
    backbone.stages = nn.ModuleList([nn.Conv2d(i, o, 1, bias=False) for i, o in sizes])
    return backbone


@pytest.mark.parametrize(
    ("method", "shared", "model"),
    [
        ("replay", None, 80),
        ("der", None, 3 * 80),
        ("memo", None, 8 + 24 + 3 * 48),
        ("memo", 1, 8 + 3 * (24 + 48)),
    ],
)
def test_stages_that_are_not_shared_count_once_an_experience(method, shared, model):
    options = {"classes": 8, "image": (1, 2, 5), "shared_stages": shared}
    split = three_stages(), 4, 2  # Experiences of 4, 2 and 2 classes.
    assert aligned_budget(method, *split, 0, **options) == model
    assert aligned_budget(method, *split, 9, **options) == model + 90
    assert aligned_exemplars(method, *split, model + 99, **options) == 9
    with pytest.raises(ValueError, match=f"budget: expected at least {model + 80} bytes, {model} "):
        aligned_exemplars(method, *split, model + 79, **options)
    assert aligned_exemplars(method, *split, model + 80, **options) == 8


def test_bic_has_two_exemplars_of_each_class():
    options = {"classes": 8, "image": 10}
    with pytest.raises(ValueError, match=r"at least 240 bytes, 80 .* 2 exemplars of each of 8"):
        aligned_exemplars("bic", three_stages(), 4, 2, 239, **options)
    assert aligned_exemplars("bic", three_stages(), 4, 2, 240, **options) == 16


def test_compressed_exemplars_cost_their_mean():
    backbone = nn.Linear(4, 1, bias=False)
    options = {"classes": 2, "image": 2.5}
    assert aligned_exemplars("replay", backbone, 0, 1, 16 + 26, **options) == 10
    # Seven and a half bytes do not fit in seven.
    assert aligned_budget("replay", backbone, 0, 1, 3, **options) == 16 + 8
    # The float 1.1 is a little more than eleven tenths: ten such exemplars do not fit in 11 bytes.
    options["image"] = 1.1
    budget = aligned_budget("replay", backbone, 0, 1, 10, **options)
    assert aligned_exemplars("replay", backbone, 0, 1, budget, **options) == 10


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "memoo"}, ValueError, "method: expected memo, der, .*got 'memoo'"),
        ({"base": 101}, ValueError, "base, increment: .*got 101 and 10"),
        ({"base": -10}, ValueError, "base, increment: .*got -10 and 10"),
        ({"increment": 0}, ValueError, "base, increment: .*got 0 and 0"),
        ({"increment": 30}, ValueError, "base, increment: .*got 0 and 30"),
        ({"shared_stages": 4}, ValueError, "shared_stages: expected 0 to 3, got 4"),
        ({"image": 0}, ValueError, "image: expected a shape .* got 0"),
        ({"image": (32, 32)}, ValueError, "shape: expected three"),
        ({"backbone": nn.Linear(2, 2)}, ValueError, "backbone: expected at least two stages"),
        (
            {"backbone": ExpandableNetwork(tiny_backbone, 2)},
            TypeError,
            "backbone: expected .*got ExpandableNetwork",
        ),
    ],
)
def test_what_no_budget_can_be_aligned_for_is_refused(changes, error, message):
    arguments = {"method": "memo", "backbone": cifar_resnet(8), "base": 0, "increment": 10}
    with pytest.raises(error, match=message):
        aligned_exemplars(**{**arguments, "budget": 10**8, **ON_CIFAR, **changes})
    with pytest.raises(error, match=message):
        aligned_budget(**{**arguments, "exemplars": 0, **ON_CIFAR, **changes})


def test_a_negative_number_of_exemplars_is_refused():
    with pytest.raises(ValueError, match="exemplars: expected a number of at least 0, got -1"):
        aligned_budget("der", cifar_resnet(8), 0, 10, -1, **ON_CIFAR)
