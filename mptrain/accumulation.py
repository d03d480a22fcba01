"""Sums of gradients over a window of steps, and averages of weights over all of them: each replica's own, in float32.

The sums are dense, because the rows that a window will touch are not known when it starts. An optimizer that leaves rows
without a gradient alone, as tf_keras's legacy SGD and RMSprop with momentum do, therefore moves them at the end of a window,
by their momentum, where it would not have moved them in a step with the large batch.
"""

from collections.abc import Iterable, Mapping, Sequence

import tensorflow as tf

from mptrain import keras_compat
from mptrain.autograph import as_written
from mptrain.dynamic_scale import shared_scalar
from mptrain.gradients import add_to_dense


class GradientSums(tf.Module):
    """Adds up each replica's gradients over `steps` steps, without communication.

    Attributes:
        done: the steps of the window so far.
        sums: path -> the sum of a variable's gradients; reading it across replicas adds the replicas' sums up.
        places: which of the variables have gradients, known once the first step is traced.

    Args:
        variables: path -> trained variable.
        steps: length of the window.
    """

    def __init__(self, variables: Mapping[str, tf.Variable], steps: int):
        super().__init__(name="gradient_sums")
        self._steps = steps
        self.places = None
        self.done = shared_scalar(0, tf.int64, "accumulated_steps")
        self.sums = {
            path: tf.Variable(
                tf.zeros(variable.shape),
                trainable=False,
                name="gradient_sum",
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for path, variable in variables.items()
        }

    @as_written
    def starts(self) -> tf.Tensor:
        """Whether the next step is the first of a window, bool scalar."""
        return tf.equal(self.done, 0)

    @as_written
    def add(self, places: Sequence[int], gradients: Sequence) -> None:
        """Adds this replica's gradients, in float32. Where a window starts, the sums start from zero.

        Args:
            places: the places of the variables, in ascending order.
            gradients: one for each place, dense or `tf.IndexedSlices`.

        Raises:
            ValueError: if other variables had gradients in an earlier step. The update at the window's end must know which
                ones to leave alone, and a step's graph knows only its own.
        """
        if self.places is None:
            self.places = tuple(places)
        if tuple(places) != tuple(self.places):
            paths = list(self.sums)
            both = ", ".join(paths[place] for place in sorted(set(places) ^ set(self.places)))
            raise ValueError(
                f"with accumulation every step must have gradients of the same variables, and {both} had one in some steps"
                " only: use one optimizer for each set of variables"
            )
        starts = self.starts()
        for total, gradient in zip(self._used(), gradients, strict=True):
            before = tf.where(starts, tf.zeros_like(total), tf.convert_to_tensor(total))
            total.assign(add_to_dense(before, gradient))

    @as_written
    def means(self) -> list[tf.Tensor]:
        """Returns this replica's sums divided by the length of the window, one for each of `places`."""
        return [tf.convert_to_tensor(total) / self._steps for total in self._used()]

    @as_written
    def count(self) -> tf.Tensor:
        """Counts one step; returns whether it ended the window, bool scalar."""
        done = (self.done + 1) % self._steps
        self.done.assign(done)
        return tf.equal(done, 0)

    def _used(self) -> list[tf.Variable]:
        sums = list(self.sums.values())
        return [sums[place] for place in self.places]


class WeightAverage(tf.Module):
    """An exponential moving average of weights (Polyak and Juditsky, 1992), used in evaluation and export.

    It starts at the first update, from the weights as they are then: whatever was loaded after the model was built counts,
    the random initial values do not.

    Attributes:
        averages: path -> the average.
        updates: how often it was moved, int64 scalar; 0: there is no average yet.

    Args:
        variables: the trained variables.
        momentum: share of the average that stays at each update, in (0, 1).
    """

    def __init__(self, variables: Iterable, momentum: float):
        super().__init__(name="weight_average")
        self._momentum = momentum
        self._variables = keras_compat.variables_by_path(variables)
        self.updates = shared_scalar(0, tf.int64, "averaged_updates")
        self.averages = {
            path: tf.Variable(
                tf.identity(variable),
                trainable=False,
                name="average",
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
            for path, variable in self._variables.items()
        }

    def update(self) -> None:
        """Moves the average towards the weights; in a replica or across them."""
        keep = tf.where(tf.equal(self.updates, 0), 0.0, self._momentum)
        for path, variable in self._variables.items():
            weights, average = tf.convert_to_tensor(variable), self.averages[path]
            average.assign(weights + tf.cast(keep, weights.dtype) * (average - weights))
        self.updates.assign(self.updates + 1)

    def swap(self) -> None:
        """Exchanges weights and averages; on the host, between steps. A second call puts them back."""
        if int(self.updates.numpy()) == 0:
            return
        for path, variable in self._variables.items():
            weights, average = tf.identity(variable), tf.identity(self.averages[path])
            variable.assign(average)
            self.averages[path].assign(weights)
