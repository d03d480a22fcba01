"""Trainers with one planted numerical fault each, for the reports that must find it."""

import os
import signal

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


class ShrunkTrainer(VectorTrainer):
    """At loss scale 1 `shrink` leaves `second` most of its gradient, and `first` next to none."""

    def middle(self):
        first, second = super().middle()
        return [first, keras.layers.Rescaling(1e-6, name="shrink"), second]


@tf.custom_gradient
def _narrow(x):
    return tf.identity(x), lambda gradient: gradient * tf.constant(1e-5, gradient.dtype) * tf.constant(1e-5, gradient.dtype)


class NarrowTrainer(VectorTrainer):
    """`narrow` takes gradients down by ten powers of ten on their way to `first`, further than any loss scale bridges."""

    def middle(self):
        first, second = super().middle()
        return [first, keras.layers.Lambda(_narrow, name="narrow"), second]


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


TRACED = []


class FailingLookTrainer(TinyTrainer):
    """Cannot be traced a second time."""

    def replica_train_step(self, batch):
        TRACED.append(type(self))
        if len(TRACED) > 1:
            raise RuntimeError("traced once more")
        return super().replica_train_step(batch)


class PassingOnTrainer(LoudTrainer):
    """A layer that passes its input on stands behind `loud`."""

    def middle(self):
        first, loud, quiet = super().middle()
        return [first, loud, keras.layers.Activation("linear", name="nothing"), quiet]


class MaskTrainer(VectorTrainer):
    """`mask` takes half of the scores out of a softmax: by what is infinite in float16 alone, and does no harm there."""

    minus = -1e9

    def middle(self):
        first, second = super().middle()
        mask = keras.layers.Lambda(lambda x: x + tf.constant([0.0, self.minus] * 16, x.dtype), name="mask")
        return [first, mask, keras.layers.Softmax(name="softmax"), second]


class InfiniteMaskTrainer(MaskTrainer):
    """MaskTrainer, infinite in float32 too."""

    minus = -np.inf


@tf.custom_gradient
def _steep(x):
    return tf.identity(x), lambda gradient: gradient * tf.constant(6e4, gradient.dtype) * tf.constant(6e4, gradient.dtype)


class SteepTrainer(VectorTrainer):
    """The gradient of `second` passes 65,504 on its way back, whatever the loss scale is; all outputs are small."""

    def middle(self):
        return [*super().middle(), keras.layers.Lambda(_steep, name="steep")]


class CastingModule(tf.Module):
    """Computes in float16 by itself, and names its weights as `np.savez` names its arguments."""

    def __init__(self):
        super().__init__()
        draw = tf.random.stateless_normal
        self.file = tf.Variable(draw([16, 32], [1, 2]) * 0.2, name="file")
        self.last = tf.Variable(draw([32, 3], [3, 4]) * 0.2, name="last")

    def __call__(self, x, training=False):
        with tf.name_scope("hidden"):
            x = tf.nn.relu(tf.cast(x, tf.float16) @ tf.cast(self.file, tf.float16))
        return tf.cast(x, tf.float32) @ self.last


class CastingTrainer(VectorTrainer):
    def build_model(self):
        return CastingModule()


class CentredModule(tf.Module):
    """A bias before a normalization, which takes it off again: its gradient is rounding errors in every precision."""

    def __init__(self):
        super().__init__()
        draw = tf.random.stateless_normal
        self.first = tf.Variable(draw([16, 32], [1, 2]) * 0.2, name="first")
        self.bias = tf.Variable(tf.zeros([32]), name="bias")
        self.last = tf.Variable(draw([32, 3], [3, 4]) * 0.2, name="last")

    def __call__(self, x, training=False):
        x = x @ tf.cast(self.first, x.dtype) + tf.cast(self.bias, x.dtype)
        x = x - tf.reduce_mean(x, 0, keepdims=True)
        x = tf.nn.relu(x * tf.math.rsqrt(tf.reduce_mean(x * x, 0, keepdims=True) + tf.constant(1e-3, x.dtype)))
        return tf.cast(x, tf.float32) @ self.last


class CentredTrainer(VectorTrainer):
    def build_model(self):
        return CentredModule()


class TwoOptimizersTrainer(VectorTrainer):
    """Trains its first layer by an optimizer of Keras's own, and evaluates to a metric that the training has not."""

    def build_model(self):
        model = super().build_model()
        self.plain = keras.optimizers.SGD(0.01)
        self.plain.build(model.layers[0].trainable_variables)
        return model

    def replica_train_step(self, batch):
        with tf.GradientTape() as tape:
            outputs = self.precision.cast_to_output(self.model(self.precision.cast_to_compute(batch["inputs"])))
            loss = self.reduce_loss(self.compute_loss(batch, outputs))
            scaled_loss = self.optimizer.get_scaled_loss(loss)
        gradients = self.optimizer.get_unscaled_gradients(tape.gradient(scaled_loss, self.trainable_variables))
        pairs = list(zip(gradients, self.trainable_variables, strict=True))
        self.plain.apply_gradients(pairs[:2])
        applied = self.optimizer.apply_gradients(pairs[2:])
        self.update_metrics(batch, outputs, loss)
        return applied

    def eval_end(self):
        return super().eval_end() | {"distance": tf.constant(2.5)}


class CrashingTrainer(VectorTrainer):
    """Is killed in float16, and fails in TensorFlow in bfloat16."""

    def replica_train_step(self, batch):
        if self.precision.name == "mixed_float16":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.precision.name == "mixed_bfloat16":
            columns = tf.cast(self.global_step, tf.int32) + 2
            nothing = tf.reduce_sum(tf.ones([3, 1]) @ tf.ones([columns, 1]))
            batch = batch | {"inputs": batch["inputs"] + nothing}
        return super().replica_train_step(batch)


class PickyTrainer(VectorTrainer):
    """Refuses bfloat16."""

    def build_model(self):
        if self.precision.name == "mixed_bfloat16":
            raise mptrain.InputError("PickyTrainer has no kernel for bfloat16: write mixed_float16")
        return super().build_model()


class SharedTrainer(VectorTrainer):
    """`shared` is called three times, `middle` after the first; `config.model.gains` are what the two multiply by."""

    def build_model(self):
        def dense(name, gain):
            return keras.layers.Dense(16, name=name, kernel_initializer=keras.initializers.Identity(gain))

        shared, middle = map(dense, ("shared", "middle"), self.config.model.gains)
        inputs = keras.Input((16,))
        x = shared(shared(middle(shared(inputs))))
        x = keras.layers.LayerNormalization(name="quiet", dtype="float32")(x)
        return keras.Model(inputs, keras.layers.Dense(3, dtype="float32", name="logits")(x), name="model")


class BetweenModel(keras.Model):
    """Computes an exponential between two layers, in its own code."""

    def __init__(self, cast=False):
        super().__init__(name="between_model")
        self.first = keras.layers.Dense(32, name="first", kernel_initializer=keras.initializers.RandomNormal(stddev=2.0))
        self.second = keras.layers.Dense(32, activation="relu", name="second")
        self.logits = keras.layers.Dense(3, dtype="float32", name="logits")
        self.cast = cast

    def call(self, x, training=False):
        x = self.first(x)
        if self.cast:  # which makes the layers' dtypes matter nothing
            x = tf.cast(x, tf.float16)
        x = tf.exp(x)
        return self.logits(self.second(x / tf.reduce_sum(x, -1, keepdims=True)))


class BetweenTrainer(VectorTrainer):
    def build_model(self):
        return BetweenModel(self.config.model.get("cast", False))


class OnlyTrainer(VectorTrainer):
    """The one layer with weights that computes in 16 bits feeds an exponential of Keras's own, which overflows."""

    def build_model(self):
        inputs = keras.Input((16,))
        x = keras.ops.exp(keras.layers.Dense(32, name="only")(inputs) * 8)
        x = x / keras.ops.sum(x, -1, keepdims=True)
        return keras.Model(inputs, keras.layers.Dense(3, dtype="float32", name="logits")(x), name="model")


class BrokenTrainer(VectorTrainer):
    """Of the examples that `config.model.broken` names either the inputs or the losses are not finite, in any precision."""

    def build_source(self, split):
        source = super().build_source(split)
        if split == "train" and self.config.model.what == "inputs":
            source.arrays["inputs"][self.config.model.broken, 0] = np.inf
        weight = np.zeros(len(source), np.float32)
        if split == "train" and self.config.model.what == "loss":
            weight[self.config.model.broken] = np.inf
        return Source({**source.arrays, "extra": weight})

    def compute_loss(self, batch, outputs):
        return super().compute_loss(batch, outputs) + batch["extra"] * tf.reduce_sum(outputs, -1)


class Block(tf.Module):
    """Two products in scopes of their own, inside the scope of the block."""

    def __init__(self, width, size, seed, name):
        super().__init__(name=name)
        self.up = Product(width, 1.0 / 4, seed, "up")
        self.down = Product(width, size, seed + 1, "down")

    @tf.Module.with_name_scope
    def __call__(self, x):
        return self.down(tf.nn.relu(self.up(x)))


class Product(tf.Module):
    def __init__(self, width, size, seed, name):
        super().__init__(name=name)
        self.kernel = tf.Variable(tf.random.stateless_normal([width, width], [seed, 0]) * size, name="kernel")

    @tf.Module.with_name_scope
    def __call__(self, x):
        return x @ tf.cast(self.kernel, x.dtype)


class NestedModule(tf.Module):
    """Blocks in blocks; `blocks/second/down` passes 65,504."""

    def __init__(self, half):
        super().__init__(name="nested")
        self.half = half
        self.blocks = [Block(16, 0.25, 1, "zeroth"), Block(16, 40_000.0, 3, "second")]
        self.last = tf.Variable(tf.random.stateless_normal([16, 3], [5, 6]) * 0.2, name="last")

    def __call__(self, x, training=False):
        if self.half == "bitwise":  # which nothing can ask for float32
            x = tf.saturate_cast(x, tf.float16) + tf.constant(0.0, tf.float16)
        elif self.half:
            x = tf.cast(x, tf.float16)
        with tf.name_scope("blocks"):
            for block in self.blocks:
                x = block(x)
        return (tf.cast(x, tf.float32) / 40_000.0) @ self.last


class NestedTrainer(VectorTrainer):
    def build_model(self):
        return NestedModule(self.config.model.get("half", False))


class TwoBatchesTrainer(VectorTrainer):
    """Draws two batches a step and trains on their mean, by a step of its own."""

    def train_step(self, iterator):
        first, second = next(iterator), next(iterator)
        mixed = {"inputs": (first["inputs"] + second["inputs"]) / 2, "targets": first["targets"]}
        self.strategy.run(lambda batch: self.guarded_step(batch), args=(mixed,))
        self.global_step.assign_add(1)
        self.seen = tf.reduce_sum(first["targets"])


class RowsTrainer(VectorTrainer):
    """Looks the signs of the inputs up in a table of four rows."""

    def inputs(self, batch):
        return tf.cast(batch["inputs"] > 0, tf.int32) + 2 * tf.cast(batch["inputs"] > 1, tf.int32)

    def build_model(self):
        layers = keras.layers
        rows = layers.Embedding(4, 8, name="rows")
        return keras.Sequential(
            [keras.Input((16,), dtype="int32"), rows, layers.Flatten(), layers.Dense(3, dtype="float32", name="logits")]
        )


class MaskedTrainer(VectorTrainer):
    """Healthy: scores that a mask sets to minus infinity before a softmax, and two inputs and outputs."""

    def inputs(self, batch):
        return {"left": batch["inputs"][:, :8], "right": batch["inputs"][:, 8:]}

    def build_model(self):
        return MaskedModel()

    def compute_loss(self, batch, outputs):
        return sum(super(MaskedTrainer, self).compute_loss(batch, output) for output in outputs)

    def update_metrics(self, batch, outputs, loss):
        super().update_metrics(batch, outputs[0], loss)


class MaskedModel(keras.Model):
    def __init__(self):
        super().__init__(name="masked")
        self.left, self.right = (keras.layers.Dense(8, name=name) for name in ("left", "right"))
        self.softmax = keras.layers.Softmax(name="softmax")
        self.heads = [keras.layers.Dense(3, dtype="float32", name=f"head_{i}") for i in range(2)]

    def call(self, inputs, training=False):
        scores = self.left(inputs["left"])
        scores = tf.where(tf.range(8) < 5, scores, tf.cast(-np.inf, scores.dtype))
        x = self.softmax(scores) * self.right(inputs["right"])
        return [head(x) for head in self.heads]


class VarianceNorm(keras.layers.Layer):
    """Layer normalization by the mean of squares less the square of the mean, which rounding makes negative."""

    def call(self, x):
        mean = tf.reduce_mean(x, -1, keepdims=True)
        variance = tf.reduce_mean(x * x, -1, keepdims=True) - mean * mean
        return (x - mean) / tf.sqrt(variance + tf.cast(1e-3, x.dtype))


class VarianceTrainer(VectorTrainer):
    """What reaches `norm` lies far from zero."""

    def middle(self):
        far = keras.layers.Dense(32, name="far", bias_initializer=keras.initializers.Constant(100.0))
        return [far, VarianceNorm(name="norm"), keras.layers.Dense(32, activation="relu", name="second")]
