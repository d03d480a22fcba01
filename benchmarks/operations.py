"""Where the time of a step goes: the operations of one contestant's step beside those of another.

    python -m benchmarks.operations WORK PRECISION [OURS THEIRS] [--their-precision=PRECISION] [--steps=50]

OURS and THEIRS are contestants, by default mptrain and the loop by hand. Times are those of TensorFlow's own profiler, added up
over all threads: what is inside one operation, not what the machine spends between two, and more than the clock where threads
work side by side. Operations of a few microseconds are not in it: TensorFlow 2.20 refuses every option that would ask for
them. Of three profiles the one that was least disturbed counts. What XLA compiled is not opened, and neither is
PyTorch.
"""

import argparse
import collections
import dataclasses
import importlib
import os
import pathlib
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks import frame, works
from benchmarks.contestants import ALL

TOP = 12
PROFILES = 3
MANY = 20  # steps; of some hundred small ones the profiler loses operations
WARM_UP = 2  # turns: functions are traced, and mptrain finds out how many steps take a second
COMPILED = ("ThunkExecutor", "GpuExecutable", "XlaModule")  # events that only what XLA compiled has


@dataclasses.dataclass(frozen=True)
class Profile:
    """A contestant's step.

    Attributes:
        clock: milliseconds, without a profiler.
        operations: type of operation -> (milliseconds, calls).
        compiled: whether XLA compiled it, or a part of it.
    """

    clock: float
    operations: dict[str, tuple[float, float]]
    compiled: bool = False

    @property
    def total(self) -> float:
        return sum(milliseconds for milliseconds, _ in self.operations.values())

    @property
    def opened(self) -> bool:
        """Whether TensorFlow's operations are all of the step."""
        return bool(self.operations) and not self.compiled

    def __str__(self) -> str:
        if not self.operations:
            return "not TensorFlow's, not opened"
        clock = f"{self.clock:.2f} ms by the clock"
        return f"{clock}, {self.total:.2f} ms in operations" if self.opened else f"{clock}, compiled by XLA, not opened"


class _Gate:
    """Lets a contestant through at once: warm-up, a long turn for the clock, and turns that are profiled into folders."""

    def __init__(self, steps: int, timed: int, folders: list[pathlib.Path]):
        self.ahead = [*[steps] * WARM_UP, timed, *[steps] * len(folders)]
        self.clock = 0.0
        self._timed = timed
        self._folders = folders

    def __iter__(self):
        while self.ahead:
            yield self.enter()

    def enter(self) -> int:
        number = WARM_UP + 1 + len(self._folders) - len(self.ahead)
        steps = self.ahead.pop(0)
        self._profiled = number > WARM_UP
        if self._profiled:
            tf.profiler.experimental.start(str(self._folders[number - WARM_UP - 1]))
        self._start = time.perf_counter()
        return steps

    def done(self, loss: float) -> None:
        self.clock = self.clock if self._profiled else 1e3 * (time.perf_counter() - self._start) / self._timed
        if self._profiled:
            tf.profiler.experimental.stop()


def profile(name: str, work: works.Work, precision: str, steps: int) -> Profile:
    """Returns the profile of a contestant's step, trained in this process."""
    about = ALL[name]
    if about.torch:
        return Profile(0.0, {})
    with tempfile.TemporaryDirectory() as folder:
        folders = [pathlib.Path(folder, str(number)) for number in range(PROFILES)]
        gate = _Gate(steps, max(steps, work.quick_steps), folders)
        numbers = os.path.join(folder, "numbers.npy")
        np.save(numbers, works.numbers(work, sum(gate.ahead)))
        case = frame.Case(work, precision, tuple(gate.ahead), numbers)
        importlib.import_module(f"benchmarks.contestants.{about.module}").run(case, gate, *about.options)
        return min((Profile(gate.clock, *_operations(each, steps)) for each in folders), key=lambda found: found.total)


def _operations(folder: pathlib.Path, steps: int) -> tuple[dict[str, tuple[float, float]], bool]:
    """Adds up what the profiler wrote: an operation's event is called name:type. Returns also whether XLA compiled any."""
    totals, compiled = collections.defaultdict(lambda: [0.0, 0]), False
    for file in folder.rglob("*.xplane.pb"):
        for plane in xplane_pb2.XSpace.FromString(file.read_bytes()).planes:
            if not plane.name.startswith(("/host:CPU", "/device:")):
                continue
            for line in plane.lines:
                for event in line.events:
                    name, colon, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                    compiled |= kind.startswith(COMPILED) or name.startswith(COMPILED)
                    if colon and name and (hasattr(tf.raw_ops, kind) or kind.startswith("_")):
                        totals[kind][0] += event.duration_ps / 1e9 / steps
                        totals[kind][1] += 1 / steps
    return {kind: tuple(total) for kind, total in totals.items()}, compiled


def table(profiles: dict[str, Profile]) -> list[str]:
    """Returns what a step of each takes, and the Markdown table of the operations that take most.

    Args:
        profiles: label -> profile, of two.
    """
    lines = [f"- a step of {label}: {each}" for label, each in profiles.items()]
    opened = {label: each for label, each in profiles.items() if each.opened}
    lines += ["", f"| operation | {' | '.join(f'{label}, ms | share | calls' for label in opened)} |"]
    lines.append(f"|---|{'---|' * 3 * len(opened)}")
    shown = [each.operations for each in opened.values()]
    kinds = sorted({kind for each in shown for kind in each}, key=lambda kind: -max(each.get(kind, (0,))[0] for each in shown))
    for kind in kinds[:TOP]:
        cells = []
        for each in opened.values():
            milliseconds, calls = each.operations.get(kind, (0.0, 0.0))
            cells += [f"{milliseconds:.3f}", f"{milliseconds / max(each.total, 1e-9):.0%}", f"{calls:.0f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=works.WORKS)
    parser.add_argument("precision", choices=works.PRECISIONS)
    parser.add_argument("ours", nargs="?", choices=ALL, default="mptrain")
    parser.add_argument("theirs", nargs="?", choices=ALL, default="hand")
    parser.add_argument("--their-precision", choices=works.PRECISIONS, help="default: the same")
    parser.add_argument("--steps", type=int, default=0, help="in a profile; default: those of a quick turn, 20 at most")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = works.WORKS[options.work].tiny() if options.tiny else works.WORKS[options.work]
    steps = options.steps or min(work.quick_steps, MANY)
    theirs = options.their_precision or options.precision
    sides = [(options.ours, options.precision), (options.theirs, theirs)]
    labels = [ALL[name].label + (f", {precision}" if theirs != options.precision else "") for name, precision in sides]
    profiles = [profile(name, work, precision, steps) for name, precision in sides]
    print("\n".join(table(dict(zip(labels, profiles, strict=True)))))


if __name__ == "__main__":
    main()
