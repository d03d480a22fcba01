"""Random numbers that do not depend on the dtype they are asked for in.

TensorFlow draws a float16 from other bits of its generator than a float32, so that one seed gives two dropout masks that have
nothing in common. Between two runs that shall differ in precision alone, that difference would drown all others.

Draws are made in float32 and rounded. A dropout is computed in float32 as a whole, because its rate is rounded too, and an
element of which the draw lies between the two rates would be dropped in one precision only. It needs two private doors of
TensorFlow, under both generations of Keras and `tf.random`; tests/test_parity.py fails when one of them changes.
"""

import contextlib
import functools
import numbers
from collections.abc import Callable, Iterator

import tensorflow as tf
from tensorflow.python.ops import gen_stateless_random_ops_v2 as draws
from tensorflow.python.ops import nn_ops

_DRAWS = ("stateless_random_uniform_v2", "stateless_random_normal_v2", "stateless_truncated_normal_v2")


@contextlib.contextmanager
def same_noise() -> Iterator[None]:
    """What is traced inside draws the same stateless random numbers in every floating dtype, as far as that can hold them."""
    replacements = [(nn_ops, "_dropout", _dropout), *((draws, name, _drawn) for name in _DRAWS)]
    originals = [getattr(module, name) for module, name, _ in replacements]
    try:
        for (module, name, replacement), original in zip(replacements, originals, strict=True):
            setattr(module, name, functools.partial(replacement, original))
        yield
    finally:
        for (module, name, _), original in zip(replacements, originals, strict=True):
            setattr(module, name, original)


def _drawn(original: Callable, *args, dtype=tf.float32, **kwargs) -> tf.Tensor:
    if tf.as_dtype(dtype).size >= 4:
        return original(*args, dtype=dtype, **kwargs)
    return tf.cast(original(*args, dtype=tf.float32, **kwargs), dtype)


def _dropout(original: Callable, x, rate, **kwargs) -> tf.Tensor:
    x = tf.convert_to_tensor(x)
    if not isinstance(rate, numbers.Real):  # a tensor, whose dtype must be that of x
        return original(x=x, rate=rate, **kwargs)
    return tf.cast(original(x=tf.cast(x, tf.float32), rate=rate, **kwargs), x.dtype)
