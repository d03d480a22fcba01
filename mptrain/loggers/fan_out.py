"""Sends rows and events to metrics.jsonl, and to each logger in a thread of its own, which a slow server may hold up."""

import pathlib
import queue
import threading
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import keras_compat
from mptrain.console import Console
from mptrain.errors import InputError, RunError
from mptrain.loggers.base import Logger, RunInfo
from mptrain.metrics_log import MetricsLog

_HOMES = {
    "wandb": "mptrain.loggers.weights_and_biases.WandbLogger",
    "mlflow": "mptrain.loggers.mlflow_runs.MlflowLogger",
}
_PATIENCE = 60.0  # seconds in which a logger must have taken what is left at the end


def classes(config: ConfigDict) -> dict[str, type[Logger]]:
    """Returns the classes that `config.log.loggers` names; imports them, and with them the packages of their services.

    Raises:
        InputError: if one cannot be imported, or is no Logger.
    """
    found = {}
    for name in config.log.loggers:
        try:
            found[name] = keras_compat.import_class(_HOMES.get(name, name))
        except (ImportError, ValueError) as error:
            raise InputError(f"config.log.loggers names {name!r}, which cannot be imported: {error}") from error
        if not (isinstance(found[name], type) and issubclass(found[name], Logger)):
            raise InputError(f"config.log.loggers names {name!r}: it is not a subclass of mptrain.Logger")
    return found


def start(log: MetricsLog, config: ConfigDict, folder: pathlib.Path, step: int, console: Console) -> "MetricsLog | Logs":
    """Returns the log that also feeds the loggers that the config names; the given one where it names none.

    Raises:
        RunError: if a logger cannot start.
    """
    run = RunInfo(
        folder=folder,
        name=config.log.name or folder.resolve().name,
        project=config.log.project,
        default_project=config.trainer.split(".")[-2],
        tags=tuple(config.log.tags),
        config=dict(config_lib.fields(config)),
        step=step,
    )
    started = []
    for name, logger_class in classes(config).items():
        try:
            logger = logger_class(run)
        except Exception as error:  # of a service: not logged in, no such server, and whatever else it has names for
            raise RunError(f"config.log.loggers: {name} cannot start: {_line(error)}") from error
        if logger.where:
            console.line(f"{name:<12} {logger.where}")
        started.append(_Background(name, logger, console.warn))
    return Logs(log, started) if started else log


class Logs:
    """A `MetricsLog` and what goes beside it, with the interface of the former."""

    def __init__(self, log: MetricsLog, loggers: "list[_Background]"):
        self._log = log
        self._loggers = loggers

    @property
    def last_loop(self) -> dict[str, float]:
        return self._log.last_loop

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        return self._log.evaluations

    def has_evaluation(self, step: int) -> bool:
        return self._log.has_evaluation(step)

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if split == "eval" and self.has_evaluation(step):
            return
        self._log.row(step, split, values)
        self._tell("row", step, split, dict(values))

    def event(self, step: int, event: str, **details) -> None:
        self._log.event(step, event, **details)
        self._tell("event", step, event, details)

    def close(self, status: str = "finished") -> None:
        self._log.close(status)
        self._tell("close", status)
        for logger in self._loggers:
            logger.join()

    def _tell(self, method: str, *arguments) -> None:
        for logger in self._loggers:
            logger.call(method, *arguments)


class _Background:
    """Calls a logger in a thread, in order, until a call fails."""

    def __init__(self, name: str, logger: Logger, warn: Callable[[str], None]):
        self._name = name
        self._logger = logger
        self._warn = warn
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def call(self, method: str, *arguments) -> None:
        self._calls.put((method, arguments))

    def join(self) -> None:
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._warn(f"{self._name} has not taken all rows within {_PATIENCE:.0f} s; the rest is in metrics.jsonl only")

    def _work(self) -> None:
        method = ""
        while method != "close":
            method, arguments = self._calls.get()
            try:
                getattr(self._logger, method)(*arguments)
            except Exception as error:  # of a service: the run is worth more than its log
                self._warn(f"{self._name} failed and gets nothing more of this run, which goes on: {_line(error)}")
                return


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
