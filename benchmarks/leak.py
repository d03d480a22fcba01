"""Watches the resident memory of a run of many steps, with all that a run does: rows, evaluations, checkpoints.

    python -m benchmarks.leak [STEPS]

The model is of Keras and the precision mixed_float16, so losses are scaled, steps guarded and, on a CPU, graphs rewritten.

Prints memory as the steps go by, and ends with status 1 if the second half of them needed more than one MiB more.
"""

# ruff: noqa: E402
import contextlib
import io
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import mptrain
from benchmarks.growth import GrowingTrainer

MAY_GROW = 1.0  # MiB
samples = []  # (step, MiB)


class WatchedTrainer(GrowingTrainer):
    """Notes the memory after each loop."""

    def build_model(self):
        layers = [keras.layers.Dense(32, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(16, dtype="float32")]
        return keras.Sequential([keras.Input((16,)), *layers])

    def build_actions(self):
        return [lambda step, outputs: samples.append((step, resident()))]


def resident() -> float:
    """Returns this process's resident memory in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(steps: int) -> None:
    from benchmarks import leak  # the module whose `samples` the run fills; this one may be called __main__

    config = mptrain.default_config()
    config.trainer = "benchmarks.leak.WatchedTrainer"
    config.precision.policy, config.loss_scale.growth_interval = "mixed_float16", 200  # so some steps are skipped all along
    config.data.batch_size = 32
    config.train.steps, config.train.steps_per_loop = steps, max(steps // 500, 1)
    config.eval.every_steps = config.checkpoint.every_steps = max(steps // 20, 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        mptrain.run(config, folder)
    found = leak.samples
    print("| step | resident memory, MiB |\n|---|---|")
    for step, mebibytes in found[:: max(len(found) // 10, 1)]:
        print(f"| {step:,} | {mebibytes:.1f} |")
    growth = found[-1][1] - found[len(found) // 2][1]
    print(f"\nthe second half of {steps:,} steps took {growth:.2f} MiB more")
    if growth > MAY_GROW:
        sys.exit(1)


if __name__ == "__main__":
    main(int((sys.argv[1:] or [100_000])[0]))
