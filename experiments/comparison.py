"""Finished runs side by side: which may be compared, and what distinguishes them."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from avalanche_memo.evaluation import area_under_budget
from avalanche_memo.training import Compression, Phase
from experiments.config import METHOD_NAMES, Config, from_options
from experiments.folders import finished

__all__ = [
    "PROTOCOL",
    "Group",
    "Spread",
    "areas",
    "budgets",
    "check_distinct",
    "check_protocol",
    "curves",
    "group",
    "read",
    "settings",
]

PROTOCOL = (
    *("benchmark", "base", "increment", "classes", "samples_per_class", "image_size"),
    *("class_order_seed", "class_order", "batch_size", "momentum", "first", "later", "data"),
)
"""Options that runs must share, and ``data``, the digest of a folder of images. Of the phases,
those count in which the whole network learns: one for the classifier alone is part of a method."""

_POINT = ("backbone", "mem_size", "exemplars_per_class")  # Where a run stands on its curve.
_MEGABYTE = 2**20


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; none where there is one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, decimals: int) -> str:
        """Return "mean ± deviation", or the mean."""
        if self.deviation is None:
            return f"{self.mean:.{decimals}f}"
        return f"{self.mean:.{decimals}f} ± {self.deviation:.{decimals}f}"


@dataclass(frozen=True)
class Group:
    """Runs of one method at one point that differ in their seeds.

    :param method: the method's name, and the options by which it differs from other runs of it.
    :param backbone: its backbone.
    :param memory: its exemplars, in words.
    :param seeds: of each run, the values of the options averaged over; ascending.
    :param results: of each run, the contents of results.json.
    """

    method: str
    backbone: str
    memory: str
    seeds: tuple[Any, ...]
    results: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """What tells the group from others."""
        return f"{self.method}, {self.backbone}, {self.memory}"

    @property
    def readouts(self) -> list[str]:
        """The readouts that every run has: ``cnn``, ``nme``."""
        return [r for r in ("cnn", "nme") if all(r in result for result in self.results)]

    @property
    def seen(self) -> list[int]:
        """Classes seen after each experience."""
        return list(accumulate(map(len, self.results[0]["classes"])))

    def percent(self, readout: str, name: str) -> Spread:
        """Return the average or last accuracy, or the last forgetting rate."""
        values = [result[readout][name] for result in self.results]
        return Spread.of([100 * (v[-1] if isinstance(v, list) else v) for v in values])

    def accuracies(self, readout: str) -> list[Spread]:
        """Return the accuracy after each experience, in percent."""
        runs = [result[readout]["accuracy"] for result in self.results]
        return [Spread.of([100 * value for value in step]) for step in zip(*runs, strict=True)]

    def megabytes(self, *kinds: str) -> float:
        """Return the memory after the last experience, in MB: of parameters, of exemplars."""
        sizes = [r["bytes"][-1][f"{kind}_bytes"] or 0 for r in self.results for kind in kinds]
        return sum(sizes) / len(self.results) / _MEGABYTE

    @property
    def budget(self) -> float:
        """The memory by the published accounting, in MB: see :func:`experiments.run.budget_bytes`.

        It is what methods are aligned at. What is measured lies below it by what classes that share
        the memory equally leave of it, and above it by the classifier.
        """
        return statistics.fmean(r["budget_bytes"] for r in self.results) / _MEGABYTE

    @property
    def seconds(self) -> Spread:
        """Seconds of training and evaluation."""
        return Spread.of([sum(map(sum, result["seconds"].values())) for result in self.results])


def read(folders: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the results of the run folders given or found below the folders given.

    :return: results by folder, and a line for each run that is left out as unfinished.
    :raises ValueError: if a folder holds no run, no run is finished, or one's results are damaged.
    """
    runs, left_out = {}, []
    for folder in folders:
        found = sorted({path.parent for path in folder.rglob("config.yaml")})
        if not found:
            raise ValueError(f"{folder}: expected a run folder or a folder of some, got no run")
        for path in found:
            results = finished(path)
            if results is None:
                left_out.append(f"{path}: left out, not finished")
            else:
                try:
                    options = _options(results["config"])
                    results["seconds"], results["environment"]["threads"], results["bytes"][-1]
                    results["budget_bytes"]
                except (TypeError, KeyError, ValueError) as error:
                    raise ValueError(
                        f"{path / 'results.json'}: expected the results of a run, got {error!r}"
                    ) from None
                runs[str(path)] = results | {"config": options | {"data": results.get("data")}}
    if not runs:
        raise ValueError(f"folders: expected a finished run, got {len(left_out)} unfinished")
    return runs, left_out


def check_protocol(
    configs: Mapping[str, Mapping[str, Any]],
    allow: Sequence[str] = (),
    average: Sequence[str] = ("seed",),
) -> None:
    """Check that runs may be compared.

    :param configs: configurations by the run's name.
    :param allow: options of :data:`PROTOCOL` that may differ.
    :param average: options averaged over, which may differ, too.
    :raises ValueError: if runs are of different protocols.
    """
    for name, options, known in (
        ("allow", allow, PROTOCOL),
        ("average", average, (*PROTOCOL, "seed")),
    ):
        for option in options:
            if option not in known:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {option}")
    protocols = {run: _protocol(config) for run, config in configs.items()}
    differing = []
    for name in (name for name in PROTOCOL if name not in (*allow, *average)):
        values = defaultdict(list)
        for run, protocol in protocols.items():
            values[_text(protocol.get(name))].append(run)
        if len(values) > 1:
            found = "; ".join(f"{value} in {_few(names)}" for value, names in values.items())
            differing.append(f"\n  {name}: {found}")
    if differing:
        raise ValueError(
            f"runs: expected those of one protocol, got differences:{''.join(differing)}\nName an "
            "option under 'allow' to compare them all the same, under 'average' to average over it."
        )


def check_distinct(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that no run occurs twice.

    :raises ValueError: if one does.
    """
    first: dict[str, str] = {}
    for run, config in configs.items():
        other = first.setdefault(json.dumps(_effective(config) | {"device": None}), run)
        if other != run:
            raise ValueError(f"runs: expected different ones, got the same in {other} and {run}")


def group(runs: Mapping[str, Mapping[str, Any]], average: Sequence[str] = ("seed",)) -> list[Group]:
    """Put together the runs that differ in nothing but the options averaged over.

    :param runs: results by the run's name, as :func:`read` returns them.
    :param average: names of options.
    :return: groups by method, and by memory within a method.
    """
    methods = list(METHOD_NAMES)
    configs = [_effective(result["config"]) for result in runs.values()]
    for known in ([_without_images(config) for config in configs], configs):
        members: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for config, label, result in zip(
            configs, _labels(known, average), runs.values(), strict=True
        ):
            place = methods.index(config["method"]), label, *(_text(config[n]) for n in _POINT)
            phases = [_text(config[name]) for name in ("first", "later") if name not in average]
            members[(*place, *phases)].append((tuple(config[name] for name in average), result))
        if len({key[: 2 + len(_POINT)] for key in members}) == len(members):
            break  # Else two would have one name, but for the images of their phases.
    groups = []
    for (method, label, backbone, *_), own in members.items():
        ordered = sorted(own, key=lambda run: [_order(value) for value in run[0]])
        seeds, results = zip(*ordered, strict=True)
        groups.append((method, Group(label, backbone, _memory(results), seeds, results)))
    groups.sort(key=lambda pair: (pair[0], pair[1].method, pair[1].budget))
    return [own for _, own in groups]


def _labels(configs: Sequence[Mapping[str, Any]], average: Sequence[str]) -> list[str]:
    """Return each run's method and the options by which it differs from others of that method."""
    labels = []
    for config in configs:
        alike = [other for other in configs if other["method"] == config["method"]]
        options = [
            _label(name, config[name], [other[name] for other in alike])
            for name in config
            if name not in (*average, *_POINT, "device")
            and len({_text(other[name]) for other in alike}) > 1
        ]
        labels.append(", ".join([METHOD_NAMES[config["method"]], *options]))
    return labels


def _order(value: Any) -> tuple[bool, float, str]:
    """Return what sorts numbers by size, and other values behind them."""
    number = isinstance(value, int | float)
    return not number, value if number else 0, "" if number else _text(value)


def curves(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups that make one curve over memory, by the curve's name.

    A method whose backbones each come with one memory, as budgets are aligned, makes one curve
    through all of them. Otherwise each backbone has its own.
    """
    found: dict[str, list[Group]] = defaultdict(list)
    for own in groups:
        points = [g for g in groups if g.method == own.method]
        backbones = {g.backbone for g in points}
        apart = 1 < len(backbones) < len(points)
        found[f"{own.method}, {own.backbone}" if apart else own.method].append(own)
    return found


def budgets(found: Mapping[str, Sequence[Group]]) -> list[list[Group]]:
    """Return the groups of each budget, of which there are as many as the longest curve has points.

    The points of a curve as long as that belong to them in their order; those of a shorter one to
    the one that theirs is nearest to, by ratio.
    """
    longest = max(found.values(), key=len)
    members: list[list[Group]] = [[] for _ in longest]
    for points in found.values():
        for place, own in enumerate(points):
            if len(points) < len(longest):
                ratios = [own.budget / mark.budget for mark in longest]
                ratios = [max(ratio, 1 / ratio) for ratio in ratios]
                place = ratios.index(min(ratios))
            members[place].append(own)
    return members


def areas(points: Sequence[Group], readout: str, name: str) -> Spread | None:
    """Return the area under accuracy over memory.

    :param points: a curve, by rising memory.
    :param readout: ``cnn`` or ``nme``.
    :param name: ``average`` for AUC-A, ``last`` for AUC-L.
    :return: over the seeds, where all points have the same, else of the mean accuracies. None where
        the points are fewer than two, or two have the same memory.
    """
    megabytes = [point.budget for point in points]
    if len(set(megabytes)) < max(2, len(points)):
        return None
    accuracies = [[result[readout][name] for result in point.results] for point in points]
    if any(point.seeds != points[0].seeds for point in points):
        accuracies = [[statistics.fmean(values)] for values in accuracies]
    return Spread.of([area_under_budget(megabytes, run) for run in zip(*accuracies, strict=True)])


def settings(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Return options that depart from their defaults in any run: values, and methods with each."""
    default = _resolved(_plain(asdict(Config())))
    found: dict[str, dict[str, list[str]]] = {}
    for name in (name for name in default if name != "method"):
        values: dict[str, list[str]] = defaultdict(list)
        for run in runs.values():
            config = _resolved(run["config"])
            methods = values[_text(config[name])]
            if (method := METHOD_NAMES[config["method"]]) not in methods:
                methods.append(method)
        if list(values) != [_text(default[name])]:
            found[name] = dict(values)
    return found


def _options(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a run; those, of it and of phases, that came later had their defaults.

    :raises ValueError: if one is unknown.
    """
    return _plain(asdict(from_options({"against": []} | stored)))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as JSON holds them."""
    return dict(json.loads(json.dumps(options)))


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run, with the rates that phases without their own take."""
    options = dict(config)
    rates = {name: options.pop(name) for name in ("lr", "weight_decay")}
    for when in ("first", "later"):
        options[when] = [
            phase | {name: rate for name, rate in rates.items() if phase[name] is None}
            for phase in config[when]
        ]
    for name in ("run_folder", "against", "data_root"):
        options.pop(name, None)
    return options


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two runs the same, without sizes of the memory that do not count."""
    options = _resolved(config)
    without = options["method"] in ("finetune", "joint")
    if without or options["exemplars_per_class"] is not None:
        options["mem_size"] = None
    if without:
        options["exemplars_per_class"] = None
    return options


def _protocol(config: Mapping[str, Any]) -> dict[str, Any]:
    options = _resolved(config)
    for when in ("first", "later"):
        options[when] = [phase for phase in options[when] if phase["learns"] == "all"]
    return options


def _memory(results: Sequence[Mapping[str, Any]]) -> str:
    config = results[0]["config"]
    if config["method"] == "joint":
        return "all data"
    if not results[0]["bytes"][-1]["exemplar_bytes"]:
        return "no exemplars"
    if config["compression"] is not None and all("exemplars" in result for result in results):
        files = statistics.fmean(result["exemplars"] for result in results)
        return f"{files:.0f} files, {_text(config['compression'])}"
    more = "" if config["memory_rates"] is None else ", more by rates"
    if config["exemplars_per_class"] is not None:
        return f"{config['exemplars_per_class']} exemplars per class{more}"
    return f"{config['mem_size']} exemplars{more}"


def _without_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as labels know them: of a phase's images, whether their number is fixed.

    The number goes with the memory, as mem_size does, and so varies along a curve.
    """
    label = dict(config)
    for when in ("first", "later"):
        label[when] = [
            phase | {"images": "fixed" if phase["images"] is not None else None}
            for phase in config[when]
        ]
    return label


def _label(name: str, value: Any, values: Sequence[Any]) -> str:
    """Return an option by which runs of a method differ, and of phases the fields that do."""
    if name == "compression":
        return "raw" if value is None else _text(value)
    if name not in ("first", "later") or len({len(phases) for phases in values}) > 1:
        return f"{name} {_text(value)}"
    fields = [
        f"{field} {_text(content)}" + (f" in phase {i + 1}" if len(value) > 1 else "")
        for i, phase in enumerate(value)
        for field, content in phase.items()
        if len({_text(phases[i][field]) for phases in values}) > 1
    ]
    return f"{name} {', '.join(fields)}"


def _text(value: Any) -> str:
    """Return a value of an option in words; different values have different words."""
    if value is None:
        return "none"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return " + ".join(map(_phase, value))
    if isinstance(value, dict):
        return _compression(value)
    return value if isinstance(value, str) else json.dumps(value)


def _phase(phase: Mapping[str, Any]) -> str:
    changed = _changed(phase, Phase(1), "epochs")
    return f"{phase['epochs']} epochs" + (f" ({', '.join(changed)})" if changed else "")


def _compression(options: Mapping[str, Any]) -> str:
    names = ("codec", "quality")
    changed = _changed(options, Compression(), *names)
    return " ".join([*(str(options[name]) for name in names), *changed])


def _changed(options: Mapping[str, Any], default: Any, *apart: str) -> list[str]:
    usual = _plain(asdict(default))
    return [
        f"{name} {_text(value)}"
        for name, value in options.items()
        if name not in apart and value != usual[name]
    ]


def _few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
