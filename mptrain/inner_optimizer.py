"""One face for the optimizers that a `LossScaleOptimizer` can wrap, of both Keras generations and of neither."""

import inspect
import pathlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import keras
import tensorflow as tf
import tf_keras

from mptrain import fused_updates
from mptrain.autograph import as_written
from mptrain.errors import InputError
from mptrain.keras_compat import key, variables_by_path

_INSTEAD = {
    "loss_scale_factor": "leave it out: LossScaleOptimizer scales the loss",
    "gradient_accumulation_steps": "give LossScaleOptimizer accumulation_steps=",
    "use_ema": "give LossScaleOptimizer ema_momentum=",
}


class InnerOptimizer:
    """One face for the optimizers that a `LossScaleOptimizer` can wrap.

    The optimizer gets the variables as `build` was given them: a Keras 3 variable knows its path and its constraint, the
    `tf.Variable` inside it does not.

    Raises:
        TypeError: if the optimizer cannot be wrapped.
    """

    def __init__(self, optimizer):
        _check_can_be_wrapped(optimizer)
        self.optimizer = optimizer
        self._apply, self._create_slots = _apply_and_build(optimizer)
        self._trained = {}  # key -> variable
        self._frozen = set()  # keys of variables that the optimizer does not want to meet

    @property
    def trained(self) -> list:
        """The variables that `build` was given, each once, as they were given."""
        return list(self._trained.values())

    @property
    def variables(self) -> dict[str, tf.Variable]:
        """The optimizer's own variables by path."""
        return variables_by_path(_own_variables(self.optimizer, self._trained))

    @property
    def learning_rate(self):
        """The learning rate of the next update: a float32 scalar, or None where the optimizer has none."""
        rate = getattr(self.optimizer, "learning_rate", None)
        if callable(rate) and not isinstance(rate, (tf.Variable, keras.Variable)):
            rate = rate(self.optimizer.iterations)
        return None if rate is None else tf.cast(tf.convert_to_tensor(rate), tf.float32)

    def build(self, variables: Iterable) -> None:
        """Takes note of the variables to train and creates their slots."""
        for variable in variables:
            if getattr(self.optimizer, "is_frozen", lambda variable: False)(variable):
                self._frozen.add(key(variable))
            else:
                self._trained.setdefault(key(variable), variable)
        if not getattr(self.optimizer, "built", False):
            self._create_slots(self.trained)
        _adapt(self.optimizer)

    @as_written
    def is_frozen(self, variable) -> bool:
        """Whether a variable of `build` is one that the optimizer leaves as it is."""
        return key(variable) in self._frozen

    @as_written
    def place(self, variable) -> int:
        """Returns the place of a variable among those of `build`, whichever of its wrappers it comes in.

        Raises:
            ValueError: if it is not among them.
        """
        places = {each: place for place, each in enumerate(self._trained)}
        if key(variable) not in places:
            raise ValueError(f"{variable!r} is not among the variables that the optimizer was built with")
        return places[key(variable)]

    def apply(self, gradients: Iterable, places: Iterable[int]) -> None:
        """Updates the variables at `places` in the replica it is called in, without another all-reduce.

        Args:
            gradients: in the dtypes of the variables, summed over the replicas already.
            places: where the gradients' variables stand.
        """
        trained = self.trained
        self._apply([(gradient, trained[place]) for gradient, place in zip(gradients, places, strict=True)])


def _check_can_be_wrapped(optimizer) -> None:
    name = type(optimizer).__name__
    if not callable(getattr(optimizer, "apply_gradients", None)):
        raise TypeError(f"the inner optimizer must have apply_gradients(grads_and_vars): {optimizer!r} has none")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or hasattr(optimizer, "get_scaled_loss"):
        raise TypeError(f"{name} scales losses itself: wrap the optimizer inside it")
    if isinstance(optimizer, tf.compat.v1.train.Optimizer):
        raise TypeError(f"{name} is an optimizer of TensorFlow 1, which sums over replicas: use one of keras.optimizers")
    _own_variables(optimizer)
    for method in ("apply_gradients", "build"):
        if callable(getattr(optimizer, method, None)):
            _check_takes_one_argument(getattr(optimizer, method))
    if isinstance(optimizer, (keras.optimizers.Optimizer, tf_keras.optimizers.Optimizer)):
        for each in (optimizer, *getattr(optimizer, "optimizers", ())):  # those inside a MultiOptimizer
            for option, instead in _INSTEAD.items():
                if getattr(each, option, None):
                    raise TypeError(f"the inner {type(each).__name__} has {option}={getattr(each, option)}: {instead}")


def _check_takes_one_argument(method: Callable) -> None:
    try:
        inspect.signature(method).bind(None)
    except TypeError as error:
        what = "the list of (gradient, variable)" if method.__name__ == "apply_gradients" else "the list of variables"
        raise TypeError(f"{method.__qualname__} must take {what} as its one positional argument: {error}") from error


def _apply_and_build(optimizer) -> tuple[Callable, Callable]:
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer.apply_gradients, optimizer.build
    if isinstance(optimizer, tf_keras.optimizers.Optimizer):
        return lambda pairs: optimizer.apply_gradients(pairs, skip_gradients_aggregation=True), optimizer.build
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        return (
            lambda pairs: optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False),
            optimizer._create_all_weights,
        )
    return optimizer.apply_gradients, getattr(optimizer, "build", lambda variables: None)


def _adapt(optimizer) -> None:
    """Keeps Keras 3 optimizers, also in a `MultiOptimizer` or parameter groups, from summing over replicas; makes them fast.

    It always sums and has no switch. Replaced once, and not around each call: replica threads interleave.
    """
    for each in (optimizer, *getattr(optimizer, "optimizers", ())):
        if isinstance(each, keras.optimizers.Optimizer):
            each._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
            fused_updates.install(each)


def _own_variables(optimizer, trained: Container[str] = ()) -> list:
    """Returns the variables that an optimizer tells of; where it tells of none, those that its attributes hold.

    Raises:
        TypeError: if what it tells of are no variables.
    """
    found = getattr(optimizer, "variables", None)
    if found is None:
        held = _variables_in(getattr(optimizer, "__dict__", {}))
        return [variable for variable in held if key(variable) not in trained]
    found = found() if callable(found) else found
    found = list(found.values() if isinstance(found, Mapping) else found)
    for each in found:
        if not isinstance(each, (tf.Variable, keras.Variable)):
            raise TypeError(f"{type(optimizer).__name__}.variables holds {each!r}: it must hold the optimizer's tf.Variables")
    return found


def _variables_in(value) -> Iterator:
    if isinstance(value, (tf.Variable, keras.Variable)):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _variables_in(each)


def change_learning_rate(optimizer, change: Callable) -> None:
    """Replaces the learning rate of a Keras 3 optimizer, and of each inside a `MultiOptimizer`, before it is built.

    Args:
        optimizer: the optimizer.
        change: gets the schedule, or the constant rate as a float, and returns the new schedule.

    Raises:
        InputError: if it is no Keras 3 optimizer.
    """
    for each in getattr(optimizer, "optimizers", None) or [optimizer]:
        if not isinstance(each, keras.optimizers.Optimizer):
            raise InputError(
                f"config.plateau.metric is set, and the optimizer is {type(each).__module__}.{type(each).__name__}: return one"
                " of keras.optimizers from build_optimizer(), or set plateau.metric to ''"
            )
        rate = each._learning_rate  # `learning_rate` gives the value of a schedule, not the schedule
        each.learning_rate = change(float(rate) if isinstance(rate, keras.Variable) else rate)


def read_tf_keras_loss_scale(path: str) -> tuple[float, int]:
    """Returns (loss scale, applied steps in a row) from a checkpoint with a tf_keras LossScaleOptimizer in it.

    Args:
        path: prefix of the checkpoint, as `tf.train.Checkpoint.save` returned it; or a SavedModel's folder.

    Raises:
        InputError: if there is no such checkpoint, or not exactly one loss scale in it.
    """
    if (pathlib.Path(path) / "saved_model.pb").is_file():
        path = str(pathlib.Path(path) / "variables" / "variables")
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
