import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from mptrain import LossScaleOptimizer


def gradients_of(replicas, bad=None):
    """Returns a step that takes a micro step's number; the gradient is its number + 1, inf on replica `bad` at number 2."""
    here = tf.distribute.get_replica_context().replica_id_in_sync_group
    return lambda number: (
        tf.where(tf.logical_and(tf.equal(here, -1 if bad is None else bad), number == 2), np.inf, (number + 1.0) / replicas)
        * tf.ones([2])
    )


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_window_makes_one_update_with_the_mean_of_its_gradients(mirrored, replicas):
    strategy = mirrored(replicas)
    with strategy.scope():
        variable = tf.Variable([0.0, 0.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), accumulation_steps=4)
        optimizer.build([variable])

    @tf.function
    def step(number):
        strategy.run(lambda: optimizer.apply_gradients([(gradients_of(replicas)(number), variable)]))

    for number in range(3):
        step(tf.constant(float(number)))
        np.testing.assert_array_equal(variable.numpy(), [0.0, 0.0])
    step(tf.constant(3.0))
    np.testing.assert_allclose(variable.numpy(), [-2.5, -2.5], rtol=1e-6)
    assert (int(optimizer.applied_steps), int(optimizer.inner.iterations.numpy())) == (1, 1)
    for number in range(4):
        step(tf.constant(float(number)))
    np.testing.assert_allclose(variable.numpy(), [-5.0, -5.0], rtol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_overflow_inside_a_window_skips_the_whole_window_on_all_replicas(mirrored, replicas):
    for bad in range(replicas):
        strategy = mirrored(replicas)
        with strategy.scope():
            variable = tf.Variable([0.0, 0.0])
            optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), accumulation_steps=4, ema_momentum=0.5)
            optimizer.build([variable])

        @tf.function
        def step(number, bad=bad, strategy=strategy, optimizer=optimizer, variable=variable):
            def replica_step():
                return optimizer.apply_gradients([(gradients_of(replicas, bad)(number), variable)])

            return strategy.experimental_local_results(strategy.run(replica_step))[0]

        results = [bool(step(tf.constant(float(number)))) for number in range(4)]
        assert results == [True, True, True, False]
        np.testing.assert_array_equal(variable.numpy(), [0.0, 0.0])
        assert float(optimizer.loss_scale) == 2.0**14
        (skip,) = optimizer.skips(0, 1)
        assert (skip.update, skip.loss_scale) == (0, 2.0**15)
        for number in (0.0, 1.0, 3.0, 4.0):
            step(tf.constant(number))
        np.testing.assert_allclose(variable.numpy(), [-3.0, -3.0], rtol=1e-6)
        with optimizer.averaged_weights():
            np.testing.assert_allclose(variable.numpy(), [-3.0, -3.0], rtol=1e-6)
        np.testing.assert_allclose(variable.numpy(), [-3.0, -3.0], rtol=1e-6)


def updated_by_windows(make_inner, make_variables, gradients, windows=3):
    """Returns the variables' values after the same updates made by single steps, and by windows of two steps."""
    ends = []
    for steps in (1, 2):
        variables = make_variables()
        optimizer = LossScaleOptimizer(make_inner(), accumulation_steps=steps)
        optimizer.build(variables)
        for _ in range(windows * steps):
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
        ends.append([variable.numpy() for variable in variables])
    return ends


def test_constraints_hold_after_a_window():
    def kernel():
        layer = keras.layers.Dense(1, use_bias=False, kernel_constraint="non_neg", kernel_initializer="ones")
        layer.build((None, 2))
        return layer.trainable_variables

    _, (windowed,) = updated_by_windows(lambda: keras.optimizers.SGD(1.0), kernel, [tf.constant([[5.0], [0.1]])])
    np.testing.assert_allclose(windowed, [[0.0], [0.7]], rtol=1e-6)


def test_optimizer_that_looks_at_a_variables_path_sees_it_after_a_window():
    def weights():
        layer = keras.layers.Dense(3, kernel_initializer="ones")
        layer.build((None, 2))
        return layer.trainable_variables

    gradients = [tf.constant([[1.0, 2.0, 3.0], [3.0, 2.0, 0.0]]), tf.ones([3])]
    single, windowed = updated_by_windows(lambda: keras.optimizers.Muon(0.1), weights, gradients)
    for left, right in zip(single, windowed, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


@pytest.mark.parametrize("home", [keras.optimizers, tf_keras.optimizers])
def test_variable_without_a_gradient_is_neither_decayed_nor_moved_by_a_window(home):
    single, windowed = updated_by_windows(
        lambda: home.AdamW(0.1, weight_decay=0.1),
        lambda: [tf.Variable([1.0]), tf.Variable([1.0])],
        [tf.constant([1.0]), None],
    )
    assert single == windowed
    assert single[0] < single[1] == 1.0


def test_variable_that_stands_in_no_pair_is_left_alone_by_a_window():
    trained, idle = tf.Variable([1.0]), tf.Variable([1.0])
    optimizer = LossScaleOptimizer(keras.optimizers.AdamW(0.1, weight_decay=0.1), accumulation_steps=2)
    optimizer.build([trained, idle])
    for _ in range(2):
        optimizer.apply_gradients([(tf.constant([1.0]), trained)])
    assert trained.numpy() < 1.0
    assert idle.numpy() == 1.0


def test_steps_that_train_other_variables_than_the_first_are_refused():
    first, second = tf.Variable([1.0], name="first"), tf.Variable([1.0], name="second")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), accumulation_steps=2)
    optimizer.build([first, second])
    gradient = tf.constant([1.0])
    optimizer.apply_gradients([(gradient, first), (gradient, second)])
    optimizer.apply_gradients([(gradient, second), (gradient, first)])
    with pytest.raises(ValueError, match="and second had one in some steps only"):
        optimizer.apply_gradients([(gradient, first)])


def make_run(strategy, **options):
    """Returns (optimizer, variable, a step that takes each replica's gradient and whether replica 0's loss is inf)."""
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0], name="kernel")
        inner = keras.optimizers.Adam(0.1, name="adam")
        optimizer = LossScaleOptimizer(inner, initial_scale=8, accumulation_steps=3, ema_momentum=0.9, **options)
        optimizer.build([variable])

    @tf.function
    def step(gradient, bad_loss):
        def replica_step():
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            bad = tf.logical_and(bad_loss, tf.equal(here, 0))
            factor = tf.where(bad, np.inf, tf.cast(here + 1, tf.float32))
            optimizer.get_scaled_loss(factor)
            optimizer.apply_gradients([(gradient * factor * tf.constant([0.1, 0.7]), variable)])

        strategy.run(replica_step)

    return optimizer, variable, lambda gradient, bad_loss=False: step(tf.constant(gradient), tf.constant(bad_loss))


def save_and_restore(how, folder, strategy, first, second):
    """Brings the state of one (optimizer, variable) into another."""
    if how == "state":
        for path, value in {path: variable.numpy() for path, variable in first[0].state.items()}.items():
            second[0].state[path].assign(value)
        second[1].assign(first[1].numpy())
    else:
        path = tf.train.Checkpoint(optimizer=first[0], variable=first[1]).save(str(folder / "window"))
        with strategy.scope():
            tf.train.Checkpoint(optimizer=second[0], variable=second[1]).restore(path).assert_consumed()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["state", "tf.train.Checkpoint"])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_window_in_progress_is_saved_and_goes_on(mirrored, tmp_path, replicas, how):
    strategy = mirrored(replicas)
    (*straight, step), (*restored, other_step) = make_run(strategy), make_run(strategy)
    for gradient in (1.0, 2.0, 3.0, -1.7, 0.3):
        step(gradient)
    save_and_restore(how, tmp_path, strategy, straight, restored)
    for gradient in (5.1, -2.3, 1.0, 1.0):
        step(gradient)
        other_step(gradient)
    for left, right in zip(straight[0].state.items(), restored[0].state.items(), strict=True):
        assert left[0] == right[0]
        if replicas == 1:
            np.testing.assert_array_equal(left[1].numpy(), right[1].numpy())
        else:  # each replica goes on with an equal share, so the last bit may round elsewhere
            np.testing.assert_allclose(left[1].numpy(), right[1].numpy(), rtol=2e-6)
    np.testing.assert_allclose(straight[1].numpy(), restored[1].numpy(), rtol=0 if replicas == 1 else 2e-6)
    assert int(straight[0].applied_steps) == int(restored[0].applied_steps) == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["state", "tf.train.Checkpoint"])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_loss_that_was_not_finite_is_still_the_cause_after_its_window_was_restored(mirrored, tmp_path, replicas, how):
    strategy = mirrored(replicas)
    (*straight, step), (*restored, other_step) = make_run(strategy), make_run(strategy)
    step(1.0, bad_loss=True)
    save_and_restore(how, tmp_path, strategy, straight, restored)
    for _ in range(5):
        other_step(1.0)
    assert int(restored[0].skipped_steps) == int(restored[0].applied_steps) == 1
    assert [skip.loss_finite for skip in restored[0].skips(0, 1)] == [False]


def test_sums_are_in_the_state_only_with_accumulation():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build([tf.Variable([1.0])])
    assert not [path for path in optimizer.state if path.startswith("sum/") or "accumulated" in path]


def test_average_follows_the_weights_by_the_formula():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), ema_momentum=0.9)
    variable = tf.Variable([1.0])
    optimizer.build([variable])
    expected, weight = None, 1.0
    for gradient in (1.0, 2.0, np.inf, 3.0):
        optimizer.apply_gradients([(tf.constant([gradient]), variable)])
        if np.isfinite(gradient):
            weight -= gradient
            expected = weight if expected is None else 0.9 * expected + 0.1 * weight
    with optimizer.averaged_weights():
        assert float(variable[0]) == pytest.approx(expected, abs=1e-6)
    assert float(variable[0]) == weight


@pytest.mark.parametrize("replicas", [1, 2])
def test_average_starts_from_the_weights_of_the_first_update_and_not_from_those_at_build(mirrored, replicas):
    strategy = mirrored(replicas)
    with strategy.scope():
        variable = tf.Variable([0.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), ema_momentum=0.75)
        optimizer.build([variable])
    variable.assign([100.0])  # as loading weights does
    with optimizer.averaged_weights():
        assert variable.numpy() == 100.0
    for average in (96.0, 95.0):  # the weights are 96 and 92
        strategy.run(lambda: optimizer.apply_gradients([(tf.constant([4.0]) / replicas, variable)]))
        with optimizer.averaged_weights():
            assert variable.numpy() == average
    assert variable.numpy() == 92.0


def test_checkpoint_without_an_average_starts_one(tmp_path):
    def make(**options):
        variable = tf.Variable([0.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), **options)
        optimizer.build([variable])
        return tf.train.Checkpoint(optimizer=optimizer, variable=variable), optimizer, variable

    without, optimizer, variable = make()
    optimizer.apply_gradients([(tf.constant([-8.0]), variable)])
    path = without.save(str(tmp_path / "without"))
    later, optimizer, variable = make(ema_momentum=0.75)
    later.restore(path)
    with optimizer.averaged_weights():
        assert variable.numpy() == 8.0
    optimizer.apply_gradients([(tf.constant([4.0]), variable)])
    with optimizer.averaged_weights():
        assert variable.numpy() == 4.0
