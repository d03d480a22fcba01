"""A small convolutional network on MNIST: the smallest whole Trainer."""

import keras
import tensorflow as tf

import mptrain


class MnistTrainer(mptrain.Trainer):
    """Two convolutions and two dense layers; also fits Fashion-MNIST, KMNIST and EMNIST digits (data.name="idx")."""

    def build_model(self) -> keras.Model:
        layers, width = keras.layers, self.config.model.get("width", 32)
        return keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(width, 5, activation="relu", name="conv1"),
                layers.MaxPooling2D(name="pool1"),
                layers.Conv2D(2 * width, 5, activation="relu", name="conv2"),
                layers.MaxPooling2D(name="pool2"),
                layers.Flatten(name="flatten"),
                layers.Dropout(self.config.model.dropout, name="dropout1"),
                layers.Dense(4 * width, activation="relu", name="dense"),
                layers.Dropout(self.config.model.dropout, name="dropout2"),
                layers.Dense(10, dtype="float32", name="logits"),
            ],
            name="cnn",
        )

    def augment(self, batch):
        """Moves each image by up to `config.model.shift` pixels up, down, left and right."""
        shift, (_, height, width, _) = self.config.model.shift, batch["inputs"].shape
        offsets = tf.cast(self.randomness.per_example(2) * (2 * shift + 1), tf.int32)
        images = tf.pad(batch["inputs"], [[0, 0], [shift, shift], [shift, shift], [0, 0]])
        images = tf.gather(images, offsets[:, :1] + tf.range(height), axis=1, batch_dims=1)
        return {**batch, "inputs": tf.gather(images, offsets[:, 1:] + tf.range(width), axis=2, batch_dims=1)}

    def inputs(self, batch) -> tf.Tensor:
        return tf.cast(batch["inputs"], tf.float32) / 255.0

    def compute_loss(self, batch, outputs) -> tf.Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=outputs)

    def build_metrics(self) -> dict[str, keras.metrics.Metric]:
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}
