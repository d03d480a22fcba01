"""Fused BatchNorm must be unseen: what Keras's own computes, and its moving statistics, in every shape and precision."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import mptrain
from mptrain import batch_norm
from mptrain.config import set_field
from mptrain.half_kernels import float32_kernels
from tests.trainers import TinyTrainer

SHAPE = (32, 16, 16, 16)  # large enough for the kernel on a CPU


def normalized(fuses: bool, inputs: tf.Tensor, training: bool = True, **options) -> dict[str, np.ndarray]:
    """Returns what a layer makes of the inputs, its variables afterwards and the gradients of a random sum of its outputs."""
    layer = keras.layers.BatchNormalization(**{"momentum": 0.5, **options})  # with 0.99 an error of 1e-3 would hide in 1e-5
    layer.build(inputs.shape)
    for place, variable in enumerate(layer.variables):
        variable.assign(0.5 + tf.random.stateless_uniform(variable.shape, [place, 7]))
    if fuses:
        batch_norm.prepare(keras.Sequential([layer]))
    weights = tf.cast(tf.random.stateless_normal(inputs.shape, [8, 8]), inputs.dtype)

    @tf.function
    def run(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=training)
            total = tf.reduce_sum(tf.cast(outputs, tf.float32) * tf.cast(weights, tf.float32))
        trained = [variable.value for variable in layer.trainable_variables]
        return outputs, tape.gradient(total, [inputs, *trained])

    outputs, (of_inputs, *of_weights) = run(inputs)
    assert bool(fused(run.get_concrete_function(inputs))) == fuses
    results = {"outputs": outputs, "gradient of inputs": of_inputs}
    results |= {f"gradient {place}": value for place, value in enumerate(of_weights)}
    results |= {variable.name: variable for variable in layer.variables}
    return {name: np.asarray(value).astype(np.float64) for name, value in results.items()}


def batch(shape=SHAPE, dtype: str = "float32") -> tf.Tensor:
    return tf.cast(tf.random.stateless_normal(shape, [1, 2], mean=3.0, stddev=2.0), dtype)


def distance(value: np.ndarray, right: np.ndarray) -> float:
    return np.linalg.norm(value - right) / np.linalg.norm(right)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"center": False}, {"scale": False}, {"momentum": 0.9, "epsilon": 0.1}, {"trainable": False}, {"axis": 3}],
    ids=str,
)
def test_outputs_gradients_and_moving_statistics_are_those_of_keras(options, training):
    ours, by_keras = (normalized(fuses, batch(), training, **options) for fuses in (True, False))
    assert ours.keys() == by_keras.keys()
    for name, right in by_keras.items():
        assert distance(ours[name], right) < 3e-5, name


@pytest.mark.parametrize("shape", [(1024, 128), (64, 64, 32), (2, 16, 16, 16, 16)], ids=str)
def test_in_any_number_of_dimensions(shape):
    ours, by_keras = (normalized(fuses, batch(shape)) for fuses in (True, False))
    for name, right in by_keras.items():
        assert distance(ours[name], right) < 3e-5, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_rounded_once(dtype):
    """Its errors are those of Keras's layer, which computes in float32 and rounds what comes out."""
    options = {"dtype": f"mixed_{dtype}"}
    inputs = batch(dtype=dtype)
    right = normalized(False, tf.cast(inputs, tf.float32))
    with float32_kernels():
        ours, by_keras = (normalized(fuses, inputs, **options) for fuses in (True, False))
    for name in right:
        assert distance(ours[name], right[name]) < 1.05 * distance(by_keras[name], right[name]) + 3e-5, name


class Subclass(keras.layers.BatchNormalization):
    pass


RENORM = {"renorm"} & inspect.signature(keras.layers.BatchNormalization).parameters.keys()  # Keras 3.12 has none


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        *[({option: True}, SHAPE) for option in RENORM],
        ({"axis": 1}, SHAPE),
        ({"synchronized": True}, SHAPE),
        ({"dtype": "float64"}, SHAPE),
        ({"epsilon": 1e-6}, SHAPE),  # which cuDNN refuses
        ({}, (64, 64, 16)),  # 65,536 numbers, for which it does not pay
        ({}, (32, 32, 32, 24)),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_or_is_slow_at_is_left_to_keras(options, shape):
    layer = keras.layers.BatchNormalization(**options)
    assert not kernels(layer, tf.cast(batch(shape), layer.compute_dtype))


def test_a_subclass_and_masked_inputs_are_left_to_keras():
    assert not kernels(Subclass(), batch())
    inputs = batch((64, 128, 32))
    assert not kernels(keras.layers.BatchNormalization(), inputs, mask=tf.reduce_mean(inputs, axis=-1) > 3.0)


def kernels(layer, inputs, **options) -> list[str]:
    """Returns the fused kernels in a call of a layer."""
    layer.build(inputs.shape)
    batch_norm.prepare(keras.Sequential([layer]))
    return fused(tf.function(lambda inputs: layer(inputs, **{"training": True, **options})).get_concrete_function(inputs))


def fused(function) -> list[str]:
    return [op.type for op in function.graph.get_operations() if "FusedBatchNorm" in op.type]


@pytest.mark.parametrize("sizes", [[None, 16], [None, None]], ids=str)
def test_batches_of_any_size_are_normalized(sizes):
    layers = [keras.layers.BatchNormalization(momentum=0.5) for _ in range(2)]
    for layer in layers:
        layer.build((None, 16))
    ours, by_keras = layers
    batch_norm.prepare(keras.Sequential([ours]))
    run = tf.function(lambda inputs: ours(inputs, training=True), input_signature=[tf.TensorSpec(sizes)])
    assert fused(run.get_concrete_function())
    for size in (1, 2, 100):
        inputs = batch((size, 16))
        np.testing.assert_allclose(run(inputs), by_keras(inputs, training=True), atol=1e-4)
        np.testing.assert_allclose(ours.moving_mean, by_keras.moving_mean, rtol=1e-5)
        np.testing.assert_allclose(ours.moving_variance, by_keras.moving_variance, rtol=1e-5)


def test_gradients_of_gradients_are_those_of_keras():
    inputs, second = batch(), []
    for fuses in (True, False):
        layer = keras.layers.BatchNormalization()
        layer.build(inputs.shape)
        if fuses:
            batch_norm.prepare(keras.Sequential([layer]))

        @tf.function
        def gradient(inputs, layer=layer):
            with tf.GradientTape() as outer:
                outer.watch(inputs)
                with tf.GradientTape() as inner:
                    inner.watch(inputs)
                    total = tf.reduce_sum(layer(inputs, training=True) ** 3)
                penalty = tf.reduce_sum(inner.gradient(total, inputs) ** 2)
            return outer.gradient(penalty, inputs)

        second.append(gradient(inputs).numpy())
        assert bool(fused(gradient.get_concrete_function(inputs))) == fuses
    assert distance(*second) < 1e-4


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_known_statistics_give_the_same_bits_for_a_batch_of_any_size(channels, dtype):
    """So that an export, which takes any number of examples, gives those of the evaluation."""
    layer = keras.layers.BatchNormalization(dtype=dtype)
    layer.build((None, 8, 8, channels))
    for place, variable in enumerate(layer.variables):
        variable.assign(0.5 + tf.random.stateless_uniform(variable.shape, [place, 7]))
    batch_norm.prepare(keras.Sequential([layer]))
    run = tf.function(lambda inputs: layer(tf.cast(inputs, layer.compute_dtype), training=False))
    of_any_size = run.get_concrete_function(tf.TensorSpec([None, 8, 8, channels]))
    for size in (1, 8, 200):
        inputs = batch((size, 8, 8, channels))
        np.testing.assert_array_equal(run.get_concrete_function(inputs)(inputs), of_any_size(inputs))


def test_inside_other_layers_too():
    def model():
        normalized = mptrain.MixedPrecision(keras.layers.BatchNormalization(), "mixed_bfloat16")
        nested = keras.Sequential([keras.Input(SHAPE[1:]), keras.layers.BatchNormalization()])
        return keras.Sequential([keras.Input(SHAPE[1:]), normalized, nested])

    ours, by_keras = model(), model()
    batch_norm.prepare(ours)
    assert len(fused(tf.function(lambda inputs: ours(inputs, training=True)).get_concrete_function(batch()))) == 2
    assert distance(ours(batch(), training=True).numpy(), by_keras(batch(), training=True).numpy()) < 1e-2


def test_a_saved_model_is_plain_keras(tmp_path):
    model = keras.Sequential([keras.Input(SHAPE[1:]), keras.layers.BatchNormalization()])
    batch_norm.prepare(model)
    expected = model(batch(), training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert "call" not in vars(loaded.layers[0])
    np.testing.assert_allclose(loaded.layers[0].moving_variance, model.layers[0].moving_variance)
    np.testing.assert_allclose(loaded(batch(), training=True), expected, atol=1e-5)


class WideTrainer(TinyTrainer):
    """A model that makes its layers when it is called, on batches that are large enough for the kernel; step 2 overflows."""

    def build_model(self):
        return LazyModel()

    def inputs(self, batch):
        return batch["inputs"] * tf.where(self.global_step == 2, np.float32(np.inf), 1.0)


class LazyModel(keras.Model):
    def build(self, shape):
        layers = keras.layers
        self.norm = layers.BatchNormalization()
        body = [layers.Conv2D(64, 3), self.norm, layers.GlobalAveragePooling2D(), layers.Dense(3, dtype="float32")]
        self.body = keras.Sequential(body)
        self.body.build(shape)

    def call(self, inputs, training=None):
        return self.body(inputs, training=training)


@pytest.fixture
def wide(config):
    config.data.batch_size = 100
    return config


def fused_in_training(trainer) -> list[str]:
    inputs = tf.random.stateless_normal((100, 4, 4, 64), [1, 2])
    norm = trainer.model.norm
    return fused(tf.function(lambda: norm(trainer.precision.cast_to_compute(inputs), training=True)).get_concrete_function())


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_a_skipped_step_leaves_the_moving_statistics_of_the_fused_kernel_alone(wide, policy):
    wide.precision.policy = policy
    trainer = WideTrainer(wide)
    assert fused_in_training(trainer)
    trainer.train(tf.constant(2))
    before = {path: variable.numpy() for path, variable in trainer.state.items() if "moving" in path}
    assert len(before) == 2
    assert trainer.train(tf.constant(1))["skipped_steps"] == 1
    for path, value in before.items():
        np.testing.assert_array_equal(trainer.state[path], value)
    trainer.train(tf.constant(1))
    for path, value in before.items():
        moved = trainer.state[path].numpy()
        assert np.isfinite(moved).all(), path
        assert (moved != value).any(), path


@pytest.mark.parametrize("field", ["devices.sync_batch_norm", "train.jit_compile"])
def test_no_kernel_where_replicas_normalize_together_or_xla_fuses(wide, field):
    set_field(wide, field, True)
    assert not fused_in_training(WideTrainer(wide))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_trainer_with_the_kernel_trains_as_one_without(wide, mirrored, replicas, monkeypatch):
    wide.precision.policy = "float32"
    wide.data.batch_size = 100 * replicas
    wide.optimizer.name = "sgd"  # Adam makes a step of full length of a gradient that is nothing but rounding
    states = []
    for prepare in (batch_norm.prepare, lambda model, **options: None):
        monkeypatch.setattr(batch_norm, "prepare", prepare)
        trainer = WideTrainer(wide, mirrored(replicas))
        assert bool(fused_in_training(trainer)) == (not states)
        trainer.model.norm.momentum = 0.5
        before = {path: variable.numpy() for path, variable in trainer.state.items()}
        trainer.train(tf.constant(2))
        states.append({path: variable.numpy() for path, variable in trainer.state.items()})
    ours, by_keras = states
    assert ours.keys() == by_keras.keys()
    trained = [path for path in ours if path.endswith(("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"))]
    assert len(trained) == 8
    for path in trained:
        np.testing.assert_allclose(ours[path], by_keras[path], rtol=1e-4, atol=1e-5, err_msg=path)
    assert any((ours[path] != before[path]).any() for path in ours if "kernel" in path)
