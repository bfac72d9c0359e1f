"""Checkpoints of tensors and plain data, from which a killed run goes on to the same numbers."""

import inspect
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

__all__ = ["Checkpoint", "restore", "restore_progress", "written_whole"]

FORMAT = "avalanche_memo checkpoint 3"


class Checkpoint:
    """A file that holds the last good state of a run; the one before it is beside.

    Avalanche's own checkpoints pickle the whole strategy after an experience; these hold tensors
    and plain data (``torch.load(..., weights_only=True)``) and may be taken after any epoch. A
    file is written beside, flushed to the disk and renamed into place, so that a process killed
    at any moment leaves a whole one. Plugins with a ``state_dict()`` of tensors and plain data get
    it back by ``load_state_dict(state)``, or ``load_state_dict(state, stream)`` with the training
    stream. Plugins without one, such as Avalanche's ``LRSchedulerPlugin``, start afresh on
    resuming; the schedules of phases do not.

    :param path: the file; its predecessor is kept under the same name with ``.previous`` added.
    :param fingerprint: plain text that tells this run's configuration from another's.
    :param seconds: how long an epoch's state may go unsaved, but for a phase's last; 0 saves each.
    """

    def __init__(
        self, path: str | os.PathLike[str], fingerprint: str = "", *, seconds: float = 0.0
    ) -> None:
        self.path = Path(path)
        self.previous = self.path.with_name(self.path.name + ".previous")
        self.fingerprint = fingerprint
        self.extra: dict[str, Any] = {}
        """Plain data of the caller's that is saved and restored along."""
        self.seconds = seconds
        self._saved = -math.inf

    def due(self) -> bool:
        """Return whether the last state saved is as old as it may get."""
        return time.monotonic() - self._saved >= self.seconds

    def save(self, strategy: Any) -> None:
        """Write the state of a strategy, within an experience or between two.

        :raises TypeError: if it holds more than tensors and plain data; the file before it stays.
        """
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "extra": self.extra,
            "state": _capture(strategy),
        }
        with written_whole(self.path, self.previous) as file:
            torch.save(_without_numpy(content), file)
            file.flush()
            unknown = get_unsafe_globals_in_checkpoint(file.name)
            if unknown:
                raise TypeError(
                    "checkpoint: expected tensors and plain data, in `extra` and as the states of "
                    f"plugins and metrics, got {', '.join(unknown)}"
                )
        self._saved = time.monotonic()

    def load(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Read the newest whole state and :attr:`extra`.

        :return: the state, or ``None`` where there is none, and a message for each file refused.
        """
        refused = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(content, dict) or content.get("format") != FORMAT:
                    raise ValueError("it is no checkpoint of avalanche_memo")
                if content["fingerprint"] != self.fingerprint:
                    raise ValueError("it belongs to a run of another configuration")
            except Exception as error:  # A damaged file can fail in any part of the reader.
                reason = str(error).strip().split("\n")[0]
                refused.append(f"checkpoint {path}: refused, {reason}")
                continue
            self.extra = content["extra"]
            return content["state"], refused
        return None, refused


@contextmanager
def written_whole(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file to write beside; then flush it to the disk and rename it into place.

    A process killed at any moment leaves the old file or the new one, and so does an error.

    :param path: the file; folders that lack are made.
    :param previous: what an older file is renamed to, instead of being replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)  # On a full disk it would take the room that is left.
        raise
    if previous is not None and path.exists():
        os.replace(path, previous)
    os.replace(unfinished, path)
    _flush_folder(path.parent)


def restore(strategy: Any, state: dict[str, Any], stream: Sequence[Any]) -> None:
    """Put a fresh strategy into a saved state.

    A state taken within an experience takes effect when that experience is trained again: it
    then goes on with the epoch after the saved one.

    :param strategy: a strategy built from the same configuration.
    :param state: what :meth:`Checkpoint.load` returned; without ``"plugins"`` these stay fresh.
    :param stream: the training stream, which exemplars are positions in.
    :raises ValueError: if its plugins or metrics with a state are not as many as the saved ones.
    """
    strategy.model.load_state_dict(state["model"])
    strategy.model.to(strategy.device)
    if "plugins" in state:
        for plugin, saved in zip(_stateful(strategy.plugins), state["plugins"], strict=True):
            try:
                inspect.signature(plugin.load_state_dict).bind(saved, stream)
            except TypeError:
                plugin.load_state_dict(saved)
            else:
                plugin.load_state_dict(saved, stream)
    _restore_counts(strategy, state)
    if state["phase"] is not None:
        strategy.resume_from = state
    else:
        strategy.optimizer.param_groups[0].update(state["settings"])
        _restore_random(state["random"])


def restore_progress(strategy: Any, state: dict[str, Any]) -> None:
    """Finish :func:`restore` where the phase's training begins.

    By now Avalanche has announced the experience anew: counters have been reset, and random
    numbers drawn.
    """
    strategy.phase_epoch = state["phase"]["epoch"]
    strategy.optimizer.load_state_dict(state["optimizer"])
    _restore_counts(strategy, state)
    _restore_random(state["random"])


def _capture(strategy: Any) -> dict[str, Any]:
    phase = None
    if strategy.phase is not None:
        phase = {
            "experience": int(strategy.experience.current_experience),
            "index": strategy.phase_index,
            "epoch": strategy.phase_epoch,
            "seed": strategy.phase_seed,
        }
    return {
        "model": strategy.model.state_dict(),
        "optimizer": strategy.optimizer.state_dict(),
        "settings": strategy.optimizer_settings() if phase is None else strategy.settings,
        "phase": phase,
        "clock": dict(vars(strategy.clock)),
        "plugins": [plugin.state_dict() for plugin in _stateful(strategy.plugins)],
        "metrics": [metric.state_dict() for metric in _stateful(strategy.evaluator.metrics)],
        "random": _random_state(),
    }


def _restore_counts(strategy: Any, state: dict[str, Any]) -> None:
    vars(strategy.clock).update(state["clock"])
    for metric, saved in zip(_stateful(strategy.evaluator.metrics), state["metrics"], strict=True):
        metric.load_state_dict(saved)


def _without_numpy(content: Any) -> Any:
    """Return plain data with Python's numbers and torch's tensors for numpy's."""
    if isinstance(content, np.generic):
        return content.item()
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content.copy())
    if type(content) is dict:
        return {_without_numpy(k): _without_numpy(v) for k, v in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map(_without_numpy, content))
    return content


def _stateful(objects: Sequence[Any]) -> list[Any]:
    return [o for o in objects if hasattr(o, "state_dict") and hasattr(o, "load_state_dict")]


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, numbers, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.array(keys)), position, has_gauss, gauss],
        "python": [version, list(numbers), next_gauss],
    }


def _restore_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002
    version, numbers, next_gauss = state["python"]
    random.setstate((version, tuple(numbers), next_gauss))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
