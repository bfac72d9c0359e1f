"""Methods' released code beside ours: the same protocol, schedule and seeds, one table.

``python -m experiments.released CLONE --data_root data --out FOLDER`` trains both in turn. CLONE
holds https://github.com/G-U-N/PyCIL or, for MEMO, https://github.com/wangkiw/ICLR23-MEMO, whose
code runs as it is but for three things: in one process on the CPU; with the backbone, classes and
schedule of the configuration; and with torch seeded by its seed instead of always by 1. Runs that
are finished are not repeated. Further options change the configuration, as in experiments.run.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.data import DataLoader

from avalanche_memo.training import Phase
from experiments.building import data_root
from experiments.comparison import Spread
from experiments.config import METHOD_NAMES, Config, from_options, parse
from experiments.figures import markdown
from experiments.folders import compact, refuse_other, write
from experiments.machine import describe, in_new_process
from experiments.run import check, run

__all__ = ["main", "released_settings", "run_released", "table"]

METHODS = ("memo", "icarl", "wa", "replay")
"""Methods that both train in one phase."""

READOUTS = ("cnn", "nme")

_TOLD = {
    *("method", "against", "benchmark", "data_root", "base", "increment", "classes"),
    *("class_order_seed", "backbone", "mem_size", "exemplars_per_class", "train_generalized"),
    *("auxiliary_weight", "batch_size", "lr", "weight_decay", "first", "later", "seed"),
    *("clip_weights", "device", "fast", "keep_models", "run_folder"),
}
"""Options that the released code is told, that change nothing that is learned, or that are checked
for the one method that has them (clip_weights)."""

_CONFIG = Path(__file__).parent / "configs" / "released_cifar100.yaml"

_Accuracy = dict[str, list[float]]
"""By readout, in % after each experience."""

_Accuracies = dict[str, dict[str, dict[str, _Accuracy]]]
"""By method, side ("released" or "ours") and seed."""


def released_settings(config: Config) -> dict[str, Any]:
    """Return the released code's names for a configuration's settings, and their values.

    :raises ValueError: if they cannot say what it is to train.
    """
    for name, good, expected in (
        ("method", config.method in METHODS, f"one of {', '.join(METHODS)}"),
        ("benchmark", config.benchmark == "cifar100", "cifar100"),
        ("base", config.base == 0, "0"),
        ("backbone", config.backbone.startswith("resnet"), "resnet14 or another of CIFAR's"),
        ("first", len(config.first) == 1, "one phase"),
        ("later", len(config.later) == 1, "one phase"),
        ("clip_weights", config.method != "wa" or config.clip_weights is False, "False for wa"),
    ):
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)}")
    usual = Config(method=config.method, against=[])
    for name in (each.name for each in fields(Config) if each.name not in _TOLD):
        if getattr(config, name) != getattr(usual, name):
            raise ValueError(
                f"{name}: expected {getattr(usual, name)}, which the released code has, "
                f"got {getattr(config, name)}"
            )
    (first,), (later,) = [
        [_full(phase, config) for phase in phases] for phases in (config.first, config.later)
    ]
    return {
        "dataset": config.benchmark,
        "model_name": config.method,
        "convnet_type": "memo_resnet32" if config.method == "memo" else "resnet32",
        "init_cls": config.increment,
        "increment": config.increment,
        "shuffle": True,
        "seed": [config.class_order_seed],
        "memory_size": config.mem_size,
        "memory_per_class": config.exemplars_per_class,
        "fixed_memory": config.exemplars_per_class is not None,
        "train_base": config.train_generalized,
        "train_adaptive": False,
        "alpha_aux": config.auxiliary_weight,
        "batch_size": config.batch_size,
        "num_workers": 0,
        "scheduler": "steplr",
        "init_epoch": first.epochs,
        "init_lr": first.lr,
        "init_milestones": list(first.milestones),
        "init_lr_decay": first.gamma,
        "init_weight_decay": first.weight_decay,
        "epochs": later.epochs,
        "lrate": later.lr,
        "milestones": list(later.milestones),
        "lrate_decay": later.gamma,
        "weight_decay": later.weight_decay,
        "device": [-1],
        "prefix": "benchmark",
        "debug": False,
        "skip": False,
    }


def _full(phase: Phase, config: Config) -> Phase:
    """Return a phase with the rates that it takes from the configuration.

    :raises ValueError: if it has more than epochs, rates and milestones.
    """
    lr = config.lr if phase.lr is None else phase.lr
    decay = config.weight_decay if phase.weight_decay is None else phase.weight_decay
    full = replace(phase, lr=lr, weight_decay=decay)
    told = Phase(phase.epochs, lr, decay, milestones=phase.milestones, gamma=phase.gamma)
    if full != told:
        raise ValueError(f"first, later: expected epochs, rates and milestones alone, got {phase}")
    return full


def run_released(clone: Path, config: Config) -> _Accuracy:
    """Train with the released code and return its accuracy.

    In a process of its own: it leaves modules called ``models`` and ``utils`` behind, and another
    working directory.
    """
    settings, root = released_settings(config), Path(data_root(config) or "").absolute()
    sys.path.insert(0, str(clone.absolute()))
    names = ("trainer", "models.base", f"models.{config.method}", "utils.inc_net")
    trainer, base, method, networks = map(importlib.import_module, names)
    depth = int(config.backbone.removeprefix("resnet"))
    found: _Accuracy = {readout: [] for readout in READOUTS}
    patches = [
        # A method's module has its settings as constants, or reads them from the arguments.
        *((method, name, value) for name, value in settings.items() if hasattr(method, name)),
        *((module, "DataLoader", _loader_in_process) for module in (base, method)),
        (networks, "resnet32", partial(_resnet, depth)),
        (networks, "get_memo_resnet32", partial(_memo_resnet, depth)),
        (trainer, "_set_device", lambda args: args.update(device=[torch.device("cpu")])),
        (trainer, "_set_random", lambda: torch.manual_seed(config.seed)),
        (trainer.factory, "get_model", partial(_noting, found, trainer.factory.get_model)),
        (trainer.DataManager, "nb_tasks", (config.classes or 100) // config.increment),
    ]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for owner, name, value in patches:
            stack.enter_context(patch.object(owner, name, value))
        for name in ("save_results", "save_fc", "save_time"):
            stack.enter_context(patch.object(trainer, name, create=True))
        # It reads and writes beside where it is called.
        (Path(folder) / "data").symlink_to(root)
        os.chdir(folder)
        trainer.train(settings)
    return found


def _loader_in_process(*arguments: Any, **options: Any) -> Any:
    return DataLoader(*arguments, **options | {"num_workers": 0})


def _resnet(depth: int) -> Any:
    backbones = importlib.import_module("convs.cifar_resnet")
    return backbones.CifarResNet(backbones.ResNetBasicblock, depth)


def _memo_resnet(depth: int) -> tuple[Any, Any]:
    backbones = importlib.import_module("convs.memo_cifar_resnet")
    block = backbones.ResNetBasicblock
    generalized = backbones.GeneralizedResNet_cifar(block, depth)
    return generalized, backbones.SpecializedResNet_cifar(block, depth)


def _noting(found: _Accuracy, make: Callable[..., Any], *arguments: Any) -> Any:
    """Make a learner that notes its accuracy when it is evaluated."""
    learner = make(*arguments)
    evaluate = learner.eval_task

    def eval_task(**options: Any) -> Any:
        accuracy = evaluate(**options)
        for readout, figures in zip(READOUTS, accuracy, strict=True):
            found[readout].append(float(figures["top1"]))
        return accuracy

    learner.eval_task = eval_task
    return learner


def run_ours(config: Config) -> _Accuracy:
    """Train with this package, on the CPU too, and return its accuracy."""
    results = run(replace(config, device="cpu"))
    return {name: [round(100 * a, 2) for a in results[name]["accuracy"]] for name in READOUTS}


def table(accuracies: _Accuracies, increment: int) -> str:
    """Return a Markdown table: mean and sample standard deviation over the seeds, by classes seen.

    Where both sides have several seeds, the difference has its standard error.
    """
    rows = []
    for method, sides in accuracies.items():
        for readout in READOUTS:
            start, both = [METHOD_NAMES[method], readout.upper()], []
            for side, runs in sides.items():
                figures = zip(*(run[readout] for run in runs.values()), strict=True)
                both.append((len(runs), [Spread.of(column) for column in figures]))
                n, spreads = both[-1]
                rows.append([*start, side, str(n), *(spread.text(2) for spread in spreads)])
            if len(both) == 2:
                rows.append([*start, "difference", "", *_differences(*both)])
    seen = [f"{increment * (i + 1)} classes" for i in range(max(map(len, rows)) - 4)]
    return markdown(["method", "readout", "side", "seeds", *seen], rows, 3)


def page(content: dict[str, Any]) -> str:
    """Return what is compared, and how, around the table."""
    config = content["config"]
    epochs = " and then ".join(str(config[when][0]["epochs"]) for when in ("first", "later"))
    commits = ", ".join(f"{METHOD_NAMES[m]} {commit}" for m, commit in content["commits"].items())
    protocol = (
        f"CIFAR-100, {config['classes'] or 100} classes of Base-{config['base']} "
        f"Inc-{config['increment']}, {config['backbone']}, {config['mem_size']} exemplars, "
        f"{epochs} epochs, batches of {config['batch_size']}. Top-1 accuracy in %, mean ± sample "
        "standard deviation over the seeds; the difference is ours minus released, with its "
        "standard error."
    )
    origin = f"{content['machine']}. Commits of the released code: {commits}."
    rows = table(content["accuracy"], config["increment"])
    return "\n\n".join(["# Released code beside ours", fill(protocol, 100), rows, origin]) + "\n"


def _differences(released: tuple[int, list[Spread]], ours: tuple[int, list[Spread]]) -> list[str]:
    texts = []
    for a, b in zip(released[1], ours[1], strict=True):
        text = f"{b.mean - a.mean:+.2f}"
        if a.deviation is not None and b.deviation is not None:
            error = math.hypot(a.deviation / released[0] ** 0.5, b.deviation / ours[0] ** 0.5)
            text += f" ± {error:.2f}"
        texts.append(text)
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not finished, and write the accuracies and their table after each run."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.released",
        description="Released code beside ours.",
        epilog="Further options are those of experiments.run, such as --data_root or --classes.",
    )
    parser.add_argument("clone", type=Path, help="a clone of the released code")
    parser.add_argument("--config", type=Path, default=_CONFIG, help="the protocol (YAML)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, required=True, help="for released.json and released.md")
    options, further = parser.parse_known_args(arguments)
    protocol = parse(["--config", str(options.config), *further])
    try:
        if protocol.run_folder is not None:
            raise ValueError(
                f"run_folder: expected none, each run has its own, got {protocol.run_folder}"
            )
        for seed in options.seeds:
            replace(protocol, seed=seed)  # Refuses what is no seed.
        for method in options.methods:
            module = options.clone / "models" / f"{method}.py"
            if not module.exists():
                raise ValueError(f"clone: expected released code, got a folder without {module}")
            config = replace(protocol, method=method, against=[])
            released_settings(config)
            check(config)
        _compare(options, protocol)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _compare(options: argparse.Namespace, protocol: Config) -> None:
    path = options.out / "released.json"
    own = {k: v for k, v in protocol.identity().items() if k not in ("method", "seed")}
    content: dict[str, Any] = {"config": own, "accuracy": {}}
    if path.exists():
        content = json.loads(path.read_text())
        # It may have been begun before there were all of today's options.
        stored = from_options({"against": []} | content["config"]).identity()
        content["config"] = {name: stored[name] for name in own}
        refuse_other("out", options.out, content["config"], own)
    commits = content.setdefault("commits", {})
    commit = _commit(options.clone)
    for method in options.methods:
        if commits.setdefault(method, commit) != commit:
            raise ValueError(
                f"clone: expected commit {commits[method]}, of which {path} has runs, got {commit}"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    sides = {"released": partial(in_new_process, run_released, options.clone), "ours": run_ours}
    for seed in options.seeds:
        for method in options.methods:
            config = replace(protocol, method=method, against=[], seed=seed)
            for side, train in sides.items():
                runs = content["accuracy"].setdefault(method, {}).setdefault(side, {})
                if str(seed) not in runs:
                    runs[str(seed)] = train(config)
                    machines = [*content.get("machine", "").split("; "), describe("cpu")]
                    content["machine"] = "; ".join(dict.fromkeys(filter(None, machines)))
                    write(path, compact(content))
                    write(options.out / "released.md", page(content))
    print((options.out / "released.md").read_text())


def _commit(clone: Path) -> str:
    git = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    shown = subprocess.run(git, capture_output=True, text=True, check=False)
    return shown.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
