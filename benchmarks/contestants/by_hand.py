"""The limit: a loop in the graph as one writes it by hand with Keras's layers, optimizer and metrics, and nothing else.

In mixed_float16 the loss is scaled as it must be: gradients are checked, and a step with one that is not finite is skipped.
Where float16 kernels are slow and XLA's are not, it compiles the step, the best that can be had without rewriting graphs.
"""

import keras
import tensorflow as tf

from benchmarks import models, works
from benchmarks.contestants import common
from benchmarks.frame import Case


def run(case: Case, gate) -> None:
    common.set_policy(case.precision)
    scaled, compiled = case.precision == "mixed_float16", common.faster_with_xla(case)
    turn = loop(models.build(keras, case.work), common.batches(case), scaled=scaled, compiled=compiled)
    for steps in gate:
        gate.done(turn(steps))


def loop(model, batches: tf.data.Dataset, *, scaled: bool, compiled: bool):
    """Returns the function that trains a number of steps and returns their mean loss."""
    variables = model.trainable_variables
    optimizer = keras.optimizers.Adam(works.LEARNING_RATE)
    optimizer.build(variables)
    mean_loss, accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()
    loss_scale, in_a_row = tf.Variable(2.0**15, trainable=False), tf.Variable(0, trainable=False)

    def forward(inputs, targets):
        logits = model(inputs, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
        return logits, tf.reduce_mean(losses)

    def step(inputs, targets):
        with tf.GradientTape() as tape:
            logits, loss = forward(inputs, targets)
        # An embedding's row that is used twice has two gradients, whose squares Keras 3's Adam would add up, not their sum.
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return logits, loss

    def scaled_step(inputs, targets):
        with tf.GradientTape() as tape:
            logits, loss = forward(inputs, targets)
            scaled_loss = loss * loss_scale
        gradients = [tf.convert_to_tensor(g) / loss_scale for g in tape.gradient(scaled_loss, variables)]
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
        if finite:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
            in_a_row.assign_add(1)
            if in_a_row >= 2000:
                loss_scale.assign(loss_scale * 2.0)
                in_a_row.assign(0)
        else:
            loss_scale.assign(loss_scale / 2.0)
            in_a_row.assign(0)
        return logits, loss

    one = scaled_step if scaled else step
    if scaled or compiled:
        one = tf.function(one, jit_compile=compiled)

    @tf.function
    def train(iterator, steps):
        for _ in tf.range(steps):
            inputs, targets = next(iterator)
            logits, loss = one(inputs, targets)
            mean_loss.update_state(loss)
            accuracy.update_state(targets, logits)

    iterator = iter(batches)

    def turn(steps: int) -> float:
        mean_loss.reset_state()
        accuracy.reset_state()
        train(iterator, tf.constant(steps))
        accuracy.result().numpy()
        return float(mean_loss.result())

    return turn
