"""`metrics.jsonl`: one JSON object a line, for every loop, every evaluation and every event."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

from mptrain.errors import RunError

_OVERFLOWS = ("overflow", "overflows_forgotten")


class MetricsLog:
    """Appends rows to a file; each row is flushed, so that a killed run keeps what it wrote.

    Args:
        path: the file; made if it is not there. A last line that a kill cut short is removed.
        last_step: rows and overflow events of later steps are removed: they are what a killed run wrote after its last
            checkpoint, and the resumed run will write them again. Other events stay. `math.inf`, for a process that only
            evaluates: nothing is removed, because a training process may be writing, and its
            rows say "mode": "eval".

    Raises:
        RunError: if the file cannot be written, here or later.
    """

    def __init__(self, path: str | os.PathLike, last_step: float):
        self._path = pathlib.Path(path)
        self._evaluated = set()
        self._mode = {"mode": "eval"} if last_step == math.inf else {}
        try:
            self._keep_rows_up_to(last_step)
            self._file = open(path, "a", buffering=1)
        except OSError as error:
            raise self._failed(error) from error

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends the metrics of `split` ("train" or "eval") at `step`; a NaN or inf becomes null and is named.

        An evaluation that an earlier process wrote already, as of a finished run, is not written again.
        """
        if split == "eval" and self.has_evaluation(step):
            return
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        row = {"step": step, "split": split, "time": time.time(), **self._mode, **values, **dict.fromkeys(nonfinite)}
        self._write({**row, "nonfinite": nonfinite} if nonfinite else row)

    def event(self, step: int, event: str, **details) -> None:
        """Appends an event at `step`: "resume", "fallback", "overflow", "preemption", "finished"."""
        self._write({"step": step, "event": event, "time": time.time(), **details})

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier process wrote the row of the evaluation at `step`."""
        return step in self._evaluated

    def close(self) -> None:
        with contextlib.suppress(OSError):  # each row was flushed, and one that could not be has been told of
            self._file.close()

    def _write(self, row: dict) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise self._failed(error) from error

    def _keep_rows_up_to(self, last_step: float) -> None:
        if last_step == math.inf or not self._path.exists():
            return
        lines = self._path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _is_kept(line, last_step)]
        rows = [json.loads(line) for line in kept]
        self._evaluated = {row["step"] for row in rows if row.get("split") == "eval" and "mode" not in row}
        if kept != lines:
            temporary = self._path.with_name(f".{self._path.name}.writing")
            temporary.write_text("".join(kept))
            temporary.replace(self._path)

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"{self._path} cannot be written to: {error.strerror}")


class NoLog:
    """The log of a worker that is not the chief: takes everything and writes nothing."""

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        pass

    def event(self, step: int, event: str, **details) -> None:
        pass

    def has_evaluation(self, step: int) -> bool:
        return False

    def close(self) -> None:
        pass


def _is_kept(line: str, last_step: float) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # a line that a kill cut short, and the one that was written behind it
        return False
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    if row.get("event") in _OVERFLOWS:  # numbered by the step that overflowed: the first of all is number 0
        return row["step"] < last_step
    return row["step"] <= last_step or "split" not in row and row.get("event") != "finished"
