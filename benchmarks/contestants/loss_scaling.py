"""What loss scaling costs: a hand-written loop in float32, its optimizer wrapped by mptrain, by a Keras, or by nobody."""

import keras
import tensorflow as tf
import tf_keras

import mptrain
from benchmarks import models, works
from benchmarks.contestants import common
from benchmarks.frame import Case
from mptrain import fused_updates


def run(case: Case, gate, wrapper: str) -> None:
    common.set_policy(case.precision)
    library = tf_keras if wrapper == "tf_keras" else keras
    model = models.build(library, case.work)
    variables = model.trainable_variables
    scale, apply = _WRAPPERS[wrapper](variables)
    mean_loss = library.metrics.Mean()

    @tf.function
    def train(iterator, steps):
        for _ in tf.range(steps):
            inputs, targets = next(iterator)
            with tf.GradientTape() as tape:
                logits = model(inputs, training=True)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
                loss = tf.reduce_mean(losses)
                scaled_loss = scale(loss)
            apply(tape.gradient(scaled_loss, variables))
            mean_loss.update_state(loss)

    iterator = iter(common.batches(case))
    for steps in gate:
        mean_loss.reset_state()
        train(iterator, tf.constant(steps))
        gate.done(float(mean_loss.result()))


def _none(variables):
    optimizer = keras.optimizers.Adam(works.LEARNING_RATE)
    optimizer.build(variables)
    return lambda loss: loss, lambda gradients: optimizer.apply(gradients, variables)


def _fused(variables):
    """What LossScaleOptimizer makes of Adam besides scaling, so that the two can be told apart."""
    optimizer = keras.optimizers.Adam(works.LEARNING_RATE)
    optimizer.build(variables)
    fused_updates.install(optimizer)
    return lambda loss: loss, lambda gradients: optimizer.apply(gradients, variables)


def _fixed(variables):
    """mptrain's optimizer as it is where nothing needs scaling: a scale of 1, which stays."""
    optimizer = mptrain.LossScaleOptimizer(keras.optimizers.Adam(works.LEARNING_RATE), dynamic=False, initial_scale=1)
    return _with_both_ends(optimizer, variables)


def _mptrain(variables):
    return _with_both_ends(mptrain.LossScaleOptimizer(keras.optimizers.Adam(works.LEARNING_RATE)), variables)


def _tf_keras(variables):
    return _with_both_ends(
        tf_keras.mixed_precision.LossScaleOptimizer(tf_keras.optimizers.Adam(works.LEARNING_RATE)), variables
    )


def _with_both_ends(optimizer, variables):
    optimizer.build(variables)

    def apply(gradients):
        optimizer.apply_gradients(list(zip(optimizer.get_unscaled_gradients(gradients), variables, strict=True)))

    return optimizer.get_scaled_loss, apply


def _keras(variables):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(works.LEARNING_RATE))
    optimizer.build(variables)
    return optimizer.scale_loss, lambda gradients: optimizer.apply(gradients, variables)


_WRAPPERS = {"none": _none, "fused": _fused, "fixed": _fixed, "mptrain": _mptrain, "keras": _keras, "tf_keras": _tf_keras}
