"""Contestants take turns at the same work, each in a process of its own; what counts is the ratio of neighbouring turns.

A contestant is a process that is warm and waits. The frame tells one after another to train its next steps, so that what
disturbs the machine for longer than a turn disturbs all of them. Each says how long its turn took by the clock and by its own
processor time, and what the mean loss was. Needs neither TensorFlow nor PyTorch: each child runs in the Python that has its
library.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable

import numpy as np

from benchmarks import works
from benchmarks.children import NO_ANSWER, ROOT, Child, Failed

TURN_LIMIT = 600.0  # seconds, after which a contestant has failed, so that nobody waits for one that hangs
WARM_UP = 2  # turns that do not count: functions are traced, kernels chosen, and mptrain finds out what takes a second
TURN_SECONDS = 60.0  # that a turn may take where time is short
TORCH_PYTHON = ROOT / ".venv-bench" / "bin" / "python"  # made by `make bench-torch`; beside TensorFlow, never with it


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: a work in a precision.

    Attributes:
        work: see `works`.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        turns: the steps of each turn, warm-up first.
        numbers: the file with the examples of each step.
    """

    work: works.Work
    precision: str
    turns: tuple[int, ...]
    numbers: str

    def __str__(self) -> str:
        return f"{self.work.name} {self.precision}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Case":
        fields = json.loads(text)
        work = works.Work(**fields.pop("work"))
        work = dataclasses.replace(work, shape=tuple(work.shape))
        return cls(work=work, **{**fields, "turns": tuple(fields["turns"])})


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        steps: trained in it.
        wall: seconds.
        processor: seconds of processor time of the contestant's process.
        loss: mean over its steps.
    """

    steps: int
    wall: float
    processor: float
    loss: float


class Contestant(Child):
    """A process that trains when it is told to.

    Args:
        name: one of `contestants.ALL`.
    """

    def __init__(self, name: str):
        from benchmarks.contestants import ALL

        python = TORCH_PYTHON if ALL[name].torch and TORCH_PYTHON.exists() else sys.executable
        super().__init__([str(python), "-m", "benchmarks.contestants", name])
        self.name = name
        self._turns_left = 0

    @property
    def free(self) -> bool:
        """Whether it can be given another case."""
        return self._turns_left == 0 and not self.ended

    def open(self, case: Case) -> None:
        """Makes the contestant ready for a case, as far as it can be without a step."""
        self._turns_left = len(case.turns)
        self.tell(case.to_json())

    def begin_turn(self) -> None:
        self.tell("turn")

    def end_turn(self, seconds: float) -> Turn:
        """Waits for the turn that the contestant has begun.

        Raises:
            Failed: if it cannot train, or not in `seconds`.
        """
        turn = Turn(**self.answer(seconds))
        self._turns_left -= 1
        return turn


class Contestants(contextlib.AbstractContextManager):
    """The contestants of several cases, each started when it is first wanted, and anew if it cannot go on."""

    def __init__(self):
        self._there: dict[str, Contestant] = {}

    def __exit__(self, *_) -> None:
        for each in self._there.values():
            each.end()

    def ready(self, names: Iterable[str]) -> dict[str, Contestant]:
        """Returns name -> process of those named, which wait for a case."""
        names = list(names)
        for name in names:
            if name in self._there and not self._there[name].free:
                self._there.pop(name).end()
            if name not in self._there:
                self._there[name] = Contestant(name)
        return {name: self._there[name] for name in names}


def compete(
    case: Case,
    contestants: dict[str, Contestant],
    slow: dict[str, tuple[int, ...]],
    *,
    together: int = 0,
    end: float = math.inf,
) -> dict[str, list[Turn] | str]:
    """Returns each contestant's turns, warm-up included, or the line that says why there are none.

    The order is reversed in every second round.

    Args:
        case: what to train.
        contestants: name -> process.
        slow: name -> the turns of those that would take all day over the others', or must end theirs where such ones do.
        together: rounds of the warm-up in which all have their turn at once, so that they trace side by side.
        end: of `time.monotonic`, when who is still busy is ended, and keeps its turns if some of them count. A round that
            would last longer is not begun, once each contestant has a turn that counts; no turn may take longer than
            `TURN_SECONDS` then. Without an end each turn has `TURN_LIMIT`, and who takes longer has failed.
    """
    results: dict[str, list[Turn] | str] = {}
    for name, contestant in contestants.items():
        contestant.open(dataclasses.replace(case, turns=slow.get(name, case.turns)))
        results[name] = []
    took, over = 0.0, set()
    for number in range(len(case.turns)):
        start = time.monotonic()
        if number > WARM_UP and start + took > end:
            break
        names = list(contestants)[:: -1 if number % 2 else 1]
        names = [n for n in names if not isinstance(results[n], str) and n not in over]
        names = [n for n in names if number < len(slow.get(n, case.turns))]
        for name in names if number < together else ():
            contestants[name].begin_turn()
        for name in names:
            if number >= together:
                contestants[name].begin_turn()
            seconds = TURN_LIMIT if end == math.inf else min(TURN_SECONDS, end - time.monotonic())
            try:
                results[name].append(contestants[name].end_turn(seconds))
            except Failed as reason:
                if str(reason) == NO_ANSWER and time.monotonic() >= end and len(results[name]) > WARM_UP:
                    over.add(name)
                else:
                    results[name] = str(reason)
        took = time.monotonic() - start
    return results


def times(turns: list[Turn]) -> np.ndarray:
    """Returns the seconds a step by the clock and by processor time of the turns that count, [turns, 2]."""
    return np.array([[turn.wall / turn.steps, turn.processor / turn.steps] for turn in turns[WARM_UP:]])


def ratio(turns: list[Turn], reference: list[Turn]) -> tuple[np.ndarray, float]:
    """Returns the quartiles of the ratios of step times by the clock, [3], and the median of those by processor time."""
    ours, theirs = times(turns), times(reference)
    count = min(len(ours), len(theirs))
    ratios = ours[:count] / theirs[:count]
    return np.quantile(ratios[:, 0], [0.25, 0.5, 0.75]), float(np.median(ratios[:, 1]))


def differences_of_losses(turns: list[Turn], reference: list[Turn]) -> tuple[float, float]:
    """Returns by how much the mean losses differ, relative, up to the first step that ends turns of both, and between the
    last two such steps.

    Later losses drift apart, as those of any two runs with other rounding do; so the second may be larger. It is NaN or
    infinite where one of the two trained to no finite loss.

    Raises:
        ValueError: if no turns of the two end at the same step.
    """
    ours, theirs = _sums(turns), _sums(reference)
    common = sorted(ours.keys() & theirs.keys() - {0})
    if not common:
        raise ValueError("no turns end at the same step")
    spans = (0, common[0]), ([0, *common][-2], common[-1])
    first, last = (abs((ours[end] - ours[start]) / (theirs[end] - theirs[start]) - 1) for start, end in spans)
    return first, last


def _sums(turns: list[Turn]) -> dict[int, float]:
    steps, losses = np.array([turn.steps for turn in turns]), np.array([turn.loss for turn in turns])
    sums = dict(zip(np.cumsum(steps).tolist(), np.cumsum(steps * losses).tolist(), strict=True))
    return {0: 0.0} | sums
