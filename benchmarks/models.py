"""The models of the comparison, made of the layers of Keras 3 or of tf_keras; `torch_models.py` has them for PyTorch."""

import tensorflow as tf

from benchmarks import works


def build(library, work: works.Work):
    """Returns the work's model with its initial weights.

    Args:
        library: the module keras or tf_keras; its dtype policy holds.
        work: what to build.
    """
    inputs = library.Input(work.shape, dtype="int32" if work.name == "transformer" else "float32")
    outputs = _BODIES[work.name](library.layers, library, inputs, work)
    model = library.Model(inputs, library.layers.Dense(work.classes, dtype="float32")(outputs))
    for number, variable in enumerate(model.weights):
        value = works.weight(number, tuple(variable.shape))
        if value is not None:
            variable.assign(value)
    return model


def _mlp(layers, library, x, work):
    for _ in range(2):
        x = layers.Dense(work.sizes["width"], activation="relu")(x)
    return x


def _cnn(layers, library, x, work):
    for times in (1, 2):
        x = layers.Conv2D(times * work.sizes["filters"], 5, activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    return layers.Dense(work.sizes["width"], activation="relu")(layers.Flatten()(x))


def _resnet(layers, library, x, work):
    """A residual network for small images (He et al., 2016, section 4.2)."""

    def convolution(x, filters, size, stride):
        x = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = layers.ReLU()(convolution(x, work.sizes["filters"], 3, 1))
    for times in (1, 2, 4):
        for block in range(work.sizes["blocks"]):
            stride = 2 if times > 1 and block == 0 else 1
            filters = times * work.sizes["filters"]
            y = layers.ReLU()(convolution(x, filters, 3, stride))
            y = convolution(y, filters, 3, 1)
            x = convolution(x, filters, 1, stride) if stride > 1 else x
            x = layers.ReLU()(layers.Add()([x, y]))
    return layers.GlobalAveragePooling2D()(x)


def _transformer(layers, library, x, work):
    """Layers that normalize first (Xiong et al., 2020), with learned positions."""
    attention, positions = _attention(library), _positions(library)
    width, heads = work.sizes["width"], work.sizes["heads"]
    x = positions()(layers.Embedding(work.classes, width)(x))
    for _ in range(work.sizes["layers"]):
        y = layers.Dense(3 * width)(layers.LayerNormalization(epsilon=1e-5)(x))
        x = layers.Add()([x, layers.Dense(width)(attention(heads)(y))])
        y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization(epsilon=1e-5)(x))
        x = layers.Add()([x, layers.Dense(width)(y)])
    return layers.LayerNormalization(epsilon=1e-5)(x)


def _positions(library):
    class Positions(library.layers.Layer):
        """Adds a learned vector to each place."""

        def build(self, shape):
            self.table = self.add_weight(name="table", shape=tuple(shape[1:]))

        def call(self, x):
            return x + tf.cast(tf.convert_to_tensor(self.table), x.dtype)

    return Positions


def _attention(library):
    class Attention(library.layers.Layer):
        """Causal attention over [batch, places, queries | keys | values]."""

        def __init__(self, heads):
            super().__init__()
            self.heads = heads

        def call(self, x):
            _, places, width = x.shape
            split = tf.reshape(x, [-1, places, 3, self.heads, width // 3 // self.heads])
            query, key, value = tf.unstack(tf.transpose(split, [2, 0, 3, 1, 4]))
            scores = tf.matmul(query * query.shape[-1] ** -0.5, key, transpose_b=True)
            future = tf.linalg.band_part(tf.ones([places, places], scores.dtype), -1, 0) < 1
            scores = tf.where(future, tf.constant(-1e4, scores.dtype), scores)
            mixed = tf.matmul(tf.nn.softmax(scores), value)
            return tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [-1, places, width // 3])

    return Attention


_BODIES = {"mlp": _mlp, "cnn": _cnn, "resnet": _resnet, "transformer": _transformer}
