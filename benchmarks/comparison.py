"""The comparison of mptrain with its peers, case by case: who runs in which, for how long, and what was found so far."""

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np

from benchmarks import frame, machine, report, targets, works
from benchmarks.cases import Cases, Measured
from benchmarks.children import NO_ANSWER
from benchmarks.contestants import ALL, PEERS, SCALERS
from benchmarks.document import RATIOS, TARGETS, TIMES, WHY, Document
from mptrain.hardware import hardware

ROUNDS = 10  # after the warm-up
QUICK_ROUNDS = 5
HOW_TO_READ = (
    "Operations that both sides have, with the same numbers, are TensorFlow's own work, which no loop around them changes."
    " Times are added up over threads, so they are more than the clock's; see `operations.py`."
)
SCALED = ("mlp", "cnn")  # loss scaling alone: where operations take the time, and where arithmetic does
SCALING_FACTOR = 3  # more rounds for loss scaling alone, whose differences are a hundredth of the second's step
QUICK = {
    "works": ("mlp", "cnn"),
    "precisions": ("float32", "mixed_float16"),
    "contestants": ("hand", "mptrain", "keras", "tf_keras"),
}
ALL_OF_THEM = {"works": tuple(works.WORKS), "precisions": works.PRECISIONS, "contestants": PEERS}
# In float16 a step takes seconds on a CPU: TensorFlow's convolutions of every kind, of some XLA's and PyTorch's, and XLA's
# products. Who would be at a turn for longer than TOO_LONG seconds has turns of a step, of which two say enough.
TOO_LONG = 8.0
SLOW_TURNS = (1,) * (frame.WARM_UP + 2)
# Who takes many times as long as the others has fewer turns, of the same length.
FEW_ROUNDS = 4
_FEW = ("keras", "tf_keras", "torch", "lightning", "lightning_tuned")
FEW_ON_CPUS = {("mlp", precision): _FEW for precision in works.PRECISIONS} | {("mlp", "mixed_float16"): (*_FEW, "orbit")}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is compared.

    Attributes:
        works: names of works.
        precisions: of each.
        contestants: who takes part; the loop by hand, or else the first, is the one that all are compared with.
        rounds: turns of each that count.
        quick: whether turns are short.
        tiny: whether all is at the smallest size, as tests have it.
        minutes: after which no further case is begun.
    """

    works: tuple[str, ...]
    precisions: tuple[str, ...]
    contestants: tuple[str, ...]
    rounds: int
    quick: bool
    tiny: bool
    minutes: float

    @property
    def reference(self) -> str:
        return "hand" if "hand" in self.contestants else self.contestants[0]


class Comparison:
    """Measures what is chosen, and writes what is known after each case, so that an end before the end loses nothing.

    Args:
        choice: what is compared.
        folder: for the numbers of the examples.
        document: where to write; None: what is measured is only printed.
        about: when and how it is measured, in a line.

    Attributes:
        differing: who did not compute the same as the reference.
    """

    def __init__(self, choice: Choice, folder: str, document: Document | None, about: str):
        self.differing: list[str] = []
        self._choice = choice
        self._folder = folder
        self._document = document
        self._about = about
        self._here = hardware()
        self._start = time.monotonic()
        self._cases = Cases(document.path.with_suffix(".json") if document else None, "\n".join(machine.description()))

    def run(self) -> None:
        """Measures all."""
        for name in self._choice.works:
            work = works.WORKS[name].tiny() if self._choice.tiny else works.WORKS[name]
            self._work(work, self._choice.contestants, self._choice.precisions, self._choice.reference, "")
            if name in SCALED and set(self._choice.contestants) >= {"hand", "mptrain", "keras", "tf_keras"}:
                self._work(work, SCALERS, ("float32",), "unscaled", ": loss scaling alone")
        if self._document and not self._choice.tiny:
            self._document.put(WHY, self._profiles())

    def _work(self, work: works.Work, names: tuple[str, ...], precisions: tuple[str, ...], reference: str, title: str) -> None:
        """Measures one work in several precisions; its contestants live as long as that takes."""
        with frame.Contestants() as contestants:
            for precision in precisions:
                if time.monotonic() > self._start + 60 * self._choice.minutes:
                    print(f"### {work.name}, {precision}{title}\n\nnot run: the time was over\n", flush=True)
                    continue
                those = [name for name in names if precision in (ALL[name].precisions or [precision])]
                slow = self._slow(work, precision, contestants.ready(those))
                self._case(work, precision, contestants.ready(those), slow, reference, title)
                self._write()

    def _slow(self, work: works.Work, precision: str, contestants: dict) -> list[str]:
        """Returns who would be at a turn for too long, which a step tells; only where somebody may be."""
        if self._here.gpus or precision != "mixed_float16" or work.name == "mlp":
            return []
        turns = (1,) * frame.WARM_UP
        found = frame.compete(self._prepared(work, precision, turns), contestants, {})
        steps = self._steps(work)
        return [name for name, took in found.items() if isinstance(took, str) or steps * took[-1].wall > TOO_LONG]

    def _steps(self, work: works.Work) -> int:
        return work.quick_steps if self._choice.quick else work.steps

    def _prepared(self, work: works.Work, precision: str, turns: tuple[int, ...]) -> frame.Case:
        file = os.path.join(self._folder, f"{work.name}-{precision}.npy")
        np.save(file, works.numbers(work, sum(turns)))
        return frame.Case(work, precision, turns, file)

    def _case(self, work: works.Work, precision: str, contestants: dict, slow: list[str], reference: str, title: str) -> None:
        key = () if self._here.gpus else (work.name, precision)
        steps = self._steps(work)
        rounds = self._choice.rounds * (SCALING_FACTOR if set(contestants) == set(SCALERS) else 1)
        turns = (steps,) * (frame.WARM_UP + rounds)
        others = {name: turns[: frame.WARM_UP + FEW_ROUNDS] for name in FEW_ON_CPUS.get(key, ()) if name in contestants}
        if reference in slow:  # whose losses end before a whole turn, and a `fit` has no other turns
            slow = [*slow, *(name for name in contestants if ALL[name].module == "keras_fit" and name not in slow)]
        others |= dict.fromkeys(slow, SLOW_TURNS)
        ahead = -len(SLOW_TURNS) % steps
        if slow and ahead:  # losses are compared with the reference's where a turn of both ends
            early = [name for name in contestants if name not in slow] if reference in slow else [reference]
            others |= {name: (len(SLOW_TURNS), ahead, *turns[2:]) for name in early}
        found = frame.compete(self._prepared(work, precision, turns), contestants, others)
        self._cases.put(Measured(work.name, precision, title, reference, self._about, found))
        print("\n".join(report.case_table(f"{work.name}, {precision}{title}", found, reference, precision)), flush=True)
        self.differing += [f"{work.name} {precision}: {name}" for name in report.differing(found, reference, precision)]

    def _write(self) -> None:
        """Writes the sections of the comparison."""
        if not self._document:
            return
        results, note = self._cases.results(), report.notes(self._here)
        commands = [*dict.fromkeys(case.about for case in self._cases), ""]
        self._document.put(TARGETS, [*commands, *report.target_table(results, self._here)])
        ratios = f"Medians of the ratios of step times; below 1 is faster. {note}"
        self._document.put(RATIOS, [ratios, "", *report.ratio_table(results, self._here)])
        times = [f"Medians over turns, and ratios of neighbouring turns; see `frame.py`. {note}", ""]
        for case in self._cases:
            heading, *table = report.case_table(case.heading, case.found, case.reference, case.precision)
            times += [heading, "", case.about, *table]
        self._document.put(TIMES, times)

    def _profiles(self) -> list[str]:
        """Returns a profile of both sides of each target that is missed."""
        missed = targets.missed(self._cases.results(), self._here)
        lines = [HOW_TO_READ, ""] if missed else []
        for target in missed:
            precisions = f"{target.precision}" + (f" against {target.their_precision}" if target.their_precision else "")
            lines += [f"### {target.what}: {target.work}, {precisions}", ""]
            command = [sys.executable, "-m", "benchmarks.operations", target.work, target.precision, target.ours, target.theirs]
            command += [f"--their-precision={target.their_precision}"] if target.their_precision else []
            try:
                finished = subprocess.run(command, cwd=frame.ROOT, capture_output=True, text=True, timeout=frame.TURN_LIMIT)
                why = finished.stdout.strip() or f"no profile: {(finished.stderr.splitlines() or ['it said nothing'])[-1]}"
            except subprocess.TimeoutExpired:
                why = f"no profile: {NO_ANSWER}"
            lines += [why, ""]
        return lines
