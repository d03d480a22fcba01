import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from mptrain import InputError, MixedPrecision, precision

layers = keras.layers
X = np.random.default_rng(0).random((4, 8)).astype(np.float32)
SEQUENCE = np.random.default_rng(1).random((2, 5, 8)).astype(np.float32)
MASK = np.array([[True, True, False, False, False], [True, True, True, True, True]])
PADDED = SEQUENCE * MASK[..., None]
IDS = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])


class Scaled(keras.Layer):
    """x * scale + y, where y may come in a nested structure; nothing in it casts by itself."""

    def __init__(self):
        super().__init__(autocast=False)

    def call(self, x, y=None, scale=1.0, more=None):
        return sum(keras.tree.flatten(more), x * scale + y) if more else x * scale + y


class First(keras.Layer):
    """Returns the first of its inputs, and a None."""

    def call(self, inputs):
        return inputs[0], None


@keras.saving.register_keras_serializable("tests")
class BuildsItsDense(keras.Layer):
    def build(self, input_shape):
        self.dense = layers.Dense(3)
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)

    def get_build_config(self):
        """Saves no shape: a loaded model builds the layer anew."""


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


def attention():
    inputs = keras.Input((8,))
    query = layers.Reshape((2, 4))(inputs)
    outputs = MixedPrecision(layers.MultiHeadAttention(2, 4))(query, query, use_causal_mask=True)
    return keras.Model(inputs, MixedPrecision(BuildsItsDense())(outputs))


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "float32"])
@pytest.mark.parametrize("built", [False, True])
def test_layer_computes_in_the_precision_between_float32_edges(name, built):
    inner = layers.Dense(3)
    if built:
        inner.build((None, 8))
    wrapped = MixedPrecision(inner, name)
    outputs = wrapped(X)
    assert outputs.dtype == tf.float32
    assert inner.compute_dtype == name.removeprefix("mixed_")
    assert [variable.dtype for variable in wrapped.trainable_variables] == ["float32", "float32"]
    dtype = tf.as_dtype(inner.compute_dtype)
    expected = tf.cast(tf.cast(X, dtype) @ tf.cast(inner.kernel, dtype) + tf.cast(inner.bias, dtype), tf.float32)
    np.testing.assert_array_equal(outputs.numpy(), expected.numpy())


@pytest.mark.parametrize("make", [functional, sequential, attention])
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


def in_float16(layer, *inputs, **options):
    """What a built layer of policy mixed_float16 returns for inputs in float16, in float32."""
    outputs = layer(*(tf.cast(each, tf.float16) for each in inputs), **options)
    return [tf.cast(output, tf.float32).numpy() for output in tf.nest.flatten(outputs)]


@pytest.mark.parametrize(
    ("inputs", "named", "options"),
    [
        ((SEQUENCE, PADDED), {}, {}),
        ((SEQUENCE,), {"value": PADDED}, {"return_attention_scores": True}),
        ((SEQUENCE,), {"value": PADDED}, {"use_causal_mask": True, "training": False}),
        ((), {"query": SEQUENCE, "value": PADDED}, {"attention_mask": tf.constant(MASK[:, None])}),
    ],
)
def test_attention_is_called_as_without_the_wrapper(inputs, named, options):
    attention = MixedPrecision(layers.MultiHeadAttention(2, 4))
    outputs = tf.nest.flatten(attention(*inputs, **named, **options))
    expected = in_float16(attention.layer, SEQUENCE, PADDED, **options)
    assert {output.dtype for output in outputs} == {tf.float32}
    for output, each in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output.numpy(), each)


@pytest.mark.parametrize("symbolic", [False, True])
def test_own_call_signature_takes_tensors_and_options_in_any_mix(symbolic):
    x = keras.Input((8,)) if symbolic else tf.constant(X)
    for call in (
        lambda layer: layer(x, x, scale=2.0),
        lambda layer: layer(x, y=x, scale=2.0),
        lambda layer: layer(x=x, y=x, scale=2.0),
        lambda layer: layer(x, x, more={"a": [x]}),
    ):
        outputs = call(MixedPrecision(Scaled()))
        value = keras.Model(x, outputs)(X) if symbolic else outputs
        np.testing.assert_allclose(value, 3 * X, rtol=2e-3)


def test_tensors_nested_in_keyword_arguments_are_cast():
    y = tf.fill([1], 70000.0)
    assert np.isinf(MixedPrecision(Scaled())(tf.zeros([1]), tf.zeros([1]), more={"a": [y]})).all()


def test_none_ragged_sparse_and_integer_values_pass_the_edges():
    first = MixedPrecision(First())
    x = tf.constant(X)
    assert first([x, x])[1] is None
    assert first([x, None])[0].dtype == tf.float32
    assert first([tf.constant([7]), x])[0].dtype == tf.int32
    ragged, _ = MixedPrecision(First())((tf.ragged.constant([[1.0], [2.0, 3.0]]), x))
    assert ragged.to_list() == [[1.0], [2.0, 3.0]]
    sparse, _ = MixedPrecision(First())((tf.sparse.from_dense([[0.0, 70000.0]]), x))
    assert np.isinf(sparse.values).all()


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "float32"])
@pytest.mark.parametrize("run", [lambda model: model, tf.function], ids=["eager", "graph"])
def test_mask_reaches_the_layer(name, run):
    lstm = layers.LSTM(4)
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, MixedPrecision(lstm, name)(layers.Masking()(inputs)))
    cast = tf.cast(PADDED, lstm.compute_dtype)
    expected = run(lstm)(cast, mask=tf.constant(MASK))
    np.testing.assert_array_equal(run(model)(PADDED), tf.cast(expected, tf.float32))
    assert not np.array_equal(model(PADDED), tf.cast(lstm(cast), tf.float32))


def test_masks_of_query_and_value_reach_attention():
    attention = MixedPrecision(layers.MultiHeadAttention(2, 4))
    inputs = keras.Input((5, 8))
    masked, masked_in_float16 = layers.Masking()(inputs), layers.Masking(dtype="mixed_float16")(inputs)
    outputs = keras.Model(inputs, attention(masked, masked))(PADDED)
    expected = keras.Model(inputs, attention.layer(masked_in_float16, masked_in_float16))(PADDED)
    np.testing.assert_array_equal(outputs, tf.cast(expected, tf.float32))
    assert not np.array_equal(outputs, attention(PADDED, PADDED))


@pytest.mark.parametrize("make", [lambda: layers.Dense(6), lambda: layers.Dropout(0.5)])
def test_mask_goes_on_behind_the_layer(make):
    masked = layers.Masking()
    wrapped = MixedPrecision(make())
    assert wrapped(masked(keras.Input((5, 8))))._keras_mask is not None
    np.testing.assert_array_equal(wrapped(masked(PADDED))._keras_mask, MASK)


def test_mask_that_the_layer_makes_leaves_it():
    embedding = MixedPrecision(layers.Embedding(5, 4, mask_zero=True))
    assert embedding(keras.Input((4,), dtype="int32"))._keras_mask is not None
    np.testing.assert_array_equal(embedding(IDS)._keras_mask, IDS > 0)
    np.testing.assert_array_equal(embedding.compute_mask(tf.constant(IDS)), IDS > 0)


def test_layer_without_masking_gives_no_mask():
    with pytest.warns(UserWarning, match="does not support masking"):
        outputs = MixedPrecision(layers.Flatten())(layers.Masking()(PADDED))
    assert getattr(outputs, "_keras_mask", None) is None


def test_shapes_and_dtypes_are_known_before_the_layer_runs():
    bins = MixedPrecision(layers.Discretization(bin_boundaries=[0.5]))(keras.Input((8,)))
    assert bins.dtype == layers.Discretization(bin_boundaries=[0.5])(X).dtype.name
    lstm = MixedPrecision(layers.LSTM(4, return_sequences=True, return_state=True))
    assert [(each.shape, each.dtype) for each in lstm(keras.Input((5, 8)))] == [
        ((None, 5, 4), "float32"),
        ((None, 4), "float32"),
        ((None, 4), "float32"),
    ]
    assert MixedPrecision(layers.Dense(3)).compute_output_shape((None, 8)) == (None, 3)
    assert layers.TimeDistributed(MixedPrecision(layers.Dense(3)))(SEQUENCE).shape == (2, 5, 3)


def test_layer_that_keeps_tensors_of_its_build_works_in_a_model():
    inputs = keras.Input((8,))
    wrapped = MixedPrecision(layers.Normalization(mean=1.0, variance=4.0), "float32")
    np.testing.assert_allclose(keras.Model(inputs, wrapped(inputs))(X), (X - 1) / 2, rtol=1e-6)


def test_layers_created_in_build_take_the_precision_and_the_models_policy_stays():
    before = keras.config.dtype_policy()
    called, built = MixedPrecision(BuildsItsDense()), MixedPrecision(BuildsItsDense())
    called(X)
    built.build((None, 8))
    assert [each.layer.dense.compute_dtype for each in (called, built)] == ["float16", "float16"]
    assert keras.config.dtype_policy() is before


def test_wrapped_layer_named_in_float32_layers_gets_its_inputs_unrounded(tmp_path):
    model = keras.Sequential([keras.Input((1,)), MixedPrecision(layers.Dense(1, kernel_initializer="ones"), name="wrapped")])
    precision.get("mixed_float16", ["wrapped$"]).hold_float32_layers(model)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        assert each(tf.constant([[70000.0]])).numpy() == 70000.0


def test_wrapper_inside_a_wrapped_layer_keeps_its_precision_and_nothing_else_does():
    model = keras.Sequential([layers.Dense(4, dtype="float32"), MixedPrecision(layers.Dense(2), "float32")])
    clone = keras.models.clone_model(keras.Sequential([keras.Input((8,)), MixedPrecision(model)])).layers[0].layer
    for each in (model, clone):
        assert [each.layers[0].compute_dtype, each.layers[1].layer.compute_dtype] == ["float16", "float32"]


@pytest.mark.slow
def test_mptrain_and_its_class_imported_are_enough_to_load(tmp_path):
    functional().save(tmp_path / "model.keras")
    lines = [
        "import sys, mptrain",
        "assert 'tensorflow' not in sys.modules",
        "from mptrain import MixedPrecision",
        "import keras",
        f"assert isinstance(keras.models.load_model({str(tmp_path / 'model.keras')!r}).layers[1], MixedPrecision)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


def test_checkpoint_restores_the_variables(tmp_path):
    saved, restored = MixedPrecision(layers.Dense(3)), MixedPrecision(layers.Dense(3))
    outputs = saved(X)
    assert not np.array_equal(restored(X), outputs)
    path = tf.train.Checkpoint(layer=saved).write(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(layer=restored).read(path).assert_consumed()
    np.testing.assert_array_equal(restored(X), outputs)


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
    with pytest.raises(TypeError, match="is a MixedPrecision already"):
        MixedPrecision(MixedPrecision(layers.Dense(1)))


@pytest.mark.parametrize("arguments", [(), (None,), (layers.Dense(1), X)])
def test_call_form_takes_one_layer_and_nothing_else(arguments):
    with pytest.raises(TypeError, match="takes one layer"):
        MixedPrecision()(*arguments)


def test_call_form_without_its_layer_is_refused_in_a_model():
    with pytest.raises(ValueError, match="MixedPrecision"):
        keras.Sequential([MixedPrecision()])


def test_layer_with_float16_variables_is_refused():
    dense = layers.Dense(1, dtype="float16", name="narrow")
    dense.build((None, 8))
    with pytest.raises(InputError, match="'narrow/kernel' is float16"):
        MixedPrecision(dense)
    unbuilt = MixedPrecision(layers.Dense(1, dtype="float16"))
    unbuilt(X)
    assert unbuilt.layer.kernel.dtype == "float32"
