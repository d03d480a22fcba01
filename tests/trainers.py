"""Small Trainers on random data that the tests name in config.trainer."""

import signal
import time

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import mptrain
from mptrain import optimizers
from mptrain.data import Source


class TinyTrainer(mptrain.Trainer):
    """Convolution, BatchNorm and dropout on 100 random images: every kind of state in under 1,000 parameters."""

    dropout = 0.2

    def build_source(self, split):
        rng = np.random.default_rng(SEEDS[split])
        targets = rng.integers(0, 3, 100).astype(np.int32)
        noise = rng.normal(size=(100, 6, 6, 1))
        return Source({"inputs": (noise + targets[:, None, None, None]).astype(np.float32), "targets": targets})

    def build_model(self):
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((6, 6, 1)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dropout(self.dropout),
                layers.Dense(3, dtype="float32"),
            ]
        )

    def compute_loss(self, batch, outputs):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch["targets"], logits=outputs)

    def build_metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}


SEEDS = {"train": 1, "eval": 2}


class PoisonedTrainer(TinyTrainer):
    """Puts an inf into one example of the batches that `config.model.poisoned_steps` lists.

    Attributes:
        poisoned_replica: whose; another number may be assigned, as may another `poison`.
    """

    def build_model(self):
        self.poisoned_replica = tf.Variable(self.config.model.poisoned_replica, trainable=False)
        self.poison = tf.Variable(self.config.model.get("poison", np.inf), trainable=False)
        return super().build_model()

    def inputs(self, batch):
        inputs = super().inputs(batch)
        poisoned = tf.reduce_any(tf.constant(self.config.model.poisoned_steps, tf.int64) == self.global_step)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        here = tf.logical_and(poisoned, tf.equal(replica, self.poisoned_replica))
        return inputs * tf.where(here, self.poison, 1.0)


class ScalarLossTrainer(TinyTrainer):
    def compute_loss(self, batch, outputs):
        return tf.reduce_mean(super().compute_loss(batch, outputs))


class Float32EverywhereTrainer(TinyTrainer):
    def build_model(self):
        return keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(3, dtype="float32")])


class ForgetfulTrainer(TinyTrainer):
    """Overrides the step and does not say whether it was applied."""

    def replica_train_step(self, batch):
        super().replica_train_step(batch)


class ModuleTrainer(TinyTrainer):
    """The same task as a plain tf.Module with explicit casts."""

    def build_model(self):
        return TinyModule()


class TinyModule(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(tf.random.stateless_normal([36, 3], [1, 2]) * 0.1, name="w")
        self.b = tf.Variable(tf.zeros([3]), name="b")

    def __call__(self, x, training=False):
        x = tf.reshape(x, [-1, 36])
        return x @ tf.cast(self.w, x.dtype) + tf.cast(self.b, x.dtype)


class FrozenTrainer(TinyTrainer):
    """A frozen convolution before the layers that learn."""

    def build_model(self):
        model = super().build_model()
        model.layers[0].trainable = False
        return model


class RegularizedTrainer(ModuleTrainer):
    """Dense layer with an L2 regularizer of strength `config.model.strength`."""

    def build_model(self):
        penalty = keras.regularizers.L2(self.config.model.strength)
        dense = keras.layers.Dense(3, kernel_regularizer=penalty, dtype="float32")
        return keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Flatten(), dense])


class LoopDropoutTrainer(TinyTrainer):
    """Draws three masks in a graph loop, and keeps them in a variable."""

    def build_model(self):
        self.masks = tf.Variable(tf.zeros([3, 100]), trainable=False)
        self.loop_dropout = keras.layers.Dropout(0.5)
        model = super().build_model()
        model.loop_dropout = self.loop_dropout
        return model

    def augment(self, batch):
        masks = tf.TensorArray(tf.float32, 3)
        for i in tf.range(3):
            masks = masks.write(i, tf.cast(self.loop_dropout(tf.ones([100]), training=True), tf.float32))
        self.masks.assign(masks.stack())
        return batch


class TfKerasTrainer(TinyTrainer):
    """TinyTrainer's model in tf_keras."""

    def build_model(self):
        layers = tf_keras.layers
        return tf_keras.Sequential(
            [
                layers.InputLayer((6, 6, 1)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dropout(self.dropout),
                layers.Dense(3, dtype="float32"),
            ]
        )


class DatasetTrainer(TinyTrainer):
    """Draws from a tf.data pipeline of the user's own, with a shuffle and in one variant with Python code."""

    def build_source(self, split):
        arrays = super().build_source(split).arrays
        dataset = tf.data.Dataset.from_tensor_slices(arrays)
        if split == "train":
            dataset = dataset.shuffle(100, seed=3).batch(12, drop_remainder=True)
        else:
            dataset = dataset.batch(self.config.data.eval_batch_size)
        if self.config.model.get("python", False):
            shape = dataset.element_spec["inputs"].shape
            dataset = dataset.map(
                lambda batch: (
                    batch | {"inputs": tf.ensure_shape(tf.numpy_function(lambda x: x, [batch["inputs"]], tf.float32), shape)}
                )
            )
        return dataset


class EvenTrainer(TinyTrainer):
    """TinyTrainer without dropout, which differs between replicas by design; its loss is scaled in every precision."""

    dropout = 0.0

    def augment(self, batch):
        noise = tf.reshape(self.randomness.per_example(36), batch["inputs"].shape)
        return batch | {"inputs": batch["inputs"] + 0.1 * noise}

    def build_optimizer(self):
        return optimizers.build(self.config, self.total_steps, scaled=True)


class RestlessTrainer(TinyTrainer):
    """Takes its augmentation from a random state that no checkpoint holds."""

    def augment(self, batch):
        return batch | {"inputs": batch["inputs"] + tf.random.normal(batch["inputs"].shape)}


class SlowEvalTrainer(TinyTrainer):
    """Takes 0.1 s for each batch of an evaluation."""

    def replica_eval_step(self, batch):
        with tf.control_dependencies([tf.numpy_function(lambda: time.sleep(0.1), [], [])]):
            super().replica_eval_step(batch)


class SlowStepTrainer(TinyTrainer):
    """Takes a minute for each training step."""

    def augment(self, batch):
        with tf.control_dependencies([tf.numpy_function(lambda: time.sleep(60), [], [])]):
            return {name: tf.identity(value) for name, value in batch.items()}


class TimerTrainer(TinyTrainer):
    """Has a timer of its own, whose signal comes fifty times a second while a loop runs."""

    def train_loop_begin(self):
        signal.signal(signal.SIGALRM, lambda number, frame: None)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        super().train_loop_begin()

    def train_loop_end(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        return super().train_loop_end()


class NpzTrainer(TinyTrainer):
    """TinyTrainer on what config.data names."""

    build_source = mptrain.Trainer.build_source
