import gzip
import shutil

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import InputError
from mptrain.data import Source, eval_dataset, eval_steps, load, replica_share, sources, train_dataset


def group(name="idx", folder=""):
    return ConfigDict({"name": name, "dir": str(folder)})


def numbers(n):
    return Source({"inputs": np.arange(n)})


def drawn(source, strategy, *, batch_size, start, steps, seed=0):
    """Returns the numbers of the examples of each global batch, [steps, batch_size]."""
    dataset = train_dataset(source, batch_size=batch_size, seed=seed, start_step=start, strategy=strategy)
    batches = []
    for _, batch in zip(range(steps), dataset, strict=False):
        local = strategy.experimental_local_results(batch["inputs"])
        batches.append(np.concatenate([part.numpy() for part in local]))
    return np.stack(batches)


def test_every_epoch_is_a_permutation_and_batches_span_the_seam(mirrored):
    stream = drawn(numbers(10), mirrored(1), batch_size=4, start=0, steps=15).ravel()
    for epoch in stream.reshape(6, 10):
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in stream.reshape(6, 10)}) == 6


@pytest.mark.parametrize("examples", [4, 10, 100, 1000])
def test_permutations_are_as_random_as_they_should_be(mirrored, examples):
    """A uniform permutation leaves one example in its place on average, and one pair of neighbours together."""
    epochs = 400
    order = drawn(numbers(examples), mirrored(1), batch_size=examples, start=0, steps=epochs)
    in_place = (order == np.arange(examples)).sum(axis=1).mean()
    neighbours = (np.diff(order, axis=1) == 1).sum(axis=1).mean()
    assert in_place == pytest.approx(1, abs=5 / np.sqrt(epochs))
    assert neighbours == pytest.approx((examples - 1) / examples, abs=5 / np.sqrt(epochs))


@pytest.mark.parametrize("start", [1, 7, 10**9])
def test_opening_at_a_step_gives_what_reading_up_to_it_gives(mirrored, start):
    source, strategy = numbers(1000), mirrored(1)
    later = drawn(source, strategy, batch_size=8, start=start + 1, steps=3)
    np.testing.assert_array_equal(drawn(source, strategy, batch_size=8, start=start, steps=4)[1:], later)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_order_does_not_depend_on_the_number_of_replicas(mirrored, replicas):
    source = numbers(50)
    one = drawn(source, mirrored(1), batch_size=12, start=5, steps=6)
    np.testing.assert_array_equal(drawn(source, mirrored(replicas), batch_size=12, start=5, steps=6), one)


def test_another_seed_gives_another_order(mirrored):
    first, second = (drawn(numbers(100), mirrored(1), batch_size=100, start=0, steps=1, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (12, 4), (1, 4), (7, 7), (100, 32)])
def test_evaluation_gives_weight_one_to_every_example_exactly_once(mirrored, replicas, examples, batch_size):
    strategy = mirrored(replicas)
    source = numbers(examples)
    seen = []
    dataset = eval_dataset(source, batch_size=batch_size, strategy=strategy)
    count = 0
    for batch in dataset:
        count += 1
        for part, weight in zip(*(strategy.experimental_local_results(batch[k]) for k in ("inputs", "weight")), strict=True):
            seen += part.numpy()[weight.numpy() == 1].tolist()
    assert count == eval_steps(source, batch_size)
    assert sorted(seen) == list(range(examples))


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
    images, labels = sources._FILES["eval"]
    (tmp_path / images).write_bytes(gzip.decompress((sources._MNIST / f"{images}.gz").read_bytes()))
    shutil.copy(sources._MNIST / f"{labels}.gz", tmp_path)
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
    images, labels = (idx_folder / name for name in sources._FILES["eval"])
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
    for name in sources._FILES["eval"]:
        content = bytearray(gzip.decompress((sources._MNIST / f"{name}.gz").read_bytes()))
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sources, "_MNIST", tmp_path)
    with pytest.raises(InputError, match="MD5"):
        load(group("mnist"), "eval")


def test_unknown_source_is_refused():
    with pytest.raises(InputError, match="config.data.name is 'imagenet'"):
        load(group("imagenet"), "train")


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(InputError, match="same number"):
        Source({"inputs": np.zeros(3), "targets": np.zeros(2)})


def test_replicas_share_a_batch_evenly_with_static_shapes(mirrored):
    strategy = mirrored(3)
    dataset = train_dataset(numbers(100), batch_size=12, seed=0, start_step=0, strategy=strategy)

    @tf.function
    def shares(batch):
        def share(batch):
            mine = replica_share(batch, strategy)["inputs"]
            assert mine.shape == [4]
            return mine

        return strategy.experimental_local_results(strategy.run(share, args=(batch,)))

    batch = next(iter(dataset))
    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in shares(batch)]), batch["inputs"].numpy())
