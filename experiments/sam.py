"""Sharpness-aware minimisation (Foret et al., 2021): two backward passes a step."""

import keras
import tensorflow as tf

from experiments.mnist import MnistTrainer


class SamTrainer(MnistTrainer):
    """Takes the gradient where the loss is highest in a ball of radius `config.model.rho` around the weights.

    Each replica climbs by the gradient of its own share of the batch, as in the paper (m-sharpness): one all-reduce a step. The
    weights themselves never move: the second pass reads others in their place, and what it writes, BatchNorm's statistics among
    it, is forgotten.
    """

    def replica_train_step(self, batch) -> tf.Tensor:
        batch, weights = self.augment(batch), self.trainable_variables
        with tf.GradientTape() as tape:
            outputs, loss, scaled_loss = self.forward(batch)
        gradients = self.optimizer.get_unscaled_gradients(tape.gradient(scaled_loss, weights))
        norm = tf.linalg.global_norm(gradients)
        radius = tf.math.divide_no_nan(self.config.model.rho, norm)
        highest = [tf.convert_to_tensor(w) + radius * gradient for w, gradient in zip(weights, gradients, strict=True)]
        self.randomness.begin_step()  # the same dropout once more
        with tf.GradientTape() as tape, keras.StatelessScope(zip(weights, highest, strict=True)):
            tape.watch(highest)
            *_, scaled_loss = self.forward(batch)
        gradients = self.optimizer.get_unscaled_gradients(tape.gradient(scaled_loss, highest))
        # Where the first pass overflowed, so must these: pooling passes over a NaN, and the second may not show it.
        gradients = [tf.where(tf.math.is_finite(norm), gradient, norm) for gradient in gradients]
        applied = self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.update_metrics(batch, outputs, loss)
        return applied

    def forward(self, batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns outputs, loss and scaled loss of one forward pass."""
        inputs = self.precision.cast_to_compute(self.inputs(batch))
        outputs = self.precision.cast_to_output(self.model(inputs, training=True))
        loss = self.reduce_loss(self.compute_loss(batch, outputs)) + self.regularization_loss()
        return outputs, loss, self.optimizer.get_scaled_loss(loss)
