"""Builds the parts of a run from its config and runs one mode."""

import math
import os
import time
import traceback
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import devices, keras_compat, precision, verify_resume
from mptrain.actions import KeepBest, LogMetrics, OverflowGuard, SaveCheckpoint, ShowProgress, StopOnSignal
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import EvaluationStopped, InputError, RunError, StopRun
from mptrain.metrics_log import MetricsLog, NoLog
from mptrain.numerics import mode as numerics_mode
from mptrain.numerics.parity import mode as parity_mode
from mptrain.numerics.provenance import Provenance
from mptrain.numerics.tensorboard import Histograms
from mptrain.orbit_import import orbit
from mptrain.run_folder import RunFolder
from mptrain.trainer import Trainer
from mptrain.workers import Workers

_WRITING = ("train", "train_and_eval")  # the modes that continue a run; the others look at it
_SHARED_WITHIN = 30.0  # seconds in which a file that the chief has written is seen by all workers


def run(config: ConfigDict, workdir: str | os.PathLike, mode: str = "train_and_eval") -> dict[str, float]:
    """Runs one mode of the run that `config` describes, in the folder `workdir`; goes on where the folder's run stopped.

    Args:
        config: a config made from `mptrain.default_config()`.
        workdir: the run's folder; made if it is not there.
        mode: "train", "eval" (of the newest checkpoint), "train_and_eval", "verify_resume", "numerics" or "parity" (see
            there).

    Returns:
        The final metrics: those of the last evaluation; in mode "train", of the last loop; in the last three, counts.

    Raises:
        InputError: if config, data or folder cannot be used; nothing was written.
        RunError: if the run failed.
        StopRun: if a signal ended the run; it was saved.
    """
    if mode not in config_lib.MODES:
        raise InputError(f"mode {mode!r} does not exist: write one of {', '.join(config_lib.MODES)}")
    config_lib.validate(config)
    folder = RunFolder(workdir, read_only=mode == "eval")
    if mode == "verify_resume" and devices.is_multi_worker(config.devices):
        raise InputError("--mode=verify_resume kills and restarts the run on this host: use another devices.strategy for it")
    if mode == "parity" and devices.is_multi_worker(config.devices):
        raise InputError("--mode=parity trains in processes of this host: use another devices.strategy for it")
    if mode == "verify_resume":
        return verify_resume.verify(config, folder.path / "verify_resume", Console())
    folder.changes(config)  # refuses another run's folder before anything is built
    strategy = devices.strategy(config.devices)
    with Workers(strategy).named_in_errors(), folder.named_in_errors():
        return _locked(build_trainer(config, strategy), folder, mode)


def _locked(trainer: Trainer, folder: RunFolder, mode: str) -> dict[str, float]:
    trainer.workers.check_same({"--mode": mode})
    chief, keep = trainer.workers.is_chief, trainer.config.checkpoint
    console = Console("" if chief else str(trainer.workers))
    best = f"{keep.best_mode} {keep.best_metric}"
    checkpoints = Checkpoints(folder.checkpoints, trainer.state, keep.keep, keep.keep_best, best, keep.async_save, not chief)
    if mode == "eval" and chief and not checkpoints.steps():
        raise InputError(f"--mode=eval: {folder.checkpoints} holds no checkpoint: name the folder of a run in --workdir")
    if mode not in _WRITING or not chief:
        return _run_mode(trainer, folder, checkpoints, console, mode)
    folder.lock()
    try:
        return _run_mode(trainer, folder, checkpoints, console, mode)
    finally:
        folder.unlock()


def _run_mode(trainer, folder, checkpoints, console, mode) -> dict[str, float]:
    if mode in _WRITING:
        _check_shared(folder, trainer.workers)
    changes = folder.changes(trainer.config)  # once more, under the lock: another process may have begun a run meanwhile
    folder.check_precision(trainer.precision.name)
    begin = _begin if trainer.workers.is_chief else _follow
    log = begin(trainer, folder, checkpoints, console, mode, changes)
    if mode == "numerics":
        return numerics_mode.numerics(trainer, _builder(trainer.strategy), folder.path / "report", console)
    if mode == "parity":
        return parity_mode.parity(trainer, folder.path / "report", console)
    return _Run(trainer, folder, checkpoints, console, log).run(mode)


def _check_shared(folder: RunFolder, workers: Workers) -> None:
    """Checks that all workers see the file by which the chief has locked the folder; a file server may take a while.

    Raises:
        InputError: on every worker, if one does not.
    """
    mark = workers.largest(folder.mark() if workers.is_chief else 0)
    deadline = time.monotonic() + _SHARED_WITHIN
    while folder.mark() != mark and time.monotonic() < deadline:
        time.sleep(0.2)
    if (elsewhere := np.flatnonzero(workers.gather(folder.mark() != mark)[:, 0])).size:
        raise InputError(
            f"--workdir={folder.path} is not the chief's folder on worker {elsewhere[0]}: name one on a file system that all"
            " workers share"
        )


def _follow(trainer, folder, checkpoints, console, mode, changes) -> NoLog:
    """Brings a worker that is not the chief to the chief's step."""
    console.warn("ready; the chief prints and writes")
    step = _agreed_step(trainer, None)
    if step is not None:
        with trainer.strategy.scope():
            checkpoints.restore(step)
        trainer.restore_position(checkpoints.path(step))
    return NoLog()


def _begin(trainer, folder, checkpoints, console, mode, changes) -> MetricsLog | NoLog:
    """Prints the plan, restores the newest checkpoint and writes the folder's first files, or what a resume adds to them."""
    hardware = devices.describe(trainer.strategy)
    plan = console.plan(precision.plan(trainer.model), _notes(trainer, hardware))
    for warning in trainer.precision_warnings:
        console.warn(warning)
        plan += f"warning      {warning}\n"
    fallbacks = []
    try:
        with trainer.strategy.scope():
            step = checkpoints.restore_newest(
                fallbacks.append, put_aside=mode in _WRITING, restart=trainer.config.checkpoint.restart_if_damaged
            )
    except RunError:
        _tell_fallbacks(fallbacks, 0, console, _log(folder, mode, None))
        raise
    if step is None and mode == "eval":
        raise RunError(f"--mode=eval: no checkpoint in {folder.checkpoints} is whole")
    if step is None and not trainer.config.checkpoint.restart_if_damaged:
        folder.check_nothing_is_lost(trainer.config, changes)
    _agreed_step(trainer, step)
    if step is not None:
        trainer.restore_position(checkpoints.path(step))
    if mode in _WRITING:
        folder.create(trainer.config, trainer.precision.name, hardware, plan)
    log = _log(folder, mode, step)
    if not folder.writable:
        console.warn(f"{folder.path} cannot be written to: the evaluation is printed and not logged")
    _tell_fallbacks(fallbacks, step or 0, console, log)
    for path, (before, now) in changes.items():
        console.line(f"config.{path} was {before!r} and is {now!r} from here on")
    if step is not None:
        console.line(f"restored step {step} of {trainer.total_steps} from {folder.path}")
        log.event(
            step,
            "resume",
            data=str(trainer.training_batches),
            changes={path: list(pair) for path, pair in changes.items()},
        )
    return log


def _log(folder: RunFolder, mode: str, step: int | None) -> MetricsLog | NoLog:
    if mode in _WRITING:
        return MetricsLog(folder.metrics_file, last_step=step or 0)
    return MetricsLog(folder.metrics_file, last_step=math.inf) if mode == "eval" and folder.writable else NoLog()


def _builder(strategy: tf.distribute.Strategy) -> Callable[[ConfigDict], Trainer]:
    return lambda config: build_trainer(config, strategy)


def _agreed_step(trainer: Trainer, restored: int | None) -> int | None:
    """Returns the step that the chief restored, which every worker restores too; None: the run begins."""
    step = int(trainer.workers.largest(-1 if restored is None else restored))
    return None if step < 0 else step


def _tell_fallbacks(messages: list[str], step: int, console: Console, log: MetricsLog) -> None:
    for message in messages:
        console.warn(message)
        log.event(step, "fallback", reason=message)


def build_trainer(config: ConfigDict, strategy: tf.distribute.Strategy | None = None) -> Trainer:
    """Returns an instance of the class that `config.trainer` names, on `strategy` or the one that the config asks for.

    Raises:
        InputError: if it cannot be imported or is no Trainer.
    """
    try:
        trainer_class = keras_compat.import_class(config.trainer)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"config.trainer is {config.trainer!r}: {error}; write module path and class, and start where the module can be"
            " imported"
        ) from error
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise InputError(f"config.trainer is {config.trainer!r}: it is not a subclass of mptrain.Trainer")
    try:
        return trainer_class(config, strategy)
    except AttributeError as error:
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        name = str(error).splitlines()[0].strip("'\"")
        raise InputError(
            f"{config.trainer} reads the config field {name!r}, which is not there: set it in config.model"
        ) from error


def _notes(trainer: Trainer, hardware: str) -> list[str]:
    return [
        f"precision    {trainer.precision.name} ({trainer.precision.reason})",
        f"jit_compile  {trainer.kernels}",
        f"devices      {hardware}",
        f"data         {trainer.training_batches}",
    ]


class _Run:
    """One mode of a run, once all its parts are there."""

    def __init__(self, trainer: Trainer, folder: RunFolder, checkpoints: Checkpoints, console: Console, log: MetricsLog):
        self._trainer = trainer
        self._folder = folder
        self._checkpoints = checkpoints
        self._console = console
        self._log = log
        self._start = time.monotonic()
        self._evaluated = {}  # step -> outputs

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
                signals,
            ],
            eval_actions=[*best, LogMetrics(trainer, self._log, "eval"), signals],  # the row says that all of it is done
        )
        return controller, signals

    def _steps_to_next_boundary(self, step: int) -> int:
        """Loops end at absolute multiples, of the loop and of each interval, wherever a run was resumed."""
        config = self._trainer.config
        window = config.optimizer.accumulation_steps
        loop = math.ceil(config.train.steps_per_loop / window) * window
        intervals = (loop, config.checkpoint.every_steps, config.numerics.every_steps)
        return min(every - int(step) % every for every in intervals if every)

    def _train(self, controller: orbit.Controller, evaluate: bool) -> dict[str, float]:
        total = self._trainer.total_steps
        window = self._trainer.config.optimizer.accumulation_steps  # an evaluation may save, which no window survives
        every = self._trainer.config.eval.every_steps or math.ceil(self._trainer.steps_per_epoch / window) * window
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
