"""One trial of a sweep: its process, and what came of it."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

from mptrain.errors import InputError
from mptrain.pages import numbers


@dataclasses.dataclass
class Trial:
    """What a sweep knows of one trial.

    Attributes:
        number: from 1.
        parameters: field path -> value.
        folder: the name of its run folder in the sweep's.
        status: "waiting", "interrupted", "finished" or "failed"; the last two are not run again.
        value: what it is ranked by, of its last evaluation; None unless it has finished.
        metrics: all of that evaluation.
        step: how far it came.
        seconds: how long it ran.
        reason: why it failed.
    """

    number: int
    parameters: dict
    folder: str
    status: str = "waiting"
    value: float | None = None
    metrics: dict = dataclasses.field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.status in ("finished", "failed")

    def words(self, metric: str) -> str:
        if self.status == "finished":
            return f"{metric} {numbers.magnitude(self.value)}  in {self.seconds:.1f} s"
        return f"{self.status}{f': {self.reason}' if self.reason else ''}"


@contextlib.contextmanager
def started(config: pathlib.Path, workdir: pathlib.Path, output: pathlib.Path) -> Iterator[subprocess.Popen]:
    """Runs a trial; its process does not outlive the context.

    In a session of its own, so that a terminal's Ctrl-C comes to it once, from the sweep: a second one would not let it save.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "mptrain.main", f"--config={config}", f"--workdir={workdir}", "--mode=train_and_eval"]
    with open(output, "a") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def outcome(trial: Trial, status: int, workdir: pathlib.Path, output: pathlib.Path, metric: str) -> None:
    """Takes note of how a trial's process has ended.

    Raises:
        InputError: if its evaluations have no such metric.
    """
    rows = _rows(workdir / "metrics.jsonl")
    trial.step = max((row["step"] for row in rows if "split" in row), default=0)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        trial.status = "interrupted"
        return
    evaluations = [row for row in rows if row.get("split") == "eval" and row["step"] == trial.step]
    trial.metrics = {name: value for name, value in (evaluations or [{}])[-1].items() if name not in _NO_METRICS}
    trial.status, trial.value, trial.reason = "failed", None, ""
    if status:
        trial.reason = _reason(status, output)
    elif metric not in trial.metrics:
        raise InputError(f"the sweep's metric is {metric!r}: write one of {', '.join(trial.metrics)}")
    elif trial.metrics[metric] is None or not math.isfinite(trial.metrics[metric]):
        trial.reason = f"diverged: its {metric} is not finite"
    else:
        trial.status, trial.value = "finished", trial.metrics[metric]


_NO_METRICS = ("step", "split", "time", "nonfinite", "mode")


def _rows(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one short


def _reason(status: int, output: pathlib.Path) -> str:
    if status < 0:
        killed = f"its process was ended by {signal.Signals(-status).name}"
        return f"{killed}, as where the memory runs out" if -status == signal.SIGKILL else killed
    lines = output.read_text(errors="replace").strip().splitlines()
    told = [line.removeprefix("mptrain: ") for line in lines if line.startswith("mptrain: ")]
    return (told or lines or [f"its process ended with status {status}"])[-1]
