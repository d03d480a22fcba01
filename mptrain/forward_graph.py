"""What the graph of one traced forward pass shows, without computing it: dtypes, the order of variables, the last layers.

`trace` is the way in; `last_layers` and `dtype_on_the_way` look at a graph while it is being traced, before anything rewrites
it (see `half_kernels`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf
from tensorflow.core.framework import node_def_pb2

from mptrain import keras_calls, keras_compat
from mptrain.keras_calls import LayerCall

SIXTEEN_BITS = (tf.float16, tf.bfloat16)


@dataclasses.dataclass(frozen=True)
class Forward:
    """One traced forward pass.

    Attributes:
        dtypes: of all its tensors, also of those in functions that it calls.
        outputs: what the model returned, flattened.
        calls: the calls of Keras layers, in forward order.
        last: those that made the outputs: the last ones with parameters, and those without behind them.
        read: the resources that the graph reads, in the order of the first reading.
    """

    dtypes: frozenset[tf.DType] = frozenset()
    outputs: Sequence = ()
    calls: Sequence[LayerCall] = ()
    last: Sequence[LayerCall] = ()
    read: Sequence[tf.Tensor] = ()

    def in_order(self, variables: Iterable) -> list:
        """Returns the variables in the order in which the forward pass first reads them, unread ones behind."""
        places = {id(handle): place for place, handle in enumerate(self.read)}

        def place(variable) -> int:
            first, *_ = tf.distribute.get_strategy().experimental_local_results(keras_compat.raw(variable))
            return places.get(id(first.handle), len(places))

        return sorted(variables, key=place)


def trace(model: Callable, loss: Callable, batch) -> Forward:
    """Traces `loss(batch, model(batch))`.

    Args:
        model: takes the batch and returns the model's outputs.
        loss: takes the batch and these outputs; what it returns does not matter.
        batch: a structure of `tf.TensorSpec`s.
    """
    seen = {}

    def forward(batch):
        with keras_calls.recorded() as record:
            outputs = model(batch)
        seen.update(calls=record.calls, outputs=tf.nest.flatten(outputs), last=last_layers(outputs, record.calls))
        loss(batch, outputs)

    concrete = tf.function(forward).get_concrete_function(batch)
    return Forward(dtypes=dtypes(all_nodes(concrete.graph)), read=concrete.captured_inputs, **seen)


@tf.autograph.experimental.do_not_convert
def last_layers(outputs, calls: Iterable[LayerCall]) -> list[LayerCall]:
    """Returns the calls that made the outputs: the last ones of layers with parameters, and of those without behind them."""
    makers = {}
    for call in calls:
        if call.innermost:
            for tensor in call.outputs:
                makers.setdefault(tensor.ref(), []).append(call)
    found = {}

    def is_end(tensor: tf.Tensor) -> bool:
        found.update({id(call): call for call in makers.get(tensor.ref(), ())})
        return any(call.layer.weights for call in makers.get(tensor.ref(), ()))

    for _ in backwards(_tensors(outputs), is_end):
        pass
    return list(found.values())


@tf.autograph.experimental.do_not_convert
def dtype_on_the_way(losses: tf.Tensor, outputs) -> tf.DType | None:
    """Returns the 16-bit dtype through which the outputs reach the losses, or None.

    What a network computes with its own weights, such as a teacher in float16, does not count.
    """
    starts = {tensor.ref() for tensor in _tensors(outputs)}

    def is_start(tensor: tf.Tensor) -> bool:
        return tensor.ref() in starts

    def is_end(tensor: tf.Tensor) -> bool:
        return is_start(tensor) or tensor.dtype in SIXTEEN_BITS

    for tensor in backwards([losses], is_end):
        if is_start(tensor):
            continue
        inside = {tensor.dtype, *_dtypes_in_functions(tensor.op)}
        sixteen = [dtype for dtype in SIXTEEN_BITS if dtype in inside]
        if sixteen:
            before = list(backwards([tensor], is_start))
            reads = any(source.dtype == tf.resource for each in before for source in each.op.inputs)
            if any(map(is_start, before)) and not reads:
                return sixteen[0]
    return None


@tf.autograph.experimental.do_not_convert
def depends_on(losses: tf.Tensor, outputs) -> bool:
    """Whether losses are computed from the outputs, or from any variable."""
    starts = {tensor.ref() for tensor in _tensors(outputs)}
    return any(tensor.ref() in starts or tensor.dtype == tf.resource for tensor in backwards([losses]))


def dtypes(nodes: Iterable[node_def_pb2.NodeDef]) -> frozenset[tf.DType]:
    values = [value for node in nodes for value in node.attr.values()]
    return frozenset(tf.as_dtype(number) for value in values for number in (value.type, *value.list.type) if number)


def all_nodes(graph: tf.Graph) -> list[node_def_pb2.NodeDef]:
    """Returns the nodes of a graph, and of all functions that it calls."""
    definition = graph.as_graph_def()
    return [*definition.node, *(node for function in definition.library.function for node in function.node_def)]


def _dtypes_in_functions(op: tf.Operation) -> frozenset[tf.DType]:
    """Returns the dtypes of all tensors in the functions that an operation calls, and in those that these call."""
    nodes, todo = [], [op.node_def]
    library = None
    while todo:
        names = {value.func.name for node in todo for value in node.attr.values() if value.HasField("func")}
        if names and library is None:
            library = {function.signature.name: function for function in op.graph.as_graph_def().library.function}
        todo = [node for name in names if name in library for node in library.pop(name).node_def]
        nodes += todo
    return dtypes(nodes)


def backwards(tensors: Iterable[tf.Tensor], is_end: Callable[[tf.Tensor], bool] = lambda tensor: False) -> Iterator[tf.Tensor]:
    """Yields the tensors and those they are computed from, each once, going on behind those that are no end."""
    seen, todo = set(), list(tensors)
    while todo:
        tensor = todo.pop()
        if tensor.ref() not in seen:
            seen.add(tensor.ref())
            yield tensor
            if not is_end(tensor):
                todo.extend(tensor.op.inputs)


def _tensors(tree) -> list[tf.Tensor]:
    return [value for value in tf.nest.flatten(tree, expand_composites=True) if tf.is_tensor(value)]
