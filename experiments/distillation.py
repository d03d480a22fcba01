"""Distillation (Hinton et al., 2015): a small network learns from what a trained one says of each digit."""

import keras
import tensorflow as tf

import mptrain
from experiments.mnist import MnistTrainer


class DistillationTrainer(MnistTrainer):
    """A student of one hidden layer, and a teacher that lies in the folder of its own run and in no checkpoint of this one."""

    def build_model(self) -> keras.Model:
        layers = keras.layers
        student = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Flatten(name="flatten"),
                layers.Dense(self.config.model.units, activation="relu", name="hidden"),
                layers.Dense(10, dtype="float32", name="logits"),
            ],
            name="student",
        )
        self.teacher = self.restored_teacher(student) if self.config.model.teacher else None
        return student

    def restored_teacher(self, student: keras.Model) -> keras.Model:
        teacher = mptrain.restore(self.config.model.teacher).model
        shapes, wanted = ((model.input_shape, model.output_shape) for model in (teacher, student))
        if shapes != wanted:
            raise mptrain.InputError(
                f"config.model.teacher={self.config.model.teacher} takes {shapes[0]} and gives {shapes[1]}: name the run of a"
                f" model that takes {wanted[0]} and gives {wanted[1]}"
            )
        teacher.trainable = False
        return teacher

    def compute_loss(self, batch, outputs) -> tf.Tensor:
        loss = super().compute_loss(batch, outputs)
        if self.teacher is None:
            return loss
        logits = self.precision.cast_to_output(self.teacher(self.inputs(batch), training=False))  # it casts its inputs itself
        share, temperature = self.config.model.teacher_share, self.config.model.temperature
        return (1.0 - share) * loss + share * divergence(logits, outputs, temperature)


def divergence(teacher: tf.Tensor, student: tf.Tensor, temperature: float) -> tf.Tensor:
    """Returns the Kullback-Leibler divergence of the student's softened probabilities from the teacher's, float32 [batch].

    Times temperature², so that its gradients keep their size at any temperature.

    Args:
        teacher: logits, float32 [batch, classes].
        student: logits, float32 [batch, classes].
        temperature: what both are divided by.
    """
    log_p, log_q = tf.nn.log_softmax(teacher / temperature), tf.nn.log_softmax(student / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)
