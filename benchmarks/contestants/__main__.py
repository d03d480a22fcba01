"""The process of one contestant: reads cases and turns from its input, answers with times and losses; see `frame`."""

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.contestants import ALL
from benchmarks.frame import Case


class Gate:
    """Lets a contestant pass one turn at a time.

    Attributes:
        ahead: the steps of the turns to come.
    """

    def __init__(self, turns: tuple[int, ...], replies):
        self.ahead = list(turns)
        self._replies = replies

    def __iter__(self) -> Iterator[int]:
        """Yields the steps of each turn; the caller trains them and calls `done` before it asks for the next."""
        while self.ahead:
            yield self.enter()

    def enter(self) -> int:
        """Waits to be told; returns the steps of the turn that begins."""
        if not sys.stdin.readline():
            raise SystemExit  # the frame has ended
        self._steps = self.ahead.pop(0)
        self._start = time.perf_counter(), time.process_time()
        return self._steps

    def done(self, loss: float) -> None:
        """Ends the turn, whose mean loss is known by now."""
        wall, processor = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        reply = {"steps": self._steps, "wall": wall, "processor": processor, "loss": float(loss)}
        print(json.dumps(reply), file=self._replies, flush=True)


def main() -> None:
    about = ALL[sys.argv[1]]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    needed = {"torch_loop": ["torch"], "lightning_fit": ["torch", "lightning"]}.get(about.module, [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    module = None if missing else importlib.import_module(f"benchmarks.contestants.{about.module}")
    while line := sys.stdin.readline():
        case = Case.from_json(line)
        if missing:
            sys.stdin.readline()
            print(json.dumps({"failed": f"not installed: {', '.join(missing)}"}), file=replies, flush=True)
            continue
        module.run(case, Gate(case.turns, replies), *about.options)


if __name__ == "__main__":
    main()
