"""Ends a run whose evaluations do not get better any more."""

import math
from collections.abc import Mapping

from mptrain.actions.improvement import sign, without_improvement
from mptrain.errors import StopRun
from mptrain.metrics_log import MetricsLog
from mptrain.trainer import Trainer


class EarlyStop:
    """Ends the run after `early_stop.patience` evaluations in a row without improvement of `early_stop.metric`.

    Args:
        trainer: the run's trainer.
        log: holds the evaluations, those of earlier processes too.
    """

    def __init__(self, trainer: Trainer, log: MetricsLog):
        self._trainer = trainer
        self._log = log
        self._settings = trainer.config.early_stop
        self._metric = self._settings.metric
        self._sign = sign(self._settings.mode)

    @property
    def reason(self) -> str:
        """Why the run is to end, or ""; all workers must ask, and get the chief's answer, which has all evaluations."""
        ratings = (self._sign * outputs.get(self._metric, math.nan) for outputs in self._log.evaluations.values())
        stale = without_improvement(ratings, self._settings.min_delta)
        if not self._trainer.workers.of_chief(stale >= self._settings.patience):
            return ""
        return f"early stop: {self._metric} has not improved in {self._settings.patience} evaluations"

    def __call__(self, outputs: Mapping[str, float]) -> None:
        if reason := self.reason:
            raise StopRun(reason)
