"""Actions of the user's own: plain callables of a step and its outputs, which may end the run."""

from collections.abc import Callable, Iterable, Mapping

from mptrain.checkpoints import Checkpoints
from mptrain.errors import RunError, StopRun
from mptrain.trainer import Trainer

_GO_ON, _STOP, _FAILED = range(3)


class CustomActions:
    """Calls the user's actions; ends the run if one returns true or a reason, or raises `StopRun`, in any worker.

    Where an action raises anything else, the step in hand is saved first.

    Args:
        trainer: the run's trainer.
        checkpoints: where the state is saved.
        actions: what `Trainer.build_actions` or `build_eval_actions` returned.
    """

    def __init__(
        self, trainer: Trainer, checkpoints: Checkpoints, actions: Iterable[Callable[[int, Mapping[str, float]], object]]
    ):
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._actions = list(actions)

    def __call__(self, outputs: Mapping[str, float]) -> None:
        """Calls all actions.

        Raises:
            StopRun: if one of them ends the run.
            Exception: what one of them raised.
        """
        if not self._actions:
            return
        step, reasons, error = int(self._trainer.global_step.numpy()), [], None
        try:
            for action in self._actions:
                reasons += _reason(action, step, outputs)
        except Exception as raised:  # the user's code: whatever it raises, the other workers must hear of it
            error = raised
        verdict = self._trainer.workers.largest(_FAILED if error else _STOP if reasons else _GO_ON)
        if verdict == _FAILED:
            self._checkpoints.save(step, self._trainer.save_position)
            self._checkpoints.wait()
            raise error or RunError(f"an action failed on another worker at step {step}, which is saved")
        if verdict == _STOP:
            raise StopRun(reasons[0] if reasons else "an action on another worker asked for it")


def _reason(action: Callable, step: int, outputs: Mapping[str, float]) -> list[str]:
    """Calls an action; returns why the run is to end, or nothing."""
    try:
        answer = action(step, dict(outputs))
    except StopRun as stop:
        answer = str(stop) or True
    if isinstance(answer, str):
        return [answer] if answer else []
    name = getattr(action, "__qualname__", type(action).__qualname__)
    return [f"{name} asked for it"] if answer is not None and bool(answer) else []
