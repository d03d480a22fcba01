"""Dropout and noise as functions of (seed, step, replica).

Keras 3's seed generators keep a counter that is advanced at each call: state that must be saved, that differs between
replicas, and that moves on when a step is skipped. Bound to the step, a generator needs no state: the same step draws the
same numbers in a run that was killed and resumed, and replicas draw different ones.
"""

import threading

import tensorflow as tf

from mptrain import keras_compat


class StepRandomness:
    """Seeds for everything random in one train step.

    Args:
        seed: the run's seed.
        step: the scalar int64 variable that counts attempted steps.
    """

    def __init__(self, seed: int, step: tf.Variable):
        self._seed = seed
        self._step = step
        self._calls = threading.local()  # replicas are traced in threads of their own

    def begin_step(self) -> None:
        """Starts the numbering of draws afresh; called where the tracing of a replica's step begins."""
        self._calls.count = 0

    def draw(self, stream: int = 0) -> tf.Tensor:
        """Returns a seed for stateless random operations, int32 [2], another one at each call in a step.

        Args:
            stream: separates users who draw independently, such as layers.
        """
        self._calls.count = getattr(self._calls, "count", 0) + 1
        replica = tf.distribute.get_replica_context()
        seed = tf.constant([self._seed, stream], tf.int32)
        for number in (self._calls.count, replica.replica_id_in_sync_group if replica else 0, self._step):
            seed = tf.random.experimental.stateless_fold_in(seed, tf.cast(number, tf.int64))
        return seed

    def bind(self, model) -> None:
        """Makes the seed generators of a Keras 3 model draw from here; other models are left alone."""
        for stream, generator in enumerate(keras_compat.seed_generators(model), start=1):
            generator.next = lambda ordered=True, stream=stream: self.draw(stream)
