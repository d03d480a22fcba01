"""Loggers of a user's own, as config.log.loggers names them."""

import json

from mptrain import Logger


class FileLogger(Logger):
    """Writes each call into a file in the run's folder."""

    where = "calls.jsonl"

    def row(self, step, split, values):
        self._write("row", step, split, values["loss"])

    def event(self, step, event, details):
        self._write("event", step, event, details)

    def close(self, status):
        self._write("close", status)

    def _write(self, *call):
        with open(self.run.folder / "calls.jsonl", "a") as file:
            file.write(json.dumps(call) + "\n")


class AwayLogger(FileLogger):
    """Its server goes away behind the second row."""

    rows = 0

    def row(self, step, split, values):
        super().row(step, split, values)
        self.rows += 1
        if self.rows == 2:
            raise ConnectionError("no route to host\nand much more")


class NeverLogger(Logger):
    def __init__(self, run):
        raise PermissionError("not logged in")
