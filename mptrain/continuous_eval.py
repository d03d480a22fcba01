"""`--mode=continuous_eval`: follows the folder of a run from another process, and evaluates each checkpoint once.

What has been evaluated is what metrics.jsonl says, so a second one goes on where the first stopped. The training process may
remove a checkpoint while it is being read, and may write metrics.jsonl anew when it resumes.
"""

import json
import math
import pathlib
import time

from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import RunError
from mptrain.metrics_log import MetricsLog, NoLog
from mptrain.orbit_import import orbit
from mptrain.pictures import WritePictures
from mptrain.run_folder import RunFolder
from mptrain.trainer import Trainer

_LOOK_EVERY = 0.5  # seconds
_ENDS = ("finished", "failed")  # events after which only a new command goes on; a stopped run is expected back


class LogTail:
    """Reads the rows that come to a metrics.jsonl, from the start again where the file was written anew.

    Attributes:
        evaluated: the steps that an evaluating process has evaluated.
        ended: whether the last that is known of the run is that it has finished or failed.

    Args:
        path: the file; need not be there yet.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._file, self._offset = None, 0
        self.evaluated = set()
        self.ended = False

    def read(self) -> bool:
        """Reads what has come; returns whether anything has."""
        if not self._path.exists():
            return False
        with open(self._path, "rb") as file:
            stat = self._path.stat()
            if stat.st_ino != self._file or stat.st_size < self._offset:
                self._forget()
                self._file = stat.st_ino
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._note(line)
        return bool(whole)

    def _note(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            if row.get("split") == "eval" and "mode" in row:
                self.evaluated.add(row["step"])
            elif row.get("split") == "train" or row.get("event") in ("resume", *_ENDS):
                self.ended = row.get("event") in _ENDS
        except (ValueError, AttributeError, KeyError):
            return  # what a kill has cut short


class Follower:
    """Evaluates each checkpoint of a run: in order, and the newest first where more than one waits and the run goes on.

    Args:
        trainer: evaluates.
        folder: the run's; need not be there yet.
        checkpoints: the run's.
        console: gets a line for each evaluation.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder, checkpoints: Checkpoints, console: Console):
        self._trainer = trainer
        self._folder = folder
        self._checkpoints = checkpoints
        self._console = console
        self._tail = LogTail(folder.metrics_file)
        self._seen = set()  # (step, inode) of checkpoints that this process has done with
        self._news = time.monotonic()
        self._steps = []
        self._controller = None
        self._newest, self._outputs, self._count = -1, {}, 0

    def run(self) -> dict[str, float]:
        """Returns the metrics of the newest checkpoint that was evaluated, when the run has ended; none if none was left to do.

        Raises:
            InputError: if the folder turns out to hold another run.
            RunError: if no checkpoint came within `eval.timeout` seconds.
        """
        if not self._checkpoints.steps():
            self._console.line(f"waiting for the first checkpoint in {self._folder.path}")
        while True:
            ended = self._look()  # before the checkpoints are listed, of which none comes after that
            waiting = self._waiting()
            if waiting:
                self._evaluate(waiting[-1] if len(waiting) > 1 and not ended else waiting[0])
            elif ended:
                self._console.line(f"the run has ended; {self._count} of its checkpoints were evaluated here")
                return self._outputs
            elif time.monotonic() - self._news > (self._trainer.config.eval.timeout or math.inf):
                return self._give_up()
            else:
                time.sleep(_LOOK_EVERY)

    def _look(self) -> bool:
        """Returns whether the run has ended; takes note of whether there is news of it."""
        steps = self._checkpoints.steps()
        if self._tail.read() or steps != self._steps:
            self._news, self._steps = time.monotonic(), steps
        return self._tail.ended or bool(steps) and steps[-1] >= self._trainer.total_steps

    def _waiting(self) -> list[int]:
        steps = (step for step in self._checkpoints.steps() if step not in self._tail.evaluated)
        return [step for step in steps if (step, self._inode(step)) not in self._seen]

    def _inode(self, step: int) -> int | None:
        """Returns what tells a checkpoint from one that is saved again in its place, by a run that had to go back."""
        try:
            return self._checkpoints.path(step).stat().st_ino
        except FileNotFoundError:
            return None

    def _evaluate(self, step: int) -> None:
        inode, start = self._inode(step), time.monotonic()
        self._begin()
        with self._trainer.strategy.scope():
            whole = self._checkpoints.restore_if_there(step, self._console.warn)
        self._seen.add((step, inode))
        if not whole:
            return
        outputs = self._controller.evaluate(steps=self._trainer.eval_steps)
        outputs.pop("steps_per_second", None)
        log = MetricsLog(self._folder.metrics_file, last_step=math.inf) if self._folder.writable else NoLog()
        log.row(step, "eval", outputs)
        log.close()  # a training process that resumes writes the file anew
        self._console.evaluation(step, outputs, time.monotonic() - start)
        self._news, self._count = time.monotonic(), self._count + 1
        if step > self._newest:
            self._newest, self._outputs = step, outputs

    def _begin(self) -> None:
        """Before the first evaluation: nothing is written into a folder before its run has begun there."""
        if self._controller is not None:
            return
        self._folder.changes(self._trainer.config)
        self._folder.check_precision(self._trainer.precision.name)
        self._controller = orbit.Controller(
            strategy=self._trainer.strategy,
            evaluator=self._trainer,
            global_step=self._trainer.global_step,
            eval_summary_dir=self._folder.events("eval"),
            eval_actions=[WritePictures(self._trainer, self._folder.events("eval"))],
        )

    def _give_up(self) -> dict[str, float]:
        seconds = self._trainer.config.eval.timeout
        if not self._steps:
            raise RunError(f"no checkpoint came to {self._folder.checkpoints} within {seconds:g} s (config.eval.timeout)")
        self._console.warn(
            f"no news of the run for {seconds:g} s (config.eval.timeout), though it has not finished: no longer waiting"
        )
        return self._outputs
