import keras
import numpy as np
import pytest
import tensorflow as tf

from mptrain import InputError, MixedPrecision

layers = keras.layers
X = np.random.default_rng(0).random((4, 8)).astype(np.float32)


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dropout = MixedPrecision(layers.Dropout(0.5))
        self.dense = MixedPrecision(layers.Dense(2))

    def call(self, x, training=False):
        return self.dense(self.dropout(x, training=training))


def functional():
    inputs = keras.Input((8,))
    return keras.Model(inputs, layers.Dense(2)(MixedPrecision()(layers.Dense(16, activation="relu"))(inputs)))


def sequential():
    return keras.Sequential([keras.Input((8,)), MixedPrecision(layers.Dense(16), "mixed_bfloat16"), layers.Dense(2)])


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16", "float32"])
@pytest.mark.parametrize("built", [False, True])
def test_layer_computes_in_the_precision_between_float32_edges(precision, built):
    inner = layers.Dense(3)
    if built:
        inner.build((None, 8))
    wrapped = MixedPrecision(inner, precision)
    outputs = wrapped(X)
    assert outputs.dtype == tf.float32
    assert inner.compute_dtype == precision.removeprefix("mixed_")
    assert [variable.dtype for variable in wrapped.trainable_variables] == ["float32", "float32"]
    dtype = tf.as_dtype(inner.compute_dtype)
    expected = tf.cast(tf.cast(X, dtype) @ tf.cast(inner.kernel, dtype) + tf.cast(inner.bias, dtype), tf.float32)
    np.testing.assert_array_equal(outputs.numpy(), expected.numpy())


@pytest.mark.parametrize("make", [functional, sequential])
def test_saved_model_loads_with_the_same_outputs(make, tmp_path):
    model = make()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X).numpy(), model(X).numpy())
    kinds = [[layer.compute_dtype for layer in m._flatten_layers()] for m in (model, loaded)]
    assert kinds[0] == kinds[1]
    assert {"float16", "bfloat16"} & set(kinds[0])


def test_works_in_a_subclassed_model_and_passes_training_on():
    model = Subclassed()
    assert model(X).dtype == tf.float32
    assert not np.array_equal(model(X, training=True), model(X))


def test_float16_overflow_happens_inside():
    dense = layers.Dense(1, kernel_initializer="ones", use_bias=False)
    assert np.isinf(MixedPrecision(dense)(tf.constant([[60000.0, 60000.0]])).numpy()).all()


def test_attention_takes_further_inputs_by_name():
    attention = MixedPrecision(layers.MultiHeadAttention(2, 4))
    query = tf.ones([2, 3, 8])
    assert attention(query, value=query).dtype == tf.float32
    assert attention.layer.query_dense.compute_dtype == "float16"


def test_gradients_reach_float32_variables():
    wrapped = MixedPrecision(layers.Dense(3))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(wrapped(X))
    assert all(gradient.dtype == tf.float32 for gradient in tape.gradient(loss, wrapped.trainable_variables))


def test_unknown_precision_and_other_things_than_layers_are_refused():
    with pytest.raises(InputError, match="does not exist"):
        MixedPrecision(layers.Dense(1), "float8")
    with pytest.raises(InputError, match="native"):
        MixedPrecision(layers.Dense(1), "native")
    with pytest.raises(TypeError, match="wraps a Keras 3 layer"):
        MixedPrecision(tf.nn.relu)
