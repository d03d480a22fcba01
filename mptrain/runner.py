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
from mptrain import config_check, devices, exports, keras_compat, loggers, parameter_groups, precision, verify_resume
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.continuous_eval import Follower
from mptrain.errors import InputError, RunError
from mptrain.metrics_log import MetricsLog, NoLog
from mptrain.run_folder import RunFolder
from mptrain.trainer import Trainer
from mptrain.training_run import TrainingRun
from mptrain.workers import Workers

_WRITING = ("train", "train_and_eval")  # the modes that continue a run; the others look at it
_CHOOSING = ("eval", "export")  # the modes that look at one checkpoint
_SHARED_WITHIN = 30.0  # seconds in which a file that the chief has written is seen by all workers


def run(
    config: ConfigDict, workdir: str | os.PathLike, mode: str = "train_and_eval", console: Console | None = None
) -> dict[str, float]:
    """Runs one mode of the run that `config` describes, in the folder `workdir`; goes on where the folder's run stopped.

    Args:
        config: a config made from `mptrain.default_config()`.
        workdir: the run's folder; made if it is not there.
        mode: "train", "eval" (of a checkpoint), "train_and_eval", "continuous_eval", "export", "verify_resume", "numerics" or
            "parity" (see there).
        console: what the user sees of it; default: the terminal.

    Returns:
        The final metrics: those of the last evaluation; in mode "train", of the last loop; in "export", those that were logged
        at its step; in the last three, counts. A run that an action ended early returns them as well.

    Raises:
        InputError: if config, data or folder cannot be used; nothing was written.
        RunError: if the run failed.
        Interrupted: if a signal or `train.time_limit` ended the run; it was saved.
    """
    if mode not in config_lib.MODES:
        raise InputError(f"mode {mode!r} does not exist: write one of {', '.join(config_lib.MODES)}")
    if mode == "sweep":
        raise InputError("mode 'sweep' needs what to try: call mptrain.sweep.mode.sweep(config, search, workdir)")
    config_check.validate(config)
    folder = RunFolder(workdir, read_only=mode in ("eval", "continuous_eval"))
    if config.export.onnx and (mode == "export" or mode in _WRITING and config.export.at_end):
        exports.check_onnx()
    if mode == "verify_resume" and devices.is_multi_worker(config.devices):
        raise InputError("--mode=verify_resume kills and restarts the run on this host: use another devices.strategy for it")
    if mode == "parity" and devices.is_multi_worker(config.devices):
        raise InputError("--mode=parity trains in processes of this host: use another devices.strategy for it")
    if mode == "continuous_eval" and devices.is_multi_worker(config.devices):
        raise InputError("--mode=continuous_eval evaluates in one process: use another devices.strategy for it")
    if mode in _WRITING:
        loggers.classes(config)  # refuses what is not there before anything is built
    if mode == "verify_resume":
        return verify_resume.verify(config, folder.path / "verify_resume", console or Console())
    if mode == "export" and devices.is_multi_worker(config.devices):
        raise InputError("--mode=export needs one process: use another devices.strategy for it")
    folder.changes(config)  # refuses another run's folder before anything is built
    strategy = devices.strategy(config.devices)
    with Workers(strategy).named_in_errors(), folder.named_in_errors():
        return _locked(build_trainer(config, strategy), folder, mode, console)


def _locked(trainer: Trainer, folder: RunFolder, mode: str, console: Console | None) -> dict[str, float]:
    trainer.workers.check_same({"--mode": mode})
    chief, keep = trainer.workers.is_chief, trainer.config.checkpoint
    console = console or Console("" if chief else str(trainer.workers))
    best = f"{keep.best_mode} {keep.best_metric}"
    checkpoints = Checkpoints(folder.checkpoints, trainer.state, keep.keep, keep.keep_best, best, keep.async_save, not chief)
    if mode in ("eval", "export") and chief and not checkpoints.steps():
        raise InputError(f"--mode={mode}: {folder.checkpoints} holds no checkpoint: name the folder of a run in --workdir")
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
    if mode == "continuous_eval":
        console.plan(precision.plan(trainer.model), _notes(trainer, devices.describe(trainer.strategy)))
        return Follower(trainer, folder, checkpoints, console).run()
    begin = _begin if trainer.workers.is_chief else _follow
    log = begin(trainer, folder, checkpoints, console, mode, changes)
    if mode == "numerics":
        from mptrain.numerics import mode as numerics_mode  # brings what draws and renders, which no other mode waits for

        return numerics_mode.numerics(trainer, _builder(trainer.strategy), folder.path / "report", console)
    if mode == "parity":
        from mptrain.numerics.parity import mode as parity_mode

        return parity_mode.parity(trainer, folder.path / "report", console)
    if mode == "export":
        return exports.of_run(trainer, folder, console)
    outputs = TrainingRun(trainer, folder, checkpoints, console, log).run(mode)
    if mode in _WRITING and trainer.config.export.at_end:
        exports.at_end(trainer, folder, checkpoints, console)
    return outputs


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
        step = checkpoints.chosen(f"config.{mode}.checkpoint", trainer.config[mode].checkpoint) if mode in _CHOOSING else None
        with trainer.strategy.scope():
            if step is not None:
                checkpoints.restore(step)
            else:
                step = checkpoints.restore_newest(
                    fallbacks.append, put_aside=mode in _WRITING, restart=trainer.config.checkpoint.restart_if_damaged
                )
    except RunError:
        _tell_fallbacks(fallbacks, 0, console, _log(folder, mode, None))
        raise
    if step is None and mode in ("eval", "export"):
        raise RunError(f"--mode={mode}: no checkpoint in {folder.checkpoints} is whole")
    if step is None and not trainer.config.checkpoint.restart_if_damaged:
        folder.check_nothing_is_lost(trainer.config, changes)
    _agreed_step(trainer, step)
    if step is not None:
        trainer.restore_position(checkpoints.path(step))
    if mode in _WRITING:
        folder.create(trainer.config, trainer.precision.name, hardware, plan)
    log = _log(folder, mode, step)
    if mode in _WRITING:
        log = loggers.start(log, trainer.config, folder.path, step or 0, console)
    if not folder.writable and mode == "eval":
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
    groups = parameter_groups.describe(trainer.config.optimizer.groups, trainer.trainable_variables)
    return [
        f"precision    {trainer.precision.name} ({trainer.precision.reason})",
        f"jit_compile  {trainer.kernels}",
        f"devices      {hardware}",
        f"data         {trainer.training_batches}",
        *(f"group        {line}" for line in groups),
    ]
