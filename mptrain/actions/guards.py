"""End a run that cannot get better: every step is skipped, or its loss or metrics stay NaN or inf."""

import math
from collections.abc import Iterable, Mapping

from mptrain.checkpoints import Checkpoints
from mptrain.errors import RunError
from mptrain.metrics_log import MetricsLog
from mptrain.trainer import Trainer


class OverflowGuard:
    """Ends a run in which every step is skipped (see `LossScaleOptimizer.raise_if_stuck`)."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def __call__(self, outputs: Mapping[str, float]) -> None:
        self._trainer.optimizer.raise_if_stuck()


class NanGuard:
    """Ends a run whose loss or metrics are NaN or inf in `nan_guard.patience` loops, or evaluations, in a row.

    Gradients that are not finite are no matter of it: the optimizer skips their steps, in every precision, and a loop in
    which every step was skipped does not count. What is left are losses that are not finite though their gradients are,
    weights that an applied step has made inf, and models that cannot be evaluated.

    The checkpoints from before stay. After a loop with such a loss nothing is saved until one is finite again, weights that
    are not finite are never saved, and from the first such evaluation to the next good one the oldest checkpoint is kept
    beside the newest.

    Args:
        trainer: the run's trainer.
        checkpoints: the run's checkpoints.
        log: holds the evaluations, those of earlier processes too.
    """

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, log: MetricsLog):
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._log = log
        self._patience = trainer.config.nan_guard.patience
        self._watched = trainer.config.nan_guard.metrics or tuple(trainer.metrics)
        if self._patience:
            checkpoints.must_be_finite = trainer.weights
        self._applied = self._counted()
        self._loops = 0
        self._last_good = int(trainer.global_step.numpy())

    def after_loop(self, outputs: Mapping[str, float]) -> None:
        """An action for loops.

        Raises:
            RunError: if that was one too many.
        """
        applied, before = self._counted(), self._applied
        self._applied = applied
        if not self._patience or any(now == then for now, then in zip(applied, before, strict=True)):
            return
        bad = self._nonfinite(outputs)
        self._loops = self._loops + 1 if bad else 0
        self._checkpoints.suspended = bool(bad)
        if not bad:
            self._last_good = self._step
        if self._loops >= self._patience:
            what = f"{_are(bad)} not finite in {self._loops} loops in a row, though steps were applied"
            self._raise(what, self._last_good)

    def after_evaluation(self, outputs: Mapping[str, float]) -> None:
        """An action for evaluations, called when the log has them.

        Raises:
            RunError: if that was one too many.
        """
        if not self._patience:
            return
        count, good = 0, 0
        for step, evaluation in self._log.evaluations.items():
            count, good = (count + 1, good) if self._nonfinite(evaluation) else (0, step)
        count = int(self._trainer.workers.of_chief(count))
        self._checkpoints.hold_oldest(count > 0)
        if count >= self._patience:
            self._raise(f"{_are(self._nonfinite(outputs))} not finite in {count} evaluations in a row", good)

    def check_end(self) -> None:
        """Refuses to end a run as if it had done well.

        Raises:
            RunError: if the loss of the last loop is not finite.
        """
        if self._loops:
            self._raise(f"the loss is not finite since step {self._last_good}, and the run is at its end", self._last_good)

    @property
    def _step(self) -> int:
        return int(self._trainer.global_step.numpy())

    def _counted(self) -> list[int]:
        """Returns the applied steps of each optimizer: where one skips all of a loop, the loop has no metrics."""
        return [int(optimizer.applied_steps) for optimizer in self._trainer.optimizers.values()]

    def _nonfinite(self, outputs: Mapping[str, float]) -> list[str]:
        return [name for name in self._watched if name in outputs and not math.isfinite(outputs[name])]

    def _raise(self, what: str, good: int) -> None:
        self._checkpoints.wait()
        kept = [step for step in self._checkpoints.steps() if step <= good]
        where = f"the checkpoint of step {kept[-1]}, from before, is kept" if kept else "there is no checkpoint from before"
        raise RunError(
            f"step {self._step}: {what}; {where}. Look for a loss without gradients, such as log(0) behind a mask, or lower"
            " optimizer.learning_rate; config.nan_guard says what is watched"
        )


def _are(names: Iterable[str]) -> str:
    names = list(names)
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
