"""Checkpoints: complete or invisible, found from the files themselves, restored wholly or not at all.

A checkpoint is a folder `ckpt-STEP` (see `tensor_file`), written under a temporary name and renamed when it is whole; no
index of checkpoints exists that could be wrong. Nothing is flushed to the disk by force: after a power failure the newest
may be damaged, which is noticed when it is read, and an older one takes its place.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping

import numpy as np
import tensorflow as tf

from mptrain import tensor_file
from mptrain.errors import InputError, RunError
from mptrain.tensor_file import DamagedError

_NAME = re.compile(r"ckpt-(0|[1-9]\d*)")
_TEMPORARY = ".temporary-"
_ASIDE = "damaged-"
_RATING = "evaluation.json"
# State that not every version of mptrain had, or not every run has: where a checkpoint lacks it, it keeps its first value.
_NOT_ALWAYS_THERE = ("optimizer/learning_rate_factor",)


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        suspended: whether `save` does nothing for now, because the state is not good.
        must_be_finite: the paths of variables without which a state is not saved.

    Args:
        directory: the folder that holds them; made when the first is saved.
        state: path -> variable: everything to save and to restore.
        keep: how many of the newest to keep.
        keep_best: how many of those to keep beside them that `rate` gave the highest rating.
        best: what is rated; ratings of something else, as before a config was changed, do not count.
        asynchronous: whether a thread writes while training goes on. At most one checkpoint is being written: the next
            save waits for it, so what is on disk lags by one interval at most.
        read_only: whether nothing is written, as by the workers that are not the chief: all hold the same state.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        state: Mapping[str, tf.Variable],
        keep: int,
        keep_best: int = 0,
        best: str = "",
        asynchronous: bool = False,
        read_only: bool = False,
    ):
        self.directory = pathlib.Path(directory)
        self._state = dict(state)
        self._keep = keep
        self._keep_best = keep_best
        self._best = best
        self._read_only = read_only
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing = None
        self._held = set()
        self.suspended = False
        self.must_be_finite: Collection[str] = ()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        if not self.directory.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> pathlib.Path:
        """Returns the folder of the checkpoint of `step`."""
        return self.directory / f"ckpt-{step}"

    def save(self, step: int, also: Callable[[pathlib.Path], None] | None = None) -> pathlib.Path:
        """Writes the state as the checkpoint of `step`, unless it is there already, and removes those past `keep`.

        Does nothing while `suspended`.

        Args:
            step: names the checkpoint.
            also: called with the unfinished folder, to write more files into it.

        Raises:
            RunError: if it, or with `asynchronous` the one before it, cannot be written, or what `must_be_finite` is not; older
                ones are as they were.
        """
        self.wait()
        final = self.path(step)
        if self._read_only or self.suspended or final.exists():
            return final
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        tensors = {path: variable.numpy() for path, variable in self._state.items()}
        self._check_finite(step, tensors)
        self._guarded(step, lambda: self._begin(temporary, also))
        if self._writer is None:
            self._guarded(step, lambda: self._finish(temporary, final, tensors))
        else:
            self._writing = self._writer.submit(self._guarded, step, lambda: self._finish(temporary, final, tensors))
        return final

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            RunError: if the checkpoint that was being written cannot be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def rate(self, step: int, rating: float) -> None:
        """Notes how good the checkpoint of `step`, which must be there, is; kept with it across restarts.

        Args:
            step: names the checkpoint.
            rating: higher is better; NaN: worse than any.
        """
        self.wait()
        temporary = self.path(step) / f"{_TEMPORARY}{_RATING}"

        def write():
            temporary.write_text(json.dumps({"rating": rating if math.isfinite(rating) else None, "of": self._best}))
            temporary.rename(self.path(step) / _RATING)
            self._remove_old()

        self._guarded(step, write)

    def would_be_kept(self, rating: float) -> bool:
        """Whether a checkpoint of this rating belongs to the best `keep_best`, and may be written."""
        better = [step for step, other in self._ratings().items() if other >= rating]
        possible = not (math.isnan(rating) or self._read_only or self.suspended)
        return possible and len(better) < self._keep_best

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the highest rating, the earliest of equals; None where none is rated."""
        ratings = self._ratings()
        return max(ratings, key=lambda step: (ratings[step], -step), default=None)

    def chosen(self, field: str, wanted: str | int) -> int | None:
        """Returns the step of the checkpoint that a config field names: "best" or a step; None for "newest".

        Raises:
            InputError: if it is not there.
        """
        if wanted == "newest":
            return None
        steps, step = self.steps(), self.best() if wanted == "best" else wanted
        there = ", ".join(map(str, steps))
        if step is None:
            raise InputError(
                f"{field} is 'best', and no checkpoint in {self.directory} is rated: train with checkpoint.keep_best, or write"
                f" newest, or one of {there}"
            )
        if step not in steps:
            raise InputError(f"{field} is {step}, which is not in {self.directory}: write newest, best, or one of {there}")
        return step

    def hold_oldest(self, hold: bool) -> None:
        """Keeps what is now the oldest checkpoint, however many come after it, until called with False."""
        self._held = (self._held or set(self.steps()[:1])) if hold else set()

    def restore_newest(self, warn: Callable[[str], None], *, put_aside: bool = True, restart: bool = False) -> int | None:
        """Restores the newest checkpoint that is whole.

        Args:
            warn: called with one line for each damaged checkpoint that is passed over.
            put_aside: whether damaged ones are renamed, because their places are needed when their steps come again.
            restart: whether to begin anew, with the damaged ones put aside, where there are checkpoints and none is whole.

        Returns:
            The step restored, or None where there is no checkpoint.

        Raises:
            RunError: if there are checkpoints and none is whole, or one holds another state than this run's.
        """
        if put_aside and self.directory.is_dir():
            for path in self.directory.glob(f"{_TEMPORARY}*"):  # of runs that were killed while they saved or removed one
                shutil.rmtree(path, ignore_errors=True)
        damaged = []
        for step in [*reversed(self.steps()), None]:
            try:
                if step is not None:
                    self._restore(self.path(step))
                break
            except DamagedError as error:
                if not self.path(step).exists():  # the process that trains here has just removed it, for a newer one
                    return self.restore_newest(warn, put_aside=put_aside, restart=restart)
                damaged.append(self.path(step))
                warn(f"checkpoint {self.path(step)} is damaged and passed over: {error}")
        if step is None and not restart and (damaged or self._aside()):
            raise RunError(
                f"no checkpoint in {self.directory} is whole: restore one from a copy, or begin anew over them with"
                " --config.checkpoint.restart_if_damaged=True"
            )
        if put_aside:
            for path in damaged:
                path.rename(path.with_name(f"{_ASIDE}{path.name}-{time.time_ns()}"))
        return step

    def restore(self, step: int) -> None:
        """Restores the checkpoint of `step`.

        Raises:
            RunError: if it cannot be read, or holds another state than this run's.
        """
        try:
            self._restore(self.path(step))
        except DamagedError as error:
            raise RunError(
                f"checkpoint {self.path(step)} cannot be read here: {error}; all workers must share the folder"
            ) from error

    def restore_if_there(self, step: int, warn: Callable[[str], None]) -> bool:
        """Restores the checkpoint of `step` while another process may remove it; returns whether it did.

        Args:
            step: names the checkpoint.
            warn: called with one line if it is there and damaged.

        Raises:
            RunError: if it cannot be read, or holds another state than this run's.
        """
        try:
            self._restore(self.path(step))
        except DamagedError as error:
            if self.path(step).exists():
                warn(f"checkpoint {self.path(step)} is damaged and passed over: {error}")
            return False
        return True

    def _restore(self, path: pathlib.Path) -> None:
        _check_contents(path, tensor_file.contents(path), _contents(self._state))
        for name, value in tensor_file.read(path).items():
            self._state[name].assign(value)

    def _check_finite(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        if bad := [path for path in self.must_be_finite if not np.isfinite(tensors[path]).all()]:
            more = f" and {len(bad) - 1} more variables are" if len(bad) > 1 else " is"
            older = self.steps()
            raise RunError(
                f"step {step}: {bad[0]}{more} not finite, so nothing is saved;"
                f" {f'the checkpoint of step {older[-1]} is as it was' if older else 'there is no checkpoint yet'}. Lower"
                " optimizer.learning_rate, or set optimizer.clip_norm"
            )

    def _begin(self, temporary: pathlib.Path, also: Callable | None) -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        self.directory.mkdir(exist_ok=True)
        temporary.mkdir()
        if also is not None:
            also(temporary)

    def _finish(self, temporary: pathlib.Path, final: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
        tensor_file.write(temporary, tensors)
        temporary.rename(final)
        self._remove_old()

    def _guarded(self, step: int, action: Callable[[], None]) -> None:
        """Calls `action`; if it fails, makes the disk space free again and says what could not be written."""
        try:
            action()
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(self.directory / f"{_TEMPORARY}{self.path(step).name}", ignore_errors=True)
            reason = re.sub(r"{{.*?}} ?", "", str(error)).splitlines()[0]
            raise RunError(f"the checkpoint of step {step} cannot be written to {self.directory}: {reason}") from error

    def _remove_old(self) -> None:
        ratings = self._ratings()
        best = sorted(ratings, key=lambda step: (ratings[step], -step), reverse=True)[: self._keep_best]
        for step in self.steps()[: -self._keep]:
            if step not in best and step not in self._held:
                gone = self.directory / f"{_TEMPORARY}{self.path(step).name}"
                self.path(step).rename(gone)  # first out of sight, so that a kill in the middle leaves no half of one
                if gone.is_symlink():  # what it leads to is somebody else's
                    gone.unlink()
                else:
                    shutil.rmtree(gone)

    def _ratings(self) -> dict[int, float]:
        found = {}
        for step in self.steps():
            try:
                note = json.loads((self.path(step) / _RATING).read_text())
                if note["rating"] is not None and note["of"] == self._best:
                    found[step] = note["rating"]
            except (OSError, ValueError, LookupError, TypeError):
                continue  # not rated; one that a crash damaged counts as that
        return found

    def _aside(self) -> bool:
        return self.directory.is_dir() and any(path.name.startswith(_ASIDE) for path in self.directory.iterdir())


def _contents(state: Mapping[str, tf.Variable]) -> dict[str, list]:
    return {path: [variable.dtype.name, variable.shape.as_list()] for path, variable in state.items()}


def _check_contents(path: pathlib.Path, saved: dict, wanted: dict) -> None:
    faults = [f"{name} is missing" for name in wanted.keys() - saved.keys() - {*_NOT_ALWAYS_THERE}]
    faults += [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
    faults += [
        f"{name} is {saved[name]}, the model has {wanted[name]}"
        for name in wanted.keys() & saved.keys()
        if wanted[name] != saved[name]
    ]
    if faults:
        more = f" (and {len(faults) - 20} more)" if len(faults) > 20 else ""
        raise RunError(f"checkpoint {path} holds another state: {'; '.join(sorted(faults)[:20])}{more}")
