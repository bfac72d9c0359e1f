import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from avalanche_memo.models import ExpandableNetwork, cifar_resnet
from experiments.building import make_network
from experiments.config import parse
from experiments.pruning import draw, latency, main, report, survival, tables
from experiments.run import run

ARGUMENTS = [
    *("--method=der", "--against=[]", "--classes=6", "--sparsity_weight=1"),
    '--first=[{"epochs": 2}]',
    '--later=[{"epochs": 2}, {"epochs": 1, "learns": "classifier", "data": "balanced"}]',
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "der-pruned"
    run(parse([*ARGUMENTS, "--run_folder", str(folder)]))
    return folder


@pytest.fixture(scope="module")
def unpruned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "der-whole"
    run(parse([*ARGUMENTS, "--sparsity_weight=0", "--run_folder", str(folder)]))
    return folder


@pytest.fixture(scope="module")
def reported(finished, unpruned, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    main([str(unpruned), str(finished), "--out", str(out), "--rounds", "3"])
    return out


def kept_of(folder: Path) -> list[list[list[int]]]:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    return state["model"]["_extra_state"]["kept"]


def test_parameters_are_those_of_the_runs_results(finished, reported):
    results = json.loads((finished / "results.json").read_text())
    whole, pruned = json.loads((reported / "pruning.json").read_text())
    assert len(pruned["experiences"]) == 3
    for n, (row, memory) in enumerate(zip(pruned["experiences"], results["bytes"], strict=True), 1):
        assert 4 * row["parameters"]["pruned"] == memory["parameter_bytes"]
        assert row["inference_bytes"]["pruned"] == memory["inference_bytes"]
        # ResNet-8 on one channel, by hand: convolutions and norms; the head grows with both.
        conv = lambda i, o: 9 * i * o + 2 * o  # noqa: E731
        block = conv(1, 16) + 2 * conv(16, 16)
        block += conv(16, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64)
        head = 2 * n * 64 * n + 2 * n
        assert row["parameters"]["unpruned"] == n * block + head
        assert whole["experiences"][n - 1]["parameters"] == {"unpruned": n * block + head}


def test_survival_is_counted_in_the_checkpoint(finished, reported):
    (whole, report) = json.loads((reported / "pruning.json").read_text())
    kept = kept_of(finished)
    widths = [16, 16, 16, 32, 32, 64, 64]
    expected = [[len(block[i]) / width for block in kept] for i, width in enumerate(widths)]
    assert list(report["survival"].values()) == expected
    assert whole["survival"] == {}
    assert 0 < min(map(min, expected)) < 1


def test_latency_is_measured_for_both_and_each_number_of_experiences(reported):
    (whole, report) = json.loads((reported / "pruning.json").read_text())
    for row in report["experiences"]:
        for batch in ("1", "128"):
            assert set(row["latency"][batch]) == {"pruned", "unpruned"}
            for low, median, high in row["latency"][batch].values():
                assert 0 < low <= median <= high
    assert set(whole["experiences"][0]["latency"]["1"]) == {"unpruned"}


def unpadded(text: str) -> str:
    return re.sub(" +", " ", text)


def test_the_table_and_the_figure(finished, reported):
    (_, report) = json.loads((reported / "pruning.json").read_text())
    text = unpadded((reported / "pruning.md").read_text())
    counts = [row["parameters"]["pruned"] / 1e3 for row in report["experiences"]]
    cells = [*counts, sum(counts), sum(counts) / 3, counts[-1]]
    assert f"| pruned | {' | '.join(f'{c:,.1f}' for c in cells)} |" in text
    assert "## der-whole" in text
    assert "## der-pruned" in text
    before, _, _ = text.partition("## der-whole")
    rows = {line.split(" | ")[0]: line.strip(" |").split(" | ") for line in before.splitlines()}
    last = report["experiences"][-1]
    kept = 100 * last["parameters"]["pruned"] / last["parameters"]["unpruned"]
    accuracies = [100 * sum(report["accuracy"][r]) / 3 for r in ("cnn", "nme")]
    row = rows["| der-pruned"]
    assert [row[1], row[3]] == [f"{value:.2f}" for value in accuracies]
    assert row[6] == f"{kept:.1f}"
    assert row[5] == f"{last['parameters']['pruned'] / 1e3:,.1f}"
    median = {side: found[1] for side, found in last["latency"]["128"].items()}
    assert row[8] == f"{100 * median['pruned'] / median['unpruned']:.0f}"
    assert [rows["| der-whole"][i] for i in (6, 8)] == ["100.0", "100"]
    assert (reported / "pruning.png").read_bytes().startswith(b"\x89PNG")


def test_the_measured_network_has_the_runs_structure(finished):
    config = parse(["--config", str(finished / "config.yaml")])
    network = make_network(config)
    state = torch.load(finished / "checkpoint.pt", weights_only=True)["state"]["model"]
    network.set_extra_state(state["_extra_state"])
    shapes = {k: v.shape for k, v in state.items() if isinstance(v, torch.Tensor)}
    own = {k: v.shape for k, v in network.state_dict().items() if isinstance(v, torch.Tensor)}
    assert own == shapes
    assert len(survival(config, network.kept)) == len(network.masks())


@pytest.mark.parametrize(
    ("option", "message"),
    [("--rounds=0", "rounds: expected"), ("--device=gpuu", "device: expected a device that is")],
)
def test_refuses_what_cannot_be_measured(finished, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit):
        main([str(finished), "--out", str(tmp_path / "out"), option])
    assert message in capsys.readouterr().err


def test_refuses_what_cannot_be_pruned(finished, tmp_path, capsys):
    single = tmp_path / "single"
    shutil.copytree(finished, single)
    config = (single / "config.yaml").read_text()
    config = config.replace("method: der", "method: wa").replace("sparsity_weight: 1", "seed: 1")
    (single / "config.yaml").write_text(config.replace("seed: 0\n", ""))
    for folder, expected in (
        (single, f"a run of DER or MEMO, got wa in {single}"),
        (tmp_path, f"a run folder with config.yaml, got {tmp_path}"),
    ):
        with pytest.raises(SystemExit):
            main([str(folder), "--out", str(tmp_path / "out")])
        assert f"folder: expected {expected}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memo_is_pruned_too(tmp_path):
    arguments = [*ARGUMENTS, "--method=memo", "--run_folder", str(tmp_path / "memo")]
    results = run(parse(arguments))
    kept = kept_of(tmp_path / "memo")
    assert [len(block) for block in kept] == [2, 2, 2]
    whole = ExpandableNetwork(lambda: cifar_resnet(8, in_channels=1), 2)
    for i in range(3):
        whole.grow([2 * i, 2 * i + 1])
    parameters = sum(p.numel() for m in whole.inference_modules() for p in m.parameters())
    assert results["bytes"][-1]["parameter_bytes"] < 4 * parameters


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--classes=4", "runs: expected those of one protocol"),
        ("--backbone=convnet2", "expected runs of one backbone, got convnet2, resnet8"),
    ],
)
def test_refuses_runs_that_are_not_alike(finished, tmp_path, capsys, option, message):
    parse([*ARGUMENTS, option]).save(tmp_path / "config.yaml")
    with pytest.raises(SystemExit):
        main([str(finished), str(tmp_path), "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused_by_name(finished, tmp_path, capsys):
    folder = tmp_path / "cut"
    shutil.copytree(finished, folder)
    (folder / "checkpoint.pt.previous").unlink()
    (folder / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:2000])
    with pytest.raises(SystemExit):
        main([str(folder), "--out", str(tmp_path / "out")])
    message = f"folder: expected a checkpoint of the last experience, .*{folder}/checkpoint.pt"
    assert re.search(message, capsys.readouterr().err)


def test_a_network_without_pruning_is_drawn_once_for_runs_that_have_the_same(
    reported, tmp_path, monkeypatch
):
    whole, pruned = json.loads((reported / "pruning.json").read_text())
    other = json.loads(json.dumps(pruned)) | {"run": "other"}
    for row in other["experiences"]:
        row["parameters"]["unpruned"] += 1
    labels = []
    monkeypatch.setattr(
        "experiments.pruning.save_figure",
        lambda figure, path: labels.append(figure.axes[1].get_legend_handles_labels()[1]),
    )
    for each in (whole, pruned, other):
        for row in each["experiences"]:
            row["latency"] = {int(batch): sides for batch, sides in row["latency"].items()}
    draw([whole, pruned, other], tmp_path / "figure.png")
    assert labels == [["der-whole", "der-pruned", "other", "other, without pruning"]]


def test_runs_that_came_to_different_experiences_are_refused(monkeypatch):
    done = {Path("one"): 1, Path("two"): 2}
    monkeypatch.setattr(
        "experiments.pruning._read", lambda folder: (None, {"classes": [[0]] * done[folder]}, {})
    )
    with pytest.raises(ValueError, match=r"folders: expected .* equally many .*, got 1 in one, 2"):
        report(list(done), "cpu", 1)


def pruned_report():
    rows = [
        {
            "parameters": {"pruned": 1000 * n, "unpruned": 2000 * n},
            "latency": {
                batch: {"pruned": [0.001, 0.002, 0.004], "unpruned": [0.002, 0.005, 0.006]}
                for batch in (1, 128)
            },
        }
        for n in (1, 2)
    ]
    return {
        "run": "der",
        "accuracy": {"cnn": [0.9, 0.5]},
        "experiences": rows,
        "survival": {"0.0": [0.25, 0.5]},
        "machine": "a CPU",
    }


def test_the_tables_of_a_pruned_run():
    text = unpadded(tables([pruned_report()]))
    assert "| der | 70.00 | 50.00 | 2.0 | 50.0 | 2 | 40 |" in text
    assert "| accuracy (CNN), % | 90.00 | 50.00 | | 70.00 | 50.00 |" in text
    assert "| 1 | pruned | 2 (1 to 4) | 2 (1 to 4) |" in text
    assert "| 0.0 | 25 | 50 |" in text


def test_latency_has_the_quantiles_it_says(monkeypatch):
    times = iter([99, 99, *range(11)])
    monkeypatch.setattr("experiments.pruning.seconds", lambda *_: next(times))
    assert latency({(0, "pruned"): print}, torch.zeros(1), 11) == {(0, "pruned"): [1, 5, 9]}


def test_an_older_checkpoint_than_the_results_is_refused(tmp_path, capsys):
    folder = tmp_path / "der"
    options = ["--method=der", "--against=[]", "--classes=4", '--first=[{"epochs": 1}]']
    run(parse([*options, '--later=[{"epochs": 1}]', f"--run_folder={folder}"]))
    (folder / "first_experience.pt").replace(folder / "checkpoint.pt")
    (folder / "checkpoint.pt.previous").unlink()
    with pytest.raises(SystemExit):
        main([str(folder), "--out", str(tmp_path / "out")])
    assert "expected a checkpoint of the last experience" in capsys.readouterr().err
