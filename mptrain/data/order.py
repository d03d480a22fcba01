"""Which examples make which batch: index arithmetic and nothing else.

Example i of the endless training stream belongs to epoch i // n, and each epoch is a keyed permutation of the n examples
(`tf.raw_ops.RandomIndexShuffle`), computed index by index and stored nowhere. Step s takes the stream's places
[s * batch_size, (s + 1) * batch_size). At an epoch's seam a batch holds the last examples of one epoch and the first of the
next; none is dropped and none is repeated within its epoch.

Workers and replicas take slices of the global batch, so the order does not depend on their number.
"""

import math

import tensorflow as tf

from mptrain.autograph import as_written

# Of the block cipher behind the permutation. TensorFlow's own default, 4, leaves every second of 100 examples in its place;
# with 8 no bias is left from 4 examples to 60,000 (`tests/test_data_order.py`).
_SHUFFLE_ROUNDS = 8


@as_written
def training(step, places: range, *, batch_size: int, examples: int, seed: int) -> tf.Tensor:
    """Returns the numbers of the examples at `places` of the global batch of `step`, int64 [..., places].

    Args:
        step: the number of the global batch, an int; or of several, int64 [...].
        places: a slice of range(batch_size), as `shard` gives it.
        batch_size: of the global batch.
        examples: how many there are.
        seed: of the order.
    """
    position = _positions(step, places, batch_size)
    flat = tf.reshape(position, [-1])
    order = permuted(flat % examples, flat // examples, seed=seed, examples=examples)
    return tf.reshape(order, tf.shape(position))


@as_written
def evaluation(step, places: range, *, batch_size: int, examples: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the numbers of the examples at `places` of an evaluation batch, int64 [..., places], and their weights, float32.

    The weight is 1 for each example exactly once in an evaluation, and 0 for padding: after the last example, and at places
    past `batch_size`, which arise where the replicas cannot share it evenly.
    """
    position = _positions(step, places, batch_size)
    end = tf.minimum(tf.constant(examples, tf.int64), (tf.cast(step, tf.int64) + 1) * batch_size)
    return tf.minimum(position, examples - 1), tf.cast(position < end[..., None], tf.float32)


def _positions(step, places: range, batch_size: int) -> tf.Tensor:
    """Returns where in the stream of all examples the batch of each step lies, int64 [..., places]."""
    return tf.cast(step, tf.int64)[..., None] * batch_size + tf.range(places.start, places.stop, dtype=tf.int64)


def shard(batch_size: int, first: int, count: int, of: int) -> range:
    """Returns the places of the global batch that belong to `count` replicas from number `first` on.

    Args:
        batch_size: of the global batch. Where the replicas cannot share it evenly, each share is rounded up.
        first: number of the worker's first replica.
        count: how many replicas the worker has.
        of: how many replicas there are on all workers.
    """
    share = math.ceil(batch_size / of)
    return range(first * share, (first + count) * share)


@as_written
def permuted(index: tf.Tensor, epoch: tf.Tensor, *, seed: int, examples: int) -> tf.Tensor:
    """Returns where the epoch's permutation of range(examples) sends each index, int64 [n].

    Args:
        index: int64 [n].
        epoch: int64 [n].
        seed: below 2**31.
        examples: at least 1.
    """
    word = tf.constant(2**32, tf.int64)
    seeds = tf.stack([tf.fill(tf.shape(epoch), tf.constant(seed, tf.int64)), epoch % word, epoch // word], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=index,
        seed=tf.cast(seeds, tf.uint32),
        max_index=tf.constant(examples - 1, tf.int64),
        rounds=_SHUFFLE_ROUNDS,
    )
