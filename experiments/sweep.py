"""A grid of runs, one YAML file, on as many workers as there are; then the report on them.

``python -m experiments.sweep experiments/configs/sweep_digits.yaml`` runs it on this machine,
``--address`` on a Ray cluster whose machines see the same files. A run that fails or is killed is
tried again and goes on from its checkpoint. Finished runs are not repeated, so the same command
goes on with a sweep that was stopped.

The file::

    folder: runs/sweep         # runs go to FOLDER/PROTOCOL/RUN, reports to FOLDER/PROTOCOL/report
    threads: 2                 # of a run, on the CPU; its last digits depend on their number
    gpus: 0.5                  # of a run
    common:                    # options of experiments.run, for all runs
      {benchmark: cifar100, backbone: resnet32}
    axes:                      # a run for each combination
      method: [memo, replay]   # values of an option, or
      budget:                  # points by name, which set any options,
        small:                 # all alike or by the points of another axis
          memo: {backbone: resnet14, mem_size: 2495}
          replay: {mem_size: 3634}
        large:
          memo: {mem_size: 3312}
          replay: null         # not this combination
      seed: [1, 2, 3]          # points named seed_1 and so on
      protocol:                # runs of different protocols get reports of their own
        b0: {increment: 10}
        b50: {base: 50, increment: 10}

Further keys are ``retries``, how often a run that failed is tried again, and ``allow`` and
``average``, as of :func:`experiments.report.report`.
"""

import argparse
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.building import data_digest, data_root
from experiments.comparison import check_distinct, check_protocol
from experiments.config import Config, from_options, nearest, read_yaml
from experiments.folders import check_folder, finished
from experiments.report import report
from experiments.run import check, run

__all__ = ["Sweep", "check_runs", "load", "main", "run_all"]

_PROTOCOL = "protocol"
_OPTIONS = [f.name for f in fields(Config) if f.name not in ("run_folder", "against")]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    :param folder: where runs and reports go.
    :param runs: configurations by name, ``PROTOCOL/RUN`` or ``RUN``.
    :param threads: CPU threads of a run.
    :param gpus: GPUs of a run; a fraction lets several runs share one.
    :param retries: how often a run that failed is tried again.
    :param allow: options of the protocol that may differ, see :func:`experiments.report.report`.
    :param average: options that the report averages over.
    """

    folder: Path
    runs: dict[str, Config]
    threads: int = 1
    gpus: float = 0
    retries: int = 3
    allow: list[str] = field(default_factory=list)
    average: list[str] = field(default_factory=lambda: ["seed"])

    @property
    def protocols(self) -> dict[Path, dict[str, Config]]:
        """The runs of each protocol, by the folder that holds them."""
        found: dict[Path, dict[str, Config]] = {}
        for name, config in self.runs.items():
            found.setdefault(config.folder.parent, {})[name] = config
        return found


def load(path: Path) -> Sweep:
    """Read a sweep.

    :raises ValueError: if a key, an option, a method or another value is unknown; if something
        occurs twice; if runs that would be reported together are of different protocols.
    """
    content = read_yaml(path)
    known = ["folder", "threads", "gpus", "retries", "allow", "average", "common", "axes"]
    if not isinstance(content, dict) or not {"folder", "axes"} <= set(content):
        raise ValueError(f"{path}: expected the keys folder and axes, got {content}")
    for key in content:
        _known(f"{path}", key, known)
    folder = content.pop("folder")
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"folder: expected a path, got {folder}")
    folder = Path(folder).absolute()
    common, axes = content.pop("common", None) or {}, _axes(content.pop("axes"))
    if not isinstance(common, dict):
        raise ValueError(f"common: expected options and their values, got {common}")
    for key in common:
        _known("common", key, _OPTIONS)
    runs: dict[str, Config] = {}
    for points, options in _combinations(axes):
        parts = {axis: point for axis, point in points.items() if axis != _PROTOCOL}
        protocol = [points[_PROTOCOL]] if _PROTOCOL in points else []
        name = "/".join([*protocol, "-".join(parts.values()) or "run"])
        if name in runs:
            raise ValueError(f"axes: expected a name for each combination, got two called {name}")
        try:
            config = from_options({"against": []} | common | options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        root = data_root(config)
        start = config.start_from
        runs[name] = replace(
            config,
            run_folder=str(folder / name),
            data_root=root and str(Path(root).absolute()),
            start_from=start and str(Path(start).absolute()),
        )
    if not runs:
        raise ValueError("axes: expected at least one run, got only combinations left out")
    for key, kind, least in (("threads", int, 1), ("gpus", int | float, 0), ("retries", int, 0)):
        value = content.get(key, least)
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < math.inf:
            whole = "whole " if kind is int else ""
            raise ValueError(f"{key}: expected a {whole}number of at least {least}, got {value}")
    for key in ("allow", "average"):
        names = content.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key}: expected a list of options, got {names}")
    sweep = Sweep(folder, runs, **content)
    check_distinct({name: config.identity() for name, config in runs.items()})
    for members in sweep.protocols.values():
        plain = {name: config.identity() for name, config in members.items()}
        check_protocol(plain, sweep.allow, sweep.average)
    return sweep


def check_runs(sweep: Sweep) -> None:
    """Check what the runs themselves would find before they train.

    :raises ValueError: if a run would stop before its first step, or its folder holds a run of
        another configuration; if runs that would be reported together learn other experiences or
        other data.
    """
    built: dict[str, list[int]] = {}
    steps: dict[str, list[int]] = {}
    for name, config in sweep.runs.items():
        try:
            check_folder(config)
            if config.device.startswith("cuda") and sweep.gpus == 0:
                raise ValueError(f"gpus: expected above 0 for the device {config.device}, got 0")
            own: dict[str, Any] = {"start_from": config.start_from, "data_root": config.data_root}
            own["seed"] = config.seed if config.start_from else 0  # A start has its own seed.
            if (key := json.dumps(config.identity() | own)) not in built:
                built[key] = check(config)
            steps[name] = built[key]
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{name}: {error}") from None
    for members in sweep.protocols.values():
        first = next(iter(members))
        for name in members:
            if steps[name] != steps[first]:
                raise ValueError(
                    "axes: expected runs of the same experiences, got classes per experience of "
                    f"{steps[first]} in {first} and {steps[name]} in {name}; an axis called "
                    f"{_PROTOCOL} sets them apart"
                )
        plain = {name: c.identity() | {"data": data_digest(c)} for name, c in members.items()}
        check_protocol(plain, sweep.allow, sweep.average)


# Axis -> name of a point -> what it sets, perhaps by points of other axes.
_Axes = dict[str, dict[str, Any]]


def _axes(content: Any) -> _Axes:
    """Return the axes with named points, checked by themselves."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"axes: expected at least one, got {content}")
    axes: _Axes = {}
    for axis, points in content.items():
        if isinstance(points, list):
            _known("axes", axis, _OPTIONS)
            prefix = "" if axis == "method" else f"{axis}_"
            names = [f"{prefix}{value}" for value in points]
            if len(set(names)) < len(names):
                raise ValueError(f"{axis}: expected different values, got {points}")
            axes[axis] = {n: {axis: value} for n, value in zip(names, points, strict=True)}
        elif isinstance(points, dict):
            axes[axis] = {str(name): point for name, point in points.items()}
        if not axes.get(axis):
            raise ValueError(f"{axis}: expected a list of values or named points, got {points}")
    owners: dict[str, str] = {}
    for axis, named in axes.items():
        for name in named:
            if not re.fullmatch(r"[\w.+-]+", name) or name in (".", "..", "report"):
                raise ValueError(
                    f"{axis}: expected names of letters, digits, '.', '_', '+' and '-', as parts "
                    f"of folder names, and not 'report', got {name!r}; points with other values "
                    "can be given names"
                )
            if name in _OPTIONS or owners.setdefault(name, axis) != axis:
                raise ValueError(f"{axis}: expected a name that nothing else has, got {name}")
    for axis, named in axes.items():
        for name, point in named.items():
            _check_point(f"{axis} {name}", point, {k: v for k, v in axes.items() if k != axis})
    return axes


def _check_point(place: str, point: Any, others: _Axes) -> None:
    """Check a point's keys: options, or all the points of other axes."""
    if point is None:
        return
    if not isinstance(point, dict):
        raise ValueError(f"{place}: expected options and their values, got {point}")
    point = {str(key): value for key, value in point.items()}
    for key in point:
        _known(place, key, [*_OPTIONS, *itertools.chain.from_iterable(others.values())])
    for axis, named in others.items():
        missing = set(named) - set(point)
        if missing and len(missing) < len(named):
            raise ValueError(
                f"{place}: expected all points of {axis} or none (null leaves a combination out), "
                f"got none for {', '.join(sorted(missing))}"
            )
        for name in set(named) & set(point):
            deeper = {k: v for k, v in others.items() if k != axis}
            _check_point(f"{place} {name}", point[name], deeper)


def _combinations(axes: _Axes) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield the points of each run by axis, and the options that they set.

    :raises ValueError: if two axes set the same option.
    """
    for names in itertools.product(*axes.values()):
        points = dict(zip(axes, names, strict=True))
        options: dict[str, Any] = {}
        setters: dict[str, str] = {}
        for axis, name in points.items():
            chosen = _chosen(axes[axis][name], set(names))
            if chosen is None:
                break
            for option in chosen:
                if setters.setdefault(option, axis) != axis:
                    raise ValueError(
                        f"{option}: expected one axis to set it, got {setters[option]} and {axis}"
                    )
            options |= chosen
        else:
            yield points, options


def _chosen(point: Any, names: set[str]) -> dict[str, Any] | None:
    """Return the options that a point sets in a combination; None where it leaves that out."""
    if point is None:
        return None
    options = {key: value for key, value in point.items() if key in _OPTIONS}
    setters: dict[str, Any] = {}
    for key, value in point.items():
        if str(key) in names:
            inner = _chosen(value, names)
            if inner is None:
                return None
            for option in inner:
                if setters.setdefault(option, key) != key:
                    raise ValueError(
                        f"{option}: expected one point to set it, got {setters[option]} and {key}"
                    )
            options |= inner
    return options


def _known(place: str, name: Any, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(
            f"{place}: expected known names, got '{name}'; the nearest is "
            f"'{nearest(str(name), known)}'"
        )


def run_all(sweep: Sweep, address: str | None = None, cpus: int | None = None) -> list[str]:
    """Run what is not finished; return a line for each run that failed for good.

    :param address: of a Ray cluster; a local one is started where it is not given.
    :param cpus: CPUs of the local one; the machine's where it is not given.
    :raises ValueError: if there are fewer CPUs or GPUs than a run needs.
    """
    waiting = {name: c for name, c in sweep.runs.items() if finished(c.folder) is None}
    done = len(sweep.runs) - len(waiting)
    print(f"{len(sweep.runs)} runs, {done} of them finished before", flush=True)
    if not waiting:
        return []
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Of the memory, Ray needs little: what goes through it are configurations.
        ray.init("local", num_cpus=cpus, object_store_memory=100 * 2**20, log_to_driver=False)
    else:
        ray.init(address, log_to_driver=False)
    try:
        return _run_on(ray, sweep, waiting)
    finally:
        ray.shutdown()


def _run_on(ray: Any, sweep: Sweep, waiting: dict[str, Config]) -> list[str]:
    """Run on the cluster that Ray is connected to."""
    for name, kind, needed in (("threads", "CPU", sweep.threads), ("gpus", "GPU", sweep.gpus)):
        available = ray.cluster_resources().get(kind, 0)
        if needed > available:
            raise ValueError(f"{name}: expected at most the {available:g} {kind}s, got {needed:g}")
    environment = {"OMP_NUM_THREADS": str(sweep.threads), "TQDM_DISABLE": "1"}
    if sweep.gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    trial = ray.remote(
        num_cpus=sweep.threads,
        num_gpus=sweep.gpus,
        max_calls=1,  # A process of its own for each run.
        max_retries=sweep.retries,
        retry_exceptions=True,
        runtime_env={"env_vars": environment},
    )(_trial)
    pending = {trial.remote(config, sweep.threads): name for name, config in waiting.items()}
    failed = []
    while pending:
        [done], _ = ray.wait(list(pending), num_returns=1)
        name = pending.pop(done)
        try:
            line = ray.get(done)
        except ray.exceptions.RayError as error:
            line = f"failed: {str(error).strip().splitlines()[-1]}"
            failed.append(f"{name}: {line}")
        print(f"[{len(waiting) - len(pending)}/{len(waiting)}] {name}: {line}", flush=True)
    return failed


def _trial(config: Config, threads: int) -> str:
    """Run one configuration in a worker; return a line on its results."""
    torch.set_num_threads(threads)
    results = run(config)
    return "; ".join(
        f"{readout.upper()} average {100 * results[readout]['average']:.2f} %, "
        f"last {100 * results[readout]['last']:.2f} %"
        for readout in ("cnn", "nme")
        if readout in results
    )


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise SystemExit(
            "A sweep runs on Ray, which is not installed: pip install 'avalanche-memo[sweep]', or "
            "in a clone of the repository pip install -e '.[sweep]'"
        ) from None
    return ray


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, run and report the sweep of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep", description="Run a grid of runs and report on it."
    )
    parser.add_argument("file", type=Path, help="the sweep, as YAML")
    parser.add_argument("--address", help="a Ray cluster; this machine where it is not given")
    parser.add_argument("--cpus", type=int, help="CPUs to use of this machine; all by default")
    parser.add_argument("--check", action="store_true", help="list the runs and train nothing")
    options = parser.parse_args(arguments)
    if options.address and options.cpus is not None:
        parser.error(f"--cpus: expected none beside --address, got {options.cpus}")
    try:
        sweep = load(options.file)
        check_runs(sweep)
        if options.check:
            print("\n".join(sweep.runs))
            return
        failed = run_all(sweep, options.address, options.cpus)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    for folder, members in sweep.protocols.items():
        # Not whatever else is in the folder, such as runs of a sweep that has been changed since.
        own = [c.folder for c in members.values() if (c.folder / "config.yaml").exists()]
        if any(map(finished, own)):
            print(f"Report: {report(own, folder / 'report', sweep.allow, sweep.average)}")
    if failed:
        raise SystemExit("\n".join(["These runs failed:", *failed]))


if __name__ == "__main__":
    main()
