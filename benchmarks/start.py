"""Times whole commands, and measures their memory: the main job against the same job written by hand.

    python -m benchmarks.start [--rounds=5]

Both commands train one epoch of MNIST in float32 and evaluate it, by turns, each in a process of its own. Peak memory is the
largest resident set of the process, as the kernel counts it. Ends with status 1 if mptrain takes more of it than it may.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = pathlib.Path(__file__).parent.parent
MEMORY_AT_MOST = 1.1  # times that of the loop by hand
COMMANDS = {
    "by hand": ["-m", "benchmarks.by_hand"],
    "mptrain": [
        *("-m", "mptrain.main", "--config=configs/mnist.py", "--config.precision.policy=float32"),
        *("--config.train.epochs=1", "--config.train.steps_per_loop=auto"),
    ],
}


def measure(name: str, workdir: pathlib.Path) -> dict[str, float]:
    """Runs one command; returns seconds to the first step and to the end, and peak memory in MiB."""
    command = [sys.executable, *COMMANDS[name], f"--workdir={workdir}" if name == "mptrain" else str(workdir)]
    with tempfile.TemporaryFile("w+") as errors:
        start = time.time()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.time() - start
        if status:
            errors.seek(0)
            sys.exit(f"{name} ended with an error: {errors.read()}")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = next(row["time"] for row in rows if row.get("split") == "train") - start
    accuracy = [row["accuracy"] for row in rows if row.get("split") == "eval"][-1]
    return {"first step": first, "whole run": whole, "MiB": usage.ru_maxrss / 1024, "accuracy": accuracy}


def compare(rounds: int) -> bool:
    """Prints the table of so many runs of each; returns whether memory is within its bound."""
    found = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in list(COMMANDS)[:: 1 if number % 2 else -1]:
                found[name].append(measure(name, pathlib.Path(folder) / f"{name} {number}"))
    print("| | first step after | one epoch and its evaluation | peak memory | test accuracy |\n|---|---|---|---|---|")
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        seconds = f"{middle['first step']:.1f} s | {middle['whole run']:.1f} s"
        print(f"| {name} | {seconds} | {middle['MiB']:,.0f} MiB | {middle['accuracy']:.2%} |")
    ratios = {key: _ratio(found, key) for key in ("first step", "whole run", "MiB")}
    cells = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in ratios.values()]
    print(f"| ratio (quartiles) | {' | '.join(cells)} | |")
    met = ratios["MiB"][1] <= MEMORY_AT_MOST
    print(f"\nTarget: peak memory at most {MEMORY_AT_MOST} times that by hand: {'met' if met else '**missed**'}.")
    return met


def _ratio(found: dict[str, list[dict[str, float]]], key: str) -> list[float]:
    """Returns the quartiles of the ratios of neighbouring runs."""
    ratios = [ours[key] / theirs[key] for ours, theirs in zip(found["mptrain"], found["by hand"], strict=True)]
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command")
    options = parser.parse_args()
    met = compare(options.rounds)
    # Only now: with TensorFlow in this process, its children's memory would be counted from that of this one on.
    from mptrain.hardware import hardware

    print(f"\n{hardware()}; Python {platform.python_version()}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
