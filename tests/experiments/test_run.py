import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from avalanche_memo.benchmarks import split_digits
from avalanche_memo.training import (
    BIC_TRAINING,
    DER_CLASSIFIER,
    DER_REPRESENTATION,
    ICARL_FIRST,
    ICARL_LATER,
    JOINT_TRAINING,
    PODNET_BALANCED,
    PODNET_TRAINING,
    WA_FIRST,
    WA_LATER,
    Compression,
    Phase,
)
from avalanche_memo.training.checkpoint import Checkpoint
from avalanche_memo.training.plugins import SoftmaxDistillationPlugin
from experiments import run as module
from experiments.building import data_digest, data_root, make_benchmark, make_network
from experiments.config import Config, from_options, parse
from experiments.figures import accuracy_figure, accuracy_table
from experiments.folders import refuse_other, refuse_other_data, stored_config
from experiments.progress import ProgressBar
from experiments.run import check, main, run

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
SHORT = [
    "--against=[]",
    "--classes=6",
    '--first=[{"epochs": 2}]',
    '--later=[{"epochs": 2}, {"epochs": 1, "learns": "classifier", "data": "balanced"}]',
]


def short(folder: Path, **changes) -> Config:
    return replace(parse([*SHORT, "--run_folder", str(folder)]), **changes)


def without_times(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    seconds = results.pop("seconds")
    n = results["experiences"]
    assert {part: len(values) for part, values in seconds.items()} == {"train": n, "eval": n}
    assert min(map(min, seconds.values())) > 0
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(short(folder))
    return folder


def test_a_run_folder_holds_what_a_user_reads(finished):
    results = without_times(finished)
    assert results["classes"] == [[0, 1], [2, 3], [4, 5]]
    for readout in ("cnn", "nme"):
        matrix = np.array(results[readout]["matrix"], dtype=float)
        assert matrix.shape == (3, 3)
        assert np.array_equal(np.isnan(matrix), np.triu(np.ones((3, 3), bool), 1))
        assert results[readout]["average"] == pytest.approx(np.mean(results[readout]["accuracy"]))
        assert results[readout]["last"] == results[readout]["accuracy"][-1] > 0.5
        confusion = np.array(results[readout]["confusion"])
        assert np.trace(confusion) / confusion.sum() == pytest.approx(results[readout]["last"])
        # Two classes of each experience, in order of appearance.
        samples = [len(e.dataset) for e in split_digits(increment=2, classes=6).test_stream]
        assert confusion.sum(axis=1).reshape(3, 2).sum(axis=1).tolist() == samples
    assert (finished / "results.json").read_text().count("\n") < 200
    assert (finished / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert parse(["--config", str(finished / "config.yaml")]).identity() == results["config"]


def test_bytes_are_those_of_parameters_and_exemplars(finished):
    results = without_times(finished)
    # ResNet-8 on one channel: convolutions and BatchNorms by hand; the head grows with both.
    conv = lambda i, o: 9 * i * o + 2 * o  # noqa: E731
    shared = conv(1, 16) + 2 * conv(16, 16) + conv(16, 32) + conv(32, 32)
    block = conv(32, 64) + conv(64, 64)
    for i, memory in enumerate(results["bytes"], start=1):
        head = 2 * i * 64 * i + 2 * i
        assert memory["parameter_bytes"] == 4 * (shared + i * block + head)
        assert memory["exemplar_bytes"] == 200 // (2 * i) * (2 * i) * 64


def test_every_value_is_in_tensorboard(finished):
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    results = without_times(finished)
    expected = {
        "StreamForgetting": results["stream_forgetting"],
        "ExemplarMemory_MB": [m["exemplar_bytes"] / 2**20 for m in results["bytes"]],
    }
    for readout in ("cnn", "nme"):
        own, name = results[readout], readout.upper()
        assert own["top5"][:2] == [None, None]  # of two and four classes
        assert [len(groups) for groups in own["groups_of_ten"]] == [1, 1, 1]
        expected |= {
            f"Top1_Acc_{name}_Stream": own["accuracy"],
            f"Top5_Acc_{name}_Stream": own["top5"][2:],
            f"ForgettingRate_{name}": own["forgetting_rate"],
        }
        values = [group for (group,) in own["groups_of_ten"]]
        tag = f"Top1_Acc_{name}_Group/eval_phase/test_stream/Classes00-09"
        assert [e.value for e in events.Scalars(tag)] == pytest.approx(values, rel=1e-6)
    for name, values in expected.items():
        found = [e.value for e in events.Scalars(f"{name}/eval_phase/test_stream")]
        assert found == pytest.approx(values, rel=1e-6)
    assert len(events.Scalars("Loss_Epoch/train_phase/train_stream/Task000")) == 2 + 3 + 3


def test_a_finished_run_is_not_repeated(finished):
    before = (finished / "results.json").stat().st_mtime_ns
    run(short(finished))
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished, tmp_path):
    run(short(tmp_path / "again", keep_models=True))
    run(short(tmp_path / "other", seed=1))
    assert without_times(tmp_path / "again") == without_times(finished)
    assert without_times(tmp_path / "other")["cnn"] != without_times(finished)["cnn"]


@pytest.mark.parametrize("epochs_seen", [1, 3, 6])
def test_a_run_killed_outright_goes_on_to_the_same_numbers(finished, tmp_path, epochs_seen):
    folder = tmp_path / "killed"
    # Slowed down after each epoch, so that the kill falls where the parameter says.
    program = (
        "import sys, time, torch\n"
        # Sums are rounded differently by another number of threads.
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from avalanche_memo.training.checkpoint import Checkpoint\n"
        "save, count = Checkpoint.save, [0]\n"
        "def slow(self, strategy):\n"
        "    save(self, strategy); count[0] += 1\n"
        f"    if count[0] == {epochs_seen}: print('here', flush=True); time.sleep(600)\n"
        "Checkpoint.save = slow\n"
        "from experiments.run import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [*SHORT, "--keep_models=true", "--run_folder", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder / "checkpoint.pt.part").write_bytes(b"half a file")
    main(["--resume", str(folder)])
    assert without_times(folder) == without_times(finished)
    kept = [f"{number:03d}-{epoch}.pt" for number in (1, 2, 3) for epoch in ("first", "last")]
    assert sorted(path.name for path in (folder / "models").iterdir()) == kept


def test_a_run_that_goes_on_elsewhere_names_both_machines(finished, tmp_path, monkeypatch):
    config = short(tmp_path / "moved")
    monkeypatch.setattr("experiments.run.chip", lambda device: "one machine")
    stop_after(config, epochs=2 + 1)  # The first experience, and its checkpoint.
    monkeypatch.setattr("experiments.run.chip", lambda device: "another")
    results = run(config)
    assert results["environment"]["device"] == "one machine, then another"
    assert results["cnn"] == without_times(finished)["cnn"]


def test_a_run_killed_between_its_last_checkpoint_and_its_results_has_results(finished, tmp_path):
    config = short(tmp_path / "last")
    # Two epochs, then twice two and one, and a checkpoint after each experience.
    stop_after(config, epochs=2 + 3 + 3 + 3)
    run(config)
    assert without_times(tmp_path / "last") == without_times(finished)


def test_a_truncated_checkpoint_is_refused_and_the_previous_one_used(finished, tmp_path, caplog):
    folder = tmp_path / "truncated"
    config = short(folder)
    stop_after(config, epochs=4)
    newest = folder / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    run(config)
    assert "checkpoint.pt: refused" in caplog.text
    assert without_times(folder) == without_times(finished)


def test_without_a_whole_checkpoint_nothing_is_overwritten(tmp_path):
    config = short(tmp_path / "damaged")
    stop_after(config, epochs=2)
    for name in ("checkpoint.pt", "checkpoint.pt.previous"):
        torch.save({"format": "something else"}, tmp_path / "damaged" / name)
    with pytest.raises(RuntimeError, match="no checkpoint is usable; remove the folder"):
        run(config)


def stop_after(config: Config, epochs: int) -> None:
    class StopError(Exception):
        pass

    save, saved = Checkpoint.save, []

    def stopping(self, strategy):
        save(self, strategy)
        saved.append(1)
        if len(saved) == epochs:
            raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", stopping)
        patch.setattr("experiments.run._UNSAVED_SECONDS", 0.0)
        with pytest.raises(StopError):
            run(config)


def test_damaged_data_are_refused_before_training(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    config = short(tmp_path / "run", benchmark="cifar100", data_root=str(tmp_path))
    with pytest.raises(ValueError, match=r"root: .*cifar-100-python is incomplete or corrupt"):
        check(config)


def test_a_folder_of_another_configuration_is_refused(finished):
    with pytest.raises(ValueError, match=r"run_folder: .*mem_size: 200 there, 100 here"):
        run(short(finished, mem_size=100))


@pytest.fixture
def two_data_sets(tmp_path):
    for name, classes, images in (("one", "ab", 3), ("names", "ax", 3), ("numbers", "ab", 4)):
        for place in (f"{part}/{c}" for part in ("train", "val") for c in classes):
            (tmp_path / name / place).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (16, 16)).save(tmp_path / name / place / f"{i}.png")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    return tmp_path


def test_a_folder_of_a_run_on_other_data_is_refused(two_data_sets, monkeypatch):
    def config(name):
        options = {"benchmark": "image_folder", "image_size": 16, "classes": 2, "increment": 1}
        return short(two_data_sets / "run", data_root=str(two_data_sets / name), **options)

    monkeypatch.setattr(module, "_train", lambda config, folder: {})
    run(config("one"))
    run(config("moved"))
    assert stored_config(two_data_sets / "run").data_root == str(two_data_sets / "moved")
    run(replace(config("moved"), data_root=str(two_data_sets / "one")))
    run(config("moved"))
    for name in ("names", "numbers"):
        with pytest.raises(ValueError, match=r"run_folder: .* other data \(12 files of 2 classes"):
            run(config(name))
    shutil.rmtree(two_data_sets / "moved" / "val")
    with pytest.raises(FileNotFoundError, match=r"data_root: expected a folder with val/, got .*m"):
        run(config("moved"))
    assert data_digest(Config()) is None
    monkeypatch.setenv("AVALANCHE_MEMO_DATA", str(two_data_sets / "one"))
    unnamed = replace(config("names"), data_root=None)
    assert data_digest(unnamed) == data_digest(config("one"))
    assert len(make_benchmark(unnamed).train_stream) == 2


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(SystemExit, match="run_folder: expected a folder, got the file"):
        main([*SHORT, "--run_folder", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"error: .*Not a directory"):
        main([*SHORT, "--run_folder", str(tmp_path / "run" / "below")])


def test_results_without_a_configuration_are_no_runs(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "results.json", tmp_path / "run")
    with pytest.raises(ValueError, match=r"run_folder: expected a config.yaml beside results.json"):
        run(short(tmp_path / "run"))


def test_models_are_kept_from_the_beginning_or_not_at_all(finished):
    with pytest.raises(ValueError, match=r"keep_models: expected false for .*got true"):
        run(short(finished, keep_models=True))


def test_what_a_method_cannot_train_is_found_before_another_is_trained(tmp_path):
    exemplars = (
        '--later=[{"epochs": 1}, {"epochs": 1, "learns": "classifier", "data": "exemplars"}]'
    )
    options = ["--method=podnet", "--proxies=2", "--classes=4", "--against=[bic]", exemplars]
    with pytest.raises(SystemExit, match="data: BiasCorrectionPlugin expected phases on 'all'"):
        main([*options, "--run_folder", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_folder_is_refused_by_name(tmp_path):
    config = short(tmp_path / "run")
    for text, message in (
        ("", "config.yaml: expected options and their values, got None"),
        ("gone: 1", "config.yaml: .*gone"),
        ("a: [", "config.yaml: .*expected"),
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            run(config)
    config.save(tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"results.json: expected the results of a run"):
        run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mem_size=7", "--against=[bic]", "--method=replay"], "mem_size: .*two exemplars"),
        (["--device=gpuu"], "device: expected a device that is there, .*gpuu"),
        (["--backbone=convnet4"], r"backbone: .* images of shape \(1, 8, 8\), got convnet4"),
        (["--backbone=imagenet_resnet10"], r"backbone: .*\(1, 8, 8\), got imagenet_resnet10"),
        (
            ["--train_generalized=false", "--method=replay", "--against=[]"],
            "train_generalized: expected true for replay",
        ),
        (
            ["--gradient_through_frozen=false", "--method=icarl", "--against=[]"],
            "gradient_through_frozen: expected true for icarl",
        ),
        (["--start_from=nowhere"], "start_from: expected a run folder .* got nowhere"),
        (["--start_from=a", "--keep_models=true"], "keep_models: expected false beside start_from"),
    ],
)
def test_all_that_is_to_run_is_checked_before_the_first(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(module, "run", lambda config: pytest.fail("nothing is to be trained"))
    with pytest.raises(SystemExit, match=f"(?s)experiments.run: error: {message}"):
        main([*SHORT, *options, "--run_folder", str(tmp_path / "run")])
    assert list(tmp_path.iterdir()) == []


def test_another_method_does_not_start_from_a_run_of_the_first(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(module, "check", lambda config: None)
    monkeypatch.setattr(module, "run", started.append)
    with pytest.raises(TypeError):  # There are no results to show.
        main([*SHORT, "--against=[finetune]", "--start_from=donor", f"--run_folder={tmp_path}/a"])
    assert [(c.method, c.start_from) for c in started] == [("memo", "donor"), ("finetune", None)]


def test_folders_are_named_after_all_that_makes_a_run_but_a_seed_has_its_own_place():
    def name(*options):
        return parse([*SHORT, *options]).folder.name

    assert re.fullmatch(r"digits-b0-inc2-memo-resnet8-[0-9a-f]{6}-seed1993", name())
    assert len({name(), name("--lr=0.2"), name("--mem_size=60"), name("--fast=false")}) == 4
    assert name("--seed=7") == name().replace("seed1993", "seed7")
    assert name("--data_root=elsewhere", "--keep_models=true") == name()


def test_the_rest_of_the_memory_is_spent_on_demand(tmp_path):
    options = [*SHORT, "--method=replay", "--mem_size=27", "--run_folder"]
    held = []
    for spend in ("false", "true"):
        folder = str(tmp_path / spend)
        results = run(parse([*options, folder, f"--spend_remainder={spend}"]))
        held.append((results["exemplars"], results["bytes"][-1]["exemplar_bytes"]))
    assert held == [(24, 24 * 64), (27, 27 * 64)]


def test_two_processes_do_not_share_a_folder(finished):
    program = f"import fcntl, time; f = open({str(finished / '.lock')!r}, 'w'); "
    program += "fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match="another process is running in this folder"):
            run(short(finished))
        with pytest.raises(SystemExit, match=r"error: .*another process is running in this folder"):
            main(["--resume", str(finished)])
    finally:
        other.kill()
        other.wait()


def test_methods_are_compared_in_one_figure_and_table(tmp_path, capsys):
    main([*SHORT, "--against=[finetune]", "--run_folder", str(tmp_path / "pair")])
    printed = capsys.readouterr().out
    assert "| MEMO (CNN)" in printed
    assert "| MEMO (NME)" in printed
    assert "| Finetune (CNN)" in printed
    assert (tmp_path / "pair-finetune" / "results.json").exists()


def test_table_and_figure_show_the_numbers_of_the_results(finished, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    row = next(line for line in accuracy_table([results]).splitlines() if "(NME)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == [
        f"{100 * v:.2f}" for v in [*results["nme"]["accuracy"], results["nme"]["average"]]
    ]
    accuracy_figure([results], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("option", [["--later=[{epochs: 51}]"], ["--later", "[{epochs: 51}]"]])
def test_phases_of_the_command_line_take_nothing_from_those_of_the_file(option):
    file = ["--config", "experiments/configs/memo_cifar100_b0_inc10.yaml"]
    assert parse([*file, *option]).later == [Phase(51)]
    assert parse([*file, *option]).first == parse(file).first


def test_options_count_more_than_the_file_wherever_they_stand(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("mem_size: 50\ncompression: {codec: jpeg, quality: 90}\n")
    for file in (["--config", str(path)], [f"--config={path}"]):
        assert parse([*file, "--mem_size=60"]).mem_size == 60
        assert parse(["--mem_size", "60", *file]).mem_size == 60
        assert parse([*file, "--seed=2"]).mem_size == 50
    # What a compression leaves out is as by default, not as in the file.
    assert parse([*file, '--compression={"codec": "webp"}']).compression == Compression("webp")
    assert parse([*file, "--compression.quality=60"]).compression == Compression("jpeg", 60)
    with pytest.raises(SystemExit):
        parse([*file, *file])
    assert f"--config: expected one file, got {path}, {path}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--config"])
    for short in ("--conf", "--mem_siz"):  # As argparse would allow.
        with pytest.raises(SystemExit):
            parse([*file, f"{short}={path}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mem_sizes=3"], "nearest known key is 'mem_size'"),
        (["--temperature=2"], "nearest known key is 'kd_temperature'"),
        (["--run_folder="], "run_folder: expected a folder's name, got an empty one"),
        (["--method=memoo"], "memoo"),
        (['--first=[{"epoch": 3}]'], "epoch"),
        (["--compression.quality=0"], "quality: expected 1 to 100 or 'auto', got 0"),
        (["--seed=-1"], "seed: expected a number of at least 0, got -1"),
        (["--lr=-1"], "lr: expected a number of at least 0, got -1"),
        (["--momentum=1"], "momentum: expected less than 1, got 1"),
        (["--seed=4294967296"], "seed: expected less than 2**32, got 4294967296"),
        (["--class_order_seed=4294967296"], "class_order_seed: expected less than 2**32"),
        (["--resume=nowhere"], "expected a run folder with a config.yaml, got nowhere"),
    ],
)
def test_unknown_configuration_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_a_run_goes_on_with_no_further_options(finished, capsys):
    for resume in (["--resume", str(finished)], [f"--resume={finished}"]):
        assert parse(resume).folder == finished
        for further in ([*resume, "--seed=77"], ["--seed=77", *resume]):
            with pytest.raises(SystemExit):
                parse(further)
            message = "--resume: expected a folder and no further options"
            assert message in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("backbonne: resnet32\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(path)])
    assert "nearest known key is 'backbone'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"mem_size: 3\nmem_size: 4\n", "mem_size: expected once in a mapping, got it twice"),
        (b"", "config.yaml: expected options and their values, got None"),
        (b"backbone: \xff\n", "config.yaml: expected text in UTF-8, got"),
    ],
)
def test_a_file_that_is_no_list_of_options_is_refused_by_name(tmp_path, capsys, text, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    for arguments in (["--config", str(path)], ["--resume", str(tmp_path)]):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mem_size": 5}, ValueError, "mem_size: expected at least one exemplar for each of 6"),
        ({"backbone": "resnet33"}, ValueError, "^backbone: expected 6n"),
        ({"backbone": "vgg"}, ValueError, "backbone: expected .* got vgg"),
        ({"shared_stages": 7}, ValueError, "shared_stages: expected 0 to 3"),
        ({"shared_stages": 0}, ValueError, "MEMO expected a network with shared_stages 1 or 2"),
        ({"attention": "cbam", "backbone": "convnet2"}, ValueError, "attention: .*cbam and convn"),
        ({"memory_rates": [-0.1] * 3}, ValueError, "^memory_rates: expected a finite number"),
        ({"memory_rates": [0.1]}, ValueError, "^memory_rates: expected a rate for experience 2"),
        ({"memory_rates": "default"}, ValueError, "memory_rates: .*default for 5, 10, 25, 50"),
        ({"memory_rates": [9.0] * 3}, ValueError, "rates: expected a memory of at most"),
        (
            {"method": "podnet", "kd_temperature": 0.0, "flat_distillation": "kd"},
            ValueError,
            "^kd_temperature: expected",
        ),
        (
            {"compression": Compression("jpeg", 75), "mem_size": 6},
            ValueError,
            "mem_size: expected room for a compressed image",
        ),
        ({"method": "podnet", "proxies": 0}, ValueError, "proxies: expected a whole number"),
        (
            {"method": "der", "sparsity_weight": -1.0},
            ValueError,
            "^sparsity_weight: expected .* got -1.0",
        ),
        ({"sparsity_weight": 1.0, "mask_s_max": 1.0}, ValueError, "^mask_s_max: .* above 1"),
        ({"sparsity_weight": 1.0, "mask_rate": 0.0}, ValueError, "^mask_rate: .* positive"),
        ({"sparsity_weight": 1.0, "attention": "cbam"}, ValueError, "backbone: .* no attention"),
        ({"method": "icarl", "kd_temperature": 0.0}, ValueError, "^kd_temperature: .* a positive"),
        ({"method": "wa", "kd_weight": -1.0}, ValueError, "^kd_weight: expected a number of"),
        ({"method": "bic", "mem_size": 7}, ValueError, "mem_size: .*at least two exemplars of"),
        ({"method": "joint", "shared_stages": 1}, ValueError, "Joint expected a network with"),
        ({"increment": 4}, ValueError, "increment: expected a divisor"),
        ({"class_order": [3, 1, 2]}, ValueError, "^class_order: expected each class id"),
        (
            {"benchmark": "cifar100", "data_root": "nowhere"},
            FileNotFoundError,
            "^data_root: .*download=True",
        ),
        ({"benchmark": "image_folder", "data_root": "nowhere"}, FileNotFoundError, "^data_root: "),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(short(tmp_path / "bad", **changes))
    assert not (tmp_path / "bad" / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    config = short(tmp_path / "nan", later=[Phase(2, lr=1e30)])
    with pytest.raises(FloatingPointError, match=r"experience 1, epoch \d, step \d"):
        run(config)
    state = torch.load(tmp_path / "nan" / "checkpoint.pt", weights_only=True)["state"]
    assert state["clock"]["train_exp_counter"] == 1


def test_the_shipped_configurations_are_the_published_protocol():
    config = parse(["--config", str(CONFIGS / "memo_cifar100_b0_inc10.yaml")])
    assert (config.base, config.increment, config.batch_size) == (0, 10, 128)
    assert config.first == [Phase(200, 0.1, 5e-4, (60, 120, 170))]
    assert config.later == [Phase(170, 0.1, 2e-4, (80, 120, 150))]
    parse(["--config", str(CONFIGS / "memo_cifar100_b0_inc10_short.yaml")])


def test_the_shipped_der_configuration():
    config = parse(["--config", str(CONFIGS / "der_cifar100_b0_inc10_short.yaml")])
    assert (config.method, config.base, config.increment) == ("der", 0, 10)
    memo = parse(["--config", str(CONFIGS / "memo_cifar100_b0_inc10_short.yaml")])
    assert config.first == memo.first
    assert config.later == [*memo.later, replace(DER_CLASSIFIER, epochs=10, milestones=(5,))]
    authors = parse(["--config", str(CONFIGS / "der_cifar100_b0_inc10_resnet18.yaml")])
    assert (authors.base, authors.increment, authors.batch_size) == (0, 10, 128)
    assert authors.first == [DER_REPRESENTATION]
    assert authors.later == [DER_REPRESENTATION, DER_CLASSIFIER]
    with torch.device("meta"):
        assert make_network(authors).stages == 4
        pruned = make_network(replace(authors, sparsity_weight=1.0))
    assert pruned.masks()[0].convolution.kernel_size == (3, 3)


def test_a_sparsity_weight_is_refused_where_there_are_no_masks(tmp_path):
    config = short(tmp_path, method="wa", sparsity_weight=5.0)
    with pytest.raises(ValueError, match=r"^sparsity_weight: expected 0 for wa, .* got 5\.0"):
        check(config)


def test_a_stem_for_small_images_is_the_imagenet_resnets_alone(tmp_path):
    with pytest.raises(ValueError, match=r"backbone: .* got resnet8_cifar_stem"):
        make_network(short(tmp_path, backbone="resnet8_cifar_stem"))


def test_methods_run_against_one_that_expands_have_none_of_its_options(
    tmp_path, monkeypatch, capsys
):
    weights = []
    monkeypatch.setattr("experiments.run.run", lambda config: weights.append(config) or {})
    monkeypatch.setattr("experiments.run.accuracy_figure", lambda *_: None)
    monkeypatch.setattr("experiments.run.accuracy_table", lambda _: "")
    options = ["--sparsity_weight=1", "--train_generalized=false", f"--run_folder={tmp_path}/"]
    options.append("--gradient_through_frozen=false")
    main(["--method=der", "--against=[memo,wa]", *options])
    assert [config.gradient_through_frozen for config in weights] == [False, False, True]
    assert [config.sparsity_weight for config in weights] == [1.0, 1.0, 0.0]
    assert [config.train_generalized for config in weights] == [False, False, True]
    beside = [tmp_path.with_name(f"{tmp_path.name}-{method}") for method in ("memo", "wa")]
    assert [config.folder for config in weights] == [tmp_path, *beside]


PODNET = [
    *("--method=podnet", "--proxies=2", "--attention=cbam", "--flat_distillation=both"),
    "--squared_distance=true",
    '--later=[{"epochs": 2}, {"epochs": 1, "learns": "classifier", "data": "exemplars"}]',
]


def test_podnet_and_its_variants_are_configurations(tmp_path):
    rates = "--memory_rates=[0.1,0.1,0.1]"
    config = parse([*SHORT, *PODNET, rates, "--run_folder", str(tmp_path / "podnet")])
    classifier = make_network(config).classifier
    assert (classifier.proxies, classifier.squared_distance) == (2, True)
    results = run(config)
    assert {"cnn", "nme"} <= set(results)
    assert results["config"]["flat_distillation"] == "both"
    # 200 // 6 of each of 6 classes; an increment of 2 classes has the images of the first two.
    train = split_digits(increment=2, classes=6).train_stream
    more = int(0.1 * 2 * (len(train[0].dataset) // 2))
    assert results["bytes"][-1]["exemplar_bytes"] == (200 + more) // 6 * 6 * 64


def test_the_progress_bar_expects_what_a_memory_holds_beyond_its_size(tmp_path, monkeypatch):
    ends, close = [], ProgressBar.close
    monkeypatch.setattr("experiments.progress.tqdm", partial(tqdm, disable=False))
    monkeypatch.setattr(
        ProgressBar, "close", lambda self: (ends.append((self.bar.n, self.bar.total)), close(self))
    )
    memory = ["--exemplars_per_class=5", "--memory_rates=[0.5,0.5,0.5]"]
    config = parse([*SHORT, *PODNET, *memory, "--run_folder", str(tmp_path / "podnet")])
    stop_after(config, epochs=5)  # in the second experience
    run(config)
    (before, _), (done, expected) = ends
    assert before < done == pytest.approx(expected, rel=0.05)


def test_a_run_starts_from_the_first_experience_of_another(tmp_path, monkeypatch):
    variant = [*SHORT, *PODNET, "--memory_rates=[0.1,0.1,0.1]"]
    plain = [*SHORT, *PODNET, "--flat_distillation=pod", "--run_folder", str(tmp_path / "plain")]
    run(parse(plain))
    run(parse([*variant, "--run_folder", str(tmp_path / "whole")]))
    start = ["--start_from", str(tmp_path / "plain")]
    save, epochs = Checkpoint.save, []
    monkeypatch.setattr(
        Checkpoint, "save", lambda self, s: (epochs.append(s.phase is not None), save(self, s))
    )
    monkeypatch.setattr("experiments.run._UNSAVED_SECONDS", 0.0)
    run(parse([*variant, *start, "--run_folder", str(tmp_path / "begun")]))
    assert sum(epochs) == 3 + 3  # none of the first experience
    assert without_times(tmp_path / "begun") == without_times(tmp_path / "whole")

    other = [*variant, *start, "--seed=7", "--run_folder", str(tmp_path / "other")]
    with pytest.raises(ValueError, match=r"start_from: .*seed: 1993 there, 7 here"):
        run(parse(other))
    # The memory that a phase of the first experience learns from is a part of that experience.
    balanced = {"epochs": 1, "learns": "classifier", "data": "exemplars"}
    balanced = f"--first={json.dumps([{'epochs': 1}, balanced])}"
    first = [*SHORT, *PODNET, balanced, "--run_folder"]
    run(parse([*first, str(tmp_path / "balanced")]))
    larger = [str(tmp_path / "larger"), "--mem_size=60", "--start_from", str(tmp_path / "balanced")]
    with pytest.raises(ValueError, match=r"start_from: .*mem_size: 200 there, 60 here"):
        run(parse([*first, *larger]))
    with pytest.raises(ValueError, match=r"start_from: .*train_generalized: None there, True here"):
        run(parse([*first, str(tmp_path / "unlike"), *start]))
    nowhere = ["--start_from", str(tmp_path), "--run_folder", str(tmp_path / "nowhere")]
    with pytest.raises(ValueError, match="start_from: expected a run folder whose first exp"):
        run(parse([*variant, *nowhere]))
    (tmp_path / "plain" / "first_experience.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"error: start_from: checkpoint .*first_experience.pt"):
        main([*variant, *start, "--run_folder", str(tmp_path / "damaged")])


def test_ucir_is_a_configuration(tmp_path):
    results = run(parse([*SHORT, "--method=ucir", "--run_folder", str(tmp_path / "ucir")]))
    assert results["cnn"]["accuracy"][0] > 0.5


BASELINES = [
    *("--against=[]", "--backbone=convnet2", "--classes=6", "--mem_size=30"),
    *('--first=[{"epochs": 8, "milestones": [6]}]', '--later=[{"epochs": 8, "milestones": [6]}]'),
]


def test_baselines_lie_between_finetuning_and_joint_training(tmp_path):
    last, average, names = {}, {}, []
    for method in ("finetune", "replay", "icarl", "wa", "bic", "joint"):
        folder = ["--method", method, "--run_folder", str(tmp_path / method)]
        # WA's weight aligning overcorrects after few steps.
        longer = ['--later=[{"epochs": 24, "milestones": [18]}]'] if method == "wa" else []
        results = run(parse([*BASELINES, *longer, *folder]))
        # iCaRL's readout is the nearest mean of exemplars.
        readout = results["nme" if method == "icarl" else "cnn"]
        last[method], average[method] = readout["last"], readout["average"]
        names.append(accuracy_table([results]).splitlines()[2].split()[1])
    assert names == ["Finetune", "Replay", "iCaRL", "WA", "BiC", "Joint"]
    assert last["joint"] > last["replay"] + 0.1
    assert last["replay"] > last["finetune"] + 0.1
    for method in ("icarl", "wa", "bic"):
        assert last["finetune"] + 0.1 < last[method] <= last["joint"]
        assert average["finetune"] < average[method] <= average["joint"]
    assert last["bic"] > last["replay"]


@pytest.mark.parametrize(
    "split", [("--classes=8", "--increment=1"), ("--classes=7", "--base=1", "--increment=3")]
)
def test_bic_does_not_diverge_on_a_schedule_of_one_epoch(split, tmp_path):
    epoch = ['--first=[{"epochs": 1}]', '--later=[{"epochs": 1}]', "--seed=1", "--against=[]"]
    results = run(parse([*epoch, *split, "--method=bic", "--run_folder", str(tmp_path / "bic")]))
    assert results["cnn"]["last"] > 0.3


@pytest.mark.parametrize("method", ["bic", "joint"])
def test_baselines_go_on_and_start_from_another(method, tmp_path):
    options = [*BASELINES, "--method", method, '--first=[{"epochs": 2}]', "--classes=4"]
    later, other = '--later=[{"epochs": 3}]', '--later=[{"epochs": 1}]'
    run(parse([*options, later, "--run_folder", str(tmp_path / "whole")]))
    stop_after(parse([*options, later, "--run_folder", str(tmp_path / "cut")]), epochs=2 + 1 + 2)
    run(parse([*options, later, "--run_folder", str(tmp_path / "cut")]))
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    run(parse([*options, other, "--run_folder", str(tmp_path / "donor")]))
    start = ["--start_from", str(tmp_path / "donor"), "--run_folder", str(tmp_path / "begun")]
    run(parse([*options, later, *start]))
    assert without_times(tmp_path / "begun") == without_times(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "first", "later"),
    [
        ("icarl", ICARL_FIRST, ICARL_LATER),
        ("wa", WA_FIRST, WA_LATER),
        ("bic", BIC_TRAINING, BIC_TRAINING),
        ("joint", JOINT_TRAINING, JOINT_TRAINING),
    ],
)
def test_the_shipped_configurations_of_baselines(method, first, later):
    config = parse(["--config", str(CONFIGS / f"{method}_cifar100_b0_inc10.yaml")])
    assert (config.method, config.base, config.increment) == (method, 0, 10)
    assert (config.first, config.later, config.batch_size) == ([first], [later], 128)


@pytest.mark.parametrize(
    ("method", "weight", "temperature"),
    [("podnet", 0.9, 10.0), ("icarl", 1.0, 2.0), ("wa", 1.0, 2.0), ("bic", 1.0, 2.0)],
)
def test_distillation_is_the_methods_own_unless_given(
    method, weight, temperature, tmp_path, monkeypatch
):
    found = []

    def note(plugin, strategy, **kwargs):
        found.append((plugin.weight, plugin.temperature))

    monkeypatch.setattr(SoftmaxDistillationPlugin, "before_training", note)
    options = [*BASELINES, "--classes=2", '--first=[{"epochs": 1}]', "--flat_distillation=kd"]
    options += ["--proxies=1", "--method", method, "--run_folder"]
    run(parse([*options, str(tmp_path / "own")]))
    given = ["--kd_weight=0.3", "--kd_temperature=4"]
    run(parse([*options, str(tmp_path / "given"), *given]))
    assert found == [(weight, temperature), (0.3, 4.0)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (
            "PODNet",
            {
                "nca": "equation",
                "pod_weight": 1.5,
                "flat_weight": 0.25,
                "pooling": "gap",
                "flat_distillation": "both",
                "kd_adaptive": True,
            },
        ),
        ("UCIR", {"less_forget_weight": 7.0, "ranking_weight": 0.5}),
        ("WA", {"kd_weight": 0.5, "clip_weights": False}),
        ("MEMO", {"auxiliary_weight": 0.5}),
        (
            "DER",
            {
                "auxiliary_weight": 0.5,
                "sparsity_weight": 2.0,
                "mask_s_max": 50.0,
                "mask_rate": 3.0,
            },
        ),
    ],
)
def test_options_reach_the_strategy(method, options, tmp_path, monkeypatch):
    given = {}

    def build(**arguments):
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(f"experiments.building.{method}", build)
    texts = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(InterruptedError):
        run(parse(["--method", method.lower(), *texts, "--run_folder", str(tmp_path / "run")]))
    assert {name: given[name] for name in options} == options
    # Only PODNet and UCIR classify features that no ReLU has cut.
    cut = bool((given["model"].extract_features(torch.randn(8, 1, 8, 8)) >= 0).all())
    assert cut == (method not in ("PODNet", "UCIR"))


def test_common_options_reach_the_strategy(tmp_path, monkeypatch):
    given = {}

    def build(**arguments):
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setattr("experiments.building.MEMO", build)
    options = {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.01, "batch_size": 17, "fast": "false"}
    options |= {"train_generalized": "false", "gradient_through_frozen": "false"}
    options |= {"class_order_seed": 7, "run_folder": tmp_path / "run"}
    config = parse([f"--{name}={value}" for name, value in options.items()])
    with pytest.raises(InterruptedError):
        run(config)
    group = given["optimizer"].param_groups[0]
    assert {name: group[name] for name in ("lr", "momentum", "weight_decay")} == {
        name: options[name] for name in ("lr", "momentum", "weight_decay")
    }
    assert (given["train_mb_size"], given["fast"]) == (17, False)
    model = given["model"]
    assert (model.train_generalized, model.gradient_through_frozen) == (False, False)
    order = np.random.RandomState(7).permutation(10).tolist()
    assert make_benchmark(config).classes_order_original_ids == order
    own = replace(config, class_order=[*range(5, 10), *range(5)], classes=8)
    assert make_benchmark(own).classes_order_original_ids == [5, 6, 7, 8, 9, 0, 1, 2]


def test_what_a_first_experience_depends_on():
    config = Config()
    later = config.identity().keys() - config.first_experience().keys()
    assert later == {
        *("later", "mem_size", "exemplars_per_class", "memory_rates", "spend_remainder"),
        *("auxiliary_weight", "train_generalized", "gradient_through_frozen", "pod_weight"),
        *("flat_weight", "pooling", "flat_distillation", "kd_weight", "kd_temperature"),
        *("kd_adaptive", "less_forget_weight", "ranking_weight"),
    }
    for new_images, kept in ((0, False), (1, True)):
        own = replace(config, compression=Compression("webp", new_images=new_images))
        assert (own.first_experience()["compression"] is not None) is kept
    # Options that are added later leave older checkpoints valid.
    assert config.fingerprint() == "{}"


def test_the_shipped_podnet_configurations():
    config = parse(["--config", str(CONFIGS / "podnet_cifar100_b50_inc10.yaml")])
    assert (config.method, config.base, config.increment) == ("podnet", 50, 10)
    assert config.exemplars_per_class == 20
    assert config.first == [PODNET_TRAINING]
    assert config.later == [PODNET_TRAINING, PODNET_BALANCED]
    short = parse(["--config", str(CONFIGS / "podnet_cifar100_b50_inc10_short.yaml")])
    assert short.first == [replace(PODNET_TRAINING, epochs=40)]
    assert short.later == [replace(PODNET_TRAINING, epochs=40), PODNET_BALANCED]
    assert replace(short, first=config.first, later=config.later) == config


@pytest.mark.parametrize("method", ["memo", "der", "replay", "podnet", "bic"])
def test_real_cifar_100(cifar100_root, tmp_path, method):
    results = run(
        parse(
            [
                *(f"--method={method}", "--against=[]", "--benchmark=cifar100", "--increment=2"),
                *("--classes=4", "--samples_per_class=100", "--backbone=resnet8", "--mem_size=80"),
                *('--first=[{"epochs": 2}]', '--later=[{"epochs": 2}]'),
                *("--data_root", str(cifar100_root), "--run_folder", str(tmp_path / method)),
            ]
        )
    )
    assert results["bytes"][-1]["exemplar_bytes"] == 80 * 3072
    assert results["cnn"]["accuracy"][0] > 0.5


def test_compressed_exemplars_on_real_images(cifar100_root, tmp_path):
    options = [
        *("--method=memo", "--against=[]", "--benchmark=cifar100", "--increment=2", "--classes=6"),
        *("--samples_per_class=60", "--backbone=resnet8", "--mem_size=24"),
        *('--first=[{"epochs": 2}]', '--later=[{"epochs": 2}]'),
        *("--compression.quality=60", "--compression.new_images=0.5"),
        *("--data_root", str(cifar100_root), "--run_folder"),
    ]
    whole = run(parse([*options, str(tmp_path / "whole")]))
    held = whole["bytes"][-1]["exemplar_bytes"]
    assert 0.9 * 24 * 3072 < held <= 24 * 3072
    stop_after(parse([*options, str(tmp_path / "killed")]), epochs=2 + 1 + 1)
    run(parse([*options, str(tmp_path / "killed")]))
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")


def test_real_images_in_a_folder(imagenet_mini_root, tmp_path):
    results = run(
        parse(
            [
                *("--against=[]", "--benchmark=image_folder", "--increment=2", "--classes=4"),
                *("--image_size=64", "--backbone=imagenet_resnet10", "--mem_size=40"),
                *('--first=[{"epochs": 1}]', '--later=[{"epochs": 1}]'),
                *("--data_root", str(imagenet_mini_root), "--run_folder", str(tmp_path / "folder")),
            ]
        )
    )
    assert [len(classes) for classes in results["classes"]] == [2, 2]
    assert results["bytes"][-1]["exemplar_bytes"] == 40 * 64 * 64 * 3


def test_whole_numbers_in_the_place_of_others_make_the_same_run():
    phases = {"first": [Phase(1, lr=1)], "later": [Phase(1, temperature=2)]}
    codec = Compression(new_images=1)
    ours = Config(lr=1, memory_rates=[0, 1], kd_temperature=2, compression=codec, **phases)
    text = yaml.safe_load(yaml.safe_dump(ours.identity()))
    assert from_options({"against": []} | text).fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("option", ["samples_per_class", "image_size"])
def test_options_of_another_benchmark_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}: expected none for .* digits, got 3"):
        make_benchmark(Config(**{option: 3}))


@pytest.mark.parametrize("name", ["first", "later"])
def test_no_phases_are_refused(name):
    with pytest.raises(ValueError, match="first, later: expected at least one phase each"):
        from_options({name: []})


def test_what_a_folder_lacks_of_the_configuration_is_named_either_way(tmp_path):
    with pytest.raises(ValueError, match="gone: 1 there, None here"):
        refuse_other("out", tmp_path, {"gone": 1}, {})


def test_numbers_at_the_edge_of_their_range():
    assert Config(momentum=0, weight_decay=0, seed=0).momentum == 0
    for change in ({"batch_size": 0}, {"momentum": -0.1}, {"momentum": float("nan")}):
        (name,) = change
        with pytest.raises(ValueError, match=f"^{name}: expected a number"):
            Config(**change)
    with pytest.raises(ValueError, match="against: expected methods other than memo"):
        Config(against=["memo"])
    with pytest.raises(ValueError, match=r"against: .*each once, got"):
        Config(against=["wa", "wa"])


def test_the_configured_folder_comes_before_the_variables(monkeypatch):
    monkeypatch.setenv("AVALANCHE_MEMO_DATA", "elsewhere")
    assert data_root(Config(data_root="here")) == "here"
    assert data_root(Config()) == "elsewhere"


def test_a_digest_is_compared_where_there_is_none_now(tmp_path):
    (tmp_path / "data.txt").write_text("4 files of 2 classes, abc")
    with pytest.raises(ValueError, match="abc there, None here"):
        refuse_other_data("run_folder", tmp_path, Config())


def test_results_of_an_unfinished_run_have_the_budget_so_far(tmp_path):
    options = ["--method=joint", "--against=[]", "--classes=4", '--first=[{"epochs": 1}]']
    stop_after(parse([*options, f"--run_folder={tmp_path}"]), epochs=3)
    results = json.loads((tmp_path / "results.json").read_text())
    train = split_digits(increment=2, classes=4).train_stream
    model = results["bytes"][-1]["parameter_bytes"] - 4 * (2 * 64 + 2)
    assert results["budget_bytes"] == model + len(train[0].dataset) * 64


def test_a_run_does_not_start_from_one_on_other_data(tmp_path):
    config = Config(against=[])
    config.save(tmp_path / "config.yaml")
    (tmp_path / "first_experience.pt").touch()
    (tmp_path / "data.txt").write_text("4 files of 2 classes, abc")
    with pytest.raises(ValueError, match=r"start_from: .* holds a run on other data"):
        module._first_experience_of(tmp_path, config, Checkpoint("checkpoint.pt"))
