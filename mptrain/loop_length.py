"""How many steps a loop takes, between two rows of the log: as configured, or "auto", about a second's worth of them."""

import math
from collections.abc import Mapping

from mptrain.trainer import Trainer

_TOO_SHORT, _TOO_LONG = 0.35, 2.0  # seconds; a length is kept between them, so that noise does not change it
_FASTEST_GROWTH = 10  # times, since a short loop's time is mostly that of looking outside


class LoopLength:
    """An Orbit action that learns from each loop how long the next shall be.

    Lengths under "auto" are 1, 2, 5, 10, 20, 50 … accumulation windows, so that most loops end where shorter ones would have.
    They are an argument of the traced function, which is traced once. The first loop is one window, and its time does not
    count, because tracing comes with it. Nor does that of a loop which an evaluation or a checkpoint cut so short that most of
    it was not steps.

    Args:
        trainer: whose loops they are; `config.train.steps_per_loop` is read, and rounded up to whole accumulation windows.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._window = trainer.config.optimizer.accumulation_steps
        configured = trainer.config.train.steps_per_loop
        self._auto = configured == "auto"
        self._warm = False
        self._step = int(trainer.global_step.numpy())
        self.steps = self._window if self._auto else math.ceil(configured / self._window) * self._window

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step = int(self._trainer.global_step.numpy())
        if self._auto and self._warm:
            seconds_a_step = self._trainer.config.data.batch_size / outputs["examples_per_second"]
            seconds_a_step = self._trainer.workers.largest(seconds_a_step)  # all workers must end their loops alike
            self._learn(step - self._step, seconds_a_step)
        self._warm, self._step = True, step

    def _learn(self, steps: int, seconds_a_step: float) -> None:
        """Sets the next loop's length by one of so many steps."""
        cut_short = steps < self.steps and steps * seconds_a_step < _TOO_SHORT
        if cut_short or _TOO_SHORT <= self.steps * seconds_a_step <= _TOO_LONG:
            return
        windows = self.steps // self._window
        fitting = 1 / (seconds_a_step * self._window)
        self.steps = self._window * _one_two_five(min(fitting, windows * _FASTEST_GROWTH))


def _one_two_five(number: float) -> int:
    """Returns the largest of 1, 2, 5, 10, 20, 50 … that is not above `number`; 1 if none is."""
    lengths = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return max((length for length in lengths if length <= number), default=1)
