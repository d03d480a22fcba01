"""What an exported model computes: a trainer's `serve`, traced alone, with plain variables in the place of the trainer's.

The traced graph is put into a module that knows nothing of Keras, of mptrain or of a `tf.distribute` strategy, so it loads
with TensorFlow alone and computes what it computed here, operation by operation.
"""

import contextlib
from collections.abc import Iterator, Mapping

import keras
import tensorflow as tf

from mptrain import keras_compat, precision, step_check
from mptrain.errors import InputError, one_line
from mptrain.forward_graph import SIXTEEN_BITS, all_nodes

SIGNATURE = "serving_default"
_PASSING_ON = ("Placeholder", "Identity", "_Arg")  # what may be 16 bits wide in a float32 export: an input that is


class Serving(tf.Module):
    """A trainer's `serve` as it is now, by itself.

    Args:
        trainer: a `Trainer`. Its weights' averages are taken where there are such.
        as_trained: whether 16-bit layers keep their dtype, and the kernels those of evaluation; else they compute in float32.

    Attributes:
        weights: path -> variable, of those that `serve` reads.
        inputs: name -> `tf.TensorSpec`, [None, ...]: what must be given.
        outputs: name -> `tf.TensorSpec`: what comes back.
        serve: the concrete function of the signature.

    Raises:
        InputError: if `serve` cannot be traced for a batch of any size, or does not return dense tensors; or if it computes in
            16 bits where float32 was asked for.
    """

    def __init__(self, trainer, *, as_trained: bool):
        super().__init__(name="serving")
        name = f"{type(trainer).__name__}.serve()"
        given = _batch(trainer)
        with trainer.kernels.scope() if as_trained else in_float32(trainer):
            traced = _trace(name, trainer, given)
        if not as_trained:
            _check_is_float32(name, traced.graph)
        placeholders = dict(zip(sorted(given), traced.inputs, strict=False))
        self.inputs = {key: given[key] for key in sorted(given) if placeholders[key].consumers()}
        self.weights, self._tables = {}, []
        captured = traced.inputs[len(given) :]
        with trainer.optimizer.averaged_weights():
            stand_ins = [self._stand_in(trainer, traced, outer) for outer in traced.captured_inputs]
        inside = {tensor.name: value for tensor, value in zip(captured, stand_ins, strict=True)}
        self.serve = self._signature(traced, {key: placeholders[key].name for key in self.inputs}, inside)
        self.outputs = {key: _spec(key, tensor) for key, tensor in self.serve.structured_outputs.items()}

    def _stand_in(self, trainer, traced, captured: tf.Tensor) -> tf.Tensor:
        """Returns what takes the place of something that the traced graph reads: of a variable, one of the module's own."""
        if captured.dtype != tf.resource:
            return captured
        variable = next((each for each in traced.variables if each.handle is captured), None)
        if variable is None:
            self._tables.append(_owner(trainer, captured))
            return captured
        path = _path(trainer, variable)
        self.weights[path] = tf.Variable(variable.numpy(), trainable=variable.trainable, name=path, dtype=variable.dtype)
        return self.weights[path].handle

    def _signature(self, traced, places: Mapping[str, str], inside: Mapping[str, tf.Tensor]):
        definition, keys = traced.graph.as_graph_def(), list(traced.structured_outputs)

        @tf.function(autograph=False)
        def serve(**inputs):
            given = {places[key]: tf.ensure_shape(inputs[key], spec.shape) for key, spec in self.inputs.items()}
            captured = {name: tf.identity(value) for name, value in inside.items()}  # brings it into this graph
            wanted = [tensor.name for tensor in traced.outputs]
            found = tf.graph_util.import_graph_def(definition, {**given, **captured}, wanted, name="")
            return dict(zip(keys, found, strict=True))

        return serve.get_concrete_function(**self.inputs)


def named(outputs) -> dict[str, tf.Tensor]:
    """Returns a model's outputs by name: one tensor is "outputs", a part of a tuple "outputs_1", of a mapping its keys.

    Raises:
        InputError: if they are not dense tensors.
    """
    named = {}
    for path, tensor in keras.tree.flatten_with_path(outputs):
        key = "_".join(map(str, path))
        key = key if key and not key[0].isdigit() else "_".join(filter(None, ["outputs", key]))
        if not isinstance(tensor, tf.Tensor):
            raise InputError(f"returns {tensor!r} as {key!r}: return dense tensors")
        named[key] = tensor
    return named


@contextlib.contextmanager
def in_float32(trainer) -> Iterator[None]:
    """16-bit layers compute in float32; read by Keras and by the trainer while a graph is traced or a model is saved."""
    own = trainer.precision
    layers = {id(layer): layer for _, layer in keras_compat.all_layers_by_path(trainer)}
    layers |= {id(layer): layer for _, layer in keras_compat.all_layers_by_path(trainer.model)}
    sixteen = [layer for layer in layers.values() if layer.compute_dtype in [dtype.name for dtype in SIXTEEN_BITS]]
    with contextlib.ExitStack() as stack:
        for layer in sixteen:
            stack.enter_context(keras_compat.policy(layer, "float32"))
        if own.compute_dtype in SIXTEEN_BITS:
            trainer.precision = precision.get("float32")
        try:
            yield
        finally:
            trainer.precision = own


def _batch(trainer) -> dict[str, tf.TensorSpec]:
    """Returns the specs of a batch of any size."""
    return {key: tf.TensorSpec([None, *spec.shape], spec.dtype, key) for key, spec in trainer.serving_spec().items()}


def _trace(name: str, trainer, batch: Mapping[str, tf.TensorSpec]):
    """Returns the concrete function of `serve`; its structured outputs are a mapping."""

    def serve(batch):
        try:
            # As one of the replicas: read across them, BatchNorm's statistics in tf_keras would be a sum over all.
            with step_check.telling(name), tf.distribute.ReplicaContext(trainer.strategy, 0):
                outputs = trainer.serve(batch)
        except KeyError as error:
            if error.args[0] in batch or error.args[0] not in trainer.eval_source.spec:
                raise
            raise InputError(
                f"{name} reads batch[{error.args[0]!r}], which is not in a served batch: override serving_spec(), or inputs()"
                " so that it does without"
            ) from error
        try:
            return named(outputs)
        except InputError as error:
            raise InputError(f"{name} {one_line(error)}") from error

    try:
        traced = tf.function(serve).get_concrete_function(dict(batch))
    except InputError as error:
        raise InputError(one_line(error)) from error
    except (ValueError, TypeError) as error:
        reason = one_line(error).splitlines()[-1].strip()
        raise InputError(
            f"{name} cannot be traced for a batch of any size: {reason}; take the size from tf.shape(x)[0], or -1"
        ) from error
    return traced


def _check_is_float32(name: str, graph: tf.Graph) -> None:
    for node in all_nodes(graph):
        computes = node.op not in _PASSING_ON and not any(value.HasField("func") for value in node.attr.values())
        kinds = ["DstT"] if node.op == "Cast" else list(node.attr)
        numbers = [number for kind in kinds for number in (node.attr[kind].type, *node.attr[kind].list.type) if number]
        wide = [dtype.name for dtype in map(tf.as_dtype, numbers) if dtype in SIXTEEN_BITS]
        if computes and wide:
            raise InputError(
                f"{name} computes {node.name!r} in {wide[0]} by a cast of its own: write config.export.precision='as_trained'"
            )


def _path(trainer, variable) -> str:
    """Returns the path of a variable, or of the distributed variable that it is a part of."""
    for path, whole in keras_compat.variables_by_path(keras_compat.variables(trainer.model)).items():
        if any(part is variable for part in trainer.strategy.experimental_local_results(whole)):
            return path
    return variable.name.split(":")[0]


def _owner(trainer, resource: tf.Tensor):
    """Returns the table, or the like, that a captured resource belongs to: an attribute of the trainer, the model or a layer.

    Raises:
        InputError: if it is none of them, so that it could not be saved.
    """
    layers = [layer for _, layer in keras_compat.all_layers_by_path(trainer.model)]
    for holder in (trainer, trainer.model, *layers):
        for value in vars(holder).values():
            if getattr(value, "resource_handle", None) is resource:
                return value
    raise InputError(
        f"{type(trainer).__name__}.serve() uses a resource that cannot be saved: keep its table in an attribute of the trainer"
        " or the model"
    )


def _spec(key: str, tensor: tf.Tensor) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype, key)
