"""Fused BatchNorm must be unseen: what Keras's own computes, and its moving statistics, in every shape and precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import batch_norm
from mptrain.half_kernels import float32_kernels
from tests.trainers import PoisonedTrainer

SHAPE = (32, 16, 16, 16)  # large enough for the kernel on a CPU


def normalized(fused: bool, inputs: tf.Tensor, training: bool = True, **options) -> dict[str, np.ndarray]:
    """Returns what a layer makes of the inputs, its variables afterwards and the gradients of a random sum of its outputs."""
    layer = keras.layers.BatchNormalization(**options)
    layer.build(inputs.shape)
    for place, variable in enumerate(layer.variables):
        variable.assign(0.5 + tf.random.stateless_uniform(variable.shape, [place, 7]))
    if fused:
        batch_norm.prepare(keras.Sequential([layer]), synchronized=False)
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
    kernels = [op.type for op in run.get_concrete_function(inputs).graph.get_operations() if "FusedBatchNormV3" in op.type]
    assert bool(kernels) == fused
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
    [{}, {"center": False}, {"scale": False}, {"momentum": 0.5, "epsilon": 0.1}, {"trainable": False}, {"axis": 3}],
    ids=str,
)
def test_outputs_gradients_and_moving_statistics_are_those_of_keras(options, training):
    ours, by_keras = (normalized(fused, batch(), training, **options) for fused in (True, False))
    assert ours.keys() == by_keras.keys()
    for name, right in by_keras.items():
        assert distance(ours[name], right) < 3e-5, name


@pytest.mark.parametrize("shape", [(1024, 128), (64, 64, 32), (2, 16, 16, 16, 16)], ids=str)
def test_in_any_number_of_dimensions(shape):
    ours, by_keras = (normalized(fused, batch(shape)) for fused in (True, False))
    for name, right in by_keras.items():
        assert distance(ours[name], right) < 3e-5, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_rounded_once(dtype):
    """Its errors are those of Keras's layer, which computes in float32 and rounds what comes out."""
    options = {"dtype": f"mixed_{dtype}"}
    inputs = batch(dtype=dtype)
    right = normalized(False, tf.cast(inputs, tf.float32))
    with float32_kernels():
        ours, by_keras = (normalized(fused, inputs, **options) for fused in (True, False))
    for name in right:
        assert distance(ours[name], right[name]) < 1.05 * distance(by_keras[name], right[name]) + 3e-5, name


class Subclass(keras.layers.BatchNormalization):
    pass


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Subclass, SHAPE),
        (lambda: keras.layers.BatchNormalization(renorm=True), SHAPE),
        (lambda: keras.layers.BatchNormalization(axis=1), SHAPE),
        (lambda: keras.layers.BatchNormalization(synchronized=True), SHAPE),
        (lambda: keras.layers.BatchNormalization(dtype="float64"), SHAPE),
        (keras.layers.BatchNormalization, (64, 64, 16)),  # 65,536 numbers, for which it does not pay
        (keras.layers.BatchNormalization, (32, 32, 32, 24)),
    ],
    ids=["subclass", "renorm", "axis", "synchronized", "float64", "small", "channels"],
)
def test_what_the_kernel_cannot_do_or_is_slow_at_is_left_to_keras(make, shape):
    layer = make()
    layer.build(shape)
    assert not kernels(layer, tf.cast(batch(shape), layer.compute_dtype))


def test_masked_inputs_are_left_to_keras_in_training():
    inputs = batch((64, 128, 32))
    layer = keras.layers.BatchNormalization()
    layer.build(inputs.shape)
    mask = tf.reduce_mean(inputs, axis=-1) > 3.0
    assert not kernels(layer, inputs, mask=mask)
    assert kernels(layer, inputs, training=False, mask=mask)


def kernels(layer, inputs, **options) -> list[str]:
    """Returns the fused kernels in a call of a prepared layer."""
    batch_norm.prepare(keras.Sequential([layer]), synchronized=False)
    graph = tf.function(lambda inputs: layer(inputs, **{"training": True, **options})).get_concrete_function(inputs).graph
    return [op.type for op in graph.get_operations() if "FusedBatchNorm" in op.type]


def test_batches_of_any_size_are_normalized():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 16))
    batch_norm.prepare(keras.Sequential([layer]), synchronized=False)
    run = tf.function(lambda inputs: layer(inputs, training=True), input_signature=[tf.TensorSpec([None, 16])])
    for size in (1, 2, 100):
        inputs = batch((size, 16))
        right = (inputs - tf.reduce_mean(inputs, 0)) / tf.sqrt(tf.math.reduce_variance(inputs, 0) + layer.epsilon)
        np.testing.assert_allclose(run(inputs), right, atol=1e-4)


def test_a_saved_model_is_plain_keras(tmp_path):
    model = keras.Sequential([keras.Input(SHAPE[1:]), keras.layers.BatchNormalization()])
    batch_norm.prepare(model, synchronized=False)
    expected = model(batch(), training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert "call" not in vars(loaded.layers[0])
    np.testing.assert_allclose(loaded.layers[0].moving_variance, model.layers[0].moving_variance)
    np.testing.assert_allclose(loaded(batch(), training=True), expected, atol=1e-5)


class WideTrainer(PoisonedTrainer):
    def build_model(self):
        self.poisoned_replica = tf.Variable(0, trainable=False)
        self.poison = tf.Variable(np.inf, trainable=False)
        layers = keras.layers
        body = [layers.Conv2D(64, 3), layers.BatchNormalization(), layers.GlobalAveragePooling2D()]
        return keras.Sequential([keras.Input((6, 6, 1)), *body, layers.Dense(3, dtype="float32")])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_a_skipped_step_leaves_the_moving_statistics_of_the_fused_kernel_alone(config, policy):
    config.precision.policy = policy
    config.data.batch_size = 100
    config.model = ConfigDict({"poisoned_steps": [2]})
    trainer = WideTrainer(config)
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


@pytest.mark.parametrize("synchronized", [False, True])
def test_a_trainer_takes_the_kernel_unless_replicas_normalize_together(config, synchronized):
    config.data.batch_size = 100
    config.devices.sync_batch_norm = synchronized
    config.model = ConfigDict({"poisoned_steps": []})
    layer = next(layer for layer in WideTrainer(config).model.layers if "batch" in layer.name)
    inputs = tf.random.stateless_normal((100, 4, 4, 64), [1, 2])
    graph = tf.function(lambda inputs: layer(tf.cast(inputs, tf.float16), training=True)).get_concrete_function(inputs).graph
    assert ("FusedBatchNormV3" in [op.type for op in graph.get_operations()]) != synchronized
