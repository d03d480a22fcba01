"""Runs evaluation steps in the graph, in pieces of about a second."""

import tensorflow as tf

from mptrain.errors import EvaluationStopped
from mptrain.pieces import Pieces


class EvalLoop:
    """The evaluation of one trainer, with Orbit's hooks: `eval_begin`, `eval_step`, `eval_reduce`, `eval_end`.

    Args:
        trainer: whose hooks are called, and whose `stop_requested` is asked between two pieces.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._pieces = Pieces(agree=trainer.workers.largest)
        self._function = None

    def run(self, steps: int) -> dict[str, float]:
        """Evaluates so many batches.

        Raises:
            EvaluationStopped: if `stop_requested` said so before the end.
        """
        trainer = self._trainer
        state = trainer.eval_begin()
        stateful = {} if state is None else {"reduce_fn": trainer.eval_reduce}
        if self._function is None:
            self._function = trainer.create_eval_loop_fn(has_state=bool(stateful))
        batches = iter(trainer.eval_dataset)
        for piece in self._pieces.cut(steps):
            arguments = {**stateful, "state": state} if stateful else {}
            state = self._function(batches, tf.constant(piece), **arguments)
            steps -= piece
            if steps and trainer.stop_requested():
                raise EvaluationStopped
        return trainer.eval_end(state) if stateful else trainer.eval_end()
