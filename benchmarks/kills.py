"""Kills a run 50 times with SIGKILL, on one replica and on two, and compares its end with that of a run never killed.

    python -m benchmarks.kills [KILLS]

Dropout, BatchNorm, averaged weights, Adam, float16 with loss scaling and shuffling are all on. Prints a line for each kill;
the exit status is 1 if a bit differs. Takes about twenty minutes.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import keras

import mptrain
from experiments.mnist import MnistTrainer

ROOT = pathlib.Path(__file__).parent.parent


class NormalizedMnistTrainer(MnistTrainer):
    """A smaller network, with BatchNorm."""

    def build_model(self) -> keras.Model:
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(8, 5, strides=2, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Conv2D(16, 5, strides=2, activation="relu"),
                layers.Flatten(),
                layers.Dropout(0.3),
                layers.Dense(10, dtype="float32"),
            ]
        )


def get_config():
    config = mptrain.default_config()
    config.trainer = "benchmarks.kills.NormalizedMnistTrainer"
    config.model.shift = 1
    config.precision.policy = "mixed_float16"
    config.loss_scale.initial_scale = 2.0**24  # overflows at the start, so that some steps are skipped
    config.loss_scale.growth_interval = 50
    config.optimizer.ema_momentum = 0.99
    config.data.batch_size = 64
    config.train.steps = 1
    config.train.steps_per_loop = 20
    return config


def main() -> None:
    for replicas in (1, 2):
        print(f"{replicas} replica{'s' if replicas > 1 else ''}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "mptrain.main", f"--config={__file__}", f"--workdir={folder}/run"]
            command += ["--mode=verify_resume", f"--config.verify_resume.kills={(sys.argv[1:] or [50])[0]}"]
            command += ["--config.verify_resume.steps=300", f"--config.devices.virtual_cpus={replicas}"]
            subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    main()
