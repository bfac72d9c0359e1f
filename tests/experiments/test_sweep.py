import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from avalanche_memo.budget import parameter_bytes
from avalanche_memo.models import cifar_resnet, convnet2
from avalanche_memo.training import (
    BIC_TRAINING,
    DER_CLASSIFIER,
    DER_REPRESENTATION,
    ICARL_FIRST,
    ICARL_LATER,
    MEMO_FIRST,
    MEMO_LATER,
    PODNET_BALANCED,
    PODNET_TRAINING,
    WA_FIRST,
    WA_LATER,
    Phase,
)
from experiments import sweep as module
from experiments.config import Config, read_yaml
from experiments.run import run
from experiments.sweep import check_runs, load, main, run_all
from tests.experiments.test_report import make_run

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
SWEEP = """
folder: {folder}
common:
  classes: 6
  first: [{{epochs: 2}}]
  later: [{{epochs: 2}}]
axes:
  method:
    memo: {{method: memo}}
    replay: {{method: replay}}
    finetune: {{method: finetune}}
  budget:
    small: {{memo: {{mem_size: 12}}, replay: {{mem_size: 60}}, finetune: {{}}}}
    large: {{memo: {{mem_size: 24, backbone: resnet14}}, replay: {{mem_size: 90}}, finetune: null}}
  seed: [1, 2]
  protocol:
    b0: {{increment: 2}}
    b4: {{base: 4, increment: 1, small: {{proxies: 3}}, large: {{}}}}
"""


def write(folder: Path, text: str = SWEEP, **changes: str) -> Path:
    """Write a sweep, with parts of its text replaced."""
    text = text.format(folder=folder / "runs")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_run_for_each_combination_named_after_its_points(tmp_path):
    sweep = load(write(tmp_path))
    # (3 methods at the small budget, 2 at the large one), 2 seeds, 2 protocols.
    assert len(sweep.runs) == (3 + 2) * 2 * 2
    config = sweep.runs["b4/memo-small-seed_2"]
    assert config.folder == tmp_path / "runs" / "b4" / "memo-small-seed_2"
    assert (config.method, config.mem_size, config.seed) == ("memo", 12, 2)
    assert (config.base, config.increment, config.proxies, config.classes) == (4, 1, 3, 6)
    assert config.first == [Phase(2)]
    config = sweep.runs["b0/memo-large-seed_1"]
    assert (config.mem_size, config.backbone, config.base) == (24, "resnet14", 0)
    assert not any("finetune-large" in name for name in sweep.runs)
    assert [folder.name for folder in sweep.protocols] == ["b0", "b4"]
    assert (sweep.threads, sweep.gpus, sweep.average) == (1, 0, ["seed"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("common:", "comon:", "expected known names, got 'comon'; the nearest is 'common'"),
        ("  classes: 6", "  clases: 6", "common: .*got 'clases'; the nearest is 'classes'"),
        ("method: memo}", "method: memoo}", "memoo; the nearest is 'memo'"),
        ("memo: {mem_size: 12}", "mem: {mem_size: 12}", "small: .*'mem'; the nearest is 'memo'"),
        ("mem_size: 12}", "memsize: 12}", "small memo: .*'memsize'; the nearest is 'mem_size'"),
        ("mem_size: 12}", "mem_size: a}", r"memo-small-seed_1: .*\"mem_size\".*Got value: a"),
        ("epochs: 2}", "epoch: 2}", "'epoch' is not accepted; the nearest known key is 'epochs'"),
        ("replay: {mem_size: 60}, ", "", "small: expected all points of method .* for replay"),
        ("[1, 2]", "[1, 1]", "seed: expected different values"),
        ("[1, 2]", "1", "seed: expected a list of values or named points, got 1"),
        ("[1, 2]", "[]", "seed: expected a list of values or named points"),
        ("[1, 2]", "[[1], 2]", "seed: expected names of letters, .* got 'seed_.1.'"),
        (
            "replay: {method: replay}",
            "memo: {method: replay}",
            r"memo: .*got it twice .*line \d",
        ),
        ("b0: {increment: 2}", "b0: {mem_size: 2}", "mem_size: .*one axis .* budget and protocol"),
        ("b0: {increment: 2}", "memo: {increment: 2}", "expected a name that nothing else has"),
        ("b0: {increment: 2}", "base: {increment: 2}", "expected a name that nothing else has"),
        ("b0: {increment: 2}", "b0: 2", "protocol b0: expected options and their values, got 2"),
        ("{mem_size: 90}", "{mem_size: 60}", "the same in .*replay-small.* and .*replay-large"),
        ("{mem_size: 90}", "{increment: 3, mem_size: 90}", "increment: expected one axis"),
        ("{mem_size: 90}", "{momentum: 0.5}", "momentum: 0.9 in .*; 0.5 in b0/replay-large"),
        ("{mem_size: 90}", "{run_folder: x}", "got 'run_folder'"),
        ("common:", "threads: 0\ncommon:", "threads: expected a whole number of at least 1, got 0"),
        ("common:", "gpus: one\ncommon:", "gpus: expected a number of at least 0, got one"),
        ("common:", "allow: [mem_size]\ncommon:", "allow: expected some of .*, got mem_size"),
        ("folder:", "# folder:", "expected the keys folder and axes"),
        ("common:", "threads: 1.5\ncommon:", "threads: expected a whole number .*, got 1.5"),
        ("common:", "threads: true\ncommon:", "threads: expected a whole number .*, got True"),
        ("common:", "retries: 1.5\ncommon:", "retries: expected a whole number .*, got 1.5"),
        ("common:", "gpus: .nan\ncommon:", "gpus: expected a number of at least 0, got nan"),
        ("common:", "allow: later\ncommon:", "allow: expected a list of options, got later"),
        ("common:", "average:\ncommon:", "average: expected a list of options, got None"),
        ("b0: {increment: 2}", "report: {increment: 2}", "expected names .* got 'report'"),
        ("b0: {increment: 2}", "..: {increment: 2}", r"expected names .* got '\.\.'"),
    ],
)
def test_a_faulty_sweep_is_refused(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(write(tmp_path, **{old: new}))


@pytest.mark.parametrize("folder", ["", "5", "[a]"])
def test_a_folder_that_is_no_path_is_refused(tmp_path, folder):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"folder: {folder}\naxes: {{seed: [1]}}\n")
    with pytest.raises(ValueError, match="folder: expected a path, got "):
        load(path)


def test_combinations_of_one_name_are_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    first, second = "{a: {mem_size: 20}, a-b: {mem_size: 30}}", "{b-c: {proxies: 2}, c: {}}"
    path.write_text(f"folder: {tmp_path}\naxes:\n  x: {first}\n  y: {second}\n")
    with pytest.raises(ValueError, match=r"axes: expected a name for .*, got two called a-b-c"):
        load(path)


def test_protocols_may_be_the_only_axis(tmp_path):
    path = tmp_path / "sweep.yaml"
    axes = "{protocol: {b0: {increment: 2}, b4: {base: 4, increment: 2}}}"
    path.write_text(f"folder: {tmp_path}\naxes: {axes}\n")
    sweep = load(path)
    assert list(sweep.runs) == ["b0/run", "b4/run"]
    assert list(sweep.protocols) == [tmp_path / "b0", tmp_path / "b4"]


def test_a_merged_mapping_may_be_overridden(tmp_path):
    point = "b0: &p {increment: 2}\n    other: {<<: *p, increment: 3}"
    sweep = load(write(tmp_path, **{"b0: {increment: 2}": point}))
    assert sweep.runs["other/memo-small-seed_1"].increment == 3


@pytest.mark.parametrize("place", ["deep: {way: {%s}}", "%s"], ids=["above", "beside"])
def test_a_mapping_that_merges_another_may_be_merged_itself(place, tmp_path):
    both = "a: &a {x: 1, z: 0}, b: &b {<<: *a, x: 2}"
    (tmp_path / "file").write_text("{" + place % both + ", flat: {<<: *b, y: 3}}")
    assert read_yaml(tmp_path / "file")["flat"] == {"x": 2, "y": 3, "z": 0}


def test_a_key_that_comes_twice_is_refused_within_a_mapping_too(tmp_path):
    (tmp_path / "file").write_text("deep: {x: 1, x: 2}")
    with pytest.raises(ValueError, match="x: expected once in a mapping, got it twice"):
        read_yaml(tmp_path / "file")


def test_one_option_is_set_by_one_inner_point(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"folder: {tmp_path}\naxes: {{size: {{x: {{a: {{mem_size: 20}}, s1: {{mem_size: 30}}}}}}, "
        "way: {a: {}}, s: {s1: {seed: 1}}}\n"
    )
    with pytest.raises(ValueError, match="mem_size: expected one point to set it, got a and s1"):
        load(path)


def test_runs_of_other_experiences_are_refused_before_training(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"folder: {tmp_path}/runs\nallow: [increment]\ncommon: {{classes: 4}}\n"
        "axes: {step: {one: {increment: 2}, two: {increment: 4}}}\n"
    )
    with pytest.raises(SystemExit):
        main([str(path), "--check"])
    assert "got classes per experience of [2, 2] in one and [4] in two" in capsys.readouterr().err


def test_runs_on_other_data_are_refused_before_training(tmp_path, capsys):
    for name, images in (("one", 3), ("two", 4)):
        for place in (f"{name}/{part}/{c}" for part in ("train", "val") for c in "ab"):
            (tmp_path / place).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (16, 16)).save(tmp_path / place / f"{i}.png")
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"folder: {tmp_path}/runs\ncommon: {{benchmark: image_folder, image_size: 16, classes: 2, "
        "increment: 1}\n"
        f"axes: {{data: {{one: {{data_root: {tmp_path}/one, mem_size: 4}}, "
        f"two: {{data_root: {tmp_path}/two, mem_size: 2}}}}}}\n"
    )
    with pytest.raises(SystemExit):
        main([str(path), "--check"])
    assert "data: 12 files of 2 classes" in capsys.readouterr().err


def test_runs_are_checked_before_any_is_trained(tmp_path, capsys):
    path = write(tmp_path, **{"mem_size: 24": "mem_size: 5"})
    with pytest.raises(SystemExit):
        main([str(path)])
    message = "b0/memo-large-seed_1: mem_size: expected at least one exemplar for each of 6 classes"
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_each_run_that_starts_from_another_is_checked(tmp_path, monkeypatch):
    starts = "{{1: {{seed: 1}}, 2: {{seed: 2, start_from: gone}}}}"
    sweep = load(write(tmp_path, **{"seed: [1, 2]": f"seed: {starts}".format()}))
    starts = {config.start_from for config in sweep.runs.values()}
    assert starts == {None, str(Path("gone").absolute())}
    with pytest.raises(ValueError, match=r"b0/memo-small-2: start_from: expected a run folder"):
        check_runs(sweep)


def test_a_start_of_another_seed_is_refused_before_training(tmp_path):
    donor = tmp_path / "donor"
    run(Config(classes=2, first=[Phase(1)], seed=1, run_folder=str(donor)))
    common = f"common:\n  start_from: {donor}\n  classes: 2\n  later: [{{epochs: 1}}]"
    (tmp_path / "sweep.yaml").write_text(
        f"folder: {tmp_path}/runs\n{common}\n  first: [{{epochs: 1}}]\naxes: {{seed: [1, 2]}}\n"
    )
    with pytest.raises(ValueError, match=r"seed_2: start_from: .*seed: 1 there, 2 here"):
        check_runs(load(tmp_path / "sweep.yaml"))


def test_runs_on_a_gpu_need_a_part_of_one(tmp_path):
    sweep = load(write(tmp_path, **{"common:": "common:\n  device: cuda"}))
    with pytest.raises(ValueError, match="gpus: expected above 0 for the device cuda, got 0"):
        check_runs(sweep)


def test_cpus_of_a_cluster_are_its_own(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(write(tmp_path)), "--address=auto", "--cpus=2"])
    assert "--cpus: expected none beside --address, got 2" in capsys.readouterr().err


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    sweep = load(write(tmp_path))
    config = sweep.runs["b4/memo-small-seed_2"]
    config.folder.mkdir(parents=True)
    replace(config, lr=0.7).save(config.folder / "config.yaml")
    with pytest.raises(ValueError, match=r"b4/memo-small-seed_2: run_folder: .*lr: 0.7 there, 0.1"):
        check_runs(sweep)


def test_without_ray_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"pip install -e '.\[sweep\]'"):
        run_all(load(write(tmp_path)))


@pytest.mark.parametrize("schedule", ["", "_short"])
def test_the_shipped_sweep_compares_at_equal_bytes(schedule):
    sweep = load(CONFIGS / f"sweep_cifar100_b0_inc10{schedule}.yaml")
    image = 32 * 32 * 3
    # In bytes: ten of DER's backbones, or at the smallest one ResNet-32, and 2000 exemplars.
    budgets = {"7.6MB": 7998016, "12.4MB": 13018240, "16.1MB": 16906880}
    budgets |= {"19.8MB": 20795520, "23.5MB": 24684160}
    for name, config in sweep.runs.items():
        backbone = (
            convnet2() if config.backbone == "convnet2" else cifar_resnet(int(config.backbone[6:]))
        )
        *shared, last = [parameter_bytes(stage) for stage in backbone.stages]
        model = {"memo": sum(shared) + 10 * last, "der": 10 * (sum(shared) + last)}.get(
            config.method, sum(shared) + last
        )
        budget = budgets[name.split("-")[1]]
        assert abs(budget - model - config.mem_size * image) < image, name
        assert f"{budget / 2**20:.1f}MB" == name.split("-")[1]
    assert len(sweep.runs) == (5 * 3 if schedule else 7 * 5 * 3)


def test_the_shipped_cifar_100_sweep_has_the_published_schedules():
    sweep = load(CONFIGS / "sweep_cifar100_b0_inc10.yaml")
    phases = {config.method: (config.first, config.later) for config in sweep.runs.values()}
    assert phases["memo"] == phases["replay"] == ([MEMO_FIRST], [MEMO_LATER])
    assert phases["der"] == ([DER_REPRESENTATION], [DER_REPRESENTATION, DER_CLASSIFIER])
    assert phases["icarl"] == ([ICARL_FIRST], [ICARL_LATER])
    assert phases["wa"] == ([WA_FIRST], [WA_LATER])
    assert phases["bic"] == ([BIC_TRAINING], [BIC_TRAINING])
    assert phases["podnet"] == ([PODNET_TRAINING], [PODNET_TRAINING, PODNET_BALANCED])


def test_the_shipped_digits_sweep_can_run():
    check_runs(load(CONFIGS / "sweep_digits.yaml"))


def lock_holder(folder: Path) -> int:
    """The process that runs in a folder."""
    inode = f":{(folder / '.lock').stat().st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(inode):
            return int(fields[4])
    raise AssertionError(f"nobody runs in {folder}")


def kill_midway(folder: Path, killed: list) -> None:
    """Kill the process of a run once it has results of some but not all experiences."""
    results, deadline = folder / "results.json", time.monotonic() + 240
    while not results.exists():
        assert time.monotonic() < deadline, "the run has come to no results"
        time.sleep(0.002)
    process = lock_holder(folder)
    os.kill(process, signal.SIGSTOP)  # So that it does not finish behind the back of the check.
    killed.append(json.loads(results.read_text()))
    os.kill(process, signal.SIGKILL)


SMALL = """
folder: {folder}
retries: 1
allow: [later]
common:
  classes: 6
  increment: 2
  first: [{{epochs: 1}}]
axes:
  run:
    killed: {{method: memo, later: [{{epochs: 6}}]}}
    calm: {{method: replay, later: [{{epochs: 6}}]}}
    hopeless: {{method: finetune, later: [{{epochs: 6, lr: 1.0e+30}}]}}
"""


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="needs /proc/locks to find a worker")
def test_a_sweep_survives_the_killing_of_a_worker(tmp_path, capsys):
    pytest.importorskip("ray", reason="needs ray: pip install -e '.[sweep]'")
    path = write(tmp_path, SMALL)
    sweep = load(path)
    killed = []
    killer = threading.Thread(
        target=kill_midway, args=(sweep.runs["killed"].folder, killed), daemon=True
    )
    killer.start()
    with pytest.raises(SystemExit, match=r"(?s)failed.*hopeless: .*FloatingPointError"):
        main([str(path), "--cpus", "2"])
    killer.join()

    [before] = killed
    assert len(before["classes"]) < before["experiences"] == 3
    for name in ("killed", "calm"):
        config = sweep.runs[name]
        survived = json.loads((config.folder / "results.json").read_text())
        undisturbed = run(replace(config, run_folder=str(tmp_path / "undisturbed" / name)))
        seconds = survived.pop("seconds")
        undisturbed.pop("seconds")
        assert survived == undisturbed
        if name == "killed":  # It went on; nothing was trained again.
            done = len(before["classes"])
            assert seconds["train"][:done] == before["seconds"]["train"]

    printed = capsys.readouterr().out
    page = (tmp_path / "runs" / "report" / "index.html").read_text()
    assert "3 runs, 0 of them finished before" in printed
    assert f"Report: {tmp_path / 'runs' / 'report' / 'index.html'}" in printed
    assert "hopeless: left out, not finished" in page


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, SMALL[: SMALL.index("    hopeless")], **{"classes: 6": "classes: 2"})
    sweep = load(path)
    for config in sweep.runs.values():
        run(config)
    monkeypatch.setattr(module, "_ray", lambda: pytest.fail("there is nothing to run"))
    # What a sweep held before it was changed is none of its runs.
    make_run(tmp_path / "runs" / "former", Config(against=[], classes=2, increment=1))
    main([str(path)])
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out
    assert "- runs: 2;" in (tmp_path / "runs" / "report" / "report.md").read_text()


def test_points_of_axes_take_the_place_of_common_options(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"folder: {tmp_path}\ncommon: {{mem_size: 50}}\naxes: {{mem_size: [20, 60]}}\n")
    assert [config.mem_size for config in load(path).runs.values()] == [20, 60]


def test_a_sweep_goes_on_with_runs_that_were_begun(tmp_path, monkeypatch):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"folder: {tmp_path}/runs\ncommon: {{classes: 2}}\naxes: {{seed: [1, 2]}}\n")
    sweep = load(path)
    sweep.runs["seed_1"].folder.mkdir(parents=True)

    class Ray:
        init = shutdown = staticmethod(lambda *_, **__: None)

    waiting = []
    monkeypatch.setattr(module, "_ray", lambda: Ray)
    monkeypatch.setattr(module, "_run_on", lambda ray, sweep, runs: waiting.extend(runs))
    run_all(sweep)
    assert waiting == ["seed_1", "seed_2"]


def test_a_point_is_not_called_like_its_folder(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"folder: {tmp_path}\naxes: {{protocol: {{.: {{increment: 1}}}}}}\n")
    with pytest.raises(ValueError, match=r"protocol: expected names .* got '\.'"):
        load(path)
