"""The machine that figures are measured on, and its processes."""

import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_device", "chip", "default_device", "describe", "in_new_process", "seconds"]


def default_device() -> str:
    """Return ``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Check that a device is there.

    :raises ValueError: if it is not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected a device that is there, {error}") from None


def chip(device: torch.device) -> str:
    """Return the name of the processor behind a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return name[1] if name else platform.processor()


def describe(device: str) -> str:
    """Return the processor, the threads and the versions that a measurement was made with."""
    threads = torch.get_num_threads()
    return (
        f"{chip(torch.device(device))}, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def seconds(work: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Return how long a piece of work takes, all of it that is done on a device."""
    started = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own.

    :raises BrokenProcessPool: if the process is killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
