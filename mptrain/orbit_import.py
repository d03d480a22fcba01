"""The one import of Orbit, TensorFlow's library of outer training loops.

It comes inside `tf-models-official`; the PyPI project called "orbit" is another one. Orbit prints each of its lines and logs
it as well: the print is turned off here, for the whole process, because mptrain has its own; the log stays and is shown by
--verbosity=1. `tests/test_orbit_import.py` notices when Orbit's private `_log` goes away.
"""

from absl import logging

from mptrain.errors import InputError

try:
    import orbit
except ImportError as error:
    raise InputError("Orbit is not installed: pip install --no-deps tf-models-official (never 'orbit')") from error

if not hasattr(orbit, "Controller"):
    raise InputError(
        f"the module orbit at {orbit.__file__} is not TensorFlow's: pip uninstall orbit, then"
        " pip install --no-deps --force-reinstall tf-models-official"
    )

orbit.controller._log = logging.info

__all__ = ["orbit"]
