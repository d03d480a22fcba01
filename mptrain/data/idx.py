"""Images and labels in the IDX format of LeCun's MNIST: the embedded files, and folders of the user's."""

import gzip
import hashlib
import pathlib
import struct
import zlib
from collections.abc import Mapping

import numpy as np

from mptrain.data.sources import Source
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


def embedded_mnist(split: str) -> Source:
    """Returns the MNIST that comes with mptrain: "inputs", uint8 [n, 28, 28, 1], and "targets", int32 [n].

    Raises:
        InputError: if the files are damaged.
    """
    return _source(_MNIST, split, _MNIST_MD5)


def folder(path: pathlib.Path, split: str) -> Source:
    """Returns the images and labels in a folder that holds the four files, compressed or not.

    Args:
        path: the folder.
        split: "train" or "eval".

    Returns:
        A source with "inputs" [n, height, width, channels], in the dtype of the file, and "targets", int32 [n].

    Raises:
        InputError: if a file is missing or damaged.
    """
    return _source(path, split, {})


def _source(folder: pathlib.Path, split: str, checksums: Mapping[str, str]) -> Source:
    images, labels = (_read(folder, name, checksums.get(name)) for name in _FILES[split])
    if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{folder}: the {split} images have the shape {images.shape} and the labels"
            f" {labels.shape}: they do not belong together"
        )
    if images.ndim == 3:
        images = images[..., np.newaxis]
    return Source({"inputs": images, "targets": labels.astype(np.int32)})


def _read(folder: pathlib.Path, name: str, md5: str | None) -> np.ndarray:
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
