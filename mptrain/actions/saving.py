"""Saves at intervals, and the best."""

from collections.abc import Mapping

from mptrain.actions.improvement import sign
from mptrain.checkpoints import Checkpoints
from mptrain.trainer import Trainer


class SaveCheckpoint:
    """Saves at absolute multiples of `every_steps`, so that a resumed run saves where the first would have."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, every_steps: int):
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._every_steps = every_steps

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step = int(self._trainer.global_step.numpy())
        if step % self._every_steps == 0:
            self._checkpoints.save(step, self._trainer.save_position)


class KeepBest:
    """Saves and rates the state of an evaluation that is among the best `checkpoint.keep_best`."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints):
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._metric = trainer.config.checkpoint.best_metric
        self._sign = sign(trainer.config.checkpoint.best_mode)

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step, rating = int(self._trainer.global_step.numpy()), self._sign * outputs[self._metric]
        self._checkpoints.wait()
        if self._checkpoints.would_be_kept(rating):
            self._checkpoints.save(step, self._trainer.save_position)
            self._checkpoints.rate(step, rating)
