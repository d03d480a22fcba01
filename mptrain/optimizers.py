"""Optimizer and learning-rate schedule from a config."""

import math
from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import optimizer_check
from mptrain.dynamic_scale import shared_scalar
from mptrain.inner_optimizer import change_learning_rate
from mptrain.loss_scale import LossScaleOptimizer
from mptrain.parameter_groups import Group, GroupedOptimizer


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to a peak, then constant, cosine, linear, inverse square root or piecewise constant.

    Args:
        peak: learning rate at the end of the warm-up.
        name: "constant", "cosine" (Loshchilov and Hutter, 2017), "linear", "rsqrt" (Vaswani et al., 2017) or "piecewise".
        warmup_steps: applied updates over which the rate rises from 0; the first one takes peak / warmup_steps.
        total_steps: applied updates at which cosine and linear reach their end.
        end_factor: the end of cosine and linear, as a share of the peak.
        boundaries: piecewise: the updates, ascending, from which on the next of `factors` holds; before the first one it is 1.
        factors: piecewise: shares of the peak.
    """

    def __init__(
        self,
        peak: float,
        name: str,
        warmup_steps: int,
        total_steps: int,
        end_factor: float,
        boundaries: Sequence[int] = (),
        factors: Sequence[float] = (),
    ):
        self.peak = peak
        self.name = name
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.end_factor = end_factor
        self.boundaries = tuple(boundaries)
        self.factors = tuple(factors)

    def __call__(self, step) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        warmup = tf.minimum((step + 1.0) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        done = tf.clip_by_value((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 0.0, 1.0)
        decay = {
            "constant": lambda: 1.0,
            "cosine": lambda: self._from_one_to_end(0.5 * (1.0 + tf.cos(math.pi * done))),
            "linear": lambda: self._from_one_to_end(1.0 - done),
            "rsqrt": lambda: tf.math.rsqrt(tf.maximum(step + 1.0, self.warmup_steps) / max(self.warmup_steps, 1)),
            "piecewise": lambda: self._factor_at(step),
        }[self.name]()
        return tf.convert_to_tensor(self.peak * warmup * decay, tf.float32)

    def _from_one_to_end(self, share):
        return self.end_factor + (1.0 - self.end_factor) * share

    def _factor_at(self, step):
        passed = tf.reduce_sum(tf.cast(step >= tf.constant(self.boundaries, tf.float32), tf.int32))
        return tf.gather(tf.constant([1.0, *self.factors]), passed)

    def get_config(self) -> dict:
        names = ("peak", "name", "warmup_steps", "total_steps", "end_factor", "boundaries", "factors")
        return {name: getattr(self, name) for name in names}


class Scaled(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule times a factor."""

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, factor: float):
        self.schedule = schedule
        self.factor = factor

    def __call__(self, step) -> tf.Tensor:
        return self.factor * self.schedule(step)

    def get_config(self) -> dict:
        return {"schedule": self.schedule, "factor": self.factor}


def build(config: ConfigDict, total_steps: int, *, scaled: bool) -> LossScaleOptimizer:
    """Returns the optimizer that `config` describes, with loss scaling where it is needed.

    Args:
        config: the whole run's config, durations in steps: optimizer, schedule and loss_scale are read.
        total_steps: length of the run, for the schedule.
        scaled: whether the loss is scaled, as float16 needs; otherwise the scale is 1.
    """
    return wrap(_inner(config, schedule(config, total_steps)), config, scaled=scaled)


def wrap(inner, config: ConfigDict, *, scaled: bool) -> LossScaleOptimizer:
    """Returns an optimizer of one's own with the loss scaling, clipping, accumulation and averaging that `config` describes.

    Args:
        inner: what a `LossScaleOptimizer` can wrap, such as a Keras optimizer.
        config: the whole run's config: loss_scale is read, and optimizer but for the fields that describe `inner`.
        scaled: whether the loss is scaled, as float16 needs; otherwise the scale is 1.
    """
    options = config.loss_scale.to_dict()
    if not scaled:
        options.update(dynamic=False, initial_scale=1.0)
    return LossScaleOptimizer(
        inner,
        clip_norm=config.optimizer.clip_norm or None,
        accumulation_steps=config.optimizer.accumulation_steps,
        ema_momentum=config.optimizer.ema_momentum or None,
        **options,
    )


class Reduced(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule times a factor that changes while training goes on, as when evaluations do not get better any more.

    Args:
        schedule: a schedule or a constant rate.
        factor: float32 variable.
        min_learning_rate: the factor takes the rate no lower; where the schedule itself is below, it stands.
    """

    def __init__(self, schedule, factor: tf.Variable, min_learning_rate: float):
        self.schedule = schedule
        self.factor = factor
        self.min_learning_rate = min_learning_rate

    def __call__(self, step) -> tf.Tensor:
        rate = tf.cast(self.schedule(step) if callable(self.schedule) else self.schedule, tf.float32)
        return tf.maximum(rate * self.factor, tf.minimum(rate, self.min_learning_rate))


def learning_rate_factor(config: ConfigDict, trained_by: Iterable[LossScaleOptimizer]) -> tf.Variable | None:
    """Returns a variable, now 1, that the optimizers' learning rates are multiplied by; None without `config.plateau.metric`.

    Call it in the strategy's scope, before the optimizers are built.

    Raises:
        InputError: if one has no learning rate that could be multiplied.
    """
    if not config.plateau.metric:
        return None
    factor = shared_scalar(1.0, tf.float32, "learning_rate_factor")
    for optimizer in trained_by:
        change_learning_rate(optimizer.inner, lambda rate: Reduced(rate, factor, config.plateau.min_learning_rate))
    return factor


def schedule(config: ConfigDict, total_steps: int) -> Schedule:
    """Returns the learning-rate schedule over updates, of which an accumulation window is one, that `config` gives in steps."""
    given, window = config.schedule, config.optimizer.accumulation_steps
    return Schedule(
        config.optimizer.learning_rate,
        given.name,
        math.ceil(given.warmup_steps / window),
        total_steps // window,
        given.end_factor,
        [math.ceil(boundary / window) for boundary in given.boundaries_steps],
        given.factors,
    )


def _inner(config: ConfigDict, rate: Schedule) -> GroupedOptimizer:
    optimizer_class = optimizer_check.classes()[config.optimizer.name.lower()]

    def make(group: Group) -> keras.optimizers.Optimizer:
        decay = config.optimizer.weight_decay if group.weight_decay is None else group.weight_decay
        own_rate = rate if group.learning_rate_factor == 1 else Scaled(rate, group.learning_rate_factor)
        # AdamW takes no None here, and 0 would be one more operation for each variable.
        optimizer = optimizer_class(learning_rate=own_rate, weight_decay=decay, **config.optimizer.options.to_dict())
        optimizer.weight_decay = decay or None
        return optimizer

    return GroupedOptimizer(config.optimizer.groups, make)
