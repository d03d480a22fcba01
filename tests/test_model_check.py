"""What is found out about a model and its loss before the first step: by tracing, and by running where a file must show it."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ml_collections import ConfigDict

import mptrain
from mptrain import InputError, MixedPrecision, keras_compat, precision
from tests import trainers

layers = keras.layers


def trainer(config, build, base=trainers.TinyTrainer, **methods):
    """Returns a trainer of TinyTrainer's task whose model is what `build` returns."""
    return type("Built", (base,), {"build_model": lambda self: build(), **methods})(config)


def stack(*inner, generation=keras):
    """Dense(4, name="first"), the given layers, and a last layer in float32."""
    tail = [generation.layers.Dense(4, name="after"), generation.layers.Dense(3, dtype="float32", name="logits")]
    head = [generation.layers.InputLayer((6, 6, 1)), generation.layers.Flatten(), generation.layers.Dense(4, name="first")]
    return generation.Sequential([*head, *inner, *tail], name="net")


class Subclassed(keras.Model):
    """Its layers are created in another order than they are called in."""

    def __init__(self, middle="float32", logits="float32"):
        super().__init__(name="net")
        self.logits = layers.Dense(3, dtype=logits, name="logits")
        self.first = layers.Dense(4, name="first")
        self.flatten = layers.Flatten()
        self.middle = layers.Dense(4, dtype=middle, name="middle")

    def call(self, x, training=False):
        return self.logits(self.middle(self.first(self.flatten(x))))


@pytest.mark.parametrize(
    ("build", "paths", "dtype"),
    [
        (lambda: Subclassed(logits=None), "net/middle", "float32"),
        (lambda: stack(layers.Activation("relu", dtype="float32", name="act")), "net/act", "float32"),
        (lambda: stack(layers.Dense(4, dtype="mixed_bfloat16", name="bf")), "net/bf", "bfloat16"),
        (lambda: stack(layers.Reshape((2, 2)), layers.LSTM(4, dtype="float32", name="lstm")), "net/lstm", "float32"),
        (lambda: stack(layers.Dense(4, dtype="float32", name="b"), layers.ReLU(name="a", dtype="float32")), "net/b", "float32"),
        (lambda: stack(tf_keras.layers.Dense(4, dtype="float32", name="d"), generation=tf_keras), "net/d", "float32"),
    ],
)
def test_layer_that_casts_what_it_is_given_is_named_wherever_it_was_created(config, build, paths, dtype):
    warning = trainer(config, build).precision_warnings[0]
    assert warning.startswith(f"{paths} compute in {dtype} and cast their inputs ")


def two_heads():
    inputs = keras.Input((6, 6, 1))
    features = layers.Dense(4)(layers.Flatten()(inputs))
    heads = [layers.Dense(3, dtype="float32")(features) for _ in range(2)]
    return keras.Model(inputs, layers.Softmax(dtype="float32")(layers.Add(dtype="float32")(heads)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Subclassed(middle=None),  # whose logits were created first
        two_heads,
        lambda: stack(MixedPrecision(layers.Dense(4), "float32")),
        lambda: stack(MixedPrecision(keras.Sequential([layers.Dense(4), layers.ReLU()]), "mixed_bfloat16")),
        lambda: stack(generation=tf_keras),
        lambda: keras.Sequential([layers.Reshape((6, 6)), layers.Dense(4), layers.LSTM(3, dtype="float32")]),
    ],
)
def test_output_layers_and_wrapped_ones_are_not_called_silent(config, build):
    assert list(trainer(config, build).precision_warnings) == []


def shared():
    dense = layers.Dense(36, name="shared")
    inputs = keras.Input((6, 6, 1))
    x = keras.Sequential([dense], name="a")(layers.Flatten()(inputs))
    x = layers.Dense(4)(keras.Sequential([dense], name="b")(x))
    return keras.Model(inputs, layers.Dense(3, dtype="float32")(x), name="net")


@pytest.mark.parametrize(
    ("build", "pattern"),
    [
        (lambda: stack(keras.Sequential([layers.Dense(4), layers.Dense(4)], name="block")), "block$"),
        (shared, "b/shared"),
    ],
)
def test_layers_held_by_their_container_or_under_another_path_are_not_called_silent(config, build, pattern):
    config.precision.float32_layers = (pattern,)
    held = trainer(config, build)
    assert "float32" in [row.compute_dtype for row in precision.plan(held.model)[1:-1]]
    assert list(held.precision_warnings) == []


def test_layer_that_rounds_the_logits_is_named(config):
    (warning,) = trainer(config, lambda: Subclassed(middle=None, logits=None)).precision_warnings
    assert warning == "net/logits: the logits are rounded to float16: give the layer dtype='float32'"
    (warning,) = trainers.ModuleTrainer(config).precision_warnings
    assert warning == "the logits are rounded to float16: compute the model's last layer in float32"


def test_warnings_and_the_choice_of_kernels_are_in_the_plan_on_disk(config, tmp_path):
    config.trainer = "tests.trainers.ModuleTrainer"
    config.train.steps = config.train.steps_per_loop = 1
    mptrain.run(config, tmp_path, "train")
    plan = (tmp_path / "precision_plan.txt").read_text().splitlines()
    assert any(line.startswith("jit_compile  False (auto): float16 operations are computed in float32") for line in plan)
    assert any(line.startswith("warning      the logits are rounded to float16") for line in plan)


class LayersInBuild(keras.Model):
    def build(self, shape):
        self.flatten = layers.Flatten()
        self.late = layers.Dense(4, name="late")
        self.logits = layers.Dense(3, name="logits", dtype="float32")
        self.built = True

    def call(self, x, training=False):
        return self.logits(self.late(self.flatten(x)))


def test_layers_created_in_build_take_the_policy(config):
    rows = {row.layer.rpartition("/")[2]: row.compute_dtype for row in precision.plan(trainer(config, LayersInBuild).model)}
    assert rows == {"flatten": "float16", "late": "float16", "logits": "float32"}


class OwnWeights(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.flatten = layers.Flatten()
        self.w = self.add_weight(shape=(36, 3), name="w")

    def call(self, x, training=False):
        return keras.ops.matmul(self.flatten(x), self.w)


class BareLayer(layers.Layer):
    def __init__(self):
        super().__init__(name="bare")
        self.w = self.add_weight(shape=(36, 3), name="w")

    def call(self, x, training=False):
        return keras.ops.matmul(keras.ops.reshape(x, (-1, 36)), self.w)


@pytest.mark.parametrize("build", [OwnWeights, BareLayer])
def test_model_whose_own_weights_compute_is_in_the_plan(config, build):
    first = precision.plan(trainer(config, build).model)[0]
    assert (first.layer, first.compute_dtype, first.parameters) == (build().name, "float16", 108)


class Casting(tf.Module):
    """Casts to float16 itself, whatever it is given; optionally in a function of its own."""

    def __init__(self, traced=False):
        super().__init__()
        self.w = tf.Variable(tf.random.stateless_normal([36, 3], [1, 2]) * 0.1, name="w")
        self.multiply = tf.function(self._multiply) if traced else self._multiply

    def _multiply(self, x):
        return tf.cast(tf.cast(x, tf.float16) @ tf.cast(self.w, tf.float16), tf.float32)

    def __call__(self, x, training=False):
        return self.multiply(tf.reshape(x, [-1, 36]))


class CastingLayer(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 3), name="w")

    def call(self, x):
        return tf.cast(tf.cast(x, tf.float16) @ tf.cast(self.w, tf.float16), tf.float32)


@pytest.mark.parametrize("policy", ["native", "float32"])
@pytest.mark.parametrize(
    "build",
    [
        Casting,
        lambda: Casting(traced=True),
        lambda: keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), CastingLayer()]),
    ],
)
def test_float16_that_a_model_casts_itself_is_scaled_and_takes_the_fast_kernels(config, policy, build):
    config.precision.policy = policy
    built = trainer(config, build)
    assert float(built.optimizer.loss_scale) == config.loss_scale.initial_scale
    assert built.kernels.widen


def test_float32_is_not_scaled(config):
    config.precision.policy = "float32"
    built = trainers.ModuleTrainer(config)
    assert not built.uses_float16
    assert float(built.optimizer.loss_scale) == 1.0


def rounding_loss(self, batch, outputs):
    logits = tf.cast(outputs, tf.float16)
    return tf.cast(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=logits), tf.float32)


@pytest.mark.parametrize("loss", [rounding_loss, tf.function(rounding_loss)])
def test_logits_that_the_loss_casts_to_float16_and_back_are_refused(config, loss):
    with pytest.raises(InputError, match=r"^Built.compute_loss\(\) takes the outputs through float16"):
        trainer(config, lambda: stack(), compute_loss=loss)


def test_float16_teacher_in_the_loss_is_welcome(config):
    with precision.get("mixed_float16").scope():
        teacher = keras.Sequential([keras.Input((3,)), layers.Dense(3)])

    def loss(self, batch, outputs):
        return tf.reduce_mean((outputs - tf.cast(teacher(outputs), tf.float32)) ** 2, axis=-1)

    trainer(config, lambda: stack(), compute_loss=loss)


def test_float16_loss_of_an_own_step_is_refused(config):
    def step(self, batch):
        with tf.GradientTape() as tape:
            outputs = self.model(self.precision.cast_to_compute(batch["inputs"]), training=True)
            scaled = self.optimizer.get_scaled_loss(tf.reduce_mean(tf.cast(outputs, tf.float16)))
        gradients = self.optimizer.get_unscaled_gradients(tape.gradient(scaled, self.trainable_variables))
        return self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))

    built = trainer(config, lambda: stack(), replica_train_step=step)
    with pytest.raises(InputError, match=r"replica_train_step\(\) scales is float16"):
        built.train(tf.constant(1))


class Linear(tf.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.w = tf.Variable(tf.random.stateless_normal([inputs, outputs], [1, 2]) * 0.1, name="w")

    def __call__(self, x):
        return x @ tf.cast(self.w, x.dtype)


class Nested(tf.Module):
    """Its layers are called in the order z, blocks, a; the last in a function of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.z = Linear(4, 3), Linear(36, 4)
        self.blocks = [Linear(4, 4), Linear(4, 4)]
        self.last = tf.function(self.a)

    def __call__(self, x, training=False):
        x = self.z(tf.reshape(x, [-1, 36]))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("replicas", [1, 2])
def test_overflow_names_variables_of_nested_modules_in_forward_order(config, mirrored, replicas):
    built = type("Poisoned", (trainers.TinyTrainer,), {"build_model": lambda self: Nested(), "inputs": poisoned})(
        config, mirrored(replicas)
    )
    built.train(tf.constant(1))
    (skip,) = built.optimizer.skips(0, 1)
    assert skip.variables == ("z/w", "blocks/0/w", "blocks/1/w", "a/w")
    assert skip.layer == "z"


def poisoned(self, batch):
    return batch["inputs"] * np.inf


@pytest.mark.parametrize(
    ("build", "names"),
    [(lambda: Subclassed(middle=None), ["first", "middle", "logits"]), (lambda: stack(), ["first", "after", "logits"])],
)
def test_overflow_names_layers_in_forward_order(config, build, names):
    built = trainer(config, build, inputs=poisoned)
    built.train(tf.constant(1))
    (skip,) = built.optimizer.skips(0, 1)
    assert list(skip.variables) == [f"net/{name}/{kind}" for name in names for kind in ("kernel", "bias")]


def test_checkpoint_knows_variables_of_nested_modules_by_their_place(config):
    paths = [path for path in trainer(config, Nested).state if path.startswith("model/")]
    assert sorted(paths) == ["model/a/w", "model/blocks/0/w", "model/blocks/1/w", "model/z/w"]


class ModuleOfLayers(tf.Module):
    """Keras layers, built or not, beside a variable of its own."""

    def __init__(self, generation, built):
        super().__init__()
        self.norm = generation.layers.BatchNormalization()
        self.layers = [generation.layers.Flatten(), generation.layers.Dropout(0.2), generation.layers.Dense(3)]
        self.factor = tf.Variable(1.0)
        if built:
            self(tf.ones([1, 6, 6, 1]), training=False)

    def __call__(self, x, training):
        flatten, dropout, dense = self.layers
        return tf.cast(dense(dropout(flatten(self.norm(x, training=training)), training=training)), tf.float32) * self.factor


@pytest.mark.slow
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("generation", [keras, tf_keras])
def test_module_that_holds_keras_layers_trains_all_of_it(config, generation, built):
    first, second = (trainer(config, lambda: ModuleOfLayers(generation, built)) for _ in range(2))
    names = {"norm/gamma", "norm/beta", "layers/2/kernel", "layers/2/bias", "factor"}
    assert set(keras_compat.variables_by_path(first.trainable_variables)) == names
    assert {f"model/{name}" for name in (*names, "norm/moving_mean")} <= set(first.state)
    before = first.state["model/layers/2/kernel"].numpy(), first.state["model/norm/moving_mean"].numpy()
    for each in (first, second):
        each.train(tf.constant(3))
    assert not np.array_equal(before[0], first.state["model/layers/2/kernel"].numpy())
    assert not np.array_equal(before[1], first.state["model/norm/moving_mean"].numpy())
    for path, variable in first.state.items():  # so dropout draws its masks from (seed, step)
        np.testing.assert_array_equal(variable.numpy(), second.state[path].numpy(), err_msg=path)
    assert ("layers/2", "float16") in [(row.layer, row.compute_dtype) for row in precision.plan(first.model)]


def test_module_without_variables_is_refused_with_what_to_do(config):
    class Empty(tf.Module):
        def __call__(self, x, training=False):
            return tf.reshape(x, [-1, 36])[:, :3]

    with pytest.raises(InputError, match="has no trainable variables: keep its layers and tf.Variables in attributes"):
        trainer(config, Empty)


def test_calls_are_recorded_while_the_model_is_traced_and_never_after(config):
    before = keras.Layer.__call__, tf_keras.layers.Layer.__call__
    with pytest.raises(ValueError, match="expected min_ndim=1"):
        trainer(config, lambda: Subclassed(), inputs=lambda self, batch: batch["inputs"][0, 0, 0, 0])
    assert (keras.Layer.__call__, tf_keras.layers.Layer.__call__) == before


def test_overflows_that_are_no_longer_remembered_are_counted(config, tmp_path):
    config.trainer = "tests.trainers.PoisonedTrainer"
    config.model = ConfigDict({"poisoned_steps": list(range(80)), "poisoned_replica": 0})
    config.train.steps = config.train.steps_per_loop = config.checkpoint.every_steps = 80
    config.loss_scale.max_consecutive_skips = 100
    mptrain.run(config, tmp_path, "train")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, *others = [row for row in rows if "overflow" in row.get("event", "")]
    assert (first["event"], first["step"], first["count"]) == ("overflows_forgotten", 16, 16)
    assert [row["step"] for row in others] == list(range(16, 80))
