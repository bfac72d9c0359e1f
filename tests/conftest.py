import os
from pathlib import Path

import pytest
import torch

# Tiny tensors: a second thread would only wait for the first, and the more so on a busy machine.
torch.set_num_threads(1)


def _data_folder(name: str) -> Path:
    """Return the folder that holds the data set's folder `name`, or skip the test."""
    root = Path(os.environ.get("AVALANCHE_MEMO_DATA") or "data")
    if not (root / name).is_dir():
        pytest.skip(f"needs {name}/ in ./data or in the folder that AVALANCHE_MEMO_DATA names")
    return root


@pytest.fixture(scope="session")
def cifar100_root() -> Path:
    """The folder that holds cifar-100-python/."""
    return _data_folder("cifar-100-python")


@pytest.fixture(scope="session")
def imagenet_mini_root() -> Path:
    """The folder imagenet-mini/ itself, with train/ and val/ in it."""
    return _data_folder("imagenet-mini") / "imagenet-mini"
