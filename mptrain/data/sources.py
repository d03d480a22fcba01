"""What examples are read from: arrays in memory, anything that can be read by index, or the user's own `tf.data.Dataset`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tensorflow as tf

from mptrain.errors import InputError

Batch = Mapping[str, tf.Tensor]


class Source:
    """Examples in memory.

    Args:
        arrays: name -> array; the first dimension, equal in all, counts the examples. A `np.memmap` stays on its disk.

    Attributes:
        arrays: as given.
        spec: name -> `tf.TensorSpec` of one example.

    Raises:
        InputError: if there is no example, or the arrays do not have the same number of them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise InputError(f"a source needs arrays with the same number of examples, at least one; these have {sizes}")
        self.arrays = arrays
        self.spec = {name: tf.TensorSpec(array.shape[1:], array.dtype, name) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def in_memory(self) -> bool:
        """Whether no array stays on a disk."""
        return not any(isinstance(array, np.memmap) for array in self.arrays.values())

    def open(self) -> Callable[[tf.Tensor], Batch]:
        """Returns a graph function from the numbers of examples, int64 [n], to the batch of them."""
        if not self.in_memory:
            return _reader(lambda index: {name: array[index] for name, array in self.arrays.items()}, self.spec)
        with tf.device("CPU:0"):
            tables = {name: tf.constant(array) for name, array in self.arrays.items()}
        return lambda index: {name: tf.gather(table, index) for name, table in tables.items()}

    def first(self) -> Batch:
        """Returns the first example, as a batch of one."""
        return {name: tf.constant(array[:1]) for name, array in self.arrays.items()}


class IndexedSource:
    """Examples that are read by their number when they are needed, such as those of a file larger than the memory.

    Args:
        examples: has `len(examples)` and `examples[i]`, a mapping of arrays or numbers, or a pair (inputs, targets). Where
            it has `read(indices) -> mapping of arrays [n, ...]` or `__getitems__(indices) -> list`, whole batches are asked
            for. Must be a pure function of i.

    Attributes:
        spec: name -> `tf.TensorSpec` of one example, taken from the first.

    Raises:
        InputError: if there is no example, or the first is none.
    """

    def __init__(self, examples):
        self._examples = examples
        if not len(examples):
            raise InputError(f"{type(examples).__name__} has no examples: a source needs at least one")
        first = self._read(np.arange(1))
        self.spec = {name: tf.TensorSpec(array.shape[1:], array.dtype, name) for name, array in first.items()}

    def __len__(self) -> int:
        return len(self._examples)

    def open(self) -> Callable[[tf.Tensor], Batch]:
        """Returns a graph function from the numbers of examples, int64 [n], to the batch of them."""
        return _reader(self._read, self.spec)

    def first(self) -> Batch:
        """Returns the first example, as a batch of one."""
        return {name: tf.constant(array) for name, array in self._read(np.arange(1)).items()}

    def _read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        if hasattr(self._examples, "read"):
            return dict(self._examples.read(index))
        if hasattr(self._examples, "__getitems__"):
            found = self._examples.__getitems__(index.tolist())
        else:
            found = [self._examples[int(i)] for i in index]
        rows = [_named(example) for example in found]
        return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}


class DatasetSource:
    """The user's own pipeline. What a batch holds is then up to it; all that mptrain can keep is the position in it.

    Args:
        dataset: yields global batches, each a mapping with "inputs" and "targets" or a pair of them. For training it is
            repeated without end, and its batches have `data.batch_size` examples (`drop_remainder=True`); for evaluation it
            ends, and its batches have at most `data.eval_batch_size`. A shuffle in it needs a seed to be resumed exactly.

    Attributes:
        spec: name -> `tf.TensorSpec` of one example.

    Raises:
        InputError: if its elements are no batches.
    """

    def __init__(self, dataset: tf.data.Dataset):
        self.dataset = dataset.map(_named) if not isinstance(dataset.element_spec, Mapping) else dataset
        specs = self.dataset.element_spec
        if any(not isinstance(spec, tf.TensorSpec) or not spec.shape.rank for spec in specs.values()):
            raise InputError(f"a tf.data.Dataset must yield batches of dense tensors; this one yields {specs}")
        self.spec = {name: tf.TensorSpec(spec.shape[1:], spec.dtype, name) for name, spec in specs.items()}

    def __len__(self) -> int:
        """The number of examples.

        Raises:
            InputError: if the dataset does not say how many batches it has.
        """
        batches = int(self.dataset.cardinality())
        if batches < 0:
            kind = "never ends" if batches == tf.data.INFINITE_CARDINALITY else "does not know its own length"
            raise InputError(
                f"the tf.data.Dataset of this run {kind}: set config.train.steps and config.eval.every_steps, or give it"
                " .apply(tf.data.experimental.assert_cardinality(BATCHES))"
            )
        return batches * self.batch_size

    @property
    def batch_size(self) -> int:
        """Examples in a batch.

        Raises:
            InputError: if they differ between batches.
        """
        size = next(iter(self.dataset.element_spec.values())).shape[0]
        if size is None:
            raise InputError("the tf.data.Dataset yields batches of unknown size: write .batch(n, drop_remainder=True)")
        return size

    def first(self) -> Batch:
        """Returns the first example, as a batch of one."""
        return {name: tensor[:1] for name, tensor in next(iter(self.dataset)).items()}


@runtime_checkable
class NumberedSource(Protocol):
    """What `Source`, `IndexedSource` and `SyntheticSource` have in common: examples that are read by their number."""

    spec: Mapping[str, tf.TensorSpec]

    def __len__(self) -> int: ...

    def open(self) -> Callable[[tf.Tensor], Batch]: ...

    def first(self) -> Batch: ...


AnySource = NumberedSource | DatasetSource


def as_source(examples) -> AnySource:
    """Returns the source of what `Trainer.build_source` returned.

    Args:
        examples: a source; a mapping of arrays; a pair of arrays (inputs, targets); a `tf.data.Dataset` of global batches; or
            an object with `len(examples)` and `examples[i]`.

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(examples, AnySource):
        return examples
    if isinstance(examples, tf.data.Dataset):
        return DatasetSource(examples)
    if isinstance(examples, Mapping):
        return Source({name: np.asarray(values) for name, values in examples.items()})
    if isinstance(examples, tuple) and len(examples) == 2:
        return Source({name: np.asarray(values) for name, values in _named(examples).items()})
    if not isinstance(examples, np.ndarray) and hasattr(examples, "__len__") and hasattr(examples, "__getitem__"):
        return IndexedSource(examples)
    raise InputError(
        f"build_source() returns {type(examples).__name__}: return a mapping of arrays, a pair (inputs, targets), a"
        " tf.data.Dataset of batches, or an object with len() and [i]"
    )


def eval_steps(source: AnySource, batch_size: int, at_most: int = 0) -> int:
    """Returns the number of batches in one evaluation: of all examples, or at most so many where `at_most` is not 0.

    Raises:
        InputError: if the source never ends.
    """
    if not isinstance(source, DatasetSource):
        steps = math.ceil(len(source) / batch_size)
        return min(steps, at_most) if at_most else steps
    dataset = source.dataset.take(at_most) if at_most else source.dataset
    steps = int(dataset.cardinality())
    if steps == tf.data.INFINITE_CARDINALITY:
        raise InputError("the tf.data.Dataset for evaluation never ends: leave out .repeat(), or add .take(BATCHES)")
    return steps if steps >= 0 else int(dataset.reduce(0, lambda count, _: count + 1))


def _named(example, targets=None) -> dict:
    """Gives the parts of a pair (inputs, targets) their names."""
    if isinstance(example, Mapping):
        return dict(example)
    pair = example if targets is None else (example, targets)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"an example is {type(pair).__name__}: give a mapping of arrays or a pair (inputs, targets)")
    return {"inputs": pair[0], "targets": pair[1]}


def _as_first(name: str, values: np.ndarray, dtype: type) -> np.ndarray:
    """Returns the values in the dtype of the first example, as long as that changes none beyond a float's rounding."""
    with np.errstate(invalid="ignore"):  # which is what the comparison is for
        cast = values.astype(dtype)
    both_floating = np.issubdtype(values.dtype, np.floating) and np.issubdtype(dtype, np.floating)
    if values.dtype != dtype and values.dtype.kind in "biuf" and not both_floating and not np.array_equal(cast, values):
        raise ValueError(f"{name!r} of an example is {values.dtype}, that of the first {np.dtype(dtype)}: give all one dtype")
    return cast


def _reader(read: Callable[[np.ndarray], Mapping], spec: Mapping[str, tf.TensorSpec]) -> Callable[[tf.Tensor], Batch]:
    """Returns the graph function that calls the Python function `read`."""

    def arrays(index: np.ndarray) -> Sequence[np.ndarray]:
        found = read(index)
        return [_as_first(name, np.asarray(found[name]), spec[name].dtype.as_numpy_dtype) for name in spec]

    def batch(index: tf.Tensor) -> Batch:
        tensors = tf.numpy_function(arrays, [index], [each.dtype for each in spec.values()], stateful=False)
        shaped = [
            tf.ensure_shape(tensor, [index.shape[0], *each.shape]) for tensor, each in zip(tensors, spec.values(), strict=True)
        ]
        return dict(zip(spec, shaped, strict=True))

    return batch
