import json
import re
from pathlib import Path

import pytest

from experiments.benchmark import BATCH, main, page, training_flops


def test_one_more_frozen_block_costs_its_convolutions_forward_and_to_its_input():
    # The last stage of a ResNet-32: ten convolutions of 3x3. The classifier's part is tiny.
    products = 8 * 8 * 9 * (32 * 64 + 9 * 64 * 64)
    added = training_flops(3) - training_flops(2)
    assert added == pytest.approx(2 * 2 * BATCH * products, rel=0.001)


@pytest.mark.parametrize("option", ["--rounds=0", "--steps=0", "--device=gpuu", "--out={file}"])
def test_what_cannot_be_measured_is_refused_before_anything_is(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([option.format(file=tmp_path / "file")])
    output, error = capsys.readouterr()
    assert not output
    assert re.search("expected|File exists", error)


def test_the_shipped_page_is_what_its_measurements_give():
    results = Path(__file__).parents[2] / "experiments" / "results"
    content = json.loads((results / "benchmark.json").read_text())
    assert (results / "benchmark.md").read_text() == page(content)
    medians = {(row["what"], row["side"]): row["median"] for row in content["rows"]}
    for row in content["rows"]:
        plain = medians.get((row["what"], "plain"))
        if plain is not None:
            assert row["ratio"] == pytest.approx(plain / row["median"])
