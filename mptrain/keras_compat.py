"""The one place that knows the differences between Keras 3, tf_keras and plain `tf.Module`s.

Everything else sees layers, paths and `tf.Variable`s.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator

import keras
import tensorflow as tf
import tf_keras
from keras.src.utils import naming  # private: only here can Keras 3's automatic names start afresh

from mptrain.errors import InputError


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and TensorFlow, from which unseeded initializers draw, and starts automatic names afresh.

    Automatic names ("dense_3") count up over a process's life; a variable's path must not depend on what was built before.
    """
    keras.utils.set_random_seed(seed)
    naming.reset_uids()
    tf_keras.backend.reset_uids()


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Layers that are created inside take the dtype policy `name` ("mixed_float16", ...) unless they name their own."""
    policies = (
        (keras.config.dtype_policy, keras.config.set_dtype_policy),
        (tf_keras.mixed_precision.global_policy, tf_keras.mixed_precision.set_global_policy),
    )
    before = [get() for get, _ in policies]
    try:
        for _, set_policy in policies:
            set_policy(name)
        yield
    finally:
        for (_, set_policy), policy in zip(policies, before, strict=True):
            set_policy(policy)


def raw(variable) -> tf.Variable:
    """Returns the `tf.Variable` inside a Keras 3 variable; others as they are."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def is_keras_layer(module: tf.Module) -> bool:
    return isinstance(module, (keras.Layer, tf_keras.layers.Layer))


def variables_by_path(variables: Iterable) -> dict[str, tf.Variable]:
    """Returns {path: variable} in the given order; a path that stands twice gets "#2", "#3" ..."""
    by_path = {}
    for variable in variables:
        path = variable.path if isinstance(variable, keras.Variable) else variable.name.split(":")[0]
        unique, count = path, 1
        while unique in by_path:
            count += 1
            unique = f"{path}#{count}"
        by_path[unique] = raw(variable)
    return by_path


def layers_by_path(model, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (path, layer) of every innermost layer of a Keras model, in the order of creation, each once."""
    seen = set()

    def walk(layer, path):
        children = [child for child in layer._flatten_layers(include_self=False, recursive=False) if not _is_input(child)]
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                child_path = f"{path}/{child.name}"
                inner = list(walk(child, child_path))
                if not inner or _owns_variables(child, inner):
                    yield child_path, child
                yield from inner

    yield from walk(model, prefix or model.name)


def set_policy(layer, name: str) -> None:
    """Gives a Keras layer, built or not, and all layers inside it the dtype policy `name`; variables keep their dtype."""
    for each in layer._flatten_layers():
        if isinstance(each, keras.Layer):
            each.dtype_policy = name
        else:
            each._set_dtype_policy(tf_keras.mixed_precision.Policy(name))  # tf_keras has no public way once a layer exists


def all_layers_by_path(model) -> Iterator[tuple[str, object]]:
    """Yields (path, layer) of every layer below a Keras model, containers too; a shared layer under each of its paths."""

    def walk(layer, path):
        for child in layer._flatten_layers(include_self=False, recursive=False):
            if not _is_input(child):
                yield f"{path}/{child.name}", child
                yield from walk(child, f"{path}/{child.name}")

    yield from walk(model, model.name)


def _is_input(layer) -> bool:
    return isinstance(layer, (keras.layers.InputLayer, tf_keras.layers.InputLayer))


def _owns_variables(layer, inner) -> bool:
    below = {id(variable) for _, child in inner for variable in child.variables}
    return any(id(variable) not in below for variable in layer.variables)


def statistics(model) -> list[tf.Variable]:
    """Returns the variables that a forward pass may write, such as BatchNorm's: not trainable by nature.

    Weights of frozen layers, which are not trainable by choice, are left out: nothing writes them.
    """
    if not is_keras_layer(model):
        return list(model.non_trainable_variables)
    found = {}
    for layer in model._flatten_layers():
        own = layer._non_trainable_variables if isinstance(layer, keras.Layer) else layer._non_trainable_weights
        found |= {id(variable): raw(variable) for variable in own}
    return list(found.values())


def bind_seeds(model, draw: Callable[[int], tf.Tensor]) -> None:
    """Makes the generators behind dropout and noise of a Keras model take their seeds from `draw(stream)`.

    Args:
        model: Keras 3 or tf_keras; a `tf.Module` has no such generators.
        draw: returns a seed, int32 [2]; the generators are numbered from 1, in the order of creation.
    """
    for stream, generator in enumerate(_seed_generators(model), start=1):
        if isinstance(generator, keras.random.SeedGenerator):
            generator.next = lambda ordered=True, stream=stream: draw(stream)
        else:  # tf_keras: private, because its public seeds are state that no checkpoint holds
            generator._rng_type, generator._built = generator.RNG_STATELESS, True
            generator.make_seed_for_stateless_op = lambda stream=stream: draw(stream)


def _seed_generators(model) -> Iterator:
    for layer in model._flatten_layers() if is_keras_layer(model) else ():
        if isinstance(layer, keras.Layer):
            yield from layer._seed_generators
        elif getattr(layer, "_random_generator", None) is not None:
            yield layer._random_generator


def import_class(path: str) -> type:
    """Returns the class at "package.module.Class".

    Raises:
        ImportError: where the module or the class is not there.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"module {module!r} has no class {name!r}") from error


def read_tf_keras_loss_scale(path: str) -> tuple[float, int]:
    """Returns (loss scale, applied steps in a row) from a checkpoint with a tf_keras LossScaleOptimizer in it.

    Args:
        path: prefix of the checkpoint, as `tf.train.Checkpoint.save` returned it.

    Raises:
        InputError: if there is no such checkpoint, or not exactly one loss scale in it.
    """
    try:
        reader = tf.train.load_checkpoint(path)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is no TensorFlow checkpoint: {str(error).splitlines()[0]}") from error
    names = reader.get_variable_to_shape_map()
    found = [name for name in names if "loss_scale/current_loss_scale/" in name]
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} loss scales of a tf_keras LossScaleOptimizer: one is needed")
    good_steps = found[0].replace("current_loss_scale", "good_steps")
    return float(reader.get_tensor(found[0])), int(reader.get_tensor(good_steps))


class InnerOptimizer:
    """One face for the optimizers that a `LossScaleOptimizer` can wrap.

    Attributes:
        apply: takes float32 gradients, already summed over the replicas, and their variables; updates the variables in the
            replica it is called in, without another all-reduce.
        build: creates the slots of the given variables.
    """

    def __init__(self, optimizer):
        if not callable(getattr(optimizer, "apply_gradients", None)):
            raise TypeError(f"the inner optimizer must have apply_gradients(grads_and_vars): {optimizer!r} has none")
        if isinstance(optimizer, (keras.optimizers.LossScaleOptimizer, tf_keras.mixed_precision.LossScaleOptimizer)):
            raise TypeError(f"{type(optimizer).__name__} scales losses itself: wrap the optimizer inside it")
        self.optimizer = optimizer
        self.apply, self.build = _apply_and_build(optimizer)

    @property
    def variables(self) -> dict[str, tf.Variable]:
        found = getattr(self.optimizer, "variables", ())
        return variables_by_path(found() if callable(found) else found)

    @property
    def learning_rate(self):
        """The learning rate of the next update: a float32 scalar, or None where the optimizer has none."""
        rate = getattr(self.optimizer, "learning_rate", None)
        if callable(rate) and not isinstance(rate, (tf.Variable, keras.Variable)):
            rate = rate(self.optimizer.iterations)
        return None if rate is None else tf.cast(tf.convert_to_tensor(rate), tf.float32)


def _apply_and_build(optimizer) -> tuple[Callable, Callable]:
    if isinstance(optimizer, keras.optimizers.Optimizer):
        # Keras 3 always sums over replicas and has no switch. Replaced once, here, and not around each call: replica
        # threads interleave.
        optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
        return optimizer.apply_gradients, optimizer.build
    if isinstance(optimizer, tf_keras.optimizers.Optimizer):
        return lambda pairs: optimizer.apply_gradients(pairs, skip_gradients_aggregation=True), optimizer.build
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        return (
            lambda pairs: optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False),
            optimizer._create_all_weights,
        )
    return optimizer.apply_gradients, getattr(optimizer, "build", lambda variables: None)
