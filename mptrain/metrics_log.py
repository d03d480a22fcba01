"""`metrics.jsonl`: one JSON object a line, for every loop, every evaluation and every event."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

from mptrain.errors import RunError

_NO_METRICS = ("step", "split", "time", "nonfinite", "mode")
_WRITTEN_AGAIN = ("finished", "plateau")  # events of what a resumed run comes to once more
_SAVED = ("resume", "preemption", "time_limit", "finished")  # events of runs that had a checkpoint then
_OVERFLOWS = ("overflow", "overflows_forgotten")


class MetricsLog:
    """Appends rows to a file; each row is flushed, so that a killed run keeps what it wrote.

    Attributes:
        last_loop: the metrics of the last training loop that an earlier process logged.
        evaluations: step -> metrics of every evaluation of this run, those that earlier processes logged too; in order.

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
        self.last_loop = {}
        self.evaluations = {}
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
        if split == "eval":
            self.evaluations[step] = _metrics(row)
        self._write({**row, "nonfinite": nonfinite} if nonfinite else row)

    def event(self, step: int, event: str, **details) -> None:
        """Appends an event at `step`: "resume", "fallback", "overflow", "plateau", "preemption",
        "time_limit", "failed", "finished"."""
        self._write({"step": step, "event": event, "time": time.time(), **details})

    def has_evaluation(self, step: int) -> bool:
        """Whether the row of the evaluation at `step` is written."""
        return step in self.evaluations

    def close(self, status: str = "finished") -> None:
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
        kept = [line for line in lines if line.endswith("\n") and _is_kept(_row(line), last_step)]
        rows = [json.loads(line) for line in kept]
        loops = [row for row in rows if row.get("split") == "train"]
        self.last_loop = _metrics((loops or [{}])[-1])
        self.evaluations = {row["step"]: _metrics(row) for row in rows if row.get("split") == "eval" and "mode" not in row}
        if kept != lines:
            temporary = self._path.with_name(f".{self._path.name}.writing")
            temporary.write_text("".join(kept))
            temporary.replace(self._path)

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"{self._path} cannot be written to: {error.strerror}")


class NoLog:
    """The log of a worker that is not the chief, or of an evaluation that may not write: takes everything, writes nothing."""

    last_loop = {}
    evaluations = {}

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        pass

    def event(self, step: int, event: str, **details) -> None:
        pass

    def has_evaluation(self, step: int) -> bool:
        return False

    def close(self, status: str = "finished") -> None:
        pass


def last_saved_or_trained(path: pathlib.Path, saved_after: int) -> int | None:
    """Returns the last step that the log shows of a run that has saved; None if it need not have.

    Args:
        path: the log; need not be there.
        saved_after: the run has saved if it logged a later step than this.
    """
    if not path.exists():
        return None
    rows = [row for row in map(_row, path.read_text(errors="replace").splitlines()) if row and "mode" not in row]
    saved = any(row.get("event") in _SAVED or "split" in row and row["step"] > saved_after for row in rows)
    return max(row["step"] for row in rows) if saved else None


def _metrics(row: dict) -> dict[str, float]:
    """Returns the metrics in a row, in which a null was a NaN or inf."""
    return {name: math.nan if row[name] is None else row[name] for name in row if name not in _NO_METRICS}


def evaluation_at(path: pathlib.Path, step: int) -> dict[str, float | None] | None:
    """Returns the metrics of the last evaluation at `step`, or None; `path` need not be there."""
    rows = [row for row in map(_row, path.read_text(errors="replace").splitlines()) if row] if path.exists() else []
    found = [row for row in rows if row["step"] == step and row.get("split") == "eval"]
    return {name: value for name, value in found[-1].items() if name not in (*_NO_METRICS, "mode")} if found else None


def _row(line: str) -> dict | None:
    """Returns the row; None for a line that a kill cut short, the one that was written behind it, and what is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _is_kept(row: dict | None, last_step: float) -> bool:
    if row is None:
        return False
    if row.get("event") in _OVERFLOWS:  # numbered by the step that overflowed: the first of all is number 0
        return row["step"] < last_step
    return row["step"] <= last_step or "split" not in row and row.get("event") not in _WRITTEN_AGAIN
