"""A run: one configuration in, one folder out, with results, figures and the last checkpoint.

``python -m experiments.run`` trains MEMO on digits against plain fine-tuning;
``python -m experiments.run --config experiments/configs/memo_cifar100_b0_inc10.yaml`` is the
papers' protocol. A run that was killed goes on when the same command is given again.
"""

import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from avalanche.logging import BaseLogger, TensorboardLogger
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import SupervisedPlugin

from avalanche_memo.budget import image_bytes, parameter_bytes
from avalanche_memo.evaluation import ClassIncrementalAccuracy
from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training import MemoryRates
from avalanche_memo.training.checkpoint import Checkpoint, restore, written_whole
from avalanche_memo.training.plugins import HerdingReplayPlugin
from avalanche_memo.training.samples import original_image
from experiments.building import (
    data_digest,
    make_benchmark,
    make_memory,
    make_strategy,
    memory_rates,
)
from experiments.config import EXPANDING, Config, parse
from experiments.figures import accuracy_figure, accuracy_table
from experiments.folders import (
    RunFolderError,
    check_folder,
    claim,
    compact,
    finished,
    locked,
    refuse_other,
    refuse_other_data,
    stored_config,
    write,
)
from experiments.kept_models import KeptModels
from experiments.machine import check_device, chip
from experiments.progress import ProgressBar

__all__ = ["budget_bytes", "check", "main", "run"]

_FIRST_EXPERIENCE = "first_experience.pt"
_UNSAVED_SECONDS = 10.0
"""The seconds of training that a killed run loses at most, beside an epoch's."""

log = logging.getLogger("avalanche_memo")


def run(config: Config) -> dict[str, Any]:
    """Train, or go on training, what a configuration says; return the contents of results.json.

    :raises ValueError: if the folder holds a run of another configuration.
    :raises RunFolderError: if another process runs in the folder, or no checkpoint in it is whole.
    """
    folder = config.folder
    with locked(folder):
        claim(folder, config)
        return finished(folder) or _train(config, folder)


def check(config: Config) -> list[int]:
    """Build all that a run needs and train nothing.

    :return: the number of classes of each experience.
    :raises ValueError: if a run of the configuration would stop before its first step.
    """
    nowhere = Checkpoint("checkpoint.pt")
    if config.device != "auto":
        check_device(config.device)
    if config.start_from is not None and not (config.folder / "checkpoint.pt").exists():
        if config.keep_models:
            raise ValueError(
                "keep_models: expected false beside start_from, which has no models of the first "
                "experience, got true"
            )
        _first_experience_of(Path(config.start_from), config, nowhere)
    try:
        train = make_benchmark(config).train_stream
    except RuntimeError as error:  # Files of CIFAR-100 that are damaged.
        raise ValueError(str(error)) from None
    config = replace(config, device="cpu")
    strategy, _ = make_strategy(config, memory_rates(config, train), nowhere, [], BaseLogger())
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
    return [len(experience.classes_in_this_experience) for experience in train]


def _train(config: Config, folder: Path) -> dict[str, Any]:
    RNGManager.set_random_seeds(config.seed)
    benchmark = make_benchmark(config)
    train, test = benchmark.train_stream, benchmark.test_stream
    checkpoint = Checkpoint(
        folder / "checkpoint.pt", config.fingerprint(), seconds=_UNSAVED_SECONDS
    )
    state = _saved_state(config, folder, checkpoint)
    rates = memory_rates(config, train)
    progress = ProgressBar(config.method, _images_per_epoch(config, train, rates))
    stopwatch = _Stopwatch(checkpoint.extra)
    logger = TensorboardLogger(str(folder / "tensorboard"))
    plugins = [progress, stopwatch, *([KeptModels(folder)] if config.keep_models else [])]
    strategy, accuracy = make_strategy(config, rates, checkpoint, plugins, logger)
    if state is not None:
        restore(strategy, state, train)

    def publish() -> dict[str, Any]:
        rows = checkpoint.extra["rows"]
        results = _results(config, strategy, accuracy, rows) | {
            "budget_bytes": budget_bytes(config, strategy.model, train[: len(rows)], rates),
            "experiences": len(train),
            "data": data_digest(config),
        }
        write(folder / "results.json", compact(results))
        accuracy_figure([results], folder / "accuracy.png")
        return results

    try:
        for index in range(strategy.clock.train_exp_counter, len(train)):
            stopwatch.start()
            strategy.train(train[index])
            trained = stopwatch.read()
            if index == 0 and checkpoint.path.exists():
                # The last epoch's: nothing was chosen for the memory yet.
                with written_whole(folder / _FIRST_EXPERIENCE) as file:
                    file.write(checkpoint.path.read_bytes())
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


def _saved_state(config: Config, folder: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the state that a run goes on from, if any, and fill the checkpoint's extra data.

    :raises RunFolderError: if there are checkpoints, but none is whole.
    """
    state, refused = checkpoint.load()
    for message in refused:
        log.warning(message)
    if refused and state is None:
        raise RunFolderError(f"{folder}: no checkpoint is usable; remove the folder to start anew")
    if state is None and config.start_from is not None:
        state = _first_experience_of(Path(config.start_from), config, checkpoint)
    threads = torch.get_num_threads()
    checkpoint.extra = checkpoint.extra or {"rows": [], "threads": threads, "elapsed": 0.0}
    if checkpoint.extra["threads"] != threads:
        log.warning(
            "%s: begun with %d threads, goes on with %d; the last digits may differ",
            *(folder, checkpoint.extra["threads"], threads),
        )
    return state


def _first_experience_of(folder: Path, config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return another run's state at the end of its first experience, if this one's is the same.

    :raises ValueError: if the folder holds no such state, or trained differently.
    """
    if not (folder / _FIRST_EXPERIENCE).exists():
        raise ValueError(
            f"start_from: expected a run folder whose first experience is trained, got {folder}"
        )
    donor = stored_config(folder)
    refuse_other("start_from", folder, donor.first_experience(), config.first_experience())
    refuse_other_data("start_from", folder, config)
    finished = Checkpoint(folder / _FIRST_EXPERIENCE, donor.fingerprint())
    state, refused = finished.load()
    if state is None:
        raise ValueError(f"start_from: {'; '.join(refused)}")
    checkpoint.extra = finished.extra
    # The first experience has neither memory nor teacher: plugins start as they are.
    return {part: content for part, content in state.items() if part != "plugins"}


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
    memory = make_memory(config, rates)
    sizes, seen, held = [], 0, per_class
    for index, experience in enumerate(stream):
        new = len(experience.classes_in_this_experience)
        size = {"all": len(experience.dataset) + held * seen, "balanced": held * (seen + new)}
        seen += new
        if config.method == "finetune":
            held = 0
        elif config.method == "joint":
            held = per_class
        else:
            held = min(int(fit * memory.quota(seen, index)), per_class)
        sizes.append(size | {"exemplars": held * seen})
    return sizes


def _row(strategy: Any) -> dict[str, Any]:
    """Return what is measured once after an experience."""
    metrics = strategy.evaluator.get_last_metrics()
    row: dict[str, Any] = {
        "classes": list(strategy.model.new_classes),
        "device": chip(strategy.device),
    }
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
    here = chip(strategy.device)  # Rows of older checkpoints do not say where they come from.
    return {
        "config": config.identity(),
        **readouts,
        "stream_forgetting": [row["StreamForgetting"] for row in rows],
        "classes": [row["classes"] for row in rows],
        "exemplars": sum(
            len(plugin.buffer.buffer)
            for plugin in strategy.plugins
            if isinstance(plugin, HerdingReplayPlugin)
        ),
        "bytes": [{k: v for k, v in row.items() if k.endswith("_bytes")} for row in rows],
        "environment": {
            "device": ", then ".join(dict.fromkeys(row.get("device", here) for row in rows)),
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
        memory = make_memory(config, rates)
        exemplars = memory.capacity(len(network.classes), len(learned) - 1)
    image = image_bytes(tuple(learned[0].dataset.eval()[0][0].shape))
    return parameter_bytes(network) - parameter_bytes(network.classifier) + exemplars * image


def _plain(values: Any) -> Any:
    """Return nested lists with None for NaN, which JSON lacks."""
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else values


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the configuration of a command line, and those it is compared with; print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse(arguments)
    configs = [config]
    for method in config.against:
        # A folder of its own: named after the method, or beside the one that was given.
        folder = config.run_folder and f"{Path(config.run_folder)}-{method}"
        own: dict[str, Any] = {"shared_stages": None, "start_from": None, "run_folder": folder}
        if method not in EXPANDING:
            own |= {"train_generalized": True, "gradient_through_frozen": True}
            own["sparsity_weight"] = 0.0
        configs.append(replace(config, method=method, against=[], **own))
    try:
        for each in configs:
            check_folder(each)
            if finished(each.folder) is None:
                check(each)
    except (ValueError, OSError) as error:
        raise SystemExit(f"experiments.run: error: {error}") from None
    try:
        results = [run(each) for each in configs]
    except (RunFolderError, OSError) as error:
        raise SystemExit(f"experiments.run: error: {error}") from None
    if len(results) > 1:
        accuracy_figure(results, config.folder / "accuracy.png")
    print(accuracy_table(results))
    print(f"Results, figure and TensorBoard events: {config.folder}")


if __name__ == "__main__":
    main()
