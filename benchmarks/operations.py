"""Where the time of a step goes: the operations of mptrain's step beside those of the loop by hand.

    python -m benchmarks.operations WORK PRECISION [--steps=50]

Times are those of TensorFlow's own profiler, added up over all threads: what is inside one operation, not what the machine
spends between two. XLA's loop by hand is a single operation.
"""

import argparse
import collections
import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks import frame, works

TOP = 12


class _OneTurn:
    """A gate that lets a contestant through at once: a warm-up, and then a turn that is profiled into a folder."""

    def __init__(self, steps: int, folder: str):
        self._steps = steps
        self._folder = folder

    def __iter__(self):
        yield from (2, 2)  # traces, and finds out how many steps take a second
        yield self._steps
        everything = tf.profiler.experimental.ProfilerOptions(host_tracer_level=3)  # also the cheapest operations
        with tf.profiler.experimental.Profile(self._folder, everything):
            yield self._steps

    def done(self, loss: float) -> None:
        pass


def profile(name: str, work: works.Work, precision: str, steps: int) -> dict[str, tuple[float, float]]:
    """Returns type of operation -> (milliseconds, calls) of a step of a contestant in this process."""
    import importlib

    from benchmarks.contestants import ALL

    about = ALL[name]
    with tempfile.TemporaryDirectory() as folder:
        numbers = os.path.join(folder, "numbers.npy")
        np.save(numbers, works.numbers(work, 2 * steps + 4))
        case = frame.Case(work, precision, (steps,), numbers)
        module = importlib.import_module(f"benchmarks.contestants.{about.module}")
        module.run(case, _OneTurn(steps, folder), *about.options)
        return _operations(pathlib.Path(folder), steps)


def _operations(folder: pathlib.Path, steps: int) -> dict[str, tuple[float, float]]:
    """Adds up what the profiler wrote: an operation's event is called name:type."""
    totals = collections.defaultdict(lambda: [0.0, 0])
    for file in folder.rglob("*.xplane.pb"):
        for plane in xplane_pb2.XSpace.FromString(file.read_bytes()).planes:
            if not plane.name.startswith(("/host:CPU", "/device:")):
                continue
            for line in plane.lines:
                for event in line.events:
                    name, colon, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                    if colon and name and (hasattr(tf.raw_ops, kind) or kind.startswith("_")):
                        totals[kind][0] += event.duration_ps / 1e9 / steps
                        totals[kind][1] += 1 / steps
    return {kind: tuple(total) for kind, total in totals.items()}


def table(work: works.Work, precision: str, steps: int) -> list[str]:
    """Returns the Markdown table of the operations that take most."""
    ours, by_hand = (profile(name, work, precision, steps) for name in ("mptrain", "hand"))
    sums = [sum(milliseconds for milliseconds, _ in each.values()) for each in (ours, by_hand)]
    lines = [
        f"{work.name}, {precision}: operations of a step, mptrain {sums[0]:.2f} ms, by hand {sums[1]:.2f} ms",
        "",
        "| operation | mptrain, ms | share | calls | by hand, ms | share | calls |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = sorted({*ours, *by_hand}, key=lambda kind: -max(ours.get(kind, (0, 0))[0], by_hand.get(kind, (0, 0))[0]))
    for kind in kinds[:TOP]:
        cells = []
        for each, total in zip((ours, by_hand), sums, strict=True):
            milliseconds, calls = each.get(kind, (0.0, 0.0))
            cells += [f"{milliseconds:.3f}", f"{milliseconds / max(total, 1e-9):.0%}", f"{calls:.0f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=works.WORKS)
    parser.add_argument("precision", choices=works.PRECISIONS)
    parser.add_argument("--steps", type=int, default=0, help="default: a turn's")
    options = parser.parse_args()
    work = works.WORKS[options.work]
    print("\n".join(table(work, options.precision, options.steps or work.quick_steps)))


if __name__ == "__main__":
    main()
