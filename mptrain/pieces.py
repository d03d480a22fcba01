"""Cuts a loop in the graph into pieces of bounded time, so that a signal is heard soon whatever a step costs."""

import math
import time
from collections.abc import Callable, Iterator


class Pieces:
    """Finds out how many steps take about `seconds`.

    The first piece is as small as it can be, since tracing and compiling come with it, and its time does not count. From
    then on sizes double until they take half of `seconds` or more.

    Args:
        multiple: every piece has a multiple of this many steps, but for the last of a loop.
        seconds: what a piece may take.
        agree: makes one number of the seconds that a piece took in each worker: all must cut alike.
    """

    def __init__(self, multiple: int = 1, seconds: float = 1.0, agree: Callable[[float], float] = lambda elapsed: elapsed):
        self._agree = agree
        self._multiple = multiple
        self._seconds = seconds
        self._size = multiple
        self._warm = False

    def cut(self, steps: int) -> Iterator[int]:
        """Yields the sizes of the pieces of a loop of `steps`; the caller runs each before it asks for the next."""
        while steps > 0:
            size = min(self._size, steps)
            start = time.perf_counter()
            yield size
            self._learn(size, self._agree(time.perf_counter() - start))
            steps -= size

    def _learn(self, size: int, elapsed: float) -> None:
        if self._warm:
            fitting = math.floor(self._seconds * size / max(elapsed, 1e-9) / self._multiple) * self._multiple
            self._size = max(self._multiple, min(fitting, max(2 * size, self._size)))
        self._warm = True
