import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mptrain import InputError, LossScaleOptimizer, RunError

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


def scale_after(optimizer, outcomes, variable=None):
    """Steps once for each character: "." has a finite gradient, "x" an infinite one. Returns the scale after each."""
    variable = tf.Variable([1.0, 2.0]) if variable is None else variable
    scales = []
    for outcome in outcomes:
        gradient = tf.constant([1.0, np.inf if outcome == "x" else 1.0])
        optimizer.apply_gradients([(gradient, variable)])
        scales.append(float(optimizer.loss_scale))
    return scales


def test_scale_grows_and_backs_off_as_in_the_table():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8, growth_interval=2, max_scale=32)
    table = {"." * 6: [8, 16, 16, 32, 32, 32], "xxxxxxx": [16, 8, 4, 2, 1, 1, 1], ".x..": [1, 1, 1, 2]}
    variable = tf.Variable([1.0, 2.0])
    for outcomes, expected in table.items():
        assert scale_after(optimizer, outcomes, variable) == expected


def test_hysteresis_waits_for_the_second_overflow_until_the_scale_grows_again():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8, growth_interval=2, hysteresis=2)
    assert scale_after(optimizer, "x.xx..xx") == [8, 8, 4, 2, 2, 4, 4, 2]


def test_static_scale_never_moves_and_still_skips():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic=False, initial_scale=8, growth_interval=1)
    assert scale_after(optimizer, "..xx.") == [8] * 5
    assert (int(optimizer.applied_steps), int(optimizer.skipped_steps), int(optimizer.consecutive_skips)) == (3, 2, 0)


def test_counter_restored_past_the_interval_grows_at_once():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8, growth_interval=2)
    optimizer.state["loss_scale/applied_in_a_row"].assign(100)
    assert scale_after(optimizer, ".") == [16]


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
    with pytest.raises(RunError, match="the backward pass overflows. First layer: bad; gradients that are not finite: bad$"):
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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("growth_factor", 1.0),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
        ("hysteresis", 0),
        ("initial_scale", 0.0),
        ("initial_scale", np.inf),
        ("initial_scale", 1e39),
        ("initial_scale", 2.0**30),
        ("clip_norm", 0.0),
    ],
)
def test_number_out_of_range_is_refused_with_its_name(option, value):
    with pytest.raises(ValueError, match=option):
        LossScaleOptimizer(keras.optimizers.SGD(1.0), **{option: value})


def test_optimizer_that_scales_losses_itself_is_refused():
    with pytest.raises(TypeError, match="wrap the optimizer inside it"):
        LossScaleOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0)))


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
            np.testing.assert_allclose(variable.numpy(), [-1.5, -1.5], rtol=1e-6)
        np.testing.assert_allclose(variable.numpy(), [-3.0, -3.0], rtol=1e-6)


def test_average_follows_the_weights_by_the_formula():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), ema_momentum=0.9)
    variable = tf.Variable([1.0])
    optimizer.build([variable])
    expected, weight = 1.0, 1.0
    for gradient in (1.0, 2.0, np.inf, 3.0):
        optimizer.apply_gradients([(tf.constant([gradient]), variable)])
        if np.isfinite(gradient):
            weight -= gradient
            expected = 0.9 * expected + 0.1 * weight
    with optimizer.averaged_weights():
        assert float(variable[0]) == pytest.approx(expected, abs=1e-6)
    assert float(variable[0]) == weight


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


@pytest.mark.parametrize("home", [tf_keras.optimizers, tf_keras.optimizers.legacy])
def test_loss_scale_of_a_tf_keras_checkpoint_is_imported(tmp_path, home):
    theirs = tf_keras.mixed_precision.LossScaleOptimizer(home.SGD(), initial_scale=2.0**12)
    theirs._loss_scale.counter.assign(17)
    path = tf.train.Checkpoint(optimizer=theirs).save(str(tmp_path / "theirs"))
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.import_tf_keras_loss_scale(path)
    assert float(optimizer.loss_scale) == 2.0**12
    assert int(optimizer.state["loss_scale/applied_in_a_row"].numpy()) == 17
    with pytest.raises(InputError, match="no TensorFlow checkpoint"):
        optimizer.import_tf_keras_loss_scale(str(tmp_path / "nothing"))


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


@pytest.mark.parametrize("inner", INNER)
def test_float64_variables_are_updated_in_float64(inner):
    variable = tf.Variable([1.0, 2.0], dtype=tf.float64)
    assert LossScaleOptimizer(INNER[inner]()).apply_gradients([(tf.constant([0.5, 0.5]), variable)])
    assert (variable.numpy() < [1.0, 2.0]).all()
