"""`metrics.jsonl`: one JSON object a line, for every loop, every evaluation and every event."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

from mptrain.errors import RunError


class MetricsLog:
    """Appends rows to a file; each row is flushed, so that a killed run keeps what it wrote.

    Args:
        path: the file; made if it is not there. A last line that a kill cut short is removed.
        last_step: rows of later steps are removed: they are what a killed run wrote after its last checkpoint, and the
            resumed run will write them again. Events stay. `math.inf`, for a process that only evaluates: nothing is removed,
            because a training process may be writing.

    Raises:
        RunError: if the file cannot be written, here or later.
    """

    def __init__(self, path: str | os.PathLike, last_step: float):
        self._path = pathlib.Path(path)
        try:
            self._keep_rows_up_to(last_step)
            self._file = open(path, "a", buffering=1)
        except OSError as error:
            raise self._failed(error) from error

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends the metrics of `split` ("train" or "eval") at `step`; a NaN or inf becomes null and is named."""
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        row = {"step": step, "split": split, "time": time.time(), **values, **dict.fromkeys(nonfinite)}
        self._write({**row, "nonfinite": nonfinite} if nonfinite else row)

    def event(self, step: int, event: str, **details) -> None:
        """Appends an event at `step`: "resume", "fallback", "overflow", "preemption", "finished"."""
        self._write({"step": step, "event": event, "time": time.time(), **details})

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise self._failed(error) from error

    def _keep_rows_up_to(self, last_step: float) -> None:
        if last_step == math.inf or not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _is_kept(line, last_step)]
        if kept != lines:
            temporary = self._path.with_name(f".{self._path.name}.writing")
            temporary.write_text("".join(kept))
            temporary.replace(self._path)

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"{self._path} cannot be written to: {error.strerror}")


def _is_kept(line: str, last_step: float) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # a line that a kill cut short, and the one that was written behind it
        return False
    return "split" not in row or row["step"] <= last_step
