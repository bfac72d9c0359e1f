"""Published figures beside ours: a page from a list of them and the run folders beside it.

``python -m experiments.reproduction experiments/results/published.yaml`` writes REPRODUCTION.md and
its figures beside the list, which is YAML::

    title: Published figures beside ours
    text: what holds for all sections, in Markdown
    sections:
      - title: MEMO
        text: in Markdown
        figure: memo.png
        rows:
          - name: ResNet-32, 3312 exemplars
            source: the paper, figure 5
            # In %; each may be left out, and so may what it is called, if otherwise than ours.
            published: {name: figure 5, average: 72.1, last: 62.1, accuracy: [...]}
            readout: cnn
            runs: [memo_seed1, memo_seed2]  # folders that differ in the seed alone

Rows of one name are one method's readouts.
"""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from experiments.comparison import Group, check_distinct, group, read
from experiments.config import read_yaml
from experiments.figures import markdown, published_curves, save_figure
from experiments.folders import write

__all__ = ["main", "page"]

_SECTION = {"title", "text", "figure", "rows"}
_ROW = {"name", "source", "published", "readout", "runs"}
_PUBLISHED = ("name", "average", "last", "accuracy")


@dataclass(frozen=True)
class _Row:
    name: str
    source: str
    published: Mapping[str, Any]
    readout: str
    folders: tuple[Path, ...]
    own: Group

    @classmethod
    def of(cls, row: Mapping[str, Any], base: Path) -> "_Row":
        _keys("rows", row, _ROW)
        for name, kind, what in (("published", dict, "a mapping"), ("runs", list, "a list")):
            if not isinstance(row[name], kind):
                raise ValueError(f"{name}: expected {what}, got {row[name]}")
        if unknown := set(row["published"]).difference(_PUBLISHED):
            raise ValueError(f"published: expected some of {', '.join(_PUBLISHED)}, got {unknown}")
        runs, unfinished = read([base / run for run in row["runs"]])
        check_distinct({name: run["config"] for name, run in runs.items()})
        folders = tuple(map(Path, runs))
        groups = group(runs)
        if unfinished or len(groups) != 1:
            found = unfinished or [own.name for own in groups]
            raise ValueError(f"runs: expected finished ones that differ in the seed, got {found}")
        if row["readout"] not in groups[0].readouts:
            raise ValueError(
                f"readout: expected one of {', '.join(groups[0].readouts)}, got {row['readout']}"
            )
        return cls(row["name"], row["source"], row["published"], row["readout"], folders, groups[0])

    def compared(self, name: str) -> list[str]:
        """Return the cells published, ours, and difference."""
        ours = self.own.percent(self.readout, name)
        if name not in self.published:
            return ["", ours.text(2), ""]
        published = float(self.published[name])
        return [f"{published:.2f}", ours.text(2), f"{ours.mean - published:+.2f}"]

    def steps(self) -> list[list[str]]:
        """Return a line with the published accuracy after each experience, and one with ours."""
        start = [self.name, self.readout.upper()]
        ours = [spread.text(2) for spread in self.own.accuracies(self.readout)]
        lines = [[*start, "ours", *ours]]
        if published := self.published.get("accuracy"):
            if len(published) != len(ours):
                raise ValueError(
                    f"accuracy: expected {len(ours)} figures for {self.name}, got {len(published)}"
                )
            name = self.published.get("name", self.name)
            figures = [f"{value:.2f}" for value in published]
            lines.insert(0, [name, self.readout.upper(), "published", *figures])
        return lines

    def run(self) -> list[str]:
        """Return how ours came about."""
        config = self.own.results[0]["config"]
        minutes = [sum(map(sum, run["seconds"].values())) / 60 for run in self.own.results]
        machines = [run["environment"] for run in self.own.results]
        epochs = [
            " + ".join(
                f"{phase['epochs']}{'' if phase['learns'] == 'all' else ' classifier'}"
                for phase in config[when]
            )
            for when in ("first", "later")
        ]
        return [
            self.name,
            "; ".join(epochs),
            ", ".join(str(seed) for (seed,) in self.own.seeds),
            ", ".join(f"{each:.0f}" for each in minutes),
            ", ".join(dict.fromkeys(f"{m['device']}, threads: {m['threads']}" for m in machines)),
            f"`--config {shlex.quote(os.path.relpath(self.folders[0] / 'config.yaml'))}`",
        ]


def page(path: Path) -> tuple[str, dict[str, Figure]]:
    """Return the page of a list of published figures, and what it shows by file name.

    :param path: the list; run folders are named relative to its own.
    :raises ValueError: if an entry is not as expected, or a run is not finished.
    """
    content = read_yaml(path)
    _keys(f"{path}", content, {"title", "text", "sections"})
    parts, figures = [f"# {content['title']}", content["text"]], {}
    for section in content["sections"]:
        _keys("sections", section, _SECTION)
        title, file = section["title"], section["figure"]
        rows = [_Row.of(row, path.parent) for row in section["rows"]]
        parts += [f"## {title}", section["text"], *_tables(rows)]
        parts.append(f"![{title}: accuracy over classes seen]({file})")
        curves = [(row.name, row.readout, row.own, row.published) for row in rows]
        figures[file] = published_curves(title, curves)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n", figures


def _keys(place: str, content: Any, expected: set[str]) -> None:
    wrong = expected.symmetric_difference(content) if isinstance(content, dict) else content
    if wrong or not isinstance(content, dict):
        raise ValueError(f"{place}: expected {', '.join(sorted(expected))}, differs in {wrong}")


def _tables(rows: Sequence[_Row]) -> list[str]:
    head = ["", "readout", "published in", "average", "ours", "difference", "last", "ours"]
    compared = [
        [row.name, row.readout.upper(), row.source, *row.compared("average"), *row.compared("last")]
        for row in rows
    ]
    by_seen: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        by_seen.setdefault(tuple(row.own.seen), []).append(row)
    steps = [
        markdown(
            ["by classes seen", "readout", "", *map(str, seen)],
            [line for row in members for line in row.steps()],
            3,
        )
        for seen, members in by_seen.items()
    ]
    runs = list(dict.fromkeys(tuple(row.run()) for row in rows))
    origin = ["how", "epochs, first; later", "seeds", "minutes", "hardware", "command's options"]
    return [markdown([*head, "difference"], compared, 3), *steps, markdown(origin, runs, 6)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a command line's list and print where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduction", description="Published figures beside ours."
    )
    parser.add_argument("list", type=Path, help="the published figures (YAML)")
    path = parser.parse_args(arguments).list
    try:
        text, figures = page(path)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    out = path.with_name("REPRODUCTION.md")
    write(out, text)
    for file, figure in figures.items():
        save_figure(figure, path.parent / file)
    print(out)


if __name__ == "__main__":
    main()
