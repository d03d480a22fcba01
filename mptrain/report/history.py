"""What a run's `metrics.jsonl` tells: its curves as columns of numbers, its events, its skipped steps, and how it ended.

Read line by line into columns, because a long run has several hundred thousand rows, and forgiving: a log that was damaged
still has a report.
"""

import array
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

# What a training row holds beside metrics, and what its plot is called.
COURSE = {"learning_rate": "learning rate", "gradient_norm": "gradient norm", "examples_per_second": "examples a second"}
_COUNTERS = ("loss_scale", "applied_steps", "skipped_steps", "steps_per_second")
_NO_VALUES = ("step", "split", "time", "mode", "nonfinite")
_ENDS = ("finished", "failed", "preemption", "time_limit")
_MOST_EVENTS = 1000  # that are kept of one kind; the rest are counted


class Columns:
    """The rows of one split, in the order of their steps: a column for each name, NaN where a row has no finite number.

    Attributes:
        steps: float64 [rows].
        values: name -> float64 [rows].
        nonfinite: name -> the steps of the rows that say that it was NaN or infinite, float64.
    """

    def __init__(self):
        self._steps, self._rows = array.array("d"), 0
        self._values, self._nonfinite = {}, {}

    def add(self, row: dict) -> None:
        self._steps.append(row["step"])
        for name, value in row.items():
            if name in _NO_VALUES or not (value is None or is_number(value)):
                continue
            column = self._values.setdefault(name, array.array("d"))
            column.extend([math.nan] * (self._rows - len(column)))
            finite = finite_or_none(value)
            column.append(math.nan if finite is None else finite)
            if finite is None:
                self._nonfinite.setdefault(name, array.array("d")).append(row["step"])
        self._rows += 1

    def close(self) -> None:
        """Sorts the rows; of several of one step, as after a copied log, the last is kept."""
        steps = np.array(self._steps)
        order = np.argsort(steps, kind="stable")
        last = np.append(np.diff(steps[order]) > 0, True)[: len(steps)]
        kept = order[last]
        self.steps = steps[kept]
        self.values = {}
        for name, column in self._values.items():
            column.extend([math.nan] * (self._rows - len(column)))
            self.values[name] = np.array(column)[kept]
        self.nonfinite = {name: np.unique(np.array(found)) for name, found in self._nonfinite.items()}

    def last(self, name: str) -> float | None:
        """The value of the last row that has one; None if none has."""
        column = self.values.get(name, np.empty(0))
        known = np.flatnonzero(~np.isnan(column))
        return float(column[known[-1]]) if known.size else None


class History:
    """What `metrics.jsonl` tells.

    Attributes:
        train, eval: `Columns`.
        events: rows of all events but overflows and where they came from, the last thousand of each kind.
        overflows: rows "overflow" and "overflows_forgotten", as (step, loss scale or None, 1 or, of the latter, 0, optimizer).
        skip_rows, origins: rows "overflow", and "provenance", which says where one came from: the first thousand.
        forgotten_events: how many events are not in `events`.
        damaged: how many lines could not be read.
        end: the row of the event that ended the training, and after which none went on; None if the log says nothing of it.
        seconds: how long its processes trained and evaluated, as far as the log shows; None if it does not.

    Args:
        file: the log; need not be there.
    """

    def __init__(self, file: pathlib.Path):
        self.train, self.eval = Columns(), Columns()
        self.events, self.overflows, self.skip_rows, self.origins = [], [], [], []
        self.forgotten_events, self.damaged, self.end = 0, 0, None
        self._seconds, self._before, self._kinds = 0.0, None, {}
        for row in self._rows(file):
            self._add(row)
        self.train.close(), self.eval.close()
        self.seconds = self._seconds or None

    @property
    def last_step(self) -> int:
        """The last step that the log shows."""
        steps = [int(columns.steps[-1]) for columns in (self.train, self.eval) if columns.steps.size]
        return max([*steps, *(event["step"] for event in self.events)], default=0)

    @property
    def optimizers(self) -> list[str]:
        """The names of the optimizers, where there are several."""
        return [name.removesuffix("/applied_steps") for name in self.train.values if name.endswith("/applied_steps")]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, the loss first."""
        fields, names = (*COURSE, *_COUNTERS), dict.fromkeys([*self.train.values, *self.eval.values])
        others = {of_optimizer(each, field) for each in ("", *self.optimizers) for field in fields}
        return sorted((name for name in names if name not in others), key="loss".__ne__)

    def skips(self, optimizer: str = "") -> list[tuple[int, int, int]]:
        """Returns (from step, to step, how many) of skipped steps: those that have an event by their step, others by loop.

        Under accumulation the last step of the window stands for the update.

        Args:
            optimizer: one of several; "": all.
        """
        found = [(step, step, 1) for step, _, count, whose in self.overflows if count == 1 and optimizer in ("", whose)]
        known = np.sort([float(step) for step, *_ in found])
        counts = self.train.values.get(of_optimizer(optimizer, "skipped_steps"), np.empty(0))
        counted = ~np.isnan(counts)
        steps, counts = self.train.steps[counted], np.maximum.accumulate(counts[counted])
        before, already = (np.concatenate([[0.0], each[:-1]]) for each in (steps, counts))
        inside = np.searchsorted(known, steps) - np.searchsorted(known, before)
        more = counts - already - inside
        found += [(int(before[i]), int(steps[i]) - 1, int(more[i])) for i in np.flatnonzero(more > 0)]
        return sorted(found)

    def scales(self, optimizer: str = "") -> list[tuple[int, float]]:
        """Returns (step, loss scale) wherever it changed: behind a skipped step, or else when a loop had ended.

        Args:
            optimizer: one of several; "": the only one.
        """
        column = self.train.values.get(of_optimizer(optimizer, "loss_scale"), np.empty(0))
        known = column > 0
        met = [
            (step, scale) for step, scale, _, whose in self.overflows if scale is not None and scale > 0 and whose == optimizer
        ]
        skipped = np.repeat([True, False], [len(met), known.sum()])
        steps = np.concatenate([[step for step, _ in met], self.train.steps[known]])
        scales = np.concatenate([[scale for _, scale in met], column[known]])
        order = np.argsort(steps, kind="stable")
        steps, scales, skipped = steps[order], scales[order], skipped[order]
        steps[1:] = np.where(skipped[:-1], np.minimum(steps[:-1] + 1, steps[1:]), steps[1:])
        changed = np.flatnonzero(np.append(True, scales[1:] != scales[:-1])[: len(scales)])
        return [(int(steps[i]), float(scales[i])) for i in changed]

    def _rows(self, file: pathlib.Path) -> Iterator[dict]:
        if not file.exists():
            return
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict) and _is_step(row.get("step")) and ("split" in row or "event" in row):
                    yield row
                elif line.strip():
                    self.damaged += 1

    def _add(self, row: dict) -> None:
        self._count_seconds(row)
        split, event = row.get("split"), row.get("event")
        if split in ("train", "eval"):
            (self.train if split == "train" else self.eval).add(row)
            if split == "train":
                self.end = None  # the run went on
        elif event == "overflow":
            self.overflows.append((row["step"], finite_or_none(row.get("loss_scale")), 1, row.get("optimizer", "")))
            if len(self.skip_rows) < _MOST_EVENTS:
                self.skip_rows.append(row)
        elif event == "overflows_forgotten":
            self.overflows.append(
                (row["step"], None, 0, row.get("optimizer", ""))
            )  # how many they are is in the rows of the loops
        elif event == "provenance":
            if len(self.origins) < _MOST_EVENTS:
                self.origins.append(row)
        elif isinstance(event, str):
            self._add_event(row, event)

    def _add_event(self, row: dict, event: str) -> None:
        if event in _ENDS:
            self.end = row
        self._kinds[event] = self._kinds.get(event, 0) + 1
        if self._kinds[event] <= _MOST_EVENTS or event in _ENDS:
            self.events.append(row)
        else:
            self.forgotten_events += 1

    def _count_seconds(self, row: dict) -> None:
        """Adds the time since the row before; a process that goes on begins with "resume", and was not there before."""
        now = finite_or_none(row.get("time"))
        if now is None or row.get("mode") == "eval":
            return
        if self._before is not None and row.get("event") not in ("resume", "fallback"):
            self._seconds += max(0.0, now - self._before)
        self._before = now


def of_optimizer(name: str, field: str) -> str:
    """Returns what a row calls a field of one of several optimizers; of the only one, called "", the field itself."""
    return f"{name}/{field}" if name else field


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite_or_none(value) -> float | None:
    """Returns a number as a float; None for anything else, and for what is not finite or does not fit."""
    if not is_number(value):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of a damaged line
        return None


def _is_step(value) -> bool:
    return is_number(value) and isinstance(value, int) and 0 <= value < 2**53
