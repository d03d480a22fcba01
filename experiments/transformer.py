"""A language model over bytes: a decoder of pre-norm blocks (Vaswani et al., 2017; Xiong et al., 2020).

Under a mixed policy the matrix products, and the sums that run from block to block, are 16 bits wide. Float32 stay:

- the softmax of attention, which adds up as many exponentials as there are bytes in the window, and its mask, -1e9;
- mean and variance of LayerNorm, which Keras takes in float32 in every precision: the square of 256 is inf in float16;
- the logits and the loss: near 16, float16 knows a logit to 1/64 only, which is 1.6 % of a probability.
"""

import math

import keras
import tensorflow as tf
from keras import ops

import mptrain

VOCABULARY = 256  # the bytes


class TransformerTrainer(mptrain.Trainer):
    """`config.model.layers` blocks of width `config.model.width` over windows of `config.data.context` bytes."""

    def build_model(self) -> keras.Model:
        layers, model = keras.layers, self.config.model
        inputs = keras.Input((self.config.data.context,), dtype="uint8")
        x = layers.Embedding(VOCABULARY, model.width, name="embedding")(inputs)
        x = Positions(name="positions")(x)
        for number in range(model.layers):
            x = Block(model.width, model.heads, name=f"block{number}")(x)
        x = layers.LayerNormalization(name="norm")(x)
        logits = layers.Dense(VOCABULARY, dtype="float32", name="logits")(x)
        return keras.Model(inputs, logits, name="transformer")

    def compute_loss(self, batch, outputs) -> tf.Tensor:
        """One loss for each byte, [batch, context]; mptrain takes the mean."""
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=outputs)

    def build_metrics(self) -> dict[str, keras.metrics.Metric]:
        return {"bits_per_byte": BitsPerByte()}


class BitsPerByte(keras.metrics.SparseCategoricalCrossentropy):
    """The cross-entropy to base 2: how many bits a byte takes when the model's probabilities compress the text."""

    def __init__(self):
        super().__init__(name="bits_per_byte", from_logits=True)

    def result(self):
        return super().result() / math.log(2)


class Positions(keras.layers.Layer):
    """Adds a learned vector for each place in the window."""

    def build(self, shape):
        self.table = self.add_weight(name="table", shape=shape[1:], initializer="uniform")

    def call(self, x):
        return x + self.table


class Block(keras.layers.Layer):
    """Attention and two dense layers, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int, **options):
        super().__init__(**options)
        self.attention_norm = keras.layers.LayerNormalization(name="attention_norm")
        self.attention = CausalAttention(width, heads, name="attention")
        self.dense_norm = keras.layers.LayerNormalization(name="dense_norm")
        self.widen = keras.layers.Dense(4 * width, activation="gelu", name="widen")
        self.narrow = keras.layers.Dense(width, name="narrow")

    def call(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(self.widen(self.dense_norm(x)))


class CausalAttention(keras.layers.Layer):
    """Each byte looks at itself and at those before it, in several heads."""

    def __init__(self, width: int, heads: int, **options):
        super().__init__(**options)
        self.heads = heads
        self.query_key_value = keras.layers.Dense(3 * width, use_bias=False, name="query_key_value")
        self.output_dense = keras.layers.Dense(width, name="output_dense")

    def call(self, x):
        _, context, width = x.shape
        parts = ops.reshape(self.query_key_value(x), [-1, context, 3, self.heads, width // self.heads])
        query, key, value = ops.unstack(parts, axis=2)
        query = query / math.sqrt(width // self.heads)  # before the product, so that it does not overflow
        scores = ops.cast(ops.einsum("bqhd,bkhd->bhqk", query, key), "float32")
        past = ops.tril(ops.ones([context, context], "bool"))
        weights = ops.softmax(ops.where(past, scores, -1e9))
        mixed = ops.einsum("bhqk,bkhd->bqhd", ops.cast(weights, self.compute_dtype), value)
        return self.output_dense(ops.reshape(mixed, [-1, context, width]))
