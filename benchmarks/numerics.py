"""Times the steps of --mode=numerics beside plain ones, by turns in one run, on the MNIST config in three precisions.

    python -m benchmarks.numerics [ROUNDS]

A turn is 16 steps. Looked at, every one is counted and trains, and one in eight is computed in float32 too, as in that mode.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from configs.mnist import get_config
from mptrain import config as config_lib
from mptrain import runner
from mptrain.numerics.collection import Collector

STEPS = 16


def main() -> None:
    rounds = int((sys.argv[1:] or [9])[0])
    print("| precision | plain, ms a step | looked at, ms a step | ratio, median | quartiles |\n|---|---|---|---|---|")
    for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
        config = get_config()
        config.precision.policy = precision
        trainer = runner.build_trainer(config)
        collector = Collector(trainer, config_lib.default_config().numerics.reference_every)
        times = {"plain": [], "looked at": []}
        for _ in range(rounds + 1):
            times["plain"].append(_timed(trainer.train, tf.constant(STEPS)))
            times["looked at"].append(_timed(collector.train, STEPS))
        plain, looked_at = (each[1:] for each in times.values())  # the first turn traces
        ratios = [b / a for a, b in zip(plain, looked_at, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells = (statistics.median(plain), statistics.median(looked_at), middle)
        print(f"| {precision} | {cells[0]:.1f} | {cells[1]:.1f} | {cells[2]:.2f} | {low:.2f}, {high:.2f} |", flush=True)


def _timed(train, steps) -> float:
    start = time.perf_counter()
    train(steps)
    return (time.perf_counter() - start) / STEPS * 1e3


if __name__ == "__main__":
    main()
