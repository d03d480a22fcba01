"""Batches for the replicas of a strategy, opened at any step.

Where examples are read by number, batch s is a function of (seed, s): see `order`. In a user's own `tf.data.Dataset` the
position is the state of its iterator where TensorFlow can save that, and the number of batches to skip where it cannot.

Plain datasets, not distributed ones: the iterators of the latter hold a tuning thread that TensorFlow waits for, up to a
minute, whenever one of them goes. Each worker draws its share of the global batch, and `replica_share` cuts that up.
"""

import contextlib
import math
import os
import pathlib
import tempfile

import tensorflow as tf

from mptrain.autograph import as_written
from mptrain.data import order
from mptrain.data.sources import AnySource, DatasetSource, Source, eval_steps
from mptrain.errors import InputError
from mptrain.workers import Workers, local_devices

_END = 2**62  # steps: without end
_BYTES_AT_ONCE, _BATCHES_AT_ONCE = 2**20, 64  # of batches gathered together
_ITERATOR = "iterator"  # prefix of the files in which an iterator's state is saved


class TrainingBatches:
    """The endless training batches of one run, for the replicas of this worker.

    Attributes:
        by_number: whether each batch is a function of (seed, step), which can be read again.

    Args:
        source: the examples.
        batch_size: of the global batch.
        seed: of the order.
        strategy: its replicas share each global batch evenly.

    Raises:
        InputError: if the replicas cannot share the batch, or a dataset has batches of another size.
    """

    def __init__(self, source: AnySource, *, batch_size: int, seed: int, strategy: tf.distribute.Strategy):
        per_replica(batch_size, strategy)
        self.by_number = not isinstance(source, DatasetSource)
        if not self.by_number and source.batch_size != batch_size:
            raise InputError(
                f"config.data.batch_size is {batch_size} and the tf.data.Dataset yields batches of {source.batch_size}: give"
                " both the size of the global batch"
            )
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._strategy = strategy
        self._iterator = None
        self._savable = not self.by_number and self._can_be_saved()

    def __str__(self) -> str:
        if self.by_number:
            return f"{len(self._source):,} examples; each batch is a function of (seed, step)"
        how = "the iterator's state, saved" if self._savable else "counted; a resumed run skips the batches it has seen"
        return f"a tf.data.Dataset; the position in it is {how}"

    def open(self, step: int, folder: pathlib.Path | None = None):
        """Returns an iterator whose first batch is that of `step`: dicts of tensors, of which `of_this_worker` is the share.

        Args:
            step: any number opens as fast as 0, but in a dataset whose position is counted.
            folder: where `save` was called at this step.
        """
        saved = self._savable and folder is not None and (folder / f"{_ITERATOR}.index").exists()
        self._iterator = iter(self._dataset(0 if saved else step))
        if saved:
            tf.train.Checkpoint(iterator=self._iterator).read(str(folder / _ITERATOR)).assert_consumed()
        return self._iterator

    def read(self, step: int):
        """Returns an iterator like that of `open`, beside it; only where batches are read by number."""
        return iter(self._dataset(step))

    def save(self, folder: pathlib.Path) -> None:
        """Writes the position to `folder`, where it is more than the step."""
        if self._savable and self._iterator is not None:
            tf.train.Checkpoint(iterator=self._iterator).write(str(folder / _ITERATOR))

    def _dataset(self, step: int) -> tf.data.Dataset:
        if self.by_number:
            return _numbered(self._source, self._batch, self._batch_size, step, _END)
        return self._source.dataset.repeat().skip(step)

    @as_written
    def of_this_worker(self, batch: dict) -> dict:
        """Returns this worker's share of what the iterator yields; in the graph.

        A user's dataset yields global batches on every worker, so that the position in it is the same on all of them, and the
        chief's holds for all.
        """
        places = _places(self._batch_size, self._strategy)
        if self.by_number or len(places) == self._batch_size:
            return batch
        return {name: tensor[places.start : places.stop] for name, tensor in batch.items()}

    def _batch(self, step: tf.Tensor, read) -> dict:
        places = _places(self._batch_size, self._strategy)
        return read(order.training(step, places, batch_size=self._batch_size, examples=len(self._source), seed=self._seed))

    def _can_be_saved(self) -> bool:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(tf.errors.OpError):
            # Without tuning TensorFlow does not read ahead by itself: a shuffle's later epochs take their seeds from one place
            # that all iterators of a dataset share.
            options = tf.data.Options()
            options.autotune.enabled = False
            iterator = iter(self._dataset(0).with_options(options))
            next(iterator, None)  # what stands behind a shuffle is only opened, and can only refuse, once it is asked
            tf.train.Checkpoint(iterator=iterator).write(os.path.join(folder, _ITERATOR))
            return True
        return False


def eval_dataset(source: AnySource, *, batch_size: int, strategy: tf.distribute.Strategy) -> tf.data.Dataset:
    """Returns the batches of one evaluation: every example once, in order; the last batch is padded with a weight of 0.

    Args:
        source: the examples.
        batch_size: of the global batch.
        strategy: its replicas share each global batch, as evenly as it goes.

    Returns:
        A dataset of `eval_steps(source, batch_size)` dicts of tensors [batch_size / workers, ...] (rounded up to a
        multiple of the replicas), with "weight" beside the source's own; `replica_share` cuts them up.
    """
    places = _places(batch_size, strategy)
    if isinstance(source, DatasetSource):
        return source.dataset.map(lambda batch: _padded(batch, places, batch_size))

    def batch(step, read):
        index, weight = order.evaluation(step, places, batch_size=batch_size, examples=len(source))
        return _weighted(read(index), weight)

    return _numbered(source, batch, batch_size, 0, eval_steps(source, batch_size))


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


@as_written
def replica_share(batch: dict, strategy: tf.distribute.Strategy) -> dict:
    """Returns this replica's share of its worker's batch; in a replica.

    It is cut on the host, so that each device is sent its share only; a TPU's program cannot be left for that.
    """
    devices = local_devices(strategy)
    if len(devices) == 1:
        return batch
    index = tf.distribute.get_replica_context().replica_id_in_sync_group % len(devices)

    def share(value):
        size = value.shape[0] // len(devices)
        return tf.ensure_shape(value[index * size : (index + 1) * size], [size, *value.shape[1:]])

    with contextlib.nullcontext() if "TPU" in devices[0] else tf.device("CPU:0"):
        return tf.nest.map_structure(share, batch)


def _numbered(source, batch, examples: int, start: int, end: int) -> tf.data.Dataset:
    """Returns the dataset of the batches of the steps from `start` to `end`.

    Small batches in memory are gathered many at a time: to hand one on from thread to thread takes longer than to gather it.

    Args:
        source: the examples.
        batch: batch(steps, read) -> the batches of steps, int64 [...]; `read` gets examples by their numbers.
        examples: in a batch.
        start: the first step.
        end: the one behind the last.
    """
    read = source.open()
    options = tf.data.Options()
    options.autotune.enabled = False  # holds the same thread; and there is nothing to tune
    steps = tf.data.Dataset.range(start, end)
    in_memory = isinstance(source, Source) and source.in_memory
    many = min(_BYTES_AT_ONCE // (_bytes(source) * examples), _BATCHES_AT_ONCE) if in_memory else 1

    def gathered(step):
        return batch(step, read)

    if many > 1:
        batches = steps.batch(many).map(gathered).prefetch(1).unbatch()
    else:
        parallel = None if in_memory else 2  # what only copies memory is as fast in one thread
        batches = steps.map(gathered, num_parallel_calls=parallel).prefetch(4)
    return batches.with_options(options)


def _bytes(source: Source) -> float:
    """Returns how many bytes one example takes, at least one; infinitely many if it holds strings, whose lengths differ."""
    if any(spec.dtype == tf.string for spec in source.spec.values()):
        return math.inf
    return max(sum(spec.shape.num_elements() * spec.dtype.size for spec in source.spec.values()), 1)


@as_written
def _places(batch_size: int, strategy: tf.distribute.Strategy) -> range:
    """Returns which places of the global batch belong to the replicas of this worker."""
    workers = Workers(strategy)
    return order.shard(
        batch_size, workers.index * workers.local_replicas, workers.local_replicas, strategy.num_replicas_in_sync
    )


@as_written
def _padded(batch: dict, places: range, batch_size: int) -> dict:
    """Returns the places of a batch that may have fewer examples than `batch_size`, with their weights."""
    count = tf.shape(next(iter(batch.values())))[0]
    with tf.control_dependencies(
        [tf.debugging.assert_less_equal(count, batch_size, "a batch is larger than config.data.eval_batch_size")]
    ):
        index = tf.range(places.start, places.stop)
    rows = {name: tf.gather(tensor, tf.minimum(index, count - 1)) for name, tensor in batch.items()}
    return _weighted(rows, tf.cast(index < count, tf.float32))


@as_written
def _weighted(rows: dict, weight: tf.Tensor) -> dict:
    """Returns the rows with their weights, which are also those that the examples bring, where they do."""
    own = tf.cast(rows["weight"], tf.float32) if "weight" in rows else 1.0
    return {**rows, "weight": weight * own}
