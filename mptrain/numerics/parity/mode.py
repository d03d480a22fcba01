"""`--mode=parity`: trains the user's config in float32 and in 16 bits from one start, and reports where they part."""

import contextlib
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import tensorflow as tf

from mptrain import config as config_lib
from mptrain.console import Console
from mptrain.errors import InputError, RunError
from mptrain.numerics.parity import report, run
from mptrain.numerics.parity.page import write_page
from mptrain.numerics.parity.table import table

CONFIG = "fields.pickle"  # a pickle, because JSON would make lists of the tuples in config.model
PROGRESS = "mptrain parity: "  # begins a line that says how far a process is
FAILED = "mptrain parity failed: "  # begins the line that says why a process ends


def parity(trainer, folder: pathlib.Path, console: Console) -> dict[str, float]:
    """Trains `config.parity.steps` steps in float32 and in each precision, one after another, and writes the report.

    Args:
        trainer: the run's, restored or fresh: all precisions start from its state. It is left as it is.
        folder: gets parity.json and parity.html.
        console: gets progress, the table and the verdicts.

    Returns:
        "precisions", and how many of them "follow", "part" and "failed".

    Raises:
        InputError: on a TPU, which one process keeps from all others, or where the disk is too small.
        RunError: if float32 fails.
    """
    if isinstance(trainer.strategy, tf.distribute.TPUStrategy):
        raise InputError("--mode=parity trains in several processes, which cannot share a TPU: run it on GPUs or CPUs")
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(trainer, folder)
    work = pathlib.Path(tempfile.mkdtemp(prefix=".parity-", dir=folder))
    try:
        run.write_start(trainer, work)
        (work / CONFIG).write_bytes(pickle.dumps(dict(config_lib.fields(trainer.config))))
        whole = compare(trainer, lambda name, total: _in_process(work, name, total, console))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    (folder / "parity.json").write_text(json.dumps(whole, indent=1, allow_nan=False))
    write_page(whole, folder)
    console.table(table(whole))
    for row in whole["runs"][1:]:
        console.line(f"{row['precision']}: {row['verdict']}")
    console.line(f"the report is {folder / 'parity.html'}")
    statuses = [row["status"] for row in whole["runs"]]
    counts = {name: statuses.count(status) for name, status in (("follow", "follows"), ("part", "parts"), ("failed", "failed"))}
    return {"precisions": len(statuses) - 1, **counts}


def compare(trainer, launch: Callable[[str, int], dict | str]) -> dict:
    """Returns the report on the runs that `launch(precision, steps to do)` makes, or says why it could not."""
    config = trainer.config
    schedule = run.Schedule.of(config, int(trainer.global_step.numpy()))
    to_do = schedule.steps + len(schedule.compared)
    reference = launch(run.REFERENCE, to_do)
    if isinstance(reference, str):
        raise RunError(f"--mode=parity: float32, which the others are compared with, failed: {reference}")
    return report.build(config, schedule, reference, {name: launch(name, to_do) for name in precisions(trainer)})


def precisions(trainer) -> tuple[str, ...]:
    """Returns the precisions that are compared with float32: the configured ones, else the run's own, else both."""
    if trainer.config.parity.precisions:
        return tuple(dict.fromkeys(trainer.config.parity.precisions))
    own = trainer.precision.name
    return (own,) if own != run.REFERENCE else ("mixed_float16", "mixed_bfloat16")


def _check_disk(trainer, folder: pathlib.Path) -> None:
    compared = run.Schedule.of(trainer.config, int(trainer.global_step.numpy())).compared_count
    needed, free = run.bytes_on_disk(trainer, compared), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"--mode=parity needs {needed / 1e9:,.1f} GB in {folder} for the weights and gradients of {compared:,} compared"
            f" steps, and {free / 1e9:,.1f} GB are free: write a larger config.parity.every_steps, or another --workdir"
        )


def _in_process(work: pathlib.Path, name: str, to_do: int, console: Console) -> dict | str:
    with _started(work, name) as process:
        counts = (int(line.removeprefix(PROGRESS)) for line in process.stdout if line.startswith(PROGRESS))
        with console.counting(name, to_do):
            next(counts, None)  # it is built and traced, and its time is taken: that says nothing about the time left
        with console.counting(name, to_do) as done:
            for count in counts:
                done(count)
        process.wait()
    if process.returncode:
        return _reason(process.returncode, (work / f"{name}.stderr").read_text(errors="replace"))
    return json.loads((work / f"{name}.json").read_text())


@contextlib.contextmanager
def _started(work: pathlib.Path, name: str) -> Iterator[subprocess.Popen]:
    """Runs one precision; its process does not outlive the context."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "mptrain.numerics.parity.child", str(work), name]
    with open(work / f"{name}.stderr", "w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, errors="replace")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _reason(status: int, errors: str) -> str:
    if status < 0:
        killed = f"its process was ended by {signal.Signals(-status).name}"
        return f"{killed}, as where the memory runs out" if -status == signal.SIGKILL else killed
    lines = errors.strip().splitlines() or [f"its process ended with status {status}"]
    told = [line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)]
    return (told or lines)[-1]
