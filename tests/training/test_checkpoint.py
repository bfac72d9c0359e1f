import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier
from torch import Tensor

from avalanche_memo.models import (
    BiasCorrectedLinear,
    CosineClassifier,
    ExpandableNetwork,
    GrowingLinear,
    ProxyCosineClassifier,
)
from avalanche_memo.training import (
    DER,
    MEMO,
    UCIR,
    WA,
    BiC,
    Finetune,
    ICaRL,
    Joint,
    MemoryRates,
    Phase,
    PODNet,
    Replay,
)
from avalanche_memo.training.checkpoint import Checkpoint, restore, written_whole
from avalanche_memo.training.plugins import HerdingReplayPlugin
from tests.helpers import (
    ORDER,
    assert_same_tensors,
    make_benchmark,
    silent,
    tensors_of,
    tiny_backbone,
)

EXPERIENCES = 3
FIRST = Phase(2, milestones=(1,))
LATER = (
    Phase(2, lr=0.04, warmup_epochs=2),
    Phase(
        2,
        lr=0.1,
        milestones=(1,),
        learns="classifier",
        data="balanced",
        temperature=5.0,
        reset_classifier=True,
    ),
)
EXEMPLARS = (
    LATER[0],
    Phase(2, learns="classifier", batch_norm="updated", data="exemplars"),
)
METHODS = {
    "DER": (DER, 0, {}),
    "DER pruned": (partial(DER, sparsity_weight=1.0), 0, {}),
    "MEMO": (MEMO, 2, {}),
    "Replay": (Replay, 3, {}),
    "PODNet": (
        partial(PODNet, flat_distillation="both", memory_rates=MemoryRates((0, 0.4, 0.8), 2, 6)),
        3,
        {"later_phases": EXEMPLARS},
    ),
    "UCIR": (UCIR, 3, {"later_phases": EXEMPLARS}),
    "ICaRL": (ICaRL, 3, {}),
    "WA": (WA, 3, {}),
    "BiC": (BiC, 3, {}),
    "Joint": (lambda mem_size, **options: Joint(**options), 3, {}),
}
CLASSIFIERS = {
    "PODNet": partial(ProxyCosineClassifier, 2),
    "UCIR": CosineClassifier,
    "BiC": BiasCorrectedLinear,
}


class Draw(SupervisedPlugin):
    """Uses every random number generator, as augmentations do."""

    def before_training_iteration(self, strategy, **kwargs):
        scale = 1 + 0.1 * (random.random() + np.random.random() + float(torch.rand(())))  # noqa: NPY002
        strategy.mbatch[0] = strategy.mbatch[0] * scale


class StoppedError(Exception):
    """What the interruption raises."""


class Interrupt(SupervisedPlugin):
    """Stops the run when an event has come up n times."""

    def __init__(self, event: str, n: int, kill: bool = False) -> None:
        super().__init__()
        self.left, self.kill = n, kill
        setattr(self, event, self._count)

    def _count(self, strategy, **kwargs):
        self.left -= 1
        if self.left == 0:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise StoppedError


def make(
    path: Path,
    *plugins: Any,
    method: str = "DER",
    seed: int = 0,
    fast: Any = False,
    seconds: float = 0.0,
) -> Any:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    strategy, shared_stages, own = METHODS[method]
    classifier = CLASSIFIERS.get(method, GrowingLinear)
    model = ExpandableNetwork(
        tiny_backbone, shared_stages, make_classifier=classifier, masked=method == "DER pruned"
    )
    return strategy(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        mem_size=20,
        train_mb_size=6,
        first_phases=[FIRST],
        **{"later_phases": LATER, **own},
        plugins=[Draw(), *plugins],
        evaluator=silent(),
        fast=fast,
        checkpoint=Checkpoint(path, "tiny run", seconds=seconds),
    )


def go_on(strategy: Any, stream: Any, *, save_between: bool = False) -> None:
    for experience in stream[strategy.clock.train_exp_counter : EXPERIENCES]:
        strategy.train(experience)
        if save_between:
            strategy.checkpoint.save(strategy)


def resume(path: Path, **options: Any) -> Any:
    """A fresh strategy, from another seed, put into the state of the file."""
    strategy = make(path, seed=99, **options)
    state, refused = strategy.checkpoint.load()
    assert state is not None
    assert refused == []
    restore(strategy, state, make_benchmark().train_stream)
    return strategy


def outcome(strategy: Any) -> dict[str, Any]:
    """All that a run ends with."""
    x = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    (replay,) = [p for p in strategy.plugins if isinstance(p, HerdingReplayPlugin)]
    clock = strategy.clock
    return {
        "tensors": tensors_of(strategy.model),
        "predictions": strategy.model.eval()(x).detach(),
        "classes": strategy.model.classes,
        "exemplars": [(c, order.tolist()) for c, order in replay.buffer.order.items()],
        "steps": (clock.train_iterations, clock.train_exp_counter),
        "random": (torch.rand(()).item(), np.random.random(), random.random()),  # noqa: NPY002
    }


def assert_same_outcome(ours: dict[str, Any], others: dict[str, Any]) -> None:
    assert_same_tensors(ours["tensors"], others["tensors"])
    assert torch.equal(ours["predictions"], others["predictions"])
    for part in ("classes", "exemplars", "steps", "random"):
        assert ours[part] == others[part]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> Any:
    """What an uninterrupted run ends with, by method and path."""
    known: dict[tuple[str, Any], dict[str, Any]] = {}

    def run(method: str = "DER", fast: Any = False) -> dict[str, Any]:
        if (method, fast) not in known:
            path = tmp_path_factory.mktemp("whole") / "run.pt"
            strategy = make(path, method=method, fast=fast)
            go_on(strategy, make_benchmark().train_stream)
            known[method, fast] = outcome(strategy)
        return known[method, fast]

    return run


def interrupted(path: Path, event: str, n: int, *, save_between: bool = False, **options) -> None:
    strategy = make(path, Interrupt(event, n), **options)
    with pytest.raises(StoppedError):
        go_on(strategy, make_benchmark().train_stream, save_between=save_between)


# Epochs 1 and 2 are experience 0; 3 and 4, then 5 and 6, the two phases of experience 1; and so on.
# The first epoch to come up after a checkpoint is the second.
@pytest.mark.parametrize("epoch", range(2, 11))
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_goes_on_from_any_epoch(epoch, fast, tmp_path, whole_runs):
    path = tmp_path / "run.pt"
    interrupted(path, "before_training_epoch", epoch, fast=fast)
    strategy = resume(path, fast=fast)
    go_on(strategy, make_benchmark().train_stream)
    assert_same_outcome(outcome(strategy), whole_runs(fast=fast))


def test_epochs_left_unsaved_are_trained_again(tmp_path, whole_runs):
    path, seldom = tmp_path / "run.pt", {"method": "MEMO", "seconds": 1000.0}
    interrupted(path, "before_training_epoch", 4, **seldom)
    state, _ = Checkpoint(path, "tiny run").load()
    assert state["phase"]["experience"] == 0
    assert state["phase"]["epoch"] == FIRST.epochs
    strategy = resume(path, **seldom)
    go_on(strategy, make_benchmark().train_stream)
    assert_same_outcome(outcome(strategy), whole_runs("MEMO"))


@pytest.mark.parametrize("method", ["MEMO", "Replay", "Joint"])
@pytest.mark.parametrize("epoch", [2, 4, 6, 8])
def test_other_methods_go_on(method, epoch, tmp_path, whole_runs):
    path = tmp_path / "run.pt"
    interrupted(path, "before_training_epoch", epoch, method=method)
    strategy = resume(path, method=method)
    go_on(strategy, make_benchmark().train_stream)
    assert_same_outcome(outcome(strategy), whole_runs(method))


@pytest.mark.parametrize("method", ["PODNet", "UCIR", "ICaRL", "WA", "BiC"])
@pytest.mark.parametrize(
    ("event", "n", "save_between", "fast"),
    [
        ("before_training_epoch", 4, False, False),  # after an epoch on all data
        ("before_training_epoch", 6, False, False),  # after an epoch on the exemplars
        ("before_training_epoch", 6, False, True),
        ("before_training_epoch", 8, False, True),
        ("before_training_epoch", 7, True, False),  # between two experiences
        ("after_training_exp", 2, False, False),
    ],
)
def test_distillation_goes_on(method, fast, event, n, save_between, tmp_path, whole_runs):
    path = tmp_path / "run.pt"
    options = {"method": method, "fast": fast}
    interrupted(path, event, n, save_between=save_between, **options)
    strategy = resume(path, **options)
    go_on(strategy, make_benchmark().train_stream, save_between=save_between)
    assert_same_outcome(outcome(strategy), whole_runs(method, fast))


@pytest.mark.parametrize(
    ("event", "n"),
    [
        ("after_update", 5),  # amid an epoch
        ("after_update", 20),
        ("after_training_epoch", 4),  # before the epoch is saved
        ("after_training_exp", 1),  # after the last epoch, with exemplars chosen or not
        ("after_training_exp", 2),
        ("before_training_exp", 3),
    ],
)
@pytest.mark.parametrize("save_between", [False, True])
def test_goes_on_from_any_place(event, n, save_between, tmp_path, whole_runs):
    path = tmp_path / "run.pt"
    interrupted(path, event, n, save_between=save_between)
    strategy = resume(path)
    go_on(strategy, make_benchmark().train_stream, save_between=save_between)
    assert_same_outcome(outcome(strategy), whole_runs())


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize(
    ("event", "n", "save_between"),
    [
        ("before_training_epoch", 2, False),  # before anything is pruned
        ("before_training_epoch", 4, False),  # on top of a pruned block
        ("before_training_epoch", 6, False),  # while the classifier learns
        ("before_training_epoch", 8, False),
        ("after_training_exp", 2, False),  # a block that is pruned, but was not saved so
        ("before_training_exp", 3, True),  # after pruning, before the next block
    ],
)
def test_pruning_goes_on(event, n, save_between, fast, tmp_path, whole_runs):
    path = tmp_path / "run.pt"
    options = {"method": "DER pruned", "fast": fast}
    interrupted(path, event, n, save_between=save_between, **options)
    strategy = resume(path, **options)
    go_on(strategy, make_benchmark().train_stream, save_between=save_between)
    assert_same_outcome(outcome(strategy), whole_runs("DER pruned", fast))
    assert len(strategy.model.kept) == EXPERIENCES


def test_a_state_within_an_experience_is_for_that_experience(tmp_path):
    path = tmp_path / "run.pt"
    interrupted(path, "before_training_epoch", 4)
    strategy = resume(path)
    before = tensors_of(strategy.model)
    message = "experience: expected 1, within which the state was saved, got 2"
    with pytest.raises(ValueError, match=message):
        strategy.train(make_benchmark().train_stream[2])
    assert_same_tensors(tensors_of(strategy.model), before)


def test_goes_on_after_several_interruptions(tmp_path, whole_runs):
    path = tmp_path / "run.pt"
    interrupted(path, "before_training_epoch", 2)
    for event, n in (("after_update", 9), ("before_training_epoch", 3), ("after_update", 7)):
        strategy = make(path, Interrupt(event, n), seed=n)
        state, _ = strategy.checkpoint.load()
        restore(strategy, state, make_benchmark().train_stream)
        with pytest.raises(StoppedError):
            go_on(strategy, make_benchmark().train_stream)
    strategy = resume(path)
    go_on(strategy, make_benchmark().train_stream)
    assert_same_outcome(outcome(strategy), whole_runs())


def test_does_no_epoch_twice(tmp_path):
    path = tmp_path / "run.pt"
    interrupted(path, "before_training_epoch", 6)
    # The sixth to the tenth are left; an eleventh would be one too many.
    interrupt = Interrupt("before_training_epoch", 6)
    strategy = make(path, interrupt)
    state, _ = strategy.checkpoint.load()
    restore(strategy, state, make_benchmark().train_stream)
    go_on(strategy, make_benchmark().train_stream)
    assert interrupt.left == 1


def be_killed(path: str, steps: int) -> None:
    """Run until SIGKILL; called in a process of its own."""
    torch.set_num_threads(1)
    strategy = make(Path(path), Interrupt("after_update", steps, kill=True))
    go_on(strategy, make_benchmark().train_stream)


def test_goes_on_after_a_kill(tmp_path, whole_runs):
    path = tmp_path / "run.pt"
    call = f"from tests.training.test_checkpoint import be_killed; be_killed({str(path)!r}, 24)"
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", call], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    strategy = resume(path)
    assert strategy.clock.train_exp_counter == 1
    go_on(strategy, make_benchmark().train_stream)
    assert_same_outcome(outcome(strategy), whole_runs())


@pytest.mark.parametrize("stop", [None, 3, 4])
def test_goes_on_with_settings_that_were_changed(stop, tmp_path):
    path, stream = tmp_path / "run.pt", make_benchmark().train_stream
    strategy = make(path, *([] if stop is None else [Interrupt("before_training_epoch", stop + 1)]))
    strategy.later_phases = (Phase(2), Phase(1))
    strategy.train(stream[0])
    strategy.optimizer.param_groups[0]["lr"] = 0.01
    strategy.checkpoint.save(strategy)
    if stop is not None:
        with pytest.raises(StoppedError):
            strategy.train(stream[1])
    strategy = resume(path)
    strategy.later_phases = (Phase(2), Phase(1))
    strategy.train(stream[1])
    assert strategy.optimizer.param_groups[0]["lr"] == 0.01


def test_a_plugin_of_the_users_gets_its_state_back(tmp_path):
    class Counter(SupervisedPlugin):
        steps = 0

        def after_training_iteration(self, strategy, **kwargs):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    path, before, after = tmp_path / "run.pt", Counter(), Counter()
    strategy = make(path, before)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    strategy.checkpoint.save(strategy)
    restored = make(path, after, seed=99)
    restore(restored, restored.checkpoint.load()[0], stream)
    assert after.steps == before.steps > 0


def test_a_model_that_grows_by_itself_has_no_checkpoint(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), IncrementalClassifier(64))
    options = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    Finetune(**options)
    with pytest.raises(ValueError, match=r"checkpoint: expected None .*IncrementalClassifier"):
        Finetune(**options, checkpoint=Checkpoint(tmp_path / "run.pt"))


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of experience 1 and its predecessor."""
    path = tmp_path / "folder" / "run.pt"
    interrupted(path, "before_training_epoch", 4)
    return path


def previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def epoch_of(state: dict[str, Any]) -> tuple[int, int]:
    return state["clock"]["train_exp_counter"], state["phase"]["epoch"]


def test_holds_tensors_and_plain_data(saved):
    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                assert type(key) in (str, int)
                check(entry)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                check(entry)
        else:
            assert isinstance(value, (Tensor, str, int, float, bool, type(None)))

    for path in (saved, previous(saved)):
        check(torch.load(path, weights_only=True))


def test_keeps_the_newest_and_the_one_before(saved):
    assert sorted(p.name for p in saved.parent.iterdir()) == ["run.pt", "run.pt.previous"]
    state, refused = Checkpoint(saved, "tiny run").load()
    assert refused == []
    assert epoch_of(state) == (1, 1)
    os.replace(previous(saved), saved)
    state, _ = Checkpoint(saved, "tiny run").load()
    assert epoch_of(state) == (0, 2)


def test_without_a_file_there_is_no_state(tmp_path):
    assert Checkpoint(tmp_path / "none" / "run.pt").load() == (None, [])


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named_and_the_previous_one_used(saved, kept, whole_runs):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(kept * len(data))])
    strategy = make(saved, seed=99)
    state, refused = strategy.checkpoint.load()
    assert len(refused) == 1
    assert refused[0].startswith(f"checkpoint {saved}: refused, ")
    assert epoch_of(state) == (0, 2)
    restore(strategy, state, make_benchmark().train_stream)
    go_on(strategy, make_benchmark().train_stream)
    assert_same_outcome(outcome(strategy), whole_runs())


def test_two_damaged_files_are_both_named(saved):
    saved.write_bytes(b"")
    previous(saved).write_bytes(b"no checkpoint")
    state, refused = Checkpoint(saved, "tiny run").load()
    assert state is None
    assert [str(p) in m for p, m in zip((saved, previous(saved)), refused, strict=True)] == [
        True
    ] * 2


class Harmful:
    """Anything that is no tensor and no plain data."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "content",
    [{"model": torch.zeros(2)}, {"format": "another"}, [1, 2], torch.zeros(3), None, Harmful()],
    ids=["dict", "other format", "list", "tensor", "None", "code"],
)
def test_a_foreign_file_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "run.pt")
    state, refused = Checkpoint("run.pt", "tiny run").load()
    assert state is None
    assert len(refused) == 1
    reason = "" if isinstance(content, Harmful) else "it is no checkpoint of avalanche_memo"
    assert refused[0].startswith(f"checkpoint run.pt: refused, {reason}")
    assert not Path("harm").exists()


def test_a_run_of_another_configuration_is_refused(saved):
    state, refused = Checkpoint(saved, "another run").load()
    assert state is None
    assert len(refused) == 2
    assert all("another configuration" in message for message in refused)


def test_an_unfinished_file_is_ignored(saved):
    part = saved.with_name("run.pt.part")
    part.write_bytes(saved.read_bytes()[:100])
    state, refused = Checkpoint(saved, "tiny run").load()
    assert refused == []
    assert epoch_of(state) == (1, 1)
    strategy = resume(saved)
    strategy.train(make_benchmark().train_stream[1])
    assert not part.exists()


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_saving_leaves_a_whole_file(saved, renames, monkeypatch):
    strategy = resume(saved)
    done = []
    rename = os.replace

    def replace(source, target):
        if len(done) == renames:
            raise StoppedError
        done.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(StoppedError):
            strategy.train(make_benchmark().train_stream[1])
    state, refused = Checkpoint(saved, "tiny run").load()
    assert refused == []
    assert epoch_of(state) == (1, 1)


def test_the_callers_own_data_comes_back(tmp_path):
    path = tmp_path / "run.pt"
    strategy = make(path)
    strategy.checkpoint.extra = {"matrix": [[0.5, 0.25]], "seconds": 3}
    strategy.train(make_benchmark().train_stream[0])
    again = Checkpoint(path, "tiny run")
    again.load()
    assert again.extra == {"matrix": [[0.5, 0.25]], "seconds": 3}


def test_a_restored_network_has_learned_the_same_classes(saved):
    strategy = resume(saved)
    assert set(strategy.model.classes) == set(ORDER[:4])
    assert strategy.model.feature_dim == 12


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_last_one(tmp_path, monkeypatch):
    path, calls = tmp_path / "state.pt", []
    with written_whole(path) as file:
        torch.save({"epoch": 1}, file)
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("flush"), flush(file)))
    monkeypatch.setattr(
        os, "replace", lambda old, new: (calls.append(f"to {Path(new).name}"), rename(old, new))
    )
    with written_whole(path, tmp_path / "before.pt") as file:
        torch.save({"epoch": 2}, file)
    with pytest.raises(OSError, match="no space"), written_whole(path) as file:
        raise OSError("no space")
    assert calls == ["flush", "to before.pt", "to state.pt", "flush"]
    assert [torch.load(tmp_path / f"{name}.pt")["epoch"] for name in ("before", "state")] == [1, 2]


def test_a_file_that_cannot_be_written_says_why(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="read-only"), written_whole(tmp_path / "file"):
        pass


def test_numbers_of_numpys_are_saved_as_numbers(tmp_path):
    strategy = make(tmp_path / "run.pt", method="Replay")
    strategy.optimizer.param_groups[0]["lr"] = np.float64(0.05)
    strategy.checkpoint.extra = {"rows": [np.float32(0.5), (np.arange(3), np.int64(2))]}
    strategy.train(make_benchmark().train_stream[0])
    state, refused = strategy.checkpoint.load()
    assert refused == []
    assert type(state["settings"]["lr"]) is float
    half, (three, two) = strategy.checkpoint.extra["rows"]
    assert (half, three.tolist(), two) == (0.5, [0, 1, 2], 2)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    strategy = make(tmp_path / "run.pt", method="Replay")
    strategy.checkpoint.save(strategy)
    before = strategy.checkpoint.path.read_bytes()
    strategy.checkpoint.extra = {"path": Path("x")}
    with pytest.raises(TypeError, match=r"checkpoint: expected tensors and plain data.*Path"):
        strategy.checkpoint.save(strategy)
    assert strategy.checkpoint.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
