"""Trainers with one planted numerical fault each, for the reports that must find it."""

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import mptrain
from mptrain.data import Source
from tests.trainers import SEEDS, TinyTrainer


class VectorTrainer(TinyTrainer):
    """Healthy: two dense layers on vectors that tell three classes apart."""

    def build_source(self, split):
        rng = np.random.default_rng(SEEDS[split])
        targets = rng.integers(0, 3, 96).astype(np.int32)
        inputs = rng.normal(size=(96, 16)) + 4 * np.eye(3, 16)[targets]
        return Source({"inputs": inputs.astype(np.float32), "targets": targets})

    def build_model(self):
        return keras.Sequential([keras.Input((16,)), *self.middle(), keras.layers.Dense(3, dtype="float32", name="logits")])

    def middle(self):
        dense = keras.layers.Dense
        return [dense(32, activation="relu", name="first"), dense(32, activation="relu", name="second")]


class LoudTrainer(VectorTrainer):
    """The activations of `loud` pass 65,504; a normalization behind it brings them back."""

    def middle(self):
        loud = keras.layers.Dense(32, name="loud", kernel_initializer=keras.initializers.RandomNormal(stddev=40_000.0))
        return [keras.layers.Dense(32, activation="relu", name="first"), loud, keras.layers.LayerNormalization(name="quiet")]


FAINT = 1e-6


class FaintTrainer(VectorTrainer):
    """The loss is so small that all gradients lie below 2**-24."""

    def compute_loss(self, batch, outputs):
        return super().compute_loss(batch, outputs) * FAINT


class HalfSoftmax(keras.layers.Layer):
    """A softmax as it stands in textbooks, without the maximum taken off."""

    def call(self, x):
        e = tf.exp(x)
        return e / tf.reduce_sum(e, -1, keepdims=True)


class SoftmaxTrainer(VectorTrainer):
    """Attention-like weights by a softmax that is computed in float16, of scores up to fifty."""

    def middle(self):
        scores = keras.layers.Dense(32, name="scores", kernel_initializer=keras.initializers.RandomNormal(stddev=2.0))
        return [scores, HalfSoftmax(name="softmax"), keras.layers.Dense(32, activation="relu", name="second")]


class TinyEpsilonNorm(keras.layers.Layer):
    """Layer normalization with an epsilon that float16 rounds to zero."""

    def call(self, x):
        centred = x - tf.reduce_mean(x, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        return centred / tf.sqrt(variance + tf.cast(1e-9, x.dtype))


class NormTrainer(VectorTrainer):
    """The values that reach `norm` are so small that their variance vanishes in float16."""

    def middle(self):
        small = keras.layers.Dense(32, name="small", kernel_initializer=keras.initializers.RandomNormal(stddev=2e-5))
        return [small, TinyEpsilonNorm(name="norm"), keras.layers.Dense(32, activation="relu", name="second")]


class ScopedModule(tf.Module):
    """Two layers as a plain module, in named scopes; the values of `loud` pass 65,504."""

    def __init__(self):
        super().__init__()
        draw = tf.random.stateless_normal
        self.first = tf.Variable(draw([16, 32], [1, 2]) * 0.2, name="first")
        self.loud = tf.Variable(draw([32, 32], [3, 4]) * 40_000.0, name="loud")
        self.last = tf.Variable(draw([32, 3], [5, 6]) * 0.2, name="last")

    def __call__(self, x, training=False):
        with tf.name_scope("first"):
            x = tf.nn.relu(x @ tf.cast(self.first, x.dtype))
        with tf.name_scope("loud"):
            x = x @ tf.cast(self.loud, x.dtype)
        x = tf.cast(x, tf.float32) / 40_000.0
        return mptrain.numerics.watch("logits", x @ self.last)


class ScopedTrainer(VectorTrainer):
    def build_model(self):
        return ScopedModule()


class OldKerasTrainer(VectorTrainer):
    """LoudTrainer's network in tf_keras."""

    def build_model(self):
        layers, loud = tf_keras.layers, tf_keras.initializers.RandomNormal(stddev=40_000.0, seed=1)
        return tf_keras.Sequential(
            [
                layers.InputLayer((16,)),
                layers.Dense(32, activation="relu", name="first"),
                layers.Dense(32, name="loud", kernel_initializer=loud),
                layers.LayerNormalization(name="quiet", dtype="float32"),
                layers.Dense(3, dtype="float32", name="logits"),
            ]
        )


class KeywordTrainer(TinyTrainer):
    """Applies its gradients by keyword, and draws noise from a generator of its own."""

    def build_model(self):
        self.generator = tf.random.Generator.from_seed(1)
        return super().build_model()

    def replica_train_step(self, batch):
        with tf.GradientTape() as tape:
            noise = self.generator.normal(batch["inputs"].shape)
            outputs = self.precision.cast_to_output(self.model(self.precision.cast_to_compute(batch["inputs"] + noise)))
            loss = self.reduce_loss(self.compute_loss(batch, outputs))
            scaled_loss = self.optimizer.get_scaled_loss(loss)
        gradients = self.optimizer.get_unscaled_gradients(tape.gradient(scaled_loss, self.trainable_variables))
        applied = self.optimizer.apply_gradients(grads_and_vars=zip(gradients, self.trainable_variables, strict=True))
        self.update_metrics(batch, outputs, loss)
        return applied


class FunctionTrainer(TinyTrainer):
    """Traces its step into a function of its own, which hides the tape."""

    @tf.function
    def replica_train_step(self, batch):
        return super().replica_train_step(batch)


class FailingLookTrainer(TinyTrainer):
    """Cannot be traced a second time."""

    traces = 0

    def replica_train_step(self, batch):
        self.traces += 1
        if self.traces > 1:
            raise RuntimeError("traced once more")
        return super().replica_train_step(batch)


class PassingOnTrainer(LoudTrainer):
    """A layer that passes its input on stands behind `loud`."""

    def middle(self):
        first, loud, quiet = super().middle()
        return [first, loud, keras.layers.Activation("linear", name="nothing"), quiet]


class PickyTrainer(VectorTrainer):
    """Refuses bfloat16."""

    def build_model(self):
        if self.precision.name == "mixed_bfloat16":
            raise mptrain.InputError("PickyTrainer has no kernel for bfloat16: write mixed_float16")
        return super().build_model()
