"""Reduces the learning rate when evaluations do not get better any more."""

import math
from collections.abc import Mapping

from mptrain.actions.improvement import reductions, sign
from mptrain.console import Console
from mptrain.metrics_log import MetricsLog
from mptrain.trainer import Trainer


class ReduceOnPlateau:
    """Multiplies the schedule's rate by `plateau.factor` after `plateau.patience` evaluations without improvement.

    The factor is `trainer.learning_rate_factor`, a variable that checkpoints hold. It is set anew from the evaluations in the
    log when the run goes on: a checkpoint is older than the evaluation of its own step. Where the log was lost, it is what
    the checkpoint says.

    Args:
        trainer: the run's trainer, restored.
        log: holds the evaluations, those of earlier processes too; gets an event for each reduction.
        console: gets a line for each.
    """

    def __init__(self, trainer: Trainer, log: MetricsLog, console: Console):
        self._trainer = trainer
        self._log = log
        self._console = console
        self._settings = trainer.config.plateau
        self._metric = self._settings.metric
        self._sign = sign(self._settings.mode)
        self._forgotten = 0  # reductions of which the log knows nothing
        self._forgotten = max(self._restored() - self._reductions(), 0)
        self._count = self._reductions()
        self._assign()

    def __call__(self, outputs: Mapping[str, float]) -> None:
        count = self._reductions()
        if count == self._count:
            return
        before, self._count = self._rate(), count
        self._assign()
        step, rate = int(self._trainer.global_step.numpy()), self._rate()
        if rate == before:  # it is at plateau.min_learning_rate
            return
        self._log.event(step, "plateau", learning_rate=rate, factor=float(self._trainer.learning_rate_factor.numpy()))
        self._console.line(
            f"step {step}: {self._metric} has not improved in {self._settings.patience} evaluations; learning rate"
            f" {before:.3g} -> {rate:.3g}"
        )

    def _rate(self) -> float:
        """The learning rate; of several optimizers the highest."""
        return max(float(optimizer.learning_rate) for optimizer in self._trainer.optimizers.values())

    def _restored(self) -> int:
        """Returns how many reductions made the factor that was restored."""
        factor = float(self._trainer.learning_rate_factor.numpy())
        return round(math.log(factor) / math.log(self._settings.factor)) if 0 < factor < 1 else 0

    def _reductions(self) -> int:
        ratings = (self._sign * outputs.get(self._metric, math.nan) for outputs in self._log.evaluations.values())
        settings = self._settings
        count = reductions(ratings, settings.min_delta, settings.patience, settings.cooldown)
        return self._forgotten + int(self._trainer.workers.of_chief(count))

    def _assign(self) -> None:
        self._trainer.learning_rate_factor.assign(self._settings.factor**self._count)
