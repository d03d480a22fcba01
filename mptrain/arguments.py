"""Checks of arguments: one error for each, with the argument's name, its value and what it must be."""

import numbers

import numpy as np

FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_MIN = float(np.finfo(np.float32).tiny)  # below it TensorFlow takes a number for 0


def check_flag(name: str, value) -> None:
    """Raises a TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: it must be True or False")


def check_count(name: str, value) -> None:
    """Raises a TypeError unless the value is an integer, a ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}: it must be an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}: it must be at least 1")


def check_between(name: str, value, low: float, high: float) -> None:
    """Raises a TypeError unless the value is a number, a ValueError unless it lies between the two, neither included."""
    _check_number(name, value)
    if not low < value < high:
        raise ValueError(f"{name} is {value}: it must lie between {low:g} and {high:g}")


def check_positive(name: str, value) -> None:
    """Raises a TypeError unless the value is a number, a ValueError unless float32 holds it, above 0 and finite."""
    _check_number(name, value)
    if not _FLOAT32_MIN <= value <= FLOAT32_MAX:
        raise ValueError(f"{name} is {value}: it must be above 0 and finite in float32")


def _check_number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}: it must be a number")
