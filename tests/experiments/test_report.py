import base64
import csv
import json
import re
import shutil
import statistics
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from avalanche_memo.budget import parameter_bytes
from avalanche_memo.models import convnet2
from avalanche_memo.training import Compression, MemoryRates, Phase
from experiments import run as run_module
from experiments.building import make_network
from experiments.comparison import (
    Spread,
    areas,
    budgets,
    check_distinct,
    check_protocol,
    curves,
    group,
    read,
    settings,
)
from experiments.config import METHOD_NAMES, Config
from experiments.figures import (
    _styles,
    accuracy_curves,
    accuracy_figure,
    accuracy_table,
    confusion_matrices,
    memory_bars,
    memory_curves,
)
from experiments.report import _latex, main, report
from experiments.run import budget_bytes
from experiments.sweep import load

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
MEGABYTE = 2**20
PLAIN = Config(against=[], increment=1, classes=2)
CLASSIFIER = Phase(3, learns="classifier", data="balanced")


def make_run(folder: Path, config=PLAIN, *, last=0.5, model=MEGABYTE, exemplars=MEGABYTE, **change):
    """Write a finished run of two experiences of a class each: accuracy 1.0, then ``last``.

    Its budget is 64 bytes more than what it holds, unless it is given.
    """
    right = round(10 * last)
    readout = {
        "accuracy": [1.0, last],
        "average": (1 + last) / 2,
        "last": last,
        "forgetting_rate": [0.0, 1 - last],
        "confusion": [[right, 10 - right], [10 - right, right]],
    }
    sizes = {"parameter_bytes": model, "exemplar_bytes": exemplars}
    if "files" in change:
        change["exemplars"] = change.pop("files")
    results = {
        "config": config.identity(),
        "cnn": readout,
        "classes": [[0], [1]],
        "bytes": [sizes, sizes],
        "environment": {"device": "a CPU", "threads": 1, "torch": "2"},
        "seconds": {"train": [1.0, 2.0], "eval": [0.5, 0.5]},
        "experiences": 2,
        "budget_bytes": model + (exemplars or 0) + 64,
    }
    folder.mkdir(parents=True)
    config.save(folder / "config.yaml")
    (folder / "results.json").write_text(json.dumps(results | change))
    return folder


def groups_of(folder):
    return group(read([folder])[0])


@pytest.fixture
def two_seeds(tmp_path):
    for seed, last in ((1, 0.5), (2, 0.8)):
        make_run(tmp_path / "runs" / f"{seed}", replace(PLAIN, seed=seed), last=last)
    return tmp_path / "runs"


def test_runs_that_differ_in_the_seed_are_one_group(two_seeds):
    [own] = groups_of(two_seeds)
    assert own.name == "MEMO, resnet8, 200 exemplars"
    assert own.seeds == ((1,), (2,))
    # 50 and 80: the mean 65, deviations of 15 each, so a sample variance of 450.
    assert own.percent("cnn", "last") == pytest.approx((65, 450**0.5))
    assert own.percent("cnn", "average") == pytest.approx((82.5, 112.5**0.5))
    assert own.percent("cnn", "forgetting_rate") == pytest.approx((35, 450**0.5))
    assert own.accuracies("cnn") == [(100, 0), pytest.approx((65, 450**0.5))]
    assert own.seconds == (4, 0)
    assert own.megabytes("parameter", "exemplar") == 2
    assert own.budget == 2 + 64 / MEGABYTE
    assert own.readouts == ["cnn"]


def test_one_run_has_no_deviation():
    assert Spread.of([2.0]) == (2, None)
    assert Spread.of([2.0]).text(1) == "2.0"
    assert Spread.of([1.0, 3.0]).text(2) == "2.00 ± 1.41"


def test_labels_say_what_distinguishes_runs_of_a_method_and_nothing_else(tmp_path):
    podnet = replace(PLAIN, method="podnet", later=[*PLAIN.later, CLASSIFIER])
    for name, config in {
        "a": replace(PLAIN, fast=False, device="cpu"),
        "b": podnet,
        "c": replace(podnet, flat_distillation="kd", attention="cbam", memory_rates=[0.5, 0.5]),
        "d": replace(podnet, later=[*PLAIN.later, replace(CLASSIFIER, epochs=4)], device="cpu"),
        "e": replace(PLAIN, method="replay", exemplars_per_class=20),
        "f": replace(PLAIN, method="finetune"),
    }.items():
        make_run(tmp_path / name, config, exemplars=None if name == "f" else 10)
    found = [own.name for own in groups_of(tmp_path)]
    assert found[0] == "MEMO, resnet8, 200 exemplars"
    assert found[4:] == [
        "Replay, resnet8, 20 exemplars per class",
        "Finetune, resnet8, no exemplars",
    ]
    assert all(name.startswith("PODNet, attention ") for name in found[1:4])
    # Of the phases only the field that differs.
    assert [name.removeprefix("PODNet, ") for name in found[1:4]] == [
        "attention cbam, memory_rates [0.5, 0.5], flat_distillation kd, "
        "later epochs 3 in phase 2, resnet8, 200 exemplars, more by rates",
        *(
            "attention none, memory_rates none, flat_distillation pod, "
            f"later epochs {epochs} in phase 2, resnet8, 200 exemplars"
            for epochs in (3, 4)
        ),
    ]


def test_two_groups_never_have_one_name(tmp_path):
    for images in (100, 900):
        later = [*PLAIN.later, replace(CLASSIFIER, images=images)]
        make_run(tmp_path / f"{images}", replace(PLAIN, later=later))
    assert {own.name for own in groups_of(tmp_path)} == {
        f"MEMO, later images {images} in phase 2, resnet8, 200 exemplars" for images in (100, 900)
    }


def compressed_runs(folder):
    """Raw and compressed memories, and runs with a fixed number of images an epoch."""
    webp = Compression("webp", 75)
    for budget, size in (("small", 1), ("large", 2)):
        for images in (None, 1000 * size):
            config = replace(
                PLAIN, mem_size=100 * size, later=[replace(PLAIN.later[0], images=images)]
            )
            make_run(folder / f"{budget}-{images}-raw", config, exemplars=size * MEGABYTE)
            for seed in (1, 2):
                run = replace(config, compression=webp, seed=seed)
                name = f"{budget}-{images}-webp-{seed}"
                options = {"exemplars": size * MEGABYTE, "files": 900 * size + 2 * seed}
                make_run(folder / name, run, **options)
    make_run(folder / "joint", replace(PLAIN, method="joint"), exemplars=9 * MEGABYTE)


def test_labels_of_compressed_memories_fixed_epochs_and_all_data(tmp_path):
    compressed_runs(tmp_path)
    groups = groups_of(tmp_path)
    assert groups[-1].name == "Joint, resnet8, all data"
    assert "MEMO, webp 75, later images fixed, resnet8, 1803 files, webp 75" in {
        own.name for own in groups
    }
    # The number of an epoch's images goes with the memory, along a curve.
    found = {name: len(own) for name, own in curves(groups).items()}
    assert found == {
        "MEMO, raw, later images none": 2,
        "MEMO, raw, later images fixed": 2,
        "MEMO, webp 75, later images none": 2,
        "MEMO, webp 75, later images fixed": 2,
        "Joint": 1,
    }


def test_a_memory_that_grows_by_rates_says_so(tmp_path):
    for name, options in (("all", {}), ("each", {"exemplars_per_class": 20})):
        config = replace(PLAIN, method="podnet", memory_rates=[0.2, 0.2], **options)
        make_run(tmp_path / name, config)
    memories = {own.memory for own in groups_of(tmp_path)}
    assert memories == {"200 exemplars, more by rates", "20 exemplars per class, more by rates"}


def test_options_that_a_run_is_too_old_for_had_their_defaults(tmp_path):
    old = make_run(tmp_path / "old", replace(PLAIN, seed=1))
    make_run(tmp_path / "new", replace(PLAIN, seed=2))
    results = json.loads((old / "results.json").read_text())
    del results["config"]["attention"], results["config"]["first"][0]["temperature"]
    (old / "results.json").write_text(json.dumps(results))
    assert len(groups_of(tmp_path)) == 1


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"increment": 2}, "increment: 1 in .*/a; 2 in .*/b"),
        ({"class_order_seed": 7}, "class_order_seed: 1993 in .*/a; 7 in .*/b"),
        ({"class_order": [1, 0]}, r"class_order: none in .*/a; \[1, 0\] in .*/b"),
        ({"samples_per_class": 5}, "samples_per_class: none in .*/a; 5 in .*/b"),
        ({"first": [Phase(9)]}, r"first: 8 epochs \(.*milestones \[5, 7\]\) in .*/a; 9 epochs"),
        ({"lr": 0.2}, "first: .*lr 0.1.* in .*/a; .*lr 0.2.* in .*/b"),
    ],
)
def test_runs_of_different_protocols_are_refused(tmp_path, capsys, change, differs):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", replace(PLAIN, method="replay", **change))
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert re.search(differs, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    configs = {name: run["config"] for name, run in read([tmp_path])[0].items()}
    check_protocol(configs, allow=["first", "later", *({*change} - {"lr", "first"})])
    with pytest.raises(ValueError, match=r"allow: expected some of .*, got mem_size"):
        check_protocol(configs, allow=["mem_size"])


def test_runs_on_different_data_are_refused(tmp_path):
    config = replace(PLAIN, benchmark="image_folder")
    make_run(tmp_path / "a", replace(config, seed=1), data="4 files of 2 classes, abc")
    make_run(tmp_path / "b", replace(config, seed=2), data="4 files of 2 classes, def")
    with pytest.raises(ValueError, match=r"data: 4 files of 2 classes, abc in .*a; .*def in .*b"):
        report([tmp_path], tmp_path / "out")
    report([tmp_path], tmp_path / "out", allow=["data"])


def test_class_orders_can_be_averaged_over(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"{seed}", replace(PLAIN, class_order_seed=seed))
        make_run(tmp_path / f"{-seed}", replace(PLAIN, class_order=[seed, 0]))
    report([tmp_path], tmp_path / "out", average=["seed", "class_order_seed", "class_order"])
    [line] = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert line["runs"] == "4"
    assert (
        "; class order: as given, seed 1, seed 2\n" in (tmp_path / "out" / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("first", ([Phase(3)], [Phase(4)])),
        ("samples_per_class", (3, None)),
        ("increment", (2, 10)),
    ],
)
def test_other_options_can_be_averaged_over(tmp_path, name, values):
    for i, value in enumerate(reversed(values)):
        make_run(tmp_path / f"{i}", replace(PLAIN, **{name: value}))
    [own] = group(read([tmp_path])[0], average=[name])
    assert [result["config"][name] for result in own.results] == [
        json.loads(json.dumps(value, default=asdict)) for value in values
    ]


def test_a_phase_for_the_classifier_alone_is_a_part_of_the_method():
    der = replace(PLAIN, method="der", later=[*PLAIN.later, CLASSIFIER])
    check_protocol({"memo": PLAIN.identity(), "der": der.identity()})


def test_a_run_that_occurs_twice_is_refused(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", replace(PLAIN, device="cpu"))
    with pytest.raises(ValueError, match=r"the same in .*a and .*b"):
        report([tmp_path], tmp_path / "out")
    check_distinct({"a": PLAIN.identity(), "b": replace(PLAIN, seed=5).identity()})


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"method": "finetune"}, True),
        ({"method": "joint"}, True),
        ({"exemplars_per_class": 20}, True),
        ({}, False),
    ],
)
def test_a_size_of_the_memory_that_does_not_count_tells_no_runs_apart(options, same):
    runs = {f"{n}": replace(PLAIN, mem_size=n, **options).identity() for n in (100, 200)}
    if same:
        with pytest.raises(ValueError, match=r"runs: expected different ones, got .* 100 and 20"):
            check_distinct(runs)
    else:
        check_distinct(runs)


def test_unfinished_runs_are_left_out_with_a_line(tmp_path):
    make_run(tmp_path / "runs" / "whole")
    make_run(tmp_path / "runs" / "half", replace(PLAIN, seed=5), experiences=3)
    make_run(tmp_path / "begun", replace(PLAIN, seed=6))
    (tmp_path / "begun" / "results.json").unlink()
    page = report([tmp_path / "runs", tmp_path / "begun"], tmp_path / "out").read_text()
    assert f"{tmp_path}/runs/half: left out, not finished" in page
    assert f"{tmp_path}/begun: left out, not finished" in page
    with pytest.raises(ValueError, match="folders: expected a finished run, got 1 unfinished"):
        report([tmp_path / "begun"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"nowhere: expected a run folder .*, got no run"):
        report([tmp_path / "nowhere"], tmp_path / "out")


def points(folder, method, *sizes, backbones=(), seeds=(1,), last=0.5):
    """Write a run for each size of memory in MB, the accuracy rising by 0.1 with each."""
    for i, megabytes in enumerate(sizes):
        for seed in seeds:
            config = replace(PLAIN, method=method, mem_size=100 + i, seed=seed)
            config = replace(config, backbone=backbones[i] if backbones else "resnet8")
            name = f"{method}-{config.backbone}-{megabytes}-{seed}"
            accuracy = last + 0.1 * i + 0.05 * (seed - 1)
            make_run(folder / name, config, exemplars=megabytes * MEGABYTE, last=accuracy)


def test_area_under_accuracy_over_memory(tmp_path):
    points(tmp_path, "memo", 1, 3, 4, seeds=(1, 2))
    [curve] = curves(groups_of(tmp_path)).values()
    # Last: 0.5, 0.6, 0.7 at 2, 4, 5 MB with the model, and each 0.05 more with the other seed.
    area = 2 * 0.55 + 1 * 0.65
    expected = (area + 3 * 0.025, statistics.stdev([area, area + 3 * 0.05]))
    assert areas(curve, "cnn", "last") == pytest.approx(expected)
    average = 2 * (0.75 + 0.8) / 2 + 1 * (0.8 + 0.85) / 2
    assert areas(curve, "cnn", "average").mean == pytest.approx(average + 3 * 0.0125)
    shutil.rmtree(tmp_path / "memo-resnet8-3-2")
    [curve] = curves(groups_of(tmp_path)).values()
    # Means over seeds: 0.525, 0.6, 0.725.
    alone = areas(curve, "cnn", "last")
    assert alone == (pytest.approx(2 * (0.525 + 0.6) / 2 + (0.6 + 0.725) / 2), None)
    assert areas(curve[:1], "cnn", "last") is None
    assert areas([curve[0], curve[0]], "cnn", "last") is None


class Images:
    """Stands in for an experience of so many images of a shape."""

    def __init__(self, shape=(3, 32, 32), n=5000):
        self.shape, self.n = shape, n
        self.dataset = self

    def eval(self):
        return [(torch.zeros(self.shape), 0)]

    def __len__(self):
        return self.n


PUBLISHED = {  # Average and last accuracies at the five budgets; AUC-A and AUC-L (CIL survey).
    "MEMO": ([54.8, 69.1, 70.3, 71.7, 72.1], [40.9, 57.0, 59.5, 61.8, 62.1], 10.85, 9.03),
    "DER": ([53.8, 68.5, 70.4, 71.0, 70.1], [40.6, 57.3, 59.8, 60.3, 59.9], 10.74, 8.95),
    "WA": ([65.3, 67.7, 68.1, 69.1, 69.5], [51.9, 55.1, 56.6, 58.1, 59.5], 10.80, 8.92),
    "iCaRL": ([63.4, 67.2, 68.3, 70.0, 70.6], [48.4, 53.0, 54.7, 57.4, 58.6], 10.81, 8.64),
    "BiC": ([62.3, 65.9, 68.1, 69.8, 70.5], [40.5, 50.2, 52.6, 57.9, 59.7], 10.73, 8.30),
    "Replay": ([58.7, 64.6, 67.0, 69.0, 69.8], [41.4, 48.8, 51.3, 54.4, 55.6], 10.49, 8.02),
    "PODNet": ([55.4, 58.4, 60.2, 61.0, 60.8], [36.8, 41.7, 44.1, 45.4, 45.4], 9.42, 6.80),
}


def test_the_shipped_sweep_has_the_published_areas_at_the_published_accuracies(tmp_path):
    sweep = load(CONFIGS / "sweep_cifar100_b0_inc10.yaml")
    points = [config for config in sweep.runs.values() if config.seed == 1993]
    place = Counter()
    for config in points:
        network = make_network(config)
        for number in range(10):
            network.grow(range(10 * number, 10 * number + 10))
        averages, lasts, *_ = PUBLISHED[METHOD_NAMES[config.method]]
        average, last = averages[place[config.method]], lasts[place[config.method]]
        place[config.method] += 1
        folder = make_run(
            tmp_path / f"{config.method}-{place[config.method]}",
            config,
            last=last / 100,
            model=parameter_bytes(network),
            exemplars=config.mem_size // 100 * 100 * 3072,
            budget_bytes=budget_bytes(config, network, [Images()] * 10),
        )
        results = json.loads((folder / "results.json").read_text())
        results["cnn"]["average"] = average / 100
        (folder / "results.json").write_text(json.dumps(results))
    report([tmp_path], tmp_path / "out", allow=["first", "later"])
    table = (tmp_path / "out" / "report.md").read_text().split("## Accuracy over memory")[1]
    found = {}
    for line in table.splitlines():
        if "| CNN" in line:
            name, _, _, start, end, *found_areas = (c.strip() for c in line.strip("| ").split("|"))
            found[name] = [float(area) for area in found_areas]
            assert (float(start), float(end)) == pytest.approx(
                (7998016 / MEGABYTE, 23.541), abs=0.004
            )
    assert found.keys() == PUBLISHED.keys()
    for name, (*_, average, last) in PUBLISHED.items():
        assert found[name] == pytest.approx([average, last], abs=0.03)


@pytest.mark.parametrize(
    ("change", "exemplars"),
    [
        ({}, 201),
        ({"exemplars_per_class": 7}, 7 * 4),
        ({"method": "finetune"}, 0),
        ({"method": "joint"}, 2 * 30),
    ],
)
def test_a_budget_is_the_network_without_classifier_and_the_whole_memory(change, exemplars):
    config = replace(PLAIN, method="replay", backbone="convnet2", mem_size=201)
    config = replace(config, **change)
    network = make_network(config)
    for classes in ([0, 1], [2, 3]):
        network.grow(classes)
    learned = [Images((1, 8, 8), 30)] * 2
    backbone = sum(parameter_bytes(stage) for stage in convnet2(1).stages)
    assert budget_bytes(config, network, learned) == backbone + exemplars * 64
    rates = MemoryRates((0.5, 0.25), increment=2, images_per_class=15)
    more = 0 if config.method in ("finetune", "joint") else 7  # floor(0.25 * 2 * 15)
    assert budget_bytes(config, network, learned, rates) == backbone + (exemplars + more) * 64


def test_runs_of_other_experiences_are_refused_before_anything_is_written(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", replace(PLAIN, increment=2), classes=[[0, 1]], experiences=1)
    with pytest.raises(ValueError, match=r"runs: expected the same experiences, got \(1, 1\) and"):
        report([tmp_path], tmp_path / "out", allow=["increment"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda results: results.pop("experiences"),
        lambda results: results.pop("environment"),
        lambda results: results.pop("budget_bytes"),
        lambda results: results["config"].update(gone=1),
        lambda results: results["config"]["first"][0].update(gone=1),
        None,
    ],
)
def test_damaged_and_foreign_results_are_refused_by_name(tmp_path, capsys, damage):
    path = make_run(tmp_path / "run") / "results.json"
    results = json.loads(path.read_text())
    if damage:
        damage(results)
    path.write_text(json.dumps(results) if damage else '{"config": ')
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "run/results.json: expected the results of a run" in capsys.readouterr().err


def test_aligned_backbones_make_one_curve_and_others_one_each(tmp_path):
    points(tmp_path, "memo", 1, 2, backbones=("resnet8", "resnet14"))
    points(tmp_path, "replay", 1, 2)
    points(tmp_path, "der", 1, 2, 3, backbones=("resnet8", "resnet8", "resnet14"))
    found = {name: len(own) for name, own in curves(groups_of(tmp_path)).items()}
    assert found == {"MEMO": 2, "DER, resnet8": 2, "DER, resnet14": 1, "Replay": 2}


def test_budgets_put_points_side_by_side(tmp_path):
    points(tmp_path, "memo", 1, 5, 9)
    points(tmp_path, "replay", 2, 3, 8)
    points(tmp_path, "finetune", 7)
    found = budgets(curves(groups_of(tmp_path)))
    assert [[own.method for own in budget] for budget in found] == [
        ["MEMO", "Replay"],
        ["MEMO", "Replay"],
        ["MEMO", "Replay", "Finetune"],
    ]
    assert [round(budget[1].budget, 3) for budget in found] == [3, 4, 9]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A report on two methods at two memories: runs/ and out/ in a folder."""
    folder = tmp_path_factory.mktemp("compared")
    points(folder / "runs", "memo", 1, 2, seeds=(1, 2))
    points(folder / "runs", "replay", 1, 2, last=0.3)
    report([folder / "runs"], folder / "out")
    return folder


def test_figures_show_the_numbers(compared):
    groups = groups_of(compared / "runs")
    found = curves(groups)
    figure = accuracy_curves("title", budgets(found)[1], found)
    [memo, replay] = figure.axes[0].get_lines()
    assert [list(line.get_ydata()) for line in (memo, replay)] == [
        pytest.approx([100, 62.5]),
        pytest.approx([100, 40]),
    ]
    assert list(memo.get_xdata()) == [1, 2]
    assert memo.get_label() == "MEMO, resnet8, 101 exemplars"
    [band] = figure.axes[0].collections  # One seed has none.
    deviation = statistics.stdev([60, 65])
    heights = {y for _, y in band.get_paths()[0].vertices.round(6)}
    assert {round(62.5 - deviation, 6), round(62.5 + deviation, 6)} < heights

    average, last = memory_curves("title", found).axes
    budgets_mb = [size + 64 / MEGABYTE for size in (2, 3)]
    assert list(last.containers[0].lines[0].get_xdata()) == pytest.approx(budgets_mb)
    assert list(last.containers[0].lines[0].get_ydata()) == pytest.approx([52.5, 62.5])
    assert list(average.containers[1].lines[0].get_ydata()) == pytest.approx([65, 70])

    bars = memory_bars("title", groups).axes[0]
    widths = [[bar.get_width() for bar in container] for container in bars.containers]
    assert widths == [[1, 1, 1, 1], [1, 2, 1, 2]]

    # 10 samples of each class and seed: 6 and 6 of them right (0.65 rounds to 6).
    image = confusion_matrices(groups[1]).axes[0].images[0].get_array()
    assert image.tolist() == [[60, 40], [40, 60]]


@pytest.mark.parametrize("kind", ["compared", "compressed"])
def test_no_legend_covers_a_curve_and_no_label_leaves_the_figure(compared, tmp_path, kind):
    compressed_runs(tmp_path)
    groups = groups_of(compared / "runs" if kind == "compared" else tmp_path)
    found = curves(groups)
    for figure in (
        accuracy_curves("title", groups, found),
        memory_curves("title", found),
        memory_bars("title", groups),
        confusion_matrices(groups[0]),
    ):
        figure.canvas.draw()
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
            assert len(legend.get_texts()) == len({text.get_text() for text in legend.get_texts()})
        tight, whole = figure.get_tightbbox(), figure.bbox_inches
        assert tight.xmin >= 0
        assert tight.ymin >= 0
        assert tight.xmax <= whole.xmax
        assert tight.ymax <= whole.ymax


def test_curves_are_told_apart_without_colour_too():
    styles = _styles([f"{i}" for i in range(40)]).values()
    assert len({(style["color"], style["marker"]) for style in styles}) == 40
    assert len({style["marker"] for style in list(styles)[:8]}) == 8


def test_tables_hold_the_same_numbers_in_each_format(compared):
    out = compared / "out"
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert [line["method"] for line in lines] == ["MEMO", "MEMO", "Replay", "Replay"]
    assert float(lines[1]["last"]) == pytest.approx(62.5)
    assert float(lines[1]["after_2_classes_deviation"]) == pytest.approx(12.5**0.5)
    assert float(lines[1]["total_mb"]) == 3
    assert float(lines[1]["budget_mb"]) == 3 + 64 / MEGABYTE
    assert lines[2]["last_deviation"] == ""
    text = (out / "report.md").read_text()
    row = next(line for line in text.splitlines() if "101 exemplars" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("MEMO", "resnet8", "101 exemplars", "CNN", "2"),
        *("81.25 ± 1.77", "62.50 ± 3.54", "37.50 ± 3.54"),
        *("3.000", "1.000", "2.000", "3.000", "4 ± 0"),
    ]
    tex = (out / "tables.tex").read_text()
    assert r"MEMO & resnet8 & 101 exemplars & CNN & 2 & 81.25 $\pm$ 1.77 &" in tex
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\bottomrule", tex, re.S):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
    assert tex.isascii()
    assert not re.search(r"(?<!\\)[%#_^]", tex.replace("}{!}{%", "").replace("2^{20}", ""))


def test_latex_has_its_own_characters_escaped():
    found = _latex("a_b 1% {$x^2~\\ ± 2²⁰")
    escaped = r"a\_b 1\% \{\$x\textasciicircum{}2\textasciitilde{}\textbackslash{} $\pm$ $2^{20}$"
    assert found == escaped


def test_settings_say_which_methods_departed_from_the_defaults(compared):
    found = settings(read([compared / "runs"])[0])
    assert found == {
        "increment": {"1": ["MEMO", "Replay"]},
        "classes": {"2": ["MEMO", "Replay"]},
        "mem_size": {"100": ["MEMO", "Replay"], "101": ["MEMO", "Replay"]},
        "seed": {"1": ["MEMO", "Replay"], "2": ["MEMO"]},
    }
    text = (compared / "out" / "report.md").read_text()
    assert re.search(r"\| increment +\| 1 +\| all +\|", text)
    assert re.search(r"\| seed +\| 2 +\| MEMO +\|", text)


def test_the_same_runs_give_the_same_report(compared):
    report([compared / "runs"], compared / "again")
    contents = [
        {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (compared / "out", compared / "again")
    ]
    assert contents[0] == contents[1]
    assert {"index.html", "memory-bars.pdf", "memory-bars.svg"} < set(contents[0])


def test_the_shipped_report_is_what_its_runs_give(tmp_path):
    results = Path(__file__).parents[2] / "experiments" / "results"
    shipped = results / "equal_budget_cifar100_b0_inc10_short"
    report([shipped, results / "der_cifar100_b0_inc10_short" / "unpruned"], tmp_path)
    for name in ("report.md", "results.csv"):
        assert (tmp_path / name).read_text() == (shipped / "report" / name).read_text()


def test_figures_of_an_earlier_report_on_more_runs_go(compared):
    out = compared / "again"
    report([compared / "runs"], out)
    stale = [out / "figures" / f"confusion-99.{kind}" for kind in ("svg", "pdf")]
    own = out / "figures" / "accuracy-mine.svg"
    for path in (*stale, own):
        path.touch()
    report([compared / "runs"], out)
    assert own.exists()
    assert not any(path.exists() for path in stale)


class References(HTMLParser):
    """Collects whatever a page could load or lead to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        names = ("src", "href", "srcset", "action", "data", "poster")
        self.found += [(tag, value) for name, value in attrs if name in names]


def test_the_page_holds_its_figures_and_refers_to_nothing_else(compared):
    text = (compared / "out" / "index.html").read_text()
    references = References()
    references.feed(text)
    assert {tag for tag, _ in references.found} == {"img"}
    # Two budgets, memory curves and bars, and a confusion matrix for each group.
    assert len(references.found) == 2 + 2 + 4
    for _, value in references.found:
        kind, data = value.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"</svg>" in base64.b64decode(data)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_a_browser_shows_the_page(compared):
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on the PATH")
    # A copy, which reports what the browser made of the page. Its policy admits this one script.
    script = """<script>addEventListener("load", () => {
      const images = [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.clientHeight]);
      const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
      const root = document.documentElement;
      const report = {images, loaded, page: root.scrollWidth, window: innerWidth,
                      table: document.querySelector("table").clientWidth,
                      cells: [...document.querySelectorAll("tbody tr:first-child td")].length};
      root.setAttribute("data-seen", JSON.stringify(report));
    });</script></body>"""
    text = (compared / "out" / "index.html").read_text()
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = compared / "seen.html"
    copy.write_text(text.replace("</body>", script))
    dom = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--window-size=1280,900", f"--user-data-dir={compared / 'profile'}"),
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    seen = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert len(seen["images"]) == 8
    assert all(size > 100 for image in seen["images"] for size in image)
    assert seen["loaded"] == []
    assert seen["page"] <= seen["window"]
    assert 0 < seen["table"] <= seen["window"]
    assert "<h1>digits, Base-0 Inc-1: 2 classes in 2 experiences</h1>" in dom
    assert '<td class="number">62.50 ± 3.54</td>' in dom


def test_runs_without_confusion_counts_are_reported_without_the_matrix(tmp_path):
    run = make_run(tmp_path / "old")
    results = json.loads((run / "results.json").read_text())
    del results["cnn"]["confusion"]
    (run / "results.json").write_text(json.dumps(results))
    page = report([run], tmp_path / "out").read_text()
    assert "MEMO, resnet8, 200 exemplars: no confusion matrix" in page
    assert "confusion-1" not in page
    assert "No area under accuracy" in page


def cnn(**change):
    readout = {"accuracy": [1.0, 0.5], "average": 0.75, "last": 0.5}
    return readout | {"forgetting_rate": [0.0, 0.5]} | change


def test_a_group_has_the_readouts_of_all_its_runs(tmp_path):
    make_run(tmp_path / "1", replace(PLAIN, seed=1), nme=cnn())
    make_run(tmp_path / "2", replace(PLAIN, seed=2))
    [own] = groups_of(tmp_path)
    assert own.readouts == ["cnn"]


def test_forgetting_and_memory_are_those_after_the_last_experience(tmp_path):
    sizes = [{"parameter_bytes": n * MEGABYTE, "exemplar_bytes": 3 * n * MEGABYTE} for n in (1, 2)]
    make_run(tmp_path / "1", cnn=cnn(forgetting_rate=[0.4, 0.1]), bytes=sizes)
    [own] = groups_of(tmp_path)
    assert own.percent("cnn", "forgetting_rate").mean == pytest.approx(10)
    assert (own.megabytes("parameter"), own.megabytes("exemplar")) == (2, 6)


def test_only_the_protocol_and_the_seed_can_be_averaged_over():
    with pytest.raises(ValueError, match=r"average: expected some of .*, got mem_size"):
        check_protocol({"a": PLAIN.identity()}, average=["mem_size"])


def test_a_shorter_curve_lies_by_the_budget_nearest_by_ratio(tmp_path):
    points(tmp_path, "memo", 1, 7)
    points(tmp_path, "replay", 2.8)  # 3.8 MB: 1.9 times 2 MB, but 8 MB is 2.1 times as much.
    found = budgets(curves(groups_of(tmp_path)))
    assert [[own.method for own in budget] for budget in found] == [["MEMO", "Replay"], ["MEMO"]]


def test_groups_of_a_method_stay_together_by_label(tmp_path):
    for i, (fast, size) in enumerate([(True, 1), (False, 2), (True, 3), (False, 4)]):
        config = replace(PLAIN, fast=fast, mem_size=100 + size)
        make_run(tmp_path / f"{i}", config, exemplars=size * MEGABYTE)
    found = [own.method for own in groups_of(tmp_path)]
    assert found == ["MEMO, fast false"] * 2 + ["MEMO, fast true"] * 2


def test_areas_of_as_many_but_other_seeds_are_of_the_means(tmp_path):
    points(tmp_path, "memo", 1, seeds=(1, 2))
    config = replace(PLAIN, mem_size=101)
    for seed in (2, 3):
        make_run(tmp_path / f"large-{seed}", replace(config, seed=seed), exemplars=2 * MEGABYTE)
    [curve] = curves(groups_of(tmp_path)).values()
    assert areas(curve, "cnn", "last").deviation is None
    assert areas([curve[0], curve[0], curve[1]], "cnn", "last") is None


def test_a_group_with_one_run_of_no_confusion_counts_has_no_matrix(tmp_path):
    make_run(tmp_path / "runs" / "1", replace(PLAIN, seed=1), cnn=cnn())
    make_run(tmp_path / "runs" / "2", replace(PLAIN, seed=2))
    page = report([tmp_path / "runs"], tmp_path / "out").read_text()
    assert "no confusion matrix" in page
    assert "confusion-1" not in page


def test_a_table_with_spreads_has_one_decimal(tmp_path):
    points(tmp_path / "runs", "memo", 1, seeds=(1, 2))
    points(tmp_path / "runs", "replay", 1)
    report([tmp_path / "runs"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    steps = text[text.index("## Accuracy after each") : text.index("## Settings")]
    assert "| 52.5 ± 3.5 |" in steps
    assert "  50.0 |" in steps


def test_the_runs_table_has_the_last_memory_and_all_minutes(tmp_path):
    sizes = [{"parameter_bytes": n * MEGABYTE, "exemplar_bytes": 3 * n * MEGABYTE} for n in (1, 2)]
    seconds = {"train": [60.0, 120.0], "eval": [30.0, 30.0]}
    folder = make_run(
        tmp_path / "a", cnn=cnn(forgetting_rate=[0.0, 0.25]), bytes=sizes, seconds=seconds
    )
    row = accuracy_table([json.loads((folder / "results.json").read_text())]).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:] == ["75.00", "50.00", "25.00", "2.00", "6.00", "4.0"]


def test_the_runs_figure_is_over_classes_seen_in_percent(tmp_path, monkeypatch):
    results = json.loads((make_run(tmp_path / "a") / "results.json").read_text())
    results["classes"] = [[0, 1], [2]]
    drawn = []
    monkeypatch.setattr("experiments.figures.save_figure", lambda figure, _: drawn.append(figure))
    accuracy_figure([results], tmp_path / "figure.png")
    [line] = drawn[0].axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 3], [100, 50])


def test_lines_divide_the_experiences_of_a_confusion_matrix(tmp_path):
    counts = [[1] * 3] * 3
    make_run(tmp_path / "a", classes=[[0], [1, 2]], cnn=cnn(confusion=counts))
    [own] = groups_of(tmp_path)
    lines = confusion_matrices(own).axes[0].get_lines()
    assert [next(iter(line.get_ydata())) for line in lines[::2]] == [0.5]


def test_a_balanced_phase_in_which_all_learns_is_of_the_protocol():
    der = replace(PLAIN, method="der", later=[*PLAIN.later, Phase(3, data="balanced")])
    with pytest.raises(ValueError, match="later: "):
        check_protocol({"memo": PLAIN.identity(), "der": der.identity()})


def test_confusion_is_in_percent_of_a_rows_samples(tmp_path):
    make_run(tmp_path / "a", cnn=cnn(confusion=[[4, 0], [6, 10]]))
    image = confusion_matrices(groups_of(tmp_path)[0]).axes[0].images[0].get_array()
    assert image.tolist() == [[100, 0], [37.5, 62.5]]


def test_finished_runs_are_not_checked_again(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "a")
    monkeypatch.setattr(run_module, "check", lambda config: pytest.fail("it has finished"))
    monkeypatch.setattr(run_module, "data_digest", lambda config: None)
    run_module.main(["--resume", str(folder)])
    assert "| MEMO (CNN)" in capsys.readouterr().out
