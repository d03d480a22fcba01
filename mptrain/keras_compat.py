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


def generation(model) -> str | None:
    """Returns "keras" or "tf_keras" for a model that one of them can save whole; None for others."""
    if isinstance(model, keras.Model):
        return "keras"
    return "tf_keras" if isinstance(model, tf_keras.Model) else None


def own_classes(model) -> list[str]:
    """Returns the paths of the classes in a Keras model that are not Keras's: who loads a saved one must have them."""
    classes = {type(layer) for layer in layers_in(model)}
    return sorted(f"{each.__module__}.{each.__qualname__}" for each in classes if each.__module__.split(".")[0] not in _KERAS)


_KERAS = ("keras", "tf_keras")


def variables_by_path(variables: Iterable) -> dict[str, tf.Variable]:
    """Returns {path: variable} in the given order; a path that stands twice gets "#2", "#3" ..."""
    by_path = {}
    for variable in variables:
        unique, count = path(variable), 1
        while unique in by_path:
            count += 1
            unique = f"{path(variable)}#{count}"
        by_path[unique] = raw(variable)
    return by_path


def path(variable) -> str:
    """Returns where a variable stands in its model, as "encoder/dense1/kernel"."""
    if (noted := getattr(raw(variable), _NOTE, None)) is not None:
        return noted
    return variable.path if isinstance(variable, keras.Variable) else variable.name.split(":")[0]


def key(variable) -> str:
    """Returns what the wrappers of one variable share: Keras's, tf_keras's that casts, and the replicas' parts of it."""
    variable = raw(variable)
    container = getattr(variable, "_distributed_container", None)
    return (container() if container else variable)._unique_id


_NOTE = "_mptrain_path"


def note_paths(model) -> None:
    """Notes on each variable of a plain `tf.Module` where it stands, as "encoder/dense1/w": its name alone is only "w".

    On the variable itself, so that an optimizer, which is given nothing but variables, calls it the same.
    """
    if is_keras_layer(model):
        return
    paths = {}
    for where, found in _parts(model):
        if is_keras_layer(found):
            for below, variable in variables_by_path(found.variables).items():
                paths.setdefault(id(variable), (f"{where}/{below.removeprefix(f'{found.name}/')}", variable))
        else:
            paths.setdefault(id(found), (where, found))
    for where, variable in paths.values():
        setattr(variable, _NOTE, where)


def _parts(module: tf.Module) -> Iterator[tuple[str, object]]:
    """Yields (path of attributes, variable or Keras layer) for all that stands in a `tf.Module`, the outer before the inner."""

    def is_part(value) -> bool:
        return isinstance(value, tf.Variable) or is_keras_layer(value)

    # Private, but described to subclasses: the one walk over attributes, lists and dicts that tf.Module itself makes.
    for path, found in module._flatten(predicate=is_part, with_path=True):
        yield "/".join(map(str, path)), found


def _outer_layers(model) -> Iterator[tuple[str, object]]:
    """Yields (path, layer): a Keras model itself, or the Keras layers in a `tf.Module` that stand in no other layer."""
    if is_keras_layer(model):
        yield model.name, model
        return
    seen = set()
    for path, found in _parts(model):
        if is_keras_layer(found) and id(found) not in seen:
            seen.update(id(layer) for layer in found._flatten_layers())
            yield path, found


def variables(model) -> list:
    """Returns every variable of a Keras model; of a `tf.Module` also those of the Keras 3 layers in it."""
    return _variables(model, "variables")


def trainable_variables(model) -> list:
    """Returns the trainable variables of a Keras model; of a `tf.Module` also those of the Keras 3 layers in it."""
    return _variables(model, "trainable_variables")


def _variables(model, kind: str) -> list:
    found = list(getattr(model, kind))
    if is_keras_layer(model) or getattr(type(model), kind) is not getattr(tf.Module, kind):  # it says itself which
        return found
    known = {id(raw(variable)) for variable in found}  # tf.Module finds tf_keras's variables, and none of Keras 3's
    inside = [variable for _, layer in _outer_layers(model) for variable in getattr(layer, kind)]
    return found + [variable for variable in inside if id(raw(variable)) not in known]


def is_built(model) -> bool:
    """Whether a model has its variables without having been called."""
    layers = [layer for _, layer in _outer_layers(model)]
    return all(layer.built for layer in layers) and (bool(layers) or bool(model.variables))


def layers_by_path(model) -> Iterator[tuple[str, object]]:
    """Yields (path, layer) of every layer that computes: innermost ones, and others that own variables; each once.

    In the order of creation. A Keras model is one of them where it has weights of its own.
    """
    seen = set()

    def walk(layer, path):
        for child in children(layer):
            if id(child) not in seen:
                seen.add(id(child))
                yield from with_inner(child, f"{path}/{child.name}")

    def with_inner(layer, path):
        if layer is not model and not children(layer) or _owns_variables(layer):
            yield path, layer
        yield from walk(layer, path)

    for path, layer in _outer_layers(model):
        yield from with_inner(layer, path)


def all_layers_by_path(model) -> Iterator[tuple[str, object]]:
    """Yields (path, layer) of every layer in a model, containers too; a shared layer under each of its paths."""

    def walk(layer, path):
        for child in children(layer):
            yield f"{path}/{child.name}", child
            yield from walk(child, f"{path}/{child.name}")

    for path, layer in _outer_layers(model):
        if layer is not model or _owns_variables(layer):
            yield path, layer
        yield from walk(layer, path)


def layers_in(layer) -> list:
    """Returns a Keras layer and all layers inside it."""
    return list(layer._flatten_layers())


def set_policy(layer, name: str) -> None:
    """Gives a Keras layer, built or not, and all layers inside it the dtype policy `name`; variables keep their dtype."""
    for each in layers_in(layer):
        _set_one_policy(each, name if isinstance(each, keras.Layer) else tf_keras.mixed_precision.Policy(name))
        if name == "float32" and isinstance(each, keras.layers.InputLayer) and each.dtype in ("float16", "bfloat16"):
            _set_input_dtype(each, name)


def _set_input_dtype(layer: keras.layers.InputLayer, dtype: str) -> None:
    """Sets what a model casts its inputs to: 16 bits where it is a Sequential that was built by such inputs.

    Private: Keras fixes it once and for all.
    """
    layer._dtype = layer.output._dtype = dtype


def _set_one_policy(layer, policy) -> None:
    if isinstance(layer, keras.Layer):
        layer.dtype_policy = policy
    else:
        layer._set_dtype_policy(policy)  # tf_keras has no public way once a layer exists


@contextlib.contextmanager
def policy(layer, name: str) -> Iterator[None]:
    """Gives a Keras layer and all layers inside it the dtype policy `name` for as long as the context lasts."""
    before = [(each, each.dtype_policy) for each in layers_in(layer)]
    inputs = [(each, each.dtype) for each, _ in before if isinstance(each, keras.layers.InputLayer)]
    try:
        set_policy(layer, name)
        yield
    finally:
        for each, its in before:
            _set_one_policy(each, its)
        for each, its in inputs:
            _set_input_dtype(each, its)


def _is_input(layer) -> bool:
    return isinstance(layer, (keras.layers.InputLayer, tf_keras.layers.InputLayer))


def _owns_variables(layer) -> bool:
    below = {id(variable) for inner in layers_in(layer)[1:] for variable in inner.variables}
    return any(id(variable) not in below for variable in layer.variables)


def casts_inputs(layer) -> bool:
    """Whether a Keras layer casts what it is given to its compute dtype."""
    return layer.autocast if isinstance(layer, keras.Layer) else layer._autocast  # private: tf_keras tells nobody


def statistics(model) -> list[tf.Variable]:
    """Returns the variables that a forward pass may write, such as BatchNorm's: not trainable by nature.

    Weights of frozen layers, which are not trainable by choice, are left out: nothing writes them.
    """
    found = {} if is_keras_layer(model) else {id(variable): variable for variable in model.non_trainable_variables}
    for layer in all_layers(model):
        own = layer._non_trainable_variables if isinstance(layer, keras.Layer) else layer._non_trainable_weights
        found |= {id(raw(variable)): raw(variable) for variable in own}
    return list(found.values())


def all_layers(model) -> Iterator:
    """Yields every Keras layer in a model, containers too."""
    for _, layer in _outer_layers(model):
        yield from layers_in(layer)


def synchronize_batch_norm(model) -> None:
    """Makes the BatchNorm layers of a model, built or not, normalize over the batches of all replicas together."""
    for layer in all_layers(model):
        if isinstance(layer, (keras.layers.BatchNormalization, tf_keras.layers.BatchNormalization)):
            layer.synchronized = True
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            layer.fused = False  # one kernel that knows its own replica only


def bind_seeds(model, draw: Callable[[int], tf.Tensor]) -> None:
    """Makes the generators behind dropout and noise of a Keras model take their seeds from `draw(stream)`.

    Args:
        model: a Keras model, or a `tf.Module` with Keras layers in it.
        draw: returns a seed, int32 [2]; the generators are numbered from 1, in the order of creation.
    """
    for stream, generator in enumerate(_seed_generators(model), start=1):
        if isinstance(generator, keras.random.SeedGenerator):
            generator.next = lambda ordered=True, stream=stream: draw(stream)
        else:  # tf_keras: private, because its public seeds are state that no checkpoint holds
            generator._rng_type, generator._built = generator.RNG_STATELESS, True
            generator.make_seed_for_stateless_op = lambda stream=stream: draw(stream)


def _seed_generators(model) -> Iterator:
    for layer in all_layers(model):
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


def children(layer) -> list:
    """Returns the layers directly inside a Keras layer, but for those that only stand for a model's inputs."""
    inside = layer._flatten_layers(include_self=False, recursive=False)  # private: only models list their layers publicly
    return [child for child in inside if not _is_input(child)]


def with_mask_of(source, tensor):
    """Returns `tensor` with the Keras mask that `source` carries, if any, as Keras 3's own casts do.

    The attribute is private, and the only place in which Keras 3 hands a mask from one layer to the next.
    """
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        tensor._keras_mask = mask
    return tensor
