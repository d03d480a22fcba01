"""Reads what a sweep tries from the config file, in which `sweep()` stands beside `get_config()`."""

import inspect
import runpy
import traceback

from mptrain.errors import InputError
from mptrain.sweep.search import Search, as_search


def search(config_file: str) -> Search:
    """Returns what `sweep()` in a config file returns; it gets the file's argument, as in FILE.py:small, if it takes one.

    Raises:
        InputError: if there is no such function, it raises, or returns no search.
    """
    path, _, argument = config_file.partition(":")
    try:
        sweep = runpy.run_path(path, run_name="sweep_config").get("sweep")
        if not callable(sweep):
            raise InputError("--mode=sweep needs a function sweep() beside get_config(), which returns what to try")
        takes = argument and inspect.signature(sweep).parameters
        return as_search(sweep(argument) if takes else sweep())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # the config file is the user's code: whatever it raises is told in one line
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = f", line {frames[-1].lineno}" if frames else ""
        raise InputError(f"{path}{line}: {type(error).__name__}: {error}") from error
