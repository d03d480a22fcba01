"""What is trained in the comparison: four models' sizes, their data and their initial weights, from NumPy alone.

Everybody starts from the same weights and sees the same examples in the same order, in TensorFlow and in PyTorch, so whatever
is random is drawn here.
"""

import dataclasses

import numpy as np

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
LEARNING_RATE = 1e-3  # of Adam
SEED = 0  # of mptrain's data order, which the others follow


@dataclasses.dataclass(frozen=True)
class Work:
    """One model with its data.

    Attributes:
        name: "mlp", "cnn", "resnet" or "transformer".
        batch_size: examples in a step.
        shape: of one example's inputs; image data is height, width, channels.
        classes: of the targets; a transformer has a target for each of its inputs.
        steps: in one turn; about half a second on two cores.
        quick_steps: in one turn of a quick run.
        sizes: the model's own.
        examples: in the data set.
    """

    name: str
    batch_size: int
    shape: tuple[int, ...]
    classes: int
    steps: int
    quick_steps: int
    sizes: dict[str, int]
    examples: int = 1024

    def tiny(self) -> "Work":
        """Returns the same work at the smallest size, for tests."""
        sizes = {name: min(size, 2 if name in ("layers", "blocks") else 16) for name, size in self.sizes.items()}
        shape = {"transformer": (16,), "resnet": (16, 16, 3)}.get(self.name, self.shape)
        return dataclasses.replace(self, batch_size=4, shape=shape, steps=3, quick_steps=3, sizes=sizes, examples=32)


WORKS = {
    work.name: work
    for work in (
        Work("mlp", 32, (64,), 10, 3000, 1000, {"width": 64}, examples=16_000),
        Work("cnn", 128, (28, 28, 1), 10, 24, 8, {"filters": 32, "width": 128}, examples=16_000),
        Work("resnet", 128, (32, 32, 3), 10, 4, 2, {"filters": 16, "blocks": 1}),
        Work("transformer", 8, (256,), 256, 2, 1, {"layers": 4, "width": 256, "heads": 4}),
    )
}


def data(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs (float32, or int32 for text) and targets, int32.

    There is something left to learn to the end, so that who stops learning has other losses: one label in five is drawn anew,
    and text repeats itself among bytes of which few are frequent (Zipf's law).
    """
    rng = np.random.default_rng(0)
    if work.name == "transformer":
        frequencies = 1 / np.arange(1, work.classes + 1)
        drawn = rng.choice(work.classes, (work.examples, *work.shape), p=frequencies / frequencies.sum())
        repeats = rng.random(drawn.shape) < 0.5
        for place in range(1, work.shape[0]):
            drawn[:, place] = np.where(repeats[:, place], drawn[:, place - 1], drawn[:, place])
        return drawn.astype(np.int32), np.roll(drawn, -1, axis=1).astype(np.int32)
    classes = rng.integers(0, work.classes, work.examples)
    patterns = rng.normal(size=(work.classes, *work.shape))
    inputs = patterns[classes] + rng.normal(size=(work.examples, *work.shape))
    wrong = rng.random(work.examples) < 0.2
    targets = np.where(wrong, rng.integers(0, work.classes, work.examples), classes)
    return inputs.astype(np.float32), targets.astype(np.int32)


def weight(number: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns the initial value of a model's weight, float32, in the layout of Keras; None: as the layer has it.

    Args:
        number: its place among `model.weights`.
        shape: vectors (biases, factors, statistics) stay as they are.
    """
    if len(shape) < 2:
        return None
    deviation = np.sqrt(1.0 / np.prod(shape[:-1]))
    return np.random.default_rng([1, number]).normal(0, deviation, shape).astype(np.float32)


def numbers(work: Work, steps: int) -> np.ndarray:
    """Returns which examples make each of the first `steps` batches of mptrain, int64 [steps, batch size]."""
    import tensorflow as tf

    from mptrain.data import order

    stream = tf.range(steps * work.batch_size, dtype=tf.int64)
    index = order.permuted(stream % work.examples, stream // work.examples, seed=SEED, examples=work.examples)
    return index.numpy().reshape(steps, work.batch_size)
