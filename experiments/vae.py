"""A variational autoencoder (Kingma and Welling, 2014), with its reconstructions and samples as pictures in TensorBoard."""

import keras
import tensorflow as tf

import mptrain

_SHOWN = 40  # digits in a picture


class VaeTrainer(mptrain.Trainer):
    """The loss is the negative evidence lower bound, in nats a digit; grey values are taken as probabilities."""

    def build_model(self) -> keras.Model:
        layers, latent, hidden = keras.layers, self.config.model.latent, self.config.model.hidden
        images, noise = keras.Input((28, 28, 1), name="images"), keras.Input((latent,), name="noise")
        encoder = keras.Sequential([layers.Flatten(), *self.hidden_layers(hidden)], name="encoder")
        decoder = keras.Sequential(
            [
                keras.Input((latent,)),
                *self.hidden_layers(hidden),
                layers.Dense(28 * 28, dtype="float32", name="logits"),
                layers.Reshape((28, 28, 1), dtype="float32", name="picture"),
            ],
            name="decoder",
        )
        code = encoder(images)
        mean = layers.Dense(latent, dtype="float32", name="mean")(code)
        log_variance = layers.Dense(latent, dtype="float32", name="log_variance")(code)
        logits = decoder(mean + keras.ops.exp(0.5 * log_variance) * noise)  # the reparametrisation trick
        outputs = {"logits": logits, "mean": mean, "log_variance": log_variance}
        return keras.Model({"images": images, "noise": noise}, outputs, name="vae")

    @staticmethod
    def hidden_layers(units: int) -> list[keras.Layer]:
        return [keras.layers.Dense(units, activation="relu", name=f"hidden{number}") for number in (1, 2)]

    def augment(self, batch) -> dict[str, tf.Tensor]:
        return {**batch, "noise": self.randomness.normal_per_example(self.config.model.latent)}

    def inputs(self, batch) -> dict[str, tf.Tensor]:
        """Returns images and noise; in evaluation always the same noise."""
        images = self.images(batch)
        return {"images": images, "noise": batch["noise"] if "noise" in batch else self.fixed_noise(tf.shape(images)[0])}

    @staticmethod
    def images(batch) -> tf.Tensor:
        return tf.cast(batch["inputs"], tf.float32) / 255.0

    def fixed_noise(self, count: int | tf.Tensor) -> tf.Tensor:
        return tf.random.stateless_normal([count, self.config.model.latent], [self.config.seed, 0])

    def compute_loss(self, batch, outputs) -> tf.Tensor:
        errors = tf.nn.sigmoid_cross_entropy_with_logits(labels=self.images(batch), logits=outputs["logits"])
        return tf.reduce_sum(errors, axis=[1, 2, 3]) + divergence(outputs)

    def build_metrics(self) -> dict[str, keras.metrics.Metric]:
        return {"kl": keras.metrics.MeanMetricWrapper(lambda targets, outputs: divergence(outputs))}

    def pictures(self) -> dict[str, tf.Tensor]:
        """Digits of the evaluation, each with its reconstruction at its right; and digits decoded from noise."""
        digits = self.eval_source.arrays["inputs"]
        count = min(_SHOWN, len(digits)) // 5 * 5  # whole rows, of five pairs
        batch = {"inputs": digits[:count]}
        outputs = self.model(self.precision.cast_to_compute(self.inputs(batch)), training=False)
        decoded = self.model.get_layer("decoder")(self.fixed_noise(2 * _SHOWN), training=False)
        pairs = tf.stack([self.images(batch), tf.sigmoid(outputs["logits"])], axis=1)
        return {
            "reconstructions": mptrain.grid(tf.reshape(pairs, [2 * count, 28, 28, 1]), columns=10),
            "samples": mptrain.grid(tf.sigmoid(decoded), columns=10),
        }


def divergence(outputs: dict[str, tf.Tensor]) -> tf.Tensor:
    """Returns the Kullback-Leibler divergence of each code's distribution from the standard normal one, float32 [batch]."""
    mean, log_variance = outputs["mean"], outputs["log_variance"]
    return 0.5 * tf.reduce_sum(tf.exp(log_variance) + tf.square(mean) - 1.0 - log_variance, axis=1)
