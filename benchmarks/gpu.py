"""Times mptrain's step on a GPU, against the loop by hand, and against what the card's matrix units can do.

    python -m benchmarks.gpu [--minutes=4.5]

First the table of the CPU's works, mptrain by turns with the loop by hand. Then a ResNet-50 on images of ImageNet's shape and a
transformer of 100 million parameters, in float32 with TF32 on and off, mixed_bfloat16 and mixed_float16: step time, achieved
FLOP/s against the peak of a large matrix product in the same dtype on the same card, peak memory, and the share of the step
that loss scaling takes, on against off. Runs unattended in under five minutes on one card of the H100's class; when the time
is over the remaining rows say so. Without a GPU it says that there is none, with exit status 2.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import mptrain
from benchmarks import models, works
from benchmarks.contestants import by_hand, common
from mptrain.hardware import hardware

TURNS = 6
MODES = {  # name -> (policy, TF32)
    "float32": ("float32", False),
    "float32, TF32": ("float32", True),
    "mixed_bfloat16": ("mixed_bfloat16", True),
    "mixed_float16": ("mixed_float16", True),
}
DTYPES = {"float32": tf.float32, "mixed_bfloat16": tf.bfloat16, "mixed_float16": tf.float16}


@dataclasses.dataclass(frozen=True)
class Large:
    """A model that fills a card.

    Attributes:
        work: its data's shape and batch.
        build: returns the Keras model.
        flops: of one step, forward and backward, counting a multiplication and an addition as two.
    """

    work: works.Work
    build: Callable[[], keras.Model]
    flops: float


class LargeTrainer(mptrain.Trainer):
    """Trains `LargeTrainer.large` on one batch of noise after another, all of them made from few examples."""

    large: Large

    def build_model(self):
        return self.large.build()

    def build_source(self, split):
        inputs, targets = works.data(self.large.work)
        return {"inputs": inputs, "targets": targets}

    def compute_loss(self, batch, outputs):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=outputs)


def resnet(tiny: bool) -> Large:
    """ResNet-50 (He et al., 2016): 4.09 billion multiplications an image of 224 x 224; a step is three forward passes."""
    side, batch = (32, 2) if tiny else (224, 128)
    work = works.Work("resnet50", batch, (side, side, 3), 10 if tiny else 1000, 2 if tiny else 8, 2, {}, examples=2 * batch)

    def build():
        body = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=work.shape)
        return keras.Sequential([body, keras.layers.Dense(work.classes, dtype="float32")])

    return Large(work, build, 3 * 2 * 4.09e9 * (side / 224) ** 2 * batch)


def transformer(tiny: bool) -> Large:
    """A decoder of 12 layers, width 832 and context 1,024: 101 million parameters."""
    layers, width, places, batch = (1, 16, 16, 2) if tiny else (12, 832, 1024, 16)
    sizes = {"layers": layers, "width": width, "heads": 2 if tiny else 13}
    work = works.Work("transformer", batch, (places,), 256, 2 if tiny else 6, 2, sizes, examples=2 * batch)
    parameters = layers * 12 * width**2 + width * (2 * 256 + places)
    attention = 12 * layers * width * places  # for each byte: scores and mixing, forward and backward
    return Large(work, lambda: models.build(keras, work), (6 * parameters + attention) * batch * places)


def trainer(large: Large, policy: str, scaled: bool) -> LargeTrainer:
    config = mptrain.default_config()
    config.trainer = f"{__name__}.LargeTrainer"
    config.precision.policy = policy
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-4
    config.data.batch_size = large.work.batch_size
    config.train.steps = 1  # of which nothing depends here
    if not scaled:
        config.loss_scale.dynamic, config.loss_scale.initial_scale = False, 1.0
    LargeTrainer.large = large
    return LargeTrainer(config)


def seconds(train, steps: int, turns: int = TURNS) -> np.ndarray:
    """Returns the seconds a step of some turns, after two that do not count."""
    found = []
    for _ in range(turns + 2):
        start = time.perf_counter()
        train(steps)  # ends with a loss on the host, so the device is done
        found.append((time.perf_counter() - start) / steps)
    return np.array(found[2:])


def peak(dtype: tf.DType, tf32: bool, size: int) -> float:
    """Returns the FLOP/s of a chain of square matrix products, the best of some tries."""
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    count = 20

    @tf.function
    def chain(x, y):
        for _ in tf.range(count):
            x = tf.matmul(x, y)
        return tf.reduce_sum(tf.cast(x[:1, :1], tf.float32))

    x = tf.cast(tf.random.normal([size, size], stddev=size**-0.5), dtype)
    best = min(seconds(lambda steps: float(chain(x, x)), 1, turns=4))
    return 2.0 * size**3 * count / best


def memory_peak(device: str | None) -> float:
    """Returns the most memory in use on the device since the last reset, in GiB; NaN on a CPU, which does not count it."""
    return tf.config.experimental.get_memory_info(device)["peak"] / 2**30 if device else float("nan")


def measured(large: Large, policy: str, scaled: bool) -> tuple[np.ndarray, int]:
    """Returns the seconds a step of mptrain's turns, and the number of parameters."""
    ours = trainer(large, policy, scaled)
    parameters = sum(int(np.prod(variable.shape)) for variable in ours.trainable_variables)
    return seconds(lambda steps: ours.train(tf.constant(steps)), large.work.steps), parameters


def large_row(large: Large, mode: str, matrix_peak: float, device: str | None) -> str:
    policy, tf32 = MODES[mode]
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    if device:
        tf.config.experimental.reset_memory_stats(device)
    on, parameters = measured(large, policy, scaled=True)
    memory, share = memory_peak(device), "no scaling"
    if policy == "mixed_float16":
        off, _ = measured(large, policy, scaled=False)
        share = f"{1 - np.median(off) / np.median(on):.1%}"
    low, middle, high = 1e3 * np.quantile(on, [0.25, 0.5, 0.75])
    rate = large.flops / (middle / 1e3)
    cells = [f"{middle:.1f} ({low:.1f}-{high:.1f})", f"{rate / 1e12:.1f}", f"{matrix_peak / 1e12:.1f}"]
    cells += [f"{rate / matrix_peak:.0%}", f"{memory:.1f}", share]
    return f"| {large.work.name}, {parameters / 1e6:.1f} M | {mode} | {' | '.join(cells)} |"


def small_row(work: works.Work, precision: str, steps: int) -> str:
    """Returns the row of one of the CPU's works: mptrain and the loop by hand by turns."""
    from benchmarks.contestants import with_mptrain
    from benchmarks.frame import Case

    file = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"benchmark-{os.getpid()}.npy")
    np.save(file, works.numbers(work, 64))
    try:
        common.set_policy(precision)
        scaled = precision == "mixed_float16"
        batches = common.batches(Case(work, precision, (), file))
        hand = by_hand.loop(models.build(keras, work), batches, scaled=scaled, compiled=False)
    finally:
        common.set_policy("float32")
        os.remove(file)
    ours = with_mptrain.trainer(work, precision)
    found = {"hand": [], "mptrain": []}
    for _ in range(TURNS + 2):
        for name, train in (("hand", hand), ("mptrain", lambda count: ours.train(tf.constant(count)))):
            start = time.perf_counter()
            train(steps)
            found[name].append((time.perf_counter() - start) / steps)
    by, mine = (1e3 * np.array(found[name][2:]) for name in ("hand", "mptrain"))
    low, middle, high = np.quantile(mine / by, [0.25, 0.5, 0.75])
    return f"| {work.name} | {precision} | {np.median(by):.3g} | {np.median(mine):.3g} | {middle:.2f} ({low:.2f}-{high:.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.5, help="after which no further row is begun")
    parser.add_argument("--tiny-on-cpu", action="store_true", help=argparse.SUPPRESS)  # for the test of this file
    options = parser.parse_args()
    tiny, gpus = options.tiny_on_cpu, tf.config.list_physical_devices("GPU")
    if not gpus and not tiny:
        print("there is no GPU here: benchmarks.gpu needs one (python -m benchmarks compares on a CPU)", file=sys.stderr)
        sys.exit(2)
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    device = "GPU:0" if gpus and not tiny else None
    end = time.monotonic() + 60 * options.minutes
    print(f"{hardware()}\n")
    peaks = {mode: peak(DTYPES[policy], tf32, 64 if tiny else 8192) for mode, (policy, tf32) in MODES.items()}
    print("| model | precision | ms a step | TFLOP/s | matrix peak | of the peak | GiB | loss scaling |")
    print("|---|---|---|---|---|---|---|---|")
    for large in [transformer(tiny)] if tiny else [transformer(tiny), resnet(tiny)]:
        for mode in ["float32", "mixed_float16"] if tiny else MODES:
            print_row(end, (large.work.name, mode), lambda: large_row(large, mode, peaks[mode], device))  # noqa: B023
    print("\n| work | precision | by hand, ms a step | mptrain | mptrain / by hand |\n|---|---|---|---|---|")
    tf.config.experimental.enable_tensor_float_32_execution(True)
    for work in [works.WORKS["mlp"].tiny()] if tiny else works.WORKS.values():
        for precision in ["mixed_float16"] if tiny else works.PRECISIONS:
            steps = work.quick_steps if tiny else max(work.quick_steps, 20)
            print_row(end, (work.name, precision), lambda: small_row(work, precision, steps))  # noqa: B023


def print_row(end: float, names: tuple[str, ...], row) -> None:
    """Prints what `row` returns, unless the time is over."""
    over = f"| {' | '.join(names)} | not run: the time was over |"
    print(over if time.monotonic() > end else row(), flush=True)


if __name__ == "__main__":
    main()
