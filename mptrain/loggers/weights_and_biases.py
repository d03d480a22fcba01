"""Weights & Biases: one run of a project, with the config and a metric `SPLIT/NAME` over "step" for each column of the log."""

import os
from collections.abc import Mapping

import wandb

from mptrain.loggers.base import Logger, RunInfo


class WandbLogger(Logger):
    """Logs to W&B, or with `config.log.wandb_mode="offline"` (or WANDB_MODE) into the run's folder, for `wandb sync`.

    A resumed run goes on in the same W&B run. Its rows are drawn over "step" and not over W&B's own count, which cannot go
    back to the step of a checkpoint.
    """

    def __init__(self, run: RunInfo):
        super().__init__(run)
        self._run = wandb.init(
            project=run.project or (None if "WANDB_PROJECT" in os.environ else run.default_project),
            name=run.name,
            id=run.identity("wandb"),
            resume="allow",
            dir=str(run.folder),
            config=_nested(run.config),
            tags=list(run.tags) or None,
            mode=run.config["log.wandb_mode"] or None,
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.remember("wandb", self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.where = f"offline, in {run.folder / 'wandb'}" if self._run.offline else self._run.url

    def row(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)


def _nested(fields: Mapping[str, object]) -> dict:
    """Returns groups of fields, as W&B shows them, from dotted paths."""
    nested = {}
    for path, value in fields.items():
        *groups, leaf = path.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return nested
