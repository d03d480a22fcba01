"""mptrain: a Trainer with the comparison's model and data, trained by `Trainer.train`; nothing is logged or saved."""

import keras
import tensorflow as tf

import mptrain
from benchmarks import models, works
from benchmarks.contestants import common
from benchmarks.frame import Case


class WorkTrainer(mptrain.Trainer):
    """Trains `WorkTrainer.work`."""

    work: works.Work

    def build_model(self):
        return models.build(keras, self.work)

    def build_source(self, split):
        inputs, targets = works.data(self.work)
        return {"inputs": inputs, "targets": targets}

    def compute_loss(self, batch, outputs):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=outputs)

    def build_metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}


def trainer(work: works.Work, precision: str, jit_compile: str | bool = "auto") -> WorkTrainer:
    """Returns the Trainer of a work."""
    config = mptrain.default_config()
    config.seed = works.SEED
    config.trainer = f"{__name__}.WorkTrainer"
    config.precision.policy = precision
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = works.LEARNING_RATE
    config.data.batch_size = work.batch_size
    config.train.steps = 1  # of which nothing depends here
    config.train.jit_compile = jit_compile
    WorkTrainer.work = work
    return WorkTrainer(config)


def run(case: Case, gate, compiler: str = "") -> None:
    common.no_tf32()
    ours = trainer(case.work, case.precision, jit_compile=True if compiler == "xla" else "auto")
    for steps in gate:
        gate.done(ours.train(tf.constant(steps))["loss"])
