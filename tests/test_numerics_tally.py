"""What is counted of a tensor, against a count by hand in float64."""

import math

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from mptrain.numerics import tally
from mptrain.numerics.ranges import Range

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EDGES = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, -65520, 65536, 2.0**-24, 2.0**-25, -(2.0**-25), 2.0**-14, 1e-37]
EDGES += [np.nextafter(np.float32(2.0**-25), np.float32(1)), np.nextafter(np.float32(65520), np.float32(0)), 3e38, 2.0**-126]


def by_hand(values, scale):
    """The row that `tally.count` must return, and the largest finite magnitude."""
    values = np.abs(values.astype(np.float64)).ravel()
    finite = values[np.isfinite(values)]
    there = finite[finite > 0]
    row = np.zeros(7 + tally.EXPONENTS, np.int64)
    row[:3] = len(values), len(values) - len(finite), (finite == 0).sum()
    row[3:5] = (there <= 2.0**-25).sum(), (there / scale <= 2.0**-25).sum()
    row[5:7] = (finite >= 65520).sum(), (finite / scale >= 65520).sum()
    exponents = np.maximum([math.frexp(value)[1] - 1 for value in there], tally.LOWEST).astype(int)
    np.add.at(row, 7 + exponents - tally.LOWEST, 1)
    return row, max(finite, default=0.0)


count = tf.function(tally.count)


def counted(values, scale):
    counts, largest = count([tf.constant(values)], [tf.constant(scale, tf.float32)])
    return counts[0].numpy(), float(largest[0])


@pytest.mark.parametrize("size", [50, 100_000])  # together with others, and alone
@pytest.mark.parametrize("scale", [1.0, 1024.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_counts_are_those_of_a_count_by_hand(dtype, scale, size):
    rng = np.random.default_rng(0)
    values = rng.normal(size=size) * np.exp2(rng.integers(-40, 17, size))
    values[: len(EDGES)] = EDGES
    values[len(EDGES) : 2 * len(EDGES)] = np.array(EDGES) * scale
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    row, largest = counted(values, scale)
    expected, expected_largest = by_hand(values, scale)
    np.testing.assert_array_equal(row, expected)
    assert largest == expected_largest


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(0, 24))
def test_small_and_large_tensors_are_counted_alike(values, exponent):
    values, scale = np.pad(np.array(values, np.float32), (0, 20 - len(values))), 2.0**exponent  # of one size, traced once
    values[np.abs(values) < 2.0**-126] = 0  # which hardware may flush to zero
    large = np.concatenate([values, np.ones(40_000, np.float32)])
    (small, top), (row, largest) = counted(values, scale), counted(large, scale)
    row[0] -= 40_000
    row[7 - tally.LOWEST] -= 40_000
    np.testing.assert_array_equal(small, row)
    assert largest == max(top, 1.0)


def test_tensors_keep_their_places_whatever_their_size():
    tensors = [tf.fill([size], float(size)) for size in (3, 70_000, 5, 40_000)]
    counts, largest = tf.function(tally.count)(tensors, [tf.constant(1.0)] * 4)
    assert counts[:, 0].numpy().tolist() == [3, 70_000, 5, 40_000] == largest.numpy().tolist()


def test_range_adds_up_steps_of_different_loss_scales():
    true = np.array([2.0**-30, 2.0**-20, 3.0, 0.0], np.float32)
    found = Range()
    for scale in (2.0**10, 2.0**4):
        row, largest = counted(true * scale, scale)
        found.add(row, largest, scale)
    report = found.as_json(scaled=True)
    assert report["count"] == 8
    assert report["zero"] == 0.25
    assert report["largest"] == 3.0
    assert report["histogram"]["first"] == -30
    assert report["histogram"]["counts"][0] == 2
    assert report["histogram"]["counts"][10] == 2
    assert report["histogram"]["counts"][31] == 2
    assert report["float16"]["underflow"] == 2 / 8
    assert report["scaled"]["largest"] == 3 * 2.0**10
    assert report["scaled"]["float16"]["underflow"] == 1 / 8  # 2**-26, at the smaller scale
    assert report["float16"]["headroom"] == pytest.approx(math.log2(65504 / 3))
    assert found.vanishing() == 2 / 6
    assert found.lost_at(0) == pytest.approx(2.0**-30 / (2.0**-30 + 2.0**-20 + 2), rel=1e-6)
    assert found.lost_at(5) == 0
