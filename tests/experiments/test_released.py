import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest

from avalanche_memo.training import Phase
from experiments import released
from experiments.config import Config
from experiments.machine import in_new_process
from experiments.released import main, released_settings, run_released, table

# A repository laid out as the released ones are. Instead of accuracies it reports what reaches it.
CLONE = {
    "trainer.py": """
import torch
from utils import factory
from utils.data_manager import DataManager

def _set_device(args):
    args["device"] = ["cuda:0"]

def _set_random():
    torch.manual_seed(1)

def train(args):
    _set_random()
    _set_device(args)
    assert args["device"] == [torch.device("cpu")]
    manager = DataManager()
    learner = factory.get_model(args["model_name"], args)
    for task in range(manager.nb_tasks):
        learner.eval_task()
    save_fc(args, learner)
""",
    "utils/factory.py": """
def get_model(name, args):
    from models import icarl
    return icarl.Learner(args)
""",
    "utils/data_manager.py": """
class DataManager:
    @property
    def nb_tasks(self):
        return 10
""",
    "utils/inc_net.py": """
from convs.cifar_resnet import CifarResNet, ResNetBasicblock

def resnet32():
    return CifarResNet(ResNetBasicblock, 32)

def get_memo_resnet32():
    raise NotImplementedError
""",
    "convs/cifar_resnet.py": """
ResNetBasicblock = "block"

def CifarResNet(block, depth):
    return depth
""",
    "models/base.py": "from torch.utils.data import DataLoader\n",
    "models/icarl.py": """
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from utils import inc_net

epochs = 170
init_milestones = [60, 120, 170]
weight_decay = 2e-4

class Learner:
    def __init__(self, args):
        loader, data = DataLoader([1], num_workers=8), list(Path("data").iterdir())
        self.figures = [epochs, *init_milestones, weight_decay, inc_net.resnet32()]
        self.figures += [args["memory_size"], torch.initial_seed(), len(data), loader.num_workers]

    def eval_task(self):
        return {"top1": self.figures.pop(0)}, {"top1": 0.5}
""",
}

PROTOCOL = Config(
    method="icarl",
    benchmark="cifar100",
    increment=10,
    classes=30,
    backbone="resnet14",
    mem_size=600,
    clip_weights=False,
    seed=7,
    first=[Phase(3, lr=0.1, weight_decay=5e-4, milestones=(1, 2))],
    later=[Phase(2, lr=0.1, weight_decay=1e-3)],
)


@pytest.fixture
def clone(tmp_path):
    for name, text in CLONE.items():
        path = tmp_path / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "clone"


def test_the_released_code_trains_what_the_configuration_says(clone, tmp_path):
    (tmp_path / "data" / "cifar-100-python").mkdir(parents=True)
    here = Path.cwd()
    # Nine experiences, as there are nine figures.
    config = replace(PROTOCOL, data_root=str(tmp_path / "data"), classes=90)
    found = in_new_process(run_released, clone, config)
    # Epochs, milestones of the first experience, weight decay; depth; exemplars, seed, the data.
    assert found["cnn"] == [2, 1, 2, 1e-3, 14, 600, 7, 1, 0]
    assert found["nme"] == [0.5] * 9
    assert Path.cwd() == here


def test_settings_have_the_released_names():
    settings = released_settings(replace(PROTOCOL, method="memo"))
    assert settings["convnet_type"] == "memo_resnet32"
    assert settings["seed"] == [1993]  # Of the class order.
    assert (settings["init_epoch"], settings["epochs"]) == (3, 2)
    assert (settings["init_weight_decay"], settings["weight_decay"]) == (5e-4, 1e-3)
    assert settings["train_base"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "podnet"}, "method: expected one of memo, icarl, wa, replay, got podnet"),
        ({"benchmark": "digits"}, "benchmark: expected cifar100, got digits"),
        ({"base": 50}, "base: expected 0, got 50"),
        ({"backbone": "convnet2"}, "backbone: expected resnet14 .*, got convnet2"),
        ({"later": [Phase(1), Phase(1)]}, "later: expected one phase, got"),
        ({"samples_per_class": 100}, "samples_per_class: expected None, which .*, got 100"),
        ({"method": "wa", "clip_weights": True}, "clip_weights: expected False for wa, got True"),
        ({"momentum": 0.5}, "momentum: expected 0.9, which .*, got 0.5"),
        ({"first": [Phase(1, cosine=True)]}, "expected epochs, rates and milestones alone, got"),
    ],
)
def test_what_the_released_code_cannot_train_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        released_settings(replace(PROTOCOL, **change))


def test_what_is_no_seed_is_refused_before_training(clone, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(clone), "--seeds", "1", "-1", "--out", str(tmp_path / "out")])
    assert "seed: expected a number of at least 0, got -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_not_waited_for():
    with pytest.raises(BrokenProcessPool):
        in_new_process(_killed)


def test_a_folder_without_released_code_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "clone: expected released code, got a folder without" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_has_means_and_the_differences_standard_error():
    released = {"1": {"cnn": [50, 30], "nme": [51, 31]}, "2": {"cnn": [54, 34], "nme": [51, 31]}}
    ours = {"1": {"cnn": [55, 33], "nme": [53, 30]}}
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table({"wa": {"released": released, "ours": ours}}, 10).splitlines()
    ]
    assert rows[0] == ["method", "readout", "side", "seeds", "10 classes", "20 classes"]
    assert rows[2] == ["WA", "CNN", "released", "2", "52.00 ± 2.83", "32.00 ± 2.83"]
    assert rows[3:5] == [
        ["WA", "CNN", "ours", "1", "55.00", "33.00"],
        ["WA", "CNN", "difference", "", "+3.00", "+1.00"],
    ]
    both = table({"wa": {"released": released, "ours": released}}, 10)
    # Two seeds, each side's variance 8: the square root of 8/2 + 8/2.
    assert "+0.00 ± 2.83" in both


def test_finished_runs_are_kept_and_not_repeated(clone, tmp_path, monkeypatch, capsys):
    trained = []

    def train(side, accuracy):
        def note(*arguments):
            trained.append((side, arguments[-1].seed))
            return {"cnn": accuracy, "nme": accuracy}

        return note

    monkeypatch.setattr(released, "check", lambda config: None)
    monkeypatch.setattr(released, "in_new_process", train("released", [60.0, 40.0]))
    monkeypatch.setattr(released, "run_ours", train("ours", [61.0, 42.0]))
    monkeypatch.setattr(released, "describe", lambda device: f"a {device}")
    command = [str(clone), "--methods", "icarl", "--out", str(tmp_path / "out")]
    main([*command, "--seeds", "1"])
    path = tmp_path / "out" / "released.json"
    older = json.loads(path.read_text())
    del older["config"]["squared_distance"]  # An option that came later.
    path.write_text(json.dumps(older))
    main([*command, "--seeds", "1"])
    assert trained == [("released", 1), ("ours", 1)]
    assert json.loads(path.read_text()) == older
    monkeypatch.setattr(released, "describe", lambda device: f"another {device}")
    main([*command, "--seeds", "1", "2"])
    assert trained[2:] == [("released", 2), ("ours", 2)]
    stored = json.loads(path.read_text())
    assert stored["accuracy"]["icarl"]["ours"]["2"]["cnn"] == [61.0, 42.0]
    assert stored["machine"] == "a cpu; another cpu"
    page = (tmp_path / "out" / "released.md").read_text()
    assert "+2.00 ± 0.00" in page
    assert "iCaRL unknown" in page  # The commit: the stand-in is no clone.
    with pytest.raises(SystemExit):
        main([*command, "--classes", "20"])
    assert "classes: 30 there, 20 here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--run_folder", str(tmp_path / "run")])
    assert "run_folder: expected none" in capsys.readouterr().err
    monkeypatch.setattr(released, "_commit", lambda clone: "abc")
    with pytest.raises(SystemExit):
        main([*command, "--seeds", "3"])
    assert "clone: expected commit unknown, of which" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--clases", "20"])
    assert "the nearest known key is 'classes'" in capsys.readouterr().err


def test_ours_trains_on_the_cpu_as_the_released_code_does(monkeypatch):
    def train(config):
        assert config == replace(PROTOCOL, device="cpu")
        return {"cnn": {"accuracy": [0.61234, 0.5]}, "nme": {"accuracy": [0.6, 0.4]}}

    monkeypatch.setattr(released, "run", train)
    assert released.run_ours(PROTOCOL) == {"cnn": [61.23, 50.0], "nme": [60.0, 40.0]}


def test_settings_of_both_phases_have_the_released_names():
    first = Phase(3, lr=0.1, weight_decay=5e-4, milestones=(1, 2), gamma=0.2)
    later = Phase(2, lr=0.3, weight_decay=1e-3, milestones=(1,), gamma=0.5)
    config = replace(
        PROTOCOL, first=[first], later=[later], batch_size=17, auxiliary_weight=0.5, mem_size=600
    )
    found = released_settings(config)
    assert (found["init_lr"], found["lrate"]) == (0.1, 0.3)
    assert (found["init_lr_decay"], found["lrate_decay"]) == (0.2, 0.5)
    assert (found["init_milestones"], found["milestones"]) == ([1, 2], [1])
    assert (found["batch_size"], found["alpha_aux"]) == (17, 0.5)
    assert (found["memory_per_class"], found["fixed_memory"]) == (None, False)
    usual = released_settings(replace(config, first=[Phase(3)], lr=0.7, weight_decay=0.01))
    assert (usual["init_lr"], usual["init_weight_decay"]) == (0.7, 0.01)
    fixed = released_settings(replace(config, exemplars_per_class=20))
    assert (fixed["memory_per_class"], fixed["fixed_memory"]) == (20, True)
