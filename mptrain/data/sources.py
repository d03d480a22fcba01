"""Where examples come from: the embedded MNIST, a folder of IDX files, arrays."""

import dataclasses
import gzip
import hashlib
import pathlib
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from mptrain.errors import InputError

_MNIST = pathlib.Path(__file__).parent / "mnist"
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "eval": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Of the uncompressed files, the same that public loaders check against.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples in memory.

    Attributes:
        arrays: name -> array; the first dimension, equal in all, counts the examples.

    Raises:
        InputError: if there is no example, or the arrays do not have the same number of them.
    """

    arrays: Mapping[str, np.ndarray]

    def __post_init__(self):
        sizes = {name: len(array) for name, array in self.arrays.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise InputError(f"a source needs arrays with the same number of examples, at least one; these have {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


def load(config: ConfigDict, split: str) -> Source:
    """Returns the source that `config` (the group `data`) names.

    Args:
        config: name and dir are read.
        split: "train" or "eval".

    Returns:
        A source with "inputs", uint8 [n, height, width, 1], and "targets", int32 [n].

    Raises:
        InputError: if the source does not exist, or a file is missing or damaged.
    """
    if config.name == "mnist":
        return _idx_source(_MNIST, split, _MNIST_MD5)
    if config.name == "idx":
        return _idx_source(pathlib.Path(config.dir), split, {})
    raise InputError(f"config.data.name is {config.name!r}: write 'mnist' or 'idx', or override build_source() in your Trainer")


def _idx_source(folder: pathlib.Path, split: str, checksums: Mapping[str, str]) -> Source:
    images, labels = (_read_idx(folder, name, checksums.get(name)) for name in _FILES[split])
    if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{folder}: the {split} images have the shape {images.shape} and the labels"
            f" {labels.shape}: they do not belong together"
        )
    if images.ndim == 3:
        images = images[..., np.newaxis]
    return Source({"inputs": images, "targets": labels.astype(np.int32)})


def _read_idx(folder: pathlib.Path, name: str, md5: str | None) -> np.ndarray:
    """Reads one IDX file (LeCun's format: two zero bytes, dtype, rank, sizes, values), compressed or plain."""
    content = _read_bytes(folder, name)
    if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise InputError(f"{folder / name}: its MD5 is not {md5}: the file is damaged; install mptrain again")
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise InputError(f"{folder / name}: this is no IDX file: it must begin with two zero bytes and a known type")
    dtype, rank = np.dtype(_IDX_DTYPES[content[2]]), content[3]
    start = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", content[4:start]) if len(content) >= start else ()
    expected = start + int(np.prod(shape)) * dtype.itemsize
    if not shape or len(content) != expected:
        raise InputError(f"{folder / name}: {len(content)} bytes, but its header announces {expected}: the file is damaged")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _read_bytes(folder: pathlib.Path, name: str) -> bytes:
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        if packed.is_file():
            return gzip.decompress(packed.read_bytes())
        return plain.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{plain} (or {packed.name}) not found: set config.data.dir to a folder with the four files"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{packed if packed.is_file() else plain} cannot be read: {error}") from error
