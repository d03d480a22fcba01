"""Sums of gradients over a window of steps, and averages of weights over all of them: each replica's own, in float32."""

from collections.abc import Iterable

import tensorflow as tf

from mptrain import keras_compat
from mptrain.dynamic_scale import shared_scalar


class GradientSums(tf.Module):
    """Adds up each replica's gradients over `steps` steps, without communication.

    Args:
        variables: the trained variables.
        steps: length of the window.
    """

    def __init__(self, variables: Iterable, steps: int):
        super().__init__(name="gradient_sums")
        self._steps = steps
        self.done = shared_scalar(0, tf.int64, "accumulated_steps")
        self.sums = [
            tf.Variable(
                tf.zeros(variable.shape),
                trainable=False,
                name="gradient_sum",
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for variable in variables
        ]

    def starts(self) -> tf.Tensor:
        """Whether the next step is the first of a window, bool scalar."""
        return tf.equal(self.done, 0)

    def add(self, gradients: list) -> None:
        """Adds this replica's gradients, in float32; None adds nothing. Where a window starts, the sums start from zero."""
        starts = self.starts()
        for total, gradient in zip(self.sums, gradients, strict=True):
            before = tf.where(starts, tf.zeros_like(total), tf.convert_to_tensor(total))
            if isinstance(gradient, tf.IndexedSlices):
                before = tf.tensor_scatter_nd_add(before, gradient.indices[:, tf.newaxis], gradient.values)
            elif gradient is not None:
                before += gradient
            total.assign(before)

    def means(self) -> list[tf.Tensor]:
        """Returns this replica's sums divided by the length of the window."""
        return [tf.convert_to_tensor(total) / self._steps for total in self.sums]

    def count(self) -> tf.Tensor:
        """Counts one step; returns whether it ended the window, bool scalar."""
        done = (self.done + 1) % self._steps
        self.done.assign(done)
        return tf.equal(done, 0)


class WeightAverage(tf.Module):
    """An exponential moving average of weights (Polyak and Juditsky, 1992), used in evaluation and export.

    Args:
        variables: the trained variables; the average starts from their values.
        momentum: share of the average that stays at each update, in (0, 1).
    """

    def __init__(self, variables: Iterable, momentum: float):
        super().__init__(name="weight_average")
        self._momentum = momentum
        self._variables = keras_compat.variables_by_path(variables)
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
        for path, variable in self._variables.items():
            average = self.averages[path]
            average.assign(average + (1.0 - self._momentum) * (tf.convert_to_tensor(variable) - average))

    def swap(self) -> None:
        """Exchanges weights and averages; on the host, between steps. A second call puts them back."""
        for path, variable in self._variables.items():
            weights, average = tf.identity(variable), tf.identity(self.averages[path])
            variable.assign(average)
            self.averages[path].assign(weights)
