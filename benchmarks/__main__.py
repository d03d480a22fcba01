"""Runs all comparisons and writes benchmarks/RESULTS.md (and RESULTS.json beside it, with every turn).

    python -m benchmarks [--quick] [--works mlp cnn] [--precisions float32] [--contestants hand mptrain] [--out=FILE]
    python -m benchmarks --parts start growth

Measures mptrain beside its peers, then start and memory, growth, a long run and the fidelity of float16, each of which is
also a command of its own (see `document.py`). Takes about 40 minutes on two idle cores, with --quick about six (float32 and
mixed_float16, two works, no Orbit and no PyTorch). Runs unattended: what fails or is not installed says so in its row, and
after the time that --minutes gives, no further case is begun. The exit status is 1 where two contestants did not compute the
same.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks import frame, machine, report, targets, works
from benchmarks.contestants import PEERS, SCALERS
from benchmarks.document import COMMANDS, PARTS, RATIOS, TARGETS, TIMES, WHY, Document, measured
from benchmarks.document import run as run_part

HERE = pathlib.Path(__file__).parent
ROUNDS = 10  # after the warm-up
QUICK_ROUNDS = 5
SCALING_FACTOR = 3  # more rounds for loss scaling alone, whose differences are a hundredth of a step
LIGHTNING_NOTE = "On a CPU Lightning takes bfloat16 where it is asked for float16, so its rows there are not float16's."
TIMES_NOTE = f"Medians over turns, and ratios of neighbouring turns; see `frame.py`. {LIGHTNING_NOTE}"
QUICK = {
    "works": ["mlp", "cnn"],
    "precisions": ["float32", "mixed_float16"],
    "contestants": ["hand", "mptrain", "keras", "tf_keras"],
}
# Float16 kernels of a CPU, without rewritten graphs: from one to sixty seconds a step. Two turns of a step say enough, and
# where even one takes minutes the contestant does not start.
SLOW_TURNS = (1,) * (frame.WARM_UP + 2)
SLOW = {("cnn", "mixed_float16"): ("keras", "keras_tuned", "tf_keras", "orbit")}
TOO_SLOW = {(work, "mixed_float16"): SLOW["cnn", "mixed_float16"] for work in ("resnet", "transformer")}


class Run:
    """What is measured, as it comes in."""

    def __init__(self, options: argparse.Namespace, folder: str):
        self.options = options
        self.folder = folder
        self.end = time.monotonic() + 60 * options.minutes
        self.rounds = QUICK_ROUNDS if options.quick else ROUNDS
        self.results: dict[tuple[str, str, str], list[frame.Turn]] = {}
        self.tables: list[str] = []
        self.differing: list[str] = []

    def work(self, work: works.Work, names: tuple[str, ...], precisions: list[str], reference: str, title: str) -> None:
        """Measures one work in several precisions; its contestants live as long as that takes."""
        with contextlib.ExitStack() as stack:
            contestants = {name: stack.enter_context(frame.Contestant(name)) for name in names}
            for precision in precisions:
                if time.monotonic() > self.end:
                    self.tables += [f"### {work.name}, {precision}{title}", "", "not run: the time was over", ""]
                    continue
                self._case(work, precision, contestants, reference, title)

    def _case(self, work: works.Work, precision: str, contestants: dict, reference: str, title: str) -> None:
        key = (work.name, precision)
        skipped = {name: "not run: minutes a step" for name in TOO_SLOW.get(key, ()) if name in contestants}
        present = {name: contestant for name, contestant in contestants.items() if name not in skipped}
        slow = {name: SLOW_TURNS for name in SLOW.get(key, ()) if name in present}
        steps = work.quick_steps if self.options.quick else work.steps
        rounds = self.rounds * (SCALING_FACTOR if set(contestants) == set(SCALERS) else 1)
        turns = (steps,) * (frame.WARM_UP + rounds)
        if slow:  # the others end a turn where the slow ones do, so that losses can be compared
            turns = (len(SLOW_TURNS), *turns[1:])
        file = os.path.join(self.folder, f"{work.name}-{precision}.npy")
        np.save(file, works.numbers(work, sum(turns)))
        found = frame.compete(frame.Case(work, precision, turns, file), present, slow) | skipped
        found = {name: found[name] for name in contestants}
        table = report.case_table(f"{work.name}, {precision}{title}", found, reference, precision)
        print("\n".join(table), flush=True)
        self.tables += table
        self.results |= {(*key, name): list(each) for name, each in found.items() if not isinstance(each, str)}
        self.differing += [f"{work.name} {precision}: {name}" for name in report.differing(found, reference, precision)]


def profiles(run: Run) -> list[str]:
    """Returns the profile of mptrain's step, beside the loop by hand, for each work and precision with a missed target."""
    lines = []
    if run.options.tiny:
        return lines
    for work, precision in dict.fromkeys((target.work, target.precision) for target in targets.missed(run.results)):
        command = [sys.executable, "-m", "benchmarks.operations", work, precision]
        finished = subprocess.run(command, cwd=frame.ROOT, capture_output=True, text=True)
        lines += [finished.stdout.strip() or f"{work}, {precision}: no profile: {finished.stderr.splitlines()[-1:]}", ""]
    return lines


def write(run: Run, document: Document, load: str, minutes: float) -> None:
    """Writes the sections of the comparison, and the raw turns beside them."""
    document.put(
        TARGETS,
        [
            measured(["benchmarks", *sys.argv[1:]], load),
            f"It took {minutes:.0f} minutes.",
            "",
            *report.target_table(run.results),
        ],
    )
    document.put(RATIOS, [f"Medians of step times; below 1 is faster. {LIGHTNING_NOTE}", "", *report.ratio_table(run.results)])
    document.put(WHY, profiles(run))
    document.put(TIMES, [TIMES_NOTE, "", *run.tables])
    turns = {"/".join(key): [dataclasses.asdict(turn) for turn in value] for key, value in run.results.items()}
    run.options.out.with_suffix(".json").write_text(json.dumps(turns))


def compare(options: argparse.Namespace, document: Document, load: str) -> list[str]:
    """Measures mptrain beside its peers; returns who did not compute the same."""
    chosen = (
        QUICK if options.quick else {"works": list(works.WORKS), "precisions": list(works.PRECISIONS), "contestants": PEERS}
    )
    names = tuple(options.contestants or chosen["contestants"])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, folder)
        for name in options.works or chosen["works"]:
            work = works.WORKS[name].tiny() if options.tiny else works.WORKS[name]
            reference = "hand" if "hand" in names else names[0]
            run.work(work, names, options.precisions or chosen["precisions"], reference, "")
            if name == "cnn" and not options.contestants:
                run.work(work, SCALERS, ["float32"], "unscaled", ": loss scaling alone")
        write(run, document, load, (time.monotonic() - start) / 60)
    return run.differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer works, contestants and rounds")
    parser.add_argument("--works", nargs="+", choices=works.WORKS)
    parser.add_argument("--precisions", nargs="+", choices=works.PRECISIONS)
    parser.add_argument("--contestants", nargs="+", choices=PEERS)
    parser.add_argument("--minutes", type=float, default=35.0, help="after which no further case is begun")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "RESULTS.md")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the smallest sizes, for tests
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure anew; all others are kept")
    options = parser.parse_args()
    document, load = Document(options.out), machine.load()
    differing = compare(options, document, load) if "peers" in options.parts else []
    for part, (heading, _, _) in COMMANDS.items():
        if part in options.parts:
            print(f"{heading}: {' '.join(COMMANDS[part][1])}", flush=True)
            document.put(heading, run_part(part, options.quick, load))
    if differing:
        sys.exit(f"not the same losses: {'; '.join(differing)}")


if __name__ == "__main__":
    main()
