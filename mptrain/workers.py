"""The worker processes of a strategy: which one this is, and what all of them agree on.

What is decided from a clock, a signal or a file may differ between workers, and a worker that goes another way than the rest
makes them wait for ever. So every such decision is made from `gather`ed values, at the same place in all of them.
"""

import contextlib
import functools
import json
import re
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf

from mptrain.errors import InputError, RunError

# What TensorFlow raises where another worker has gone; which one of them depends on what was going on.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)


def local_devices(strategy: tf.distribute.Strategy) -> tuple[str, ...]:
    """Returns the names of the devices of this worker's replicas."""
    try:
        return tuple(strategy.extended.worker_devices)
    except RuntimeError:  # the default strategy refuses to tell: TensorFlow takes the first GPU where there is one
        return ("GPU:0",) if tf.config.list_logical_devices("GPU") else ("CPU:0",)


class Workers:
    """The worker processes of a strategy; one, for strategies of one process.

    Attributes:
        count: how many there are.
        index: which one this is; that of the chief is 0.
        local_replicas: replicas in each of them.

    Args:
        strategy: the run's strategy.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy
        self.local_replicas = len(local_devices(strategy))
        self.count = strategy.num_replicas_in_sync // self.local_replicas
        self.index = _index(strategy) if self.count > 1 else 0

    def __str__(self) -> str:
        return f"worker {self.index} of {self.count}"

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that writes and prints."""
        return self.index == 0

    def gather(self, *values: float) -> np.ndarray:
        """Returns the values of all workers, float64 [count, len(values)]; all must call it, and none may give a NaN."""
        if self.count == 1:
            return np.array([values], np.float64)
        rows = np.zeros((self.count, len(values)))
        rows[self.index] = values
        return self._sum(tf.constant(rows)).numpy()

    def largest(self, value: float) -> float:
        """Returns the largest of all workers' values; all must call it."""
        return float(self.gather(value).max())

    def of_chief(self, value: float) -> float:
        """Returns the chief's value; all must call it."""
        return float(self.gather(value)[0, 0])

    def check_same(self, values: Mapping[str, object]) -> None:
        """Checks that all workers were given the same; all must call it.

        Args:
            values: name -> what can be written as JSON.

        Raises:
            InputError: naming a value that another worker has otherwise.
        """
        texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in sorted(values.items())}
        names = self.gather(len(texts), _checksum("".join(texts)))
        if (names != names[0]).any():
            raise InputError("the workers run different versions of mptrain: install the same one on all of them")
        sums = self.gather(*(_checksum(text) for text in texts.values()))
        for name, column in zip(texts, sums.T, strict=True):
            if (others := np.flatnonzero(column != column[0])).size:
                here = f"{texts[name]} on worker {self.index}"
                raise InputError(
                    f"{name} is {here} and worker {others[0]} has another one than the chief: start all workers alike"
                )

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Errors that leave this context say which worker they come from, and that a lost worker was lost.

        Raises:
            RunError: where TensorFlow says that another worker has gone.
        """
        if self.count == 1:
            yield
            return
        try:
            yield
        except _LOST as error:
            raise RunError(
                f"{self}: another worker has gone, so this one stops: start all again to go on from the last checkpoint"
                f" ({reason(error)})"
            ) from error
        except (InputError, RunError) as error:
            raise type(error)(f"{self}: {error}") from error

    @functools.cached_property
    def _sum(self):
        @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float64)])
        def total(rows: tf.Tensor) -> tf.Tensor:
            return self._strategy.experimental_local_results(self._strategy.run(self._sum_in_replica, args=(rows,)))[0]

        return total

    def _sum_in_replica(self, rows: tf.Tensor) -> tf.Tensor:
        replica = tf.distribute.get_replica_context()
        speaks = replica.replica_id_in_sync_group % self.local_replicas == 0  # one replica for each worker
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, rows * tf.cast(speaks, rows.dtype))


def reason(error: tf.errors.OpError) -> str:
    """Returns the one line of TensorFlow's message that says what happened, without the graph's names and traces around it."""
    text = re.sub(r"\[\[.*?\]\]|\{\{.*?\}\}|\[Op:.*?\]", "", error.message.split("Additional GRPC error")[0])
    if aborted := re.search(r"Collective ops is aborted by.*", text):
        return aborted[0].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1]


def _index(strategy: tf.distribute.Strategy) -> int:
    """Returns the place of this worker in the order of the replicas, in which a task called "chief" stands first."""
    resolver = strategy.cluster_resolver
    after_chief = resolver.task_type == "worker" and "chief" in resolver.cluster_spec().jobs
    return resolver.task_id + (1 if after_chief else 0)


def _checksum(text: str) -> float:
    return float(zlib.crc32(text.encode()))
