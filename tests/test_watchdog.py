"""A call that holds Python's lock, as TensorFlow's does while it connects the workers, is ended from outside of it."""

import subprocess
import sys

from tests.conftest import ROOT

_HELD = """
import ctypes
from mptrain.watchdog import ends_process_after
with ends_process_after(SECONDS, "worker 0 of 2: it's late; start all again"):
    ctypes.PyDLL(None).usleep(200_000)  # with Python's lock held
print("went on")
ctypes.PyDLL(None).usleep(1_500_000)
"""


def run(seconds):
    code = _HELD.replace("SECONDS", str(seconds))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_late_call_that_holds_pythons_lock_ends_the_process_in_one_line():
    finished = run(0.05)
    assert finished.returncode == 1
    assert finished.stderr == "mptrain: worker 0 of 2: it's late; start all again\n"
    assert finished.stdout == ""


def test_call_that_returns_in_time_is_left_alone():
    finished = run(1)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "went on\n", "")
