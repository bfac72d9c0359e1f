import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_memo.models import cifar_resnet, convnet2, convnet4, imagenet_resnet


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomize(module: nn.Module) -> nn.Module:
    """Give every norm random scales and statistics, so that leaving one out would show."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return module


@pytest.mark.parametrize(
    ("depth", "shared", "last"),
    [
        (14, 42_320, 129_536),
        (20, 65_552, 203_520),
        (26, 88_784, 277_504),
        (32, 112_016, 351_488),
    ],
)
def test_cifar_resnet_has_the_published_parameters(depth, shared, last):
    backbone = cifar_resnet(depth)
    assert n_parameters(backbone.stages[:2]) == shared
    assert n_parameters(backbone.stages[2]) == last
    assert n_parameters(backbone) == shared + last


@pytest.mark.parametrize(
    ("make", "per_stage"),
    [
        (convnet2, [1_920, 37_056]),
        # 3x3 convolutions with bias, and a norm; the first one is 7x7.
        (
            convnet4,
            [
                3 * 128 * 49 + 3 * 128,
                128 * 128 * 9 + 3 * 128,
                128 * 128 * 9 + 3 * 128,
                128 * 512 * 9 + 3 * 512,
            ],
        ),
    ],
)
def test_convnet_parameters(make, per_stage):
    assert [n_parameters(stage) for stage in make().stages] == per_stage


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # torchvision's documented counts (with a classifier of 1000 classes) for 18, 34 and 50.
    [
        (18, 11_689_512 - 513 * 1000),
        (34, 21_797_672 - 513 * 1000),
        (50, 25_557_032 - 2049 * 1000),
    ],
)
def test_imagenet_resnet_has_the_published_parameters(depth, parameters):
    with torch.device("meta"):
        assert n_parameters(imagenet_resnet(depth)) == parameters


def test_resnet_of_depth_18_has_as_many_parameters_as_297_imagenet_images():
    with torch.device("meta"):
        n = n_parameters(imagenet_resnet(18))
    assert n == 11_176_512
    assert round(n * 4 / (224 * 224 * 3)) == 297


def test_the_stem_for_small_images_has_3x3_kernels_and_no_pooling():
    backbone = imagenet_resnet(18, stem="cifar")
    # 7x7 kernels less, 3x3 kernels more.
    assert n_parameters(backbone) == 11_176_512 - 3 * 64 * 49 + 3 * 64 * 9
    stem = backbone.stages[0][0]
    assert stem[0].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    images = torch.randn(2, 3, 8, 8)
    expected = F.relu(stem[1](F.conv2d(images, stem[0].weight, padding=1)))
    torch.testing.assert_close(stem(images), expected)


@pytest.mark.parametrize(
    ("make", "size", "maps"),
    [
        (lambda: cifar_resnet(8), 32, [(16, 32), (32, 16), (64, 8)]),
        (lambda: cifar_resnet(8), 9, [(16, 9), (32, 5), (64, 3)]),
        (convnet2, 32, [(64, 16), (64, 8)]),
        (convnet4, 64, [(128, 16), (128, 8), (128, 4), (512, 2)]),
        (lambda: imagenet_resnet(10), 64, [(64, 16), (128, 8), (256, 4), (512, 2)]),
        (
            lambda: imagenet_resnet(10, stem="cifar"),
            32,
            [(64, 32), (128, 16), (256, 8), (512, 4)],
        ),
        (lambda: imagenet_resnet(26), 64, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
    ],
)
def test_shapes_of_maps_and_features(make, size, maps):
    backbone = make().eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        shapes = [tuple(stage_map.shape) for stage_map in backbone.stage_maps(images)]
        features = backbone(images)
    assert shapes == [(2, channels, width, width) for channels, width in maps]
    assert features.shape == (2, backbone.feature_dim) == (2, maps[-1][0])


@pytest.mark.parametrize("make", [lambda n: cifar_resnet(8, in_channels=n), convnet2, convnet4])
def test_other_input_channels(make):
    assert make(1).eval()(torch.randn(1, 1, 32, 32)).shape[0] == 1
    with pytest.raises(ValueError, match="in_channels"):
        make(0)


def plain_resnet8(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """ResNet-8 in eval mode, written out from the paper (option A): features of images.

    The state's tensors are read in order: per convolution its weight and its norm's scale, shift,
    mean, variance and counter.
    """
    tensors = iter(state.values())

    def conv_norm(x: Tensor, stride: int = 1) -> Tensor:
        x = F.conv2d(x, next(tensors), stride=stride, padding=1)
        scale, shift, mean, variance, _ = (next(tensors)[..., None, None] for _ in range(5))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = conv_norm(x).relu()
    for stride in (1, 2, 2):
        residual = conv_norm(conv_norm(x, stride).relu())
        if stride == 2:
            x = x[..., ::2, ::2]
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        x = (x + residual).relu()
    assert next(tensors, None) is None
    return x.mean(dim=(2, 3))


def test_cifar_resnet_computes_what_the_paper_says():
    torch.manual_seed(0)
    backbone = randomize(cifar_resnet(8)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = plain_resnet8(backbone.state_dict(), images)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)


def test_imagenet_resnet_computes_what_torchvision_does():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    backbone = randomize(imagenet_resnet(18)).eval()
    whole = resnet18().eval()
    whole.fc = nn.Identity()
    names = whole.state_dict()
    whole.load_state_dict(dict(zip(names, backbone.state_dict().values(), strict=True)))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), whole(images))


def test_cifar_resnet_starts_from_fan_out_normal_weights():
    torch.manual_seed(0)
    weight = cifar_resnet(8).stages[2][0].conv2.weight
    assert weight.mean().item() == pytest.approx(0, abs=2e-3)
    assert weight.std().item() == pytest.approx((2 / (3 * 3 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "make", [lambda: cifar_resnet(14), convnet2, convnet4, lambda: imagenet_resnet(26)]
)
def test_every_convolution_is_followed_by_its_norm(make):
    """What folding norms into convolutions relies on."""
    backbone = make()
    folded = 0
    for parent in backbone.modules():
        # ReLUs and pools hold no tensors; torchvision declares them anywhere in a block.
        children = [child for child in parent.children() if list(child.parameters())]
        for index, child in enumerate(children):
            if isinstance(child, nn.Conv2d):
                norm = children[index + 1]
                assert isinstance(norm, nn.BatchNorm2d)
                assert norm.num_features == child.out_channels
                folded += 1
    assert folded == sum(isinstance(module, nn.Conv2d) for module in backbone.modules())


@pytest.mark.parametrize("depth", [2, 7, 18, 30, 116, -4])
def test_cifar_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=f"depth: expected 6n.2 from 8 to 110, got {depth}"):
        cifar_resnet(depth)


def test_cifar_resnet_refuses_an_unknown_attention():
    with pytest.raises(ValueError, match=r"attention.*'squeeze'"):
        cifar_resnet(32, attention="squeeze")


def test_imagenet_resnet_refuses_other_depths():
    with pytest.raises(ValueError, match="depth: expected one of 10, 18, 26, 34, 50, got 20"):
        imagenet_resnet(20)


def test_imagenet_resnet_refuses_another_stem():
    with pytest.raises(ValueError, match="stem: expected 'imagenet' or 'cifar', got 'tiny'"):
        imagenet_resnet(18, stem="tiny")
