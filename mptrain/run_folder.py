"""A run's folder: where things lie in it, and whether a run may use one that is there already."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
import zlib
from collections.abc import Iterator, Mapping

import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import durations, metrics_log
from mptrain.errors import InputError, RunError

_OWN_NAMES = ("checkpoints", "metrics.jsonl", "precision_plan.txt", "export")
_PACKAGES = ("mptrain", "tensorflow", "keras", "tf-keras", "tf-models-official", "numpy", "ml-collections")


class RunFolder:
    """The folder of one run.

    Args:
        path: where it is, or will be.
        read_only: whether a folder that cannot be written to will do, as for an evaluation.

    Raises:
        InputError: if the folder cannot be used: no folder, not writable, or the remains of something else.
    """

    def __init__(self, path: str | os.PathLike, read_only: bool = False):
        self.path = pathlib.Path(path)
        self.config_file = self.path / "config.json"
        self.plan_file = self.path / "precision_plan.txt"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "export"
        self._owner = b""  # what the lock file says, where this process holds it
        self._began_in = None  # the precision in config.json, once `changes` has read it
        self._check_usable(read_only)

    def _check_usable(self, read_only: bool) -> None:
        there = self.path
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise InputError(f"--workdir={self.path}: {there} is not a folder")
        self.writable = os.access(there, os.W_OK | os.X_OK)
        if not (self.writable or read_only):
            raise InputError(f"--workdir={self.path}: {there} cannot be written to; name another folder")
        remains = [name for name in _OWN_NAMES if (self.path / name).exists()]
        if remains and not self.config_file.exists():
            raise InputError(f"--workdir={self.path} holds {remains[0]} but no config.json: name another folder")

    def changes(self, config: ConfigDict) -> dict[str, tuple[object, object]]:
        """Returns {field: (before, now)} for what a resumed run changes and may change; empty for a new run.

        Durations in epochs cannot be compared before they are known in steps, so they are left out until then.

        Raises:
            InputError: if the folder holds another run's config, or its config.json is damaged.
        """
        if not self.config_file.exists():
            return {}
        try:
            content = json.loads(self.config_file.read_text())
            before, self._began_in = dict(content["config"]), content["precision"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.config_file} is damaged ({error!r}): name another folder, or restore the file") from error
        except OSError as error:
            raise InputError(f"{self.config_file} cannot be read: {error.strerror}; name another folder") from error
        now, defaults = (json.loads(json.dumps(dict(config_lib.fields(c)))) for c in (config, config_lib.default_config()))
        changes = config_lib.differences({**defaults, **before}, now)  # an older version did not have every field
        changes = {path: pair for path, pair in changes.items() if path not in durations.open_fields(config)}
        other = [path for path in changes if not config_lib.is_resumable(path)]
        if other:
            was, is_now = changes[other[0]]
            more = f" and {len(other) - 1} more fields" if len(other) > 1 else ""
            raise InputError(
                f"--workdir={self.path} holds another run: config.{other[0]} was {was!r} and is {is_now!r}{more};"
                " name another folder, or use that run's config"
            )
        return changes

    def check_precision(self, name: str) -> None:
        """Refuses to go on in another precision than the run began in, which `auto` chooses anew on other hardware.

        Raises:
            InputError: if the run began in another one.
        """
        began = self._began_in
        if began not in (None, name):
            raise InputError(
                f"--workdir={self.path}: the run began in {began} and auto now chooses {name}: write"
                f" --config.precision.policy={began} in a new folder, or resume on the first hardware"
            )

    def check_nothing_is_lost(self, config: ConfigDict, changes: Mapping[str, tuple[object, object]]) -> None:
        """Refuses to begin anew, because no checkpoint was found, where metrics.jsonl shows that there must have been one.

        Args:
            config: the run's config.
            changes: what `changes` returned for it.

        Raises:
            RunError: if there must have been a checkpoint.
        """
        every = config.checkpoint.every_steps
        every = max(changes.get("checkpoint.every_steps", (every, every)))
        # Steps behind the first two intervals are logged only when the first checkpoint is whole, be it written by a thread.
        last = metrics_log.last_saved_or_trained(self.metrics_file, saved_after=2 * every)
        if last is not None:
            raise RunError(
                f"{self.checkpoints} holds no checkpoint, but {self.metrics_file} goes to step {last}: put the checkpoints"
                " back, name another folder, or begin anew over them with --config.checkpoint.restart_if_damaged=True"
            )

    def events(self, split: str) -> str | None:
        """Returns the folder of TensorBoard's events of `split`, which is made; None where the run's folder is read-only.

        Raises:
            RunError: if it cannot be written to.
        """
        if not self.writable:
            return None
        folder = self.path / split
        folder.mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RunError(f"{folder} cannot be written to: name another --workdir, or change its permissions")
        return str(folder)

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Makes one line of what the file system says about a file in this folder; a user's own files are none of ours.

        Raises:
            RunError: for such an error.
        """
        try:
            yield
        except OSError as error:
            name = error.filename
            if not isinstance(name, str) or self.path.absolute() not in pathlib.Path(name).absolute().parents:
                raise
            raise RunError(f"{error.filename} cannot be used: {error.strerror}") from error
        except tf.errors.OpError as error:
            message = str(error.message)
            if str(self.path) not in message and "events file" not in message:  # TensorBoard's does not name the file
                raise
            reason = message.splitlines()[0].rsplit(";", 1)[-1].strip()
            raise RunError(f"a file in {self.path} cannot be used: {reason}") from error

    def lock(self) -> None:
        """Makes the folder and keeps other processes from writing to it, until this process ends, however it ends.

        The lock is the process's own, which a process that it forked does not hold on to, as it would to a `flock`.

        Raises:
            InputError: if another process writes to it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip()
            raise InputError(f"--workdir={self.path} is in use by {owner}: wait for it, or name another folder") from error
        except OSError as error:
            raise InputError(f"--workdir={self.path} cannot be written to: {error.strerror}; name another folder") from error
        self._lock.truncate(0)
        owner = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        self._lock.write(owner)
        self._lock.flush()
        self._owner = owner.encode()

    def mark(self) -> int:
        """Returns a checksum of the file that says who has locked the folder, and when; 0 where there is none.

        The process that holds the lock must not read the file: closing it would release the lock.
        """
        if self._owner:
            return zlib.crc32(self._owner)
        try:
            return zlib.crc32((self.path / ".lock").read_bytes())
        except OSError:
            return 0

    def unlock(self) -> None:
        """Lets others write to the folder again."""
        self._lock.close()

    def create(self, config: ConfigDict, precision: str, devices: str, plan: str) -> None:
        """Writes config.json and precision_plan.txt, each whole or not at all.

        Raises:
            InputError: if they cannot be written.
        """
        content = {
            "config": dict(config_lib.fields(config)),
            "precision": precision,
            "devices": devices,
            **provenance(),
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.config_file, json.dumps(content, indent=1) + "\n")
            _replace(self.plan_file, plan)
        except OSError as error:
            raise InputError(f"--workdir={self.path} cannot be written to: {error.strerror}; name another folder") from error


def saved_config(folder: str | os.PathLike) -> ConfigDict:
    """Returns the config of the run in `folder`, with the precision that it came to.

    Raises:
        InputError: if that is no run's folder, or its config.json is damaged.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text())
        config = config_lib.from_fields(content["config"])
        config.precision.policy = content["precision"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} is not the folder of a run: it holds no {path.name}") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error!r}): name another run's folder") from error
    return config


def provenance() -> dict[str, object]:
    """Returns what a file was written by: versions, the git revision of the checkout, the time."""
    return {
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "git_revision": _git_revision(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _replace(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None


def _git_revision() -> str | None:
    """Returns the revision of the checkout that the run was started in, with "+" where it has changes; None outside one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None
