"""The seekable pipeline: batch number s is a function of (seed, s), so it opens at any step at once.

Example i of the endless training stream belongs to epoch i // n, and each epoch is a keyed permutation of the n examples
(`tf.raw_ops.RandomIndexShuffle`), computed index by index and stored nowhere. Step s takes the stream's examples
[s * batch_size, (s + 1) * batch_size). At an epoch's seam a batch holds the last examples of one epoch and the first of the
next; none is dropped and none is repeated within its epoch.

Every worker takes its slice of the global batch by index arithmetic, and every replica its slice of that, so the order does
not depend on their number.
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
    """Returns the endless training batches from `start_step` on, for the replicas of this worker.

    Args:
        source: the examples.
        batch_size: of the global batch.
        seed: of the order.
        start_step: the first batch's number; any number opens as fast as 0.
        strategy: its replicas share each global batch evenly.

    Returns:
        A dataset of dicts of tensors [batch_size / workers, ...]; `replica_share` cuts them up.

    Raises:
        InputError: if the batch size is not divisible by the number of replicas.
    """
    share = per_replica(batch_size, strategy)
    examples = len(source)

    def batch(tables, step, first, local):
        position = step * batch_size + first * share + tf.range(local * share, dtype=tf.int64)
        return _gather(tables, _shuffled(position % examples, position // examples, seed, examples))

    return _dataset(source, batch, start_step, _END, strategy)


def eval_dataset(source: Source, *, batch_size: int, strategy: tf.distribute.Strategy) -> tf.data.Dataset:
    """Returns the batches of one evaluation: every example once, in order; the last batch is padded with a weight of 0.

    Args:
        source: the examples.
        batch_size: of the global batch.
        strategy: its replicas share each global batch, as evenly as it goes.

    Returns:
        A dataset of `eval_steps(source, batch_size)` dicts of tensors [batch_size / workers, ...] (rounded up to a
        multiple of the replicas), with "weight" beside the source's own; `replica_share` cuts them up.
    """
    share = math.ceil(batch_size / strategy.num_replicas_in_sync)
    examples = len(source)

    def batch(tables, step, first, local):
        position = step * batch_size + first * share + tf.range(local * share, dtype=tf.int64)
        last = tf.minimum(
            tf.constant(examples, tf.int64), (step + 1) * batch_size
        )  # a share rounded up reaches into the next batch
        real = tf.cast(position < last, tf.float32)
        return _gather(tables, tf.minimum(position, examples - 1)) | {"weight": real}

    return _dataset(source, batch, 0, eval_steps(source, batch_size), strategy)


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


def _dataset(source: Source, batch, start: int, end: int, strategy: tf.distribute.Strategy) -> tf.data.Dataset:
    """Maps the numbers of steps to this worker's batches.

    A plain dataset, not a distributed one: the iterators of the latter hold a tuning thread that TensorFlow waits for, up to
    a minute, whenever one of them goes.
    """
    with tf.device("CPU:0"):
        tables = {name: tf.constant(array) for name, array in source.arrays.items()}
    local = len(strategy.extended.worker_devices)
    first = _worker(strategy) * local
    options = tf.data.Options()
    options.autotune.enabled = False  # the same thread; and there is nothing to tune
    steps = tf.data.Dataset.range(start, end)
    return steps.map(lambda step: batch(tables, step, first, local), num_parallel_calls=1).prefetch(4).with_options(options)


def _worker(strategy: tf.distribute.Strategy) -> int:
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return strategy.cluster_resolver.task_id or 0 if several else 0


def replica_share(batch: dict, strategy: tf.distribute.Strategy) -> dict:
    """Returns this replica's share of its worker's batch; in a replica."""
    local = len(strategy.extended.worker_devices)
    if local == 1:
        return batch
    index = tf.distribute.get_replica_context().replica_id_in_sync_group % local

    def share(value):
        size = value.shape[0] // local
        return tf.ensure_shape(value[index * size : (index + 1) * size], [size, *value.shape[1:]])

    return tf.nest.map_structure(share, batch)
