"""Times whole commands, and measures their memory: the main job against the same job written by hand.

    python -m benchmarks.start [--rounds=5]

Both commands train one epoch of MNIST in float32 and evaluate it, by turns, each in a process of its own. Peak memory is the
largest resident set of the process, as the kernel counts it.
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
    start = time.time()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} ended with an error: {process.stderr.read()}")
    whole = time.time() - start
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = next(row["time"] for row in rows if row.get("split") == "train") - start
    accuracy = [row["accuracy"] for row in rows if row.get("split") == "eval"][-1]
    return {"first step": first, "whole run": whole, "MiB": usage.ru_maxrss / 1024, "accuracy": accuracy}


def compare(rounds: int) -> None:
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
    print(f"| ratio (quartiles) | {' | '.join(_ratio(found, key) for key in ('first step', 'whole run', 'MiB'))} | |")


def _ratio(found: dict[str, list[dict[str, float]]], key: str) -> str:
    ratios = [ours[key] / theirs[key] for ours, theirs in zip(found["mptrain"], found["by hand"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command")
    options = parser.parse_args()
    from mptrain.devices import hardware

    print(f"{hardware()}; Python {platform.python_version()}\n", flush=True)
    compare(options.rounds)


if __name__ == "__main__":
    main()
