"""Times whole commands, and measures their memory: the main job against the same job written by hand.

    python -m benchmarks.start [--rounds=5]          from the command to the first step, and to the end of one epoch
    python -m benchmarks.start --leak [--steps=100000]    resident memory while a small network trains

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

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = {
    "by hand": ["-m", "benchmarks.by_hand"],
    "mptrain": [
        *("-m", "mptrain.main", "--config=configs/mnist.py", "--config.precision.policy=float32"),
        *("--config.train.epochs=1", "--config.train.steps_per_loop=auto"),
    ],
}
LEAK_FREE = 1.0  # MiB that resident memory may differ by between the middle and the end of a run


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


def leak(steps: int) -> None:
    """Trains a small network with all that a run does, evaluations and checkpoints too, and prints its memory."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import mptrain
    from mptrain import runner
    from mptrain.training_run import TrainingRun

    samples = []

    class Watched(TrainingRun):
        def _steps_to_next_boundary(self, step: int) -> int:
            samples.append((int(step), resident()))
            return super()._steps_to_next_boundary(step)

    config = mptrain.default_config()
    config.trainer = "benchmarks.growth.GrowingTrainer"
    config.model.update(variables=0, width=32)
    config.precision.policy = "float32"
    config.data.batch_size = 32
    config.train.steps, config.train.steps_per_loop = steps, max(steps // 1000, 1)
    config.eval.every_steps = config.checkpoint.every_steps = max(steps // 20, 1)
    with tempfile.TemporaryDirectory() as folder:
        runner.TrainingRun = Watched
        mptrain.run(config, folder)
    print("| step | resident memory, MiB |\n|---|---|")
    for step, mebibytes in samples[:: max(len(samples) // 10, 1)] + samples[-1:]:
        print(f"| {step:,} | {mebibytes:.1f} |")
    growth = samples[-1][1] - samples[len(samples) // 2][1]
    print(f"\ngrew by {growth:.2f} MiB in the second half of {steps:,} steps")
    if growth > LEAK_FREE:
        sys.exit(1)


def resident() -> float:
    """Returns this process's resident memory in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command")
    parser.add_argument("--leak", action="store_true", help="watch memory over many steps instead")
    parser.add_argument("--steps", type=int, default=100_000, help="of --leak")
    options = parser.parse_args()
    if options.leak:
        leak(options.steps)
        return
    from mptrain.devices import hardware

    print(f"{hardware()}; Python {platform.python_version()}\n", flush=True)
    compare(options.rounds)


if __name__ == "__main__":
    main()
