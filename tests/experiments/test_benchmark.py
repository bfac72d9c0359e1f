import pytest

from experiments.benchmark import BATCH, training_flops


def test_one_more_frozen_block_costs_its_convolutions_forward_and_to_its_input():
    # The last stage of a ResNet-32: ten convolutions of 3x3. The classifier's part is tiny.
    products = 8 * 8 * 9 * (32 * 64 + 9 * 64 * 64)
    added = training_flops(3) - training_flops(2)
    assert added == pytest.approx(2 * 2 * BATCH * products, rel=0.001)
