"""Processes that benchmarks start and talk to, a line of JSON at a time, and that never keep them waiting for ever."""

import contextlib
import json
import math
import pathlib
import re
import select
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
OUT_OF_MEMORY, NO_ANSWER = "out of memory", "no answer in time"


class Failed(Exception):
    """A child ended, or cannot do its work here; the text is one line that says why."""


class Child:
    """A process that answers each line with a line; a context manager that ends it.

    Args:
        command: of the process.
    """

    def __init__(self, command: list[str]):
        self._errors = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # as where it hangs in a driver
            self._process.wait(5)

    def tell(self, line: str) -> None:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the next answer says why

    def answer(self, seconds: float = math.inf) -> dict:
        """Returns what the process says next, as the JSON that it is.

        Args:
            seconds: after which the process is ended.

        Raises:
            Failed: if it says that it failed, has ended, or has not answered.
        """
        readable, _, _ = select.select([self._process.stdout], [], [], None if seconds == math.inf else max(seconds, 0.0))
        if not readable:
            self.end()
            raise Failed(NO_ANSWER)
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise Failed(reason(self._errors.read()))
        reply = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply


def reason(text: str) -> str:
    """Returns the line that says why a process failed, of its errors or of an exception's long message."""
    *before, text = text.split("Traceback (most recent call last):\n")
    if re.search(r"out.?of.?memory|ResourceExhausted|OOM when", text, re.IGNORECASE):
        return OUT_OF_MEMORY
    lines = [line for line in text.splitlines() if line[:1].strip()]
    around = ("Detected at node", "Hint:")  # TensorFlow's message stands between them
    told = [line for line in lines if not line.startswith(around) and not line.endswith("Graph execution error:")] or lines
    return (told[0] if before else told[-1]) if told else "ended without a word"
