"""Examples that are computed from their number: any count, any shape, nothing stored."""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from mptrain.data.sources import Batch
from mptrain.errors import InputError


class SyntheticSource:
    """Noise around one random pattern for each class: a task that a model learns, for trying shapes and sizes.

    Args:
        examples: how many, up to 2**62.
        shape: of the inputs of one example, which are float32.
        classes: how many; targets are int32, example i is of class i % classes.
        split: "train" or "eval"; they share the patterns and not the noise.

    Attributes:
        spec: name -> `tf.TensorSpec` of one example.

    Raises:
        InputError: if a size is not positive.
    """

    def __init__(self, examples: int, shape: tuple[int, ...], classes: int, split: str):
        if min(examples, classes, *shape, 1) < 1:
            raise InputError(f"config.data: examples={examples}, shape={shape}, classes={classes}: write numbers above 0")
        self._examples = examples
        self._shape = shape
        self._salt = ("train", "eval").index(split)
        self._patterns = np.random.default_rng(0).uniform(-1, 1, [classes, *shape]).astype(np.float32)
        self.spec = {
            "inputs": tf.TensorSpec(shape, tf.float32, "inputs"),
            "targets": tf.TensorSpec([], tf.int32, "targets"),
        }

    def __len__(self) -> int:
        return self._examples

    def open(self) -> Callable[[tf.Tensor], Batch]:
        """Returns a graph function from the numbers of examples, int64 [n], to the batch of them."""
        with tf.device("CPU:0"):
            patterns = tf.constant(self._patterns)
        values = math.prod(self._shape)

        def batch(index: tf.Tensor) -> Batch:
            target = index % len(self._patterns)
            number = index[:, tf.newaxis] * (2 * values) + tf.range(values, dtype=tf.int64) + self._salt * values
            noise = tf.reshape(_uniform(number), [-1, *self._shape])
            return {"inputs": tf.gather(patterns, target) + noise, "targets": tf.cast(target, tf.int32)}

        return batch

    def first(self) -> Batch:
        """Returns the first example, as a batch of one."""
        return self.open()(tf.constant([0], tf.int64))


def _uniform(number: tf.Tensor) -> tf.Tensor:
    """Returns a float32 in [-1, 1) for each int64, by the finalizer of MurmurHash3 (Appleby, 2011) on 32 bits."""
    low, high = (tf.cast(part % 2**32, tf.uint32) for part in (number, number // 2**32))
    bits = tf.bitwise.bitwise_xor(low, high * tf.constant(0x9E3779B9, tf.uint32))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint32)))
        bits *= tf.constant(factor, tf.uint32)
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.float32) / 2.0**23 - 1.0
