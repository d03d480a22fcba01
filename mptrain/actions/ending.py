"""When a run ends: behind the loop or evaluation in which an action asked for it, and not in the middle of its actions."""

from collections.abc import Callable, Mapping

from mptrain.errors import StopRun

Action = Callable[[Mapping[str, float]], None]


class Ending:
    """Holds back the `StopRun` of an action until the other actions have run and Orbit has written TensorBoard's row."""

    def __init__(self):
        self._stop = None

    def holding_back(self, actions: list[Action]) -> list[Action]:
        """Returns the actions, of which the first `StopRun` is kept for `check`."""
        return [self._holding_back(action) for action in actions]

    def _holding_back(self, action: Action) -> Action:
        def call(outputs: Mapping[str, float]) -> None:
            try:
                action(outputs)
            except StopRun as stop:
                self._stop = self._stop or stop

        return call

    def check(self) -> None:
        """Raises what was held back.

        Raises:
            StopRun: if an action did.
        """
        stop, self._stop = self._stop, None
        if stop is not None:
            raise stop
