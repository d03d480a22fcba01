"""The updates of Keras 3's Adam, AdamW and SGD by TensorFlow's fused kernels: one operation a variable, where Keras writes 25.

The formulas are the same, term by term; what changes is that slots and weights are read and written once, and that what all
variables share (learning rate, powers of beta) is computed once. In a small model the operations cost more than the
arithmetic, in a large one the passes over the memory do. Adam's kernel takes 1 - beta_2 in float32, so results differ from
Keras's: by 1e-5 of an update at most where beta_2 is 0.999, and by ten times that for every further nine. Sparse gradients,
other dtypes than float32, and every other optimizer are left to Keras.

Keras has no public place for this: its own `update_step` sees one variable. So two private methods and the lists of slots
are used, here alone; `tests/test_fused_updates.py` fails when they change.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from mptrain.keras_compat import raw


def install(optimizer) -> None:
    """Makes a built Keras 3 optimizer update by fused kernels, if it is one that has such; in a replica, without sums."""
    update = _fused(optimizer)
    if update is None:
        return
    by_keras = optimizer._backend_update_step

    def update_step(gradients: Sequence, variables: Sequence, learning_rate) -> None:
        pairs = list(zip(gradients, variables, strict=True))
        fused = [_can_be_fused(gradient, variable) for gradient, variable in pairs]
        if any(fused):
            update([pair for pair, can in zip(pairs, fused, strict=True) if can], tf.cast(learning_rate, tf.float32))
        if not all(fused):
            by_keras(*zip(*[pair for pair, can in zip(pairs, fused, strict=True) if not can], strict=True), learning_rate)

    optimizer._backend_update_step = update_step
    optimizer._apply_weight_decay = lambda variables: _decay(optimizer, variables)


def _fused(optimizer) -> Callable | None:
    """Returns the function that updates (gradient, variable) pairs at a learning rate; None where there is none.

    Of the classes themselves: what a subclass changes is not known.
    """
    if type(optimizer) in (keras.optimizers.Adam, keras.optimizers.AdamW) and not optimizer.amsgrad:
        return lambda pairs, rate: _adam(optimizer, pairs, rate)
    if type(optimizer) is keras.optimizers.SGD:
        return lambda pairs, rate: _sgd(optimizer, pairs, rate)
    return None


def _can_be_fused(gradient, variable) -> bool:
    return not isinstance(gradient, tf.IndexedSlices) and tf.as_dtype(variable.dtype) == tf.float32


def _adam(optimizer, pairs: list, rate: tf.Tensor) -> None:
    """Kingma and Ba, "Adam" (2015), in the order of operations of its section 2."""
    beta_1, beta_2, epsilon = (tf.constant(x, tf.float32) for x in (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon))
    step = tf.cast(optimizer.iterations + 1, tf.float32)
    power_1, power_2 = tf.pow(beta_1, step), tf.pow(beta_2, step)
    alpha = rate * tf.sqrt(1.0 - power_2) / (1.0 - power_1)
    for gradient, variable in pairs:
        place = optimizer._get_variable_index(variable)
        m, v = optimizer._momentums[place], optimizer._velocities[place]
        if _one_kernel_pays(variable):
            tf.raw_ops.ResourceApplyAdam(
                var=_handle(variable),
                m=_handle(m),
                v=_handle(v),
                beta1_power=power_1,
                beta2_power=power_2,
                lr=rate,
                beta1=beta_1,
                beta2=beta_2,
                epsilon=epsilon,
                grad=gradient,
            )
        else:
            _subtract(m, tf.constant(1 - optimizer.beta_1), tf.convert_to_tensor(m) - gradient)
            _subtract(v, tf.constant(1 - optimizer.beta_2), tf.convert_to_tensor(v) - tf.square(gradient))
            _subtract_scaled(variable, alpha, tf.convert_to_tensor(m), v, epsilon)


def _one_kernel_pays(variable) -> bool:
    """Whether Adam's kernel is faster than its parts, which on a CPU it is for large variables alone.

    It takes its cost for a multiple of what it is and calls all threads for a few hundred elements already: 4,096 take 84 µs of
    processor time and its parts 16, but 131,072 take 198 and its parts 577.
    """
    return "CPU" not in raw(variable).device or raw(variable).shape.num_elements() >= 2**16


def _sgd(optimizer, pairs: list, rate: tf.Tensor) -> None:
    for gradient, variable in pairs:
        if not optimizer.momentum:
            _subtract(variable, rate, gradient)
            continue
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=_handle(variable),
            accum=_handle(optimizer.momentums[optimizer._get_variable_index(variable)]),
            lr=rate,
            grad=gradient,
            momentum=tf.constant(optimizer.momentum, tf.float32),
            use_nesterov=optimizer.nesterov,
        )


def _decay(optimizer, variables: Sequence) -> None:
    """Takes from the weights their share weight_decay * learning rate (Loshchilov and Hutter, 2019)."""
    if optimizer.weight_decay is None:
        return
    rate = tf.cast(optimizer.learning_rate, tf.float32) * optimizer.weight_decay
    for variable in variables:
        if optimizer._use_weight_decay(variable):
            weights = tf.convert_to_tensor(variable)
            _subtract(variable, tf.cast(rate, weights.dtype), weights)


def _subtract(variable, factor: tf.Tensor, values: tf.Tensor) -> None:
    """Takes factor * values from a variable, in one operation."""
    tf.raw_ops.ResourceApplyGradientDescent(var=_handle(variable), alpha=factor, delta=values)


def _subtract_scaled(variable, factor: tf.Tensor, values: tf.Tensor, squares, epsilon: tf.Tensor) -> None:
    """Takes factor * values / (sqrt(squares) + epsilon) from a variable, in one operation: Adagrad's, without its own slot."""
    tf.raw_ops.ResourceApplyAdagradV2(
        var=_handle(variable), accum=_handle(squares), lr=factor, epsilon=epsilon, grad=values, update_slots=False
    )


def _handle(variable) -> tf.Tensor:
    return raw(variable).handle
