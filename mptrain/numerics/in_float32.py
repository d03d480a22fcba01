"""A traced step in another precision than the run's: all of it in float32, to know the true values, or some layers.

A layer's dtype policy, and the trainer's casts, are read while a step is traced, so changing them for that moment is enough.
A model that casts to 16 bits by itself is asked for float32 by `tf.cast`; where it does so in another way, the traced graph
shows that 16 bits are left.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import tensorflow as tf

from mptrain import forward_graph, keras_compat, precision
from mptrain.forward_graph import SIXTEEN_BITS

# What hands values on as they are: a batch may come in 16 bits.
_MOVES = frozenset("Arg Const Identity IteratorGetNext Placeholder Reshape Slice StridedSlice".split())


@contextlib.contextmanager
def everything(trainer) -> Iterator[None]:
    """What is traced inside computes in float32, whatever the layers' policies and the model's own casts say."""
    own, cast = trainer.precision, tf.cast
    with layers(layer for _, layer in keras_compat.all_layers_by_path(trainer)):
        trainer.precision = precision.get("float32")
        tf.cast = functools.partial(_wide_cast, cast)
        try:
            yield
        finally:
            trainer.precision, tf.cast = own, cast


@contextlib.contextmanager
def layers(chosen: Iterable) -> Iterator[None]:
    """The given layers, and those inside them, compute in float32."""
    with contextlib.ExitStack() as stack:
        for layer in chosen:
            stack.enter_context(keras_compat.policy(layer, "float32"))
        yield


def holds(graph: tf.Graph) -> bool:
    """Whether nothing in a traced graph, or in the functions that it calls, computes in 16 bits."""
    nodes = [node for node in forward_graph.all_nodes(graph) if node.op not in _MOVES]
    return forward_graph.dtypes(map(_without_source, nodes)).isdisjoint(SIXTEEN_BITS)


def _without_source(node):
    """Returns a cast's node without the dtype that it casts from."""
    if node.op == "Cast":
        copy = type(node)()
        copy.CopyFrom(node)
        del copy.attr["SrcT"]
        return copy
    return node


def _wide_cast(original: Callable, x, dtype, name=None):
    return original(x, tf.float32 if tf.as_dtype(dtype) in SIXTEEN_BITS else dtype, name)
