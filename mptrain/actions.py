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
from mptrain.errors import StopRun
from mptrain.metrics_log import MetricsLog
from mptrain.trainer import Trainer


class LogMetrics:
    """Writes the row of a loop ("train") or evaluation ("eval"), and before it an event for each skipped update."""

    def __init__(self, trainer: Trainer, log: MetricsLog, split: str):
        self._trainer = trainer
        self._log = log
        self._split = split
        self._skipped = int(trainer.optimizer.skipped_steps)

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step = int(self._trainer.global_step.numpy())
        skipped = outputs.get("skipped_steps", self._skipped)
        for skip in self._trainer.optimizer.skips(self._skipped, skipped):
            self._log.event(
                (skip.update + 1) * self._trainer.optimizer.accumulation_steps - 1,
                "overflow",
                loss_scale=skip.loss_scale,
                loss_finite=skip.loss_finite,
                layer=skip.layer,
                variables=skip.variables,
            )
        self._skipped = skipped
        self._log.row(step, self._split, outputs)


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
            self._checkpoints.save(step)


class OverflowGuard:
    """Ends a run in which every step is skipped (see `LossScaleOptimizer.raise_if_stuck`)."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def __call__(self, outputs: Mapping[str, float]) -> None:
        self._trainer.optimizer.raise_if_stuck()


class StopOnSignal:
    """Ends the run after the loop in hand on SIGINT or SIGTERM; a second signal ends the process at once.

    A context manager: the signals are the run's while it is entered. Python runs signal handlers only between calls of the
    graph, which may take seconds, so a thread listens to the descriptor that Python writes each signal to. Outside the main
    thread, where Python allows no handlers, signals keep their meaning.

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
        self._received = None
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
            if self._received is not None:
                self._console.abandon()
                os._exit(128 + number[0])
            self._received = number[0]
            name = signal.Signals(self._received).name
            self._console.warn(f"{name}: stopping and saving at the end of this loop; a second one stops at once")

    def __call__(self, outputs: Mapping[str, float]) -> None:
        if self._received is None:
            return
        step = int(self._trainer.global_step.numpy())
        self._checkpoints.save(step)
        self._log.event(step, "preemption", signal=signal.Signals(self._received).name)
        raise StopRun(f"stopped at step {step}, saved", exit_status=128 + self._received)
