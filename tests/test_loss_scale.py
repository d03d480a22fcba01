import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mptrain import InputError, LossScaleOptimizer, RunError
from mptrain.replicas import check_strategy
from tests.test_dynamic_scale import scale_after
from tests.test_inner_optimizer import PlainSgd


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_clipping_sees_the_sum_over_replicas(mirrored, replicas):
    strategy = mirrored(replicas)
    with strategy.scope():
        variables = [tf.Variable([0.0]), tf.Variable([0.0])]
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), clip_norm=1.0)
        optimizer.build(variables)

    @tf.function
    def step():
        def replica_step():
            gradients = [tf.constant([3.0]) / replicas, tf.constant([4.0]) / replicas]
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        strategy.run(replica_step)

    step()
    assert [float(-v[0]) for v in variables] == pytest.approx([0.6, 0.8], rel=1e-6)
    assert float(optimizer.gradient_norm) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_works_in_a_while_loop_with_and_without_xla(jit_compile):
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1), initial_scale=4, growth_interval=3)
    variable = tf.Variable([1.0, 2.0])
    optimizer.build([variable])

    @tf.function(jit_compile=jit_compile)
    def loop():
        for i in tf.range(6):
            gradient = tf.where(i == 2, np.inf, 1.0) * tf.ones([2])
            optimizer.apply_gradients([(gradient, variable)])

    loop()
    assert (int(optimizer.applied_steps), int(optimizer.skipped_steps)) == (5, 1)
    assert float(optimizer.loss_scale) == 4  # backed off to 2 at the third step, grown to 4 at the sixth
    assert np.isfinite(variable.numpy()).all()


def test_scaled_loss_is_float32_and_float16_losses_do_not_overflow_in_it():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    scaled = optimizer.get_scaled_loss(tf.constant(3.8, tf.float16))
    assert scaled.dtype == tf.float32
    assert float(scaled) == float(np.float16(3.8)) * 32768


def test_unscaling_casts_first_so_that_small_float16_gradients_survive():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    (gradient,) = optimizer.get_unscaled_gradients([tf.constant([1e-3], tf.float16)])
    assert gradient.dtype == tf.float32
    assert float(gradient[0]) == float(np.float16(1e-3)) / 32768 > 0


def test_none_and_sparse_gradients_stay_what_they_are():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=2, clip_norm=1.0)
    table, unused = tf.Variable(tf.zeros([5, 1])), tf.Variable([7.0])
    sparse = tf.IndexedSlices(tf.constant([[3.0], [3.0], [8.0]], tf.float16), tf.constant([1, 1, 4]), tf.constant([5, 1]))
    gradients = optimizer.get_unscaled_gradients([sparse, None])
    assert isinstance(gradients[0], tf.IndexedSlices)
    assert gradients[0].values.dtype == tf.float32
    assert gradients[1] is None
    optimizer.apply_gradients(zip(gradients, [table, unused], strict=True))
    assert float(optimizer.gradient_norm) == 5.0  # rows that stand twice are one row: 3 and 4
    np.testing.assert_allclose(table.numpy().ravel(), [0, -0.6, 0, 0, -0.8], rtol=1e-6)
    assert unused.numpy() == 7.0


def test_run_that_always_overflows_ends_with_the_names_and_the_cause():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), max_consecutive_skips=3)
    good, bad = tf.Variable([1.0], name="good"), tf.Variable([1.0], name="bad")

    def step(loss):
        optimizer.get_scaled_loss(tf.constant(loss))
        optimizer.apply_gradients([(tf.constant([1.0]), good), (tf.constant([np.inf]), bad)])

    step(1.0), step(1.0)
    optimizer.raise_if_stuck()
    step(1.0)
    with pytest.raises(RunError, match="the backward pass overflows. First layer: bad; gradients .*: bad$"):
        optimizer.raise_if_stuck()
    step(np.inf)
    with pytest.raises(RunError, match="the loss itself is not finite"):
        optimizer.raise_if_stuck()


def test_under_several_replicas_an_unbuilt_optimizer_is_refused(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variable = tf.Variable([1.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))
    with pytest.raises(RuntimeError, match="call optimizer.build"):
        strategy.run(lambda: optimizer.apply_gradients([(tf.constant([1.0]), variable)]))


def test_outside_a_replica_context_it_is_refused(mirrored):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))
    with mirrored(2).scope(), pytest.raises(RuntimeError, match=r"strategy.run"):
        optimizer.apply_gradients([(tf.constant([1.0]), tf.Variable([1.0]))])


def test_gradients_that_are_all_none_are_refused():
    with pytest.raises(ValueError, match="every gradient is None"):
        LossScaleOptimizer(keras.optimizers.SGD(1.0)).apply_gradients([(None, tf.Variable([1.0]))])


def test_strategy_whose_replicas_do_not_step_together_is_refused():
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    with strategy.scope(), pytest.raises(InputError, match="cannot agree on skipping"):
        LossScaleOptimizer(keras.optimizers.SGD(1.0))


def test_every_skip_is_remembered_with_its_number_scale_and_variables():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8)
    first, second = tf.Variable([1.0], name="block/first/kernel"), tf.Variable([1.0], name="block/second/kernel")
    optimizer.build([first, second])
    for loss, gradients in ((1.0, (1, np.inf)), (1.0, (1, 1)), (np.nan, (np.nan, np.nan))):
        optimizer.get_scaled_loss(tf.constant(loss))
        optimizer.apply_gradients(zip(map(tf.constant, [[float(g)] for g in gradients]), [first, second], strict=True))
    skips = optimizer.skips(0, 2)
    assert [(skip.update, skip.loss_scale, skip.loss_finite, skip.layer) for skip in skips] == [
        (0, 8.0, True, "block/second"),
        (2, 4.0, False, "block/first"),
    ]


def test_ring_of_skips_forgets_the_oldest_only():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    variable = tf.Variable([1.0])
    scale_after(optimizer, "x" * 70, variable)
    assert [skip.update for skip in optimizer.skips(0, 70)] == list(range(6, 70))


finite = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)  # TensorFlow flushes subnormals to zero
shapes = hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gradients=st.lists(st.none() | shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=finite)), min_size=1),
    exponent=st.integers(0, 24),
    clip_norm=st.none() | st.floats(1e-3, 1e3),
)
def test_scaling_and_unscaling_is_exact_and_the_update_is_the_clipped_gradient(gradients, exponent, clip_norm):
    """For any shapes, any Nones and any scale that is a power of two."""
    optimizer = LossScaleOptimizer(PlainSgd(), initial_scale=2.0**exponent, clip_norm=clip_norm)
    scaled = [None if g is None else tf.constant(g * np.float32(2.0**exponent)) for g in gradients]
    unscaled = optimizer.get_unscaled_gradients(scaled)
    for given_gradient, returned in zip(gradients, unscaled, strict=True):
        if given_gradient is None:
            assert returned is None
        else:
            np.testing.assert_array_equal(returned.numpy(), given_gradient)
    present = [g.astype(np.float64) for g in gradients if g is not None]
    variables = [tf.Variable(np.zeros((1,) if g is None else g.shape, np.float32)) for g in gradients]
    if not present:
        with pytest.raises(ValueError, match="every gradient is None"):
            optimizer.apply_gradients(zip(unscaled, variables, strict=True))
        return
    assert optimizer.apply_gradients(zip(unscaled, variables, strict=True))
    norm = np.sqrt(sum((g**2).sum() for g in present))
    assert float(optimizer.gradient_norm) == pytest.approx(norm, rel=1e-5, abs=1e-18)  # squares below 1e-38 vanish
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / max(norm, 1e-30))
    for gradient, variable in zip(gradients, variables, strict=True):
        if gradient is not None:
            np.testing.assert_allclose(variable.numpy(), -gradient * factor, rtol=1e-4, atol=1e-30)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.floats(-100, 100, width=32)), min_size=1, max_size=12),
    bad=st.none() | st.integers(0, 11),
)
def test_sparse_gradient_counts_like_the_dense_one(rows, bad):
    """For any repetition of rows, and an inf in any of them."""
    indices, numbers = [row for row, _ in rows], np.array([[number] for _, number in rows], np.float32)
    if bad is not None:
        numbers[bad % len(rows)] = np.inf
    sparse = tf.IndexedSlices(tf.constant(numbers), tf.constant(indices), tf.constant([6, 1]))
    optimizer, variable = LossScaleOptimizer(keras.optimizers.SGD(1.0)), tf.Variable(tf.zeros([6, 1]))
    applied = optimizer.apply_gradients([(sparse, variable)])
    assert bool(applied) == (bad is None)
    dense = np.zeros((6, 1))
    np.add.at(dense, indices, numbers.astype(np.float64))
    expected = -dense if bad is None else np.zeros((6, 1))
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-4)
    if bad is None:
        assert float(optimizer.gradient_norm) == pytest.approx(np.sqrt((dense**2).sum()), rel=1e-4, abs=1e-4)


def test_tf_train_checkpoint_holds_all_state_and_brings_it_back(tmp_path):
    def make():
        variable = tf.Variable([1.0, 2.0])
        optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1), initial_scale=8, growth_interval=2, ema_momentum=0.9)
        optimizer.build([variable])
        return variable, optimizer

    first, second = make(), make()
    scale_after(first[1], "..x.", first[0])
    path = tf.train.Checkpoint(optimizer=first[1], variable=first[0]).save(str(tmp_path / "state"))
    tf.train.Checkpoint(optimizer=second[1], variable=second[0]).restore(path).assert_consumed()
    for left, right in zip(first[1].state.values(), second[1].state.values(), strict=True):
        np.testing.assert_array_equal(left.numpy(), right.numpy())


@pytest.mark.parametrize("home", [keras.optimizers, tf_keras.optimizers, tf_keras.optimizers.legacy])
def test_rows_that_stand_twice_are_updated_once_by_their_sum(home):
    """Keras 3's own optimizers apply such rows one after another, which for Adam is another update."""
    sparse = tf.IndexedSlices(tf.ones([3, 1]), tf.constant([1, 1, 2]), tf.constant([4, 1]))
    dense, results = tf.constant([[0.0], [2.0], [1.0], [0.0]]), []
    for gradient in (sparse, dense):
        variable = tf.Variable(tf.zeros([4, 1]))
        optimizer = LossScaleOptimizer(home.Adam(0.1))
        optimizer.apply_gradients([(gradient, variable)])
        results.append(variable.numpy())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6, atol=1e-7)


rows = tf.IndexedSlices(tf.constant([[1.0], [1.0]]), tf.constant([0, 2]), tf.constant([3, 1]))
ones = tf.ones([3, 1])


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    ("pair", "total"),
    [((ones, ones), [2, 2, 2]), ((rows, rows), [2, 0, 2]), ((rows, ones), [2, 1, 2]), ((ones, rows), [2, 1, 2])],
)
def test_gradients_of_a_variable_that_stands_twice_add_up(window, pair, total):
    variable, optimizer = (
        tf.Variable(tf.zeros([3, 1])),
        LossScaleOptimizer(keras.optimizers.Adam(0.1), accumulation_steps=window),
    )
    for _ in range(window):
        optimizer.apply_gradients([(gradient, variable) for gradient in pair])
    assert float(optimizer.gradient_norm) == pytest.approx(np.linalg.norm(total), rel=1e-6)
    np.testing.assert_allclose(variable.numpy().ravel(), [-0.1 * (each > 0) for each in total], atol=1e-6)


def test_loss_that_is_not_finite_is_the_cause_though_another_one_is_finite_and_only_of_its_own_update():
    optimizer, variable = LossScaleOptimizer(keras.optimizers.SGD(0.1)), tf.Variable([1.0])
    for losses in ((np.inf, 1.0), (1.0, 1.0)):
        for loss in losses:
            optimizer.get_scaled_loss(tf.constant(loss))
        optimizer.apply_gradients([(tf.constant([np.inf]), variable)])
    assert [skip.loss_finite for skip in optimizer.skips(0, 2)] == [False, True]


def test_run_that_is_stuck_right_after_a_restore_ends_without_an_invented_cause():
    optimizers = []
    for _ in range(2):
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1, name="sgd"), max_consecutive_skips=1)
        optimizer.build([tf.Variable([1.0], name="kernel")])
        optimizers.append(optimizer)
    first, second = optimizers
    first.apply_gradients([(tf.constant([np.inf]), first._inner.trained[0])])
    for path, variable in second.state.items():
        variable.assign(first.state[path])
    with pytest.raises(RunError, match="1 updates in a row .* cause is not known; the loss scale is 16384") as error:
        second.raise_if_stuck()
    assert "kernel" not in str(error.value)


def test_finite_gradients_whose_norm_overflows_are_not_called_nonfinite():
    optimizer, variable = LossScaleOptimizer(PlainSgd(), max_consecutive_skips=1), tf.Variable([1.0])
    assert not optimizer.apply_gradients([(tf.constant([1e20]), variable)])
    with pytest.raises(RunError, match="not finite, or above 1e19"):
        optimizer.raise_if_stuck()


@pytest.mark.parametrize("gradient", [ones, rows])
def test_one_gradient_in_place_of_a_list_is_refused(gradient):
    with pytest.raises(TypeError, match=r"write \[gradient\]"):
        LossScaleOptimizer(keras.optimizers.SGD(1.0)).get_unscaled_gradients(gradient)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        LossScaleOptimizer(keras.optimizers.SGD(1.0)).apply_gradients([])


@pytest.mark.parametrize("outside", ["build", "optimizer", "inner"])
def test_what_is_made_outside_of_the_strategys_scope_is_refused(mirrored, outside):
    strategy = mirrored(2)
    inner, optimizer = keras.optimizers.Adam(1.0), None
    if outside == "optimizer":
        optimizer = LossScaleOptimizer(inner)
    with strategy.scope():
        variable = tf.Variable([1.0])
        inner = inner if outside == "inner" else keras.optimizers.Adam(1.0)
        optimizer = optimizer or LossScaleOptimizer(inner)
        if outside != "build":
            with pytest.raises(RuntimeError, match=r"in one `with strategy.scope\(\):`"):
                optimizer.build([variable])
    if outside == "build":
        with pytest.raises(RuntimeError, match=r"in one `with strategy.scope\(\):`"):
            optimizer.build([variable])


@pytest.mark.parametrize("replicas", [1, 2])
def test_variables_may_come_from_the_tape_where_tf_keras_casts_them(mirrored, replicas):
    strategy = mirrored(replicas)
    with strategy.scope():
        layer = tf_keras.layers.Dense(1, dtype="mixed_float16")
        layer.build((None, 2))
        optimizer = LossScaleOptimizer(tf_keras.optimizers.SGD(1.0))
        optimizer.build(layer.trainable_variables)

    @tf.function
    def step():
        def replica_step():
            with tf.GradientTape() as tape:
                loss = optimizer.get_scaled_loss(tf.reduce_sum(layer(tf.ones([1, 2]))) / replicas)
            variables = tape.watched_variables()
            gradients = optimizer.get_unscaled_gradients(tape.gradient(loss, variables))
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        strategy.run(replica_step)

    step()
    np.testing.assert_allclose(layer.bias.numpy(), [-1.0])


def test_float16_on_a_tpu_is_refused_and_bfloat16_is_not():
    """There is no TPU here: the strategy is TensorFlow's class, not connected to one."""
    tpu = object.__new__(tf.distribute.TPUStrategy)
    with pytest.raises(InputError, match="TPU"):
        check_strategy(tpu, scaled=True)
    check_strategy(tpu, scaled=False)
