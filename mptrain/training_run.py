"""Trains and evaluates, once all parts of a run are there: the loops between two evaluations, the actions, the end."""

import math
import time

from mptrain.actions import KeepBest, LogMetrics, OverflowGuard, SaveCheckpoint, ShowProgress, StopOnSignal
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import EvaluationStopped, StopRun
from mptrain.loop_length import LoopLength
from mptrain.metrics_log import MetricsLog
from mptrain.numerics.provenance import Provenance
from mptrain.numerics.tensorboard import Histograms
from mptrain.orbit_import import orbit
from mptrain.run_folder import RunFolder
from mptrain.trainer import Trainer


class TrainingRun:
    """One mode of a run, once all its parts are there."""

    def __init__(self, trainer: Trainer, folder: RunFolder, checkpoints: Checkpoints, console: Console, log: MetricsLog):
        self._trainer = trainer
        self._folder = folder
        self._checkpoints = checkpoints
        self._console = console
        self._log = log
        self._start = time.monotonic()
        self._evaluated = {}  # step -> outputs
        self._loop_length = LoopLength(trainer)

    @property
    def _step(self) -> int:
        return int(self._trainer.global_step.numpy())

    def run(self, mode: str) -> dict[str, float]:
        try:
            controller, signals = self._controller(mode)
            if mode == "eval":
                outputs = self._evaluate(controller)
            else:
                with signals:
                    outputs = self._train(controller, evaluate=mode == "train_and_eval")
        except StopRun as stop:
            controller.summary_manager.flush()
            self._console.stop_progress()
            self._console.line(f"{stop}; go on with the same command and --workdir={self._folder.path}")
            raise
        finally:
            self._console.stop_progress()
            self._checkpoints.wait()
            self._log.close()
        self._close(outputs)
        return outputs

    def _controller(self, mode: str) -> tuple[orbit.Controller, StopOnSignal]:
        trainer, config = self._trainer, self._trainer.config
        self._signals = signals = StopOnSignal(trainer, self._checkpoints, self._log, self._console)
        trainer.stop_requested = signals.agreed
        if config.numerics.provenance:
            trainer.investigate = Provenance(trainer, self._console, self._log)
        best = [KeepBest(trainer, self._checkpoints)] if config.checkpoint.keep_best and mode != "eval" else []
        events = self._folder.events if trainer.workers.is_chief else lambda split: None
        histograms = []
        if config.numerics.every_steps and mode != "eval":
            histograms = [Histograms(trainer, events("train"), config.numerics.every_steps, config.numerics.layers)]
        controller = orbit.Controller(
            strategy=trainer.strategy,
            trainer=trainer,
            evaluator=trainer,
            global_step=trainer.global_step,
            steps_per_loop=self._steps_to_next_boundary,
            summary_dir=None if mode == "eval" else events("train"),
            eval_summary_dir=events("eval"),
            train_actions=[
                LogMetrics(trainer, self._log, "train"),
                ShowProgress(trainer, self._console),
                OverflowGuard(trainer),
                SaveCheckpoint(trainer, self._checkpoints, config.checkpoint.every_steps),
                *histograms,
                self._loop_length,
                signals,
            ],
            eval_actions=[*best, LogMetrics(trainer, self._log, "eval"), signals],  # the row says that all of it is done
        )
        return controller, signals

    def _steps_to_next_boundary(self, step: int) -> int:
        """Loops end at absolute multiples, of the loop and of each interval, wherever a run was resumed."""
        config = self._trainer.config
        intervals = (self._loop_length.steps, config.checkpoint.every_steps, config.numerics.every_steps)
        return min(every - int(step) % every for every in intervals if every)

    def _train(self, controller: orbit.Controller, evaluate: bool) -> dict[str, float]:
        total = self._trainer.total_steps
        every = self._trainer.config.eval.every_steps or self._trainer.steps_per_epoch  # which says why nobody knows it
        if self._step >= total:
            self._console.line(f"this run is finished: {self._step} of {total} steps are done{'; evaluating it' * evaluate}")
            return self._evaluate(controller) if evaluate else self._log.last_loop
        self._console.start_progress(self._step, total)
        missing = self._trainer.workers.is_chief and not self._log.has_evaluation(self._step)
        if evaluate and self._step and self._step % every == 0 and self._trainer.workers.largest(missing):
            self._evaluate(controller)  # which the killed process did not come to
        while self._step < total:
            next_evaluation = (self._step // every + 1) * every if evaluate else total
            controller.train(min(next_evaluation, total), checkpoint_at_completion=False)
            if evaluate and self._step % every == 0:
                self._evaluate(controller)
        self._checkpoints.save(self._step, self._trainer.save_position)
        self._checkpoints.wait()
        self._console.stop_progress()
        self._log.event(self._step, "finished")
        return self._evaluate(controller) if evaluate else self._trainer.train_loop_end()

    def _evaluate(self, controller: orbit.Controller) -> dict[str, float]:
        if self._step not in self._evaluated:
            start = time.monotonic()
            try:
                outputs = controller.evaluate(steps=self._trainer.eval_steps)
            except EvaluationStopped:
                self._signals({})  # saves, and ends the run; the next process evaluates this step again
            outputs.pop("steps_per_second", None)
            self._evaluated[self._step] = outputs
            self._console.evaluation(self._step, outputs, time.monotonic() - start)
        return self._evaluated[self._step]

    def _close(self, outputs: dict[str, float]) -> None:
        optimizer = self._trainer.optimizer
        self._console.closing(
            {
                **outputs,
                "steps": f"{self._step:,} ({int(optimizer.applied_steps):,} applied, {int(optimizer.skipped_steps):,} skipped)",
                "wall time": f"{time.monotonic() - self._start:.1f} s",
                "folder": str(self._folder.path),
            }
        )
