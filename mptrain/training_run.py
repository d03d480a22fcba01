"""Trains and evaluates, once all parts of a run are there: the loops between two evaluations, the actions, the end."""

import contextlib
import time

from mptrain import actions
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import EvaluationStopped, InputError, Interrupted, StopRun, reason
from mptrain.loop_length import LoopLength
from mptrain.metrics_log import MetricsLog
from mptrain.numerics.provenance import Provenance
from mptrain.numerics.tensorboard import Histograms
from mptrain.orbit_import import orbit
from mptrain.pictures import WritePictures
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
        self._ending = actions.Ending()

    @property
    def _step(self) -> int:
        return int(self._trainer.global_step.numpy())

    def run(self, mode: str) -> dict[str, float]:
        with contextlib.ExitStack() as told:
            outputs = self._run(mode, told)
        self._close(outputs)
        return outputs

    def _run(self, mode: str, told: contextlib.ExitStack) -> dict[str, float]:
        """Runs a mode; until `told` ends, with all that is to be told of it, signals are the run's: a second one ends it."""
        status, reported = "failed", mode != "eval" and self._trainer.workers.is_chief
        try:
            controller = self._controller(mode)
            if mode == "eval":
                outputs = self._evaluate(controller)
            else:
                told.enter_context(self._signals)
                with self._profile:
                    outputs = self._train(controller, evaluate=mode == "train_and_eval")
            status = "finished"
        except Interrupted as stop:
            status = "stopped"
            self._console.stop_progress()
            self._console.line(f"{stop}; go on with the same command and --workdir={self._folder.path}")
            raise
        except InputError:
            reported = False  # what cannot begin is no run
            raise
        except Exception as error:
            if reported:
                with contextlib.suppress(Exception):  # where it is the log or a device that fails, the error says so
                    self._log.event(self._step, "failed", reason=reason(error))
            raise
        finally:
            self._console.stop_progress()
            try:
                self._checkpoints.wait()
            finally:
                self._log.close(status)
                if reported:
                    self._write_report()
        return outputs

    def _controller(self, mode: str) -> orbit.Controller:
        trainer = self._trainer
        parts = (trainer, self._checkpoints, self._log)
        self._signals = actions.StopOnSignal(*parts, self._console)
        trainer.stop_requested = self._signals.agreed
        if trainer.config.numerics.provenance:
            trainer.investigate = Provenance(trainer, self._console, self._log)
        events = self._folder.events if trainer.workers.is_chief else lambda split: None
        told = [WritePictures(trainer, events("eval")), actions.LogMetrics(trainer, self._log, "eval")]
        after_loop, after_evaluation = [], told
        if mode != "eval":
            self._guard = actions.NanGuard(*parts)
            self._profile = actions.ProfileWindow(trainer, events("train"), self._console, self._log)
            after_loop, after_evaluation = self._after_loop(events), self._after_evaluation(told)
        return orbit.Controller(
            strategy=trainer.strategy,
            trainer=trainer,
            evaluator=trainer,
            global_step=trainer.global_step,
            steps_per_loop=self._steps_to_next_boundary,
            summary_dir=None if mode == "eval" else events("train"),
            eval_summary_dir=events("eval"),
            train_actions=self._ending.holding_back(after_loop),
            eval_actions=self._ending.holding_back(after_evaluation),
        )

    def _after_loop(self, events) -> list[actions.Action]:
        """What follows each loop, in order: what may change or refuse the state comes before it is saved."""
        trainer, config = self._trainer, self._trainer.config
        histograms = []
        if config.numerics.every_steps:
            histograms = [Histograms(trainer, events("train"), config.numerics.every_steps, config.numerics.layers)]
        return [
            actions.LogMetrics(trainer, self._log, "train"),
            actions.ShowProgress(trainer, self._console),
            actions.OverflowGuard(trainer),
            self._guard.after_loop,
            actions.CustomActions(trainer, self._checkpoints, trainer.build_actions()),
            actions.SaveCheckpoint(trainer, self._checkpoints, config.checkpoint.every_steps),
            *histograms,
            self._profile,
            self._loop_length,
            self._signals,
            actions.ArraysForTensorBoard(),
        ]

    def _after_evaluation(self, told: list[actions.Action]) -> list[actions.Action]:
        """What follows each evaluation beside training.

        The row, which ends `told`, says that the best is saved; what comes behind it follows from the rows.
        """
        trainer, config = self._trainer, self._trainer.config
        best = [actions.KeepBest(trainer, self._checkpoints)] if config.checkpoint.keep_best else []
        plateau = [actions.ReduceOnPlateau(trainer, self._log, self._console)] if config.plateau.metric else []
        self._early_stop = actions.EarlyStop(trainer, self._log) if config.early_stop.metric else None
        return [
            *best,
            *told,
            self._guard.after_evaluation,
            *plateau,
            actions.CustomActions(trainer, self._checkpoints, trainer.build_eval_actions()),
            *([self._early_stop] if self._early_stop else []),
            self._signals,
        ]

    def _steps_to_next_boundary(self, step: int) -> int:
        """Loops end at absolute multiples, of the loop and of each interval, wherever a run was resumed.

        Raises:
            StopRun: if an action of the loop before asked for it.
        """
        self._ending.check()
        config = self._trainer.config
        intervals = (self._loop_length.steps, config.checkpoint.every_steps, config.numerics.every_steps)
        distances = [every - int(step) % every for every in intervals if every]
        return min(distances + [distance for distance in [self._profile.to_next_border(int(step))] if distance])

    def _train(self, controller: orbit.Controller, evaluate: bool) -> dict[str, float]:
        total, why = self._trainer.total_steps, ""
        if evaluate and self._step and self._early_stop:
            why = self._early_stop.reason
        if self._step >= total or why:
            done = f"this run is finished: {self._step} of {total} steps are done"
            self._console.line(f"{done}{f', {why}' * bool(why)}{'; evaluating it' * evaluate}")
            if why:
                self._console.line("a higher config.early_stop.patience goes on")
                self._log.event(self._step, "finished", reason=why)
            return self._last_evaluation(controller) if evaluate else self._log.last_loop
        if not evaluate and (names := [name for name in ("early_stop", "plateau") if self._trainer.config[name].metric]):
            self._console.warn(f"--mode=train does not evaluate, so config.{' and config.'.join(names)} cannot act")
        self._console.start_progress(self._step, total)
        try:
            self._train_to(total, controller, evaluate)
        except Interrupted:
            raise
        except StopRun as stop:
            why = str(stop)
        self._guard.check_end()
        self._checkpoints.save(self._step, self._trainer.save_position)
        self._checkpoints.wait()
        self._console.stop_progress()
        if why:
            self._console.line(f"ended at step {self._step} of {total}, saved: {why}")
        self._log.event(self._step, "finished", **({"reason": why} if why else {}))
        return self._last_evaluation(controller) if evaluate else self._trainer.train_loop_end()

    def _train_to(self, total: int, controller: orbit.Controller, evaluate: bool) -> None:
        every = self._trainer.config.eval.every_steps or self._trainer.steps_per_epoch  # which says why nobody knows it
        missing = self._trainer.workers.is_chief and not self._log.has_evaluation(self._step)
        if evaluate and self._step and self._step % every == 0 and self._trainer.workers.largest(missing):
            self._evaluate(controller)  # which the killed process did not come to
        while self._step < total:
            self._ending.check()
            next_evaluation = (self._step // every + 1) * every if evaluate else total
            controller.train(min(next_evaluation, total), checkpoint_at_completion=False)
            self._ending.check()
            if evaluate and self._step % every == 0:
                self._evaluate(controller)
        self._ending.check()

    def _last_evaluation(self, controller: orbit.Controller) -> dict[str, float]:
        """Evaluates a run that has ended already, which only an `Interrupted` can still cut short."""
        outputs = self._evaluate(controller)
        try:
            self._ending.check()
        except Interrupted:
            raise
        except StopRun:
            pass
        return outputs

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

    def _write_report(self) -> None:
        """Writes the page about the run; whatever keeps it from that is told, and is no fault of the run's."""
        try:
            from mptrain.report.page import write_page  # brings what renders pages, which is needed once, at the end

            write_page(self._folder.path)
        except Exception as error:
            self._console.warn(f"{self._folder.path / 'report'} gets no report of this run: {reason(error)}")

    def _close(self, outputs: dict[str, float]) -> None:
        optimizer = self._trainer.optimizer
        self._console.closing(
            {
                **outputs,
                **self._best(),
                "steps": f"{self._step:,} ({int(optimizer.applied_steps):,} applied, {int(optimizer.skipped_steps):,} skipped)",
                "wall time": f"{time.monotonic() - self._start:.1f} s",
                "folder": str(self._folder.path),
            }
        )

    def _best(self) -> dict[str, str]:
        keep = self._trainer.config.checkpoint
        step = self._checkpoints.best() if keep.keep_best else None
        if step is None:
            return {}
        value = self._log.evaluations.get(step, {}).get(keep.best_metric)
        shown = "" if value is None else f" ({keep.best_metric} {value:.4g})"
        return {"best": f"{self._checkpoints.path(step)}{shown}"}
