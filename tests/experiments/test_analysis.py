import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from avalanche_memo.benchmarks import split_digits
from experiments.analysis import analyse, cka_figure, main
from experiments.config import Config, parse
from experiments.kept_models import KeptModels
from experiments.run import run

BLOCKS = {
    # Names of ResNet-8's blocks, and of their tensors after two experiences.
    "replay": ["generalized.0.0", "generalized.0.1", "generalized.1.0", "generalized.2.0"],
    "memo": ["generalized.0.0", "generalized.0.1", "generalized.1.0", "specialized.1.0.0"],
    "der": [f"specialized.1.{stage}.{part}" for stage, part in ((0, 0), (0, 1), (1, 0), (2, 0))],
}


@pytest.fixture(scope="module", params=BLOCKS)
def kept(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    phases = '[{"epochs": 1}, {"epochs": 1, "learns": "classifier", "data": "balanced"}]'
    arguments = [f"--method={request.param}", "--against=[]", "--classes=4", "--keep_models=true"]
    arguments += ['--first=[{"epochs": 3}]', f"--later={phases}", "--mem_size=60"]
    run(parse([*arguments, "--run_folder", str(folder)]))
    main([str(folder), "--out", str(folder / "out"), "--images", "100"])
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "out" / "analysis.json").read_text())


def test_models_of_both_ends_of_an_experience_are_kept(kept):
    first, last = (KeptModels(kept).load(1, epoch)["model"] for epoch in ("first", "last"))
    final = torch.load(kept / "checkpoint.pt", weights_only=True)["state"]["model"]
    assert list(first) == list(last) == list(final)
    for name in [n for n in final if isinstance(final[n], torch.Tensor)]:
        # The second epoch of two is on the classifier alone, which MEMO aligns afterwards.
        if not name.startswith("classifier"):
            assert torch.equal(first[name], last[name])
            assert torch.equal(last[name], final[name])
        elif name.endswith("weights.0"):
            assert not torch.equal(first[name], last[name])
    memories = [KeptModels(kept).load(number, "last")["memories"] for number in (0, 1)]
    held = [[sum(map(len, memory["order"].values())) for memory in m] for m in memories]
    assert held == [[0], [60]]


def test_figures_and_numbers_of_all_blocks(kept):
    analysis = results(kept)
    blocks = ["1.0", "1.1", "2.1", "3.1"]
    assert list(analysis["cka"]) == blocks
    for epoch in ("first", "last"):
        norms = analysis["gradient_norm"][epoch]
        assert [list(row) for row in norms] == [blocks, blocks]
        assert all(norm > 0 for row in norms for norm in row.values())
    for matrix in analysis["cka"].values():
        assert np.allclose(matrix, np.transpose(matrix))
        assert np.allclose(np.diag(matrix), 1)
        assert 0 <= matrix[0][1] < 0.9999
    for name in ("gradient_norm", "shift", "cka"):
        assert (kept / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_shifts_are_those_of_the_kept_weights(kept):
    method = json.loads((kept / "results.json").read_text())["config"]["method"]
    first, last = (KeptModels(kept).load(0, epoch)["model"] for epoch in ("first", "last"))
    mean, total = (results(kept)["shift"][reduction] for reduction in ("mean", "sum"))
    for block, name in zip(mean[0], BLOCKS[method], strict=True):
        own = [n for n in first if n.startswith(name.replace("specialized.1", "specialized.0"))]
        own = [n for n in own if n.endswith(("weight", "bias"))]
        change = torch.cat([(first[n] - last[n]).flatten() for n in own])
        assert mean[0][block] == pytest.approx(float(change.square().mean()), rel=1e-4)
        assert total[0][block] == pytest.approx(float(change.square().sum()), rel=1e-4) != 0
    # The second experience learns its classifier alone after the first epoch.
    assert set(mean[1].values()) == {0.0}


def test_gradients_are_measured_on_new_data_and_exemplars(kept, monkeypatch):
    seen = []

    def record(network, batches):
        assert network.training
        seen.append(torch.cat([targets for _, targets in batches]).bincount().tolist())
        return {}

    monkeypatch.setattr("experiments.analysis.block_gradients", record)
    analyse(kept, images=10_000)
    stream = split_digits(increment=2, classes=4).train_stream
    sizes = [torch.tensor(list(e.dataset.targets)).bincount().tolist() for e in stream]
    assert seen == [sizes[0], sizes[0], [30, 30, *sizes[1][2:]], [30, 30, *sizes[1][2:]]]


def test_a_run_without_models_is_refused(tmp_path):
    config = parse(["--run_folder", str(tmp_path)])
    config.save(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"folder: expected the models of a run .*got none"):
        analyse(tmp_path)
    with pytest.raises(ValueError, match="images: expected a number of at least 2, got 1"):
        analyse(tmp_path, images=1)


def test_what_is_no_run_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "RUN_FOLDER: expected a run folder with a config.yaml" in capsys.readouterr().err


def test_models_of_an_experience_are_not_mixed_up(tmp_path, monkeypatch):
    phases = ['--first=[{"epochs": 2}]', '--later=[{"epochs": 2}]', "--classes=4"]
    run(parse([*phases, "--against=[]", "--keep_models=true", f"--run_folder={tmp_path}"]))
    given, looked_at = [], []

    def gradients(network, batches):
        given.append(network.state_dict())
        return {}

    def features(network, images):
        looked_at.append((network.training, network.state_dict()))
        return {"1.0": torch.eye(3)}

    monkeypatch.setattr("experiments.analysis.block_gradients", gradients)
    monkeypatch.setattr("experiments.analysis._features", features)
    analyse(tmp_path, images=10)
    kept = {
        place: KeptModels(tmp_path).load(*place)["model"]
        for place in product((0, 1), ("first", "last"))
    }

    def same(a, b):
        return all(torch.equal(a[k], v) for k, v in b.items() if isinstance(v, torch.Tensor))

    assert all(same(state, kept[place]) for state, place in zip(given, kept, strict=True))
    assert all(same(state, kept[i, "last"]) for i, (_, state) in enumerate(looked_at))
    assert [training for training, _ in looked_at] == [False, False]


def test_the_similarity_figure_shows_the_right_pairs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("experiments.analysis.save_figure", lambda figure, _: drawn.append(figure))
    cka = {"1.0": [[1, 0.2], [0.2, 1]], "3.1": [[1, 0.7], [0.7, 1]]}
    rows = [dict.fromkeys(cka, 1.0)] * 2
    config = Config(against=[]).identity()
    cka_figure({"config": config, "cka": cka, "gradient_norm": {"last": rows}}, tmp_path / "a.png")
    matrix, lines, *_ = drawn[0].axes
    assert matrix.images[0].get_array().tolist() == [[1, 0.2], [0.7, 1]]
    assert list(lines.get_lines()[0].get_ydata()) == [0.2, 0.7]
