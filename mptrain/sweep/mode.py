"""Runs a sweep's trials, each in a process and a run folder of its own, and goes on where an earlier process stopped."""

import contextlib
import json
import pathlib
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import config_check, devices, durations
from mptrain.config_text import config_text
from mptrain.console import Console
from mptrain.errors import InputError, Interrupted, RunError
from mptrain.run_folder import RunFolder
from mptrain.sweep import report
from mptrain.sweep.search import Search
from mptrain.sweep.trial import Trial, outcome, started

_MOST_FAULTS = 20


def sweep(config: ConfigDict, search: Search, workdir: pathlib.Path) -> dict[str, float]:
    """Runs all trials that are not over yet, and writes the report after each.

    Args:
        config: what all trials have in common.
        search: what is tried.
        workdir: the sweep's folder; a trial's is `trial-003-...` in it, and its config and output are in `trials/`.

    Returns:
        "trials", "finished" and "failed": how many.

    Raises:
        InputError: if a trial's config is wrong, or the folder holds another sweep or a run; nothing was written.
        RunError: if no trial has come to an end.
        Interrupted: if a signal ended the sweep; the trial in hand was saved.
    """
    folder, console = RunFolder(workdir), Console()
    if devices.is_multi_worker(config.devices):
        raise InputError("--mode=sweep starts its trials on this host: use another devices.strategy for it")
    if config.train.time_limit:
        raise InputError("config.train.time_limit ends a trial without the evaluation that ranks it: leave it out of a sweep")
    if folder.config_file.exists():
        raise InputError(f"--workdir={folder.path} holds a run: name another folder for the sweep")
    if ":" in str(folder.path):
        raise InputError(f"--workdir={folder.path}: a sweep's folder must have no colon in its name")
    metric, mode = search.metric or config.checkpoint.best_metric, search.mode or config.checkpoint.best_mode
    whole = {
        "metric": metric,
        "mode": mode,
        "search": _described(search),
        "config": dict(config_lib.fields(config)),
        "trials": [],
    }
    before = report.read(folder.path)
    _check_same(before, json.loads(json.dumps(whole)), folder.path)
    known = {trial["number"]: Trial(**trial) for trial in before["trials"]} if before else {}
    _check_trials(config, search)
    folder.lock()
    try:
        search.open(folder.path, mode)
        trials = _Trials(config, search, folder.path, console, whole, known)
        with _signals() as signals:
            for number in range(1, len(search) + 1):
                trials.run(number, signals)
    finally:
        folder.unlock()
    return trials.close()


def config_of(config: ConfigDict, parameters: Mapping[str, object]) -> ConfigDict:
    """Returns the config of a trial.

    Raises:
        InputError: for a field that does not exist, or a value of another type.
    """
    config = config_lib.copied(config)
    for path, value in parameters.items():
        config_lib.set_field(config, path, value)
        durations.prefer(config, path)
    return config


class _Trials:
    def __init__(self, config, search: Search, folder: pathlib.Path, console: Console, whole: dict, known: dict[int, Trial]):
        self._config = config
        self._search = search
        self._folder = folder
        self._console = console
        self._whole = whole
        self._trials = known

    def run(self, number: int, signals: "_Signals") -> None:
        """Runs a trial to its end, unless it is over; what it says goes into `trials/`."""
        parameters = self._search.ask(number)
        trial = self._trials.get(number)
        if trial is None or not (self._folder / trial.folder).exists():
            trial = Trial(number, parameters, _name(number, parameters))
            self._trials[number] = trial
        if trial.is_over:
            self._search.tell(number, trial.value)
            return
        config = config_of(self._config, parameters)
        files = self._folder / "trials"
        files.mkdir(exist_ok=True)
        (files / f"{number:03}.py").write_text(config_text(config))
        workdir = self._folder / trial.folder
        own = RunFolder(workdir)
        own.lock()  # which a trial does that outlived an earlier sweep
        own.unlock()
        begun = time.monotonic()
        self._console.line(f"trial {number} of {len(self._search)}  {_words(parameters)}")
        with started(files / f"{number:03}.py", workdir, files / f"{number:03}.txt") as process:
            signals.pass_to(process)
            process.wait()
            signals.pass_to(None)
        trial.seconds += time.monotonic() - begun
        outcome(trial, process.returncode, workdir, files / f"{number:03}.txt", self._whole["metric"])
        if trial.is_over:
            self._search.tell(number, trial.value)
        self._console.line(f"trial {number} of {len(self._search)}  {trial.words(self._whole['metric'])}")
        self._write()
        if trial.status == "interrupted":
            number = signals.received or process.returncode - 128
            self._show()
            self._console.line(f"stopped; go on with the same command and --workdir={self._folder}")
            raise Interrupted("the sweep was stopped", exit_status=128 + number)

    def close(self) -> dict[str, float]:
        """Writes and shows the report of a sweep that has come to its end."""
        self._write()
        self._show()
        counts = {status: sum(trial.status == status for trial in self._trials.values()) for status in ("finished", "failed")}
        if not counts["finished"]:
            raise RunError(f"all {len(self._search)} trials failed, the first one: {self._trials[1].reason}")
        return {"trials": len(self._search), **counts}

    def _write(self) -> None:
        self._whole["trials"] = [vars(self._trials[number]) for number in sorted(self._trials)]
        report.write(self._whole, self._folder)

    def _show(self) -> None:
        self._console.table(report.table(self._whole))
        self._console.line(f"the report is {self._folder / 'report' / 'sweep.html'}")


class _Signals:
    """Ctrl-C and SIGTERM of a sweep, which are handed to the trial in hand: it saves, and its end ends the sweep."""

    def __init__(self):
        self.received = 0
        self._process = None

    def __call__(self, number: int, frame: object) -> None:
        self.received = number
        if self._process is None:
            raise Interrupted("the sweep was stopped between two trials", exit_status=128 + number)
        self._process.send_signal(number)

    def pass_to(self, process) -> None:
        self._process = process


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals, previous = _Signals(), {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        previous = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _described(search: Search) -> dict:
    return {"kind": search.kind, "trials": len(search), "space": {path: str(values) for path, values in search.space.items()}}


def _check_trials(config: ConfigDict, search: Search) -> None:
    """Checks the config of every trial, as far as it is known, before the first one runs."""
    faults = []
    for number, parameters in enumerate(search.samples(), start=1):
        try:
            found = config_check.faults(config_of(config, parameters))
        except InputError as error:
            found = [str(error)]
        faults += [f"trial {number} ({_words(parameters)}): {fault}" for fault in found]
    more = [f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
    config_check.refuse(faults[:_MOST_FAULTS] + more)


def _check_same(before: dict | None, now: dict, folder: pathlib.Path) -> None:
    """Refuses a folder with another sweep; more trials of the same may follow."""
    if before is None:
        return
    changes = config_lib.differences(before["config"], now["config"])
    others = [f"config.{path} was {was!r} and is {new!r}" for path, (was, new) in changes.items() if path not in _HARMLESS]
    for name in ("metric", "mode"):
        if before[name] != now[name]:
            others.append(f"its {name} was {before[name]!r} and is {now[name]!r}")
    old, new = before["search"], now["search"]
    if (old["kind"], old["space"]) != (new["kind"], new["space"]) or new["trials"] < len(before["trials"]):
        others.append(f"it was a search of {old['trials']} by {old['kind']} over {old['space']}")
    if others:
        raise InputError(
            f"--workdir={folder} holds another sweep: {others[0]}; name another folder, or use that sweep's config"
        )


_HARMLESS = ("checkpoint.keep", "checkpoint.async_save")


def _name(number: int, parameters: Mapping[str, object]) -> str:
    words = [f"{path.rsplit('.', 1)[-1]}={report.short(value)}" for path, value in parameters.items()]
    return f"trial-{number:03}-" + re.sub(r"[^\w.=+-]+", "_", "-".join(words))[:100].rstrip("._-")


def _words(parameters: Mapping[str, object]) -> str:
    return "  ".join(f"{path}={report.short(value)}" for path, value in parameters.items())
