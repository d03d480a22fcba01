"""The loss scale itself: its value, when it grows, when it backs off."""

import tensorflow as tf


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
        if not growth_factor > 1:
            raise ValueError(f"growth_factor is {growth_factor}: it must be above 1")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor is {backoff_factor}: it must lie between 0 and 1")
        if growth_interval < 1 or hysteresis < 1:
            raise ValueError(f"growth_interval is {growth_interval}, hysteresis is {hysteresis}: each must be at least 1")
        if not 0 < initial_scale <= float(tf.float32.max):
            raise ValueError(f"initial_scale is {initial_scale}: it must be a number above 0 that float32 can hold")
        if dynamic and not 0 < min_scale <= initial_scale <= max_scale <= float(tf.float32.max):
            raise ValueError(f"initial_scale is {initial_scale}: it must lie between min_scale {min_scale} and {max_scale}")
        self.dynamic = dynamic
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.hysteresis = hysteresis
        self.is_one = not dynamic and initial_scale == 1  # known while tracing, so that it costs nothing
        self.value = shared_scalar(initial_scale, tf.float32, "loss_scale")
        self.applied_in_a_row = shared_scalar(0, tf.int64, "applied_in_a_row")
        self.hysteresis_left = shared_scalar(hysteresis, tf.int64, "hysteresis_left")

    def multiply(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns a float32 loss times the scale."""
        return loss if self.is_one else loss * self.value

    def divide(self, values: tf.Tensor) -> tf.Tensor:
        """Returns float32 values divided by the scale."""
        return values if self.is_one else values / self.value

    def adapt(self, applied: tf.Tensor) -> None:
        """Takes note of one step that was applied or skipped (a bool scalar), and moves the scale."""
        if not self.dynamic:
            return
        in_a_row = tf.where(applied, self.applied_in_a_row + 1, 0)
        grow = in_a_row >= self.growth_interval  # not ==: a counter restored past the interval grows at once
        left = tf.where(applied, tf.convert_to_tensor(self.hysteresis_left), self.hysteresis_left - 1)
        shrink = tf.logical_and(tf.logical_not(applied), left <= 0)
        scale = tf.convert_to_tensor(self.value)
        higher = tf.minimum(scale * self.growth_factor, self.max_scale)
        lower = tf.maximum(scale * self.backoff_factor, self.min_scale)
        self.value.assign(tf.where(grow, higher, tf.where(shrink, lower, scale)))
        self.applied_in_a_row.assign(tf.where(grow, tf.zeros_like(in_a_row), in_a_row))
        self.hysteresis_left.assign(tf.where(grow, tf.cast(self.hysteresis, tf.int64), tf.maximum(left, 0)))
