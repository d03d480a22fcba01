"""Tells of each loop and evaluation: the rows of the log, and the progress bar."""

from collections.abc import Mapping

from mptrain.console import Console
from mptrain.metrics_log import MetricsLog
from mptrain.skip_log import Skip
from mptrain.trainer import Trainer


class LogMetrics:
    """Writes the row of a loop ("train") or evaluation ("eval"), and before it an event for each skipped update.

    An update is skipped as a whole: under accumulation its event carries the last step of its window. Of more skipped updates
    than the optimizer remembers, the first are only counted, in an event at the first one that is remembered.
    """

    def __init__(self, trainer: Trainer, log: MetricsLog, split: str):
        self._trainer = trainer
        self._log = log
        self._split = split
        self._skipped = int(trainer.optimizer.skipped_steps)

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step = int(self._trainer.global_step.numpy())
        skipped = outputs.get("skipped_steps", self._skipped)
        skips = self._trainer.optimizer.skips(self._skipped, skipped)
        if skips and len(skips) < skipped - self._skipped:
            self._log.event(self._last_step(skips[0]), "overflows_forgotten", count=skipped - self._skipped - len(skips))
        for skip in skips:
            self._log.event(
                self._last_step(skip),
                "overflow",
                loss_scale=skip.loss_scale,
                loss_finite=skip.loss_finite,
                layer=skip.layer,
                variables=skip.variables,
            )
        self._skipped = skipped
        self._log.row(step, self._split, outputs)

    def _last_step(self, skip: Skip) -> int:
        return (skip.update + 1) * self._trainer.optimizer.accumulation_steps - 1


class ShowProgress:
    """Moves the progress bar."""

    def __init__(self, trainer: Trainer, console: Console):
        self._trainer = trainer
        self._console = console

    def __call__(self, outputs: Mapping[str, float]) -> None:
        self._console.progress(int(self._trainer.global_step.numpy()), outputs)
