"""Which tensors of a train step are looked at: found while the step is traced, in any `Trainer`, without changing it.

Outputs are those of Keras layers, of the named scopes of a plain `tf.Module`, and what `watch` was given. Their gradients are
asked of the step's own tape, beside those of the weights; nothing is put into the step's graph but what counts.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator

import tensorflow as tf

from mptrain import forward_graph, keras_calls, keras_compat
from mptrain.gradients import to_float32
from mptrain.loss_scale import LossScaleOptimizer
from mptrain.numerics import tally

OUTPUT, GRADIENT, WEIGHT = "output", "gradient", "weight"
_recorders: list["Recorder"] = []  # that are recording now


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in the step whose values are counted.

    Attributes:
        path: of a layer, of a scope, as given to `watch`, or of a trained variable.
        kind: "output", "gradient" (of an output) or "weight" (the gradient of a variable).
        dtype: the name of its dtype.
        layer: the path of the layer, scope or watched tensor it belongs to.
    """

    path: str
    kind: str
    dtype: str = dataclasses.field(compare=False)
    layer: str = dataclasses.field(compare=False)


def watch(name: str, tensor: tf.Tensor) -> tf.Tensor:
    """Makes `tensor` show in reports as `name`, as a layer's output does; returns it. Costs nothing outside of a report.

    Args:
        name: the path to show it under.
        tensor: of a floating dtype; in a plain `tf.Module` or wherever something is computed outside of a layer.
    """
    for recorder in _recorders:
        recorder.watched(name, tensor)
    return tensor


class _Trace(threading.local):
    """What one replica's thread has recorded of the step it traces."""

    def begin(self) -> None:
        self.graph = tf.compat.v1.get_default_graph()
        self.prefix = f"{self.graph.get_name_scope()}/".lstrip("/")  # such as replica_1/
        self.first = len(self.graph.get_operations())
        self.scopes, self.named = {}, []
        self.scales = {}  # scaled loss -> its scale
        self.found = {}  # (path, kind, scale) -> [tensor]
        self.in_gradient = False
        self.given = {}  # path of a variable -> [gradients that an optimizer was given and did not apply]


class Recorder:
    """Records one traced step.

    Args:
        trainer: whose model's layers' paths, and trained variables' paths, name what is found.
        dry: whether optimizers shall apply nothing, and say that the step was skipped.
    """

    def __init__(self, trainer, dry: bool):
        layers = list(keras_compat.all_layers_by_path(trainer.model))
        known = {id(layer) for _, layer in layers} | {id(trainer.model)}
        layers += [(path, layer) for path, layer in keras_compat.all_layers_by_path(trainer) if id(layer) not in known]
        self._layers = {id(layer): path for path, layer in reversed(layers)}
        self._by_scope = not keras_compat.is_keras_layer(trainer.model)
        trained = keras_compat.variables_by_path(trainer.trainable_variables)
        self._variables = {id(variable): path for path, variable in trained.items()}
        inner_last = sorted(layers, key=lambda pair: pair[0].count("/"))
        owners = {id(keras_compat.raw(v)): path for path, layer in inner_last for v in layer.variables}
        self._owners = {path: owners.get(id(v), path.rpartition("/")[0] or path) for path, v in trained.items()}
        self._dry = dry
        self._trace = _Trace()
        self.sites: list[Site] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records what replicas trace inside, each from its `begin` on."""
        replacements = [(tf.GradientTape, "gradient", self._gradient), (LossScaleOptimizer, "get_scaled_loss", self._scaled)]
        if self._dry:
            replacements.append((LossScaleOptimizer, "apply_gradients", self._not_applied))
        if self._by_scope:
            replacements.append((tf.name_scope, "__enter__", self._enter))
        originals = [getattr(owner, name) for owner, name, _ in replacements]
        with keras_calls.recorded() as self._calls:
            _recorders.append(self)
            try:
                for (owner, name, method), original in zip(replacements, originals, strict=True):
                    setattr(owner, name, _replacing(original, method))
                yield
            finally:
                for (owner, name, _), original in zip(replacements, originals, strict=True):
                    setattr(owner, name, original)
                _recorders.remove(self)

    def begin(self) -> None:
        """Begins with the graph that this replica's thread traces its step into."""
        self._calls.begin()
        self._trace.begin()

    def watched(self, name: str, tensor: tf.Tensor) -> None:
        if self._is_here() and tensor.dtype.is_floating:
            self._trace.named.append((name, tensor))

    def counts(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Counts what was recorded, once the step is traced; notes in `sites` what the rows are.

        Returns:
            Counts [sites, n], largest magnitudes [sites] and loss scales [sites], as `Tally` takes them.
        """
        found, one = self._trace.found, tf.constant(1.0)
        for path, tensor in self._outputs():
            found.setdefault((path, OUTPUT, one.ref()), []).append(tensor)
        self.sites = [
            Site(path, kind, tensors[0].dtype.name, self._owners[path] if kind == WEIGHT else path)
            for (path, kind, _), tensors in found.items()
        ]
        if not found:
            return tally.nothing()
        scales = [scale.deref() for *_, scale in found]
        of = [row for row, tensors in enumerate(found.values()) for _ in tensors]
        tensors = [tensor for tensors in found.values() for tensor in tensors]
        counts, largest = tally.count(tensors, [scales[row] for row in of])
        rows = len(self.sites)
        counts, largest = tf.math.unsorted_segment_sum(counts, of, rows), tf.math.unsorted_segment_max(largest, of, rows)
        return counts, largest, tf.stack(scales)

    def gradients(self) -> dict[str, tf.Tensor]:
        """Returns what optimizers were given and did not apply, by variable: unscaled, dense, float32; in a replica."""
        return {
            path: tf.add_n([tf.convert_to_tensor(to_float32(gradient)) for gradient in found])
            for path, found in self._trace.given.items()
        }

    def _is_here(self) -> bool:
        return tf.compat.v1.get_default_graph() is getattr(self._trace, "graph", None)

    def _enter(self, original: Callable, scope: tf.name_scope) -> str:
        name = original(scope)
        if self._is_here() and not self._calls.running:
            path = name.removeprefix(self._trace.prefix).rstrip("/")
            if path:  # the replica's own scope is entered anew where replicas part again, after an update that all took
                self._trace.scopes[path] = name
        return name

    def _scaled(self, original: Callable, optimizer: LossScaleOptimizer, loss) -> tf.Tensor:
        scale, scaled = optimizer.loss_scale, original(optimizer, loss)
        self._trace.scales[scaled.ref()] = scale
        return scaled

    def _gradient(self, original: Callable, tape: tf.GradientTape, target, sources, *args, **kwargs):
        """Asks the tape for the gradients of the outputs too, in the same backward pass.

        Only where trained variables are asked for, and not inside another backward pass: a gradient that the loss is made of,
        or that is computed anew to save memory, is no gradient of the loss.
        """
        variables = [keras_compat.raw(source) for source in tf.nest.flatten(sources)]
        trained = any(id(variable) in self._variables for variable in variables)
        if not trained or not self._is_here() or self._trace.in_gradient:
            return original(tape, target, sources, *args, **kwargs)
        outputs = self._outputs()
        self._trace.in_gradient = True
        try:
            result, found = original(tape, target, (sources, [tensor for _, tensor in outputs]), *args, **kwargs)
        finally:
            self._trace.in_gradient = False
        scale = self._scale_of(target)
        places = [(path, GRADIENT) for path, _ in outputs] + [(self._variables.get(id(v)), WEIGHT) for v in variables]
        for (path, kind), gradient in zip(places, [*found, *tf.nest.flatten(result)], strict=True):
            if path is not None and gradient is not None:
                values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
                self._trace.found.setdefault((path, kind, scale.ref()), []).append(values)
        return result

    def _not_applied(self, original: Callable, optimizer: LossScaleOptimizer, grads_and_vars) -> tf.Tensor:
        """Notes the gradients, and says that the step was skipped."""
        for gradient, variable in grads_and_vars if self._is_here() else ():
            path = self._variables.get(id(keras_compat.raw(variable)))
            if path is not None and gradient is not None:
                self._trace.given.setdefault(path, []).append(gradient)
        return tf.constant(False)

    def _scale_of(self, target) -> tf.Tensor:
        """Returns the loss scale that is in a target, such as a scaled loss or a sum of them; 1 where there is none."""
        for tensor in forward_graph.backwards(tf.nest.flatten(target)):
            if tensor.ref() in self._trace.scales:
                return self._trace.scales[tensor.ref()]
        return tf.constant(1.0)

    def _outputs(self) -> list[tuple[str, tf.Tensor]]:
        """Returns (path, tensor) of what has been computed so far, in forward order."""
        found, inside = [], set()
        for call in reversed(self._calls.calls):  # inner calls come before the outer ones, which often return the same
            path = self._layers.get(id(call.layer))
            given = {tensor.ref() for tensor in call.inputs}
            made = [tensor for tensor in call.outputs if tensor.ref() not in given]  # what is passed on is its maker's
            found += [(path, t) for t in made if path and t.dtype.is_floating and t.ref() not in inside]
            inside |= {tensor.ref() for tensor in made}
        found += [*self._trace.named, *self._scope_outputs()]
        places = {operation.name: place for place, operation in enumerate(self._trace.graph.get_operations())}
        return sorted(found, key=lambda item: places[item[1].op.name])

    def _scope_outputs(self) -> Iterator[tuple[str, tf.Tensor]]:
        """Yields what the named scopes compute and others use."""
        operations = self._trace.graph.get_operations()[self._trace.first :]
        for path, scope in self._trace.scopes.items():
            for operation in operations:
                if not operation.name.startswith(scope):
                    continue
                for tensor in operation.outputs:
                    if tensor.dtype.is_floating and any(_is_outside(scope, each.name) for each in tensor.consumers()):
                        yield path, tensor


def _is_outside(scope: str, name: str) -> bool:
    return not name.startswith(scope) and "gradient_tape/" not in name


def _replacing(original: Callable, method: Callable) -> Callable:
    @functools.wraps(original)
    def call(*args, **kwargs):
        return method(original, *args, **kwargs)

    return call
