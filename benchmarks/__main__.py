"""Runs all comparisons and writes benchmarks/RESULTS.md (and RESULTS.json beside it, with every turn).

    python -m benchmarks [--quick] [--parts peers start growth leak fidelity] [--out=FILE]
    python -m benchmarks --works mlp cnn --precisions float32 --contestants hand mptrain

Measures mptrain beside its peers, then start and memory, growth, a long run and the fidelity of float16, each of which is
also a command of its own (see `document.py`). Takes about an hour on two idle cores, with --quick six minutes (float32 and
mixed_float16, two works, no Orbit and no PyTorch). Runs unattended: what fails or is not installed says so in its row, and
after the time that --minutes gives, no further case is begun. Choosing works, precisions or contestants compares those alone
and only prints; with --out the file is written, and keeps the other cases that RESULTS.json holds of this machine. The exit
status is 1 where two contestants did not compute the same, or where the one that all are compared with failed.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import document, machine, works
from benchmarks.comparison import ALL_OF_THEM, QUICK, QUICK_ROUNDS, ROUNDS, Choice, Comparison
from benchmarks.contestants import PEERS

RESULTS = pathlib.Path(__file__).parent / "RESULTS.md"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer works, contestants and rounds")
    parser.add_argument("--works", nargs="+", choices=works.WORKS)
    parser.add_argument("--precisions", nargs="+", choices=works.PRECISIONS)
    parser.add_argument("--contestants", nargs="+", choices=PEERS)
    parser.add_argument("--minutes", type=float, default=40.0, help="after which no further case is begun")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/RESULTS.md where nothing was chosen")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the smallest sizes, for tests
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=document.PARTS,
        help="what to measure anew, others are kept; default: all, or peers if chosen",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    load = f"{os.getloadavg()[0]:.1f}" if options.tiny else machine.load()
    kinds = ("works", "precisions", "contestants")
    chosen = any(getattr(options, kind) for kind in kinds)
    parts = options.parts or (("peers",) if chosen else document.PARTS)
    out = options.out or (None if chosen else RESULTS)
    file = document.Document(out) if out else None
    comparison = None
    if "peers" in parts:
        default = QUICK if options.quick else ALL_OF_THEM
        choice = Choice(
            **{kind: tuple(getattr(options, kind) or default[kind]) for kind in kinds},
            rounds=QUICK_ROUNDS if options.quick else ROUNDS,
            quick=options.quick,
            tiny=options.tiny,
            minutes=options.minutes,
        )
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(choice, folder, file, document.measured(["benchmarks", *sys.argv[1:]], load))
            comparison.run()
    for part, (heading, command, _) in document.COMMANDS.items():
        if part in parts:
            print(f"{heading}: {' '.join(command)}", flush=True)
            lines = document.run(part, options.quick, load)
            if file:
                file.put(heading, lines)
            else:
                print("\n".join(lines), flush=True)
    if comparison and comparison.differing:
        sys.exit(f"not the same losses: {'; '.join(comparison.differing)}")


if __name__ == "__main__":
    main()
