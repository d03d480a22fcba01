"""What a skipped update must leave untouched beside the weights: BatchNorm's statistics, metrics, any variable of the step.

A forward pass that overflows writes inf into BatchNorm's moving statistics, where it stays for ever: the training loss looks
fine, evaluation is NaN. Keras 2, Keras 3, PyTorch and Flax all keep it.
"""

from collections.abc import Callable, Iterable, Mapping

import tensorflow as tf

from mptrain import keras_compat
from mptrain.autograph import as_written
from mptrain.loss_scale import LossScaleOptimizer
from mptrain.several_optimizers import Optimizers


class StateGuard(tf.Module):
    """Puts variables back to what they were where the step, or the accumulation window, was skipped.

    Of several optimizers a skipped one puts back the statistics in its own part of the model; the others, and what is local,
    go back where any of them skipped.

    Args:
        optimizer: tells where windows start, and which part of the model is whose.
        statistics: variables that are averaged over the replicas after each step, so that all of them hold the same.
        local: variables of which each replica has its own, such as those of metrics.
    """

    def __init__(self, optimizer: LossScaleOptimizer | Optimizers, statistics: Iterable, local: Iterable = ()):
        super().__init__(name="state_guard")
        self._optimizer = optimizer
        self._statistics = [keras_compat.raw(variable) for variable in statistics]
        self._local = [keras_compat.raw(variable) for variable in local]
        self._owners = [None] * len(self._statistics + self._local)
        if isinstance(optimizer, Optimizers):
            self._owners = [optimizer.owner(variable) for variable in self._statistics + self._local]
        self._saved = None
        if optimizer.accumulation_steps > 1:  # a window outlives the step, so what it began with must be a variable
            self._saved = [_copy(variable) for variable in self._statistics + self._local]

    def __call__(self, step: Callable[[], tf.Tensor | Mapping[str, tf.Tensor]]) -> tf.Tensor | Mapping[str, tf.Tensor]:
        """Runs `step` in a replica and returns what it returned.

        Args:
            step: returns whether nothing was skipped, a bool scalar; with several optimizers {name: bool scalar}.
        """
        before, own = self._before()
        applied = step()
        self._after(applied, before, own)
        return applied

    @as_written
    def _before(self) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Returns what all variables go back to where a step is skipped, and what this replica's statistics are now."""
        variables = self._statistics + self._local
        before = [tf.identity(variable) for variable in variables]
        if self._saved:
            starts = self._optimizer.window_starts()
            for index, saved in enumerate(self._saved):
                before[index] = tf.where(starts, before[index], tf.convert_to_tensor(saved))
                saved.assign(before[index])
        return before, [tf.identity(variable) for variable in self._statistics]

    @as_written
    def _after(self, applied: tf.Tensor | Mapping[str, tf.Tensor], before: list[tf.Tensor], own: list[tf.Tensor]) -> None:
        """Averages the statistics over the replicas, and puts back what belongs to an optimizer that skipped."""
        variables = self._statistics + self._local
        verdicts = applied if isinstance(applied, Mapping) else {}
        everything = tf.reduce_all(list(verdicts.values())) if verdicts else applied
        shared = len(self._statistics) if _is_distributed(self._statistics) else 0
        averaged = _averaged(variables[:shared], own)
        for variable, owner, old, new in zip(variables, self._owners, before, averaged, strict=False):
            variable.assign(tf.where(verdicts.get(owner, everything), new, old))
        for owner in dict.fromkeys(self._owners[shared:]):
            places = [place for place in range(shared, len(variables)) if self._owners[place] == owner]
            _restore_unless(verdicts.get(owner, everything), [(variables[place], before[place]) for place in places])


def _restore_unless(applied: tf.Tensor, pairs: list[tuple[tf.Variable, tf.Tensor]]) -> None:
    """Gives variables their values of before where nothing was applied; a branch costs nothing where it is not taken."""

    def restore() -> None:
        for variable, old in pairs:
            variable.assign(old, read_value=False)

    tf.cond(applied, lambda: None, restore)


def _is_distributed(variables: list[tf.Variable]) -> bool:
    """Whether replicas share the variables: then they are averaged, and a branch must not hold what writes to all of them."""
    return any(isinstance(variable, tf.distribute.DistributedValues) for variable in variables)


def _copy(variable: tf.Variable) -> tf.Variable:
    return tf.Variable(
        tf.zeros(variable.shape, variable.dtype),
        trainable=False,
        name="saved",
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def _averaged(variables: list[tf.Variable], before: list[tf.Tensor]) -> list[tf.Tensor]:
    """Returns what floating variables were plus the mean, over the replicas, of what the step added; others as they are.

    The mean of the changes, not of the values: what did not change keeps its bits, where (x + x + x) / 3 need not be x.
    """
    values = [tf.identity(variable) for variable in variables]
    floating = [index for index, value in enumerate(values) if value.dtype.is_floating]
    replica = tf.distribute.get_replica_context()
    if floating and replica.num_replicas_in_sync > 1:
        changes = [values[index] - before[index] for index in floating]
        means = replica.all_reduce(tf.distribute.ReduceOp.MEAN, changes)
        for index, mean in zip(floating, means, strict=True):
            values[index] = before[index] + mean
    return values
