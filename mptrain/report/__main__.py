"""`python -m mptrain.report DIR`: writes the report of the run whose folder is DIR."""

import pathlib
import sys

from mptrain.errors import InputError
from mptrain.report.page import write_page

_USAGE = "write `python -m mptrain.report DIR`, with the folder of a run"


def main(arguments: list[str]) -> None:
    """Writes the report and prints where it is; ends with status 2 for a folder that is none of a run, 1 for a full disk."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        _exit(2, _USAGE)
    try:
        print(f"the report is {write_page(pathlib.Path(arguments[0]))}")
    except InputError as error:
        _exit(2, f"{error}: {_USAGE}")
    except OSError as error:
        _exit(1, f"{error.filename or arguments[0]} cannot be used: {error.strerror}")


def _exit(status: int, message: str) -> None:
    print(f"mptrain.report: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
