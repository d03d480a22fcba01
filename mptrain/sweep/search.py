"""What a sweep tries: distributions of a field's values, and the searches that draw trials from them."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mptrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Values from `low` to `high`, evenly in their logarithm where `log`; whole numbers, both ends included, where `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, rng: np.random.Generator):
        if self.whole:
            return int(rng.integers(self.low, self.high, endpoint=True))
        if self.log:
            return float(min(math.exp(rng.uniform(math.log(self.low), math.log(self.high))), self.high))
        return float(rng.uniform(self.low, self.high))

    def ends(self) -> list:
        return [self.low, self.high]

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' * self.log}{', whole' * self.whole}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values, of any types."""

    values: tuple

    def draw(self, rng: np.random.Generator):
        return self.values[int(rng.integers(len(self.values)))]

    def ends(self) -> list:
        return list(self.values)

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


def uniform(low: float, high: float) -> Distribution:
    """Returns the distribution of numbers that are equally likely from `low` to `high`."""
    return _checked("uniform", Distribution(low, high), float)


def log_uniform(low: float, high: float) -> Distribution:
    """Returns the distribution of numbers whose logarithms are equally likely: for learning rates and the like."""
    if _is_number(low) and low <= 0:
        raise InputError(f"sweep.log_uniform({low!r}, {high!r}): zero and below have no logarithm")
    return _checked("log_uniform", Distribution(low, high, log=True), float)


def integers(low: int, high: int) -> Distribution:
    """Returns the distribution of whole numbers from `low` to `high`, both included."""
    return _checked("integers", Distribution(low, high, whole=True), int)


def choice(values: Sequence) -> Choice:
    """Returns the distribution of equally likely values; a plain list in a space is the same."""
    values = tuple(values)
    if not values:
        raise InputError("a sweep's field has no values to choose from: write at least one")
    return Choice(values)


def _checked(name: str, made: Distribution, kind: type) -> Distribution:
    numbers = all(_is_number(end) and (kind is float or isinstance(end, int)) for end in made.ends())
    if not (numbers and made.low < made.high):
        what = "whole numbers" if kind is int else "finite numbers"
        raise InputError(f"sweep.{name}({made.low!r}, {made.high!r}): write two {what}, the smaller first")
    return made


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Search:
    """Trials, numbered from 1; the values of trial n do not depend on how often the sweep was stopped before it.

    Args:
        space: field path -> list of values, or what `uniform`, `log_uniform`, `integers` or `choice` returned.
        trials: how many.
        metric: what trials are ranked by; None: the config's checkpoint.best_metric.
        mode: "min" or "max"; None: the config's checkpoint.best_mode.

    Raises:
        InputError: if one of them is none.
    """

    kind = ""

    def __init__(self, space: Mapping, trials: int, metric: str | None, mode: str | None):
        if not isinstance(space, Mapping) or not space:
            raise InputError(
                f"the sweep's space is {space!r}: write a mapping of field paths to values, such as {{'seed': [0, 1]}}"
            )
        if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
            raise InputError(f"the sweep's trials is {trials!r}: write a whole number above 0")
        if mode not in (None, "min", "max"):
            raise InputError(f"the sweep's mode is {mode!r}: write 'min' or 'max'")
        self.space = {path: _distribution(path, values) for path, values in space.items()}
        self.metric = metric
        self.mode = mode
        self._trials = trials

    def __len__(self) -> int:
        return self._trials

    def open(self, folder, mode: str) -> None:
        """Makes what it knows last in a folder that is there; called once, before all else."""

    def ask(self, number: int) -> dict:
        """Returns {field path: value} of a trial."""
        raise NotImplementedError

    def tell(self, number: int, value: float | None) -> None:
        """Takes note of a trial's value, None of one that failed."""

    def samples(self) -> Iterator[dict]:
        """Yields the parameters by which a config is checked before the first trial: those of all trials, if they are known."""
        for number in range(1, len(self) + 1):
            yield self.ask(number)


class Grid(Search):
    """Every combination of lists of values; the last field changes fastest."""

    kind = "grid"

    def __init__(self, space: Mapping, *, metric: str | None = None, mode: str | None = None):
        super().__init__(space, 1, metric, mode)
        for path, values in self.space.items():
            if not isinstance(values, Choice):
                raise InputError(f"the sweep's {path} is a range: a grid needs a list of values, or write mptrain.sweep.random")
        self._combinations = list(itertools.product(*(values.values for values in self.space.values())))
        self._trials = len(self._combinations)

    def ask(self, number: int) -> dict:
        return dict(zip(self.space, self._combinations[number - 1], strict=True))


class Random(Search):
    """Independent draws (Bergstra and Bengio, 2012); trial n is a function of (seed, n), so more trials may follow later."""

    kind = "random"

    def __init__(self, *, trials: int, space: Mapping, seed: int = 0, metric: str | None = None, mode: str | None = None):
        super().__init__(space, trials, metric, mode)
        self._seed = seed

    def ask(self, number: int) -> dict:
        rng = np.random.default_rng([self._seed, number])
        return {path: values.draw(rng) for path, values in self.space.items()}


def as_search(given: object) -> Search:
    """Returns the search that a config file's `sweep()` means.

    Raises:
        InputError: if it means none.
    """
    return given if isinstance(given, Search) else Grid(given)


def _distribution(path: str, values: object) -> Distribution | Choice:
    if isinstance(values, (Distribution, Choice)):
        return values
    if isinstance(values, (str, Mapping)) or not hasattr(values, "__iter__"):
        raise InputError(f"the sweep's {path} is {values!r}: write a list of values, or a distribution of mptrain.sweep")
    return choice([value.item() if isinstance(value, np.generic) else value for value in values])
