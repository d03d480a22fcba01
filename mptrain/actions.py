"""Orbit actions: plain callables that get the outputs of a loop or of an evaluation when it has ended.

Orbit gives an action neither the step nor a way to stop the run; here each knows its trainer, and raises `StopRun`.
"""

import os
import signal
import socket
import threading
from collections.abc import Mapping

from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import InputError, StopRun
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
    """Saves and rates the state of an evaluation that is among the best `checkpoint.keep_best`.

    Raises:
        InputError: if there is no metric `checkpoint.best_metric`.
    """

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints):
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._metric, self._sign = trainer.config.checkpoint.best_metric, 1
        if trainer.config.checkpoint.best_mode == "min":
            self._sign = -1
        if self._metric not in trainer.metrics:
            raise InputError(f"config.checkpoint.best_metric is {self._metric!r}: write one of {', '.join(trainer.metrics)}")

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step, rating = int(self._trainer.global_step.numpy()), self._sign * outputs[self._metric]
        self._checkpoints.wait()
        if self._checkpoints.would_be_kept(rating):
            self._checkpoints.save(step, self._trainer.save_position)
            self._checkpoints.rate(step, rating)


class OverflowGuard:
    """Ends a run in which every step is skipped (see `LossScaleOptimizer.raise_if_stuck`)."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def __call__(self, outputs: Mapping[str, float]) -> None:
        self._trainer.optimizer.raise_if_stuck()


class StopOnSignal:
    """Ends the run after the loop's piece in hand on SIGINT or SIGTERM; a second signal ends the process at once.

    A context manager: the signals are the run's while it is entered. Python runs signal handlers only between calls of the
    graph, which may take seconds, so a thread listens to the descriptor that Python writes each signal to. Outside the main
    thread, where Python allows no handlers, signals keep their meaning. A signal to one worker stops all of them, and a
    second one that worker at once.

    Args:
        trainer: the run's trainer.
        checkpoints: where the last state is saved.
        log: gets the event.
        console: says that the signal was heard.
    """

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, log: MetricsLog, console: Console):
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._log = log
        self._console = console
        self._received = None  # by this process
        self._stop = 0  # the signal that all workers stop for
        self._previous = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self._reader, writer = socket.socketpair()
            writer.setblocking(False)
            self._writer, self._previous_fd = writer, signal.set_wakeup_fd(writer.fileno())
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, lambda number, frame: None)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            self._writer.close()  # which ends the thread

    def _listen(self) -> None:
        for number in iter(lambda: self._reader.recv(1), b""):
            if number[0] not in self._previous:  # Python writes every signal that has a handler, such as a user's timer
                continue
            if self._received is not None:
                self._console.abandon()
                os._exit(128 + number[0])
            self._received = number[0]
            name = signal.Signals(self._received).name
            self._console.warn(f"{name}: stopping and saving as soon as the steps in hand are done; a second one stops at once")

    def agreed(self) -> bool:
        """Whether a signal has come to any worker; all must call it."""
        self._stop = int(self._trainer.workers.largest(self._received or 0))
        return self._stop > 0

    def __call__(self, outputs: Mapping[str, float]) -> None:
        """Ends the run if a signal has come.

        Raises:
            StopRun: when the state is saved.
        """
        if not self.agreed():
            return
        step = int(self._trainer.global_step.numpy())
        self._checkpoints.save(step, self._trainer.save_position)
        self._checkpoints.wait()
        self._log.event(step, "preemption", signal=signal.Signals(self._stop).name)
        raise StopRun(f"stopped at step {step}, saved", exit_status=128 + self._stop)
