"""What pruning leaves of a run's network, and what that saves: parameters, channels, latency.

``python -m experiments.pruning RUN_FOLDER [RUN_FOLDER ...] --out DIR`` reads run folders of one
protocol, among them perhaps one without pruning, and writes ``pruning.md``, ``pruning.json`` and
``pruning.png``. Latency is measured on networks of the runs' structure, pruned and not in turn.
Leave the machine alone meanwhile.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avalanche_memo.budget import inference_bytes, parameter_bytes
from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.checkpoint import Checkpoint
from avalanche_memo.training.ranges import at_least_one
from experiments.building import make_network
from experiments.comparison import check_protocol
from experiments.config import EXPANDING, Config
from experiments.figures import markdown, new_figure, save_figure
from experiments.folders import finished, stored_config, write
from experiments.machine import check_device, default_device, describe, seconds

__all__ = ["latency", "main", "report", "survival"]

BATCHES = (1, 128)


def report(folders: Sequence[Path], device: str, rounds: int) -> list[dict[str, Any]]:
    """Return what each run's pruning left, as plain data; of a run without pruning, what it has.

    Latencies of all runs are measured in turn, so that they can be compared.

    :param folders: run folders with at least one finished experience each.
    :param device: where latency is measured.
    :param rounds: measurements of each latency.
    :raises ValueError: if a folder holds no run, or one of a network that does not expand, or runs
        have finished different numbers of experiences.
    """
    runs = [_read(folder) for folder in folders]
    done = [len(results["classes"]) for _, results, _ in runs]
    if len(set(done)) > 1:
        raise ValueError(
            "folders: expected runs that have finished equally many experiences, got "
            + ", ".join(f"{n} in {folder}" for n, folder in zip(done, folders, strict=True))
        )
    reports: list[dict[str, Any]] = []
    for folder, (config, results, structure) in zip(folders, runs, strict=True):
        each = {
            "run": folder.name,
            "config": config.identity(),
            "accuracy": {k: results[k]["accuracy"] for k in ("cnn", "nme") if k in results},
            "experiences": [],
            "survival": survival(config, structure["kept"]) if config.sparsity_weight else {},
            "machine": describe(device),
        }
        reports.append(each)
    images = torch.randn(max(BATCHES), *_image_shape(runs[0][0]), device=device)
    for n in range(1, done[0] + 1):
        networks: dict[tuple[int, str], ExpandableNetwork] = {}
        for i, (config, _, structure) in enumerate(runs):
            sides = {"unpruned": replace(config, sparsity_weight=0.0)}
            if config.sparsity_weight:
                sides = {"pruned": config, **sides}
            own = {side: _network(its, structure, n) for side, its in sides.items()}
            row: dict[str, Any] = {
                "parameters": {k: parameter_bytes(v) // 4 for k, v in own.items()},
                "inference_bytes": {k: inference_bytes(v) for k, v in own.items()},
                "latency": {batch: {} for batch in BATCHES},
            }
            reports[i]["experiences"].append(row)
            for side, network in own.items():
                networks[i, side] = network.to(device).use(config.fast).eval()
        for batch in BATCHES:
            for (i, side), quantiles in latency(networks, images[:batch], rounds).items():
                reports[i]["experiences"][n - 1]["latency"][batch][side] = quantiles
    return reports


def _read(folder: Path) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """Return a run's configuration, its results and its network's structure."""
    for name in ("config.yaml", "results.json", "checkpoint.pt"):
        if not (folder / name).exists():
            raise ValueError(f"folder: expected a run folder with {name}, got {folder}")
    config = stored_config(folder)
    if config.method not in EXPANDING:
        raise ValueError(f"folder: expected a run of DER or MEMO, got {config.method} in {folder}")
    results = finished(folder) or json.loads((folder / "results.json").read_text())
    state, refused = Checkpoint(folder / "checkpoint.pt", config.fingerprint()).load()
    structure = {"growth": []} if state is None else state["model"]["_extra_state"]
    if len(structure["growth"]) < len(results["classes"]):
        raise ValueError(f"folder: expected a checkpoint of the last experience, {refused}")
    return config, results, structure


def _network(config: Config, structure: dict[str, Any], n: int) -> ExpandableNetwork:
    """Return an untrained network as it is after n experiences."""
    network = make_network(config)
    parts = ("growth", "kept") if network.masked else ("growth",)
    network.set_extra_state({part: structure[part][:n] for part in parts})
    return network


def _image_shape(config: Config) -> tuple[int, int, int]:
    sizes = {"digits": (1, 8, 8), "cifar100": (3, 32, 32)}
    return sizes.get(config.benchmark, (3, config.image_size, config.image_size))


@torch.no_grad()
def latency(
    networks: dict[tuple[int, str], ExpandableNetwork], images: torch.Tensor, rounds: int
) -> dict[tuple[int, str], list[float]]:
    """Return the 10th, 50th and 90th percentile of seconds per image of each network.

    :param networks: measured in turn, each round.
    :param images: the batch.
    :param rounds: measurements of each, after two that don't count.
    """
    measured: dict[tuple[int, str], list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 2):
        for name, network in networks.items():
            taken = seconds(partial(network, images), images.device)
            measured[name].append(taken / len(images))
    return {k: np.quantile(v[2:], [0.1, 0.5, 0.9]).tolist() for k, v in measured.items()}


def survival(config: Config, kept: Sequence[Sequence[Sequence[int]]]) -> dict[str, list[float]]:
    """Return, for each layer of a block, the part of its channels that each block has kept."""
    return {
        layer.name: [len(block[i]) / layer.convolution.out_channels for block in kept]
        for i, layer in enumerate(make_network(config).masks())
    }


_HOW = """\
Sum and mean are over all experiences, final is after the last. A layer is named by its stage, its
block there and its place in that block. The schedules are in the runs' config.yaml."""


def tables(reports: Sequence[dict[str, Any]]) -> str:
    """Return the reports as Markdown tables: all runs after the last experience, then each."""
    readouts = reports[0]["accuracy"]
    head = ["", *(f"{r.upper()} {what}, %" for r in readouts for what in ("average", "last"))]
    head += ["parameters, thousands", "kept, %", f"ms per image, batches of {BATCHES[-1]}"]
    rows = []
    for each in reports:
        accuracies = [100 * np.array(each["accuracy"][readout]) for readout in readouts]
        cells = [f"{v:.2f}" for found in accuracies for v in (found.mean(), found[-1])]
        last = each["experiences"][-1]
        side = "pruned" if each["survival"] else "unpruned"
        counts, seconds = last["parameters"], last["latency"][BATCHES[-1]]
        own, whole = (seconds[name][1] for name in (side, "unpruned"))
        cells += [f"{counts[side] / 1e3:,.1f}", f"{100 * counts[side] / counts['unpruned']:.1f}"]
        cells += [f"{1e3 * own:.3g}", f"{100 * own / whole:.0f}"]
        rows.append([each["run"], *cells])
    parts = ["# Pruned networks", _HOW]
    parts.append("After the last experience, beside a network without pruning:")
    parts.append(markdown([*head, "of the unpruned, %"], rows))
    return "\n\n".join([*parts, *(part for each in reports for part in _parts(each))]) + "\n"


def _parts(each: dict[str, Any]) -> list[str]:
    rows = each["experiences"]
    numbers = [str(i + 1) for i in range(len(rows))]
    sizes, times = [], []
    for side in rows[0]["parameters"]:
        counts = [row["parameters"][side] / 1e3 for row in rows]
        summary = [sum(counts), sum(counts) / len(counts), counts[-1]]
        sizes.append([side, *(f"{count:,.1f}" for count in counts + summary)])
    for readout, accuracies in each["accuracy"].items():
        values = [100 * accuracy for accuracy in accuracies[: len(rows)]]
        cells = [f"{v:.2f}" for v in [*values, sum(values) / len(values), values[-1]]]
        sizes.append([f"accuracy ({readout.upper()}), %", *cells[:-2], "", *cells[-2:]])
    for batch in BATCHES:
        for side in rows[0]["parameters"]:
            cells = []
            for row in rows:
                low, median, high = (1e3 * value for value in row["latency"][batch][side])
                cells.append(f"{median:.3g} ({low:.3g} to {high:.3g})")
            times.append([str(batch), side, *cells])
    parts = [f"## {each['run']}", "Parameters, in thousands:"]
    parts.append(markdown(["", *numbers, "sum", "mean", "final"], sizes))
    parts.append("Latency per image, in ms: median (10 % to 90 %):")
    parts += [markdown(["batch", "", *numbers], times, 2), each["machine"] + "."]
    kept = [[k, *(f"{100 * part:.0f}" for part in v)] for k, v in each["survival"].items()]
    if kept:
        parts += ["Channels kept by each block, in %:", markdown(["layer", *numbers], kept)]
    return parts


def draw(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy, parameters and latency against the number of experiences.

    A network without pruning is drawn once for all runs that have the same.
    """
    figure = new_figure(14.4, 3.6)
    accuracy, *axes = figure.subplots(1, 2 + len(BATCHES))
    readout = next(iter(reports[0]["accuracy"]))
    drawn: list[list[float]] = []
    for index, each in enumerate(reports):
        rows = each["experiences"]
        numbers = range(1, len(rows) + 1)
        colour = f"C{index}" if each["survival"] else "black"
        values = [100 * value for value in each["accuracy"][readout]]
        accuracy.plot(numbers, values, color=colour, marker="o", markersize=3)
        for side in rows[0]["parameters"]:
            pruned = side == "pruned"
            counts = [row["parameters"][side] / 1e6 for row in rows]
            if not pruned and counts in drawn:
                continue
            label = each["run"]
            if not pruned and each["survival"]:
                label = f"{label}, without pruning" if drawn else "without pruning"
            own_colour = colour if pruned or drawn else "black"
            look: dict[str, Any] = {"color": own_colour, "marker": "o", "markersize": 3}
            look["linestyle"] = "-" if pruned else "--"
            if not pruned:
                drawn.append(counts)
            axes[0].plot(numbers, counts, label=label, **look)
            for batch, panel in zip(BATCHES, axes[1:], strict=True):
                low, median, high = 1e3 * np.array([row["latency"][batch][side] for row in rows]).T
                panel.plot(numbers, median, label=label, **look)
                panel.fill_between(numbers, low, high, color=look["color"], alpha=0.15, linewidth=0)
    accuracy.set_title(f"accuracy ({readout.upper()}, %)", fontsize=10)
    titles = ["parameters (millions)"]
    titles += [f"latency per image, batches of {batch} (ms)" for batch in BATCHES]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_ylim(bottom=0)
    for panel in (accuracy, *axes):
        panel.set_xlabel("experiences")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, path)


def _check_alike(folders: Sequence[Path]) -> None:
    """Check that runs are of one protocol and one backbone."""
    configs = {
        str(folder): stored_config(folder).identity()
        for folder in folders
        if (folder / "config.yaml").exists()
    }
    check_protocol(configs)
    backbones = sorted({config["backbone"] for config in configs.values()})
    if len(backbones) > 1:
        raise ValueError(f"folders: expected runs of one backbone, got {', '.join(backbones)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on run folders."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pruning", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each latency")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args(arguments)
    try:
        at_least_one("rounds", options.rounds)
        check_device(options.device)
        _check_alike(options.folders)
        reports = report(options.folders, options.device, options.rounds)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    page = tables(reports)
    write(options.out / "pruning.md", page)
    write(options.out / "pruning.json", json.dumps(reports, indent=1) + "\n")
    draw(reports, options.out / "pruning.png")
    print(page)


if __name__ == "__main__":
    main()
