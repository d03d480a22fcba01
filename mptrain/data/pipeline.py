"""The seekable pipeline: batch number s is a function of (seed, s), so it opens at any step at once.

Example i of the endless training stream belongs to epoch i // n, and each epoch is a keyed permutation of the n examples
(`tf.raw_ops.RandomIndexShuffle`), computed index by index and stored nowhere. Step s takes the stream's examples
[s * batch_size, (s + 1) * batch_size). At an epoch's seam a batch holds the last examples of one epoch and the first of the
next; none is dropped and none is repeated within its epoch.

Every replica takes its slice of the global batch by index arithmetic, so the order does not depend on their number.
"""

import math

import tensorflow as tf

from mptrain.data.sources import Source
from mptrain.errors import InputError

# Of the block cipher behind the permutation. TensorFlow's own default, 4, leaves every second of 100 examples in its place;
# with 8 no bias is left from 4 examples to 60,000 (`tests/test_data.py`).
_SHUFFLE_ROUNDS = 8
_END = 2**62  # steps: without end


def train_dataset(
    source: Source, *, batch_size: int, seed: int, start_step: int, strategy: tf.distribute.Strategy
) -> tf.data.Dataset:
    """Returns the endless training batches from `start_step` on, distributed over the strategy's replicas.

    Args:
        source: the examples.
        batch_size: of the global batch.
        seed: of the order.
        start_step: the first batch's number; any number opens as fast as 0.
        strategy: its replicas share each global batch evenly.

    Returns:
        A dataset of dicts of tensors [batch_size / replicas, ...], distributed.

    Raises:
        InputError: if the batch size is not divisible by the number of replicas.
    """
    share = per_replica(batch_size, strategy)
    examples = len(source)

    def batch(tables, step, shard):
        position = step * batch_size + shard * share + tf.range(share, dtype=tf.int64)
        return _gather(tables, _shuffled(position % examples, position // examples, seed, examples))

    return _distribute(source, batch, start_step, _END, strategy)


def eval_dataset(source: Source, *, batch_size: int, strategy: tf.distribute.Strategy) -> tf.data.Dataset:
    """Returns the batches of one evaluation: every example once, in order; the last batch is padded with a weight of 0.

    Args:
        source: the examples.
        batch_size: of the global batch.
        strategy: its replicas share each global batch, as evenly as it goes.

    Returns:
        A dataset of `eval_steps(source, batch_size)` dicts of tensors [batch_size / replicas, ...] (rounded up),
        distributed, with "weight" beside the source's own.
    """
    share = math.ceil(batch_size / strategy.num_replicas_in_sync)
    examples = len(source)

    def batch(tables, step, shard):
        position = step * batch_size + shard * share + tf.range(share, dtype=tf.int64)
        last = tf.minimum(
            tf.constant(examples, tf.int64), (step + 1) * batch_size
        )  # a share rounded up reaches into the next batch
        real = tf.cast(position < last, tf.float32)
        return _gather(tables, tf.minimum(position, examples - 1)) | {"weight": real}

    return _distribute(source, batch, 0, eval_steps(source, batch_size), strategy)


def eval_steps(source: Source, batch_size: int) -> int:
    """Returns the number of batches in one evaluation."""
    return math.ceil(len(source) / batch_size)


def per_replica(batch_size: int, strategy: tf.distribute.Strategy) -> int:
    """Returns each replica's share of a training batch.

    Raises:
        InputError: if the replicas cannot share it evenly.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size % replicas:
        near = max(batch_size // replicas, 1) * replicas
        raise InputError(
            f"config.data.batch_size is {batch_size}: it is the global batch and must be divisible by the {replicas} replicas,"
            f" as {near} is"
        )
    return batch_size // replicas


def _shuffled(index: tf.Tensor, epoch: tf.Tensor, seed: int, examples: int) -> tf.Tensor:
    """Returns where the epoch's permutation sends each index, int64 [n]."""
    word = tf.constant(2**32, tf.int64)
    seeds = tf.stack([tf.fill(tf.shape(epoch), tf.constant(seed, tf.int64)), epoch % word, epoch // word], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=index,
        seed=tf.cast(seeds, tf.uint32),
        max_index=tf.constant(examples - 1, tf.int64),
        rounds=_SHUFFLE_ROUNDS,
    )


def _gather(tables: dict, index: tf.Tensor) -> dict:
    return {name: tf.gather(table, index) for name, table in tables.items()}


def _distribute(source: Source, batch, start: int, end: int, strategy: tf.distribute.Strategy) -> tf.data.Dataset:
    """Element k of a worker's dataset is the batch of step k // its replicas for its replica k % its replicas."""
    with tf.device("CPU:0"):
        tables = {name: tf.constant(array) for name, array in source.arrays.items()}

    def dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * local

        def element(number):
            return batch(tables, number // local, first + number % local)

        elements = tf.data.Dataset.range(start * local, min(end, _END // local) * local)
        return elements.map(element, num_parallel_calls=1).prefetch(4 * local)

    return strategy.distribute_datasets_from_function(dataset)
