"""The transformer of `experiments/transformer.py` without Keras: a plain `tf.Module` in which every cast can be read.

Weights are float32 and are cast where they are used, to `config.model.compute_dtype`. The precision is "native": mptrain casts
nothing, finds the float16 in the traced graph and scales the loss. On equal weights the loss is that of the Keras model
(`tests/test_transformer_module.py`).
"""

import tensorflow as tf

from experiments.transformer import VOCABULARY, TransformerTrainer


class ModuleTransformerTrainer(TransformerTrainer):
    """Another model; loss, metrics and data are inherited."""

    def build_model(self) -> tf.Module:
        model = self.config.model
        dtype = tf.as_dtype(model.compute_dtype)
        return Transformer(model.layers, model.width, model.heads, self.config.data.context, dtype)


class Transformer(tf.Module):
    """From bytes, uint8 [batch, context], to logits, float32 [batch, context, 256]."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dtype: tf.DType):
        super().__init__()
        self.dtype = dtype
        self.embedding = tf.Variable(tf.random.uniform([VOCABULARY, width], -0.05, 0.05), name="embedding")
        self.positions = tf.Variable(tf.random.uniform([context, width], -0.05, 0.05), name="positions")
        self.blocks = [Block(width, heads, name=f"block{number}") for number in range(layers)]
        self.norm = LayerNorm(width, name="norm")
        self.logits = Dense(width, VOCABULARY, name="logits")

    def __call__(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = tf.cast(tf.gather(self.embedding, tf.cast(inputs, tf.int32)), self.dtype)
        x += tf.cast(self.positions, self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.logits(tf.cast(self.norm(x), tf.float32))


class Block(tf.Module):
    """Attention and two dense layers, each behind a norm and added to what came in; in the dtype of what came in."""

    def __init__(self, width: int, heads: int, name: str):
        super().__init__(name=name)
        self.heads = heads
        with self.name_scope:  # by which mptrain's reports call these layers
            self.attention_norm = LayerNorm(width, name="attention_norm")
            self.query_key_value = Dense(width, 3 * width, bias=False, name="query_key_value")
            self.output_dense = Dense(width, width, name="output_dense")
            self.dense_norm = LayerNorm(width, name="dense_norm")
            self.widen = Dense(width, 4 * width, name="widen")
            self.narrow = Dense(4 * width, width, name="narrow")

    @tf.Module.with_name_scope
    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        x += self.output_dense(self.attention(self.query_key_value(self.attention_norm(x))))
        return x + self.narrow(tf.nn.gelu(self.widen(self.dense_norm(x))))

    def attention(self, parts: tf.Tensor) -> tf.Tensor:
        """From queries, keys and values, [batch, context, 3 * width], to the mixed values, [batch, context, width]."""
        context, size = parts.shape[1], parts.shape[2] // (3 * self.heads)
        query, key, value = tf.unstack(tf.reshape(parts, [-1, context, 3, self.heads, size]), axis=2)
        scores = tf.cast(tf.einsum("bqhd,bkhd->bhqk", query / size**0.5, key), tf.float32)
        past = tf.linalg.band_part(tf.ones([context, context], tf.bool), -1, 0)
        weights = tf.cast(tf.nn.softmax(tf.where(past, scores, -1e9)), value.dtype)
        return tf.reshape(tf.einsum("bhqk,bkhd->bqhd", weights, value), [-1, context, self.heads * size])


class LayerNorm(tf.Module):
    """Normalizes in float32 and returns the dtype of what came in."""

    def __init__(self, width: int, name: str):
        super().__init__(name=name)
        self.gamma = tf.Variable(tf.ones([width]), name="gamma")
        self.beta = tf.Variable(tf.zeros([width]), name="beta")

    @tf.Module.with_name_scope
    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        wide = tf.cast(x, tf.float32)
        mean, variance = tf.nn.moments(wide, axes=[-1], keepdims=True)
        return tf.cast((wide - mean) * tf.math.rsqrt(variance + 1e-3) * self.gamma + self.beta, x.dtype)


class Dense(tf.Module):
    """A matrix product in the dtype of what came in."""

    def __init__(self, inputs: int, outputs: int, name: str, bias: bool = True):
        super().__init__(name=name)
        limit = (6 / (inputs + outputs)) ** 0.5  # Glorot and Bengio, 2010
        self.kernel = tf.Variable(tf.random.uniform([inputs, outputs], -limit, limit), name="kernel")
        self.bias = tf.Variable(tf.zeros([outputs]), name="bias") if bias else None

    @tf.Module.with_name_scope
    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        y = x @ tf.cast(self.kernel, x.dtype)
        return y if self.bias is None else y + tf.cast(self.bias, x.dtype)
