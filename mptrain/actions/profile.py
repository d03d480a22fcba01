"""A profile of some steps, for TensorBoard: which operation of which step took how long."""

from collections.abc import Mapping

import tensorflow as tf

from mptrain.console import Console
from mptrain.metrics_log import MetricsLog
from mptrain.trainer import Trainer


class ProfileWindow:
    """Profiles the steps from `profile.start_step` on, `profile.steps` of them; loops end at both borders.

    Each of these steps (accumulation windows, where there are such) is one call of the graph, marked with its number; outside
    the window nothing is traced. A context manager: a run that ends inside the window writes what it has.

    Args:
        trainer: the run's trainer.
        folder: TensorBoard's; gets `plugins/profile/`. None: nothing is written, as by the workers that are not the chief.
        console: says where the profile is.
        log: gets an event.
    """

    def __init__(self, trainer: Trainer, folder: str | None, console: Console, log: MetricsLog):
        self._trainer = trainer
        self._folder = folder
        self._console = console
        self._log = log
        self._start = trainer.config.profile.start_step
        self._end = self._start + trainer.config.profile.steps
        self._first = None  # the step at which the profiler was started

    def __enter__(self) -> "ProfileWindow":
        self._open_if_due()
        return self

    def __exit__(self, *error) -> None:
        self._close()

    def __call__(self, outputs: Mapping[str, float]) -> None:
        if self._step >= self._end:
            self._close()
        self._open_if_due()

    def to_next_border(self, step: int) -> int:
        """Returns how many steps it is from `step` to where the window begins or ends; 0 behind it."""
        return (
            next((border - step for border in (self._start, self._end) if border > step), 0) if self._end > self._start else 0
        )

    @property
    def _step(self) -> int:
        return int(self._trainer.global_step.numpy())

    def _open_if_due(self) -> None:
        if not self._start <= self._step < self._end or self._trainer.marks_steps:
            return
        self._trainer.marks_steps = True
        if self._folder is None:
            return
        try:
            tf.profiler.experimental.start(self._folder)
        except tf.errors.AlreadyExistsError:
            self._console.warn("config.profile: another profiler runs in this process, so there is no profile of these steps")
        else:
            self._first = self._step

    def _close(self) -> None:
        self._trainer.marks_steps = False
        first, self._first = self._first, None
        if first is None:
            return
        tf.profiler.experimental.stop()
        last = self._step - 1
        self._log.event(self._step, "profile", first=first, last=last)
        self._console.line(
            f"profile of the steps {first} to {last} in {self._folder}: with tensorboard-plugin-profile TensorBoard shows it"
        )
