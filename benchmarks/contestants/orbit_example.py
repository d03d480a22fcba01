"""Orbit's own example of a trainer, which comes with Model Garden, around a tf_keras model. It does not scale losses."""

import tensorflow as tf
import tf_keras
from orbit.examples.single_task.single_task_trainer import SingleTaskTrainer

from benchmarks import models, works
from benchmarks.contestants import common
from benchmarks.frame import Case


def run(case: Case, gate) -> None:
    common.set_policy(case.precision)
    model = models.build(tf_keras, case.work)
    trainer = SingleTaskTrainer(
        common.batches(case, lambda inputs, targets: {model.input_names[0]: inputs, "targets": targets}),
        label_key="targets",
        model=model,
        loss_fn=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"),
        optimizer=tf_keras.optimizers.Adam(works.LEARNING_RATE),
        metrics=tf_keras.metrics.SparseCategoricalAccuracy(),
    )
    for steps in gate:
        gate.done(float(trainer.train(tf.constant(steps))["training_loss"]))
