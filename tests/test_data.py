"""Batches for replicas, from every kind of source, opened at any step."""

import numpy as np
import pytest
import tensorflow as tf

import mptrain
from mptrain import InputError
from mptrain.data import (
    DatasetSource,
    IndexedSource,
    Source,
    TrainingBatches,
    as_source,
    eval_dataset,
    eval_steps,
    load,
    replica_share,
)


def numbers(n):
    return Source({"inputs": np.arange(n)})


def group(**fields):
    config = mptrain.default_config().data
    config.update(fields)
    return config


def drawn(source, strategy, *, batch_size, start=0, steps=1, seed=0, folder=None):
    """Returns the inputs of `steps` global batches from step `start` on."""
    batches = TrainingBatches(as_source(source), batch_size=batch_size, seed=seed, strategy=strategy)
    iterator = batches.open(start, folder)
    return np.stack([next(iterator)["inputs"].numpy() for _ in range(steps)])


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


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (12, 4), (1, 4), (7, 7), (100, 32)])
@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_evaluation_counts_every_example_exactly_once(mirrored, replicas, examples, batch_size, kind):
    source = numbers(examples)
    if kind == "dataset":
        source = DatasetSource(tf.data.Dataset.range(examples).batch(batch_size).map(lambda x: {"inputs": x}))
    seen, count = [], 0
    for batch in eval_dataset(source, batch_size=batch_size, strategy=mirrored(replicas)):
        count += 1
        assert len(batch["inputs"]) % replicas == 0
        seen += batch["inputs"].numpy()[batch["weight"].numpy() == 1].tolist()
    assert count == eval_steps(source, batch_size)
    assert sorted(seen) == list(range(examples))


def test_replicas_share_a_batch_evenly_with_static_shapes(mirrored):
    strategy = mirrored(3)
    batch = next(TrainingBatches(numbers(100), batch_size=12, seed=0, strategy=strategy).open(0))

    @tf.function
    def shares(batch):
        def share(batch):
            mine = replica_share(batch, strategy)["inputs"]
            assert mine.shape == [4]
            return mine

        return strategy.experimental_local_results(strategy.run(share, args=(batch,)))

    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in shares(batch)]), batch["inputs"].numpy())


@pytest.mark.parametrize("examples", [100, 7])
def test_batches_gathered_many_at_a_time_are_those_gathered_one_by_one(mirrored, monkeypatch, examples):
    source, strategy = Source({"inputs": np.arange(2 * examples).reshape(-1, 2), "targets": np.arange(examples)}), mirrored(1)
    together = drawn(source, strategy, batch_size=8, start=5, steps=150)
    evaluated = list(eval_dataset(source, batch_size=8, strategy=strategy).as_numpy_iterator())
    monkeypatch.setattr("mptrain.data.pipeline._BYTES_AT_ONCE", 0)
    np.testing.assert_array_equal(together, drawn(source, strategy, batch_size=8, start=5, steps=150))
    alone = list(eval_dataset(source, batch_size=8, strategy=strategy).as_numpy_iterator())
    assert len(evaluated) == len(alone)
    for one, other in zip(evaluated, alone, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def test_batches_of_strings_are_gathered_one_by_one_for_their_size_is_not_known(mirrored):
    sizes = []

    class Watched(Source):
        def open(self):
            read = super().open()

            def watched(numbers):
                noted = tf.py_function(lambda size: sizes.append(int(size)), [tf.size(numbers)], [])
                with tf.control_dependencies([noted]):
                    return read(tf.identity(numbers))

            return watched

    texts = np.array([b"a" * number for number in range(100)], object)
    batches = TrainingBatches(Watched({"text": texts}), batch_size=8, seed=0, strategy=mirrored(1))
    next(batches.open(0))
    assert set(sizes) == {8}


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(InputError, match="same number"):
        Source({"inputs": np.zeros(3), "targets": np.zeros(2)})


class Squares:
    """Examples that are computed when they are asked for."""

    def __init__(self, n):
        self.asked = set()
        self._n = n

    def __len__(self):
        return self._n

    def __getitem__(self, i):
        if not 0 <= i < self._n:
            raise IndexError(i)
        self.asked.add(i)
        return {"inputs": np.array([i, i * i], np.float32), "targets": i}


class SquaresInBatches(Squares):
    def __getitems__(self, indices):
        return [(example["inputs"], example["targets"]) for example in map(self.__getitem__, indices)]


@pytest.mark.parametrize("kind", [Squares, SquaresInBatches])
def test_examples_are_read_by_number_when_they_are_needed(mirrored, kind):
    examples = kind(10**7)
    batch = drawn(examples, mirrored(1), batch_size=4, start=10**6)[0]
    assert batch.shape == (4, 2)
    np.testing.assert_array_equal(batch[:, 1], batch[:, 0] ** 2)
    assert len(examples.asked) <= 1 + 4 * 8  # the first, and what the prefetching reads ahead


def test_the_same_examples_come_in_the_same_order_from_memory_and_on_demand(mirrored, tmp_path):
    array = np.arange(100, dtype=np.float32)
    np.save(tmp_path / "array.npy", array)
    mapped = Source({"inputs": np.load(tmp_path / "array.npy", mmap_mode="r")})
    indexed = IndexedSource([{"inputs": value} for value in array])
    first, *others = (drawn(s, mirrored(2), batch_size=6, steps=20) for s in (Source({"inputs": array}), mapped, indexed))
    for other in others:
        np.testing.assert_array_equal(other, first)


def pipeline(savable, seed=3):
    dataset = tf.data.Dataset.range(40).shuffle(40, seed=seed).batch(4, drop_remainder=True)
    if not savable:
        dataset = dataset.map(lambda x: tf.numpy_function(lambda y: y, [x], tf.int64)).map(lambda x: tf.ensure_shape(x, [4]))
    return dataset.map(lambda x: (x, x))


@pytest.mark.parametrize("savable", [True, False])
def test_position_in_a_users_dataset_is_saved_or_counted(mirrored, tmp_path, savable):
    straight = drawn(pipeline(savable), mirrored(1), batch_size=4, steps=25)
    batches = TrainingBatches(DatasetSource(pipeline(savable)), batch_size=4, seed=0, strategy=mirrored(1))
    assert ("saved" if savable else "counted") in str(batches)
    iterator = batches.open(0)
    for _ in range(13):
        next(iterator)
    batches.save(tmp_path)
    assert (tmp_path / "iterator.index").exists() == savable
    resumed = drawn(pipeline(savable), mirrored(1), batch_size=4, start=13, steps=12, folder=tmp_path)
    np.testing.assert_array_equal(resumed, straight[13:])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: tf.data.Dataset.range(40).batch(4), "drop_remainder=True"),
        (lambda: tf.data.Dataset.range(40).batch(8, drop_remainder=True), "batches of 8"),
        (lambda: tf.data.Dataset.range(40), "must yield batches"),
    ],
)
def test_dataset_of_other_batches_is_refused(mirrored, dataset, message):
    with pytest.raises(InputError, match=message):
        TrainingBatches(DatasetSource(dataset().map(lambda x: {"inputs": x})), batch_size=4, seed=0, strategy=mirrored(1))


def test_endless_dataset_has_no_epochs_and_no_evaluation():
    source = DatasetSource(tf.data.Dataset.range(40).batch(4, drop_remainder=True).repeat().map(lambda x: {"inputs": x}))
    with pytest.raises(InputError, match="never ends: set config.train.steps"):
        len(source)
    with pytest.raises(InputError, match="never ends"):
        eval_steps(source, 4)


def test_what_is_no_source_is_refused():
    with pytest.raises(InputError, match="build_source.. returns int"):
        as_source(3)


# The sources that config.data.name names.


def test_unknown_source_is_refused():
    with pytest.raises(InputError, match="config.data.name is 'imagenet'"):
        load(group(name="imagenet"), "train")


@pytest.mark.parametrize("folder", [True, False])
def test_npz_is_read_from_a_file_or_a_folder(tmp_path, folder):
    x = np.arange(6.0).reshape(3, 2)
    if folder:
        np.savez(tmp_path / "train.npz", inputs=x, targets=np.arange(3))
    else:
        np.savez(tmp_path / "all.npz", x_train=x, y_train=np.arange(3), x_test=x, y_test=x)
    source = load(group(name="npz", dir=str(tmp_path if folder else tmp_path / "all.npz")), "train")
    np.testing.assert_array_equal(source.arrays["inputs"], x)
    np.testing.assert_array_equal(source.arrays["targets"], [0, 1, 2])


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "other names", "other lengths"])
def test_damaged_npz_is_named(tmp_path, damage):
    file = tmp_path / "all.npz"
    if damage == "text":
        file.write_text("no archive")
    elif damage != "missing":
        names = ("a", "b") if damage == "other names" else ("x_train", "y_train")
        np.savez(file, **{names[0]: np.zeros(3), names[1]: np.zeros(2 if damage == "other lengths" else 3)})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="all.npz"):
        load(group(name="npz", dir=str(file)), "train")


@pytest.mark.parametrize("folder", [True, False])
def test_text_is_cut_in_windows_and_its_end_is_for_evaluation(tmp_path, folder):
    text = bytes(range(200))
    if folder:
        (tmp_path / "a.py").write_bytes(text[:90])
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "b.py").write_bytes(text[90:])
        (tmp_path / "c.pyc").write_bytes(b"not this")
    else:
        (tmp_path / "text").write_bytes(text)
    path = str(tmp_path if folder else tmp_path / "text")
    config = group(name="bytes", dir=path, pattern="*.py", context=10, eval_fraction=0.2)
    train, evaluation = load(config, "train"), load(config, "eval")
    assert (len(train), len(evaluation)) == (15, 3)
    batch = train.open()(tf.constant([0, 14], tf.int64))
    np.testing.assert_array_equal(batch["inputs"], [range(10), range(140, 150)])
    np.testing.assert_array_equal(batch["targets"], [range(1, 11), range(141, 151)])
    assert batch["inputs"].dtype == tf.uint8


def test_files_and_folders_that_are_excluded_are_no_part_of_the_text(tmp_path):
    for name in ("a.py", "b/c.py", "b/tests/d.py", "tests/e.py", "test_f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    config = group(name="bytes", dir=str(tmp_path), pattern="*.py", exclude=("tests", "test_*"), context=1)
    batch = load(config, "train").open()(tf.range(70, dtype=tf.int64))
    assert bytes(batch["inputs"].numpy().ravel()) == (b"a.py" * 10 + b"b/c.py" * 10)[:70]


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_text_that_cannot_be_used_is_named(tmp_path, content):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=str(file)):
        load(group(name="bytes", dir=str(file)), "train")


def test_synthetic_examples_are_a_function_of_their_number_whatever_the_size():
    small, large = (load(group(name="synthetic", examples=n, shape=(4, 4, 3), classes=7), "train") for n in (10, 10**12))
    assert len(large) == 10**12
    index = tf.constant([9, 0, 3], tf.int64)
    left, right = small.open()(index), large.open()(index)
    np.testing.assert_array_equal(left["inputs"], right["inputs"])
    np.testing.assert_array_equal(left["targets"], [2, 0, 3])
    assert left["inputs"].shape == [3, 4, 4, 3]


def test_synthetic_examples_are_taken_for_a_source_as_a_trainer_takes_them():
    source = load(group(name="synthetic", examples=10), "train")
    assert as_source(source) is source


def test_synthetic_noise_is_uniform_and_differs_between_examples_and_splits():
    train, evaluation = (load(group(name="synthetic", shape=(50,), classes=1), split) for split in ("train", "eval"))
    index = tf.range(2000, dtype=tf.int64)
    left, right = (source.open()(index)["inputs"].numpy() for source in (train, evaluation))
    noise = left - left.mean(axis=0)
    assert noise.std() == pytest.approx(1 / np.sqrt(3), rel=0.01)
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise.ravel(), (right - right.mean(axis=0)).ravel())[0, 1]) < 0.02


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data folder of TensorFlow Datasets with the data set "tiny": 20 images for training, 7 for testing."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image, label = tfds.features.Image(shape=(4, 4, 1)), tfds.features.ClassLabel(num_classes=3)
            features = tfds.features.FeaturesDict({"image": image, "label": label, "id": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, downloads):
            return {"train": self._generate_examples(20), "test": self._generate_examples(7)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": np.full((4, 4, 1), i, np.uint8), "label": i % 3, "id": i}

    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_data_set_is_read_on_demand_and_seen_once_an_epoch(tfds_folder, mirrored):
    config = group(name="tfds:tiny", dir=str(tfds_folder))
    train, evaluation = load(config, "train"), load(config, "eval")
    assert (len(train), len(evaluation)) == (20, 7)
    epoch = drawn(train, mirrored(2), batch_size=4, steps=5)[..., 0, 0, 0]
    assert sorted(epoch.ravel()) == list(range(20))
    assert train.spec["targets"].shape == []


def test_tfds_data_set_that_is_not_there_is_a_clear_error(tfds_folder):
    with pytest.raises(InputError, match="download it with `tfds build mnist --file_format=array_record`"):
        load(group(name="tfds:mnist", dir=str(tfds_folder)), "train")
    with pytest.raises(InputError, match="nosuch"):
        load(group(name="tfds:nosuch", dir=str(tfds_folder)), "train")


@pytest.mark.parametrize(("first", "later"), [([1, 2], [0.5, 0.25]), (np.uint8([1, 2]), [300, 1]), ([1, 2], [np.nan, 1e20])])
def test_example_that_does_not_fit_the_firsts_dtype_is_an_error_not_another_number(first, later, mirrored):
    source = as_source([{"inputs": np.asarray(value), "targets": 0} for value in (first, later)])
    batches = TrainingBatches(source, batch_size=2, seed=0, strategy=mirrored(1))
    with pytest.raises(tf.errors.OpError, match="'inputs' of an example is"):
        next(batches.open(0))


def test_python_code_before_a_shuffle_is_counted_not_saved(mirrored):
    examples = tf.data.Dataset.from_generator(lambda: iter(range(100)), output_signature=tf.TensorSpec([], tf.int32))
    dataset = examples.map(lambda i: {"inputs": i, "targets": i}).shuffle(20, seed=1).batch(12, drop_remainder=True)
    assert "counted" in str(TrainingBatches(as_source(dataset), batch_size=12, seed=0, strategy=mirrored(1)))


@pytest.mark.parametrize(
    "examples", [np.zeros([5, 2]), [1, 2, 3], [(1, 2, 3), (1, 2, 3)], 7], ids=["array", "numbers", "triples", "number"]
)
def test_examples_of_no_known_kind_are_refused(examples):
    with pytest.raises(InputError, match="pair \\(inputs, targets\\)"):
        as_source(examples)


@pytest.mark.parametrize("examples", [{"inputs": [1, 2, 3]}, ([1, 2, 3], [4, 5, 6])], ids=["mapping", "pair"])
def test_lists_are_taken_for_arrays(examples):
    assert len(as_source(examples)) == 3


def test_weights_that_the_examples_bring_count_in_evaluation(mirrored):
    source = Source({"inputs": np.arange(3), "weight": np.float32([0.5, 0.25, 2.0])})
    batches = list(eval_dataset(source, batch_size=2, strategy=mirrored(1)))
    assert [batch["weight"].numpy().tolist() for batch in batches] == [[0.5, 0.25], [2.0, 0.0]]


def test_each_device_is_sent_its_share_only(mirrored):
    strategy = mirrored(2)

    @tf.function
    def step(batch):
        return strategy.run(lambda batch: replica_share(batch, strategy)["inputs"] + 1.0, args=(batch,))

    operations = step.get_concrete_function({"inputs": tf.TensorSpec([6, 3])}).graph.get_operations()
    devices = {kind: {op.device[-5:] for op in operations if op.type == kind} for kind in ("StridedSlice", "AddV2")}
    assert devices == {"StridedSlice": {"CPU:0"}, "AddV2": {"CPU:0", "CPU:1"}}
