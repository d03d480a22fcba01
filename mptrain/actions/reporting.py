"""Tells of each loop and evaluation: the rows of the log, and the progress bar."""

from collections.abc import Mapping, MutableMapping

import numpy as np

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
        self._skipped = {name: int(optimizer.skipped_steps) for name, optimizer in trainer.optimizers.items()}

    def __call__(self, outputs: Mapping[str, float]) -> None:
        for name, before in self._skipped.items():
            self._skipped[name] = outputs.get(f"{name}/skipped_steps".lstrip("/"), before)
            self._log_skips(name, before, self._skipped[name])
        self._log.row(int(self._trainer.global_step.numpy()), self._split, outputs)

    def _log_skips(self, name: str, before: int, skipped: int) -> None:
        skips = self._trainer.optimizers[name].skips(before, skipped)
        whose = {"optimizer": name} if name else {}
        if skips and len(skips) < skipped - before:
            self._log.event(self._last_step(skips[0]), "overflows_forgotten", **whose, count=skipped - before - len(skips))
        for skip in skips:
            self._log.event(
                self._last_step(skip),
                "overflow",
                **whose,
                loss_scale=skip.loss_scale,
                loss_finite=skip.loss_finite,
                layer=skip.layer,
                variables=skip.variables,
            )

    def _last_step(self, skip: Skip) -> int:
        return (skip.update + 1) * self._trainer.optimizer.accumulation_steps - 1


class ShowProgress:
    """Moves the progress bar."""

    def __init__(self, trainer: Trainer, console: Console):
        self._trainer = trainer
        self._console = console

    def __call__(self, outputs: Mapping[str, float]) -> None:
        self._console.progress(int(self._trainer.global_step.numpy()), outputs)


class ArraysForTensorBoard:
    """Makes arrays of the outputs that Orbit then writes to TensorBoard; the last action of a loop.

    TensorFlow keeps every Python number that it ever made a tensor of, 1 KB each: a run of a week would take gigabytes.
    """

    def __call__(self, outputs: MutableMapping[str, float]) -> None:
        outputs.update({name: np.asarray(value, np.float32) for name, value in outputs.items()})
