"""Loss scaling that is right on every replica: one all-reduce, one check, one decision.

Float16 gradients below 2**-25 vanish. Multiplying the loss by a scale lifts them into float16's range, and dividing them by
it in float32 brings them back; a scale that was too high shows as an inf or NaN, and the step is skipped (Micikevicius et
al., "Mixed Precision Training", 2018). The decision is taken after the gradients were summed over the replicas, so that all
of them take the same one.
"""

from collections.abc import Iterable

import tensorflow as tf

from mptrain import keras_compat
from mptrain.errors import InputError, RunError

_SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
    tf.distribute.TPUStrategy,
)


class LossScaleOptimizer(tf.Module):
    """Wraps an optimizer: scales the loss, unscales the gradients, and applies them only where all of them are finite.

    In a replica's step:

        scaled_loss = optimizer.get_scaled_loss(loss)                              # inside the tape
        gradients = optimizer.get_unscaled_gradients(tape.gradient(scaled_loss, variables))
        applied = optimizer.apply_gradients(zip(gradients, variables))

    `apply_gradients` sums the gradients over the replicas, takes one sum of squares of each, and from these the check for
    finiteness, the global norm, and the clipping factor. If a gradient is not finite, or the norm overflows float32,
    weights, slots and the inner optimizer's step stay as they are on every replica. The check is made in every precision;
    `dynamic=False, initial_scale=1` makes all the rest a no-op.

    After an overflow the scale is multiplied by `backoff_factor`, once `hysteresis` overflows have been seen since it last
    grew (Shoeybi et al., "Megatron-LM", 2019); after `growth_interval` applied steps in a row by `growth_factor`.

    Args:
        inner: a Keras 3 or tf_keras optimizer (new or legacy), or any object with `apply_gradients(grads_and_vars)`.
        dynamic: whether the scale changes.
        initial_scale: first loss scale; with `dynamic=False` the only one.
        growth_interval: applied steps in a row before the scale grows.
        growth_factor: what growth multiplies the scale by; above 1.
        backoff_factor: what an overflow multiplies the scale by; between 0 and 1.
        min_scale: the scale never goes below.
        max_scale: the scale never goes above.
        hysteresis: overflows that are needed before the scale goes down.
        max_consecutive_skips: skipped steps in a row after which `raise_if_stuck` raises.
        clip_norm: global norm to which the unscaled, summed gradients are clipped; None: no clipping.

    Raises:
        ValueError: for a number out of range.
        TypeError: if `inner` cannot be wrapped.
        InputError: if the strategy in scope is not supported.
    """

    def __init__(
        self,
        inner,
        *,
        dynamic: bool = True,
        initial_scale: float = 2.0**15,
        growth_interval: int = 2000,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
        hysteresis: int = 1,
        max_consecutive_skips: int = 50,
        clip_norm: float | None = None,
    ):
        super().__init__(name="loss_scale_optimizer")
        _check_numbers(dynamic, initial_scale, growth_interval, growth_factor, backoff_factor, min_scale, max_scale, hysteresis)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm is {clip_norm}: it must be above 0, or None")
        scaled = dynamic or initial_scale != 1
        _check_strategy(tf.distribute.get_strategy(), scaled)
        self.inner = inner
        self.dynamic = dynamic
        self.initial_scale = initial_scale
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.hysteresis = hysteresis
        self.max_consecutive_skips = max_consecutive_skips
        self.clip_norm = clip_norm
        self._scaled = scaled
        self._inner = keras_compat.InnerOptimizer(inner)
        self._positions = None  # id(variable) -> its place in `_nonfinite`; None until built
        self._trained = {}
        self._nonfinite = None
        self._create_state()

    def _create_state(self) -> None:
        self._scale = _shared_scalar(self.initial_scale, tf.float32, "loss_scale")
        self._applied_in_a_row = _shared_scalar(0, tf.int64, "applied_in_a_row")
        self._hysteresis_left = _shared_scalar(self.hysteresis, tf.int64, "hysteresis_left")
        self._applied_steps = _shared_scalar(0, tf.int64, "applied_steps")
        self._skipped_steps = _shared_scalar(0, tf.int64, "skipped_steps")
        self._consecutive_skips = _shared_scalar(0, tf.int64, "consecutive_skips")
        self._gradient_norm = _shared_scalar(0, tf.float32, "gradient_norm")
        # Written by each replica alone, so that looking at the loss costs no communication.
        self._nonfinite_losses = tf.Variable(
            0,
            dtype=tf.int32,
            trainable=False,
            name="nonfinite_losses",
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    @property
    def loss_scale(self) -> tf.Tensor:
        """What the next loss will be multiplied by, float32 scalar."""
        return tf.convert_to_tensor(self._scale)

    @property
    def applied_steps(self) -> tf.Tensor:
        """Number of steps whose gradients were applied, int64 scalar."""
        return tf.convert_to_tensor(self._applied_steps)

    @property
    def skipped_steps(self) -> tf.Tensor:
        """Number of steps that were skipped, int64 scalar."""
        return tf.convert_to_tensor(self._skipped_steps)

    @property
    def consecutive_skips(self) -> tf.Tensor:
        """Number of skipped steps since the last applied one, int64 scalar."""
        return tf.convert_to_tensor(self._consecutive_skips)

    @property
    def gradient_norm(self) -> tf.Tensor:
        """Global norm of the last step's gradients, unscaled, summed, not clipped; float32 scalar, inf or NaN if skipped."""
        return tf.convert_to_tensor(self._gradient_norm)

    @property
    def learning_rate(self) -> tf.Tensor | None:
        """The learning rate of the next update, float32 scalar; None where the inner optimizer has none."""
        return self._inner.learning_rate

    @property
    def state(self) -> dict[str, tf.Variable]:
        """Everything a checkpoint must hold, by path: the scale, its counters, and the inner optimizer's variables."""
        own = (
            self._scale,
            self._applied_in_a_row,
            self._hysteresis_left,
            self._applied_steps,
            self._skipped_steps,
            self._consecutive_skips,
            self._gradient_norm,
        )
        named = {f"loss_scale/{keras_compat.raw(v).name.split(':')[0]}": v for v in own}
        return named | {f"inner/{path}": v for path, v in self._inner.variables.items()}

    def build(self, variables: Iterable) -> None:
        """Creates the inner optimizer's slots; call it in the strategy's scope, before the first step is traced.

        Args:
            variables: every variable that will be trained.
        """
        variables = list(variables)
        if not getattr(self.inner, "built", False):
            self._inner.build(variables)
        by_path = keras_compat.variables_by_path(variables)
        self._trained = by_path  # holds the variables, so that their ids stay theirs
        self._positions = {id(variable): index for index, variable in enumerate(by_path.values())}
        self._nonfinite = tf.Variable(
            tf.zeros([len(by_path)], tf.bool),
            trainable=False,
            name="nonfinite",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def get_scaled_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss in float32, multiplied by the loss scale.

        Args:
            loss: this replica's loss, of any shape and floating dtype.
        """
        loss = tf.cast(loss, tf.float32)
        finite = tf.reduce_all(tf.math.is_finite(loss))
        self._nonfinite_losses.assign(tf.cast(tf.logical_not(finite), tf.int32))
        return loss * self._scale if self._scaled else loss

    def get_unscaled_gradients(self, gradients: Iterable) -> list:
        """Returns the gradients in float32, divided by the loss scale; None and `tf.IndexedSlices` stay what they are.

        The cast comes first: in float16 the quotient would underflow.

        Args:
            gradients: dense tensors of any floating dtype, `tf.IndexedSlices`, or None.
        """
        inverse = 1.0 / self._scale

        def unscale(values):
            values = tf.cast(values, tf.float32)
            return values * inverse if self._scaled else values

        return [gradient if gradient is None else _map_values(unscale, gradient) for gradient in gradients]

    def apply_gradients(self, grads_and_vars: Iterable) -> tf.Tensor:
        """Sums the gradients over the replicas and applies them, if they are finite, on all replicas or on none.

        Args:
            grads_and_vars: pairs of an unscaled gradient of this replica (float32, dense or `tf.IndexedSlices`; pairs with
                None are left out) and its variable.

        Returns:
            Whether the step was applied: a bool scalar, the same on every replica.

        Raises:
            ValueError: if every gradient is None.
            RuntimeError: outside a replica context, or under several replicas before `build`.
        """
        replica = tf.distribute.get_replica_context()
        if replica is None:
            raise RuntimeError("apply_gradients belongs into the function that strategy.run runs in each replica")
        pairs = list(grads_and_vars)
        variables = [variable for gradient, variable in pairs if gradient is not None]
        if not variables:
            raise ValueError("every gradient is None: the loss does not depend on the trainable variables")
        self._build_if_needed(replica, [variable for _, variable in pairs])
        gradients = _sum_over_replicas(replica, [gradient for gradient, _ in pairs if gradient is not None])
        squares = [_sum_of_squares(gradient) for gradient in gradients]
        norm = tf.sqrt(tf.add_n(squares))
        applied = tf.math.is_finite(norm)
        nonfinite = self._nonfinite_flags(variables, squares)

        def finish(strategy, *per_replica):
            self._apply_or_skip(strategy, variables, *per_replica)

        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            self._apply_or_skip(replica.strategy, variables, gradients, applied, norm, nonfinite)
        else:
            # Illegal in a branch: a merge. So the replicas merge first, and part again inside the branch.
            replica.merge_call(finish, args=(gradients, applied, norm, nonfinite))
        return applied

    def nonfinite_variables(self) -> list[str]:
        """Returns the paths of the variables whose gradients were not finite in the last skipped step."""
        if self._nonfinite is None:
            return []
        return [name for name, bad in zip(self._trained, self._nonfinite.numpy(), strict=True) if bad]

    def loss_was_finite(self) -> bool:
        """Whether the last loss that was scaled was finite on every replica."""
        return int(tf.convert_to_tensor(self._nonfinite_losses)) == 0

    def raise_if_stuck(self) -> None:
        """Ends a run that cannot recover; called outside the graph, at the end of a loop.

        Raises:
            RunError: if the last `max_consecutive_skips` steps were all skipped.
        """
        skips = int(self.consecutive_skips)
        if skips < self.max_consecutive_skips:
            return
        names = self.nonfinite_variables()
        if self.loss_was_finite():
            cause = "the loss is finite, the backward pass overflows"
        else:
            cause = "the loss itself is not finite: the forward pass overflows, and no loss scale can help"
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise RunError(
            f"{skips} steps in a row were skipped at loss scale {float(self.loss_scale):g}: {cause}. Not finite: the gradients"
            f" of {shown}"
        )

    def _build_if_needed(self, replica, variables: list) -> None:
        if self._positions is not None:
            return
        if replica.num_replicas_in_sync > 1:
            raise RuntimeError("call optimizer.build(variables) in strategy.scope() before the first step")
        with tf.init_scope():
            self.build(variables)

    def _nonfinite_flags(self, variables: list, squares: list[tf.Tensor]) -> tf.Tensor:
        flags = [tf.constant(False)] * len(self._trained)
        for variable, square in zip(variables, squares, strict=True):
            position = self._positions.get(id(keras_compat.raw(variable)))
            if position is None:
                raise ValueError(f"{variable!r} is not among the variables that the optimizer was built with")
            flags[position] = tf.logical_not(tf.math.is_finite(square))
        return tf.stack(flags)

    def _apply_or_skip(self, strategy, variables, gradients, applied, norm, nonfinite) -> None:
        """Applies in every replica or in none. Of what all replicas agree on since the all-reduce, the first one's is taken."""
        applied, norm, nonfinite = (strategy.experimental_local_results(x)[0] for x in (applied, norm, nonfinite))

        def update(gradients, norm):
            if self.clip_norm is not None:
                factor = self.clip_norm / tf.maximum(norm, self.clip_norm)
                gradients = [_map_values(lambda values: values * factor, gradient) for gradient in gradients]
            self._inner.apply(list(zip(gradients, variables, strict=True)))

        def apply():
            if tf.distribute.in_cross_replica_context():
                strategy.extended.call_for_each_replica(update, args=(gradients, norm))
            else:
                update(gradients, norm)
            return tf.constant(True)

        tf.cond(applied, apply, lambda: tf.constant(False))
        self._count(applied, norm, nonfinite)
        if self.dynamic:
            self._adapt_scale(applied)

    def _count(self, applied: tf.Tensor, norm: tf.Tensor, nonfinite: tf.Tensor) -> None:
        one = tf.cast(applied, tf.int64)
        self._applied_steps.assign(self._applied_steps + one)
        self._skipped_steps.assign(self._skipped_steps + 1 - one)
        self._consecutive_skips.assign((self._consecutive_skips + 1) * (1 - one))
        self._gradient_norm.assign(norm)
        self._nonfinite.assign(tf.where(applied, self._nonfinite, nonfinite))

    def _adapt_scale(self, applied: tf.Tensor) -> None:
        in_a_row = tf.where(applied, self._applied_in_a_row + 1, 0)
        grow = in_a_row >= self.growth_interval  # not ==: a counter restored past the interval grows at once
        left = tf.where(applied, tf.convert_to_tensor(self._hysteresis_left), self._hysteresis_left - 1)
        shrink = tf.logical_and(tf.logical_not(applied), left <= 0)
        scale = tf.convert_to_tensor(self._scale)
        higher = tf.minimum(scale * self.growth_factor, self.max_scale)
        lower = tf.maximum(scale * self.backoff_factor, self.min_scale)
        self._scale.assign(tf.where(grow, higher, tf.where(shrink, lower, scale)))
        self._applied_in_a_row.assign(tf.where(grow, tf.zeros_like(in_a_row), in_a_row))
        self._hysteresis_left.assign(tf.where(grow, tf.cast(self.hysteresis, tf.int64), tf.maximum(left, 0)))


def _shared_scalar(value, dtype: tf.DType, name: str) -> tf.Variable:
    return tf.Variable(value, dtype=dtype, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


def _check_numbers(
    dynamic, initial_scale, growth_interval, growth_factor, backoff_factor, min_scale, max_scale, hysteresis
) -> None:
    if not growth_factor > 1:
        raise ValueError(f"growth_factor is {growth_factor}: it must be above 1")
    if not 0 < backoff_factor < 1:
        raise ValueError(f"backoff_factor is {backoff_factor}: it must lie between 0 and 1")
    if growth_interval < 1 or hysteresis < 1:
        raise ValueError(f"growth_interval is {growth_interval}, hysteresis is {hysteresis}: each must be at least 1")
    if not 0 < initial_scale < float("inf"):
        raise ValueError(f"initial_scale is {initial_scale}: it must be a finite number above 0")
    if dynamic and not 0 < min_scale <= initial_scale <= max_scale < float("inf"):
        raise ValueError(f"initial_scale is {initial_scale}: it must lie between min_scale {min_scale} and {max_scale}")


def _check_strategy(strategy: tf.distribute.Strategy, scaled: bool) -> None:
    if tf.distribute.has_strategy() and not isinstance(strategy, _SUPPORTED):
        raise InputError(
            f"{type(strategy).__name__} is not supported: its replicas do not step together, so they cannot agree on skipping"
            " a step; use MirroredStrategy or MultiWorkerMirroredStrategy"
        )
    if isinstance(strategy, tf.distribute.TPUStrategy) and scaled:
        raise InputError("TPUs have no float16 arithmetic: use mixed_bfloat16, which needs no loss scale")


def _sum_over_replicas(replica, gradients: list) -> list:
    if replica.num_replicas_in_sync == 1:
        return gradients
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)


def _map_values(function, gradient):
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


def _sum_of_squares(gradient) -> tf.Tensor:
    """Returns the sum of the squares of a gradient's elements; rows that stand twice in a sparse one are added up first."""
    if isinstance(gradient, tf.IndexedSlices):
        rows, places = tf.unique(gradient.indices)
        gradient = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows))
    return 2.0 * tf.nn.l2_loss(gradient)
