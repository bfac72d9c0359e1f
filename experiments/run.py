"""A run: one configuration in, one folder out, with results, figures and the last checkpoint.

``python -m experiments.run`` trains MEMO on digits against plain fine-tuning;
``python -m experiments.run --config experiments/configs/memo_cifar100_b0_inc10.yaml`` is the
papers' protocol. A run that was killed goes on when the same command is given again.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from avalanche.logging import BaseLogger, TensorboardLogger
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from avalanche_memo.benchmarks import split_cifar100, split_digits, split_image_folder
from avalanche_memo.budget import image_bytes, parameter_bytes
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
from avalanche_memo.training.checkpoint import Checkpoint, restore
from avalanche_memo.training.plugins import HerdingReplayPlugin, SparsityPlugin
from avalanche_memo.training.samples import original_image
from experiments.config import Config, from_options, parse
from experiments.figures import accuracy_figure, accuracy_table
from experiments.kept_models import KeptModels
from experiments.progress import ProgressBar

__all__ = [
    "budget_bytes",
    "check",
    "check_folder",
    "chip",
    "data_digest",
    "finished",
    "main",
    "make_benchmark",
    "make_network",
    "run",
    "stored_config",
]

_EXPANDING = ("memo", "der")
_FIRST_EXPERIENCE = "first_experience.pt"
_DATA = "data.txt"

log = logging.getLogger("avalanche_memo")


def run(config: Config) -> dict[str, Any]:
    """Train, or go on training, what a configuration says; return the contents of results.json.

    :raises ValueError: if the folder holds a run of another configuration.
    :raises RuntimeError: if another process runs in the folder, or no checkpoint in it is whole.
    """
    folder = config.folder
    with _locked(folder):
        _claim(folder, config)
        results = finished(folder)
        # A finished run of an earlier version has its budget from its checkpoint.
        return results if results and "budget_bytes" in results else _train(config, folder)


def check(config: Config) -> None:
    """Build all that a run needs and train nothing.

    :raises ValueError: if a run of the configuration would stop before its first step.
    """
    try:
        torch.empty(0, device=None if config.device == "auto" else config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto or a device that is there, {error}") from None
    if config.start_from is not None and not (config.folder / "checkpoint.pt").exists():
        if config.keep_models:
            raise ValueError(
                "keep_models: expected false beside start_from, which has no models of the first "
                "experience, got true"
            )
        _donor(Path(config.start_from), config)
    try:
        train = make_benchmark(config).train_stream
    except RuntimeError as error:  # Files of CIFAR-100 that are damaged.
        raise ValueError(str(error)) from None
    rates, nowhere = _memory_rates(config, train), Checkpoint("checkpoint.pt")
    config = replace(config, device="cpu")
    strategy, _ = _strategy(config, rates, nowhere, [], BaseLogger())
    image = train[0].dataset.eval()[0][0]
    try:
        with torch.no_grad():
            strategy.model.eval().extract_features(image[None])
    except RuntimeError as error:
        raise ValueError(
            f"backbone: expected one for images of shape {tuple(image.shape)}, "
            f"got {config.backbone}: {error}"
        ) from None
    strategy.experience = train[0]
    for plugin in strategy.plugins:  # The memory compares its size with the stream.
        plugin.before_train_dataset_adaptation(strategy)


def _train(config: Config, folder: Path) -> dict[str, Any]:
    RNGManager.set_random_seeds(config.seed)
    benchmark = make_benchmark(config)
    train, test = benchmark.train_stream, benchmark.test_stream
    checkpoint = Checkpoint(folder / "checkpoint.pt", config.fingerprint())
    state, refused = checkpoint.load()
    for message in refused:
        log.warning(message)
    if refused and state is None:
        raise RuntimeError(f"{folder}: no checkpoint is usable; remove the folder to start anew")
    if state is None and config.start_from is not None:
        state = _first_experience_of(Path(config.start_from), config, checkpoint)
    threads = torch.get_num_threads()
    checkpoint.extra = checkpoint.extra or {
        "rows": [],
        "threads": threads,
        "elapsed": 0.0,
    }
    if checkpoint.extra["threads"] != threads:
        log.warning(
            "%s: begun with %d threads, goes on with %d; the last digits may differ",
            *(folder, checkpoint.extra["threads"], threads),
        )

    rates = _memory_rates(config, train)
    progress = ProgressBar(config.method, _images_per_epoch(config, train, rates))
    stopwatch = _Stopwatch(checkpoint.extra)
    logger = TensorboardLogger(str(folder / "tensorboard"))
    plugins = [progress, stopwatch, *([KeptModels(folder)] if config.keep_models else [])]
    strategy, accuracy = _strategy(config, rates, checkpoint, plugins, logger)
    if state is not None:
        restore(strategy, state, train)

    def publish() -> dict[str, Any]:
        rows = checkpoint.extra["rows"]
        results = _results(config, strategy, accuracy, rows) | {
            "budget_bytes": budget_bytes(config, strategy.model, train[: len(rows)], rates),
            "exemplars": sum(
                len(plugin.buffer.buffer)
                for plugin in strategy.plugins
                if isinstance(plugin, HerdingReplayPlugin)
            ),
            "experiences": len(train),
            "data": data_digest(config),
        }
        _write(folder / "results.json", _compact(results))
        accuracy_figure([results], folder / "accuracy.png")
        return results

    try:
        for index in range(strategy.clock.train_exp_counter, len(train)):
            stopwatch.start()
            strategy.train(train[index])
            trained = stopwatch.read()
            if index == 0 and checkpoint.path.exists():
                # The last epoch's: nothing was chosen for the memory yet.
                shutil.copyfile(checkpoint.path, folder / f"{_FIRST_EXPERIENCE}.part")
                os.replace(folder / f"{_FIRST_EXPERIENCE}.part", folder / _FIRST_EXPERIENCE)
            strategy.eval(test[: index + 1])
            seconds = {"train": trained, "eval": stopwatch.read() - trained}
            checkpoint.extra["rows"].append(_row(strategy) | {"seconds": seconds})
            checkpoint.extra["elapsed"] = 0.0
            checkpoint.save(strategy)
            logger.writer.flush()
            publish()
    finally:
        progress.close()
        logger.writer.close()
    # Once more, for a run that was killed after its last checkpoint and before its results.
    return publish()


def _first_experience_of(folder: Path, config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return another run's state at the end of its first experience, if this one's is the same.

    :raises ValueError: if the folder holds no such state, or trained differently.
    """
    donor = _donor(folder, config)
    finished = Checkpoint(folder / _FIRST_EXPERIENCE, donor.fingerprint())
    state, refused = finished.load()
    if state is None:
        raise ValueError(f"start_from: {'; '.join(refused)}")
    checkpoint.extra = finished.extra
    # The first experience has neither memory nor teacher: plugins start as they are.
    return {part: content for part, content in state.items() if part != "plugins"}


def _donor(folder: Path, config: Config) -> Config:
    """Return the configuration of a run whose first experience is that of another."""
    if not (folder / _FIRST_EXPERIENCE).exists():
        raise ValueError(
            f"start_from: expected a run folder whose first experience is trained, got {folder}"
        )
    donor = stored_config(folder)
    _refuse_other("start_from", folder, donor.first_experience(), config.first_experience())
    _refuse_other_data("start_from", folder, config)
    return donor


class _Stopwatch(SupervisedPlugin):
    """Keeps the seconds spent on an experience in what a checkpoint saves along."""

    def __init__(self, extra: dict[str, Any]) -> None:
        super().__init__()
        self.extra = extra

    def start(self) -> None:
        """Start at what an interrupted process had spent."""
        self.started = time.perf_counter() - self.extra["elapsed"]

    def read(self) -> float:
        """Return the seconds spent on the experience."""
        return time.perf_counter() - self.started

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Note the time for the checkpoint that follows."""
        self.extra["elapsed"] = self.read()


def _images_per_epoch(
    config: Config, stream: Any, rates: MemoryRates | None
) -> list[dict[str, int]]:
    """Return, for the progress bar, about how many images each experience's epochs have.

    :return: by what a phase's data are.
    """
    fit = 1.0
    data = stream[0].dataset
    if config.compression is not None:
        quality = 75 if config.compression.quality == "auto" else config.compression.quality
        some = range(min(20, len(data)))
        files = [config.compression.encode(original_image(data, i), quality) for i in some]
        fit = len(some) * image_bytes(tuple(data.eval()[0][0].shape)) / sum(map(len, files))
    per_class = len(data) // len(stream[0].classes_in_this_experience)
    sizes, seen, held = [], 0, per_class
    for index, experience in enumerate(stream):
        new = len(experience.classes_in_this_experience)
        size = {"all": len(experience.dataset) + held * seen, "balanced": held * (seen + new)}
        seen += new
        quota = config.exemplars_per_class or config.mem_size // seen
        quota += 0 if rates is None else rates.extra(index) // seen
        held = {"finetune": 0, "joint": per_class}.get(
            config.method, min(int(fit * quota), per_class)
        )
        sizes.append(size | {"exemplars": held * seen})
    return sizes


def make_benchmark(config: Config) -> Any:
    """Return the benchmark that a configuration says."""
    protocol = {
        "base": config.base,
        "increment": config.increment,
        "seed": config.class_order_seed,
        "classes": config.classes,
    }
    if config.benchmark == "digits":
        return split_digits(**protocol)
    root = _data_root(config)
    if config.benchmark == "cifar100":
        return split_cifar100(root=root, samples_per_class=config.samples_per_class, **protocol)
    if root is None:
        raise ValueError("data_root: expected a folder with train/ and val/, got none")
    return split_image_folder(root, image_size=config.image_size, **protocol)


def _data_root(config: Config) -> str | None:
    return config.data_root or os.environ.get("AVALANCHE_MEMO_DATA")


def data_digest(config: Config) -> str | None:
    """Return what tells one folder of images from another; None for data that are always the same.

    It depends on the classes' names and the number of each one's files, not on the folder's place.
    """
    root = _data_root(config)
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


def _memory_rates(config: Config, stream: Any) -> MemoryRates | None:
    """Return the configured rates, with the numbers of the stream.

    :raises ValueError: if there is no documented list for the number of steps.
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
    return MemoryRates(tuple(rates), config.increment, per_class)


def make_network(config: Config) -> ExpandableNetwork:
    """Return the network that a configuration says, before it has learned anything."""
    masked = config.method in _EXPANDING and config.sparsity_weight != 0
    if config.sparsity_weight != 0 and not masked:
        raise ValueError(
            f"sparsity_weight: expected 0 for {config.method}, which has no masks, "
            f"got {config.sparsity_weight}"
        )
    if not config.train_generalized and config.method not in _EXPANDING:
        raise ValueError(
            f"train_generalized: expected true for {config.method}, all of whose network is "
            "generalized, got false"
        )
    backbone = _backbone(config)
    stages = len(backbone.stages)
    shared = {"memo": stages - 1, "der": 0}.get(config.method, stages)
    classifiers = {
        "podnet": partial(ProxyCosineClassifier, config.proxies),
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


def _strategy(
    config: Config,
    rates: MemoryRates | None,
    checkpoint: Checkpoint,
    plugins: list[Any],
    logger: BaseLogger,
) -> tuple[Any, ClassIncrementalAccuracy]:
    network = make_network(config)
    accuracy = ClassIncrementalAccuracy()
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = {
        "mem_size": config.mem_size,
        "exemplars_per_class": config.exemplars_per_class,
        "memory_rates": rates,
        "compression": config.compression,
        "spend_remainder": config.spend_remainder,
    }
    auxiliary = {"auxiliary_weight": config.auxiliary_weight}
    sparsity = {
        "sparsity_weight": config.sparsity_weight,
        "mask_s_max": config.mask_s_max,
        "mask_rate": config.mask_rate,
    }
    if config.method == "memo" and network.masked:
        plugins = [*plugins, SparsityPlugin(**sparsity)]
    podnet = {
        "nca": config.nca,
        "pod_weight": config.pod_weight,
        "flat_weight": config.flat_weight,
        "pooling": config.pooling,
        "flat_distillation": config.flat_distillation,
        "kd_adaptive": config.kd_adaptive,
    }
    kd = {"kd_weight": config.kd_weight, "temperature": config.kd_temperature}
    distillation = {name: value for name, value in kd.items() if value is not None}
    ucir = {
        "less_forget_weight": config.less_forget_weight,
        "ranking_weight": config.ranking_weight,
    }
    method, options = {
        "memo": (MEMO, memory | auxiliary),
        "der": (DER, memory | auxiliary | sparsity),
        "podnet": (PODNet, memory | podnet | distillation),
        "ucir": (UCIR, memory | ucir),
        "icarl": (ICaRL, memory | distillation),
        "wa": (WA, memory | distillation),
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
        eval_mb_size=128,
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
        **options,
    )
    return strategy, accuracy


def _row(strategy: Any) -> dict[str, Any]:
    """Return what is measured once after an experience."""
    metrics = strategy.evaluator.get_last_metrics()
    row: dict[str, Any] = {"classes": list(strategy.model.new_classes)}
    for name in ("ForgettingRate_CNN", "ForgettingRate_NME", "StreamForgetting"):
        row[name] = metrics.get(f"{name}/eval_phase/test_stream")
    for kind in ("Parameter", "Inference", "Exemplar", "Total"):
        megabytes = metrics.get(f"{kind}Memory_MB/eval_phase/test_stream")
        row[f"{kind.lower()}_bytes"] = None if megabytes is None else round(megabytes * 2**20)
    return row


def _results(
    config: Config, strategy: Any, accuracy: ClassIncrementalAccuracy, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the contents of results.json.

    Accuracies are fractions, times stand under seconds. A confusion matrix counts the test samples
    after the last experience by class (row) and predicted class, in order of appearance.
    """
    readouts = {}
    for readout in ("cnn", "nme"):
        overall = accuracy.overall_accuracies(readout)
        if any(math.isnan(value) for value in overall):
            continue
        readouts[readout] = {
            "accuracy": overall,
            "average": sum(overall) / len(overall),
            "last": overall[-1],
            "top5": _plain(accuracy.overall_accuracies(readout, top=5)),
            "matrix": _plain(accuracy.accuracy_matrix(readout)),
            "groups_of_ten": _plain(accuracy.group_accuracies(readout)),
            "confusion": accuracy.confusion_matrix(readout),
            "forgetting_rate": [row[f"ForgettingRate_{readout.upper()}"] for row in rows],
        }
    return {
        "config": config.identity(),
        **readouts,
        "stream_forgetting": [row["StreamForgetting"] for row in rows],
        "classes": [row["classes"] for row in rows],
        "bytes": [{k: v for k, v in row.items() if k.endswith("_bytes")} for row in rows],
        "environment": {
            "device": chip(strategy.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seconds": {part: [row["seconds"][part] for row in rows] for part in ("train", "eval")},
    }


def budget_bytes(
    config: Config,
    network: ExpandableNetwork,
    learned: Sequence[Any],
    rates: MemoryRates | None = None,
) -> int:
    """Return what a run costs by the published accounting, after some experiences.

    The parameters of the network without classifier and auxiliary head; and the memory's size in
    raw images, whether or not its classes share it without a remainder. Joint training holds all
    images.

    :param config: the run's.
    :param network: as it was after the experiences.
    :param learned: the experiences.
    :param rates: what the memory may hold beyond its size.
    """
    if config.method == "finetune":
        exemplars = 0
    elif config.method == "joint":
        exemplars = sum(len(experience.dataset) for experience in learned)
    else:
        fixed = config.exemplars_per_class
        exemplars = config.mem_size if fixed is None else fixed * len(network.classes)
        exemplars += 0 if rates is None else rates.extra(len(learned) - 1)
    image = image_bytes(tuple(learned[0].dataset.eval()[0][0].shape))
    return parameter_bytes(network) - parameter_bytes(network.classifier) + exemplars * image


def _plain(values: Any) -> Any:
    """Return nested lists with None for NaN, which JSON lacks."""
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else values


def chip(device: torch.device) -> str:
    """Return the name of the processor behind a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return name[1] if name else platform.processor()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"{folder}: another process is running in this folder") from None
        yield


def _claim(folder: Path, config: Config) -> None:
    """Write the configuration into a new folder, or compare it with the one that is there."""
    check_folder(config)
    path = folder / "config.yaml"
    if not path.exists():
        unfinished = folder / "config.yaml.part"
        config.save(unfinished)
        os.replace(unfinished, path)
    if (digest := data_digest(config)) is not None and not (folder / _DATA).exists():
        _write(folder / _DATA, digest)


def check_folder(config: Config) -> None:
    """Compare a configuration with the one in its folder, if any.

    :raises ValueError: if they differ.
    """
    folder, path = config.folder, config.folder / "config.yaml"
    if not path.exists():
        return
    _refuse_other("run_folder", folder, stored_config(folder).identity(), config.identity())
    _refuse_other_data("run_folder", folder, config)


def stored_config(folder: Path) -> Config:
    """Return the configuration that a run folder holds.

    :raises ValueError: if it is damaged, or of another version.
    """
    path = folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected options and their values, got {content}")
        return from_options(content)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_other(name: str, folder: Path, stored: dict[str, Any], own: dict[str, Any]) -> None:
    different = [
        f"{key}: {stored.get(key)} there, {own.get(key)} here"
        for key in stored | own
        if stored.get(key) != own.get(key)
    ]
    if different:
        raise ValueError(
            f"{name}: {folder} holds a run of another configuration ({'; '.join(different)}); "
            "expected another folder, or the same configuration"
        )


def _refuse_other_data(name: str, folder: Path, config: Config) -> None:
    path, own = folder / _DATA, data_digest(config)
    if path.exists() and path.read_text() != own:
        raise ValueError(
            f"{name}: {folder} holds a run on other data ({path.read_text()} there, {own} here); "
            "expected another folder, or the same data"
        )


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the results of a run folder, or None unless the run has come to its end.

    :raises ValueError: if its results.json is damaged, or none of this program.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        return results if len(results["classes"]) == results["experiences"] else None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the results of a run, got {error!r}") from None


def _compact(results: dict[str, Any]) -> str:
    """Return JSON with a line for each key and for each row of a matrix."""
    text = json.dumps(results, indent=1, allow_nan=False)
    # Within strings there are no line breaks.
    return re.sub(r"\[[^][{}]*\]", lambda row: re.sub(r"\n *", " ", row[0]), text) + "\n"


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def main(arguments: list[str] | None = None) -> None:
    """Run the configuration of a command line, and those it is compared with; print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse(arguments)
    configs = [config]
    for method in config.against:
        # A folder of its own: named after the method, or beside the one that was given.
        folder = config.run_folder and f"{config.run_folder}-{method}"
        own: dict[str, Any] = {"shared_stages": None, "start_from": None, "run_folder": folder}
        if method not in _EXPANDING:
            own |= {"sparsity_weight": 0.0, "train_generalized": True}
        configs.append(replace(config, method=method, against=[], **own))
    try:
        for each in configs:
            check_folder(each)
            if finished(each.folder) is None:
                check(each)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"experiments.run: error: {error}") from None
    results = [run(each) for each in configs]
    if len(results) > 1:
        accuracy_figure(results, config.folder / "accuracy.png")
    print(accuracy_table(results))
    print(f"Results, figure and TensorBoard events: {config.folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
