import pytest
import torch
from torch import nn

from avalanche_memo.budget import exemplars_for, image_bytes, inference_bytes, parameter_bytes
from avalanche_memo.models import StagedBackbone, cifar_resnet, convnet2, convnet4, imagenet_resnet

CIFAR = 3072
IMAGENET = 150528


class WithAuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.auxiliary = nn.Linear(3, 100)

    def inference_modules(self) -> list[nn.Module]:
        return [self.body, self.body]


def exemplars_of_memo(budget: int, backbone: StagedBackbone, experiences: int, image: int) -> int:
    specialized = parameter_bytes(backbone.stages[-1])
    shared = parameter_bytes(backbone) - specialized
    return exemplars_for(budget - shared - experiences * specialized, image)


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


@pytest.mark.parametrize(
    ("budget", "image", "named"), [(-1, 10, "budget_bytes"), (1, 0, "image_b"), (1, -1, "image_b")]
)
def test_exemplars_for_refuses_negative_numbers(budget, image, named):
    with pytest.raises(ValueError, match=named):
        exemplars_for(budget, image)


def test_a_model_or_603_exemplars():
    assert exemplars_for(parameter_bytes(cifar_resnet(32)), CIFAR) == 603


@pytest.mark.parametrize(
    ("make", "models", "total", "single", "der", "memo"),
    [
        (convnet2, 1, 7_998_016, 2000, 2096, 2118),
        (lambda: cifar_resnet(14), 10, 13_018_240, 3634, 2000, 2495),
        (lambda: cifar_resnet(20), 10, 16_906_880, 4900, 2000, 2768),
        (lambda: cifar_resnet(26), 10, 20_795_520, 6165, 2000, 3040),
        (lambda: cifar_resnet(32), 10, 24_684_160, 7431, 2000, 3312),
    ],
)
def test_published_exemplars_on_cifar100_base0_inc10(make, models, total, single, der, memo):
    """The budget of every point is DER's, but of the first: one ResNet-32 and 2000 exemplars."""
    backbone = make()
    one = parameter_bytes(cifar_resnet(32))
    budget = models * (one if models == 1 else parameter_bytes(backbone)) + 2000 * CIFAR
    assert budget == total
    assert exemplars_for(budget - one, CIFAR) == single
    assert exemplars_for(budget - 10 * parameter_bytes(backbone), CIFAR) == der
    assert exemplars_of_memo(budget, backbone, 10, CIFAR) == memo


@pytest.mark.parametrize(
    ("experiences", "single", "memo"),
    [(20, 13466, 4771), (5, 4414, 2583), (6, 5017, 2729), (11, 8035, 3458)],
)
def test_published_exemplars_of_other_splits_with_resnet32(experiences, single, memo):
    backbone = cifar_resnet(32)
    budget = experiences * parameter_bytes(backbone) + 2000 * CIFAR
    assert exemplars_for(budget - parameter_bytes(backbone), CIFAR) == single
    assert exemplars_of_memo(budget, backbone, experiences, CIFAR) == memo


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
    """As on CIFAR-100: 11 experiences; the first point, ConvNet4, has one ResNet-18's budget."""
    with torch.device("meta"):
        backbone = convnet4() if depth is None else imagenet_resnet(depth)
        one = parameter_bytes(imagenet_resnet(18))
    models = one if depth is None else 11 * parameter_bytes(backbone)
    budget = models + 2000 * IMAGENET
    assert exemplars_for(budget - one, IMAGENET) == single
    assert exemplars_for(budget - 11 * parameter_bytes(backbone), IMAGENET) == der
    assert exemplars_of_memo(budget, backbone, 11, IMAGENET) == memo
