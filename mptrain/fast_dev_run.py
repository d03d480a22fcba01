"""`--fast_dev_run`: two steps of everything that a run does, with the user's own config and data, and nothing left behind.

Two runs in a temporary folder: the first trains, saves and evaluates, the second goes on from there and exports. What was done
is read from what lies in the folder, so a part counts only once its result is there.
"""

import contextlib
import gc
import json
import pathlib
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping

import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import config_check, devices, durations, loggers, runner, serving
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import InputError, Interrupted, RunError, one_line
from mptrain.run_folder import RunFolder

_EVALUATED = 2  # batches


def fast_dev_run(config: ConfigDict, console: Console | None = None) -> None:
    """Tries every part of the run that `config` describes, and prints which of them worked.

    Args:
        config: the run's; its length and its intervals are replaced.
        console: gets the list.

    Raises:
        InputError: if the config cannot be tried; nothing was.
        RunError: if a part failed with an error that is meant to be read; others are raised as they are.
        Interrupted: if a signal ended it.
    """
    config_check.validate(config)
    if devices.is_multi_worker(config.devices):
        raise InputError("--fast_dev_run tries a run in one process: use another devices.strategy for it")
    loggers.classes(config)  # refuses what is not there; none is told of this run
    console, quiet, window = console or Console(), Console(quiet=True), config.optimizer.accumulation_steps
    with _temporary_folder() as path:
        folder = RunFolder(path / "run")
        try:
            _run(_shortened(config, window), folder, quiet)
            _run(_shortened(config, 2 * window), folder, quiet)
        except Interrupted:
            raise
        except (InputError, RunError) as error:
            failed = _tell(folder, window, console, one_line(error))
            raise RunError(f"--fast_dev_run: {failed} failed: {one_line(error)}") from error
        except Exception as error:
            _tell(folder, window, console, type(error).__name__)
            raise
        if failed := _tell(folder, window, console, "left nothing behind"):
            raise RunError(f"--fast_dev_run: {failed} failed: the run ended without it")


def _shortened(config: ConfigDict, steps: int) -> ConfigDict:
    """Returns the config of a run of so many steps that does all it can at the end of each accumulation window."""
    config, window = config_lib.copied(config), config.optimizer.accumulation_steps
    lengths = {"train.steps": steps, "eval.every_steps": window, "checkpoint.every_steps": window}
    if config.numerics.every_steps or config.numerics.every_epochs:
        lengths["numerics.every_steps"] = window
    for path, length in lengths.items():
        config_lib.set_field(config, path, length)
        durations.prefer(config, path)
    config.train.steps_per_loop, config.train.time_limit, config.eval.steps = window, 0, _EVALUATED
    config.export.at_end, config.export.checkpoint = steps > window, "newest"
    config.log.loggers = ()  # a service would keep what it is told
    return config


def _run(config: ConfigDict, folder: RunFolder, console: Console) -> None:
    try:
        runner.run(config, folder.path, console=console)
    except Interrupted as stop:
        if stop.exit_status:  # else an action ended the run in good order
            raise
    gc.collect()  # the model of this run, before the next one takes as much memory


def _tell(folder: RunFolder, window: int, console: Console, reason: str) -> str | None:
    """Prints what was tried; returns the part that failed, the first one without a result, or None."""
    console.line(f"fast_dev_run: {2 * window} steps in a temporary folder")
    failed = None
    for name, result in _PARTS.items():
        try:
            found = None if failed else result(folder, window)
        except (OSError, LookupError, ValueError, tf.errors.OpError) as error:
            found, reason = None, one_line(error).splitlines()[0]
        state, told = ("ok", found) if found is not None else ("not tried", "") if failed else ("failed", reason)
        console.line(f"  {name:10}{state:11}{told}".rstrip())
        failed = failed or (name if found is None else None)
    return failed


def _built(folder: RunFolder, window: int) -> str | None:
    if not folder.config_file.exists():
        return None
    content = json.loads(folder.config_file.read_text())
    return f"{content['precision']}; {content['devices']}"


def _trained(folder: RunFolder, window: int) -> str | None:
    return _row(folder, step=window, split="train")


def _saved(folder: RunFolder, window: int) -> str | None:
    steps = Checkpoints(folder.checkpoints, {}, keep=1).steps()
    return f"step {steps[0]}" if steps else None


def _evaluated(folder: RunFolder, window: int) -> str | None:
    return _row(folder, step=window, split="eval")


def _restored(folder: RunFolder, window: int) -> str | None:
    return _row(folder, step=window, event="resume")


def _went_on(folder: RunFolder, window: int) -> str | None:
    return _row(folder, step=2 * window, split="train") and _row(folder, step=2 * window, split="eval")


def _exported(folder: RunFolder, window: int) -> str | None:
    export = folder.exports / str(2 * window)
    if not export.exists():
        return None
    signature = json.loads((export / "metadata.json").read_text())["signature"]
    serve = tf.saved_model.load(str(export)).signatures[serving.SIGNATURE]
    _, specs = serve.structured_input_signature
    serve(**{key: tf.zeros([size or 1 for size in spec.shape], spec.dtype) for key, spec in specs.items()})
    return "; ".join(f"{key} {spec}" for kind in ("inputs", "outputs") for key, spec in signature[kind].items())


_PARTS: Mapping[str, Callable[[RunFolder, int], str | None]] = {
    "build": _built,
    "train": _trained,
    "save": _saved,
    "evaluate": _evaluated,
    "restore": _restored,
    "go on": _went_on,
    "export": _exported,
}


def _row(folder: RunFolder, **wanted) -> str | None:
    """Returns what is worth telling of the row of metrics.jsonl that holds the wanted values; None where there is none."""
    lines = folder.metrics_file.read_text().splitlines() if folder.metrics_file.exists() else []
    rows = [row for row in map(json.loads, lines) if wanted.items() <= row.items()]
    if not rows:
        return None
    shown = {name: value for name, value in rows[-1].items() if name in ("loss", "loss_scale")}
    return "  ".join([f"step {rows[-1]['step']}", *(f"{name} {value:g}" for name, value in shown.items() if value is not None)])


@contextlib.contextmanager
def _temporary_folder() -> Iterator[pathlib.Path]:
    """Yields a folder that is gone at the end, however this process ends: another one, deaf to Ctrl-C, waits for that.

    Other temporary files go there too, for TensorFlow leaves its own where a process is ended by a signal.
    """
    folder = pathlib.Path(tempfile.gettempdir(), f"mptrain-fast_dev_run-{secrets.token_hex(8)}")
    wait_and_remove = ["/bin/sh", "-c", 'read line; rm -rf "$0"', folder]
    remover = subprocess.Popen(wait_and_remove, stdin=subprocess.PIPE, start_new_session=True)
    before = tempfile.tempdir
    try:
        folder.mkdir(0o700)  # not before somebody waits to remove it
        tempfile.tempdir = str(folder)
        yield folder
    finally:
        tempfile.tempdir = before
        remover.stdin.close()
        remover.wait()
