"""The command line: `python -m mptrain.main --config=configs/mnist.py [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...]`.

Parses flags and nothing else, by what `command_line.py` finds of them. TensorFlow is imported only when the flags are good, so
a typing error is answered at once.
"""

import os
import pathlib
import re
import signal
import sys
import time
import traceback
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mptrain import command_line, config_check, config_text, durations
from mptrain import config as config_lib
from mptrain.errors import InputError, Interrupted, RunError, is_worker, one_line, spoken

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; fields: --config.GROUP.FIELD=VALUE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default: runs/CONFIG_NAME/DATE-TIME. Resumes.")
_MODE = flags.DEFINE_enum("mode", "train_and_eval", list(config_lib.MODES), "What to do.")
_PRINT = flags.DEFINE_bool("print_config", False, "Prints the config, as it was resolved from file and flags, and ends.")
_FAST_DEV_RUN = flags.DEFINE_bool("fast_dev_run", False, "Try two steps of everything, and leave nothing behind.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise InputError(f"unexpected argument {argv[1]!r}: flags begin with --, as in --config={argv[1]}")
    if _CONFIG.value is None:
        raise InputError("no config given: write --config=FILE, for instance --config=configs/mnist.py")
    config_check.validate(_CONFIG.value)
    if _PRINT.value:
        print(config_text.config_text(_CONFIG.value), end="")
        return
    from mptrain import devices, runner  # import TensorFlow, so they wait until flags and config are good

    if _FAST_DEV_RUN.value:
        if not flags.FLAGS["mode"].using_default_value:
            raise InputError("--fast_dev_run tries all that a run does: leave out --mode")
        from mptrain.fast_dev_run import fast_dev_run

        fast_dev_run(_CONFIG.value)
        return
    if _WORKDIR.value is None and devices.is_multi_worker(_CONFIG.value.devices):
        raise InputError("several workers must share one run folder: name it with --workdir=DIR")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = _WORKDIR.value or os.path.join("runs", _run_name(file), time.strftime("%Y%m%d-%H%M%S"))
    if _MODE.value == "sweep":
        from mptrain.sweep import config_file, mode

        mode.sweep(_CONFIG.value, config_file.search(file), pathlib.Path(workdir))
    else:
        runner.run(_CONFIG.value, workdir, _MODE.value)


def _run_name(config_file: str) -> str:
    """Returns the name of the folder of a config's runs: "mnist-small" for "configs/mnist.py:small"."""
    path, _, argument = config_file.partition(":")
    return "-".join(filter(None, (pathlib.Path(path).stem, re.sub(r"[^\w.]+", "-", argument).strip("-."))))


def _let_flags_decide_the_unit(config: ConfigDict) -> list[str]:
    """A duration given on the command line replaces the config file's, in steps or in epochs; returns the faults: both."""
    faults = []
    for pair in durations.pairs():
        given = [path for path in pair if f"config.{path}" in flags.FLAGS]
        if len(given) == 1:
            durations.prefer(config, given[0])
        elif given:
            faults.append(f"config.{pair[0]} and config.{pair[1]}: both are set; set exactly one of them")
    return faults


def _quieten(argv: list[str]) -> None:
    """Keeps TensorFlow's start-up notices off the terminal, unless --verbosity=1 asks for them.

    Looks at `argv` itself: a config file may import TensorFlow, and is read while the flags are parsed.
    """
    if not any(re.fullmatch(r"--?(v|verbosity)=[1-9]", argument) for argument in argv):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        logging.set_verbosity(logging.ERROR)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses `argv`; all mistakes in flags and config are told together, of those that keep the file from loading the first."""
    line = command_line.read(argv)
    file = command_line.given(argv).get("config")
    fields = [argument for argument in argv[1:] if re.match(r"--?(no)?config\.", argument)]
    if fields and not file:
        _exit_with([*line.faults, f"{fields[0]} changes a field of a config file: add --config=FILE"])
    sys.argv[1:] = line.argv[1:]  # where ml_collections looks for the flags of fields
    try:
        remaining = flags.FLAGS(line.argv)
        config = _CONFIG.value
        getattr(config, "keys", None)  # a file that did not load raises when it is first looked at
    except Exception as error:  # the config file is the user's code: whatever it raises is told in one line
        _exit_with([*line.faults, _flag_message(argv, error)])
    if file and not isinstance(config, ConfigDict):
        _exit_with([*line.faults, f"{file}: get_config() returns {config!r}: end it with `return config`"])
    if config is not None:
        for path, value in line.options.items():
            config_lib.set_field(config, path, value)
        line.faults += _let_flags_decide_the_unit(config)
        if line.faults:
            line.faults += [fault for fault in config_check.faults(config) if fault not in line.faults]
    if line.faults:
        _exit_with(line.faults)
    return remaining


def _exit_with(faults: list[str]) -> NoReturn:
    try:
        config_check.refuse(faults)
    except InputError as error:
        _exit(2, str(error))


def _flag_message(argv: list[str], error: Exception) -> str:
    given = command_line.given(argv)
    path = given.get("config", "").split(":")[0]
    if path and not os.path.isfile(path):
        return f"config file {path!r} not found: write --config=FILE, for instance --config=configs/mnist.py"
    if isinstance(error, InputError):  # which the config file raises itself
        return f"{path}: {error}"
    text = str(error)
    if wrong := re.search(r"get_config\(\) (takes 0 positional|missing 1 required positional argument: '(\w+)')", text):
        what = (
            f"needs an argument: write --config={path}:{wrong[2].upper()}" if wrong[2] else f"takes none: write --config={path}"
        )
        return f"{given['config']}: get_config {what}"
    line = _line_of(path, error)
    place = f"{path}, line {line}: " if line else f"{path}: " if "parsing config file" in text else ""
    unknown = re.search(r'Key \\?"(\w+)\\?" does not exist', text)
    if unknown:
        return place + config_lib.unknown_field(unknown[1])
    missing = [flag for flag in given if flag.startswith("config.model.")]
    if missing and not line:
        return f"unknown config field {missing[0][7:]!r}: config.model has the fields that {path} gives it"
    kind = "" if isinstance(error, flags.Error) or "parsing config file" in text else f"{type(error).__name__}: "
    return place + kind + (text.strip().splitlines() or [""])[-1].strip()


def _line_of(path: str, error: Exception) -> int | None:
    """Returns the line of the config file at which `error` was raised: ml_collections passes it on, or quotes its trace."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if path and frame.filename.endswith(os.path.basename(path))]
    quoted = re.findall(r'File "([^"]*)", line (\d+)', str(error))
    lines += [int(line) for file, line in quoted if path and file.endswith(os.path.basename(path))]
    return lines[-1] if lines else None


def _exit(status: int, message: str) -> None:
    print(f"mptrain: {spoken(message)}", file=sys.stderr)
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    """Ends the process at once, without the interpreter's long goodbye.

    In it a signal would change the status of a saved run, and what TensorFlow leaves of an all-reduce that another worker did
    not come to (a thread pool that it does not close) sometimes writes a trace of its own.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run() -> None:
    """Runs the command line; the exit status is 0, 1 (failed run), 2 (bad input) or 128 + signal (stopped and saved)."""

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except InputError as error:
            _exit(2, one_line(error))
        except RunError as error:
            if is_worker():
                print(f"mptrain: {spoken(one_line(error))}", file=sys.stderr)
                _leave(1)
            _exit(1, one_line(error))
        except Interrupted as stop:
            _leave(stop.exit_status)
        except Exception:
            if is_worker():  # the trace that follows does not say whose it is
                print(f"mptrain: {spoken('failed with the error below')}", file=sys.stderr)
            raise

    def terminated(number: int, frame: object) -> NoReturn:
        _exit(128 + number, "terminated")

    _quieten(sys.argv)
    signal.signal(signal.SIGTERM, terminated)  # so that what cleans up behind itself comes to it, as after Ctrl-C
    try:
        app.run(guarded, flags_parser=_parse_flags)
    except KeyboardInterrupt:  # before the run or outside of it: there is nothing to save
        _exit(130, "interrupted")


if __name__ == "__main__":
    run()
