"""The process of one row of `gpu`: a model that fills a card, in one precision, measured against the card's matrix units.

Reads a request from its input, a line of JSON, and answers with what it measured, or why it could not. A row has a process of
its own because TensorFlow remembers the algorithms of convolutions by their shapes, whether with TF32 or without, and so that
nothing of the row before is in memory.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import mptrain
from benchmarks import models, works
from benchmarks.children import reason

TURNS = 6
TURN_SECONDS = 0.4
MODES = {  # name -> (policy, TF32); the slowest last
    "mixed_float16": ("mixed_float16", True),
    "mixed_bfloat16": ("mixed_bfloat16", True),
    "float32, TF32": ("float32", True),
    "float32": ("float32", False),
}
DTYPES = {"float32": tf.float32, "mixed_bfloat16": tf.bfloat16, "mixed_float16": tf.float16}


@dataclasses.dataclass(frozen=True)
class Large:
    """A model that fills a card.

    Attributes:
        work: its data's shape and batch.
        build: returns the Keras model.
    """

    work: works.Work
    build: Callable[[], keras.Model]


def resnet50(tiny: bool = False) -> Large:
    """ResNet-50 (He et al., 2016) on images of ImageNet's shape, uint8 as a decoder gives them."""
    side, batch = (32, 2) if tiny else (224, 128)
    work = works.Work("resnet50", batch, (side, side, 3), 10 if tiny else 1000, 1, 1, {}, examples=2 * batch)

    def build():
        body = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=work.shape)
        return keras.Model(body.input, keras.layers.Dense(work.classes, dtype="float32")(body.output))

    return Large(work, build)


def transformer(tiny: bool = False) -> Large:
    """A decoder of 14 layers, width 768 and context 1,024 on bytes: 100 million parameters."""
    layers, width, places, batch = (1, 16, 16, 2) if tiny else (14, 768, 1024, 8)
    sizes = {"layers": layers, "width": width, "heads": 2 if tiny else 12}
    work = works.Work("transformer", batch, (places,), 256, 1, 1, sizes, examples=2 * batch)
    return Large(work, lambda: models.build(keras, work))


MODELS = {"transformer": transformer, "resnet50": resnet50}


def multiplications(model: keras.Model) -> int:
    """Returns how often a forward pass of one example multiplies and adds, in matrix products and convolutions.

    A kernel does so once for each output and each of that output's inputs. Attention does for its scores and for the mixture,
    and a causal one is not given a discount. Embeddings multiply nothing.
    """
    total = 0
    for layer in model.layers:
        shape = layer.output.shape[1:]
        if hasattr(layer, "kernel"):
            total += int(np.prod(shape)) * int(np.prod(layer.kernel.shape[:-1]))
        elif type(layer).__name__ == "Attention":
            places, width = shape
            total += 2 * places**2 * width
    return total


class LargeTrainer(mptrain.Trainer):
    """Trains `LargeTrainer.large` on noise."""

    large: Large

    def build_model(self):
        return self.large.build()

    def build_source(self, split):
        work = self.large.work
        if work.name == "transformer":
            inputs, targets = works.data(work)
        else:
            rng = np.random.default_rng(0)
            inputs = rng.integers(0, 256, (work.examples, *work.shape), dtype=np.uint8)
            targets = rng.integers(0, work.classes, work.examples, dtype=np.int32)
        return {"inputs": inputs, "targets": targets}

    def inputs(self, batch):
        inputs = batch["inputs"]
        return tf.cast(inputs, tf.float32) / 127.5 - 1.0 if inputs.dtype == tf.uint8 else inputs

    def compute_loss(self, batch, outputs):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=outputs)


class UnscaledTrainer(LargeTrainer):
    """The same step with nothing of loss scaling in it: no factor, no check, no branch, nothing kept to be put back.

    Only for its time: in float16 small gradients are lost.
    """

    def replica_train_step(self, batch):
        with tf.GradientTape() as tape:
            outputs = self.model(self.precision.cast_to_compute(self.inputs(batch)), training=True)
            outputs = self.precision.cast_to_output(outputs)
            loss = self.reduce_loss(self.compute_loss(batch, outputs)) + self.regularization_loss()
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.inner.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.update_metrics(batch, outputs, loss)
        return tf.constant(True)

    def guarded_step(self, batch):
        self.randomness.begin_step()
        self.replica_train_step(batch)


def trainer(kind: type[LargeTrainer], large: Large, policy: str) -> LargeTrainer:
    config = mptrain.default_config()
    config.trainer = f"{__name__}.{kind.__name__}"
    config.precision.policy = policy
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-4
    config.data.batch_size = large.work.batch_size
    config.train.steps = 1  # of which nothing depends here
    LargeTrainer.large = large
    return kind(config)


def orthogonal(size: int, dtype: tf.DType) -> tf.Tensor:
    """Returns the matrix of the discrete cosine transform of type IV [size, size]: dense, orthogonal, its own inverse."""
    odd = 2 * np.arange(size) + 1
    eighths = odd[:, None] * odd[None, :] % (8 * size)  # of the `size`th part of a circle, exact
    return tf.cast((2.0 / size) ** 0.5 * tf.cos(np.pi / (4 * size) * eighths.astype(np.float32)), dtype)


@tf.function
def products(x: tf.Tensor, y: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns x @ y @ y ..., with `count` products, each of which needs the one before."""
    for _ in tf.range(count):
        x = tf.matmul(x, y)
    return x


def matrix_peak(dtype: tf.DType, size: int) -> float:
    """Returns the FLOP/s of a chain of square matrix products, the best of some tries.

    One factor is orthogonal, so that values stay of order 1 however long the chain is.
    """
    x, y = tf.cast(tf.random.normal([size, size]), dtype), orthogonal(size, dtype)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        products(x, y, tf.constant(count))[0, 0].numpy()
        return (time.perf_counter() - start) / count

    seconds(2)  # traces
    count = 2 * max(1, min(500, round(0.1 / seconds(4))))
    return 2.0 * size**3 / min(seconds(count) for _ in range(4))


def turns(trainers: Sequence[LargeTrainer], end: float) -> np.ndarray:
    """Returns the seconds a step of warm trainers that take turns, [turns, trainers]; fewer turns where time is short."""

    def seconds(each: LargeTrainer, steps: int) -> float:
        start = time.perf_counter()
        each.train(tf.constant(steps))  # ends with a loss on the host, so the device is done
        return (time.perf_counter() - start) / steps

    slowest = max(seconds(each, 2) for each in trainers)
    steps = max(1, min(100, round(TURN_SECONDS / slowest)))
    fitting = int((end - time.monotonic()) / (slowest * steps * len(trainers)))
    found = []
    for number in range(1 + max(1, min(TURNS, fitting - 1))):
        order = range(len(trainers))[:: -1 if number % 2 else 1]
        took = {place: seconds(trainers[place], steps) for place in order}
        found.append([took[place] for place in range(len(trainers))])
    return np.array(found[1:])  # in the first one mptrain finds out what takes a second


def measure(large: Large, mode: str, *, size: int, end: float) -> dict:
    """Returns what a row says of a model in a mode.

    Args:
        large: the model.
        mode: one of `MODES`.
        size: of the matrices whose product is the peak.
        end: of `time.monotonic`, for which measuring is cut short.
    """
    policy, tf32 = MODES[mode]
    tf.config.experimental.enable_tensor_float_32_execution(tf32)  # which kernels ask for when they run
    device = "GPU:0" if tf.config.list_physical_devices("GPU") else None  # TensorFlow does not count a CPU's memory
    peak = matrix_peak(DTYPES[policy], size)
    gc.collect()
    if device:
        tf.config.experimental.reset_memory_stats(device)
    ours = trainer(LargeTrainer, large, policy)
    ours.train(tf.constant(1))  # traces
    ours.train(tf.constant(2))
    memory = tf.config.experimental.get_memory_info(device)["peak"] if device else None
    competitors, scaling = [ours], "no scaling"
    if policy == "mixed_float16":
        try:
            unscaled = trainer(UnscaledTrainer, large, policy)
            unscaled.train(tf.constant(1))
            competitors.append(unscaled)
        except tf.errors.ResourceExhaustedError:
            scaling = "no memory for both"
    times = turns(competitors, end)
    if not np.isfinite(loss := ours.train(tf.constant(2))["loss"]):
        raise ArithmeticError(f"the loss is {loss}")
    if len(competitors) > 1:
        scaling = np.quantile(1 - times[:, 1] / times[:, 0], [0.25, 0.5, 0.75]).tolist()
    return {
        "parameters": sum(int(np.prod(variable.shape)) for variable in ours.trainable_variables),
        "flops": 3 * 2 * multiplications(ours.model) * large.work.batch_size,
        "seconds": np.quantile(times[:, 0], [0.25, 0.5, 0.75]).tolist(),
        "peak": peak,
        "memory": memory,
        "scaling": scaling,
    }


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    if not (line := sys.stdin.readline()):
        return  # started ahead of a row that was not to be
    request = json.loads(line)
    try:
        large = MODELS[request["model"]](request["tiny"])
        end = time.monotonic() + request["seconds"]
        reply = measure(large, request["mode"], size=64 if request["tiny"] else 8192, end=end)
    except Exception as error:  # whatever it is: the row says so, and other rows have processes of their own
        reply = {"failed": reason(f"{type(error).__name__}: {error}")}
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
