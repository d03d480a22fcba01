"""Contestants take turns at the same work, each in a process of its own; what counts is the ratio of neighbouring turns.

A contestant is a process that is warm and waits. The frame tells one after another to train its next steps, so that what
disturbs the machine for longer than a turn disturbs all of them. Each says how long its turn took by the clock and by its own
processor time, and what the mean loss was. Needs neither TensorFlow nor PyTorch: each child runs in the Python that has its
library.
"""

import dataclasses
import json
import pathlib
import select
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import works

ROOT = pathlib.Path(__file__).parent.parent
TURN_LIMIT = 600.0  # seconds, after which a contestant has failed, so that nobody waits for one that hangs
WARM_UP = 2  # turns that do not count: functions are traced, kernels chosen, and mptrain finds out what takes a second
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


class Failed(Exception):
    """A contestant ended, or cannot run here; the text is one line that says why."""


class Contestant:
    """A process that trains when it is told to; a context manager that ends it.

    Args:
        name: one of `contestants.ALL`.
    """

    def __init__(self, name: str):
        from benchmarks.contestants import ALL

        self.name = name
        python = TORCH_PYTHON if ALL[name].torch and TORCH_PYTHON.exists() else sys.executable
        self._errors = tempfile.TemporaryFile("w+")
        command = [str(python), "-m", "benchmarks.contestants", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()

    def open(self, case: Case) -> None:
        """Makes the contestant ready for a case, as far as it can be without a step."""
        self._send(case.to_json())

    def turn(self) -> Turn:
        """Lets the contestant train its next turn of the case.

        Raises:
            Failed: if it cannot.
        """
        self._send("turn")
        if not select.select([self._process.stdout], [], [], TURN_LIMIT)[0]:
            self._process.kill()
            raise Failed(f"a turn took more than {TURN_LIMIT:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            lines = [line for line in self._errors.read().splitlines() if line.strip()]
            raise Failed(lines[-1] if lines else "ended without a word")
        reply = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return Turn(**reply)

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the next turn says why


def compete(case: Case, contestants: dict[str, Contestant], slow: dict[str, tuple[int, ...]]) -> dict[str, list[Turn] | str]:
    """Returns each contestant's turns, warm-up included, or the line that says why there are none.

    The order is reversed in every second round.

    Args:
        case: what to train.
        contestants: name -> process.
        slow: name -> the turns of those that would take all day over the others'.
    """
    results: dict[str, list[Turn] | str] = {}
    for name, contestant in contestants.items():
        contestant.open(dataclasses.replace(case, turns=slow.get(name, case.turns)))
        results[name] = []
    for number in range(len(case.turns)):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            turns = results[name]
            if isinstance(turns, str) or number >= len(slow.get(name, case.turns)):
                continue
            try:
                turns.append(contestants[name].turn())
            except Failed as reason:
                results[name] = str(reason)
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
    """Returns by how much the mean losses differ, relative, up to the first and up to the last step that end turns of both.

    Later losses drift apart, as those of any two runs with other rounding do; so the second may be larger. It is NaN or
    infinite where one of the two trained to no finite loss.

    Raises:
        ValueError: if no turns of the two end at the same step.
    """
    ours, theirs = _sums(turns), _sums(reference)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError("no turns end at the same step")
    first, last = (abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in (common[0], common[-1]))
    return first, last


def _sums(turns: list[Turn]) -> dict[int, float]:
    steps, losses = np.array([turn.steps for turn in turns]), np.array([turn.loss for turn in turns])
    return dict(zip(np.cumsum(steps).tolist(), np.cumsum(steps * losses).tolist(), strict=True))
