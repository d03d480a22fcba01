"""What `LossScaleOptimizer` wraps: every kind of optimizer, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from mptrain import LossScaleOptimizer

INNER = {
    "keras3": lambda: keras.optimizers.SGD(1.0),
    "keras3 adam": lambda: keras.optimizers.Adam(0.1),
    "tf_keras": lambda: tf_keras.optimizers.SGD(1.0),
    "tf_keras legacy": lambda: tf_keras.optimizers.legacy.SGD(1.0),
}


class PlainSgd:
    """Any object with apply_gradients will do."""

    def apply_gradients(self, pairs):
        for gradient, variable in pairs:
            variable.assign_sub(gradient)


INNER["plain object"] = PlainSgd


@pytest.mark.parametrize("inner", INNER)
def test_every_kind_of_inner_optimizer_applies_and_skips(inner):
    optimizer = LossScaleOptimizer(INNER[inner]())
    variable = tf.Variable([1.0, 2.0])

    @tf.function
    def step(gradient):
        return optimizer.apply_gradients([(gradient, variable)])

    assert not step(tf.constant([np.inf, 0.0]))
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])
    assert step(tf.constant([1.0, 1.0]))
    assert (variable.numpy() < [1.0, 2.0]).all()
    assert not step(tf.constant([np.nan, 0.0]))


class BranchingSgd:
    """Written as one writes in a `tf.function`: with a tensor behind `if` and `while`."""

    def apply_gradients(self, pairs):
        for gradient, variable in pairs:
            if tf.reduce_sum(gradient) > 10.0:
                while tf.reduce_sum(gradient) > 10.0:
                    gradient = gradient / 2.0
            variable.assign_sub(gradient)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_python_control_flow_on_tensors_in_a_users_optimizer_becomes_the_graphs(mirrored, replicas, accumulation_steps):
    strategy = mirrored(replicas)
    with strategy.scope():
        variable = tf.Variable([0.0, 0.0])
        optimizer = LossScaleOptimizer(BranchingSgd(), accumulation_steps=accumulation_steps)
        optimizer.build([variable])

    @tf.function
    def step(gradient):
        return strategy.run(lambda: optimizer.apply_gradients([(gradient / replicas, variable)]))

    for _ in range(accumulation_steps):
        step(tf.constant([24.0, 8.0]))
    np.testing.assert_array_equal(variable.numpy(), [-6.0, -2.0])
    for _ in range(accumulation_steps):
        step(tf.constant([1.0, 1.0]))
    np.testing.assert_array_equal(variable.numpy(), [-7.0, -3.0])


@pytest.mark.parametrize("inner", [name for name in INNER if name != "plain object"])
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_gradients_are_summed_once_and_overflow_on_one_replica_skips_all(mirrored, inner, replicas):
    strategy = mirrored(replicas)
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
        optimizer = LossScaleOptimizer(INNER[inner]())
        optimizer.build([variable])

    @tf.function
    def step(bad_replica):
        def replica_step():
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradient = tf.where(tf.equal(here, bad_replica), np.inf, 0.25) * tf.ones([2])
            return optimizer.apply_gradients([(gradient, variable)])

        return strategy.experimental_local_results(strategy.run(replica_step))

    for bad in range(replicas):
        assert not any(step(tf.constant(bad)))
        np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])
    assert all(step(tf.constant(-1)))
    assert float(optimizer.gradient_norm) == pytest.approx(0.25 * replicas * np.sqrt(2))
    if "adam" not in inner:
        np.testing.assert_allclose(variable.numpy(), np.array([1.0, 2.0]) - 0.25 * replicas)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["Adam", "SGD", "RMSprop", "Adagrad", "Nadam"])
@pytest.mark.parametrize("home", [keras.optimizers, tf_keras.optimizers, tf_keras.optimizers.legacy])
@pytest.mark.parametrize("replicas", [1, 2])
def test_five_optimizers_of_each_generation_end_where_a_run_without_the_skipped_steps_ends(mirrored, home, inner, replicas):
    ends = []
    for outcomes in ("....", ".x.xx.."):
        strategy = mirrored(replicas)
        with strategy.scope():
            variable = tf.Variable([1.0, 2.0])
            optimizer = LossScaleOptimizer(getattr(home, inner)(0.1), clip_norm=1.0)
            optimizer.build([variable])

        @tf.function
        def loop(outcomes, strategy=strategy, optimizer=optimizer, variable=variable):
            def replica_step(bad):
                gradient = tf.where(bad, np.nan, 1.0) * tf.constant([1.0, 3.0])
                return optimizer.apply_gradients([(gradient, variable)])

            for bad in outcomes:
                strategy.run(replica_step, args=(bad,))

        loop(tf.constant([outcome == "x" for outcome in outcomes]))
        inner_state = {path: value.numpy() for path, value in optimizer.state.items() if path.startswith("inner/")}
        ends.append([variable.numpy(), *inner_state.values()])
    assert len(ends[0]) > 1
    for left, right in zip(*ends, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("wrapper", "home"),
    [
        (keras.optimizers.LossScaleOptimizer, keras.optimizers),
        (tf_keras.mixed_precision.LossScaleOptimizer, tf_keras.optimizers),
        (tf_keras.mixed_precision.LossScaleOptimizer, tf_keras.optimizers.legacy),
        (LossScaleOptimizer, keras.optimizers),
    ],
)
def test_optimizer_that_scales_losses_itself_is_refused(wrapper, home):
    with pytest.raises(TypeError, match="wrap the optimizer inside it"):
        LossScaleOptimizer(wrapper(home.SGD(1.0)))


@pytest.mark.parametrize("inner", INNER)
def test_float64_variables_are_updated_in_float64(inner):
    variable = tf.Variable([1.0, 2.0], dtype=tf.float64)
    assert LossScaleOptimizer(INNER[inner]()).apply_gradients([(tf.constant([0.5, 0.5]), variable)])
    assert (variable.numpy() < [1.0, 2.0]).all()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("replicas", [1, 2])
def test_optimizers_inside_a_multi_optimizer_do_not_sum_once_more(mirrored, replicas, window):
    strategy = mirrored(replicas)
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="first"), keras.layers.Dense(1)])
        by_layer = keras.optimizers.OptimizerMap(keras.optimizers.SGD(1.0), {"first/.*": keras.optimizers.SGD(2.0)})
        optimizer = LossScaleOptimizer(keras.optimizers.MultiOptimizer(by_layer), accumulation_steps=window)
        optimizer.build(model.trainable_variables)
    before = [variable.numpy() for variable in model.trainable_variables]

    @tf.function
    def step():
        variables = model.trainable_variables
        strategy.run(lambda: optimizer.apply_gradients([(tf.ones(v.shape) / replicas, v) for v in variables]))

    for _ in range(window):
        step()
    for variable, old in zip(model.trainable_variables, before, strict=True):
        change = 2.0 if variable.path.startswith("first") else 1.0
        np.testing.assert_allclose(variable.numpy(), old - change, rtol=1e-6)


@pytest.mark.parametrize(
    ("home", "option"),
    [
        (keras.optimizers, {"loss_scale_factor": 8.0}),
        (keras.optimizers, {"gradient_accumulation_steps": 2}),
        (keras.optimizers, {"use_ema": True}),
        (tf_keras.optimizers, {"use_ema": True}),
    ],
)
def test_option_of_the_inner_optimizer_that_this_one_has_itself_is_refused_with_what_to_write(home, option):
    with pytest.raises(TypeError, match=f"{next(iter(option))}=.*LossScaleOptimizer"):
        LossScaleOptimizer(home.SGD(1.0, **option))


def test_option_of_an_optimizer_inside_a_multi_optimizer_is_refused():
    by_layer = keras.optimizers.OptimizerMap(keras.optimizers.SGD(1.0), {"first/.*": keras.optimizers.SGD(1.0, use_ema=True)})
    with pytest.raises(TypeError, match="use_ema=True"):
        LossScaleOptimizer(keras.optimizers.MultiOptimizer(by_layer))


def test_optimizer_of_tensorflow_1_is_refused():
    with pytest.raises(TypeError, match="optimizer of TensorFlow 1"):
        LossScaleOptimizer(tf.compat.v1.train.MomentumOptimizer(1.0, 0.9))


class KeywordOnly:
    def apply_gradients(self, *, grads_and_vars):
        pass


class BuildsFromNothing(PlainSgd):
    def build(self):
        pass


class TellsOfNumbers(PlainSgd):
    variables = {"momentum": 0.9}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (KeywordOnly, "KeywordOnly.apply_gradients must take the list of"),
        (BuildsFromNothing, "BuildsFromNothing.build must take the list of variables"),
        (TellsOfNumbers, "TellsOfNumbers.variables holds 0.9"),
        (object, "must have apply_gradients"),
    ],
)
def test_object_that_cannot_be_called_as_an_optimizer_is_refused_when_it_is_wrapped(kind, message):
    with pytest.raises(TypeError, match=message):
        LossScaleOptimizer(kind())


class PlainMomentum:
    """Keeps its state where no checkpoint looks: in a dict, in an object that TensorFlow does not know."""

    def build(self, variables):
        self.trained = list(variables)
        self.momenta = {id(variable): tf.Variable(tf.zeros(variable.shape), name="momentum") for variable in variables}

    def apply_gradients(self, pairs):
        for gradient, variable in pairs:
            momentum = self.momenta[id(variable)]
            momentum.assign(0.9 * momentum + gradient)
            variable.assign_sub(momentum)


class PlainMomentumThatTells(PlainMomentum):
    @property
    def variables(self):
        return dict(enumerate(getattr(self, "momenta", {}).values()))


@pytest.mark.parametrize("kind", [PlainMomentum, PlainMomentumThatTells])
def test_state_of_a_plain_object_is_saved_with_the_rest(tmp_path, kind):
    def make():
        variable = tf.Variable([1.0])
        optimizer = LossScaleOptimizer(kind())
        optimizer.build([variable])
        return variable, optimizer

    def step(variable, optimizer):
        optimizer.apply_gradients([(tf.constant([1.0]), variable)])
        return float(variable[0])

    (variable, optimizer), (other_variable, other) = make(), make()
    step(variable, optimizer)
    assert [path for path in optimizer.state if path.startswith("inner/")] == ["inner/momentum"]
    path = tf.train.Checkpoint(optimizer=optimizer, variable=variable).save(str(tmp_path / "state"))
    tf.train.Checkpoint(optimizer=other, variable=other_variable).restore(path)
    assert step(other_variable, other) == step(variable, optimizer)
