"""Durations in steps or in epochs: two fields of a config, of which a run uses one, and the place that makes steps of both.

A field whose name ends in "epochs" and the one that is called the same but for "steps" are a duration: a new pair in
`default_config()` is one without another line. Either may be given, never both; a field that is left at its default gives way
to the other. What is rounded is rounded up, to whole steps and whole accumulation windows, so that no checkpoint falls inside
a window.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

from ml_collections import ConfigDict

from mptrain.config import copied, default_config, fields, place
from mptrain.errors import InputError

_NOTHING = (None, ())


def pairs() -> list[tuple[str, str]]:
    """Returns (path in steps, path in epochs) of every duration."""
    known = dict(fields(default_config()))
    in_steps = {path: path.removesuffix("epochs") + "steps" for path in known if path.endswith("epochs")}
    return [(steps, epochs) for epochs, steps in in_steps.items() if steps in known]


def faults(config: ConfigDict) -> Iterator[str]:
    """Yields a line for each duration that is given in both units, or in none where the run needs it."""
    values = dict(fields(config))
    for steps, epochs in pairs():
        both = _is_given(values, steps) and _is_given(values, epochs)
        if both or values[steps] is None and values[epochs] is None:
            state = "both are" if both else "neither is"
            yield f"config.{steps} and config.{epochs}: {state} set; set exactly one of them"


def prefer(config: ConfigDict, path: str) -> None:
    """Makes the duration that `path` gives count: its other unit, given before or not, goes back to its default."""
    twins = {one: other for pair in pairs() for one, other in (pair, pair[::-1])}
    if path in twins:
        holder, leaf = place(config, twins[path])
        holder[leaf] = dict(fields(default_config()))[twins[path]]


def open_fields(config: ConfigDict) -> set[str]:
    """Returns the paths of the durations that are not known in steps before the size of the data is."""
    values = dict(fields(config))
    return {path for pair in pairs() if _counts(values, *pair) for path in pair}


def resolve(config: ConfigDict, examples: Callable[[], int]) -> ConfigDict:
    """Returns a copy of the config in which every duration is in steps and none in epochs.

    Args:
        config: a config that was found valid.
        examples: returns the number of training examples, or raises an InputError where nobody knows it.

    Raises:
        InputError: if it is needed and not known. A default in epochs is left as it is then: a mode may not need it.
    """
    values, resolved = dict(fields(config)), copied(config)
    window = config.optimizer.accumulation_steps

    def in_steps(number: float) -> int:
        # By the decimal that was written: 1.1 epochs of 100 steps are 110, though the float nearest to 1.1 lies above it.
        return math.ceil(Fraction(str(number)) * examples() / (config.data.batch_size * window)) * window

    for steps, epochs in pairs():
        if not _counts(values, steps, epochs):
            value = values[steps]
        else:
            try:
                value = tuple(map(in_steps, values[epochs])) if isinstance(values[epochs], tuple) else in_steps(values[epochs])
            except InputError:
                if _is_given(values, epochs):
                    raise
                continue
        for path, new in ((steps, value), (epochs, () if isinstance(value, tuple) else None)):
            holder, leaf = place(resolved, path)
            holder[leaf] = new
    return resolved


def _is_given(values: dict, path: str) -> bool:
    return values[path] not in _NOTHING and values[path] != dict(fields(default_config()))[path]


def _counts(values: dict, steps: str, epochs: str) -> bool:
    """Whether it is the field in epochs that counts."""
    return values[epochs] not in _NOTHING and not _is_given(values, steps)
