"""`metrics.jsonl`: one JSON object a line, for every loop, every evaluation and every event."""

import json
import math
import os
import time
from collections.abc import Mapping


class MetricsLog:
    """Appends rows to a file; each row is flushed, so that a killed run keeps what it wrote.

    Args:
        path: the file; made if it is not there, never shortened.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "a", buffering=1)

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends the metrics of `split` ("train" or "eval") at `step`; a NaN or inf becomes null and is named."""
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        finite = {name: None if name in nonfinite else value for name, value in values.items()}
        self._write({"step": step, "split": split, "time": time.time(), **finite}, nonfinite)

    def event(self, step: int, event: str, **details) -> None:
        """Appends an event at `step`: "resume", "fallback", "overflow", "preemption", "finished"."""
        self._write({"step": step, "event": event, "time": time.time(), **details}, [])

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict, nonfinite: list[str]) -> None:
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._file.write(json.dumps(row) + "\n")
