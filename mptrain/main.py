"""The command line: `python -m mptrain.main --config=configs/mnist.py [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...]`.

Parses flags and nothing else. TensorFlow is imported only when the flags are good, so a typing error is answered at once.
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

from mptrain import config as config_lib
from mptrain import config_check
from mptrain.errors import InputError, RunError, StopRun, is_worker, one_line, spoken

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; fields: --config.GROUP.FIELD=VALUE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default: runs/CONFIG_NAME/DATE-TIME. Resumes.")
_MODE = flags.DEFINE_enum("mode", "train_and_eval", list(config_lib.MODES), "What to do.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise InputError(f"unexpected argument {argv[1]!r}: flags begin with --, as in --config={argv[1]}")
    if _CONFIG.value is None:
        raise InputError("no config given: write --config=FILE, for instance --config=configs/mnist.py")
    _let_one_length_replace_the_other(_CONFIG.value)
    config_check.validate(_CONFIG.value)
    from mptrain import devices, runner  # import TensorFlow, so they wait until flags and config are good

    if _WORKDIR.value is None and devices.is_multi_worker(_CONFIG.value.devices):
        raise InputError("several workers must share one run folder: name it with --workdir=DIR")
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = _WORKDIR.value or os.path.join("runs", name, time.strftime("%Y%m%d-%H%M%S"))
    runner.run(_CONFIG.value, workdir, _MODE.value)


def _let_one_length_replace_the_other(config) -> None:
    """A length given on the command line replaces the config file's, in steps or in epochs; both given stay a fault."""
    steps, epochs = (f"config.train.{name}" in flags.FLAGS for name in ("steps", "epochs"))
    if steps and not epochs:
        config.train.epochs = None
    if epochs and not steps:
        config.train.steps = None


def _quieten(argv: list[str]) -> None:
    """Keeps TensorFlow's start-up notices off the terminal, unless --verbosity=1 asks for them.

    Looks at `argv` itself: a config file may import TensorFlow, and is read while the flags are parsed.
    """
    if not any(re.fullmatch(r"--?(v|verbosity)=[1-9]", argument) for argument in argv):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        logging.set_verbosity(logging.ERROR)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses `argv`; a mistake in a flag or in the config file becomes one line."""
    try:
        remaining = flags.FLAGS(argv)
        config = _CONFIG.value
        getattr(config, "keys", None)  # a file that did not load raises when it is first looked at
    except Exception as error:  # the config file is the user's code: whatever it raises is told in one line
        _exit(2, _flag_message(argv, error))
    if "config" in _given(argv) and not isinstance(config, ConfigDict):
        _exit(2, f"{_given(argv)['config']}: get_config() returns {config!r}: end it with `return config`")
    return remaining


def _given(argv: list[str]) -> dict[str, str]:
    """Returns {flag: value} of the command line, be the two joined by "=" or by a space."""
    joined = re.sub(r"\0(?!-)", "=", "\0".join(argv[1:]))
    return dict(pair.lstrip("-").split("=", 1) for pair in joined.split("\0") if pair.startswith("-") and "=" in pair)


def _flag_message(argv: list[str], error: Exception) -> str:
    given = _given(argv)
    path = given.get("config", "").split(":")[0]
    if path and not os.path.isfile(path):
        return f"config file {path!r} not found: write --config=FILE, for instance --config=configs/mnist.py"
    known = [name for name, _ in config_lib.fields(config_lib.default_config())]
    for flag in given:
        field = flag.removeprefix("config.")
        if field == flag or field in known:
            continue
        if any(name.startswith(f"{field}.") for name in known):
            return f"--{flag} is a group of fields: set one of them, as --{flag}.FIELD=VALUE"
        if not field.startswith("model."):
            return config_lib.unknown_field(field)
    text = str(error)
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
    """Ends the process of a saved run at once: a signal that met the interpreter's long goodbye would change the status."""
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
            _exit(1, one_line(error))
        except StopRun as stop:
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
