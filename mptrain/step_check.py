"""What must not be done in a step, found while it is traced and told in one line. Nothing of it is left in the graph.

A step is traced once: its Python code runs that one time, and its tensors have no values. What Python keeps of it (a list that
grows, a counter, a tensor in an attribute) is not what a reader of the code expects.
"""

import contextlib
import pathlib
import random
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from mptrain import keras_compat
from mptrain.autograph import as_written
from mptrain.errors import InputError

_ONCE = "once, while the step is traced, and never again"
_INSTEAD = "use a metric, or a tf.Variable made in build_model()"
_OWNERS = tuple(
    each
    for generation in (keras, tf_keras)
    for each in (generation.layers.Layer, generation.metrics.Metric, generation.optimizers.Optimizer)
)
_LIBRARIES = [str(pathlib.Path(module.__file__).parent) for module in (tf, keras, tf_keras, np, contextlib)]
_LIBRARIES += [str(pathlib.Path(__file__).parent), "<"]


@contextlib.contextmanager
def watching(trainer, method: str) -> Iterator[None]:
    """The context in which a trainer's `method` is traced.

    Raises:
        InputError: if it creates variables, reads the value of a tensor, changes an attribute of the trainer or of a layer or
            module in it, leaves a tensor there, or draws from the random state of Python or NumPy.
    """
    name = f"{type(trainer).__name__}.{method}()"
    before = _Marks(trainer)
    with telling(name), _no_variables(name, trainer):
        yield
    before.compare(name, _Marks(trainer))


@contextlib.contextmanager
def telling(name: str) -> Iterator[None]:
    """Makes one line of the errors by which TensorFlow says that the function `name` does what only eager code can do.

    Raises:
        InputError: for such an error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        for kind, pattern, line in _TOLD:
            if isinstance(error, kind) and (match := re.search(pattern, str(error))):
                raise InputError(f"{name}{_place(error)} {line.format(*match.groups())}") from error
        raise


_NO_VALUE = "which has no value while the step is traced: compute with TensorFlow, tf.print it, or update a metric"
_TENSOR = "'(?:Symbolic)?Tensor'"
_TOLD = (
    (AttributeError, f"{_TENSOR} object has no attribute '(numpy|item|tolist)'", f"calls .{{}}() on a tensor, {_NO_VALUE}"),
    (NotImplementedError, "Cannot convert a symbolic tf.Tensor", f"gives NumPy a tensor, {_NO_VALUE}"),
    (TypeError, rf"(int|float|complex)\(\) argument must be .* not {_TENSOR}", f"calls {{}}() on a tensor, {_NO_VALUE}"),
    (
        tf.errors.OperatorNotAllowedInGraphError,
        "as a Python `bool`",
        "takes a tensor for a Python bool where AutoGraph does not convert the code: write tf.cond or tf.where",
    ),
    (
        tf.errors.OperatorNotAllowedInGraphError,
        "Iterating over",
        "iterates over a tensor where AutoGraph does not convert the code: write tf.map_fn or tf.while_loop",
    ),
    (
        RuntimeError,
        "cross-replica context",
        "calls the strategy, which only works outside the replicas, and runs in one: call the function itself, and sum over the"
        " replicas with tf.distribute.get_replica_context().all_reduce()",
    ),
    (
        ValueError,
        "every gradient is None",
        "gets no gradient for any trainable variable: compute model and loss inside `with tf.GradientTape()`, from these"
        " variables, without tf.stop_gradient",
    ),
)


@as_written
def applied(name: str, returned, optimizers: Iterable[str]) -> tf.Tensor | Mapping[str, tf.Tensor]:
    """Returns what a train step returned.

    Args:
        name: the step's.
        returned: by it.
        optimizers: their names; an only one is called "".

    Raises:
        InputError: if that is not whether the step was applied, a bool scalar; or of several optimizers {name: bool scalar}.
    """
    several = list(optimizers)
    if several == [""]:
        return _one_applied(name, returned)
    if not (isinstance(returned, Mapping) and returned.keys() == set(several)):
        raise InputError(
            f"{name} returns {returned!r}: return {{name: applied}}, what apply_gradients() of each optimizer returned, for"
            f" {' and '.join(several)}"
        )
    return {each: _one_applied(f"{name}[{each!r}]", value) for each, value in returned.items()}


def _one_applied(name: str, returned) -> tf.Tensor:
    end = "end it with `return applied`, what optimizer.apply_gradients() returned"
    if returned is None:
        raise InputError(f"{name} returns nothing: {end}")
    if isinstance(returned, bool):
        return tf.constant(returned)
    if tf.is_tensor(returned) and returned.dtype == tf.bool and returned.shape.rank == 0:
        return returned
    what = f"{returned.dtype.name} {returned.shape}" if tf.is_tensor(returned) else f"a {type(returned).__name__}"
    raise InputError(f"{name} returns {what}: {end}")


@contextlib.contextmanager
def _no_variables(name: str, trainer) -> Iterator[None]:
    """Refuses variables, also those that Keras creates outside the graph that is being traced.

    Raises:
        InputError: naming what creates one.
    """

    def refuse(next_creator, **options):
        variable = options.get("name") or "Variable"
        if "seed_generator" in variable:
            raise InputError(f"{name} draws from Keras's global generator: give it seed=self.randomness.draw()")
        owner = _owner()
        of = f" of {_named(owner, trainer)}" if owner is not None else ""
        raise InputError(f"{name} creates the variable {variable!r}{of} while it is traced: {_where_to_build(owner)}")

    with tf.init_scope():
        outside = tf.variable_creator_scope(refuse)
        outside.__enter__()
    try:
        with tf.variable_creator_scope(refuse):
            yield
    finally:
        outside.__exit__(None, None, None)


def _owner():
    """Returns the Keras layer, metric or optimizer that is creating a variable, by the frames of the calls; or None."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), _OWNERS):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _named(owner, trainer) -> str:
    attributes = [f"self.{name}" for name, value in vars(trainer).items() if value is owner]
    return " ".join([type(owner).__name__, attributes[0] if attributes else repr(owner.name)])


def _where_to_build(owner) -> str:
    if isinstance(owner, (keras.optimizers.Optimizer, tf_keras.optimizers.Optimizer)):
        return "wrap it in a LossScaleOptimizer and build() it in build_optimizer()"
    if isinstance(owner, (keras.metrics.Metric, tf_keras.metrics.Metric)):
        return "call its update_state() once in build_metrics(), and then reset_state()"
    return "make it in build_model(), and build it there"


def _place(error: Exception) -> str:
    """Returns the place in the user's code at which an error was raised, as " (file.py, line 7)"; "" where it is not known."""
    metadata = getattr(error, "ag_error_metadata", None)  # AutoGraph's: of generated code, the lines it was made from
    frames = [(frame.filename, frame.lineno) for frame in metadata.translated_stack] if metadata else []
    frames += [(frame.filename, frame.lineno) for frame in reversed(traceback.extract_tb(error.__traceback__))]
    for file, line in frames:
        if not file.startswith(tuple(_LIBRARIES)) and "__autograph_generated_file" not in file:
            return f" ({pathlib.Path(file).name}, line {line})"
    return ""


class _Marks:
    """What a step must leave as it is: attributes of a trainer, its layers and modules; random states.

    Args:
        trainer: whose attributes are looked at.
    """

    def __init__(self, trainer):
        holders = {"self": trainer}
        layers = [*keras_compat.all_layers_by_path(trainer), *keras_compat.all_layers_by_path(trainer.model)]
        holders |= {f"layer {path}": layer for path, layer in layers}
        holders |= {f"module {m.name} ({type(m).__name__})": m for m in trainer.submodules if not isinstance(m, _OWNERS)}
        holders = {place: holder for place, holder in holders.items() if holder is trainer or not _is_installed(holder)}
        self._marks = {
            f"{place}.{name}": _mark(value)
            for place, holder in holders.items()
            for name, value in _attributes(holder).items()
            if not name.startswith("_" if isinstance(holder, _OWNERS) else ("_self_", "_obj_"))
        }
        self._marks["np.random"] = _Random([repr(np.random.get_state())])
        self._marks["random"] = _Random(random.getstate())

    def compare(self, name: str, now: "_Marks") -> None:
        """Raises InputError for the first difference that says what should not be."""
        for place, mark in now._marks.items():
            before = self._marks.get(place)
            if mark != before and (fault := _fault(place, before, mark)):
                raise InputError(f"{name} {fault}")


def _attributes(holder) -> dict[str, object]:
    """Returns the attributes of an object, and the numbers and texts that its classes give it."""
    given = {name: value for each in reversed(type(holder).__mro__) for name, value in vars(each).items()}
    return {name: value for name, value in given.items() if isinstance(value, (int, float, str))} | vars(holder)


def _is_installed(holder) -> bool:
    """Whether the class is a library's, whose layers may keep what they like."""
    file = getattr(sys.modules.get(type(holder).__module__), "__file__", None) or ""
    return file.startswith(tuple(_LIBRARIES)) or "site-packages" in file or "dist-packages" in file


class _Tensor(int):
    """The identity of a tensor in a graph."""


class _Random(tuple):
    """The state of a random generator."""


def _mark(value):
    """Returns what tells whether a value has changed; None for what may."""
    if isinstance(value, tf.Tensor) and not hasattr(value, "numpy"):
        return _Tensor(id(value))
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, set)):
        return [_mark(each) or id(each) for each in value]
    if isinstance(value, dict):
        return {key: _mark(each) for key, each in value.items()}
    if isinstance(value, np.random.Generator):
        return _Random([repr(value.bit_generator.state)])
    if isinstance(value, np.random.RandomState):
        return _Random([repr(value.get_state())])
    return _Random(value.getstate()) if isinstance(value, random.Random) else None


def _fault(place: str, before, now) -> str | None:
    """Returns what a step did that changed a mark, or None where that does no harm, as setting what is the same each time."""
    parts = now if isinstance(now, list) else now.values() if isinstance(now, dict) else [now]
    if any(isinstance(part, _Tensor) for part in parts):
        return f"keeps a tensor of the traced step in {place}: return it, or {_INSTEAD}"
    if isinstance(now, _Random):
        return f"draws from {place} {_ONCE}: draw from self.randomness" if isinstance(before, _Random) else None
    if isinstance(now, dict):
        kept = before if isinstance(before, dict) else {}
        changed = [key for key in now if kept.get(key) is not None and kept[key] != now[key]]
        return f"changes {place}[{changed[0]!r}] {_ONCE}: {_INSTEAD}" if changed else None
    if before is None or now is None:
        return None
    return f"changes {place} {_ONCE}: {_INSTEAD}"
