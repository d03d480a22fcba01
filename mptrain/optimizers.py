"""Optimizer and learning-rate schedule from a config."""

import difflib
import inspect
import math

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain.errors import InputError
from mptrain.loss_scale import LossScaleOptimizer

_WRAPPERS = ("LossScaleOptimizer", "MultiOptimizer", "Optimizer")
_WITHOUT_DECAY = ("bias", "gamma", "beta")  # as Keras names the offsets of layers and the factors of norms


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to a peak, then constant, cosine, linear or inverse square root.

    Args:
        peak: learning rate at the end of the warm-up.
        name: "constant", "cosine" (Loshchilov and Hutter, 2017), "linear" or "rsqrt" (Vaswani et al., 2017).
        warmup_steps: applied steps over which the rate rises from 0; the first step takes peak / warmup_steps.
        total_steps: applied steps at which cosine and linear reach their end.
        end_factor: the end of cosine and linear, as a share of the peak.
    """

    def __init__(self, peak: float, name: str, warmup_steps: int, total_steps: int, end_factor: float):
        self.peak = peak
        self.name = name
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.end_factor = end_factor

    def __call__(self, step) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        warmup = tf.minimum((step + 1.0) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        done = tf.clip_by_value((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 0.0, 1.0)
        decay = {
            "constant": lambda: 1.0,
            "cosine": lambda: self._from_one_to_end(0.5 * (1.0 + tf.cos(math.pi * done))),
            "linear": lambda: self._from_one_to_end(1.0 - done),
            "rsqrt": lambda: tf.math.rsqrt(tf.maximum(step + 1.0, self.warmup_steps) / max(self.warmup_steps, 1)),
        }[self.name]()
        return tf.convert_to_tensor(self.peak * warmup * decay, tf.float32)

    def _from_one_to_end(self, share):
        return self.end_factor + (1.0 - self.end_factor) * share

    def get_config(self) -> dict:
        names = ("peak", "name", "warmup_steps", "total_steps", "end_factor")
        return {name: getattr(self, name) for name in names}


def build(config: ConfigDict, total_steps: int, *, scaled: bool) -> LossScaleOptimizer:
    """Returns the optimizer that `config` describes, with loss scaling where it is needed.

    Args:
        config: the whole run's config: optimizer, schedule and loss_scale are read.
        total_steps: length of the run, for the schedule.
        scaled: whether the loss is scaled, as float16 needs; otherwise the scale is 1.

    Raises:
        InputError: if Keras has no optimizer of that name.
    """
    options = config.loss_scale.to_dict()
    if not scaled:
        options.update(dynamic=False, initial_scale=1.0)
    window = config.optimizer.accumulation_steps
    return LossScaleOptimizer(
        _inner(config, total_steps // window),
        clip_norm=config.optimizer.clip_norm or None,
        accumulation_steps=window,
        ema_momentum=config.optimizer.ema_momentum or None,
        **options,
    )


def _inner(config: ConfigDict, total_steps: int) -> keras.optimizers.Optimizer:
    classes = {
        name.lower(): value
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value) and issubclass(value, keras.optimizers.Optimizer) and name not in _WRAPPERS
    }
    name = config.optimizer.name.lower()
    if name not in classes:
        close = difflib.get_close_matches(name, classes, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"config.optimizer.name is {config.optimizer.name!r}: {hint}write one of {', '.join(sorted(classes))}")
    decay = config.optimizer.weight_decay
    if name == "adamw" and not decay:
        raise InputError("config.optimizer.weight_decay is 0 with optimizer 'adamw': set it, or write name='adam'")
    schedule = config.schedule
    rate = Schedule(config.optimizer.learning_rate, schedule.name, schedule.warmup_steps, total_steps, schedule.end_factor)
    optimizer = classes[name](learning_rate=rate, weight_decay=decay or None)
    if decay:
        optimizer.exclude_from_weight_decay(var_names=list(_WITHOUT_DECAY))
    return optimizer
