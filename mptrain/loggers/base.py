"""The interface of a logger, and what it is told of the run."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

_FILE = "loggers.json"


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a logger is told when a run begins or goes on.

    Attributes:
        folder: the run's folder.
        name: of the run: `config.log.name`, or the folder's.
        project: `config.log.project`; "" where the service's own environment variable or `default_project` decides.
        default_project: the name of the Trainer's module.
        tags: `config.log.tags`.
        config: every field of the config, by its dotted path.
        step: the step that the run goes on from; 0: it begins.
    """

    folder: pathlib.Path
    name: str
    project: str
    default_project: str
    tags: tuple[str, ...]
    config: Mapping[str, object]
    step: int

    def identity(self, service: str) -> str | None:
        """Returns what `remember` noted for a service, by an earlier process too; None where it noted nothing."""
        return self._identities().get(service)

    def remember(self, service: str, identity: str) -> None:
        """Notes in the run's folder by which name a service knows the run, so that a resumed run goes on there."""
        temporary = self.folder / f".{_FILE}.writing"
        temporary.write_text(json.dumps({**self._identities(), service: identity}, indent=1) + "\n")
        temporary.replace(self.folder / _FILE)

    def _identities(self) -> dict[str, str]:
        path = self.folder / _FILE
        return json.loads(path.read_text()) if path.exists() else {}


class Logger:
    """Override what the service needs. Each method is called in the background, in order; `__init__` before training starts.

    What `__init__` raises ends the run before its first step. What the others raise is one warning, and the end of this logger.

    Attributes:
        where: one line that says where the run can be seen; "": nothing is printed.

    Args:
        run: what there is to know about the run.
    """

    where = ""

    def __init__(self, run: RunInfo):
        self.run = run

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Takes the metrics of a loop ("train") or an evaluation ("eval"); a value may be NaN or inf."""

    def event(self, step: int, event: str, details: Mapping[str, object]) -> None:
        """Takes an event: "resume", "overflow", "plateau", "finished" and others, as metrics.jsonl has them."""

    def close(self, status: str) -> None:
        """Called last: the run has "finished", was "stopped" to be gone on with, or "failed"."""
