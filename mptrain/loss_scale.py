"""Loss scaling that is right on every replica: one all-reduce, one check, one decision.

Float16 gradients below 2**-25 vanish. Multiplying the loss by a scale lifts them into float16's range, and dividing them by
it in float32 brings them back; a scale that was too high shows as an inf or NaN, and the step is skipped (Micikevicius et
al., "Mixed Precision Training", 2018). The decision is taken after the gradients were summed over the replicas, so that all
of them take the same one.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import tensorflow as tf

from mptrain import keras_compat
from mptrain.accumulation import GradientSums, WeightAverage
from mptrain.arguments import check_between, check_count, check_positive
from mptrain.autograph import as_written
from mptrain.dynamic_scale import DynamicScale, shared_scalar
from mptrain.errors import InputError
from mptrain.gradients import add_gradients, half_sum_of_squares, map_values, to_float32, with_each_row_once
from mptrain.inner_optimizer import InnerOptimizer, read_tf_keras_loss_scale
from mptrain.replicas import check_same_scope, check_strategy, merged, set_aside, sum_over_replicas
from mptrain.skip_log import Skip, SkipLog, raise_stuck


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

    Limits: TensorFlow cannot compile a step over two or more CPU replicas with `jit_compile=True`. With accumulation sparse
    gradients are summed in dense form, so tf_keras's legacy SGD and RMSprop with momentum also move rows that had none.

    Args:
        inner: a Keras 3 or tf_keras optimizer (new or legacy), or any object with `apply_gradients(grads_and_vars)`. What such
            an object keeps in `tf.Variable`s is saved if it has an attribute `variables`, or holds them in its attributes.
        dynamic: whether the scale changes.
        initial_scale: first loss scale; with `dynamic=False` the only one.
        growth_interval: applied updates in a row before the scale grows.
        growth_factor: what growth multiplies the scale by; above 1.
        backoff_factor: what an overflow multiplies the scale by; between 0 and 1.
        min_scale: the scale never goes below.
        max_scale: the scale never goes above.
        hysteresis: overflows that are needed before the scale goes down.
        max_consecutive_skips: skipped updates in a row after which `raise_if_stuck` raises.
        clip_norm: global norm to which the unscaled, summed gradients are clipped; None: no clipping.
        accumulation_steps: calls of `apply_gradients` that make one update, with the mean of their gradients.
        ema_momentum: momentum of the weights' moving average, in (0, 1); None: no average. It starts from the weights after
            the first update.

    Raises:
        ValueError: for a number out of range.
        TypeError: for an argument of another type, or if `inner` cannot be wrapped.
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
        accumulation_steps: int = 1,
        ema_momentum: float | None = None,
    ):
        super().__init__(name="loss_scale_optimizer")
        check_count("max_consecutive_skips", max_consecutive_skips)
        check_count("accumulation_steps", accumulation_steps)
        if clip_norm is not None:
            check_positive("clip_norm", clip_norm)
        if ema_momentum is not None:
            check_between("ema_momentum", ema_momentum, 0.0, 1.0)
        self._strategy = tf.distribute.get_strategy()
        check_strategy(self._strategy, scaled=dynamic or initial_scale != 1)
        self.inner = inner
        self.max_consecutive_skips = max_consecutive_skips
        self.clip_norm = clip_norm
        self.accumulation_steps = accumulation_steps
        self.ema_momentum = ema_momentum
        self._inner = InnerOptimizer(inner)
        self._scale = DynamicScale(
            dynamic=dynamic,
            initial_scale=initial_scale,
            growth_interval=growth_interval,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            min_scale=min_scale,
            max_scale=max_scale,
            hysteresis=hysteresis,
        )
        self._applied_steps = shared_scalar(0, tf.int64, "applied_steps")
        self._skipped_steps = shared_scalar(0, tf.int64, "skipped_steps")
        self._consecutive_skips = shared_scalar(0, tf.int64, "consecutive_skips")
        self._gradient_norm = shared_scalar(0, tf.float32, "gradient_norm")
        # Written by each replica alone, so that looking at the loss costs no communication. Not an integer: restoring gives
        # each replica an equal share of the sum.
        self._nonfinite_losses = tf.Variable(
            0.0,
            trainable=False,
            name="nonfinite_losses",
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
        self.check_loss = lambda loss: None  # a Trainer refuses a 16-bit loss here; used alone, the optimizer casts it
        self._trained = None  # path -> variable; None until built
        self._sums = None
        self._average = None
        self._skips = None

    @property
    def loss_scale(self) -> tf.Tensor:
        """What the next loss will be multiplied by, float32 scalar."""
        return self._scale.used

    @property
    def applied_steps(self) -> tf.Tensor:
        """Number of updates that were applied, int64 scalar."""
        return tf.convert_to_tensor(self._applied_steps)

    @property
    def skipped_steps(self) -> tf.Tensor:
        """Number of updates that were skipped, int64 scalar."""
        return tf.convert_to_tensor(self._skipped_steps)

    @property
    def consecutive_skips(self) -> tf.Tensor:
        """Number of skipped updates since the last applied one, int64 scalar."""
        return tf.convert_to_tensor(self._consecutive_skips)

    @property
    def gradient_norm(self) -> tf.Tensor:
        """Global norm of the last update's gradients, unscaled, summed, not clipped; float32; inf or NaN if skipped.

        Taken from a sum of squares in float32, so a norm below 1e-19 shows as 0 and one above 1e19 as an overflow.
        """
        return tf.convert_to_tensor(self._gradient_norm)

    @property
    def learning_rate(self) -> tf.Tensor | None:
        """The learning rate of the next update, float32 scalar; None where the inner optimizer has none."""
        return self._inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, value) -> None:
        self.inner.learning_rate = value

    @property
    def state(self) -> dict[str, tf.Variable]:
        """Everything that a checkpoint must hold, by path: scale, counters, slots, averages, the window in progress.

        A window is saved as the sum over the replicas, so that it can go on with another number of them: one replica goes on
        with the same bits, several with equal shares of the sum.
        """
        own = {
            "loss_scale": self._scale.value,
            "applied_in_a_row": self._scale.applied_in_a_row,
            "hysteresis_left": self._scale.hysteresis_left,
            "applied_steps": self._applied_steps,
            "skipped_steps": self._skipped_steps,
            "consecutive_skips": self._consecutive_skips,
            "gradient_norm": self._gradient_norm,
        }
        averages = {}
        if self._average:
            own["averaged_updates"] = self._average.updates
            averages = {f"average/{path}": variable for path, variable in self._average.averages.items()}
        inner = {f"inner/{path}": variable for path, variable in self._inner.variables.items()}
        return {f"loss_scale/{name}": variable for name, variable in own.items()} | averages | inner | self.window

    @property
    def window(self) -> dict[str, tf.Variable]:
        """The part of `state` that is needed only inside an accumulation window; empty without accumulation."""
        if self._sums is None:
            return {}
        own = {"loss_scale/accumulated_steps": self._sums.done, "loss_scale/nonfinite_losses": self._nonfinite_losses}
        return own | {f"sum/{path}": variable for path, variable in self._sums.sums.items()}

    def build(self, variables: Iterable) -> None:
        """Creates the inner optimizer's slots and all else that follows from the variables.

        Call it in the strategy's scope, before the first step is traced.

        Args:
            variables: every variable that will be trained.

        Raises:
            RuntimeError: in another scope than that of the variables and the optimizer.
        """
        variables = list(variables)
        check_same_scope(self._strategy, map(keras_compat.raw, variables), self._inner.variables.values())
        self._build(variables)

    @as_written
    def get_scaled_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss in float32, multiplied by the loss scale.

        Args:
            loss: this replica's loss, of any shape and floating dtype.
        """
        self.check_loss(loss)
        loss = tf.cast(loss, tf.float32)
        finite = tf.math.is_finite(loss) if loss.shape.rank == 0 else tf.reduce_all(tf.math.is_finite(loss))
        self._nonfinite_losses.assign_add(tf.cast(tf.logical_not(finite), tf.float32), read_value=False)
        return self._scale.multiply(loss)

    @as_written
    def get_unscaled_gradients(self, gradients: Iterable) -> list:
        """Returns the gradients in float32, divided by the loss scale; None and `tf.IndexedSlices` stay what they are.

        The cast comes first: in float16 the quotient would underflow.

        Args:
            gradients: dense tensors of any floating dtype, `tf.IndexedSlices`, or None.

        Raises:
            TypeError: if `gradients` is one gradient and not a list of them.
        """
        if tf.is_tensor(gradients):
            raise TypeError("get_unscaled_gradients takes a list of gradients, and this is one: write [gradient]")

        divide = self._scale.divider()

        def unscale(values):
            return divide(tf.cast(values, tf.float32))

        return [map_values(unscale, gradient) for gradient in gradients]

    @as_written
    def window_starts(self) -> tf.Tensor:
        """Whether the next step is the first of an accumulation window, bool scalar; always, without accumulation."""
        return tf.constant(True) if self._sums is None else self._sums.starts()

    def apply_gradients(self, grads_and_vars: Iterable) -> tf.Tensor:
        """Sums the gradients over the replicas and applies them, if they are finite, on all replicas or on none.

        With accumulation, adds them up without communication, and does so for their mean at the window's last step.

        Args:
            grads_and_vars: pairs of an unscaled gradient of this replica (dense or `tf.IndexedSlices`; pairs with None are
                left out) and its variable. Gradients of one variable add up.

        Returns:
            Whether nothing was skipped: a bool scalar, the same on every replica; true inside an accumulation window.

        Raises:
            ValueError: if there is no gradient, a variable is not among those of `build`, or with accumulation other
                variables had gradients in an earlier step.
            RuntimeError: outside a replica context, or under several replicas before `build`.
        """
        replica = tf.distribute.get_replica_context()
        if replica is None:
            raise RuntimeError("apply_gradients belongs into the function that strategy.run runs in each replica")
        places, gradients = self._in_order_of_build(replica, list(grads_and_vars))
        if self._sums is not None:
            self._sums.add(places, gradients)
            return merged(replica, self._end_of_window)
        gradients = [with_each_row_once(gradient) for gradient in sum_over_replicas(replica, gradients)]
        return merged(replica, lambda strategy, gradients: self._update(strategy, places, gradients), gradients)

    def skips(self, first: int, end: int) -> list[Skip]:
        """Returns what is known of the skipped updates from number `first` up to `end`, newest last; on the host."""
        return self._skips.read(first, end) if self._skips else []

    def raise_if_stuck(self) -> None:
        """Ends a run that cannot recover; called outside the graph, at the end of a loop.

        Raises:
            RunError: if the last `max_consecutive_skips` updates were all skipped.
        """
        count, skipped = int(self.consecutive_skips), int(self.skipped_steps)
        if count >= self.max_consecutive_skips:
            raise_stuck(count, float(self.loss_scale), *self.skips(skipped - 1, skipped))

    def import_tf_keras_loss_scale(self, path: str) -> None:
        """Takes the loss scale and its counter from a checkpoint with a tf_keras LossScaleOptimizer in it.

        A scale out of `min_scale` and `max_scale` is moved to the nearer of them.

        Args:
            path: prefix of the checkpoint, as `tf.train.Checkpoint.save` returned it; or a SavedModel's folder.

        Raises:
            InputError: if there is no loss scale to be found, it cannot be one, or this optimizer's scale is static.
        """
        if not self._scale.dynamic:
            raise InputError(f"the loss scale stays {float(self.loss_scale):g}, with dynamic=False: there is none to import")
        scale, applied_in_a_row = read_tf_keras_loss_scale(path)
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"the loss scale in {path} is {scale}: it must be above 0 and finite, so start from initial_scale")
        self._scale.start_from(scale, applied_in_a_row)

    @property
    def has_average(self) -> bool:
        """Whether the weights have averages, which start at the first update; on the host."""
        return self._average is not None and int(self._average.updates.numpy()) > 0

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The variables hold their moving averages inside this context, and their own values after it; on the host."""
        if self._average is None:
            yield
            return
        self._average.swap()
        try:
            yield
        finally:
            self._average.swap()

    def _build_if_needed(self, replica, variables: list) -> None:
        if self._trained is not None:
            return
        if replica.num_replicas_in_sync > 1:
            raise RuntimeError("call optimizer.build(variables) in strategy.scope() before the first step")
        with tf.init_scope():
            self._build(variables)

    def _build(self, variables: list) -> None:
        self._inner.build(variables)
        self._trained = keras_compat.variables_by_path(self._inner.trained)
        self._skips = SkipLog(list(self._trained))
        if not isinstance(self.inner, tf.__internal__.tracking.Trackable):
            self._inner_variables = list(self._inner.variables.values())  # for tf.train.Checkpoint, which sees no plain object
        if self.accumulation_steps > 1:
            self._sums = GradientSums(self._trained, self.accumulation_steps)
        if self.ema_momentum is not None:
            self._average = WeightAverage(self._inner.trained, self.ema_momentum)

    @as_written
    def _in_order_of_build(self, replica, pairs: list) -> tuple[list[int], list]:
        """Returns the places of the variables that have gradients, ascending, and one float32 gradient for each."""
        if not pairs:
            raise ValueError("there are no pairs of a gradient and a variable: give apply_gradients at least one")
        if all(gradient is None for gradient, _ in pairs):
            raise ValueError("every gradient is None: the loss does not depend on the trainable variables")
        self._build_if_needed(replica, [variable for _, variable in pairs])
        found = {}
        for gradient, variable in pairs:
            if self._inner.is_frozen(variable):
                continue
            place = self._inner.place(variable)
            if gradient is not None:
                gradient = to_float32(gradient)
                found[place] = add_gradients(found[place], gradient) if place in found else gradient
        if not found:
            raise ValueError("every variable that has a gradient is frozen: leave them out of the groups that are")
        places = sorted(found)
        return places, [found[place] for place in places]

    def _end_of_window(self, strategy) -> tf.Tensor:
        def update():
            means = self._sums.means()  # across replicas, reading a sum adds the replicas' sums up
            if not tf.distribute.in_cross_replica_context():
                means = sum_over_replicas(tf.distribute.get_replica_context(), means)
            return self._update(strategy, self._sums.places, means)

        return tf.cond(self._sums.count(), update, lambda: tf.constant(True))

    def _update(self, strategy, places: Sequence[int], gradients: list) -> tf.Tensor:
        """Updates in every replica or in none. Of what all agree on since the all-reduce, the first one's is taken."""
        firsts = [strategy.experimental_local_results(gradient)[0] for gradient in gradients]
        squares = 2.0 * tf.stack([half_sum_of_squares(gradient) for gradient in firsts])
        norm = tf.sqrt(tf.reduce_sum(squares))

        def update(gradients, norm):
            self._apply(places, gradients, norm)

        def apply():
            if tf.distribute.in_cross_replica_context():
                strategy.extended.call_for_each_replica(update, args=(gradients, norm))
            else:
                update(gradients, norm)
            if self._average:
                self._average.update()
            self._applied_steps.assign_add(1)
            self._consecutive_skips.assign(0)
            return tf.constant(True)

        def skip():
            where = [[place] for place in places]
            nonfinite = tf.scatter_nd(where, tf.logical_not(tf.math.is_finite(squares)), [len(self._trained)])
            loss_finite = tf.equal(self._count_of_nonfinite_losses(), 0)
            self._skips.write(self.skipped_steps, self.applied_steps, self.loss_scale, loss_finite, nonfinite)
            self._skipped_steps.assign_add(1)
            self._consecutive_skips.assign_add(1)
            return tf.constant(False)

        applied = tf.cond(tf.math.is_finite(norm), apply, set_aside(skip))
        self._gradient_norm.assign(norm)
        self._nonfinite_losses.assign(0.0, read_value=False)  # which would be one more all-reduce
        self._scale.adapt(applied)
        return applied

    @as_written
    def _count_of_nonfinite_losses(self) -> tf.Tensor:
        count = tf.convert_to_tensor(self._nonfinite_losses)
        if tf.distribute.in_cross_replica_context():
            return count
        return sum_over_replicas(tf.distribute.get_replica_context(), [count])[0]

    def _apply(self, places: Sequence[int], gradients: list, norm: tf.Tensor) -> None:
        if self.clip_norm is not None:
            factor = self.clip_norm / tf.maximum(norm, self.clip_norm)
            gradients = [map_values(lambda values: values * factor, gradient) for gradient in gradients]
        trained = list(self._trained.values())
        dtypes = [trained[place].dtype for place in places]
        cast = [map_values(lambda v, dtype=dtype: tf.cast(v, dtype), g) for g, dtype in zip(gradients, dtypes, strict=True)]
        self._inner.apply(cast, places)
