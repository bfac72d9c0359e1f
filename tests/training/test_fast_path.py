from dataclasses import replace

import numpy as np
import pytest
import torch

from avalanche_memo import MEMO
from avalanche_memo.models import ExpandableNetwork, FastPath, cifar_resnet
from avalanche_memo.training.plugins import ResidentBatches
from experiments.config import parse
from experiments.run import run
from tests.helpers import silent


def strategy(fast):
    network = ExpandableNetwork(lambda: cifar_resnet(8, in_channels=1), 2)
    return MEMO(
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        evaluator=silent(),
        fast=fast,
    )


@pytest.mark.parametrize("fast", [True, False])
def test_the_switch_turns_all_parts_on_or_off(fast):
    method = strategy(fast=fast)
    assert method.model.fast.bfloat16 is fast
    assert any(isinstance(plugin, ResidentBatches) for plugin in method.plugins) is fast


@pytest.mark.parametrize("on", [True, False])
def test_resident_batches_can_be_turned_off_alone(on):
    method = strategy(fast=FastPath(resident_batches=on))
    assert any(isinstance(plugin, ResidentBatches) for plugin in method.plugins) is on
    assert method.model.fast == FastPath(resident_batches=on)


def test_accuracy_is_unchanged_over_three_seeds(tmp_path):
    phase = '[{"epochs": 4, "milestones": [3]}]'
    base = parse(["--against=[]", f"--first={phase}", f"--later={phase}"])
    averages = {}
    for fast in (False, True):
        averages[fast] = [
            run(replace(base, seed=seed, fast=fast, run_folder=str(tmp_path / f"{fast}{seed}")))
            for seed in range(3)
        ]
    plain, quick = (
        np.array([results["nme"]["average"] for results in averages[fast]])
        for fast in (False, True)
    )
    assert list(plain) != list(quick)
    assert plain.min() > 0.85
    assert abs(plain.mean() - quick.mean()) <= max(0.01, np.ptp(plain))
