"""Builds the parts of a run from its config and runs one mode: train, eval, or train_and_eval."""

import math
import os
import time
import traceback

from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import devices, keras_compat, precision
from mptrain.actions import LogMetrics, OverflowGuard, SaveCheckpoint, ShowProgress, StopOnSignal
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import InputError, StopRun
from mptrain.metrics_log import MetricsLog
from mptrain.orbit_import import orbit
from mptrain.run_folder import RunFolder
from mptrain.trainer import Trainer

MODES = ("train", "eval", "train_and_eval")


def run(config: ConfigDict, workdir: str | os.PathLike, mode: str = "train_and_eval") -> dict[str, float]:
    """Runs one mode of the run that `config` describes, in the folder `workdir`; goes on where the folder's run stopped.

    Args:
        config: a config made from `mptrain.default_config()`.
        workdir: the run's folder; made if it is not there.
        mode: "train", "eval" (of the newest checkpoint) or "train_and_eval".

    Returns:
        The final metrics: those of the last evaluation; in mode "train", of the last loop.

    Raises:
        InputError: if config, data or folder cannot be used; nothing was written.
        RunError: if the run failed.
        StopRun: if a signal ended the run; it was saved.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} does not exist: write one of {', '.join(MODES)}")
    config_lib.validate(config)
    folder = RunFolder(workdir)
    changes = folder.changes(config)
    console = Console()
    trainer = build_trainer(config)
    folder.check_precision(trainer.precision.name)
    checkpoints = Checkpoints(folder.checkpoints, trainer.state, config.checkpoint.keep)
    if mode == "eval" and not checkpoints.steps():
        raise InputError(f"--mode=eval: {folder.checkpoints} holds no checkpoint: name the folder of a run in --workdir")
    if mode == "eval":
        return _run_mode(trainer, folder, checkpoints, console, mode, changes)
    folder.lock()
    try:
        return _run_mode(trainer, folder, checkpoints, console, mode, changes)
    finally:
        folder.unlock()


def _run_mode(trainer, folder, checkpoints, console, mode, changes) -> dict[str, float]:
    hardware = devices.describe(trainer.strategy)
    plan = console.plan(precision.plan(trainer.model), _notes(trainer, hardware))
    for warning in trainer.precision_warnings:
        console.warn(warning)
    fallbacks = []
    with trainer.strategy.scope():
        step = checkpoints.restore_newest(fallbacks.append)
    if mode != "eval":
        folder.create(trainer.config, trainer.precision.name, hardware, plan)
    log = MetricsLog(folder.metrics_file, last_step=math.inf if mode == "eval" else step or 0)
    for message in fallbacks:
        console.warn(message)
        log.event(step or 0, "fallback", reason=message)
    for path, (before, now) in changes.items():
        console.line(f"config.{path} was {before!r} and is {now!r} from here on")
    if step is not None:
        console.line(f"restored step {step} of {trainer.total_steps} from {folder.path}")
        log.event(step, "resume", changes={path: list(pair) for path, pair in changes.items()})
    return _Run(trainer, folder, checkpoints, console, log).run(mode)


def build_trainer(config: ConfigDict) -> Trainer:
    """Returns an instance of the class that `config.trainer` names.

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
        return trainer_class(config)
    except AttributeError as error:
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        name = str(error).splitlines()[0].strip("'\"")
        raise InputError(
            f"{config.trainer} reads the config field {name!r}, which is not there: set it in config.model"
        ) from error


def _notes(trainer: Trainer, hardware: str) -> list[str]:
    return [
        f"precision  {trainer.precision.name} ({trainer.precision.reason})",
        f"kernels    {trainer.kernels.reason}",
        f"devices    {hardware}",
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
            controller, signals = self._controller()
            if mode == "eval":
                outputs = self._evaluate(controller)
            else:
                with signals:
                    outputs = self._train(controller, evaluate=mode == "train_and_eval")
        except StopRun as stop:
            self._console.stop_progress()
            self._console.line(f"{stop}; go on with the same command and --workdir={self._folder.path}")
            raise
        finally:
            self._console.stop_progress()
            self._log.close()
        self._close(outputs)
        return outputs

    def _controller(self) -> tuple[orbit.Controller, StopOnSignal]:
        trainer, config = self._trainer, self._trainer.config
        signals = StopOnSignal(trainer, self._checkpoints, self._log, self._console)
        controller = orbit.Controller(
            strategy=trainer.strategy,
            trainer=trainer,
            evaluator=trainer,
            global_step=trainer.global_step,
            steps_per_loop=self._steps_to_next_boundary,
            summary_dir=str(self._folder.path / "train"),
            eval_summary_dir=str(self._folder.path / "eval"),
            train_actions=[
                LogMetrics(trainer, self._log, "train"),
                ShowProgress(trainer, self._console),
                OverflowGuard(trainer),
                SaveCheckpoint(trainer, self._checkpoints, config.checkpoint.every_steps),
                signals,
            ],
            eval_actions=[LogMetrics(trainer, self._log, "eval"), signals],
        )
        return controller, signals

    def _steps_to_next_boundary(self, step: int) -> int:
        """Loops end at absolute multiples, of the loop and of the checkpoint interval, wherever a run was resumed."""
        config = self._trainer.config
        window = config.optimizer.accumulation_steps
        loop = math.ceil(config.train.steps_per_loop / window) * window
        return min(every - int(step) % every for every in (loop, config.checkpoint.every_steps))

    def _train(self, controller: orbit.Controller, evaluate: bool) -> dict[str, float]:
        total = self._trainer.total_steps
        every = self._trainer.config.eval.every_steps or self._trainer.steps_per_epoch
        if self._step >= total:
            self._console.line(f"this run is finished: {self._step} of {total} steps are done; evaluating it")
            return self._evaluate(controller)
        self._console.start_progress(self._step, total)
        while self._step < total:
            next_evaluation = (self._step // every + 1) * every if evaluate else total
            controller.train(min(next_evaluation, total), checkpoint_at_completion=False)
            if evaluate and self._step % every == 0:
                self._evaluate(controller)
        self._checkpoints.save(self._step)
        self._console.stop_progress()
        self._log.event(self._step, "finished")
        return self._evaluate(controller) if evaluate else self._trainer.train_loop_end()

    def _evaluate(self, controller: orbit.Controller) -> dict[str, float]:
        if self._step not in self._evaluated:
            start = time.monotonic()
            outputs = controller.evaluate(steps=self._trainer.eval_steps)
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
