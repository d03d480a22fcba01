"""Small Trainers whose losses and evaluations follow a script in config.model, and actions of their own."""

import pathlib
import time

import tensorflow as tf
import tf_keras

import mptrain
from tests.trainers import ModuleTrainer


class ScriptedTrainer(ModuleTrainer):
    """The loss of an evaluation is what `config.model.evaluations` says, one for each, and then the last one."""

    def replica_eval_step(self, batch):
        script = tf.constant(self.config.model.evaluations, tf.float32)
        place = tf.cast(self.global_step, tf.int32) // self.config.eval.every_steps - 1
        self.metrics["loss"].update_state(tf.gather(script, tf.minimum(place, len(script) - 1)))


class NanLossTrainer(ModuleTrainer):
    """From step `config.model.nan_from` to `config.model.nan_to` the loss is NaN, and its gradients are not."""

    def compute_loss(self, batch, outputs):
        sick = tf.logical_and(self.global_step >= self.config.model.nan_from, self.global_step < self.config.model.nan_to)
        return super().compute_loss(batch, outputs) + tf.where(sick, float("nan"), 0.0)


class ExplodingTrainer(ModuleTrainer):
    """A step of finite gradients makes the weights inf."""

    def compute_loss(self, batch, outputs):
        return super().compute_loss(batch, outputs) * 1e15


class ActingTrainer(ModuleTrainer):
    """Writes down what its actions get; one of them does what `config.model.act` says at the loop that ends at step 6."""

    def build_actions(self):
        return [self.note("loop"), self.act]

    def build_eval_actions(self):
        return [self.note("evaluation")]

    def note(self, what):
        path = pathlib.Path(self.config.model.notes)

        def write(step, outputs):
            with open(path, "a") as file:
                file.write(f"{what} {step} {outputs['loss']:.6g}\n")

        return write

    def act(self, step, outputs):
        if step != 6:
            return None
        if self.config.model.act == "raise":
            raise KeyError("the user's own mistake")
        if self.config.model.act == "StopRun":
            raise mptrain.StopRun("enough of it")
        return {"True": True, "reason": "seen enough", "": None}[self.config.model.act]


class TfKerasOptimizerTrainer(ScriptedTrainer):
    def build_optimizer(self):
        return mptrain.LossScaleOptimizer(tf_keras.optimizers.SGD(0.1))


class PacedTrainer(ModuleTrainer):
    """Takes half a second more for each loop."""

    def build_actions(self):
        return [lambda step, outputs: time.sleep(0.5)]


class OneWorkerActsTrainer(ActingTrainer):
    """Only the second worker's action does what it is told."""

    def act(self, step, outputs):
        return super().act(step, outputs) if self.workers.index == 1 else None
