"""`--mode=verify_resume`: proves, for the user's own config, that kills do not change a bit.

One process trains `verify_resume.steps` steps. Then a second run of the same length is killed, `verify_resume.kills` times,
with SIGKILL, and started again each time. The last checkpoints of both, which hold all state there is, are compared bit by
bit. Every process is the real command line.

The kills take turns: while a checkpoint is being written, while one is restored, and at a random moment from the start of a
life to its second checkpoint. There are more checkpoints than kills, so the killed run is one run, and most of its lives begin
from what an earlier one left.
"""

import contextlib
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import durations, tensor_file
from mptrain.console import Console
from mptrain.errors import InputError, RunError

# A pickle, because JSON would make lists of the tuples in config.model.
_CONFIG_FILE = """import pathlib
import pickle

from mptrain.config import from_fields


def get_config():
    return from_fields(pickle.loads((pathlib.Path(__file__).parent / "fields.pickle").read_bytes()))
"""


def verify(config: ConfigDict, folder: pathlib.Path, console: Console) -> dict[str, float]:
    """Trains twice, once with kills, and compares the ends.

    Args:
        config: the run's; its length is replaced, its checkpoint interval shortened, and no service logs it.
        folder: where both runs lie; must not exist. Removed again if they are equal.
        console: gets a line for each kill, and the result.

    Returns:
        "kills", "variables" and "values": how many were compared and found equal.

    Raises:
        InputError: if the folder exists.
        RunError: if a bit differs, with the first variable and bit; or a process failed by itself.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already: remove it, or name another --workdir")
    folder.mkdir(parents=True)
    config = _shortened(config)
    (folder / "fields.pickle").write_bytes(pickle.dumps(dict(config_lib.fields(config))))
    (folder / "config.py").write_text(_CONFIG_FILE)
    lead = _run_straight(config, folder, console)
    kills = _kill_and_resume(config, folder, lead, console)
    variables, values = compare(_last(folder / "straight", config), _last(folder / "killed", config))
    shutil.rmtree(folder)
    console.line(f"equal to the last bit after {kills} kills: {variables} variables, {values:,} values")
    return {"kills": kills, "variables": variables, "values": values}


def compare(left: pathlib.Path, right: pathlib.Path) -> tuple[int, int]:
    """Returns the numbers of variables and values in two equal checkpoints.

    Raises:
        RunError: if they are not equal to the last bit, with the first difference.
    """
    straight, killed = tensor_file.read(left), tensor_file.read(right)
    if straight.keys() != killed.keys():
        raise RunError(f"{left} and {right} hold different variables: {sorted(straight.keys() ^ killed.keys())[0]}")
    different = [path for path in straight if straight[path].tobytes() != killed[path].tobytes()]
    if different:
        where = _first_difference(straight[different[0]], killed[different[0]])
        raise RunError(
            f"{len(different)} of {len(straight)} variables differ between {left} and {right}, first {different[0]}{where}; on"
            " GPUs set config.devices.deterministic=True"
        )
    return len(straight), sum(array.size for array in straight.values())


def _first_difference(left: np.ndarray, right: np.ndarray) -> str:
    """Returns the place, the two values and the first bit that differ."""
    bits = [np.frombuffer(array.tobytes(), np.uint8).reshape(array.size, -1) for array in (left, right)]
    value = int(np.nonzero((bits[0] != bits[1]).any(axis=1))[0][0])
    place = ", ".join(map(str, np.unravel_index(value, left.shape)))
    numbers = [int.from_bytes(each[value].tobytes(), "little") for each in bits]
    bit = (numbers[0] ^ numbers[1]).bit_length() - 1
    return f"[{place}]: {left.ravel()[value]!r} and {right.ravel()[value]!r}, from bit {bit} down"


def _shortened(config: ConfigDict) -> ConfigDict:
    config, window = config_lib.copied(config), config.optimizer.accumulation_steps
    steps = -(-config.verify_resume.steps // window) * window
    config.train.steps = steps
    config.train.time_limit, config.log.loggers = 0, ()
    config.checkpoint.every_steps = max(steps // (config.verify_resume.kills + 6) // window, 1) * window
    for path in ("train.steps", "checkpoint.every_steps"):
        durations.prefer(config, path)
    loop = config.train.steps_per_loop
    config.train.steps_per_loop = config.checkpoint.every_steps if loop == "auto" else min(loop, config.checkpoint.every_steps)
    return config


def _run_straight(config: ConfigDict, folder: pathlib.Path, console: Console) -> float:
    """Returns the seconds from the start of the process to about its second checkpoint."""
    start = time.monotonic()
    workdir = folder / "straight"
    with _started(folder, "straight") as process:
        while process.poll() is None and _newest(workdir) == "none":
            time.sleep(0.01)
        first = time.monotonic() - start
        _finish(process, workdir)
    whole = time.monotonic() - start
    console.line(f"straight: {config.train.steps} steps in {whole:.1f} s")
    return first + (whole - first) * config.checkpoint.every_steps / config.train.steps


def _kill_and_resume(config: ConfigDict, folder: pathlib.Path, lead: float, console: Console) -> int:
    """Kills and restarts until all kills are done, then lets the run finish.

    A machine that has become much faster may finish before all kills; then the run begins anew, and its kills with it.
    """
    workdir, chance = folder / "killed", random.Random(config.seed)
    moments, done = _moments(workdir, lead, chance), 0
    while done < config.verify_resume.kills:
        with _started(folder, "killed") as process:
            name, moment = next(moments)
            while process.poll() is None and not moment():
                time.sleep(0.001)
            if process.poll() is None:
                process.kill()
                process.wait()
                done += 1
                console.line(f"kill {done} of {config.verify_resume.kills}, {name}; newest checkpoint: {_newest(workdir)}")
            else:
                _finish(process, workdir)
                shutil.rmtree(workdir)
                done = 0
    with _started(folder, "killed") as process:
        _finish(process, workdir)
    return done


def _moments(workdir: pathlib.Path, lead: float, chance: random.Random) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yields (name, function that says whether the moment has come), one for each life."""
    while True:
        complete = chance.randrange(2) if _newest(workdir) != "none" else 1  # checkpoints that this life may complete
        begun = _Seen(workdir, ".temporary-*")
        yield "while saving", lambda begun=begun, complete=complete: begun.count() > complete
        before, delay = _written(workdir / ".lock"), chance.uniform(0, 0.1)

        def restoring(before=before, delay=delay):
            written = _written(workdir / ".lock")
            return written != before and time.time() > written + delay

        yield "while restoring", restoring
        end, done = time.monotonic() + chance.uniform(0, 1.5 * lead), _Seen(workdir, "ckpt-*")
        yield "at a random moment", lambda end=end, done=done: time.monotonic() > end or done.count() > 1


class _Seen:
    """The folders of a pattern, beside the checkpoints, that were made or renamed since this was made."""

    def __init__(self, workdir: pathlib.Path, pattern: str):
        self._folder, self._pattern = workdir / "checkpoints", pattern
        self._since, self._names = time.time(), set()

    def count(self) -> int:
        with contextlib.suppress(FileNotFoundError):  # one of them has just gone: the next look is soon
            self._names |= {p.name for p in self._folder.glob(self._pattern) if p.stat().st_ctime > self._since}
        return len(self._names)


def _written(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _newest(workdir: pathlib.Path) -> str:
    names = [path.name for path in (workdir / "checkpoints").glob("ckpt-*")]
    return max(names, key=lambda name: (len(name), name), default="none")


@contextlib.contextmanager
def _started(folder: pathlib.Path, name: str) -> Iterator[subprocess.Popen]:
    """Runs the command; its process does not outlive the context."""
    flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / name}", "--mode=train"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(_errors(folder / name), "w") as errors:  # no pipe, which a talkative run would fill
        command = [sys.executable, "-m", "mptrain.main", *flags]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _errors(workdir: pathlib.Path) -> pathlib.Path:
    return workdir.with_name(f"{workdir.name}.stderr")


def _finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    process.wait()
    if process.returncode:
        reason = (_errors(workdir).read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise RunError(f"the run in {workdir} ended with status {process.returncode}: {reason}")


def _last(workdir: pathlib.Path, config: ConfigDict) -> pathlib.Path:
    return workdir / "checkpoints" / f"ckpt-{config.train.steps}"
