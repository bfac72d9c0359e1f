"""Figures and tables of one or several runs, from the contents of their results.json."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from avalanche_memo.training.checkpoint import written_whole
from experiments.comparison import Group, Spread
from experiments.config import METHOD_NAMES

__all__ = [
    "accuracy_curves",
    "accuracy_figure",
    "accuracy_table",
    "confusion_matrices",
    "markdown",
    "memory_bars",
    "memory_curves",
    "new_figure",
    "protocol_title",
    "published_curves",
    "save_figure",
]

_READOUTS = {"cnn": "classifier (CNN)", "nme": "nearest mean of exemplars (NME)"}

# Okabe and Ito's colours, told apart by the colour-blind. As many markers as share no factor with
# them, so that the pairs repeat late.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for each name."""
    pairs = zip(names, cycle(_COLOURS), cycle(_MARKERS), strict=False)
    return {name: {"color": c, "marker": m, "markersize": 5} for name, c, m in pairs}


def _label_accuracy(axes: Axes) -> None:
    axes.set_xlabel("classes seen")
    axes.set_ylabel("top-1 accuracy over all classes seen (%)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)


def _curves(results: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [
        (f"{METHOD_NAMES[result['config']['method']]} ({readout.upper()})", result[readout], result)
        for result in results
        for readout in ("cnn", "nme")
        if readout in result
    ]


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """Return an empty figure of a size in inches, which belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(textwrap.fill(title, int(11 * width)), fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, as a whole."""
    with written_whole(path) as file:
        figure.savefig(file, format="png")


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
    curves = _curves(results)
    styles = _styles([label for label, _, _ in curves])
    for label, readout, result in curves:
        axes.plot(
            list(accumulate(map(len, result["classes"]))),
            [100 * value for value in readout["accuracy"]],
            **styles[label],
            linestyle="--" if label.endswith("(NME)") else "-",
            label=f"{label}, average {100 * readout['average']:.1f} %",
        )
    axes.set_title(protocol_title(results[0]["config"]), fontsize=10)
    _label_accuracy(axes)
    axes.legend(fontsize=8, loc="lower left")
    save_figure(figure, path)


def accuracy_curves(
    title: str, groups: Sequence[Group], curves: Mapping[str, Sequence[Group]]
) -> Figure:
    """Draw accuracy against classes seen, a panel per readout; bands are standard deviations.

    :param title: of the figure.
    :param groups: those to draw.
    :param curves: all groups by the name of their curve over memory, whose style they take.
    """
    readouts = _readouts(groups)
    figure = new_figure(5.2 * len(readouts), 4.4 + 0.12 * len(groups), title)
    styles = _styles(list(curves))
    for axes, readout in zip(_panels(figure, 1, readouts)[0], readouts, strict=True):
        for name, points in curves.items():
            drawn = [group for group in points if group in groups and readout in group.readouts]
            for group, line in zip(drawn, cycle(("-", "--", ":")), strict=False):
                mean, deviation = np.array(
                    [(spread.mean, spread.deviation or 0) for spread in group.accuracies(readout)]
                ).T
                style = styles[name] | {"linestyle": line, "label": group.name}
                axes.plot(group.seen, mean, **style, clip_on=False, zorder=3)
                if len(group.results) > 1:
                    band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                    axes.fill_between(group.seen, mean - deviation, mean + deviation, **band)
        _label_accuracy(axes)
        axes.set_xticks(groups[0].seen if len(groups[0].seen) <= 12 else groups[0].seen[::5])
    _finish(figure)
    return figure


def published_curves(
    title: str, rows: Sequence[tuple[str, str, Group, Mapping[str, Any]]]
) -> Figure:
    """Draw accuracy against classes seen, ours beside the published, a panel per readout.

    :param title: of the figure.
    :param rows: for each curve its name, its readout, our runs (a bar is a standard deviation), and
        the published ``accuracy`` in percent and its ``name``, as far as there are any.
    """
    drawn = {readout for _, readout, _, _ in rows}
    readouts = [readout for readout in _READOUTS if readout in drawn]
    figure = new_figure(5.2 * len(readouts), 4.8, title)
    panels = dict(zip(readouts, _panels(figure, 1, readouts)[0], strict=True))
    styles = _styles(list(dict.fromkeys(name for name, _, _, _ in rows)))
    for axes in panels.values():
        _label_accuracy(axes)
        axes.set_ylim(auto=True)
    for name, readout, group, published in rows:
        axes = panels[readout]
        _with_bars(axes, group.seen, group.accuracies(readout), **styles[name], label=name)
        if "accuracy" in published:
            hollow = {"linestyle": "--", "markerfacecolor": "white"}
            label = f"{published.get('name', name)}, published"
            axes.plot(group.seen, published["accuracy"], **styles[name], **hollow, label=label)
    _finish(figure)
    return figure


def memory_curves(title: str, curves: Mapping[str, Sequence[Group]]) -> Figure:
    """Draw average and last accuracy against memory; bars are standard deviations."""
    readouts = _readouts([group for points in curves.values() for group in points])
    figure = new_figure(5.2 * len(readouts), 7.2 + 0.12 * len(curves), title)
    styles = _styles(list(curves))
    measures = {"average": "average incremental", "last": "last"}
    for row, measure in zip(_panels(figure, 2, readouts), measures, strict=True):
        for axes, readout in zip(row, readouts, strict=True):
            for name, points in curves.items():
                measured = [group for group in points if readout in group.readouts]
                spreads = [group.percent(readout, measure) for group in measured]
                if measured:
                    places = [group.budget for group in measured]
                    _with_bars(axes, places, spreads, **styles[name], label=name)
            axes.set_xlabel("budget: model and exemplars (MB)")
            axes.set_ylabel(f"{measures[measure]} accuracy (%)")
            axes.grid(alpha=0.3)
    _finish(figure)
    return figure


def memory_bars(title: str, groups: Sequence[Group]) -> Figure:
    """Draw what each group holds after the last experience, model and exemplars, as measured."""
    figure = new_figure(8.4, 1.5 + 0.32 * len(groups), title)
    axes = figure.add_subplot()
    places = range(len(groups))
    model = [group.megabytes("parameter") for group in groups]
    axes.barh(places, model, height=0.7, color=_COLOURS[0], label="model (parameters)")
    axes.barh(
        places,
        [group.megabytes("exemplar") for group in groups],
        height=0.7,
        left=model,
        color="white",
        edgecolor=_COLOURS[1],
        hatch="////",
        label="exemplars",
    )
    for place, group in zip(places, groups, strict=True):
        total = group.megabytes("parameter", "exemplar")
        axes.annotate(
            f"{total:.3f}",
            (total, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, [group.name for group in groups])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("memory after the last experience (MB)")
    axes.spines[["top", "right"]].set_visible(False)
    _finish(figure)
    return figure


def confusion_matrices(group: Group) -> Figure:
    """Draw which class was taken for which after the last experience, in % of a class's samples.

    Counts are summed over the runs; lines divide experiences.
    """
    readouts = group.readouts
    figure = new_figure(4.6 * len(readouts) + 0.6, 5.1, group.name)
    panels = _panels(figure, 1, readouts)[0]
    for axes, readout in zip(panels, readouts, strict=True):
        counts = np.sum([result[readout]["confusion"] for result in group.results], axis=0)
        percent = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        # By the square root, so that a few samples among many classes can be seen.
        image = axes.imshow(percent, "Blues", PowerNorm(0.5, 0, 100), interpolation="nearest")
        for border in group.seen[:-1]:
            axes.axhline(border - 0.5, color="0.5", linewidth=0.5)
            axes.axvline(border - 0.5, color="0.5", linewidth=0.5)
        if len(counts) <= 12:
            for (row, column), value in np.ndenumerate(percent):
                if value >= 0.5:
                    colour = "white" if value > 30 else "black"
                    place = {"ha": "center", "va": "center", "color": colour}
                    axes.text(column, row, f"{value:.0f}", **place)
            axes.set_xticks(range(len(counts)))
            axes.set_yticks(range(len(counts)))
        axes.set_xlabel("predicted class, by appearance")
        axes.set_ylabel("class, by appearance")
    scale = {"ticks": (0, 1, 5, 20, 50, 100), "format": "%d", "shrink": 0.85}
    figure.colorbar(image, ax=panels, label="% of the class's samples", **scale)
    _finish(figure)
    return figure


def _with_bars(
    axes: Axes, places: Sequence[float], spreads: Sequence[Spread], **style: Any
) -> None:
    """Draw means, with their standard deviations as bars where there is any."""
    bars = [spread.deviation or 0 for spread in spreads]
    means = [spread.mean for spread in spreads]
    axes.errorbar(places, means, bars if any(bars) else None, **style, capsize=3)


def _readouts(groups: Sequence[Group]) -> list[str]:
    return [readout for readout in _READOUTS if any(readout in g.readouts for g in groups)]


def _panels(figure: Figure, rows: int, readouts: Sequence[str]) -> Any:
    """Return axes ``[rows, readouts]``, those of a row on one scale."""
    panels = figure.subplots(rows, len(readouts), squeeze=False, sharey="row")
    for axes, readout in zip(panels[0], readouts, strict=True):
        axes.set_title(_READOUTS[readout], fontsize=10)
    return panels


def _finish(figure: Figure) -> None:
    """Label scales once, and put one legend for all panels below them."""
    entries = {}
    for axes in figure.axes:
        if axes.get_subplotspec() is not None and not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        figure.legend(
            entries.values(),
            entries,
            loc="outside lower center",
            ncols=2 if max(map(len, entries)) < 6 * figure.get_figwidth() else 1,
            fontsize=9,
            frameon=False,
        )


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
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a Markdown table whose columns are aligned as plain text, too.

    :param texts: how many columns, from the left, hold text rather than numbers.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if i < texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (head, rule, *rows)
    )
