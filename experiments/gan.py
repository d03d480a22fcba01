"""A generative adversarial network (Goodfellow et al., 2014; Radford et al., 2016): two optimizers in one step."""

import functools

import keras
import tensorflow as tf

import mptrain

_SHOWN = 64  # digits in the picture


class Gan(tf.Module):
    """Generator and discriminator; called, it discriminates.

    Args:
        noise: numbers that a digit is made from.
        width: channels of the smallest convolution.
    """

    def __init__(self, noise: int, width: int):
        super().__init__(name="gan")
        layers = keras.layers
        self.generator = keras.Sequential(
            [
                keras.Input((noise,)),
                layers.Dense(7 * 7 * 2 * width, use_bias=False, name="dense"),
                layers.BatchNormalization(name="norm1"),
                layers.ReLU(name="relu1"),
                layers.Reshape((7, 7, 2 * width), name="reshape"),
                layers.Conv2DTranspose(width, 4, 2, "same", use_bias=False, name="conv1"),
                layers.BatchNormalization(name="norm2"),
                layers.ReLU(name="relu2"),
                layers.Conv2DTranspose(1, 4, 2, "same", activation="sigmoid", dtype="float32", name="conv2"),
            ],
            name="generator",
        )
        self.discriminator = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(width, 4, 2, "same", name="conv1"),
                layers.LeakyReLU(0.2, name="relu1"),
                layers.Dropout(0.3, name="dropout1"),
                layers.Conv2D(2 * width, 4, 2, "same", name="conv2"),
                layers.LeakyReLU(0.2, name="relu2"),
                layers.Dropout(0.3, name="dropout2"),
                layers.Flatten(name="flatten"),
                layers.Dense(1, dtype="float32", name="logit"),
            ],
            name="discriminator",
        )

    def __call__(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.discriminator(images, training=training)


class GanTrainer(mptrain.Trainer):
    """Both networks learn from the same generated digits, each with its own optimizer and its own loss scale."""

    def build_model(self) -> Gan:
        return Gan(self.config.model.noise, self.config.model.width)

    def build_optimizer(self) -> mptrain.Optimizers:
        rate, wrap = self.config.optimizer.learning_rate, mptrain.optimizers.wrap
        adam = functools.partial(keras.optimizers.Adam, beta_1=0.5)  # Radford et al.
        generator = wrap(adam(rate), self.config, scaled=self.uses_float16)
        discriminator = wrap(adam(rate * self.config.model.discriminator_rate), self.config, scaled=self.uses_float16)
        return mptrain.Optimizers(
            generator=(generator, self.model.generator), discriminator=(discriminator, self.model.discriminator)
        )

    def build_metrics(self) -> dict[str, keras.metrics.Metric]:
        return {"generator_loss": keras.metrics.Mean(), "accuracy": keras.metrics.BinaryAccuracy(threshold=0.0)}

    def inputs(self, batch) -> tf.Tensor:
        return tf.cast(batch["inputs"], tf.float32) / 255.0

    def replica_train_step(self, batch) -> dict[str, tf.Tensor]:
        with tf.GradientTape(persistent=True) as tape:
            noise = self.randomness.normal_per_example(self.config.model.noise)
            logits, losses = self.play(self.inputs(batch), noise, training=True)
            scaled = {name: self.optimizer[name].get_scaled_loss(self.reduce_loss(loss)) for name, loss in losses.items()}
        gradients = {name: tape.gradient(scaled[name], self.optimizer.trainable_variables(name)) for name in scaled}
        self.update(logits, losses)
        return {name: self.apply(name, gradients[name]) for name in gradients}

    def play(self, images: tf.Tensor, noise: tf.Tensor, training: bool) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Returns the logits of true and of generated digits, [2, batch], and each network's loss of each example, [batch]."""
        generated = self.model.generator(self.precision.cast_to_compute(noise), training=training)
        logits = [self.model.discriminator(self.precision.cast_to_compute(x), training=training) for x in (images, generated)]
        true, false = (tf.squeeze(self.precision.cast_to_output(logit), 1) for logit in logits)
        return tf.stack([true, false]), {
            "generator": tf.nn.softplus(-false),  # the form that does not saturate: -log D(G(z))
            "discriminator": tf.nn.softplus(-true) + tf.nn.softplus(false),
        }

    def apply(self, name: str, gradients: list) -> tf.Tensor:
        """Applies the scaled gradients of one network; returns whether its update was not skipped."""
        optimizer, variables = self.optimizer[name], self.optimizer.trainable_variables(name)
        return optimizer.apply_gradients(zip(optimizer.get_unscaled_gradients(gradients), variables, strict=True))

    def replica_eval_step(self, batch) -> None:
        images = self.inputs(batch)
        logits, losses = self.play(images, self.fixed_noise(images.shape[0]), training=False)
        self.update(logits, losses, batch["weight"])

    def update(self, logits: tf.Tensor, losses: dict[str, tf.Tensor], weight: tf.Tensor | None = None) -> None:
        """Updates the metrics: the loss is the discriminator's, the accuracy its too, over true and generated digits."""
        self.metrics["loss"].update_state(losses["discriminator"], weight)
        self.metrics["generator_loss"].update_state(losses["generator"], weight)
        for label, row in zip((1.0, 0.0), tf.unstack(logits), strict=True):
            self.metrics["accuracy"].update_state(tf.fill([tf.size(row), 1], label), row[:, tf.newaxis], weight)

    def fixed_noise(self, count: int) -> tf.Tensor:
        """Returns the same noise at each evaluation, so that pictures can be compared."""
        return tf.random.stateless_normal([count, self.config.model.noise], [self.config.seed, 0])

    def serving_spec(self) -> dict[str, tf.TensorSpec]:
        return {"noise": tf.TensorSpec([self.config.model.noise], tf.float32)}

    def serve(self, batch) -> dict[str, tf.Tensor]:
        noise = self.precision.cast_to_compute(batch["noise"])
        return {"digits": self.precision.cast_to_output(self.model.generator(noise, training=False))}

    def pictures(self) -> dict[str, tf.Tensor]:
        noise = self.precision.cast_to_compute(self.fixed_noise(_SHOWN))
        return {"digits": mptrain.grid(self.model.generator(noise, training=False), columns=8)}
