import gzip
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from mptrain import InputError
from mptrain.data import idx, load


def group(name="idx", folder=""):
    return ConfigDict({"name": name, "dir": str(folder)})


def test_embedded_mnist_is_the_real_one():
    train, evaluation = load(group("mnist"), "train"), load(group("mnist"), "eval")
    assert train.arrays["inputs"].shape == (60000, 28, 28, 1)
    assert evaluation.arrays["inputs"].shape == (10000, 28, 28, 1)
    assert train.arrays["inputs"].dtype == np.uint8
    assert train.arrays["targets"][:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(evaluation.arrays["targets"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture
def idx_folder(tmp_path):
    """The evaluation files of MNIST as a folder of the user's, one plain and one compressed."""
    images, labels = idx._FILES["eval"]
    (tmp_path / images).write_bytes(gzip.decompress((idx._MNIST / f"{images}.gz").read_bytes()))
    shutil.copy(idx._MNIST / f"{labels}.gz", tmp_path)
    return tmp_path


def test_idx_folder_is_read_plain_and_compressed(idx_folder):
    mine, embedded = load(group(folder=idx_folder), "eval"), load(group("mnist"), "eval")
    for name in ("inputs", "targets"):
        np.testing.assert_array_equal(mine.arrays[name], embedded.arrays[name])


def test_missing_file_is_named(idx_folder):
    with pytest.raises(InputError, match="train-images-idx3-ubyte .*not found: set config.data.dir"):
        load(group(folder=idx_folder), "train")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no idx", "bad gzip", "other labels"])
def test_damaged_file_is_named(idx_folder, damage):
    images, labels = (idx_folder / name for name in idx._FILES["eval"])
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "empty":
        images.write_bytes(b"")
    elif damage == "no idx":
        images.write_bytes(b"GIF89a" * 100)
    elif damage == "bad gzip":
        packed = labels.with_name(f"{labels.name}.gz")
        packed.write_bytes(packed.read_bytes()[:-10])
    else:
        labels.with_name(f"{labels.name}.gz").unlink()
        labels.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 4]))
    with pytest.raises(InputError, match=str(idx_folder)):
        load(group(folder=idx_folder), "eval")


def test_flipped_byte_in_the_embedded_files_is_noticed(tmp_path, monkeypatch):
    for name in idx._FILES["eval"]:
        content = bytearray(gzip.decompress((idx._MNIST / f"{name}.gz").read_bytes()))
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(idx, "_MNIST", tmp_path)
    with pytest.raises(InputError, match="MD5"):
        load(group("mnist"), "eval")
