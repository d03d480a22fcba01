"""Dropout and noise as functions of (seed, step, replica), augmentation as one of (seed, step, example).

Keras 3's seed generators keep a counter that is advanced at each call: state that must be saved, that differs between
replicas, and that moves on when a step is skipped. Bound to the step, a generator needs no state: the same step draws the
same numbers in a run that was killed and resumed, and replicas draw different ones.
"""

from collections.abc import Callable

import tensorflow as tf

from mptrain import keras_compat
from mptrain.autograph import as_written


class StepRandomness(tf.Module):
    """Seeds for everything random in one train step. Create it in the strategy's scope.

    Args:
        seed: the run's seed.
        step: the scalar int64 variable that counts attempted steps.
        batch_size: of the global batch.
    """

    def __init__(self, seed: int, step: tf.Variable, batch_size: int):
        super().__init__(name="step_randomness")
        self._seed = seed
        self._step = step
        self._batch_size = batch_size
        self._draws = tf.Variable(  # each replica counts its own, in the graph, so that loops draw anew in each turn
            0,
            dtype=tf.int64,
            trainable=False,
            name="draws",
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    @as_written
    def begin_step(self) -> None:
        """Starts the numbering of draws afresh; called where a replica's step begins."""
        self._draws.assign(0)

    def draw(self, stream: int = 0) -> tf.Tensor:
        """Returns a seed for stateless random operations, int32 [2], another one at each call in a step; in a replica.

        Args:
            stream: separates users who draw independently, such as layers.
        """
        return self._folded(stream, tf.distribute.get_replica_context().replica_id_in_sync_group)

    @as_written
    def per_example(self, count: int) -> tf.Tensor:
        """Returns random numbers for each example of this replica's batch, float32 in [0, 1), [replica batch, count].

        They depend on the seed, the step, the example's place in the global batch and the number of the call in the step,
        and not on the number of replicas.
        """
        return self._per_example(tf.random.stateless_uniform, count)

    def normal_per_example(self, count: int) -> tf.Tensor:
        """Returns what `per_example` returns, from the standard normal distribution."""
        return self._per_example(tf.random.stateless_normal, count)

    def _per_example(self, distribution: Callable, count: int) -> tf.Tensor:
        replica = tf.distribute.get_replica_context()
        numbers = distribution([self._batch_size, count], self._folded(0))
        share = self._batch_size // replica.num_replicas_in_sync
        first = replica.replica_id_in_sync_group * share
        return tf.ensure_shape(numbers[first : first + share], [share, count])

    def _folded(self, stream: int, *more) -> tf.Tensor:
        self._draws.assign_add(1)
        seed = tf.constant([self._seed, stream], tf.int32)
        for number in (self._draws, *more, self._step):
            seed = tf.random.experimental.stateless_fold_in(seed, tf.cast(number, tf.int64))
        return seed

    def bind(self, model) -> None:
        """Makes dropout and noise of a Keras model draw from here."""
        keras_compat.bind_seeds(model, self.draw)
