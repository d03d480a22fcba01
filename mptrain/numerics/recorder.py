"""Which tensors of a train step are looked at: found while the step is traced, in any `Trainer`, without changing it.

Outputs are those of Keras layers, of the named scopes of a plain `tf.Module`, what `watch` was given, and what stands between
them (see `places`). Their gradients are asked of the step's own tape, beside those of the weights; nothing is put into the
step's graph but what counts.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from mptrain import forward_graph, keras_calls, keras_compat
from mptrain.dynamic_scale import DynamicScale
from mptrain.gradients import to_float32, with_each_row_once
from mptrain.loss_scale import LossScaleOptimizer
from mptrain.numerics import tally
from mptrain.numerics.places import GRADIENT, OUTPUT, WEIGHT, Call, Forward, Site

_recorders: list["Recorder"] = []  # that are recording now


@dataclasses.dataclass(frozen=True)
class Counted:
    """What one replica's run of a function showed: `sites`, and of each a row.

    Attributes:
        sites: what was looked at.
        counts, largest, scales: as `tally.count` takes and returns them; per replica.
        gradients: {path of a variable: what the optimizer was given and did not apply}; unscaled, dense, float32; per replica.
    """

    sites: Sequence[Site]
    counts: tf.Tensor
    largest: tf.Tensor
    scales: tf.Tensor
    gradients: dict[str, tf.Tensor]


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
    """What one replica's thread has recorded of the function it traces."""

    graph = None

    def begin(self) -> None:
        self.graph = tf.compat.v1.get_default_graph()
        self.home = self.graph.get_name_scope()  # entered anew where replicas part again, after an update that all took
        self.scopes, self.entered, self.named = [], [], []
        self.scales = {}  # scaled loss -> its scale
        self.found = {}  # (site, scale) -> [tensor]
        self.in_gradient = False
        self.given = {}  # path of a variable -> [gradients that an optimizer was given and did not apply]


class Recorder:
    """Records what the replicas of one traced step do.

    Args:
        trainer: whose model's layers' paths, and trained variables' paths, name what is found.
        dry: whether optimizers shall apply nothing, and say that the step was skipped.
        gradients: whether the gradients that were not applied are wanted too.
    """

    def __init__(self, trainer, dry: bool, gradients: bool):
        model = trainer.model
        layers = [(model.name, model)] if keras_compat.is_keras_layer(model) else []
        layers += keras_compat.all_layers_by_path(model)
        known = {id(layer) for _, layer in layers}
        layers += [(path, layer) for path, layer in keras_compat.all_layers_by_path(trainer) if id(layer) not in known]
        self._strategy = trainer.strategy
        self._layers = {id(layer): path for path, layer in reversed(layers)}
        self._by_scope = not keras_compat.is_keras_layer(model)
        self._trained = keras_compat.variables_by_path(trainer.trainable_variables)
        self._variables = {id(variable): path for path, variable in self._trained.items()}
        inner_last = sorted(layers, key=lambda pair: pair[0].count("/"))
        owners = {id(keras_compat.raw(v)): path for path, layer in inner_last for v in layer.variables}
        self._owners = {path: owners[id(v)] for path, v in self._trained.items() if id(v) in owners}
        self._dry = dry
        self._gradients = gradients
        self._trace = _Trace()

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Counted]]:
        """Yields a list that gets what each function showed that the strategy was given to run in its replicas."""
        function = type(tf.function(lambda: None))
        replaced = [
            (tf.GradientTape, "gradient", self._gradient),
            (LossScaleOptimizer, "get_scaled_loss", self._scaled),
            (function, "__call__", self._inlined),
        ]
        if self._dry:
            replaced.append((LossScaleOptimizer, "apply_gradients", self._not_applied))
        if self._by_scope:
            replaced += [(tf.name_scope, "__enter__", self._enter), (tf.name_scope, "__exit__", self._exit)]
        replacements = [(owner, name, _replacing(getattr(owner, name), method)) for owner, name, method in replaced]
        if self._dry:  # a static scale is a constant, which could not be tried at another value
            replacements.append((DynamicScale, "used", property(lambda scale: tf.convert_to_tensor(scale.value))))
            replacements.append((DynamicScale, "_is_one", property(lambda scale: False)))
        found = []
        self._trace.begin()
        self._status = tf.__internal__.autograph.control_status_ctx()  # in which AutoGraph converts, as in a `tf.function`
        with contextlib.ExitStack() as stack:
            self._calls = stack.enter_context(keras_calls.recorded())
            _recorders.append(self)
            stack.callback(_recorders.remove, self)
            for owner, name, replacement in replacements:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, replacement)
            self._strategy.run = _replacing(self._strategy.run, functools.partial(self._run, found))
            stack.callback(delattr, self._strategy, "run")  # of this one strategy, over its class's own
            yield found

    def watched(self, name: str, tensor: tf.Tensor) -> None:
        if self._is_here() and tensor.dtype.is_floating:
            self._trace.named.append((name, tensor))

    def _run(self, found: list[Counted], original: Callable, fn: Callable, args=(), kwargs=None, options=None):
        """Stands for `strategy.run`: what each replica traces is recorded, and counted when it is traced."""
        status = tf.__internal__.autograph.control_status_ctx()
        fn = tf.__internal__.autograph.tf_convert(fn, status, convert_by_default=False)  # as `strategy.run` does
        sites = []

        @tf.autograph.experimental.do_not_convert
        def looked_at(*args, **kwargs):
            self._calls.begin()
            self._trace.begin()
            result = fn(*args, **kwargs)
            sites[:], rows = self._count()  # the same in all replicas
            return result, rows, self._given() if self._gradients else {}

        result, rows, gradients = original(looked_at, args=args, kwargs=kwargs or {}, options=options)
        found.append(Counted(sites, *rows, gradients))
        return result

    def _count(self) -> tuple[list[Site], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
        """Counts what was recorded; returns the sites, and counts, largest magnitudes and loss scales of each."""
        found, one = self._trace.found, tf.constant(1.0)
        for place in self._forward().places():
            found.setdefault((place.site(OUTPUT), one.ref()), []).append(place.tensor)
        if not found:
            return [], tally.nothing()
        scales = [scale.deref() for _, scale in found]
        of = [row for row, tensors in enumerate(found.values()) for _ in tensors]
        tensors = [tensor for tensors in found.values() for tensor in tensors]
        counts, largest = tally.count(tensors, [scales[row] for row in of])
        rows = len(found)
        counts, largest = tf.math.unsorted_segment_sum(counts, of, rows), tf.math.unsorted_segment_max(largest, of, rows)
        return [site for site, _ in found], (counts, largest, tf.stack(scales))

    def _given(self) -> dict[str, tf.Tensor]:
        return {
            path: tf.add_n([tf.convert_to_tensor(to_float32(gradient)) for gradient in found])
            for path, found in self._trace.given.items()
        }

    def _forward(self) -> Forward:
        """Returns what has been computed so far."""
        keras = [
            Call(self._layers.get(id(call.layer), call.layer.name), call.operations, call.inputs, call.outputs)
            for call in self._calls.calls
        ]
        calls = sorted([*keras, *self._trace.scopes], key=lambda call: (call.operations.start, -call.operations.stop))
        return Forward(self._trace.graph, calls, self._trace.named)

    def _is_here(self) -> bool:
        return tf.compat.v1.get_default_graph() is self._trace.graph

    def _inlined(self, original: Callable, function, *args, **kwargs):
        """Stands for the call of a `tf.function`: the step traces it as if it were none, so that nothing is hidden."""
        if not self._is_here():
            return original(function, *args, **kwargs)
        return tf.__internal__.autograph.tf_convert(function.python_function, self._status)(*args, **kwargs)

    def _enter(self, original: Callable, scope: tf.name_scope) -> str:
        full = original(scope)
        if self._is_here():
            entered, name = self._trace.entered, scope.name.rstrip("/")
            if entered and not name.startswith(f"{entered[-1][0]}/"):  # that of a `tf.Module` may be its full name
                name = f"{entered[-1][0]}/{name}"
            entered.append((name, len(self._trace.graph.get_operations())))
        return full

    def _exit(self, original: Callable, scope: tf.name_scope, *error) -> None:
        if self._is_here() and self._trace.entered:
            path, begin = self._trace.entered.pop()
            if path not in ("", self._trace.home) and not self._calls.running:
                self._trace.scopes.append(Call(path, range(begin, len(self._trace.graph.get_operations()))))
        return original(scope, *error)

    def _scaled(self, original: Callable, optimizer: LossScaleOptimizer, loss) -> tf.Tensor:
        scale, scaled = optimizer.loss_scale, original(optimizer, loss)
        if self._is_here():
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
        forward = self._forward()
        outputs = [place for place in forward.places() if place.after is None]
        self._trace.in_gradient = True
        try:
            result, found = original(tape, target, (sources, [place.tensor for place in outputs]), *args, **kwargs)
        finally:
            self._trace.in_gradient = False
        scale = self._scale_of(target)
        read = self._first_reads(forward)
        paths = [self._variables.get(id(variable)) for variable in variables]
        sites = [place.site(GRADIENT) for place in outputs] + [path and self._weight(path, forward, read) for path in paths]
        for site, gradient in zip(sites, [*found, *tf.nest.flatten(result)], strict=True):
            if site is not None and gradient is not None:
                if isinstance(gradient, tf.IndexedSlices):
                    gradient = with_each_row_once(to_float32(gradient)).values
                self._trace.found.setdefault((site, scale.ref()), []).append(gradient)
        return result

    def _weight(self, path: str, forward: Forward, read: dict[str, int]) -> Site:
        owner = self._owners.get(path)
        if owner is None:
            reader = forward.maker(read.get(path, -1))
            owner = reader.path if reader else path.rpartition("/")[0] or path
        return Site(path, WEIGHT, layer=owner, position=read.get(path, -1))

    def _first_reads(self, forward: Forward) -> dict[str, int]:
        """Returns {path of a variable: the place of the first operation that takes it}."""
        inside = {id(outer): inner for outer, inner in self._trace.graph.captures}
        found = {}
        for path, variable in self._trained.items():
            taken = inside.get(id(variable.handle))  # this replica's own
            if taken is not None:
                results = [tensor for taker in taken.consumers() for tensor in taker.outputs]
                found[path] = min(map(forward.position, results), default=-1)
        return found

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


def _replacing(original: Callable, method: Callable) -> Callable:
    @functools.wraps(original)
    def call(*args, **kwargs):
        return method(original, *args, **kwargs)

    return call
