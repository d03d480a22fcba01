"""Processes that run a module as `python -m` does, forked from one that has imported TensorFlow already.

That import takes longer than what most tests then do. So does AutoGraph's work on the step, a third of a small run, which is
done before the fork as well. What the tests start has its own memory, hears signals, can be killed, and ends as Python ends.
Two things differ from a process of its own (the fixture `fresh_command`): what the command prints or sets before TensorFlow is
imported is not seen, and the hash seed of strings is the same in all of them.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pathlib
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from unittest import mock

_ROOT = pathlib.Path(__file__).parent.parent
_IMPORTED = "tensorflow keras tf_keras jinja2 fsspec pytest mptrain.runner mptrain.training_run mptrain.trainer".split()
_CONVERTED = {  # what AutoGraph converts in every run
    "mptrain.train_loop:TrainLoop": "_steps",
    "mptrain.trainer:Trainer": "inputs augment train_step guarded_step _checked_step replica_train_step update_metrics"
    " eval_step _checked_eval_step replica_eval_step",
    "mptrain.state_guard:StateGuard": "__call__",
    "mptrain.loss_scale:LossScaleOptimizer": "apply_gradients _update _apply",
    "mptrain.inner_optimizer:InnerOptimizer": "apply",
    "mptrain.parameter_groups:GroupedOptimizer": "apply_gradients",
    "mptrain.data.pipeline:TrainingBatches": "_batch",
    "mptrain.replicas": "merged",
    "mptrain.keras_compat": "key raw",
}


class Process:
    """The part of `subprocess.Popen` that the tests use, with both outputs captured as text.

    Args:
        arguments: what stands behind `python -m`.
        cwd: the working directory.
        env: the environment.
    """

    def __init__(self, *arguments: str, cwd=_ROOT, env=None):
        self.returncode = None
        self._outputs = [tempfile.NamedTemporaryFile() for _ in range(2)]
        request = {"arguments": [str(each) for each in arguments], "cwd": str(cwd), "env": dict(env or os.environ)}
        self._status, ended = os.pipe()
        with tempfile.TemporaryFile("w+") as file:
            file.write(json.dumps(request))
            file.seek(0)
            given = [file.fileno(), *(output.fileno() for output in self._outputs), ended]
            socket.send_fds(_server(), [b"\0"], given)
        os.close(ended)
        self.pid = int(_server().recv(32))

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._read(0), self._read(1)

    def output(self) -> str:
        """What it has written to stdout so far."""
        return self._read(0)

    def errors(self) -> str:
        """What it has written to stderr so far."""
        return self._read(1)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self, output: int) -> str:
        with open(self._outputs[output].name) as file:
            return file.read()

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 32))
            os.close(self._status)
        return self.returncode


def run(*arguments: str, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Runs `python -m arguments` to its end."""
    process = Process(*arguments, **options)
    try:
        stdout, stderr = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


_servers = []  # the connection to the process that forks; one for each process that runs tests


def _server() -> socket.socket:
    if not _servers:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.prepared", str(theirs.fileno())]
            subprocess.Popen(command, cwd=_ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        _servers.append(ours)
    return _servers[0]


def _convert(folder: str) -> None:
    """Has AutoGraph convert `_CONVERTED` into files of `folder`. TensorFlow keeps them, but offers no public way to it."""
    from tensorflow.python.autograph.core.converter import ConversionOptions, ProgramContext
    from tensorflow.python.autograph.impl import api

    tempfile.tempdir = folder
    with mock.patch.object(atexit, "register"):  # or the first child that ends would remove the files of all
        for owner, names in _CONVERTED.items():
            for name in names.split():
                first = name == "_steps"  # which a `tf.function` is made of; it calls the others
                options = ConversionOptions(recursive=True, user_requested=first, optional_features=None)
                api._convert_actual(getattr(pkgutil.resolve_name(owner), name), ProgramContext(options))


def _serve(connection: socket.socket) -> dict:
    """Forks when it is asked to, until the tests have gone; returns in the children, with what they shall run."""
    folder = tempfile.mkdtemp()
    _convert(folder)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the tests themselves are told
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    children = {}  # pid -> where its exit status is waited for
    while True:
        ready, _, _ = select.select([connection, woken], [], [])
        if woken in ready:
            os.read(woken, 512)
            _report_the_ended(children)
        if connection in ready:
            message, files, _, _ = socket.recv_fds(connection, 1, 4)
            if not message:
                shutil.rmtree(folder)
                sys.exit()
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for each in (woken, wake, connection.detach(), *children.values()):
                    os.close(each)
                return _taken_over(*files)
            children[pid] = files[-1]
            for each in files[:-1]:
                os.close(each)
            connection.send(str(pid).encode())


def _report_the_ended(children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        os.write(children[pid], str(os.waitstatus_to_exitcode(status)).encode())
        os.close(children.pop(pid))


def _taken_over(request: int, stdout: int, stderr: int, ended: int) -> dict:
    os.close(ended)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    with os.fdopen(request) as file:
        wanted = json.load(file)
    for each in (stdout, stderr):
        os.close(each)
    os.environ.clear()
    os.environ.update(wanted["env"])
    tempfile.tempdir = None  # what is known of it is another environment's
    os.chdir(wanted["cwd"])
    sys.path[0] = wanted["cwd"]
    return wanted


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    for module in _IMPORTED:
        importlib.import_module(module)
    module, *arguments = _serve(socket.socket(fileno=int(sys.argv[1])))["arguments"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
