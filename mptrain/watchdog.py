"""Ends the process, with one line, when a call takes too long that neither a thread nor a signal handler can interrupt.

TensorFlow connects its workers in a call that holds Python's lock, so no Python code of this process runs meanwhile.
`faulthandler` watches from a thread of its own that needs no lock, and ends the process with status 1; but it writes a trace
instead of a line. So its trace goes to a shell, which writes the line when something comes.
"""

import contextlib
import faulthandler
import subprocess
from collections.abc import Iterator

_SAY = 'read -r trace && echo "$0" >&2 && cat >/dev/null'  # `read` fails if the pipe ends without a line


@contextlib.contextmanager
def ends_process_after(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with status 1 and `message` on stderr, if it is in this context for longer than `seconds`."""
    # In a session of its own the shell lives through a Ctrl-C, and goes when the pipe does, however this process ends.
    shell = subprocess.Popen(["sh", "-c", _SAY, f"mptrain: {message}"], stdin=subprocess.PIPE, start_new_session=True)
    with shell:
        faulthandler.dump_traceback_later(seconds, exit=True, file=shell.stdin)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
