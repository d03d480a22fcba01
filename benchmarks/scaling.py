"""Times a training step under tf.distribute: mptrain against a loop written by hand and against Keras fit.

    python -m benchmarks.scaling [--steps=20] [--rounds=20] [--precision=float32] [--settings "2 replicas" "2 workers"]

Replicas are logical CPUs of one process under MirroredStrategy, workers are processes on loopback under
MultiWorkerMirroredStrategy; the global batch has 128 examples in every setting. The three take turns in one process, under
one strategy, from the same weights, on the same batches, with the same Adam, a turn being one loop of `steps` in the graph.
A ratio is that of two turns of one round: its median, and the quartiles in brackets. Beside it stands that of the first
process's processor time, which other programs on the machine disturb less. The network is that of MNIST without dropout and
augmentation, so that all three compute the same; that they did is checked by their losses. Takes about five minutes on two
idle cores.

Keras 3's fit fails on two workers (https://github.com/keras-team/keras/issues/20585), so there it is tf_keras's.
"""

# ruff: noqa: E402
import argparse
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import mptrain
from experiments.mnist import MnistTrainer
from mptrain.data import order
from mptrain.devices import hardware

BATCH_SIZE = 128  # global
LEARNING_RATE = 1e-3
WARM_UP = 2  # rounds that do not count: functions are traced, and mptrain finds out how many steps take a second
SETTINGS = {  # name -> (processes, config.devices of each)
    "1 replica": (1, {"strategy": "mirrored", "virtual_cpus": 1}),
    "2 replicas": (1, {"strategy": "mirrored", "virtual_cpus": 2}),
    "4 replicas": (1, {"strategy": "mirrored", "virtual_cpus": 4}),
    "1 worker": (1, {"strategy": "multi_worker"}),
    "2 workers": (2, {"strategy": "multi_worker"}),
}


class PlainTrainer(MnistTrainer):
    """Without augmentation."""

    augment = mptrain.Trainer.augment


def build_trainer(devices: dict, precision: str) -> PlainTrainer:
    config = mptrain.default_config()
    config.trainer = "benchmarks.scaling.PlainTrainer"
    config.model.dropout = 0.0
    config.precision.policy = precision
    config.optimizer.learning_rate = LEARNING_RATE
    config.data.batch_size = BATCH_SIZE
    config.devices.update(devices)
    config.train.steps = 1  # of which nothing depends here
    return PlainTrainer(config)


def build_copy(trainer: PlainTrainer, library=keras):
    """Returns the trainer's model anew, with the same weights, made of the layers of Keras 3 or of tf_keras."""
    with trainer.strategy.scope(), trainer.precision.scope():
        model = trainer.build_model() if library is keras else _tf_keras_model()
        model.set_weights(trainer.model.get_weights())
    return model


def _tf_keras_model() -> tf_keras.Model:
    layers = tf_keras.layers
    return tf_keras.Sequential(
        [
            tf_keras.Input((28, 28, 1)),
            layers.Conv2D(32, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10, dtype="float32"),
        ]
    )


def distributed_batches(trainer: PlainTrainer, steps: int) -> tf.distribute.DistributedDataset:
    """Returns the batches of the trainer's first `steps` steps, as pairs (images, labels).

    Which examples they hold is computed beforehand. What is left is to gather each replica's share from memory, ahead of
    the step.
    """
    source, seed = trainer.train_source, trainer.config.seed
    places = range(BATCH_SIZE)
    numbers = tf.stack(
        [order.training(step, places, batch_size=BATCH_SIZE, examples=len(source), seed=seed) for step in range(steps)]
    )

    def dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = context.get_per_replica_batch_size(BATCH_SIZE)
        mine = tf.reshape(numbers, [steps, context.num_input_pipelines, -1, share])[:, context.input_pipeline_id]
        images, labels = tf.constant(source.arrays["inputs"]), tf.constant(source.arrays["targets"])
        options = tf.data.Options()
        options.autotune.enabled = False  # whose thread TensorFlow waits for, up to a minute, at the end
        rows = tf.data.Dataset.from_tensor_slices(tf.reshape(mine, [-1, share])).repeat()
        batches = rows.map(lambda row: (tf.gather(images, row), tf.gather(labels, row)), num_parallel_calls=2)
        return batches.prefetch(4).with_options(options)

    return trainer.strategy.distribute_datasets_from_function(dataset)


def hand_written(trainer: PlainTrainer, batches: tf.distribute.DistributedDataset) -> Callable[[int], float]:
    """Returns the loop as one writes it with tf.distribute: trains a number of steps and returns their mean loss."""
    strategy, model = trainer.strategy, build_copy(trainer)
    variables = model.trainable_variables
    with strategy.scope():
        optimizer = keras.optimizers.Adam(LEARNING_RATE)
        optimizer.build(variables)
        mean_loss, accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()

    def replica_step(images, labels):
        with tf.GradientTape() as tape:
            logits = model(tf.cast(images, tf.float32) / 255.0, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            loss = tf.reduce_sum(losses) / BATCH_SIZE
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        mean_loss.update_state(losses)
        accuracy.update_state(labels, logits)

    @tf.function
    def loop(iterator, steps):
        for _ in tf.range(steps):
            strategy.run(replica_step, args=next(iterator))

    iterator = iter(batches)

    def turn(steps: int) -> float:
        mean_loss.reset_state()
        accuracy.reset_state()
        loop(iterator, tf.constant(steps))
        accuracy.result()
        return float(mean_loss.result())

    return turn


def keras_fit(trainer: PlainTrainer, batches: tf.distribute.DistributedDataset, between: Callable, steps: int, rounds: int):
    """Runs Keras fit with one epoch a round, and calls between(round) after each; returns its turns, as `measure` does."""
    library = tf_keras if trainer.workers.count > 1 else keras
    turns = []

    class Rounds(library.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            trainer.workers.gather(0)
            self.start = clocks()

        def on_epoch_end(self, epoch, logs=None):
            turns.append((*(clocks() - self.start), float(logs["loss"])))
            between(epoch)

    network = build_copy(trainer, library)
    with trainer.strategy.scope():
        model = library.Sequential([library.Input((28, 28, 1)), library.layers.Rescaling(1 / 255), network])
        model.compile(
            library.optimizers.Adam(LEARNING_RATE),
            library.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[library.metrics.SparseCategoricalAccuracy()],
            steps_per_execution=steps,
            jit_compile=False,  # XLA makes convolutions slower on CPUs; the other two are not compiled either
        )
    model.fit(batches, epochs=rounds, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[Rounds()])
    return turns


def clocks() -> np.ndarray:
    """Returns the time and the processor time of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def measure(setting: str, steps: int, rounds: int, precision: str) -> dict[str, list]:
    """Returns name -> turns, each (seconds, processor seconds, mean loss); runs in every process of a setting."""
    tf.get_logger().setLevel("ERROR")
    trainer = build_trainer(SETTINGS[setting][1], precision)
    batches = distributed_batches(trainer, steps * rounds)
    loops = {
        "hand-written": hand_written(trainer, batches),
        "mptrain": lambda steps: trainer.train(tf.constant(steps))["loss"],
    }
    results = {name: [] for name in loops}

    def others(number: int) -> None:
        for name in list(loops)[:: 1 if number % 2 else -1]:
            trainer.workers.gather(0)  # so that no turn waits for what another worker still does of the one before
            start = clocks()
            loss = loops[name](steps)
            results[name].append((*(clocks() - start), loss))

    results["Keras fit"] = keras_fit(trainer, batches, others, steps, rounds)
    return results


def run(setting: str, options: argparse.Namespace) -> dict[str, list]:
    """Measures one setting in processes of its own, since TensorFlow sets up its devices once; returns what the first says."""
    count, devices = SETTINGS[setting]
    command = [sys.executable, "-m", "benchmarks.scaling", "--measure", "--settings", setting]
    command += [f"--steps={options.steps}", f"--rounds={options.rounds}", f"--precision={options.precision}"]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(count):
            task = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
            environment = {**os.environ, "TF_CONFIG": task} if devices["strategy"] == "multi_worker" else None
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            stack.callback(process.kill)
            processes.append(process)
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{setting}: a process ended with an error")
    return json.loads(outputs[0].splitlines()[-1])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def row(setting: str, results: dict[str, list], steps: int) -> str:
    """Returns the setting's line of the table.

    Raises:
        SystemExit: if the three did not compute the same.
    """
    by_hand, ours, fit = (np.array(results[name]) for name in ("hand-written", "mptrain", "Keras fit"))
    losses = [turns[:, 2].mean() for turns in (by_hand, ours, fit)]
    if not max(losses) < 1.01 * min(losses):
        sys.exit(f"{setting}: the mean losses differ: by hand {losses[0]}, mptrain {losses[1]}, Keras fit {losses[2]}")
    cells = [f"{1e3 * np.median(turns[WARM_UP:, 0]) / steps:.1f}" for turns in (by_hand, ours, fit)]
    for turns in (ours, fit):
        (low, _), (middle, processor), (high, _) = np.quantile(
            turns[WARM_UP:, :2] / by_hand[WARM_UP:, :2], [0.25, 0.5, 0.75], 0
        )
        cells += [f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{processor:.2f}"]
    return f"| {' | '.join([setting, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of one loop")
    parser.add_argument("--rounds", type=int, default=20, help=f"after {WARM_UP} that do not count")
    parser.add_argument("--precision", default="float32", choices=["float32", "mixed_bfloat16"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # this is a process that `run` started
    options = parser.parse_args()
    if options.measure:
        results = measure(options.settings[0], options.steps, options.rounds + WARM_UP, options.precision)
        print(json.dumps(results), flush=True)
        return
    print(f"{hardware()}; Python {platform.python_version()}; {options.precision}\n")
    ratios = "mptrain / by hand | processor time | Keras fit / by hand | processor time"
    print(f"| setting | by hand, ms a step | mptrain | Keras fit | {ratios} |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for setting in options.settings:
        print(row(setting, run(setting, options), options.steps), flush=True)


if __name__ == "__main__":
    main()
