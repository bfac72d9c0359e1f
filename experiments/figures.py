"""The figure and the table of one or several runs, from the contents of their results.json."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "METHOD_NAMES",
    "accuracy_figure",
    "accuracy_table",
    "new_figure",
    "protocol_title",
    "save_figure",
]

METHOD_NAMES = {
    "memo": "MEMO",
    "der": "DER",
    "podnet": "PODNet",
    "ucir": "UCIR",
    "replay": "Replay",
    "finetune": "Finetune",
}


def _curves(results: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [
        (f"{METHOD_NAMES[result['config']['method']]} ({readout.upper()})", result[readout], result)
        for result in results
        for readout in ("cnn", "nme")
        if readout in result
    ]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, which belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG beside and rename it into place."""
    unfinished = path.with_name(path.name + ".part")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)


def protocol_title(config: Mapping[str, Any]) -> str:
    """Return what was learned, on which network, from a run's configuration."""
    return (
        f"{config['benchmark']}, Base-{config['base']} Inc-{config['increment']}, "
        f"{config['backbone']}, seed {config['seed']}"
    )


def accuracy_figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against the number of classes seen, a curve per method and readout."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for label, readout, result in _curves(results):
        seen = [sum(map(len, result["classes"][: i + 1])) for i in range(len(result["classes"]))]
        accuracy = [100 * value for value in readout["accuracy"]]
        axes.plot(
            seen,
            accuracy,
            marker="o",
            markersize=4,
            linestyle="--" if label.endswith("(NME)") else "-",
            label=f"{label}, average {100 * readout['average']:.1f} %",
        )
    axes.set_title(protocol_title(results[0]["config"]), fontsize=10)
    axes.set_xlabel("classes seen")
    axes.set_ylabel("top-1 accuracy over all classes seen (%)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    save_figure(figure, path)


def accuracy_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: accuracy after each experience in %, and memory at the end."""
    steps = max(len(result["classes"]) for result in results)
    head = ["method", *(str(i + 1) for i in range(steps)), "average", "last", "forgetting"]
    head += ["model MB", "exemplar MB", "minutes"]
    rows = []
    for label, readout, result in _curves(results):
        values = [*readout["accuracy"], readout["average"], readout["last"]]
        values.append(readout["forgetting_rate"][-1])
        memory = result["bytes"][-1]
        megabytes = [memory["parameter_bytes"], memory["exemplar_bytes"] or 0]
        minutes = sum(map(sum, result["seconds"].values())) / 60
        rows.append(
            [label]
            + [f"{100 * value:.2f}" for value in values]
            + [f"{size / 2**20:.2f}" for size in megabytes]
            + [f"{minutes:.1f}"]
        )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )
