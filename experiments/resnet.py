"""A residual network for small images (He et al., 2016), with BatchNorm and the usual augmentation: pad, crop, flip."""

import keras
import tensorflow as tf

import mptrain


class ResNetTrainer(mptrain.Trainer):
    """Three stages of `config.model.blocks` residual blocks, the first `config.model.width` channels wide.

    Three blocks a stage and 16 channels are the ResNet-20 of the paper. Images may be of any size, uint8 or float.
    """

    def build_model(self) -> keras.Model:
        layers, model = keras.layers, self.config.model
        inputs = keras.Input(self.train_source.spec["inputs"].shape)
        x = layers.ReLU(name="stem_relu")(_normalized(inputs, model.width, 3, 1, "stem"))
        for stage in range(3):
            for block in range(model.blocks):
                stride = 2 if stage and not block else 1
                x = _residual(x, model.width * 2**stage, stride, f"stage{stage}_block{block}")
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        logits = layers.Dense(model.classes, dtype="float32", name="logits")(x)
        return keras.Model(inputs, logits, name="resnet")

    def augment(self, batch):
        """Moves each image by up to `config.model.pad` pixels each way, and mirrors half of them if `config.model.flip`."""
        pad, (_, height, width, _) = self.config.model.pad, batch["inputs"].shape
        random = self.randomness.per_example(3)  # the same for an example on any number of replicas, and after a resume
        rows, columns = tf.split(tf.cast(random[:, :2] * (2 * pad + 1), tf.int32), 2, axis=1)
        rows, columns = rows + tf.range(height), columns + tf.range(width)
        if self.config.model.flip:
            columns = tf.where(random[:, 2:] < 0.5, columns, tf.reverse(columns, axis=[1]))
        images = tf.pad(batch["inputs"], [[0, 0], [pad, pad], [pad, pad], [0, 0]])
        images = tf.gather(images, rows, axis=1, batch_dims=1)
        return {**batch, "inputs": tf.gather(images, columns, axis=2, batch_dims=1)}

    def inputs(self, batch) -> tf.Tensor:
        return tf.image.per_image_standardization(batch["inputs"])  # float32: a sum of 3,072 bytes is no float16

    def compute_loss(self, batch, outputs) -> tf.Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=outputs)

    def build_metrics(self) -> dict[str, keras.metrics.Metric]:
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}


def _normalized(x, width: int, size: int, stride: int, name: str):
    """A convolution without bias, and BatchNorm, which has one. Keras takes its mean and variance in float32."""
    x = keras.layers.Conv2D(
        width, size, stride, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
    )(x)
    return keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)


def _residual(x, width: int, stride: int, name: str):
    """Two convolutions, added to what came in; where the shape changes, to a projection of it."""
    shortcut = x
    if stride > 1 or x.shape[-1] != width:
        shortcut = _normalized(x, width, 1, stride, f"{name}_shortcut")
    x = keras.layers.ReLU(name=f"{name}_relu1")(_normalized(x, width, 3, stride, f"{name}_1"))
    x = _normalized(x, width, 3, 1, f"{name}_2")
    return keras.layers.ReLU(name=f"{name}_relu2")(keras.layers.Add(name=f"{name}_add")([shortcut, x]))
