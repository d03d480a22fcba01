"""`Optimizers`: several optimizers in one train step, each with its own loss scale and its own part of the model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import tensorflow as tf

from mptrain import keras_compat
from mptrain.errors import InputError
from mptrain.loss_scale import LossScaleOptimizer


class Optimizers(tf.Module):
    """The optimizers of a step that makes several updates, such as a GAN's; what `Trainer.build_optimizer` may return.

        mptrain.Optimizers(
            generator=(super().build_optimizer(), self.model.generator),
            discriminator=(super().build_optimizer(), self.model.discriminator),
        )

    In `replica_train_step` each is found by its name, `self.optimizer["generator"]`, and used like an only one, for one update
    a step. The step then returns {name: applied}. A skipped update takes back what the step did to the statistics in its own
    part of the model and in no other; what lies in no part or in several, and the metrics, stay where all were applied.

    To those who watch a run it looks like one optimizer, whose counters count the updates of all.

    Args:
        parts: name -> (optimizer, what it trains: a layer, a model, a `tf.Module`, or a list of variables).

    Raises:
        TypeError: for something else than such pairs.
        InputError: if the optimizers accumulate over windows of different lengths.
    """

    def __init__(self, **parts: tuple[LossScaleOptimizer, object]):
        super().__init__(name="optimizers")
        for name, pair in parts.items():
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], LossScaleOptimizer)):
                raise TypeError(f"Optimizers({name}={pair!r}): write {name}=(a LossScaleOptimizer, the part that it trains)")
        windows = {optimizer.accumulation_steps for optimizer, _ in parts.values()}
        if len(windows) != 1:
            raise InputError(f"Optimizers with accumulation_steps {sorted(windows)}: give at least one, and all the same")
        (self.accumulation_steps,) = windows
        self._named = {name: optimizer for name, (optimizer, _) in parts.items()}
        self._trained = {name: _variables_of(part, keras_compat.trainable_variables) for name, (_, part) in parts.items()}
        self._owned = {name: _variables_of(part, keras_compat.variables) for name, (_, part) in parts.items()}

    def __getitem__(self, name: str) -> LossScaleOptimizer:
        return self._named[name]

    def items(self) -> Iterable[tuple[str, LossScaleOptimizer]]:
        """Returns the pairs (name, optimizer), in the order in which they were given."""
        return self._named.items()

    def trainable_variables(self, name: str) -> list:
        """Returns the variables that the optimizer `name` trains."""
        return list(self._trained[name])

    def owner(self, variable) -> str | None:
        """Returns the name of the optimizer in whose part of the model a variable lies; None if in no part or in several."""
        return _only(_names(self._owned, variable))

    def build(self, variables: Iterable) -> None:
        """Builds each optimizer with its own of the variables, in the order given; see `LossScaleOptimizer.build`.

        Raises:
            InputError: if one of them is trained by no optimizer, or by several.
        """
        variables = list(variables)
        for path, variable in keras_compat.variables_by_path(variables).items():
            names = _names(self._trained, variable)
            if _only(names) is None:
                raise InputError(
                    f"trainable variable {path!r} is trained by {' and '.join(names) or 'no optimizer'}: let each lie in the"
                    " part of one of the Optimizers that build_optimizer() returns"
                )
        for name, optimizer in self.items():
            optimizer.build([variable for variable in variables if name in _names(self._trained, variable)])

    @property
    def loss_scale(self) -> tf.Tensor:
        """The lowest of the loss scales, float32 scalar."""
        return tf.reduce_min([optimizer.loss_scale for _, optimizer in self.items()])

    @property
    def gradient_norm(self) -> tf.Tensor:
        """The global norm of all gradients of the last updates, float32 scalar; inf or NaN if one was skipped."""
        return tf.norm([optimizer.gradient_norm for _, optimizer in self.items()])

    @property
    def applied_steps(self) -> tf.Tensor:
        """Number of updates that were applied, of all optimizers together, int64 scalar."""
        return tf.add_n([optimizer.applied_steps for _, optimizer in self.items()])

    @property
    def skipped_steps(self) -> tf.Tensor:
        """Number of updates that were skipped, of all optimizers together, int64 scalar."""
        return tf.add_n([optimizer.skipped_steps for _, optimizer in self.items()])

    @property
    def state(self) -> dict[str, tf.Variable]:
        """Everything that a checkpoint must hold, by the optimizer's name and the path in it."""
        return self._by_path("state")

    @property
    def window(self) -> dict[str, tf.Variable]:
        """The part of `state` that is needed only inside an accumulation window; empty without accumulation."""
        return self._by_path("window")

    def _by_path(self, kind: str) -> dict[str, tf.Variable]:
        return {f"{name}/{path}": v for name, optimizer in self.items() for path, v in getattr(optimizer, kind).items()}

    @property
    def has_average(self) -> bool:
        """Whether weights of one of them have averages; on the host."""
        return any(optimizer.has_average for _, optimizer in self.items())

    def window_starts(self) -> tf.Tensor:
        """Whether the next step is the first of an accumulation window, bool scalar."""
        return next(iter(self._named.values())).window_starts()

    def raise_if_stuck(self) -> None:
        """Ends a run in which one of the optimizers cannot recover; see `LossScaleOptimizer.raise_if_stuck`."""
        for _, optimizer in self.items():
            optimizer.raise_if_stuck()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The variables hold their moving averages inside this context, and their own values after it; on the host."""
        with contextlib.ExitStack() as stack:
            for _, optimizer in self.items():
                stack.enter_context(optimizer.averaged_weights())
            yield


def by_name(optimizer: LossScaleOptimizer | Optimizers) -> dict[str, LossScaleOptimizer]:
    """Returns name -> optimizer; an only one is called ""."""
    return dict(optimizer.items()) if isinstance(optimizer, Optimizers) else {"": optimizer}


def telemetry(optimizer: LossScaleOptimizer | Optimizers) -> dict[str, float]:
    """Returns what a train row tells of an optimizer; of several: of all together, and of each as "name/field"; on the host."""
    found = {}
    if not isinstance(optimizer, Optimizers) and (rate := optimizer.learning_rate) is not None:
        found["learning_rate"] = float(rate)
    found |= {
        "loss_scale": float(optimizer.loss_scale),
        "gradient_norm": float(optimizer.gradient_norm),
        "applied_steps": int(optimizer.applied_steps),
        "skipped_steps": int(optimizer.skipped_steps),
    }
    if isinstance(optimizer, Optimizers):
        for name, each in optimizer.items():
            found |= {f"{name}/{field}": value for field, value in telemetry(each).items()}
    return found


def _variables_of(part, kind: Callable) -> list[tf.Variable]:
    return [keras_compat.raw(variable) for variable in (kind(part) if hasattr(part, "trainable_variables") else part)]


def _names(parts: Mapping[str, list[tf.Variable]], variable) -> list[str]:
    raw = keras_compat.raw(variable)
    return [name for name, variables in parts.items() if any(raw is each for each in variables)]


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None
