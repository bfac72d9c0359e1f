"""Figures that sum up a class-incremental run, as pure functions of its accuracies.

Average incremental accuracy follows iCaRL (Rebuffi et al., 2017), the forgetting rate Chaudhry et
al. (2018) taken per class, and the area under accuracy over budget "Class-Incremental Learning: A
Survey" (Zhou et al., 2024).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

__all__ = [
    "area_under_budget",
    "average_incremental_accuracy",
    "forgetting_rate",
    "group_classes",
]


def average_incremental_accuracy(accuracies: Sequence[float]) -> float:
    """Return the mean of the accuracies over all classes seen, one value after each experience.

    The first experience counts like every other. Fractions or percentages; the result is in the
    same unit.

    :param accuracies: accuracy over all classes seen so far, after experience 1, 2, ...; at least
        one.
    :raises ValueError: if there is no accuracy, or one is negative or not finite.
    """
    _check_accuracies("accuracies", accuracies)
    if len(accuracies) == 0:
        raise ValueError("accuracies: expected at least one value, got none")
    return math.fsum(accuracies) / len(accuracies)


def forgetting_rate(history: Sequence[Mapping[int, float]]) -> float:
    """Return how far, on average, a class has fallen below its own best.

    ``F = 1/|C| * sum over c in C of max(0, best earlier accuracy of c - present accuracy of c)``,
    where C are the classes of the last entry, i.e. all classes seen. A class without an earlier
    accuracy has nothing to forget yet and contributes 0, so F after the first experience is 0.
    (Chaudhry et al. average over earlier tasks only and do not clamp at zero.) Fractions or
    percentages; the result is in the same unit.

    :param history: accuracy per class id after each experience; the last entry is the present one.
    :raises ValueError: if there is no entry, if the present one is empty or lacks a class that was
        measured earlier, or if an accuracy is negative or not finite.
    """
    if not history:
        raise ValueError("history: expected at least one mapping of class to accuracy, got none")
    for time, accuracies in enumerate(history):
        _check_accuracies(f"history[{time}]", list(accuracies.values()))
    *earlier, present = history
    if not present:
        raise ValueError("history: expected a last mapping with every class seen, got an empty one")
    if missing := set().union(*earlier) - present.keys():
        raise ValueError(
            "history: expected the last mapping to hold every class measured earlier, "
            f"got none for {sorted(missing)}"
        )
    falls = (
        max([0.0, *(past[c] - accuracy for past in earlier if c in past)])
        for c, accuracy in present.items()
    )
    return math.fsum(falls) / len(present)


def area_under_budget(megabytes: Sequence[float], accuracies: Sequence[float]) -> float:
    """Return the area under accuracy over memory budget, by the trapezoid rule.

    AUC-A takes average incremental accuracies, AUC-L the accuracies after the last experience. The
    unit is MB, since an accuracy has none: a method that is always right scores the width of the
    budget's range.

    :param megabytes: budgets in MB of 2**20 bytes, strictly increasing; at least two.
    :param accuracies: accuracy at each budget, as a fraction in 0..1.
    :raises ValueError: if the lengths differ, fewer than two points come, the budgets are not
        finite, non-negative and strictly increasing, or an accuracy is not a fraction.
    """
    if len(megabytes) != len(accuracies):
        raise ValueError(
            f"accuracies: expected one per budget ({len(megabytes)}), got {len(accuracies)}"
        )
    if len(megabytes) < 2:
        raise ValueError(f"megabytes: expected at least two budgets, got {len(megabytes)}")
    _check_accuracies("accuracies", accuracies, most=1.0)
    if not all(math.isfinite(budget) and budget >= 0 for budget in megabytes) or any(
        left >= right for left, right in pairwise(megabytes)
    ):
        raise ValueError(
            "megabytes: expected finite, non-negative, strictly increasing budgets, "
            f"got {list(megabytes)}"
        )
    points = zip(megabytes, accuracies, strict=True)
    return math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))


def group_classes(classes: Sequence[int], size: int = 10) -> list[list[int]]:
    """Cut the classes, in order of appearance, into groups of ``size``; the last may be smaller.

    :param classes: distinct class ids in order of appearance.
    :param size: classes per group.
    :raises ValueError: if ``size`` is not positive or a class appears twice.
    """
    if size < 1:
        raise ValueError(f"size: expected a positive number of classes per group, got {size}")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes: expected distinct class ids, got {list(classes)}")
    return [list(classes[start : start + size]) for start in range(0, len(classes), size)]


def _check_accuracies(name: str, accuracies: Sequence[float], most: float = math.inf) -> None:
    for accuracy in accuracies:
        if not (math.isfinite(accuracy) and 0 <= accuracy <= most):
            expected = "fractions in 0..1" if most == 1 else "finite, non-negative accuracies"
            raise ValueError(f"{name}: expected {expected}, got {accuracy}")
