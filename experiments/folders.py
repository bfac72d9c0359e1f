"""Run folders: each is one process's at a time, and of one configuration and data."""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from avalanche_memo.training.checkpoint import written_whole
from experiments.building import data_digest
from experiments.config import Config, from_options
from experiments.kept_models import KeptModels

__all__ = [
    "RunFolderError",
    "check_folder",
    "claim",
    "compact",
    "finished",
    "locked",
    "refuse_other",
    "refuse_other_data",
    "stored_config",
    "write",
]

_DATA = "data.txt"


class RunFolderError(RuntimeError):
    """What a run folder holds, or who is in it, keeps a run from going on."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, which is made if it lacks, from other processes.

    :raises RunFolderError: if another process runs in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"{folder}: another process is running in this folder") from None
        yield


def claim(folder: Path, config: Config) -> None:
    """Write the configuration into a new folder, or compare it with the one that is there.

    The data may have moved since.
    """
    check_folder(config)
    path = folder / "config.yaml"
    if not path.exists():
        config.save(path)
    elif config.data_root not in (None, (stored := stored_config(folder)).data_root):
        replace(stored, data_root=config.data_root).save(path)
    if (digest := data_digest(config)) is not None and not (folder / _DATA).exists():
        write(folder / _DATA, digest)


def check_folder(config: Config) -> None:
    """Compare a configuration with the one in its folder, if any.

    :raises ValueError: if they differ, or results lie there without a configuration.
    """
    folder, path = config.folder, config.folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run_folder: expected a folder, got the file {folder}")
    if not path.exists():
        if (folder / "results.json").exists():
            raise ValueError(f"run_folder: expected a config.yaml beside results.json in {folder}")
        return
    refuse_other("run_folder", folder, stored_config(folder).identity(), config.identity())
    refuse_other_data("run_folder", folder, config)
    began = (folder / "checkpoint.pt").exists()
    if config.keep_models and began and not KeptModels(folder).path(0, "first").exists():
        raise ValueError(
            f"keep_models: expected false for {folder}, a run that began without, got true"
        )


def stored_config(folder: Path) -> Config:
    """Return the configuration that a run folder holds.

    :raises ValueError: if it is damaged, or of another version.
    """
    path = folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected options and their values, got {content}")
        return from_options(content)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None


def refuse_other(name: str, folder: Path, stored: dict[str, Any], own: dict[str, Any]) -> None:
    """Compare what a folder holds with what an option needs.

    :raises ValueError: if they differ; it begins with the option's name.
    """
    different = [
        f"{key}: {stored.get(key)} there, {own.get(key)} here"
        for key in stored | own
        if stored.get(key) != own.get(key)
    ]
    if different:
        raise ValueError(
            f"{name}: {folder} holds a run of another configuration ({'; '.join(different)}); "
            "expected another folder, or the same configuration"
        )


def refuse_other_data(name: str, folder: Path, config: Config) -> None:
    """Compare the data that a folder's run was trained on with a configuration's.

    :raises ValueError: if they differ; it begins with the option's name.
    """
    path, own = folder / _DATA, data_digest(config)
    if path.exists() and path.read_text() != own:
        raise ValueError(
            f"{name}: {folder} holds a run on other data ({path.read_text()} there, {own} here); "
            "expected another folder, or the same data"
        )


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the results of a run folder, or None unless the run has come to its end.

    :raises ValueError: if its results.json is damaged, or none of this program.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        return results if len(results["classes"]) == results["experiences"] else None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the results of a run, got {error!r}") from None


def compact(results: dict[str, Any]) -> str:
    """Return JSON with a line for each key and for each row of a matrix."""
    text = json.dumps(results, indent=1, allow_nan=False)
    # Within strings there are no line breaks.
    return re.sub(r"\[[^][{}]*\]", lambda row: re.sub(r"\n *", " ", row[0]), text) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text file as a whole: a process killed at any moment leaves the old or the new."""
    with written_whole(path) as file:
        file.write(text.encode())
