"""Small images, benchmarks and networks that several tests share."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torchvision.transforms import ToTensor

from avalanche_memo.benchmarks.digits import GreyImages
from avalanche_memo.models import StagedBackbone

APIS = ("nc", "ci")
"""Avalanche's two ways to make a class-incremental benchmark."""

ORDER = [7, 2, 5, 0, 9, 4, 1, 8, 3, 6]
"""Class ids that are neither ascending nor, after the first experiences, without gaps."""


def grey_images(per_class: int = 6, seed: int = 0, classes: int = 10) -> GreyImages:
    """8x8 images of a pattern per class, so that there is something to learn, plus noise."""
    patterns = np.random.default_rng(0).integers(40, 216, (classes, 8, 8))
    targets = np.tile(np.arange(classes), per_class)
    noise = np.random.default_rng(seed).integers(-40, 40, (len(targets), 8, 8))
    return GreyImages((patterns[targets] + noise).astype(np.uint8), targets.tolist())


def make_benchmark(
    api: str = "nc",
    experiences: int = 5,
    per_class: int = 6,
    task_labels: bool = False,
    transform: Any = None,
    order: Sequence[int] = ORDER,
    **options: Any,
) -> Any:
    """A benchmark of 10 classes in ORDER, under their own ids; options are those of the API."""
    train, test = grey_images(per_class, seed=1), grey_images(2, seed=2)
    transform = transform or ToTensor()
    if api == "nc":
        return nc_benchmark(
            train,
            test,
            experiences,
            task_labels=task_labels,
            fixed_class_order=list(order),
            train_transform=transform,
            eval_transform=ToTensor(),
            **options,
        )
    datasets = {
        name: as_classification_dataset(
            images, transform_groups={"train": (own, None), "eval": (ToTensor(), None)}
        )
        for name, images, own in (("train", train, transform), ("test", test, ToTensor()))
    }
    return class_incremental_benchmark(
        datasets,
        class_order=list(order),
        num_experiences=experiences,
        **options,
    )


def tiny_backbone(channels: Sequence[int] = (4, 5, 6), in_channels: int = 1) -> StagedBackbone:
    """A stage per entry: convolution 3x3, norm, ReLU."""
    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in zip((in_channels, *channels[:-1]), channels, strict=True)
    ]
    return StagedBackbone(stages, feature_dim=channels[-1])


def randomize_norms(module: nn.Module) -> None:
    """Give every norm statistics of its own, so that the mode it runs in shows."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)


def silent() -> EvaluationPlugin:
    return EvaluationPlugin(loggers=[])


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers that a module saves."""
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def assert_same_tensors(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Check that names and values are equal, bit for bit."""
    assert list(ours) == list(others)
    assert [name for name in ours if not torch.equal(ours[name], others[name])] == []


def accuracies(results: dict[str, Any]) -> dict[int, float]:
    """The accuracy of each experience among the metrics that ``eval`` returned."""
    found = {}
    for name, value in results.items():
        if match := re.match(r"Top1_Acc_Exp/.*/Exp(\d+)$", name):
            found[int(match[1])] = value
    return found
