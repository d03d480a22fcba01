"""The comparison of mptrain with its peers, case by case: who runs in which, for how long, and what was found so far."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np

from benchmarks import frame, report, targets, works
from benchmarks.contestants import ALL, PEERS, SCALERS
from benchmarks.document import RATIOS, TARGETS, TIMES, WHY, Document, measured
from mptrain.hardware import hardware

ROUNDS = 10  # after the warm-up
QUICK_ROUNDS = 5
SCALING_FACTOR = 3  # more rounds for loss scaling alone, whose differences are a hundredth of a step
QUICK = {
    "works": ("mlp", "cnn"),
    "precisions": ("float32", "mixed_float16"),
    "contestants": ("hand", "mptrain", "keras", "tf_keras"),
}
ALL_OF_THEM = {"works": tuple(works.WORKS), "precisions": works.PRECISIONS, "contestants": PEERS}
# What takes seconds a step on a CPU, as float16 kernels without a rewritten graph do, has two turns of a step that count.
SLOW_TURNS = (1,) * (frame.WARM_UP + 2)
_SLOW = ("keras", "keras_tuned", "tf_keras", "orbit")
SLOW_ON_CPUS = {
    ("cnn", "mixed_float16"): _SLOW,
    ("resnet", "mixed_float16"): _SLOW,
    ("transformer", "mixed_float16"): ("torch",),
}
# Who takes several times as long as the others on the smallest work has fewer turns, of the same length.
SLOWER = {"mlp": ("keras", "tf_keras", "torch", "lightning", "lightning_tuned")}
SLOWER_ROUNDS = 4


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
        command: that is run, for the document.
        load: of the machine before all.

    Attributes:
        differing: who did not compute the same as the reference.
    """

    def __init__(self, choice: Choice, folder: str, document: Document | None, command: list[str], load: str):
        self.differing: list[str] = []
        self._choice = choice
        self._folder = folder
        self._document = document
        self._about = measured(command, load)
        self._here = hardware()
        self._start = time.monotonic()
        self._results: dict[tuple[str, str, str], list[frame.Turn]] = {}
        self._tables: list[str] = []

    def run(self) -> None:
        """Measures all."""
        for name in self._choice.works:
            work = works.WORKS[name].tiny() if self._choice.tiny else works.WORKS[name]
            self._work(work, self._choice.contestants, self._choice.precisions, self._choice.reference, "")
            if name == "cnn" and set(self._choice.contestants) >= {"hand", "mptrain", "keras", "tf_keras"}:
                self._work(work, SCALERS, ("float32",), "unscaled", ": loss scaling alone")
        self._write("", profiled=not self._choice.tiny)

    def _work(self, work: works.Work, names: tuple[str, ...], precisions: tuple[str, ...], reference: str, title: str) -> None:
        """Measures one work in several precisions; its contestants live as long as that takes."""
        with contextlib.ExitStack() as stack:
            contestants = {name: stack.enter_context(frame.Contestant(name)) for name in names}
            for precision in precisions:
                if time.monotonic() > self._start + 60 * self._choice.minutes:
                    self._tables += [f"### {work.name}, {precision}{title}", "", "not run: the time was over", ""]
                    continue
                present = {
                    name: each for name, each in contestants.items() if precision in (ALL[name].precisions or [precision])
                }
                self._case(work, precision, present, reference, title)
                self._write(f" **It ended after {work.name}, {precision}{title}.**")

    def _case(self, work: works.Work, precision: str, contestants: dict, reference: str, title: str) -> None:
        slow = {} if self._here.gpus else SLOW_ON_CPUS
        slow = {name: SLOW_TURNS for name in slow.get((work.name, precision), ()) if name in contestants}
        steps = work.quick_steps if self._choice.quick else work.steps
        rounds = self._choice.rounds * (SCALING_FACTOR if set(contestants) == set(SCALERS) else 1)
        turns = (steps,) * (frame.WARM_UP + rounds)
        few = turns[: frame.WARM_UP + SLOWER_ROUNDS]
        slow |= {name: few for name in SLOWER.get(work.name, ()) if name in contestants}
        if SLOW_TURNS in slow.values():  # the others end a turn where the slow ones do, so that losses can be compared
            turns = (len(SLOW_TURNS), *turns[1:])
        file = os.path.join(self._folder, f"{work.name}-{precision}.npy")
        np.save(file, works.numbers(work, sum(turns)))
        found = frame.compete(frame.Case(work, precision, turns, file), contestants, slow)
        table = report.case_table(f"{work.name}, {precision}{title}", found, reference, precision)
        print("\n".join(table), flush=True)
        self._tables += table
        self._results |= {(work.name, precision, name): each for name, each in found.items() if not isinstance(each, str)}
        self.differing += [f"{work.name} {precision}: {name}" for name in report.differing(found, reference, precision)]

    def _write(self, so_far: str, profiled: bool = False) -> None:
        """Writes the sections of the comparison, and the raw turns beside them."""
        if not self._document:
            return
        minutes = (time.monotonic() - self._start) / 60
        first = [self._about, f"It took {minutes:.0f} minutes.{so_far}", ""]
        note = report.notes(self._here)
        self._document.put(TARGETS, [*first, *report.target_table(self._results, self._here)])
        self._document.put(
            RATIOS,
            [
                f"Medians of the ratios of step times; below 1 is faster. {note}",
                "",
                *report.ratio_table(self._results, self._here),
            ],
        )
        times = f"Medians over turns, and ratios of neighbouring turns; see `frame.py`. {note}"
        self._document.put(TIMES, [times, "", *self._tables])
        self._document.put(WHY, self._profiles() if profiled else [])
        turns = {"/".join(key): [dataclasses.asdict(turn) for turn in value] for key, value in self._results.items()}
        self._document.path.with_suffix(".json").write_text(json.dumps(turns))

    def _profiles(self) -> list[str]:
        """Returns a profile of both sides of each target that is missed."""
        lines = []
        for target in targets.missed(self._results, self._here):
            precisions = f"{target.precision}" + (f" against {target.their_precision}" if target.their_precision else "")
            lines += [f"### {target.what}: {target.work}, {precisions}", ""]
            command = [sys.executable, "-m", "benchmarks.operations", target.work, target.precision, target.ours, target.theirs]
            command += [f"--their-precision={target.their_precision}"] if target.their_precision else []
            finished = subprocess.run(command, cwd=frame.ROOT, capture_output=True, text=True)
            lines += [finished.stdout.strip() or f"no profile: {(finished.stderr.splitlines() or ['it said nothing'])[-1]}", ""]
        return lines
