"""Fused updates must be unseen: the results of Keras's own optimizers, under every strategy, with fewer operations."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mptrain import LossScaleOptimizer, fused_updates

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-2, beta_1=0.8, beta_2=0.99, epsilon=1e-5),
    "adamw": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
    "decayed": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(1e-2, 2, 0.5), weight_decay=0.1),
    "sgd": lambda: keras.optimizers.SGD(1e-2),
    "momentum": lambda: keras.optimizers.SGD(1e-2, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "amsgrad": lambda: keras.optimizers.Adam(1e-2, amsgrad=True),  # has no kernel
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-2),  # has none here
}
SHAPES = [(3,), (300, 300)]  # the second is large enough for Adam's kernel on a CPU


def gradients(step: int) -> list[tf.Tensor]:
    return [tf.random.stateless_normal(shape, [step, place]) for place, shape in enumerate(SHAPES)]


def trained(make, steps: int = 4) -> list[np.ndarray]:
    """Returns weights and slots after some steps of `make`'s optimizer."""
    variables = [keras.Variable(tf.random.stateless_normal(shape, [9, 9])) for shape in SHAPES]
    optimizer = make()
    optimizer.build(variables)
    for step in range(steps):
        optimizer.apply_gradients(list(zip(gradients(step), variables, strict=True)))
    inner = optimizer.inner if isinstance(optimizer, LossScaleOptimizer) else optimizer
    return [np.array(variable) for variable in variables + inner.variables]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_slots_are_those_of_keras(name):
    ours = trained(lambda: LossScaleOptimizer(OPTIMIZERS[name]()))
    for mine, theirs in zip(ours, trained(OPTIMIZERS[name]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def operations(optimizer, variables) -> list[str]:
    @tf.function
    def step(gradients):
        optimizer.apply(gradients, variables)

    return [op.type for op in step.get_concrete_function(gradients(0)).graph.get_operations()]


def test_keras_still_asks_the_methods_that_are_replaced():
    for name, kernel in (("adamw", "ResourceApplyAdam"), ("nesterov", "ResourceApplyKerasMomentum")):
        variables = [keras.Variable(tf.zeros(shape)) for shape in SHAPES]
        optimizer = OPTIMIZERS[name]()
        optimizer.build(variables)
        by_keras = operations(optimizer, variables)
        fused_updates.install(optimizer)
        fused = operations(optimizer, variables)
        assert kernel in fused
        assert "ResourceApplyGradientDescent" in fused  # the weights' decay
        assert kernel not in by_keras
        assert len(fused) < 0.7 * len(by_keras)


def test_a_subclass_that_may_update_otherwise_is_left_alone():
    class Mine(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            self.assign(variable, tf.ones_like(variable))

    optimizer = LossScaleOptimizer(Mine())
    variable = keras.Variable(tf.zeros([2]))
    optimizer.build([variable])
    optimizer.apply_gradients([(tf.ones([2]), variable)])
    np.testing.assert_array_equal(variable, [1, 1])


@pytest.mark.parametrize("name", ["adamw", "nesterov"])
def test_replicas_end_with_the_weights_of_one(name):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def under(strategy) -> list[np.ndarray]:
        with strategy.scope():
            variables = [keras.Variable(tf.random.stateless_normal(shape, [9, 9])) for shape in SHAPES]
            optimizer = LossScaleOptimizer(OPTIMIZERS[name]())
            optimizer.build(variables)
        share = 1 / strategy.num_replicas_in_sync

        @tf.function
        def step(number):
            def in_replica():
                parts = [share * tf.random.stateless_normal(s, [number, place]) for place, s in enumerate(SHAPES)]
                optimizer.apply_gradients(list(zip(parts, variables, strict=True)))

            strategy.run(in_replica)

        for number in range(3):
            step(tf.constant(number))
        return [np.array(part) for v in variables for part in strategy.experimental_local_results(v.value)]

    one, two = under(tf.distribute.OneDeviceStrategy("CPU:0")), under(strategy)
    for mine, theirs in zip(np.repeat(np.array(one, object), 2), two, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
