"""Optimizers and schedules by name: every optimizer of Keras 3, what weight decay leaves out, values of schedules by hand."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from mptrain import InputError, config_check, keras_compat, optimizer_check, optimizers, weight_decay
from mptrain import config as config_lib
from tests.trainers import TinyModule


def step_function(strategy, optimizer, variables):
    """Returns a function that makes one step with a gradient of ones, but for NaN on the last replica where it is told so."""

    @tf.function
    def step(bad):
        def replica_step():
            last = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, strategy.num_replicas_in_sync - 1)
            factor = tf.where(tf.logical_and(bad, last), np.nan, 1.0 / strategy.num_replicas_in_sync)
            return optimizer.apply_gradients([(factor * tf.ones(v.shape), v) for v in variables])

        return strategy.experimental_local_results(strategy.run(replica_step))[0]

    return step


def values(variables):
    return [tf.convert_to_tensor(variable).numpy() for variable in variables]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "keras") for name in optimizer_check.classes()), ("muon", "module"), ("adafactor", "module")]
)
def test_every_optimizer_of_keras_trains_and_skips_on_two_replicas(config, mirrored, name, kind):
    config.optimizer.name, config.optimizer.weight_decay = name, 0.01
    config_check.validate(config)
    strategy = mirrored(2)
    with strategy.scope():
        layers = [keras.Input((4,), dtype="int32"), keras.layers.Embedding(5, 4), keras.layers.Dense(3)]
        model = keras.Sequential(layers) if kind == "keras" else TinyModule()
        variables = keras_compat.trainable_variables(model)
        optimizer = optimizers.build(config, 10, scaled=True)
        optimizer.build(variables)
    step = step_function(strategy, optimizer, variables)
    for bad in (False, True, False):
        before, state = values(variables), values(optimizer.state[path] for path in optimizer.state if "inner/" in path)
        assert bool(step(tf.constant(bad))) is not bad
        changed = [not np.array_equal(*pair) for pair in zip(before, values(variables), strict=True)]
        assert all(changed) if not bad else not any(changed)
        if bad:
            after = values(optimizer.state[path] for path in optimizer.state if "inner/" in path)
            assert all(np.array_equal(*pair) for pair in zip(state, after, strict=True))
    assert int(optimizer.inner.iterations.value.numpy()) == int(optimizer.applied_steps) == 2


class OddlyNamed(keras.layers.Layer):
    """Owns a bias of rank 2 under another name, and a kernel in a layer called bias."""

    def build(self, shape):
        self.bias = self.add_weight(shape=(2, 3), name="offset")
        self.inner = keras.layers.Dense(3, name="bias_tower")
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x) + self.bias[0]


def keras_model():
    layers = keras.layers
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(5, 4, name="words")(inputs)
    x = layers.MultiHeadAttention(2, 3, name="gamma")(x, x)
    x = layers.LayerNormalization(axis=[1, 2], name="any")(x)
    x = layers.GroupNormalization(2, name="kernel_of_truth")(x)
    x = layers.RMSNormalization(name="scaling")(x)
    x = layers.BatchNormalization(name="x1")(x)
    x = layers.GRU(3, name="memory")(x)
    return keras.Model(inputs, OddlyNamed(name="odd")(x))


def tf_keras_model():
    layers = tf_keras.layers
    inputs = tf_keras.Input((6,), dtype="int32")
    x = layers.Embedding(5, 4, name="words")(inputs)
    x = layers.MultiHeadAttention(2, 3, name="gamma")(x, x)
    x = layers.LayerNormalization(axis=[1, 2], name="any")(x)
    x = layers.GroupNormalization(2, name="kernel_of_truth")(x)
    x = layers.BatchNormalization(name="x1")(x)
    x = layers.GRU(3, name="memory")(x)
    return tf_keras.Model(inputs, layers.Dense(3, name="bias_tower")(x))


class BiasModule(tf.Module):
    def __init__(self):
        super().__init__()
        self.bias_free = tf.Variable(tf.ones([2, 2]), name="w")
        self.scale = tf.Variable(tf.ones([2]), name="w")
        self.temperature = tf.Variable(1.0)
        self.bias = tf.Variable(tf.ones([2, 2]), name="w")
        self.norm = keras.layers.LayerNormalization(axis=[0, 1])
        self.norm.build((3, 2))


@pytest.mark.parametrize(
    ("make", "decayed"),
    [
        (keras_model, ["embeddings", *["kernel"] * 4, "kernel", "recurrent_kernel", "kernel"]),
        (tf_keras_model, ["embeddings", *["kernel"] * 4, "kernel", "recurrent_kernel", "kernel"]),
        (BiasModule, ["bias_free"]),
    ],
)
def test_weight_decay_leaves_out_biases_and_norms_whatever_they_are_called(config, make, decayed):
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "sgd", 1.0, 0.5
    model = make()
    keras_compat.note_paths(model)
    weight_decay.note_biases_and_norms(model)
    variables = keras_compat.trainable_variables(model)
    for variable in variables:
        variable.assign(tf.ones(variable.shape))
    optimizer = optimizers.build(config, 10, scaled=False)
    optimizer.build(variables)
    optimizer.apply_gradients([(tf.zeros(variable.shape), variable) for variable in variables])
    ends = {path: float(tf.reduce_max(variable)) for path, variable in keras_compat.variables_by_path(variables).items()}
    assert set(ends.values()) == {0.5, 1.0}
    assert sorted(path.rsplit("/")[-1] for path, end in ends.items() if end == 0.5) == sorted(decayed)
    assert make is BiasModule or any("bias_tower" in path for path, end in ends.items() if end == 0.5)


def rates(config, updates, **fields):
    for path, value in {"optimizer.learning_rate": 2.0, **fields}.items():
        config.update_from_flattened_dict({path: value})
    config_check.validate(config)
    schedule = optimizers.schedule(config, config.train.steps)
    return [float(schedule(update)) for update in updates]


def test_schedules_have_the_values_of_a_computation_by_hand(config):
    config.train.steps, config.schedule.warmup_steps, config.schedule.end_factor = 24, 4, 0.1
    warm = [0.5, 1.0, 1.5, 2.0]
    assert rates(config, [*range(5), 1000], **{"schedule.name": "constant"}) == pytest.approx([*warm, 2.0, 2.0])
    quarter = 2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates(config, [*range(4), 9, 14, 24, 99], **{"schedule.name": "cosine"}) == pytest.approx(
        [*warm, quarter, 1.1, 0.2, 0.2]
    )
    assert rates(config, [*range(4), 9, 14, 24], **{"schedule.name": "linear"}) == pytest.approx([*warm, 1.55, 1.1, 0.2])
    assert rates(config, [*range(4), 15, 63], **{"schedule.name": "rsqrt"}) == pytest.approx([*warm, 1.0, 0.5])
    steps = {"schedule.name": "piecewise", "schedule.boundaries_steps": (6, 10), "schedule.factors": (0.5, 0.1)}
    assert rates(config, [0, 3, 5, 6, 9, 10, 99], **steps) == pytest.approx([0.5, 2.0, 2.0, 1.0, 1.0, 0.2, 0.2])


def test_schedule_counts_an_accumulation_window_as_one_update(config):
    config.train.steps, config.optimizer.accumulation_steps, config.schedule.warmup_steps = 24, 3, 7
    config.checkpoint.every_steps = config.eval.every_steps = 12
    fields = {"schedule.name": "piecewise", "schedule.boundaries_steps": (13,), "schedule.factors": (0.5,)}
    # 7 steps of warm-up are over in the third window; step 13 lies in the fifth, so the sixth is the first with the factor.
    assert rates(config, range(6), **fields) == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer.name": "adagrda"}, "did you mean 'adagrad'?"),
        ({"optimizer.name": "MultiOptimizer"}, "write one of adadelta"),
        (
            {"optimizer.options": {"momentm": 0.9}, "optimizer.name": "sgd"},
            "no such argument; did you mean 'momentum'?",
        ),
        ({"optimizer.options": {"momentum": "much"}, "optimizer.name": "sgd"}, "options.momentum is 'much': write a number"),
        ({"optimizer.options": {"nesterov": 1}, "optimizer.name": "sgd"}, "options.nesterov is 1: write True or False"),
        ({"optimizer.options": {"beta_1": float("nan")}}, "options.beta_1 is nan: write a finite number"),
        ({"optimizer.options": {"learning_rate": 1.0}}, "options.learning_rate: write config.optimizer.learning_rate instead"),
        ({"optimizer.options": {"clipnorm": 1.0}}, "Adam has no such argument"),
        ({"optimizer.options": {"use_ema": True}}, "write config.optimizer.ema_momentum instead"),
        ({"optimizer.name": "adamw"}, "config.optimizer.weight_decay is 0 with optimizer 'adamw'"),
        ({"schedule.name": "piecewise"}, "schedule.name is 'piecewise': boundaries and factors belong"),
        ({"schedule.boundaries_steps": (3,), "schedule.factors": (0.5,)}, "schedule.name is 'constant'"),
        ({"schedule.name": "piecewise", "schedule.boundaries_steps": (3, 2), "schedule.factors": (1.0, 0.1)}, "ascending"),
        (
            {"schedule.name": "piecewise", "schedule.boundaries_steps": (3,), "schedule.factors": ()},
            "1 boundaries: one for each",
        ),
        ({"schedule.name": "piecewise", "schedule.boundaries_steps": (1.5,), "schedule.factors": (1.0,)}, "whole numbers"),
        ({"schedule.name": "piecewise", "schedule.boundaries_steps": (1,), "schedule.factors": (math.nan,)}, "0 or above"),
        ({"schedule.boundaries_steps": (1,), "schedule.boundaries_epochs": (1.0,)}, "both are set"),
    ],
)
def test_what_no_optimizer_or_schedule_takes_is_refused_before_any_device_is_touched(config, fields, message):
    for path, value in fields.items():
        config_lib.set_field(config, path, value)
    with pytest.raises(InputError) as caught:
        config_check.validate(config)
    assert message in str(caught.value)


def test_options_reach_the_optimizer(config):
    config.optimizer.name, config.optimizer.options = "sgd", {"momentum": 0.9, "nesterov": True}
    config_check.validate(config)
    inner = optimizers.build(config, 10, scaled=False).inner.optimizers[0]
    assert (inner.momentum, inner.nesterov) == (0.9, True)
