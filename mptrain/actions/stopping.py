"""Ends a run that goes on later: on a signal, or when its time is up."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping

from mptrain import time_span
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import Interrupted
from mptrain.metrics_log import MetricsLog
from mptrain.trainer import Trainer

_TIME_IS_UP = 0.5  # among the numbers of signals, which are whole and go first


class StopOnSignal:
    """Ends the run after the loop's piece in hand on SIGINT or SIGTERM, or at `train.time_limit`; a second signal at once.

    A context manager: the signals are the run's while it is entered. Python runs signal handlers only between calls of the
    graph, which may take seconds, so a thread listens to the descriptor that Python writes each signal to. Outside the main
    thread, where Python allows no handlers, signals keep their meaning. A signal to one worker stops all of them, and a
    second one that worker at once. The time runs from when the context is entered.

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
        self._stop = 0  # the signal that all workers stop for, or _TIME_IS_UP
        self._previous = {}
        self._deadline = math.inf

    def __enter__(self) -> "StopOnSignal":
        limit = time_span.seconds(self._trainer.config.train.time_limit)
        self._deadline = time.monotonic() + limit if limit else math.inf
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
        """Whether a signal has come to any worker, or the time is up in any; all must call it."""
        time_is_up = _TIME_IS_UP if time.monotonic() >= self._deadline else 0
        self._stop = self._trainer.workers.largest(self._received or time_is_up)
        return self._stop > 0

    def __call__(self, outputs: Mapping[str, float]) -> None:
        """Ends the run if a signal has come or its time is up.

        Raises:
            Interrupted: when the state is saved.
        """
        if not self.agreed():
            return
        step = int(self._trainer.global_step.numpy())
        self._checkpoints.save(step, self._trainer.save_position)
        self._checkpoints.wait()
        saved = "its loss is not finite, so it is not saved" if self._checkpoints.suspended else "saved"
        if self._stop == _TIME_IS_UP:
            limit = self._trainer.config.train.time_limit
            self._log.event(step, "time_limit", limit=limit)
            raise Interrupted(f"time limit of {limit} reached at step {step}, {saved}")
        number = int(self._stop)
        self._log.event(step, "preemption", signal=signal.Signals(number).name)
        raise Interrupted(f"stopped at step {step}, {saved}", exit_status=128 + number)
