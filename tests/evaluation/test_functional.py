import math

import numpy as np
import pytest

from avalanche_memo.evaluation import (
    area_under_budget,
    average_incremental_accuracy,
    forgetting_rate,
    group_classes,
)
from tests.reference import metrics as reference

# CIFAR-100, Base-0 Inc-10: accuracies in percent at five budgets in bytes, as read off the figure
# of "Class-Incremental Learning: A Survey" (Zhou et al., 2024), and the areas printed beside it.
BUDGETS = [7_998_016, 13_018_240, 16_906_880, 20_795_520, 24_684_160]
PUBLISHED = {
    "MEMO": (10.85, [54.8, 69.1, 70.3, 71.7, 72.1], 9.03, [40.9, 57.0, 59.5, 61.8, 62.1]),
    "DER": (10.74, [53.8, 68.5, 70.4, 71.0, 70.1], 8.95, [40.6, 57.3, 59.8, 60.3, 59.9]),
    "WA": (10.80, [65.3, 67.7, 68.1, 69.1, 69.5], 8.92, [51.9, 55.1, 56.6, 58.1, 59.5]),
    "iCaRL": (10.81, [63.4, 67.2, 68.3, 70.0, 70.6], 8.64, [48.4, 53.0, 54.7, 57.4, 58.6]),
    "BiC": (10.73, [62.3, 65.9, 68.1, 69.8, 70.5], 8.30, [40.5, 50.2, 52.6, 57.9, 59.7]),
    "Replay": (10.49, [58.7, 64.6, 67.0, 69.0, 69.8], 8.02, [41.4, 48.8, 51.3, 54.4, 55.6]),
    "PODNet": (9.42, [55.4, 58.4, 60.2, 61.0, 60.8], 6.80, [36.8, 41.7, 44.1, 45.4, 45.4]),
}
# The same survey's budget-aligned MEMO, Base-0 Inc-5, after each of 20 experiences; average 73.16.
MEMO_INC5 = [
    *[93.80, 89.80, 84.33, 79.55, 79.16, 78.17, 76.71, 74.38, 73.16, 71.74],
    *[70.33, 69.62, 67.68, 68.41, 67.07, 65.41, 64.53, 63.78, 63.07, 62.59],
]


@pytest.mark.parametrize("method", PUBLISHED)
def test_area_under_budget_gives_the_published_areas(method):
    auc_a, averages, auc_l, lasts = PUBLISHED[method]
    megabytes = [budget / 2**20 for budget in BUDGETS]
    for published, percent in ((auc_a, averages), (auc_l, lasts)):
        area = area_under_budget(megabytes, [p / 100 for p in percent])
        # The points are read off a curve, to about 0.3 of a percent.
        assert area == pytest.approx(published, abs=0.03)


def test_area_of_a_constant_is_a_rectangle():
    assert area_under_budget([2, 3, 7], [0.5, 0.5, 0.5]) == pytest.approx(2.5)


def test_average_incremental_accuracy_gives_the_published_average():
    assert average_incremental_accuracy(MEMO_INC5) == pytest.approx(73.16, abs=0.01)
    assert average_incremental_accuracy(np.array([0.5, 0.25])) == 0.375


def test_forgetting_by_hand():
    history = [{3: 0.9}, {3: 0.5, 1: 0.6}, {3: 0.7, 1: 0.8, 9: 0.1}]
    # Class 3 fell from 0.9 to 0.7, class 1 rose, class 9 has nothing to forget yet.
    assert forgetting_rate(history) == pytest.approx(0.2 / 3)
    assert forgetting_rate(history[:1]) == 0


def test_forgetting_equals_the_reference():
    rng = np.random.default_rng(0)
    history = [dict(enumerate(rng.random(3 * time))) for time in range(1, 6)]
    for time in range(1, 6):
        assert forgetting_rate(history[:time]) == pytest.approx(
            reference.forgetting(history[:time])
        )


def test_groups_follow_the_order_of_appearance():
    classes = [*range(99, 89, -1), 5, 3]
    assert group_classes(classes) == [list(range(99, 89, -1)), [5, 3]]
    assert group_classes([4, 2, 8], size=2) == [[4, 2], [8]]
    assert group_classes([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_incremental_accuracy([]), "accuracies: expected at least one"),
        (lambda: average_incremental_accuracy([0.5, math.nan]), "accuracies: expected .* nan"),
        (lambda: average_incremental_accuracy([-0.5]), "accuracies: expected .* -0.5"),
        (lambda: forgetting_rate([]), "history: expected at least one"),
        (lambda: forgetting_rate([{}]), "history: expected .* got an empty one"),
        (lambda: forgetting_rate([{1: 0.5, 2: 0.5}, {2: 0.5}]), r"history: .* none for \[1\]"),
        (lambda: forgetting_rate([{1: math.inf}]), r"history\[0\]: expected .* inf"),
        (lambda: area_under_budget([1, 2], [0.5]), r"accuracies: expected .* \(2\), got 1"),
        (lambda: area_under_budget([1], [0.5]), "megabytes: expected at least two .* got 1"),
        (lambda: area_under_budget([2, 1], [0.5, 0.5]), "megabytes: .* increasing .*2, 1"),
        (lambda: area_under_budget([1, 2], [54.8, 69.1]), "accuracies: expected fractions .*54.8"),
        (lambda: group_classes([1], size=0), "size: expected a positive .* got 0"),
        (lambda: group_classes([1, 2, 1]), "classes: expected distinct .*1, 2, 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
