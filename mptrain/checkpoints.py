"""Checkpoints: complete or invisible, found from the files themselves, restored wholly or not at all.

A checkpoint is a folder `ckpt-STEP` with TensorFlow's two files (`state.index`, `state.data-...`, each tensor with its
checksum) and `contents.json` (path -> dtype and shape). It is written under a temporary name and renamed when it is whole.
"""

import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping

import tensorflow as tf

from mptrain.errors import RunError

_NAME = re.compile(r"ckpt-(\d+)")
_TEMPORARY = ".temporary-"
# What TensorFlow's reader and json raise for files that are truncated, missing or changed.
_DAMAGED = (tf.errors.OpError, IndexError, RuntimeError, OSError, ValueError)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: the folder that holds them; made when the first is saved.
        state: path -> variable: everything to save and to restore.
        keep: how many of the newest to keep.
    """

    def __init__(self, directory: str | os.PathLike, state: Mapping[str, tf.Variable], keep: int):
        self.directory = pathlib.Path(directory)
        self._state = dict(state)
        self._keep = keep
        self._checkpoint = tf.train.Checkpoint(state=self._state)

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        if not self.directory.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> pathlib.Path:
        """Returns the folder of the checkpoint of `step`."""
        return self.directory / f"ckpt-{step}"

    def save(self, step: int) -> pathlib.Path:
        """Writes the state as the checkpoint of `step`, unless it is there already, and removes those past `keep`.

        Raises:
            RunError: if it cannot be written; older checkpoints are as they were.
        """
        final = self.path(step)
        if final.exists():
            return final
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
            self.directory.mkdir(exist_ok=True)
            temporary.mkdir()
            self._checkpoint.write(str(temporary / "state"))
            (temporary / "contents.json").write_text(json.dumps(_contents(self._state), indent=1))
            temporary.rename(final)
            self._remove_old()
        except (OSError, tf.errors.OpError) as error:
            reason = re.sub(r"{{.*?}} ?", "", str(error)).splitlines()[0]
            raise RunError(f"the checkpoint of step {step} cannot be written to {self.directory}: {reason}") from error
        return final

    def _remove_old(self) -> None:
        for old in self.steps()[: -self._keep]:
            gone = self.directory / f"{_TEMPORARY}{self.path(old).name}"
            self.path(old).rename(gone)  # first out of sight, so that a kill in the middle leaves no half of one
            shutil.rmtree(gone)

    def restore_newest(self, warn: Callable[[str], None]) -> int | None:
        """Restores the newest checkpoint that is whole.

        Args:
            warn: called with one line for each damaged checkpoint that is passed over.

        Returns:
            The step restored, or None where there is no checkpoint.

        Raises:
            RunError: if there are checkpoints and none is whole, or one holds another state than this run's.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                contents = json.loads((path / "contents.json").read_text())
                _check_contents(path, contents, _contents(self._state))
                self._checkpoint.read(str(path / "state")).assert_consumed()
                return step
            except _DAMAGED as error:
                aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")  # its place is needed when the step comes again
                path.rename(aside)
                warn(f"checkpoint {path} is damaged, passed over and put aside as {aside.name}: {str(error).splitlines()[0]}")
        if steps:
            raise RunError(f"no checkpoint in {self.directory} is whole: move the folder away to start from the beginning")
        return None


def _contents(state: Mapping[str, tf.Variable]) -> dict[str, list]:
    return {path: [variable.dtype.name, variable.shape.as_list()] for path, variable in state.items()}


def _check_contents(path: pathlib.Path, saved: dict, wanted: dict) -> None:
    faults = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    faults += [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
    faults += [
        f"{name} is {saved[name]}, the model has {wanted[name]}"
        for name in wanted.keys() & saved.keys()
        if wanted[name] != saved[name]
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise RunError(f"checkpoint {path} holds another state: {'; '.join(sorted(faults)[:3])}{more}")
