"""Times a step as the work grows: variables, parameters, steps in a loop, replicas, examples.

    python -m benchmarks.growth [--rounds=9] [SECTION ...]

Within a section all loops take turns in one process, each turn the same number of steps in the graph; numbers are medians.
Variables are small (16 numbers), so what each costs is TensorFlow's cost of an operation: first the gradients alone, then
Keras's Adam on them, then mptrain with its check for finite values and the norm (one pass), then with clipping. The loop by
hand reads mptrain's batches and keeps neither metrics nor counters, so its ratios show what those cost a step of 0.1 ms.
"""

# ruff: noqa: E402
import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import mptrain
from mptrain import data
from mptrain.devices import hardware

BATCH_SIZE = 32


class Sum(tf.Module):
    """Adds up its variables, which are many and small."""

    def __init__(self, variables: int):
        super().__init__()
        self.parts = [tf.Variable(tf.zeros([16]), name=f"part{number}") for number in range(variables)]

    def __call__(self, inputs, training=False):
        return inputs + tf.add_n([tf.convert_to_tensor(part) for part in self.parts])


class Perceptron(tf.Module):
    """Three layers of one width."""

    def __init__(self, width: int):
        super().__init__()
        shapes = [[16, width], [width, width], [width, 16]]
        self.kernels = [tf.Variable(tf.random.stateless_normal(shape, [0, 1]) * shape[0] ** -0.5) for shape in shapes]

    def __call__(self, inputs, training=False):
        first, second, last = self.kernels
        return tf.nn.relu(tf.nn.relu(inputs @ first) @ second) @ last


class GrowingTrainer(mptrain.Trainer):
    """Fits noise, with whatever model it is given."""

    def build_source(self, split):
        rng = np.random.default_rng(0)
        return data.Source({name: rng.normal(size=(4096, 16)).astype(np.float32) for name in ("inputs", "targets")})

    def build_model(self):
        return Sum(self.config.model.variables) if self.config.model.variables else Perceptron(self.config.model.width)

    def compute_loss(self, batch, outputs):
        return tf.square(outputs - batch["targets"])


def trainer(variables: int = 0, width: int = 0, clip_norm: float = 0.0, replicas: int = 1) -> GrowingTrainer:
    config = mptrain.default_config()
    config.trainer = "benchmarks.growth.GrowingTrainer"
    config.model.update(variables=variables, width=width)
    config.precision.policy = "float32"
    config.optimizer.clip_norm = clip_norm
    config.data.batch_size = BATCH_SIZE
    config.train.steps = 1  # of which nothing depends here
    if replicas > 1:
        config.devices.strategy, config.devices.virtual_cpus = "mirrored", replicas
    return GrowingTrainer(config)


def by_hand(ours: GrowingTrainer, apply: bool = True) -> Callable[[int], None]:
    """Returns the loop as one writes it for one device, with Keras's Adam, or without an optimizer."""
    model = ours.build_model()
    variables = list(model.trainable_variables)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(variables)
    batches = ours.training_batches.open(0)
    kept = tf.Variable(0.0)

    @tf.function
    def loop(steps):
        for _ in tf.range(steps):
            batch = next(batches)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(batch["inputs"], training=True) - batch["targets"]))
            gradients = tape.gradient(loss, variables)
            if apply:
                optimizer.apply_gradients(zip(gradients, variables, strict=True))
            else:  # each is used, or it would not be computed
                kept.assign(loss + tf.add_n([tf.reshape(gradient, [-1])[0] for gradient in gradients]))

    return lambda steps: loop(tf.constant(steps))


def medians(loops: Mapping[str, Callable[[int], object]], steps: int, rounds: int) -> dict[str, float]:
    """Returns name -> ms a step; the first two rounds trace and settle, and do not count."""
    times = {name: [] for name in loops}
    for number in range(rounds + 2):
        for name in list(loops)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            loops[name](steps)
            times[name].append((time.perf_counter() - start) / steps * 1e3)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def train(ours: GrowingTrainer) -> Callable[[int], object]:
    return lambda steps: ours.train(tf.constant(steps))


def of_variables(rounds: int) -> None:
    print("| variables | gradients, ms a step | + Keras's Adam | mptrain (check, norm, Adam) | mptrain with clipping |")
    print("|---|---|---|---|---|", flush=True)
    counts, found = (10, 100, 500, 1000, 2000), []
    for count in counts:
        plain, clipped = trainer(variables=count), trainer(variables=count, clip_norm=1.0)
        loops = {
            "gradients": by_hand(plain, apply=False),
            "apply": by_hand(plain),
            "mptrain": train(plain),
            "clipped": train(clipped),
        }
        found.append(medians(loops, max(40, 4000 // count), rounds))
        print(f"| {count:,} | {' | '.join(f'{ms:.3f}' for ms in found[-1].values())} |", flush=True)
    last, first = ({name: 1e3 * ms for name, ms in row.items()} for row in (found[-1], found[0]))
    each = {name: (last[name] - first[name]) / (counts[-1] - counts[0]) for name in last}
    print(
        f"\nEach variable more costs {each['gradients']:.1f} µs for its gradient, {each['apply'] - each['gradients']:.1f} µs"
        f" in Keras's Adam; all that mptrain's optimizer does {each['mptrain'] - each['gradients']:.1f} µs, clipping"
        f" {each['clipped'] - each['mptrain']:+.1f} µs.\n"
    )


def of_parameters(rounds: int) -> None:
    print(
        "By hand there are neither metrics nor counters. Two metrics, the norm and the check of a step cost mptrain the same"
        " however small the step is; and each call of a loop costs the host the resetting and reading of metrics, which is why"
        ' `steps_per_loop="auto"` makes it last a second.\n'
    )
    print("| parameters | by hand, ms a step | mptrain | ratio |\n|---|---|---|---|", flush=True)
    for width in (64, 256, 1024, 3072):
        ours = trainer(width=width)
        parameters = sum(int(np.prod(variable.shape)) for variable in ours.trainable_variables)
        found = medians({"by hand": by_hand(ours), "mptrain": train(ours)}, max(4, 40_000 // width), rounds)
        print(_compared(f"{parameters:,}", found), flush=True)
    print()


def of_loops(rounds: int) -> None:
    print("| steps in a loop | by hand, ms a step | mptrain | ratio |\n|---|---|---|---|", flush=True)
    ours = trainer(width=64)
    loops = {"by hand": by_hand(ours), "mptrain": train(ours)}
    for steps in (1, 10, 100, 1000, 10_000):
        print(_compared(f"{steps:,}", medians(loops, steps, rounds if steps < 10_000 else 3)), flush=True)
    print()


def of_replicas(rounds: int) -> None:
    print("| replicas (logical CPUs) | mptrain, ms a step |\n|---|---|", flush=True)
    for replicas in (1, 2, 4):
        print(f"| {replicas} | {medians({'': train(trainer(width=64, replicas=replicas))}, 200, rounds)['']:.3f} |", flush=True)
    print()


def of_examples(rounds: int) -> None:
    print("| examples | ms a batch | ms to open at step 0 | ms to open at step 10^6 |\n|---|---|---|---|", flush=True)
    strategy, config = tf.distribute.OneDeviceStrategy("CPU:0"), mptrain.default_config().data

    @tf.function
    def draw(iterator, count):
        for _ in tf.range(count):
            next(iterator)

    for exponent in range(3, 9):
        config.update(name="synthetic", examples=10**exponent)
        source = data.load(config, "train")
        batches = data.TrainingBatches(source, batch_size=128, seed=0, strategy=strategy)
        iterator = batches.open(0)
        drawn = medians({"": lambda steps, iterator=iterator: draw(iterator, tf.constant(steps))}, 500, rounds)[""]
        opened = [medians({"": lambda _, b=batches, s=step: next(b.open(s))}, 1, rounds)[""] for step in (0, 10**6)]
        print(f"| {10**exponent:,} | {drawn:.3f} | {opened[0]:.0f} | {opened[1]:.0f} |", flush=True)
    print()


def _compared(name: str, found: Mapping[str, float]) -> str:
    return f"| {name} | {found['by hand']:.3f} | {found['mptrain']:.3f} | {found['mptrain'] / found['by hand']:.2f} |"


SECTIONS = {
    "variables": of_variables,
    "parameters": of_parameters,
    "loops": of_loops,
    "replicas": of_replicas,
    "examples": of_examples,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each loop that count")
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown section {unknown.pop()!r}: write some of {', '.join(SECTIONS)}")
    mptrain.devices.strategy(trainer_devices(4))
    print(f"{hardware()}; Python {platform.python_version()}\n")
    for section in options.sections:
        SECTIONS[section](options.rounds)


def trainer_devices(replicas: int):
    """Returns the config of so many logical CPUs, which TensorFlow sets up once for all sections."""
    devices = mptrain.default_config().devices
    devices.strategy, devices.virtual_cpus = "mirrored", replicas
    return devices


if __name__ == "__main__":
    main()
