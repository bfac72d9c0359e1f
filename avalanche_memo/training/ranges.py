"""Checks of numbers that were given; the messages begin with the argument's name."""

import math
from numbers import Integral
from typing import Any

__all__ = ["at_least_one", "at_least_zero", "positive"]


def at_least_one(name: str, value: Any) -> None:
    """Check that a number is whole and at least 1.

    :raises ValueError: if it is not; ``name`` is the argument's.
    """
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def at_least_zero(name: str, value: float) -> None:
    """Check that a number is finite and not negative.

    :raises ValueError: if it is not.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")


def positive(name: str, value: float) -> None:
    """Check that a number is finite and above 0.

    :raises ValueError: if it is not.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")
