"""The sources that `config.data.name` names."""

import fnmatch
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from ml_collections import ConfigDict

from mptrain.data import idx
from mptrain.data.sources import AnySource, IndexedSource, Source
from mptrain.data.synthetic import SyntheticSource
from mptrain.errors import InputError

_ARRAYS = {"train": ("x_train", "y_train"), "eval": ("x_test", "y_test")}  # as in the .npz files that Keras has


def load(config: ConfigDict, split: str) -> AnySource:
    """Returns the source that `config` (the group `data`) names, with "inputs" and "targets".

    Args:
        config: name, dir, and the fields that the source reads (see `config.py`).
        split: "train" or "eval".

    Raises:
        InputError: if the source does not exist, or a file is missing or damaged.
    """
    path = pathlib.Path(config.dir).expanduser()
    if config.name == "mnist":
        return idx.embedded_mnist(split)
    if config.name == "idx":
        return idx.folder(path, split)
    if config.name == "npz":
        return _npz(path, split)
    if config.name == "bytes":
        return _bytes(config, path, split)
    if config.name == "synthetic":
        return SyntheticSource(config.examples, tuple(config.shape), config.classes, split)
    if config.name.startswith("tfds:"):
        return _tfds(config.name.removeprefix("tfds:"), config.dir or None, split)
    raise InputError(
        f"config.data.name is {config.name!r}: write mnist, idx, npz, bytes, synthetic or tfds:NAME, or override build_source()"
        " in your Trainer"
    )


def _npz(path: pathlib.Path, split: str) -> Source:
    """Reads x_train, y_train, x_test, y_test of one file, or all arrays of train.npz and eval.npz in a folder."""
    file = path / f"{split}.npz" if path.is_dir() else path
    try:
        with np.load(file) as arrays:
            if path.is_dir():
                return Source({name: arrays[name] for name in arrays.files})
            return Source(dict(zip(("inputs", "targets"), (arrays[name] for name in _ARRAYS[split]), strict=True)))
    except FileNotFoundError as error:
        raise InputError(
            f"{file} not found: set config.data.dir to a folder with train.npz and eval.npz, or to one .npz file"
        ) from error
    except KeyError as error:
        raise InputError(f"{file} has no array {' or '.join(_ARRAYS[split])}: it has {', '.join(arrays.files)}") from error
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        if isinstance(error, InputError):
            raise InputError(f"{file}: {error}") from error
        raise InputError(f"{file} cannot be read: {_first_line(error)}") from error


class _Windows:
    """Windows of `context` bytes of a text: inputs are the bytes, targets the byte that follows each."""

    def __init__(self, text: np.ndarray, context: int):
        self._text = text
        self._context = context

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._context

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        window = self._text[index[:, None] * self._context + np.arange(self._context + 1)]
        return {"inputs": window[:, :-1], "targets": window[:, 1:].astype(np.int32)}


def _files(folder: pathlib.Path, pattern: str, exclude: Iterable[str]) -> Iterator[pathlib.Path]:
    """Yields the files under a folder in an order that does not depend on the file system."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, name) for name in exclude):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path, pattern, exclude)
        elif path.is_file() and fnmatch.fnmatch(path.name, pattern):
            yield path


def _bytes(config: ConfigDict, path: pathlib.Path, split: str) -> IndexedSource:
    """Cuts a file, or all files under a folder one after another, in windows; the end of the text is for evaluation.

    A single file is mapped, not read, so it may be larger than the memory.
    """
    try:
        if path.is_dir():
            files = _files(path, config.pattern, config.exclude)
            text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
        else:
            text = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: {reason}: set config.data.dir to a text file or to a folder of them (data.name='bytes')"
        ) from error
    end = len(text) - int(len(text) * config.eval_fraction)
    part = text[:end] if split == "train" else text[end:]
    if len(part) <= config.context:
        raise InputError(
            f"{path} has {len(part)} bytes for {split}: data.context={config.context} needs more; look at config.data.dir,"
            " pattern, exclude and eval_fraction"
        )
    return IndexedSource(_Windows(part, config.context))


class _Supervised:
    """The two features of a TensorFlow data source that its builder calls input and target."""

    def __init__(self, examples, keys: tuple[str, str]):
        self._examples = examples
        self._keys = keys

    def __len__(self) -> int:
        return len(self._examples)

    def __getitems__(self, index: list[int]) -> list[tuple]:
        return [tuple(example[key] for key in self._keys) for example in self._examples.__getitems__(index)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tfds(name: str, folder: str | None, split: str) -> IndexedSource:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"config.data.name is 'tfds:{name}': it needs the extra, pip install 'mptrain[tfds]'") from error
    try:
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    except Exception as error:  # tfds raises many kinds; each says what it missed
        hint = ""
        if "already set to" in str(error):  # it was prepared in another format
            hint = f"; prepare it in one that can be read by number: `tfds build {name} --file_format=array_record`"
        raise InputError(f"config.data.name is 'tfds:{name}': {_first_line(error)}{hint}") from error
    wanted = ["train"] if split == "train" else ["test", "validation"]
    found = next((each for each in wanted if each in builder.info.splits), None)
    if not builder.info.splits:
        raise InputError(
            f"tfds:{name} is not in {builder.data_path.parent}: download it with"
            f" `tfds build {name} --file_format=array_record`, or set config.data.dir"
        )
    if found is None or not builder.info.supervised_keys:
        missing = f"no split {' or '.join(wanted)}" if found is None else "no supervised keys"
        raise InputError(f"tfds:{name} has {missing}: override build_source() and return tfds.data_source(...)")
    return IndexedSource(_Supervised(builder.as_data_source(found), builder.info.supervised_keys[:2]))
