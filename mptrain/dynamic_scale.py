"""The loss scale itself: its value, when it grows, when it backs off."""

from collections.abc import Callable

import tensorflow as tf

from mptrain.arguments import FLOAT32_MAX, check_between, check_count, check_flag, check_positive
from mptrain.autograph import as_written
from mptrain.replicas import set_aside


def shared_scalar(value, dtype: tf.DType, name: str) -> tf.Variable:
    """Returns a scalar variable that holds the same on every replica."""
    return tf.Variable(value, dtype=dtype, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


class DynamicScale(tf.Module):
    """A loss scale that adapts, or one that stays.

    After an overflow the scale is multiplied by `backoff_factor`, once `hysteresis` overflows have been seen since it last
    grew (Shoeybi et al., "Megatron-LM", 2019); after `growth_interval` applied steps in a row by `growth_factor`
    (Micikevicius et al., 2018).

    Args: as `LossScaleOptimizer` takes them.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        *,
        dynamic: bool,
        initial_scale: float,
        growth_interval: int,
        growth_factor: float,
        backoff_factor: float,
        min_scale: float,
        max_scale: float,
        hysteresis: int,
    ):
        super().__init__(name="dynamic_scale")
        check_flag("dynamic", dynamic)
        check_count("growth_interval", growth_interval)
        check_count("hysteresis", hysteresis)
        check_between("growth_factor", growth_factor, 1.0, FLOAT32_MAX)
        check_between("backoff_factor", backoff_factor, 0.0, 1.0)
        for name, scale in (("initial_scale", initial_scale), ("min_scale", min_scale), ("max_scale", max_scale)):
            check_positive(name, scale)
        if min_scale > max_scale:
            raise ValueError(f"min_scale is {min_scale}, max_scale is {max_scale}: the first must not be above the second")
        if dynamic and not min_scale <= initial_scale <= max_scale:
            raise ValueError(
                f"initial_scale is {initial_scale}: it must lie between min_scale, {min_scale}, and max_scale, {max_scale}"
            )
        self.dynamic = dynamic
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.hysteresis = hysteresis
        self.initial_scale = initial_scale
        self.value = shared_scalar(initial_scale, tf.float32, "loss_scale")
        self.applied_in_a_row = shared_scalar(0, tf.int64, "applied_in_a_row")
        self.hysteresis_left = shared_scalar(hysteresis, tf.int64, "hysteresis_left")

    @property
    def used(self) -> tf.Tensor:
        """The scale that losses are multiplied by, float32 scalar; a static one is the configured one, always.

        A checkpoint may have been written with another, or with a dynamic one.
        """
        return tf.convert_to_tensor(self.value) if self.dynamic else tf.constant(self.initial_scale, tf.float32)

    @as_written
    def multiply(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns a float32 loss times the scale."""
        return loss if self._is_one else loss * self.used

    @as_written
    def divider(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """Returns what divides float32 values by the scale, which is read once for all of them."""
        if self._is_one:
            return lambda values: values
        scale = self.used
        return lambda values: values / scale

    def start_from(self, scale: float, applied_in_a_row: int) -> None:
        """Goes on from a scale, moved into the range, and a count of applied updates; on the host."""
        self.value.assign(min(max(scale, self.min_scale), self.max_scale))
        self.applied_in_a_row.assign(applied_in_a_row)

    @as_written
    def adapt(self, applied: tf.Tensor) -> None:
        """Takes note of one update that was applied or skipped (a bool scalar), and moves the scale."""
        if not self.dynamic:
            return
        in_a_row = self.applied_in_a_row + 1
        in_range = tf.logical_and(self.value >= self.min_scale, self.value <= self.max_scale)
        stays = tf.logical_and(tf.logical_and(applied, in_a_row < self.growth_interval), in_range)

        def count():
            self.applied_in_a_row.assign(in_a_row)
            return tf.constant(False)

        def move():
            self._move(applied, in_a_row)
            return tf.constant(True)

        tf.cond(stays, count, set_aside(move))  # two thousand times for once, so only what says that is in each step

    def _move(self, applied: tf.Tensor, in_a_row: tf.Tensor) -> None:
        in_a_row = tf.where(applied, in_a_row, 0)
        grow = in_a_row >= self.growth_interval  # not ==: a counter restored past the interval grows at once
        left = tf.where(applied, tf.convert_to_tensor(self.hysteresis_left), self.hysteresis_left - 1)
        shrink = tf.logical_and(tf.logical_not(applied), left <= 0)
        factor = tf.where(grow, self.growth_factor, tf.where(shrink, self.backoff_factor, 1.0))
        # A restored scale may lie anywhere: one out of range comes back into it, and inf or NaN starts from the floor.
        scale = tf.where(tf.math.is_finite(self.value), self.value, self.min_scale)
        self.value.assign(tf.clip_by_value(scale * factor, self.min_scale, self.max_scale))
        self.applied_in_a_row.assign(tf.where(grow, tf.zeros_like(in_a_row), in_a_row))
        self.hysteresis_left.assign(tf.where(grow, tf.cast(self.hysteresis, tf.int64), tf.maximum(left, 0)))

    @property
    def _is_one(self) -> bool:  # known while tracing, so that a scale of 1 costs nothing
        return not self.dynamic and self.initial_scale == 1
