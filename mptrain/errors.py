"""The errors that a user of mptrain is meant to read: one line each, without a traceback on the command line."""


class InputError(Exception):
    """Something given by the user is wrong: a flag, a config field, a data file, a folder. Exit status 2."""


class RunError(Exception):
    """A run that started well cannot go on, or must not. Exit status 1."""


def one_line(error: Exception) -> str:
    """Returns an error's message as the user should read it.

    AutoGraph puts a trace of the traced function before the message of an error that was raised in it.
    """
    return str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()


# Begin lines of TensorFlow's and Keras's messages that say where an error was raised, and not what it is.
_FRAMING = ("Graph execution error", "Detected at node", "<stack traces", "[[{{node", "[[node", "File ", "in user code")


def reason(error: Exception) -> str:
    """Returns one line that says what any error is."""
    if isinstance(error, InputError | RunError):
        return one_line(error)
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_FRAMING)]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


_speaker = ""  # this process among several workers


def speak_as(worker: str) -> None:
    """From now on the command line's messages say that they come from `worker`, as "worker 1 of 3"."""
    global _speaker
    _speaker = worker


def spoken(message: str) -> str:
    """Returns a message as the command line writes it: after the worker's name, where there are several."""
    return message if message.startswith(_speaker) else f"{_speaker}: {message}"


def is_worker() -> bool:
    """Whether this process is one of several workers."""
    return bool(_speaker)


class StopRun(Exception):
    """Raised by an action to end the run early and in good order, as if its last step were done (not an error by itself).

    The step in hand is saved and evaluated, and the exit status is 0. Orbit's controller has no way to stop between loops but
    an exception.

    Args:
        reason: one line for the user and the log.
    """


class Interrupted(StopRun):
    """A signal or the time limit ended the run; it was saved, and the same command goes on.

    Args:
        reason: one line for the user.
        exit_status: what the command line returns: 0, or 128 + the signal's number.
    """

    def __init__(self, reason: str, exit_status: int = 0):
        super().__init__(reason)
        self.exit_status = exit_status


class EvaluationStopped(Exception):
    """An evaluation was ended before its last batch; its metrics mean nothing."""
