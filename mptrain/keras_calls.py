"""How the Keras layers of a model are called: a record made while the model is traced."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf
import tf_keras

from mptrain import keras_compat

_RNNS = (keras.layers.RNN, tf_keras.layers.RNN)


@dataclasses.dataclass(eq=False)
class LayerCall:
    """One call of a Keras layer.

    Attributes:
        layer: the layer.
        inputs: the tensors it was given, before it cast them.
        outputs: the tensors it returned.
        innermost: whether it called no other layer.
        operations: the places of the operations that were made in it, among those of the graph.
    """

    layer: object
    inputs: list[tf.Tensor]
    outputs: list[tf.Tensor] = dataclasses.field(default_factory=list)
    innermost: bool = True
    operations: range = range(0)

    def casts_16_bits(self) -> bool:
        """Whether the layer casts a 16-bit input to another dtype, in which it computes."""
        given = {tensor.dtype for tensor in self.inputs if tensor.dtype in (tf.float16, tf.bfloat16)}
        return any(dtype.name != self.layer.compute_dtype for dtype in given) and keras_compat.casts_inputs(self.layer)

    def computes(self) -> bool:
        """Whether the layer has weights and is given floating tensors, which it casts if need be."""
        floating = any(tensor.dtype.is_floating for tensor in self.inputs)
        return floating and bool(self.layer.weights) and keras_compat.casts_inputs(self.layer)


class Record(threading.local):
    """The calls of Keras layers in one graph, in forward order; each replica's thread has its own.

    Attributes:
        graph: the graph whose calls are recorded. Calls in graphs inside it, such as those of an RNN's cell, belong to the
            layer that is called outside.
        calls: what was recorded.
    """

    def __init__(self):
        self.graph = None
        self.calls: list[LayerCall] = []
        self.running: list[LayerCall] = []

    def begin(self) -> None:
        """Starts anew, with the graph that this thread is tracing."""
        self.graph, self.calls, self.running = tf.compat.v1.get_default_graph(), [], []


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Yields a record of the calls of Keras layers, which begins in the graph that is being traced.

    For as long as the context lasts, both generations' `Layer.__call__` is replaced: Keras offers no hook that sees inputs
    before their cast.
    """
    record = Record()
    record.begin()
    bases = (keras.Layer, tf_keras.layers.Layer)
    originals = [base.__call__ for base in bases]
    try:
        for base, original in zip(bases, originals, strict=True):
            base.__call__ = _recording(original, record)
        yield record
    finally:
        for base, original in zip(bases, originals, strict=True):
            base.__call__ = original


def _recording(original: Callable, record: Record) -> Callable:
    @functools.wraps(original)
    def __call__(layer, *args, **kwargs):
        running = record.running
        in_rnn = running and isinstance(running[-1].layer, _RNNS)  # calls its cell here once, to see what it returns
        if in_rnn or tf.compat.v1.get_default_graph() is not record.graph:
            return original(layer, *args, **kwargs)
        call = LayerCall(layer, _tensors((args, kwargs)))
        record.calls.append(call)
        for outer in running:
            outer.innermost = False
        running.append(call)
        begin = len(record.graph.get_operations())
        try:
            outputs = original(layer, *args, **kwargs)
        finally:
            running.pop()
        call.operations = range(begin, len(record.graph.get_operations()))
        call.outputs = _tensors(outputs)
        return outputs

    return __call__


def _tensors(tree) -> list[tf.Tensor]:
    return [value for value in tf.nest.flatten(tree, expand_composites=True) if isinstance(value, tf.Tensor)]
