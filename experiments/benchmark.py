"""The fast path against the plain path, both measured in turn in one run.

``python -m experiments.benchmark [--out FOLDER]`` prints a table and writes it with the raw times
as JSON. Plain is a loader of PIL images, float32, eager, as in Avalanche by default. CIFAR-sized
random images stand for the data, since a step takes as long whatever they show.
Leave the machine alone meanwhile: a second process on the same cores distorts everything.
"""

import argparse
import json
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.storage_policy import HerdingSelectionStrategy
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from avalanche_memo.benchmarks import cifar_eval_transform, cifar_train_transform, split_classes
from avalanche_memo.evaluation import ClassIncrementalAccuracy
from avalanche_memo.models import ExpandableNetwork, FastPath, cifar_resnet
from avalanche_memo.training import DER, MEMO
from avalanche_memo.training.loading import resident_loader
from avalanche_memo.training.ranges import at_least_one
from avalanche_memo.training.storage_policy import herding_order
from experiments.folders import write
from experiments.machine import check_device, default_device, describe, in_new_process, seconds

BATCH = 128
PLAIN = FastPath.of(False)
PARTS = {
    "plain": PLAIN,
    "fast": FastPath(),
    "resident batches alone": replace(PLAIN, resident_batches=True),
    "channels_last alone": replace(PLAIN, channels_last=True),
    "bfloat16 alone": replace(PLAIN, bfloat16=True),
    "folded frozen blocks alone": replace(PLAIN, fold_frozen=True),
    "CUDA graphs alone": replace(PLAIN, cuda_graphs=True),
}

_HEAD = "| what | side | median | 10 % | 90 % | unit | times faster |\n" + "|---" * 7 + "|"


class Images(torch.utils.data.Dataset[Any]):
    """Random CIFAR-sized images, one PIL image at a time, as torchvision's CIFAR-100 gives them."""

    def __init__(self, n: int, classes: int) -> None:
        generator = np.random.default_rng(0)
        self.data = generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % classes for i in range(n)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its class."""
        return Image.fromarray(self.data[index]), self.targets[index]


class Stopwatch(SupervisedPlugin):
    """Notes when training or evaluation steps end.

    On a GPU, every 20th one: to wait for each would hide what the host does meanwhile.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.stride = 20 if torch.device(device).type == "cuda" else 1
        self.count = 0
        self.ends: list[float] = []

    def _note(self, strategy: Any) -> None:
        self.count += 1
        if self.count % self.stride == 0:
            if strategy.device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Note the end of a training step."""
        self._note(strategy)

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Note the end of an evaluation step."""
        self._note(strategy)

    def steps(self, warmup: int = 2) -> list[float]:
        """Return the seconds of each step, loading included, after the first ones."""
        return (np.diff(self.ends)[warmup:] / self.stride).tolist()


def benchmark_of(n_images: int, classes: int, experiences: int = 1) -> Any:
    """Return experiences of random images of some classes each, in an Avalanche benchmark."""
    images = Images(n_images * experiences, classes * experiences)
    return split_classes(
        images,
        images,
        0,
        classes,
        seed=None,
        original_class_ids=True,
        train_transform=cifar_train_transform(),
        eval_transform=cifar_eval_transform(),
    )


def strategy_at(
    method: str, experiences: int, fast: FastPath, device: str, stop: bool = False
) -> tuple[Any, Stopwatch]:
    """Return a strategy about to learn its n-th experience of ten classes, and its stopwatch."""
    network = ExpandableNetwork(
        lambda: cifar_resnet(32), 2 if method == "MEMO" else 0, gradient_through_frozen=not stop
    )
    # The classes 0 to 9 come last: they are the ones that the benchmark has.
    for first in range(10, 10 * experiences, 10):
        network.grow(range(first, first + 10))
    stopwatch = Stopwatch(device)
    strategy = {"MEMO": MEMO, "DER": DER}[method](
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        train_mb_size=BATCH,
        eval_mb_size=BATCH,
        device=device,
        plugins=[stopwatch],
        evaluator=EvaluationPlugin(ClassIncrementalAccuracy(), loggers=[]),
        fast=fast,
    )
    return strategy, stopwatch


def training_steps(
    method: str, experiences: int, fast: FastPath, device: str, steps: int, stop: bool = False
) -> list[float]:
    """Return the seconds of training steps, loader included."""
    strategy, stopwatch = strategy_at(method, experiences, fast, device, stop)
    batches = stopwatch.stride * (steps + 3)
    strategy.train(benchmark_of(BATCH * batches, 10).train_stream[0])
    return stopwatch.steps()


def evaluation_steps(experiences: int, fast: FastPath, device: str, steps: int) -> list[float]:
    """Return the seconds of evaluation steps: classifier and NME in one pass."""
    strategy, stopwatch = strategy_at("MEMO", experiences, fast, device)
    benchmark = benchmark_of(BATCH * stopwatch.stride * (steps + 3), 10)
    strategy.train(benchmark_of(BATCH, 10).train_stream[0])
    stopwatch.ends.clear()
    stopwatch.count = 0
    strategy.eval(benchmark.test_stream)
    return stopwatch.steps()


def loader_epochs(fast: bool, device: str) -> list[float]:
    """Return the seconds of epochs over 5,000 images with the papers' augmentation."""
    dataset = benchmark_of(5000, 10).train_stream[0].dataset.train()
    loader: Any
    if fast:
        loader = resident_loader(dataset, BATCH, shuffle=True, device=device)
    else:
        loader = TaskBalancedDataLoader(dataset, batch_size=BATCH, shuffle=True)
    # Batches are dropped as training drops them: to keep them would measure page faults.
    return [seconds(lambda: deque(loader, maxlen=0), device) for _ in range(3)]


def herding(fast: bool, n: int, dim: int, m: int) -> list[float]:
    """Return the seconds to choose m of n samples by their features."""
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.normalize(features, dim=1)
    if fast:
        return [seconds(lambda: herding_order(features, m))]
    # Ranking does not use the object, whose constructor wants a model and a layer's name.
    rank = HerdingSelectionStrategy.make_sorted_indices_from_features
    return [seconds(lambda: rank(None, features))]


def peak_memory(experiences: int, fast: FastPath, device: str) -> float:
    """Return the peak memory, in MB, of this process, which has only to train a few steps."""
    training_steps("MEMO", experiences, fast, device, steps=3)
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Unlike getrusage's, this peak does not include the parent's at the time of the fork.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**10


def training_flops(experiences: int) -> int:
    """Return the floating-point operations of a training step of MEMO, forward and backward."""
    strategy, _ = strategy_at("MEMO", experiences, PLAIN, "cpu")
    # The classes that are missing would make the last block.
    strategy.model.grow(range(10))
    strategy.model.train()
    with FlopCounterMode(display=False) as counter:
        strategy.model(torch.randn(BATCH, 3, 32, 32)).sum().backward()
    return counter.get_total_flops()


def ceilings(device: str) -> tuple[float, float]:
    """Return the bfloat16 operations and the bytes per second of a matrix product and of a copy."""
    matrix = torch.randn(4096, 4096, device=device).bfloat16()
    data = torch.zeros(2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(data)

    def rate(amount: float, work: Callable[[], Any]) -> float:
        work()
        return amount / statistics.median(seconds(work, device) for _ in range(5))

    return rate(2 * 4096**3, lambda: matrix @ matrix), rate(2**28, lambda: other.copy_(data))


def measure(device: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measure everything, the sides of each comparison in turn, and return a row per figure.

    :param rounds: how often each side has its turn.
    :param steps: training or evaluation steps per turn.
    """
    rows: list[dict[str, Any]] = []

    def compare(what: str, unit: str, sides: dict[str, Callable[[], list[float]]]) -> None:
        samples: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, work in sides.items():
                samples[side] += work()
        plain = statistics.median(next(iter(samples.values())))
        for side, values in samples.items():
            low, median, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
            rows.append(
                {
                    "what": what,
                    "side": side,
                    "median": median,
                    "p10": low,
                    "p90": high,
                    "unit": unit,
                    "ratio": plain / median,
                    "samples": values,
                }
            )
            print(row_text(rows[-1]), flush=True)

    compare(
        "loader, 5,000 images",
        "s",
        {
            side: lambda fast=side == "fast": loader_epochs(fast, device)
            for side in ("plain", "fast")
        },
    )
    for method, counts in {"MEMO": (1, 5, 10), "DER": (1, 5)}.items():
        for n in counts:
            names = PARTS if method == "MEMO" else ("plain", "fast")
            parts = {k: PARTS[k] for k in names if device != "cpu" or k != "CUDA graphs alone"}
            sides = {
                side: lambda fast=fast, n=n, method=method: training_steps(
                    method, n, fast, device, steps
                )
                for side, fast in parts.items()
            }
            if method == "MEMO" and n > 1:
                sides["fast, gradient stopped at frozen blocks"] = lambda n=n: training_steps(
                    "MEMO", n, FastPath(), device, steps, stop=True
                )
            compare(f"{method} training step, experience {n}", "s", sides)
    compare(
        "evaluation step, MEMO, experience 10",
        "s",
        {
            side: lambda fast=PARTS[side]: evaluation_steps(10, fast, device, steps)
            for side in ("plain", "fast")
        },
    )
    compare(
        "herding, 20 of 500 x 640",
        "s",
        {
            "Avalanche's": lambda: herding(False, 500, 640, 20),
            "ours": lambda: herding(True, 500, 640, 20),
        },
    )
    compare("herding, 20 of 1300 x 5120", "s", {"ours": lambda: herding(True, 1300, 5120, 20)})
    compare(
        "peak memory, MEMO, experience 10",
        "MB",
        {
            side: lambda fast=PARTS[side]: [in_new_process(peak_memory, 10, fast, device)]
            for side in ("plain", "fast")
        },
    )
    return rows


def growth(medians: dict[tuple[str, str], float]) -> dict[str, float]:
    """Return, per side, the seconds that one more frozen block adds to a training step of MEMO."""
    return {
        side: (
            medians["MEMO training step, experience 10", side]
            - medians["MEMO training step, experience 1", side]
        )
        / 9
        for side in PARTS
        if ("MEMO training step, experience 1", side) in medians
    }


def other_measures(rows: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """Measure what the rows leave out, and return what follows from both, by name."""
    medians = {(row["what"], row["side"]): row["median"] for row in rows}
    product, copy = ceilings(device)
    written = 5000 * 3 * 32 * 32 * 4 / medians["loader, 5,000 images", "fast"]
    return {
        "added_ms_per_frozen_block": {side: 1e3 * added for side, added in growth(medians).items()},
        "bf16_product_flops_per_s": product,
        "copy_bytes_per_s": copy,
        "share_of_product_by_experience": {
            n: training_flops(n) / medians[f"MEMO training step, experience {n}", "fast"] / product
            for n in (1, 5, 10)
        },
        "loader_share_of_copy": written / copy,
    }


def row_text(row: dict[str, Any]) -> str:
    """Return a row of the Markdown table."""
    numbers = [f"{row[key]:.4g}" for key in ("median", "p10", "p90")]
    cells = [row["what"], row["side"], *numbers, row["unit"], f"{row['ratio']:.2f}"]
    return f"| {' | '.join(cells)} |"


def notes(machine: str, others: dict[str, Any]) -> str:
    """Return what :func:`other_measures` found, in sentences."""
    added = "; ".join(
        f"{side} {value:.1f} ms" for side, value in others["added_ms_per_frozen_block"].items()
    )
    shares = ", ".join(
        f"{share:.0%} at experience {n}"
        for n, share in others["share_of_product_by_experience"].items()
    )
    return "\n\n".join(
        [
            f"\nResNet-32, batches of {BATCH}, loader included; {machine}.",
            f"One more frozen block adds to a step of MEMO: {added}.",
            "A product of two 4096 x 4096 matrices in bfloat16 reaches "
            f"{others['bf16_product_flops_per_s'] / 1e12:.3g} TFLOP/s. Of that, fast steps of "
            f"MEMO reach {shares}. A copy moves {others['copy_bytes_per_s'] / 1e9:.3g} GB/s; the "
            "fast loader writes its float32 batches at "
            f"{others['loader_share_of_copy']:.0%} of that.",
        ]
    )


def page(content: dict[str, Any]) -> str:
    """Return the page of what benchmark.json holds."""
    rows, text = map(row_text, content["rows"]), notes(content["machine"], content)
    return "\n".join(["# The fast path against plain training\n", _HEAD, *rows, text, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for benchmark.json and benchmark.md")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--steps", type=int, default=5, help="steps per turn")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args(arguments)
    try:
        at_least_one("rounds", options.rounds)
        at_least_one("steps", options.steps)
        check_device(options.device)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(_HEAD)
    rows = measure(options.device, options.rounds, options.steps)
    machine, others = describe(options.device), other_measures(rows, options.device)
    print(notes(machine, others))
    if options.out is not None:
        content = {"machine": machine, "rows": rows} | others
        write(options.out / "benchmark.md", page(content))
        write(options.out / "benchmark.json", json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
