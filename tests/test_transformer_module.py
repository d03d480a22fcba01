"""The plain `tf.Module` and the Keras model are the same function of their weights, in float32 and in float16."""

import re

import numpy as np
import pytest
import tensorflow as tf

from mptrain import keras_compat, runner
from tests.experiment_cases import EXPERIMENTS, tiny_config

SCALE = 2.0**10
CASES = {case.name: case for case in EXPERIMENTS}


def build(name, folder, **fields):
    config = tiny_config(CASES[name], folder)
    config.devices.strategy, config.devices.virtual_cpus, config.model.layers = "one_device", 0, 2
    config.update_from_flattened_dict(fields)
    return runner.build_trainer(config)


def in_keras(path):
    """Returns the path of the Keras model's variable that stands for one of the module's."""
    path = {"embedding": "embedding/embeddings", "positions": "positions/table"}.get(path, path)
    path = re.sub(r"^blocks/(\d+)/", r"block\1/", path)
    return re.sub("/(query_key_value|output_dense)/", r"/attention/\1/", path)


def weights(trainer):
    return keras_compat.variables_by_path(trainer.trainable_variables)


def losses_and_gradients(trainer):
    """Returns the loss of each byte, and {path: gradient}, as the train step computes them."""
    batch = trainer.train_source.open()(tf.range(8, dtype=tf.int64))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            outputs = trainer.model(trainer.precision.cast_to_compute(trainer.inputs(batch)), training=True)
            losses = trainer.compute_loss(batch, trainer.precision.cast_to_output(outputs))
            scaled = tf.reduce_mean(losses) * SCALE
        gradients = tape.gradient(scaled, trainer.trainable_variables)
        return losses, [tf.convert_to_tensor(gradient) / SCALE for gradient in gradients]

    with trainer.kernels.scope():
        losses, gradients = step()
    return losses.numpy(), {path: each.numpy() for path, each in zip(weights(trainer), gradients, strict=True)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns {dtype: (the module's, the Keras model's losses and gradients)} on equal weights, all of them random."""
    folder, found, values = tmp_path_factory.mktemp("text"), {}, None
    for dtype, policy in (("float32", "float32"), ("float16", "mixed_float16")):
        module = build("transformer_module", folder, **{"model.compute_dtype": dtype})
        model = build("transformer", folder, **{"precision.policy": policy})
        rng = np.random.default_rng(0)
        values = values or {path: each.numpy() + 0.1 * rng.normal(size=each.shape) for path, each in weights(module).items()}
        assert sorted(map(in_keras, values)) == sorted(weights(model))
        for path, value in values.items():
            weights(module)[path].assign(value)
            weights(model)[in_keras(path)].assign(value)
        found[dtype] = losses_and_gradients(module), losses_and_gradients(model)
    return found


# In float16 the order of roundings differs, by a few units of 2**-11 each.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 2.0**-9)])
def test_losses_and_gradients_agree_on_equal_weights(found, dtype, bound):
    (losses, gradients), (keras_losses, keras_gradients) = found[dtype]
    assert losses.shape == (8, 12)
    np.testing.assert_allclose(losses.mean(), keras_losses.mean(), rtol=bound / 4)
    np.testing.assert_allclose(losses, keras_losses, rtol=bound, atol=bound)
    for path, gradient in gradients.items():
        error = np.linalg.norm(gradient - keras_gradients[in_keras(path)])
        assert error <= bound * np.linalg.norm(gradient), path


def test_module_computes_in_float16_where_it_is_told_to(found):
    wide, half = found["float32"][0][0].mean(), found["float16"][0][0].mean()
    assert 0 < abs(half - wide) < 2.0**-9 * wide
