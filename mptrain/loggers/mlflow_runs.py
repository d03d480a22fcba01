"""MLflow: one run of an experiment, with the config as parameters and a metric `SPLIT/NAME` for each column of the log."""

import os
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from mptrain.loggers.base import Logger, RunInfo

_AT_ONCE = 100  # parameters that a server takes in one request
_LONGEST = 6000  # characters of a parameter
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowLogger(Logger):
    """Logs to the server or store of `config.log.mlflow_uri`, or else of MLFLOW_TRACKING_URI.

    A resumed run goes on in the same MLflow run, as long as that is there, and rows that it has already are not sent again:
    they are equal to the last bit. Changed fields of the config become tags, since parameters cannot change.
    """

    def __init__(self, run: RunInfo):
        super().__init__(run)
        self._client = MlflowClient(tracking_uri=run.config["log.mlflow_uri"] or None)
        there = self._earlier()
        self._id = self._create() if there is None else there.info.run_id
        if there is not None:
            self._client.update_run(self._id, status="RUNNING")
            self._note_changes(there.data.params)
        self._sent = {split: self._last_step(split) for split in ("train", "eval")}
        self.where = f"experiment {self._experiment_name()}, run {self._id}"

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if step <= self._sent.get(split, -1):
            return
        now = int(time.time() * 1000)
        metrics = [Metric(f"{split}/{name}", float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, _STATUS[status])

    def _earlier(self) -> Run | None:
        known = self.run.identity("mlflow")
        if known is None:
            return None
        try:
            found = self._client.get_run(known)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return found if found.info.lifecycle_stage == "active" else None

    def _create(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment_name())
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment_name())
        pairs = (tag.partition("=") for tag in self.run.tags)
        tags = {key: value or "true" for key, _, value in pairs} | {"mptrain.folder": str(self.run.folder.resolve())}
        created = self._client.create_run(number, tags=tags, run_name=self.run.name).info.run_id
        parameters = [Param(path, _text(value)) for path, value in self.run.config.items()]
        for first in range(0, len(parameters), _AT_ONCE):
            self._client.log_batch(created, params=parameters[first : first + _AT_ONCE])
        self.run.remember("mlflow", created)
        return created

    def _experiment_name(self) -> str:
        return self.run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.run.default_project

    def _note_changes(self, before: Mapping[str, str]) -> None:
        now = {path: _text(value) for path, value in self.run.config.items()}
        changed = {path: value for path, value in now.items() if before.get(path) != value}
        if changed:
            tags = [RunTag(f"changed.{path}", f"{value} from step {self.run.step} on") for path, value in changed.items()]
            self._client.log_batch(self._id, tags=tags)

    def _last_step(self, split: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._id, f"{split}/loss")), default=-1)


def _text(value: object) -> str:
    return str(value)[:_LONGEST]
