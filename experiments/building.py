"""What a configuration says, built: benchmark, memory, network, strategy."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin

from avalanche_memo.benchmarks import split_cifar100, split_digits, split_image_folder
from avalanche_memo.benchmarks.cifar100 import DATA_VARIABLE
from avalanche_memo.evaluation import (
    ChannelMasks,
    ClassIncrementalAccuracy,
    MemoryUsage,
    ResumableForgetting,
    TrainingAverages,
)
from avalanche_memo.models import (
    BiasCorrectedLinear,
    CosineClassifier,
    ExpandableNetwork,
    GrowingLinear,
    ProxyCosineClassifier,
    StagedBackbone,
    cifar_resnet,
    convnet2,
    convnet4,
    four_stage_resnet,
    imagenet_resnet,
)
from avalanche_memo.training import (
    DER,
    MEMO,
    MEMORY_RATES,
    UCIR,
    WA,
    BiC,
    Finetune,
    ICaRL,
    Joint,
    MemoryRates,
    PODNet,
    Replay,
)
from avalanche_memo.training.checkpoint import Checkpoint
from avalanche_memo.training.plugins import SparsityPlugin
from avalanche_memo.training.storage_policy import HerdingBuffer
from experiments.config import EXPANDING, Config
from experiments.machine import default_device

__all__ = [
    "data_digest",
    "data_root",
    "make_benchmark",
    "make_memory",
    "make_network",
    "make_strategy",
    "memory_rates",
]


@contextmanager
def _named(**options: str) -> Iterator[None]:
    """Call an argument that an error names as the option that sets it is called."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        name, _, rest = str(error).partition(":")
        if name not in options:
            raise
        raise type(error)(f"{options[name]}:{rest}") from None


@_named(order="class_order", root="data_root")
def make_benchmark(config: Config) -> Any:
    """Return the benchmark that a configuration says.

    :raises ValueError: if it lacks an option of the benchmark, or has one of another.
    """
    protocol = {
        "base": config.base,
        "increment": config.increment,
        "seed": config.class_order_seed,
        "order": config.class_order,
        "classes": config.classes,
    }
    for name, benchmark in (("samples_per_class", "cifar100"), ("image_size", "image_folder")):
        if config.benchmark != benchmark and getattr(config, name) != getattr(Config, name):
            raise ValueError(
                f"{name}: expected none for the benchmark {config.benchmark}, "
                f"got {getattr(config, name)}"
            )
    if config.benchmark == "digits":
        return split_digits(**protocol)
    root = data_root(config)
    if config.benchmark == "cifar100":
        return split_cifar100(root=root, samples_per_class=config.samples_per_class, **protocol)
    if root is None:
        raise ValueError("data_root: expected a folder with train/ and val/, got none")
    return split_image_folder(root, image_size=config.image_size, **protocol)


def data_root(config: Config) -> str | None:
    """Return the folder of the data: the configuration's, or the environment variable's."""
    return config.data_root or os.environ.get(DATA_VARIABLE)


def data_digest(config: Config) -> str | None:
    """Return what tells one folder of images from another; None for data that are always the same.

    It depends on the classes' names and the number of each one's files, not on the folder's place.
    """
    root = data_root(config)
    if config.benchmark != "image_folder" or root is None:
        return None
    for part in ("train", "val"):
        if not (Path(root) / part).is_dir():
            raise FileNotFoundError(f"data_root: expected a folder with {part}/, got {root}")
    classes = sorted(
        (part, folder.name, len(list(folder.iterdir())))
        for part in ("train", "val")
        for folder in (Path(root) / part).glob("*")
        if folder.is_dir()
    )
    files = sum(number for *_, number in classes)
    digest = hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:12]
    return f"{files} files of {len({name for _, name, _ in classes})} classes, {digest}"


@_named(depth="backbone")
def _backbone(config: Config) -> StagedBackbone:
    channels = 1 if config.benchmark == "digits" else 3
    pattern = r"(resnet|imagenet_resnet|convnet)(\d+)(|_cifar_stem)"
    match = re.fullmatch(pattern, config.backbone)
    kind, depth = (match[1] + match[3], int(match[2])) if match else (config.backbone, 0)
    last_relu = config.method not in ("podnet", "ucir")
    if kind == "resnet":
        return cifar_resnet(depth, config.attention, channels, last_relu)
    if kind == "four_stage_resnet":
        return four_stage_resnet(config.attention, channels, last_relu)
    if config.attention is not None:
        raise ValueError(
            "attention: expected none, or a backbone resnet8 to resnet110 or four_stage_resnet, "
            f"got {config.attention} and {config.backbone}"
        )
    if kind == "imagenet_resnet":
        return imagenet_resnet(depth, last_relu)
    if kind == "imagenet_resnet_cifar_stem":
        return imagenet_resnet(depth, last_relu, "cifar")
    if kind == "convnet" and depth in (2, 4):
        return (convnet2 if depth == 2 else convnet4)(channels)
    raise ValueError(
        "backbone: expected resnet8 to resnet110, four_stage_resnet, convnet2, imagenet_resnet10 "
        f"to imagenet_resnet50 (also with _cifar_stem) or convnet4, got {config.backbone}"
    )


@_named(rates="memory_rates")
def memory_rates(config: Config, stream: Any) -> MemoryRates | None:
    """Return the configured rates, with the numbers of the stream.

    :raises ValueError: if there is no documented list for the number of steps, or too few rates.
    """
    rates = config.memory_rates
    if rates is None:
        return None
    steps = len(stream) - 1
    if rates == "default":
        if steps not in MEMORY_RATES:
            raise ValueError(
                f"memory_rates: expected a list of {steps + 1} rates; there is a default for "
                f"{', '.join(map(str, MEMORY_RATES))} steps, got {steps}"
            )
        rates = list(MEMORY_RATES[steps])
    per_class = len(stream[0].dataset) // len(stream[0].classes_in_this_experience)
    made = MemoryRates(tuple(rates), config.increment, per_class)
    made.extra(steps)  # Refuses a list that is too short.
    return made


def make_memory(config: Config, rates: MemoryRates | None) -> HerdingBuffer:
    """Return the memory that a configuration says, to ask how much it may hold."""
    return HerdingBuffer(
        config.mem_size, exemplars_per_class=config.exemplars_per_class, rates=rates
    )


def make_network(config: Config) -> ExpandableNetwork:
    """Return the network that a configuration says, before it has learned anything."""
    masked = config.method in EXPANDING and config.sparsity_weight != 0
    if config.sparsity_weight != 0 and not masked:
        raise ValueError(
            f"sparsity_weight: expected 0 for {config.method}, which has no masks, "
            f"got {config.sparsity_weight}"
        )
    for name in ("train_generalized", "gradient_through_frozen"):
        if not getattr(config, name) and config.method not in EXPANDING:
            raise ValueError(
                f"{name}: expected true for {config.method}, all of whose network is generalized, "
                "got false"
            )
    backbone = _backbone(config)
    stages = len(backbone.stages)
    shared = {"memo": stages - 1, "der": 0}.get(config.method, stages)
    classifiers = {
        "podnet": partial(
            ProxyCosineClassifier, config.proxies, squared_distance=config.squared_distance
        ),
        "ucir": CosineClassifier,
        "bic": BiasCorrectedLinear,
    }
    return ExpandableNetwork(
        lambda: backbone,
        shared if config.shared_stages is None else config.shared_stages,
        train_generalized=config.train_generalized,
        gradient_through_frozen=config.gradient_through_frozen,
        make_classifier=classifiers.get(config.method, GrowingLinear),
        masked=masked,
    )


@_named(temperature="kd_temperature", s_max="mask_s_max", rate="mask_rate")
def make_strategy(
    config: Config,
    rates: MemoryRates | None,
    checkpoint: Checkpoint,
    plugins: list[Any],
    logger: BaseLogger,
) -> tuple[Any, ClassIncrementalAccuracy]:
    """Return the strategy that a configuration says, and its metric of accuracies.

    :param config: the run's.
    :param rates: what :func:`memory_rates` returned.
    :param checkpoint: where its state goes.
    :param plugins: further plugins.
    :param logger: of its metrics.
    """
    network = make_network(config)
    accuracy = ClassIncrementalAccuracy()

    def options(*names: str) -> dict[str, Any]:
        return {name: getattr(config, name) for name in names}

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    memory = options("mem_size", "exemplars_per_class", "compression", "spend_remainder")
    memory["memory_rates"] = rates
    auxiliary = options("auxiliary_weight")
    sparsity = options("sparsity_weight", "mask_s_max", "mask_rate")
    if config.method == "memo" and network.masked:
        plugins = [*plugins, SparsityPlugin(**sparsity)]
    podnet = options("nca", "pod_weight", "flat_weight", "pooling", "flat_distillation")
    podnet |= options("kd_adaptive")
    distillation = given(kd_weight=config.kd_weight, temperature=config.kd_temperature)
    ucir = options("less_forget_weight", "ranking_weight")
    device = default_device() if config.device == "auto" else config.device
    method, own = {
        "memo": (MEMO, memory | auxiliary),
        "der": (DER, memory | auxiliary | sparsity),
        "podnet": (PODNet, memory | podnet | distillation),
        "ucir": (UCIR, memory | ucir),
        "icarl": (ICaRL, memory | distillation),
        "wa": (WA, memory | distillation | given(clip_weights=config.clip_weights)),
        "bic": (BiC, memory | distillation),
        "replay": (Replay, memory),
        "finetune": (Finetune, {}),
        "joint": (Joint, {}),
    }[config.method]
    strategy = method(
        model=network,
        optimizer=torch.optim.SGD(
            network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        ),
        first_phases=config.first,
        later_phases=config.later,
        train_mb_size=config.batch_size,
        eval_mb_size=512 if device.startswith("cuda") else 128,
        device=device,
        plugins=plugins,
        evaluator=EvaluationPlugin(
            TrainingAverages(),
            accuracy,
            ResumableForgetting(),
            MemoryUsage(),
            ChannelMasks(),
            loggers=[logger],
        ),
        fast=config.fast,
        checkpoint=checkpoint,
        **own,
    )
    return strategy, accuracy
