"""Runs train steps in the graph, from any step on, in pieces of about a second."""

import pathlib
from collections.abc import Iterator

import tensorflow as tf

from mptrain.pieces import Pieces


class TrainLoop:
    """The loop of one trainer: where it is in the data, and how far it goes between two looks at the outside world.

    Args:
        trainer: whose `train_step` draws a batch and trains on it, and whose `stop_requested` and `investigate` are asked.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._pieces = Pieces(trainer.config.optimizer.accumulation_steps, agree=trainer.workers.largest)
        self._batches = None
        self._position = None  # the step whose batch `_batches` yields next
        self._opened = 0  # the step at which it was opened
        self._saved_position = None
        self._function = tf.function(self._steps)

    def restore_position(self, folder: pathlib.Path) -> None:
        """Opens the data anew with the next step, at the position that was saved in `folder`."""
        self._saved_position, self._position = folder, None

    def open(self) -> None:
        """Makes the next batch that of the trainer's step."""
        step = int(self._trainer.global_step.numpy())
        if self._position != step:
            self._batches = self._trainer.training_batches.open(step, self._saved_position)
            self._position = self._opened = step

    def first_batch(self, step: int, draws: int) -> int:
        """Returns the number of the first batch that `step` draws, where each step since the opening has drawn so many."""
        return self._opened + (step - self._opened) * draws

    def run(self, steps: int) -> None:
        """Runs so many steps; `stop_requested` may end it after any piece of them."""
        run = self._run_marked if self._trainer.marks_steps else self._run_piece
        for piece in self._window_by_window(steps) if self._trainer.marks_steps else self._pieces.cut(steps):
            run(piece)
            self._position = int(self._trainer.global_step.numpy())  # which waits for the devices
            if self._trainer.stop_requested():
                break

    def _window_by_window(self, steps: int) -> Iterator[int]:
        window = self._trainer.config.optimizer.accumulation_steps
        for done in range(0, steps, window):
            yield min(window, steps - done)

    def _run_marked(self, steps: int) -> None:
        """Runs the loop in the graph under the number of its first step, for a profile."""
        with tf.profiler.experimental.Trace("train", step_num=self._position, _r=1):
            self._run_piece(steps)

    def _run_piece(self, steps: int) -> None:
        """Runs the loop in the graph; it ends at a skipped step that is looked into, while the weights are still those."""
        trainer = self._trainer
        while steps > 0:
            if trainer.investigate is None:
                self._function(self._batches, tf.constant(steps), None)
                return
            wanted = trainer.investigate.wanted()
            may_be_skipped = int(trainer.optimizer.skipped_steps) if wanted else tf.int64.max
            steps -= int(self._function(self._batches, tf.constant(steps), tf.constant(may_be_skipped, tf.int64)))
            if int(trainer.optimizer.skipped_steps) > may_be_skipped:
                trainer.investigate()

    def _steps(self, batches, steps: tf.Tensor, may_be_skipped: tf.Tensor | None) -> tf.Tensor:
        """Trains in the graph until `steps` are done, or more than `may_be_skipped` were skipped; returns how many it did."""

        def goes_on(done):
            if may_be_skipped is None:  # no look at the counter in each step where nobody asks
                return done < steps
            return done < steps and self._trainer.optimizer.skipped_steps <= may_be_skipped

        done = tf.constant(0)
        while goes_on(done):
            with tf.name_scope(""):
                self._trainer.train_step(batches)
            done += 1
        return done
