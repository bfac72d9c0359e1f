"""Base-x/Inc-y protocols: which classes come in which order, and how many in each experience.

"Base-x Inc-y" means x classes in the first experience and y in each later one; Base-0 means y
classes in every experience. Class orders as in iCaRL (Rebuffi et al., CVPR 2017) and the PyCIL
toolbox, whose seed is 1993.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from avalanche.benchmarks import NCScenario, nc_benchmark

__all__ = ["class_order", "experience_sizes", "first_of_each_class", "split_classes"]


def class_order(n_classes: int, seed: int | None) -> list[int]:
    """Return the class ids ``0..n_classes-1`` in the order in which they are learned.

    The permutation is NumPy's legacy one, so that seed 1993 gives the order of the published
    results (68, 56, 78, 8, 23, ... for 100 classes). No global random state is used or changed.

    :param seed: seed of the permutation; None keeps ascending order.
    :raises ValueError: if there is no class.
    """
    if n_classes < 1:
        raise ValueError(f"n_classes: expected a positive number, got {n_classes}")
    if seed is None:
        return list(range(n_classes))
    order = np.random.RandomState(seed).permutation(n_classes)
    return [int(class_id) for class_id in order]


def experience_sizes(n_classes: int, base: int, increment: int) -> list[int]:
    """Return the number of classes of each experience of Base-``base`` Inc-``increment``.

    :raises ValueError: if ``base`` is negative or exceeds ``n_classes``, if ``increment`` is not
        positive, or if the classes after the base are not a multiple of it.
    """
    if n_classes < 1:
        raise ValueError(f"n_classes: expected a positive number, got {n_classes}")
    if not 0 <= base <= n_classes:
        raise ValueError(f"base: expected 0 to {n_classes} classes, got {base}")
    if increment < 1:
        raise ValueError(f"increment: expected a positive number, got {increment}")
    later = n_classes - base
    if later % increment:
        raise ValueError(
            f"increment: expected a divisor of the {later} classes that follow the base, "
            f"got {increment}"
        )
    return [base] * (base > 0) + [increment] * (later // increment)


def first_of_each_class(targets: Sequence[int], n: int) -> list[int]:
    """Return the ascending indices of the first ``n`` samples of every class.

    :raises ValueError: if ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"samples_per_class: expected a positive number, got {n}")
    ids = np.asarray(targets)
    return sorted(i for c in np.unique(ids) for i in np.flatnonzero(ids == c)[:n].tolist())


def split_classes(
    train: Any,
    test: Any,
    base: int,
    increment: int,
    *,
    seed: int | None = 1993,
    order: Sequence[int] | None = None,
    classes: int | None = None,
    original_class_ids: bool = False,
    train_transform: Callable[[Any], Any] | None = None,
    eval_transform: Callable[[Any], Any] | None = None,
) -> NCScenario:
    """Make an Avalanche benchmark of a pair of classification data sets.

    Its train and test streams have one experience per step of Base-``base`` Inc-``increment``,
    without task labels. No global random state is used or changed.

    :param train: training set of ``(image, class id)`` with ``targets``; class ids ``0..C-1``.
    :param test: test set of the same classes, likewise.
    :param seed: of the class order, see :func:`class_order`.
    :param order: the order itself, all class ids, instead of a seed's.
    :param classes: learn only the first so many classes of the order; None for all.
    :param original_class_ids: keep the data set's class ids. The default relabels the classes in
        order of appearance, so that the first experience has the ids ``0, 1, ...``.
    :param train_transform: applied to images of the train stream.
    :param eval_transform: applied to images of the test stream, and of the train stream's
        experiences in eval mode.
    :raises ValueError: if class ids have gaps or differ between the sets, if ``order`` has not each
        of them once, if ``classes`` is out of range, or from :func:`experience_sizes`.
    """
    n_classes = len({int(target) for target in train.targets})
    for name, dataset in (("train", train), ("test", test)):
        ids = {int(target) for target in dataset.targets}
        if ids != set(range(n_classes)):
            raise ValueError(
                f"{name}: expected samples of every class id from 0 to {n_classes - 1}, "
                f"got {len(ids)} ids from {min(ids, default=None)} to {max(ids, default=None)}"
            )
    if classes is None:
        classes = n_classes
    elif not 1 <= classes <= n_classes:
        raise ValueError(f"classes: expected 1 to {n_classes}, got {classes}")
    sizes = experience_sizes(classes, base, increment)
    order = class_order(n_classes, seed) if order is None else list(order)
    if sorted(order) != list(range(n_classes)):
        raise ValueError(
            f"order: expected each class id from 0 to {n_classes - 1} once, got {order}"
        )
    # nc_benchmark's own `seed` would give another order and reseed torch's global generator.
    return nc_benchmark(
        train,
        test,
        n_experiences=len(sizes),
        task_labels=False,
        shuffle=False,
        fixed_class_order=order[:classes],
        per_exp_classes=dict(enumerate(sizes)),
        class_ids_from_zero_from_first_exp=not original_class_ids,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
