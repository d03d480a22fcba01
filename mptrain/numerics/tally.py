"""How tensors' values are spread over the binary exponents: counted in the graph, in one pass over each.

The top 16 bits of a float32, or all bits of a float16 or bfloat16, number one of 65,536 bins, which one `Bincount` fills; all
else follows from the bins. Only where a boundary, such as the 65,520 from which float16 overflows, lies inside a bin that is
not empty, is the tensor looked at once more. Small tensors are counted all together, since each operation costs more than
their values do.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

LOWEST = -127  # the exponent of the first count: float32's subnormal numbers, but those below 2**-133, which count as zero
EXPONENTS = 255
_SMALL = 2**15  # values


@dataclasses.dataclass(frozen=True)
class Format:
    """A 16-bit floating format and where its rounding to the nearest changes the kind of a number.

    Attributes:
        largest: its largest number.
        vanishing: the largest magnitude that rounds to zero.
        overflowing: the smallest magnitude that rounds to infinity.
        smallest_normal: smaller numbers have fewer digits.
    """

    largest: float
    vanishing: float
    overflowing: float
    smallest_normal: float

    @classmethod
    def of(cls, digits: int, highest: int) -> "Format":
        """Returns the IEEE format with so many binary digits behind the point and this highest exponent."""
        return cls(
            largest=math.ldexp(2 - 2.0**-digits, highest),
            vanishing=math.ldexp(1, -highest - digits),
            overflowing=math.ldexp(2 - 2.0 ** -(digits + 1), highest),
            smallest_normal=math.ldexp(1, 1 - highest),
        )


FORMATS = {"float16": Format.of(10, 15), "bfloat16": Format.of(7, 127)}


def count(tensors: Sequence[tf.Tensor], scales: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Counts the values of each tensor by magnitude; in the graph.

    Args:
        tensors: of floating dtypes and any shapes.
        scales: what the true values of each were multiplied by, float32 scalars.

    Returns:
        For each tensor a row of counts, int64 [tensors, 7 + EXPONENTS]: values, non-finite ones, zeros; those that are not
        zero and vanish in float16, as they are and divided by the scale; the finite ones that overflow in it, likewise; and
        how many there are of each exponent. And the largest finite magnitude of each tensor, float32 [tensors].
    """
    small = [place for place, tensor in enumerate(tensors) if (tensor.shape.num_elements() or _SMALL) < _SMALL]
    rows, largest = [None] * len(tensors), [None] * len(tensors)
    if small:
        together = _count_together([tensors[place] for place in small], tf.stack([scales[place] for place in small]))
        for place, row, top in zip(small, *map(tf.unstack, together), strict=True):
            rows[place], largest[place] = row, top
    for place, tensor in enumerate(tensors):
        if rows[place] is None:
            rows[place], largest[place] = _count_alone(tensor, scales[place])
    return tf.stack(rows), tf.stack(largest)


def nothing() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the counts, largest magnitudes and scales of no tensor at all."""
    return tf.zeros([0, 7 + EXPONENTS], tf.int64), tf.zeros([0]), tf.zeros([0])


def _boundaries(scales: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where values vanish and overflow in float16, as they are and divided by their scales; [..., 2] each."""
    factors = tf.stack([tf.ones_like(scales), scales], -1)
    return FORMATS["float16"].vanishing * factors, FORMATS["float16"].overflowing * factors


def _count_together(tensors: Sequence[tf.Tensor], scales: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    sizes = [tensor.shape.num_elements() for tensor in tensors]
    values = tf.abs(tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], 0))
    of = tf.constant(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))

    def sums(each: tf.Tensor) -> tf.Tensor:
        return tf.math.unsorted_segment_sum(tf.cast(each, tf.int64), of, len(sizes))

    finite = tf.math.is_finite(values)
    exponents = tf.bitcast(tf.bitwise.right_shift(tf.bitcast(values, tf.uint32), tf.constant(23, tf.uint32)), tf.int32)
    spread = _bincount(of * 256 + exponents, len(sizes) * 256)
    zeros = sums(values == 0)
    vanishing, overflowing = (tf.gather(each, of) for each in _boundaries(scales))
    below = sums((values[:, tf.newaxis] <= vanishing) & (values[:, tf.newaxis] > 0))
    above = sums((values[:, tf.newaxis] >= overflowing) & finite[:, tf.newaxis])
    own = tf.stack([tf.constant(sizes, tf.int64), sums(~finite), zeros], 1)
    spread = tf.reshape(spread, [len(sizes), 256])[:, :EXPONENTS] - tf.pad(zeros[:, tf.newaxis], [[0, 0], [0, EXPONENTS - 1]])
    return tf.concat([own, below, above, spread], 1), tf.math.unsorted_segment_max(
        tf.where(finite, values, 0.0), of, len(sizes)
    )


def _count_alone(tensor: tf.Tensor, scale: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    if tensor.dtype not in (tf.float16, tf.bfloat16):
        tensor = tf.cast(tensor, tf.float32)
    values = tf.reshape(tensor, [-1])
    if values.dtype == tf.float32:
        bits = tf.bitcast(tf.bitwise.right_shift(tf.bitcast(values, tf.uint32), tf.constant(16, tf.uint32)), tf.int32)
    else:
        bits = tf.cast(tf.bitcast(values, tf.uint16), tf.int32)
    bins = _bincount(bits, 2**16)
    bins = bins[: 2**15] + bins[2**15 :]  # the sign is the highest bit
    lower, upper = _bin_values(values.dtype)
    finite = bins[: len(lower)]
    spread = tf.math.unsorted_segment_sum(finite, _exponents(lower), EXPONENTS)
    vanishing, overflowing = (each[:, tf.newaxis] for each in _boundaries(scale))
    below = tf.reduce_sum(tf.where((upper <= vanishing) & (lower > 0), finite, 0), 1)
    above = tf.reduce_sum(tf.where(lower >= overflowing, finite, 0), 1)
    largest = tf.reduce_max(tf.where(finite > 0, upper, 0))
    total = tf.size(values, tf.int64)
    nonfinite = total - tf.reduce_sum(finite)
    if values.dtype == tf.float32:
        below = _exact(below, lower <= vanishing, upper > vanishing, finite, lambda at: _vanishing(values, vanishing[at]))
        above = _exact(above, lower < overflowing, upper >= overflowing, finite, lambda at: _above(values, overflowing[at]))
        whole = tf.cond(nonfinite > 0, lambda: tf.where(tf.math.is_finite(values), values, 0.0), lambda: values)
        largest = tf.reduce_max(tf.abs(whole))
    return tf.concat([tf.stack([total, nonfinite, bins[0]]), below, above, spread], 0), largest


def _exact(counts: tf.Tensor, begins_inside: tf.Tensor, ends_outside: tf.Tensor, bins: tf.Tensor, recount) -> tf.Tensor:
    """Returns the counts, each made anew from the values where a bin that is not empty lies on both sides of its boundary."""
    doubtful = tf.reduce_any(begins_inside & ends_outside & (bins > 0), 1)

    def one(index: int) -> tf.Tensor:
        return tf.cond(doubtful[index], lambda: recount(index), lambda: counts[index])

    return tf.stack([one(index) for index in range(2)])


def _vanishing(values: tf.Tensor, boundary: tf.Tensor) -> tf.Tensor:
    return tf.math.count_nonzero((tf.abs(values) <= boundary) & (values != 0))


def _above(values: tf.Tensor, boundary: tf.Tensor) -> tf.Tensor:
    return tf.math.count_nonzero((tf.abs(values) >= boundary) & tf.math.is_finite(values))


def _bincount(bins: tf.Tensor, size: int) -> tf.Tensor:
    return tf.cast(tf.raw_ops.Bincount(arr=bins, size=size, weights=tf.constant([], tf.int32)), tf.int64)


@functools.cache
def _bin_values(dtype: tf.DType) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest and the largest magnitude of each finite bin, float32, in order."""
    bins = np.arange(2**15, dtype=np.uint32)
    if dtype == tf.float16:
        lower = upper = bins.astype(np.uint16).view(np.float16).astype(np.float32)
    else:
        lower = (bins << 16).view(np.float32)
        upper = lower if dtype == tf.bfloat16 else ((bins << 16) | 0xFFFF).view(np.float32)
    finite = np.isfinite(lower).sum()
    return lower[:finite], upper[:finite]


def _exponents(magnitudes: np.ndarray) -> np.ndarray:
    """Returns which count of the spread each magnitude belongs to; -1: none, for zero."""
    exponents = np.maximum(np.frexp(magnitudes)[1] - 1 - LOWEST, 0)
    return np.where(magnitudes > 0, exponents, -1).astype(np.int32)
