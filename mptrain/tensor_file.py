"""One folder of named tensors, complete or recognised as damaged.

The tensors lie in TensorFlow's checkpoint format (`state.index`, `state.data-...`: each tensor with its checksum), under
their paths, so `tf.train.load_checkpoint(folder / "state")` reads them too. `contents.json` says what must be there: paths,
dtypes, shapes, the size of every file, and checksums of what TensorFlow has none for.
"""

import errno
import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from mptrain.errors import RunError

_CONTENTS = "contents.json"
_CHECKED = "state.data"  # by TensorFlow, tensor by tensor
# What TensorFlow's reader, json and the file system raise for files that are truncated, missing or changed.
_FAULTS = (tf.errors.OpError, RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError)
# What they raise for files that may be whole, and must not be put aside: no right to read, too many open files, a lost server.
_UNREADABLE = (tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError)
_UNREADABLE_NUMBERS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)


class DamagedError(Exception):
    """The folder does not hold what was written; the message says what is wrong with which file."""


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors, and last what `folder`, which may hold other files already, must contain.

    Raises:
        OSError, tf.errors.OpError: if they cannot be written.
    """
    with tf.device("CPU:0"):
        tf.raw_ops.SaveV2(
            prefix=str(folder / "state"),
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=list(tensors.values()),
        )
    body = {
        "tensors": {path: [array.dtype.name, list(array.shape)] for path, array in tensors.items()},
        "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    body["checksums"] = {name: _checksum(folder / name) for name in body["bytes"] if not name.startswith(_CHECKED)}
    (folder / _CONTENTS).write_text(json.dumps({"sha256": _digest(body), **body}, indent=1))


def contents(folder: pathlib.Path) -> dict[str, list]:
    """Returns {path: [dtype, shape]} of the tensors that were written to the folder.

    Raises:
        DamagedError: if files are missing or of another size, or contents.json is not what was written.
        RunError: if they cannot be read now, which says nothing about them.
    """
    try:
        body = json.loads((folder / _CONTENTS).read_text())
        if body.pop("sha256") != _digest(body):
            raise DamagedError(f"{_CONTENTS} was changed")
        for name, size in body["bytes"].items():
            if (folder / name).stat().st_size != size:
                raise DamagedError(f"{name} has {(folder / name).stat().st_size} bytes instead of {size}")
        for name, checksum in body["checksums"].items():
            if _checksum(folder / name) != checksum:
                raise DamagedError(f"{name} was changed")
        return body["tensors"]
    except _FAULTS as error:
        raise _verdict(folder, error) from error


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every tensor, each checked against its checksum.

    Raises:
        DamagedError: if one of them is not what was written.
        RunError: if they cannot be read now, which says nothing about them.
    """
    expected = contents(folder)
    try:
        reader = tf.train.load_checkpoint(str(folder / "state"))
        tensors = {path: np.asarray(reader.get_tensor(path)) for path in expected}
    except _FAULTS as error:
        raise _verdict(folder, error) from error
    for path, (dtype, shape) in expected.items():
        if [tensors[path].dtype.name, list(tensors[path].shape)] != [dtype, shape]:
            raise DamagedError(f"{path} is not of the dtype and shape that were written")
    return tensors


def _verdict(folder: pathlib.Path, error: Exception) -> Exception:
    if isinstance(error, _UNREADABLE) or isinstance(error, OSError) and error.errno in _UNREADABLE_NUMBERS:
        return RunError(f"checkpoint {folder} cannot be read: {_first_line(error)}")
    return DamagedError(_first_line(error))


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _checksum(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
