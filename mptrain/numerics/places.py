"""Whose each tensor of a traced forward pass is: which layer computed it, in which of its calls, or what stands between layers.

A call, of a layer or of a named scope, is a range of the graph's operations, and an operation belongs to the innermost call
that it was made in. So a layer that passes on what one inside it returns computes nothing by itself, and what is computed
between two layers belongs to what is around both.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import tensorflow as tf

from mptrain import forward_graph

OUTPUT, GRADIENT, WEIGHT = "output", "gradient", "weight"
_STORED = ("ReadVariableOp", "Const", "VarHandleOp")  # no values of the forward pass


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in the step whose values are counted.

    Attributes:
        path: of a layer, of a scope, as given to `watch`, of what lies between two of them, or of a trained variable.
        kind: "output", "gradient" (of an output) or "weight" (the gradient of a variable).
        call: which call of its layer, from 1; of a weight, whose gradient is the sum over all calls, 1.
        dtype: the name of its dtype.
        layer: the path of the layer, scope, watched tensor or what lies between, that it belongs to.
        position: its place in forward order; of a weight, where it is first read.
        computed_by: the path of the layer or scope that an output is computed in; "": the trainer's own step.
        after: of what lies between two layers, the path of the first, or "" where there is none before it; else None.
    """

    path: str
    kind: str
    call: int = 1
    dtype: str = dataclasses.field(default="float32", compare=False)
    layer: str = dataclasses.field(default="", compare=False)
    position: int = dataclasses.field(default=0, compare=False)
    computed_by: str = dataclasses.field(default="", compare=False)
    after: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer or a scope.

    Attributes:
        path: of the layer or scope.
        operations: the places, in the graph, of the operations made in it.
        given: the tensors it was given; of a scope None: what its operations take from outside.
        returned: those that it returned; of a scope None: what others take from its operations.
    """

    path: str
    operations: range
    given: Sequence[tf.Tensor] | None = None
    returned: Sequence[tf.Tensor] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A tensor that is looked at.

    Attributes:
        tensor: of a floating dtype.
        path: of the layer, the scope or the watched tensor; or of what lies between two of them.
        call: which call of those with this path, from 1.
        position: the place of its operation in the graph.
        computed_by: the path of what its operation was made in; "" where that is the trainer's own step.
        after: the path of the last thing before it, where it lies between two; "" where there is none.
    """

    tensor: tf.Tensor
    path: str
    call: int
    position: int
    computed_by: str
    after: str | None = None

    def site(self, kind: str) -> Site:
        """Returns where its values are counted, or those of its gradient."""
        dtype = self.tensor.dtype.name
        return Site(self.path, kind, self.call, dtype, self.path, self.position, self.computed_by, self.after)


class Forward:
    """The calls of a graph, and what was computed in them.

    Args:
        graph: that was traced.
        calls: in the order in which they began.
        watched: (name, tensor) of what was named explicitly.
    """

    def __init__(self, graph: tf.Graph, calls: Sequence[Call], watched: Iterable[tuple[str, tf.Tensor]]):
        self._graph = graph
        self._operations = graph.get_operations()
        self._positions = {operation.name: place for place, operation in enumerate(self._operations)}
        self._calls = calls
        self._watched = list(watched)

    def position(self, tensor: tf.Tensor) -> int:
        return self._positions[tensor.op.name]

    def maker(self, position: int) -> Call | None:
        """Returns the innermost call that the operation at this place was made in."""
        around = [call for call in self._calls if position in call.operations]
        return min(around, key=lambda call: len(call.operations), default=None)

    def places(self) -> list[Place]:
        """Returns everything that is looked at, in forward order."""
        made, counted = [], collections.Counter()
        for call in self._calls:
            own = [t for t in self._returned(call) if t.dtype.is_floating and self.maker(self.position(t)) is call]
            counted[call.path] += bool(own)
            made += [Place(tensor, call.path, counted[call.path], self.position(tensor), call.path) for tensor in own]
        for name, tensor in self._watched:
            counted[name] += 1
            made.append(Place(tensor, name, counted[name], self.position(tensor), name))
        found = {place.tensor.ref(): place for place in made}
        return sorted([*made, *self._between(found, counted)], key=lambda place: place.position)

    def _between(self, made: dict, counted: collections.Counter) -> Iterator[Place]:
        """Yields what calls are given that no call returned: what is computed between them, or comes from the data."""
        seen = set(made)
        for call in self._calls:
            for tensor in self._given(call):
                if tensor.ref() in seen or not tensor.dtype.is_floating or tensor.op.type in _STORED:
                    continue
                seen.add(tensor.ref())
                before = forward_graph.backwards([tensor], lambda each: each.ref() in made)
                sources = [made[each.ref()] for each in before if each.ref() in made]
                after = max(sources, key=lambda place: place.position, default=None)
                path = _between(after.path if after else "", call.path)
                counted[path] += 1
                position = self.position(tensor)
                maker = self.maker(position)
                by = maker.path if maker else ""
                yield Place(tensor, path, counted[path], position, by, after.path if after else "")

    def _returned(self, call: Call) -> Iterable[tf.Tensor]:
        if call.returned is not None:
            return {tensor.ref(): tensor for tensor in call.returned if self._is_here(tensor)}.values()
        made = [tensor for place in call.operations for tensor in self._operations[place].outputs]
        return [tensor for tensor in made if any(self._is_outside(call, each) for each in tensor.consumers())]

    def _given(self, call: Call) -> Iterable[tf.Tensor]:
        if call.given is not None:
            return [tensor for tensor in call.given if self._is_here(tensor)]
        taken = [tensor for place in call.operations for tensor in self._operations[place].inputs]
        return [tensor for tensor in taken if self.position(tensor) not in call.operations]

    def _is_here(self, tensor: tf.Tensor) -> bool:
        return getattr(tensor, "graph", None) is self._graph  # a constant of Python's has no graph

    def _is_outside(self, call: Call, operation: tf.Operation) -> bool:
        backward = "gradient_tape/" in operation.name
        return not backward and self.maker(self._positions.get(operation.name, -1)) is not call


def _between(before: str, behind: str) -> str:
    """Returns a path for what lies between two, beginning with what their paths have in common."""
    parts, others = before.split("/"), behind.split("/")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    if not before:
        shared = len(others) - 1
    rest = f"before {'/'.join(others[shared:])}"
    if before:
        rest = f"between {'/'.join(parts[shared:])} and {'/'.join(others[shared:])}"
    return "/".join([*others[:shared], rest])
