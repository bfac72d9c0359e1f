"""A report on finished runs: tables, figures, and one HTML page that shows them all.

``python -m experiments.report FOLDER... --out DIR`` reads run folders, or folders that hold some.
Runs that differ in the seed alone are put together: mean and sample standard deviation. Runs that
are not finished are left out, with a line that says so. Runs of different protocols are refused.

=====================  =============================================================
``index.html``         the page; everything is in it, and it asks for nothing else
``report.md``          the tables in Markdown
``tables.tex``         the tables in LaTeX, for booktabs and graphicx
``results.csv``        a line per group and readout: means and standard deviations
``figures/``           each figure as SVG and PDF
=====================  =============================================================
"""

import argparse
import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from avalanche_memo.training.checkpoint import written_whole
from experiments.comparison import (
    Group,
    areas,
    budgets,
    check_distinct,
    check_protocol,
    curves,
    group,
    read,
    settings,
)
from experiments.figures import (
    accuracy_curves,
    confusion_matrices,
    markdown,
    memory_bars,
    memory_curves,
)
from experiments.folders import write

__all__ = ["main", "report"]

_ACCURACY = (
    "Top-1 accuracy over all classes seen, in %. Average: over the experiences; last: after the "
    "last one. Forgetting: how far a class has fallen, on average, below its own best, in points. "
    "CNN reads the classifier, NME the nearest mean of exemplars."
)
_MEMORY = (
    "Memory is that after the last experience, in MB of 2²⁰ bytes: parameters of the model, "
    "pixels (or encoded bytes) of the exemplars."
)
_BUDGET = (
    "Budget is the published accounting, at which methods are aligned: the parameters without the "
    "classifier, and the memory's size in raw images, though equal shares of the classes leave a "
    "rest of it."
)
_AREA = (
    "Area under the average (AUC-A) or last (AUC-L) accuracy, as a fraction, over the budget in "
    "MB, by the trapezoid rule. Areas over different ranges cannot be compared."
)


@dataclass(frozen=True)
class _Table:
    """Cells as text; the first ``texts`` columns are no numbers."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    texts: int

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.note}\n\n{markdown(self.head, self.rows, self.texts)}\n"

    def latex(self) -> str:
        columns = "l" * self.texts + "r" * (len(self.head) - self.texts)
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in (self.head, *self.rows)]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_latex(self.title)}. {_latex(self.note)}}}",
                r"\resizebox{\linewidth}{!}{%",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}}",
                r"\end{table}",
            ]
        )

    def html(self) -> str:
        def line(row: list[str], tag: str) -> str:
            kinds = ["text" if i < self.texts else "number" for i in range(len(row))]
            return "".join(
                f'<{tag} class="{kind}">{escape(cell)}</{tag}>'
                for kind, cell in zip(kinds, row, strict=True)
            )

        heading = f"<h2>{escape(self.title)}</h2>\n<p>{escape(self.note)}</p>\n"
        if not self.rows:
            return heading
        rows = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in self.rows)
        return (
            f'{heading}<div class="wide"><table>\n<thead><tr>{line(self.head, "th")}</tr></thead>'
            f"\n<tbody>\n{rows}</tbody></table></div>\n"
        )


def report(
    folders: Sequence[Path],
    out: Path,
    allow: Sequence[str] = (),
    average: Sequence[str] = ("seed",),
) -> Path:
    """Write the report on the runs in some folders; return the page's path.

    :param folders: run folders, or folders that hold some.
    :param out: where the report goes.
    :param allow: options of the protocol that may differ, for instance ``first`` and ``later``
        where methods have schedules of their own.
    :param average: options averaged over: ``seed``, and perhaps ``class_order_seed``.
    :raises ValueError: if there is no finished run, one occurs twice, or runs are of different
        protocols.
    """
    runs, left_out = read(folders)
    configs = {name: run["config"] for name, run in runs.items()}
    check_distinct(configs)
    check_protocol(configs, allow, average)
    groups = group(runs, average)
    sizes = {tuple(map(len, result["classes"])) for result in runs.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"runs: expected the same experiences, got {' and '.join(map(str, sorted(sizes)))} "
            "classes each"
        )
    tables = [_summary(groups), _steps(groups), _areas(groups), _settings(runs)]
    title = _title(groups[0].results[0])
    figures = _figures(title, groups)
    notes = [*_notes(groups), *left_out]

    (out / "figures").mkdir(parents=True, exist_ok=True)
    pictures = {
        name: (caption, _save(figure, out / "figures" / name))
        for name, (caption, figure) in figures.items()
    }
    for path in (out / "figures").iterdir():  # Of an earlier report, on more runs.
        if re.fullmatch(r"(accuracy|confusion)-\d+", path.stem) and path.stem not in figures:
            path.unlink()
    text = "\n".join([f"# {title}\n", *(f"- {note}" for note in notes), ""])
    filled = [table for table in tables if table.rows]
    write(out / "report.md", "\n".join([text, *(table.markdown() for table in filled)]))
    write(out / "tables.tex", "\n\n".join(table.latex() for table in filled) + "\n")
    write(out / "results.csv", _csv(groups))
    page = out / "index.html"
    write(page, _page(title, notes, tables, pictures))
    return page


def _names(own: Group, readout: str) -> list[str]:
    return [own.method, own.backbone, own.memory, readout.upper()]


def _measured(own: Group) -> list[float]:
    """Return the memory held after the last experience in MB: model, exemplars, both."""
    return [
        own.megabytes(*kinds) for kinds in (["parameter"], ["exemplar"], ["parameter", "exemplar"])
    ]


def _summary(groups: Sequence[Group]) -> _Table:
    head = ["method", "backbone", "memory", "readout", "runs", "average", "last", "forgetting"]
    head += ["budget MB", "model MB", "exemplar MB", "total MB", "seconds"]
    rows = [
        [
            *_names(own, readout),
            str(len(own.results)),
            *(
                own.percent(readout, name).text(2)
                for name in ("average", "last", "forgetting_rate")
            ),
            f"{own.budget:.3f}",
            *(f"{megabytes:.3f}" for megabytes in _measured(own)),
            own.seconds.text(0),
        ]
        for own in groups
        for readout in own.readouts
    ]
    seconds = "Seconds: training and evaluation. ± is a standard deviation."
    note = f"{_ACCURACY} {_MEMORY} {_BUDGET} {seconds}"
    return _Table("Accuracy and memory", note, head, rows, texts=4)


def _steps(groups: Sequence[Group]) -> _Table:
    head = ["method", "backbone", "memory", "readout", *map(str, groups[0].seen)]
    decimals = 2 if all(len(own.results) == 1 for own in groups) else 1  # For the table's width.
    rows = [
        [*_names(own, readout), *(spread.text(decimals) for spread in own.accuracies(readout))]
        for own in groups
        for readout in own.readouts
    ]
    note = "Top-1 accuracy in % over all classes seen, by the number of classes seen."
    return _Table("Accuracy after each experience", note, head, rows, texts=4)


def _areas(groups: Sequence[Group]) -> _Table:
    rows = []
    for name, points in curves(groups).items():
        for readout in ("cnn", "nme"):
            measured = [own for own in points if readout in own.readouts]
            found = [areas(measured, readout, measure) for measure in ("average", "last")]
            if found[0] is not None:
                megabytes = [own.budget for own in measured]
                rows.append(
                    [
                        *(name, readout.upper(), str(len(measured))),
                        *(f"{end(megabytes):.3f}" for end in (min, max)),
                        *(area.text(3) for area in found if area),
                    ]
                )
    head = ["method", "readout", "points", "from MB", "to MB", "AUC-A", "AUC-L"]
    note = _AREA if rows else "No area under accuracy: no method has two sizes of memory."
    return _Table("Accuracy over memory", note, head, rows, texts=2)


def _settings(runs: dict[str, dict[str, Any]]) -> _Table:
    rows = [
        [name, value, ", ".join(methods) if len(values) > 1 else "all"]
        for name, values in settings(runs).items()
        for value, methods in values.items()
    ]
    note = "All options that depart from their defaults, by method."
    return _Table("Settings", note, ["option", "value", "methods"], rows, texts=3)


def _title(result: dict[str, Any]) -> str:
    config = result["config"]
    classes = sum(map(len, result["classes"]))
    return (
        f"{config['benchmark']}, Base-{config['base']} Inc-{config['increment']}: "
        f"{classes} classes in {len(result['classes'])} experiences"
    )


def _notes(groups: Sequence[Group]) -> list[str]:
    """Return what a reader must know of the runs, a line each."""
    results = [result for own in groups for result in own.results]
    seeds = sorted({result["config"]["seed"] for result in results})
    orders = sorted({_class_order(result["config"]) for result in results})
    places = sorted(
        "{device}, CPU threads {threads}, torch {torch}".format(**result["environment"])
        for result in results
    )
    notes = [
        f"runs: {len(results)}; seeds: {', '.join(map(str, seeds))}; "
        f"class order: {', '.join(orders)}",
        "run on " + "; ".join(dict.fromkeys(places)),
    ]
    for own in groups:
        if not _has_confusion(own):
            notes.append(f"{own.name}: no confusion matrix, the runs are older than it")
    return notes


def _class_order(config: Mapping[str, Any]) -> str:
    return "as given" if config["class_order"] else f"seed {config['class_order_seed']}"


def _has_confusion(own: Group) -> bool:
    return all("confusion" in result[readout] for result in own.results for readout in own.readouts)


def _figures(title: str, groups: Sequence[Group]) -> dict[str, tuple[str, Figure]]:
    """Return captions and figures by file name."""
    found = curves(groups)
    figures = {}
    for number, members in enumerate(budgets(found), start=1):
        sizes = sorted(own.budget for own in members)
        ends = dict.fromkeys(f"{size:.2f}" for size in (sizes[0], sizes[-1]))
        figures[f"accuracy-{number}"] = (
            "Accuracy over the classes seen; bands: standard deviation over the runs. "
            f"Budget: {' to '.join(ends)} MB.",
            accuracy_curves(title, members, found),
        )
    figures["memory-curves"] = (
        "Accuracy against the budget; bars: standard deviation over the runs.",
        memory_curves(title, found),
    )
    figures["memory-bars"] = _MEMORY, memory_bars(title, groups)
    for number, own in enumerate(filter(_has_confusion, groups), start=1):
        figures[f"confusion-{number}"] = (
            "Which class was taken for which after the last experience, over all runs. "
            "Lines divide the experiences.",
            confusion_matrices(own),
        )
    return figures


def _save(figure: Figure, path: Path) -> bytes:
    """Write the figure as PDF and SVG, the same bytes for the same figure; return the SVG."""
    dates = {"svg": "Date", "pdf": "CreationDate"}
    with rc_context({"svg.hashsalt": path.name}):
        for kind, date in dates.items():
            with written_whole(path.with_suffix(f".{kind}")) as file:
                figure.savefig(file, format=kind, metadata={date: None})
    return path.with_suffix(".svg").read_bytes()


def _csv(groups: Sequence[Group]) -> str:
    text = io.StringIO()
    steps = [f"after_{seen}_classes" for seen in groups[0].seen]
    names = ["average", "last", "forgetting", *steps, "seconds"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "backbone", "memory", "readout", "runs", "budget_mb"]
        + ["model_mb", "exemplar_mb", "total_mb"]
        + [column for name in names for column in (name, f"{name}_deviation")]
    )
    for own in groups:
        for readout in own.readouts:
            spreads = [own.percent(readout, n) for n in ("average", "last", "forgetting_rate")]
            spreads += [*own.accuracies(readout), own.seconds]
            row = [*_names(own, readout), len(own.results), own.budget, *_measured(own)]
            writer.writerow(row + [value for spread in spreads for value in spread])
    return text.getvalue()


def _latex(text: str) -> str:
    """Return text with LaTeX's own characters escaped."""
    names = {"\\": "backslash", "^": "asciicircum", "~": "asciitilde"}
    escapes = {character: "\\" + character for character in "&%#_{}$"}
    escapes |= {character: rf"\text{name}{{}}" for character, name in names.items()}
    text = text.translate(str.maketrans(escapes))
    return text.replace("2²⁰", "$2^{20}$").replace("±", r"$\pm$")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 80rem; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p, li { max-width: 50rem; } p, li, figcaption { color: #444; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; border-top: 2px solid; border-bottom: 2px solid; }
th { font-weight: 600; border-bottom: 1px solid; vertical-align: bottom; }
th, td { padding: .2rem .5rem; white-space: nowrap; }
.text { text-align: left; } .number { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr:nth-child(even) { background: #f5f5f5; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { font-size: .87rem; max-width: 50rem; }
"""  # noqa: E501


def _page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[_Table],
    pictures: dict[str, tuple[str, bytes]],
) -> str:
    summary, steps, area, options = (table.html() for table in tables)

    def show(kind: str) -> str:
        return "".join(
            f'<figure id="{name}"><img alt="{escape(caption)}" '
            f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>\n"
            for name, (caption, svg) in pictures.items()
            if name.startswith(kind)
        )

    items = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    # The policy lets the page load nothing that is not in it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<ul>
{items}</ul>
{summary}{show("accuracy")}{steps}{area}{show("memory")}
<h2>Confusion</h2>
{show("confusion")}{options}</body></html>
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a command line and print where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Tables and figures of finished runs."
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of some")
    parser.add_argument("--out", required=True, type=Path, help="where the report goes")
    parser.add_argument(
        "--allow", nargs="+", default=[], help="options of the protocol that may differ"
    )
    parser.add_argument(
        "--average", nargs="+", default=["seed"], help="options averaged over (default: seed)"
    )
    options = parser.parse_args(arguments)
    try:
        page = report(options.folders, options.out, options.allow, options.average)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print((page.parent / "report.md").read_text())
    print(f"Report: {page}")


if __name__ == "__main__":
    main()
