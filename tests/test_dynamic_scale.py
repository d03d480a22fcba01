import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from mptrain import InputError, LossScaleOptimizer


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


def test_step_at_which_the_scale_stays_computes_no_other_scale():
    variable = tf.Variable([1.0, 2.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build([variable])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = optimizer.get_scaled_loss(tf.reduce_sum(variable))
        gradients = optimizer.get_unscaled_gradients(tape.gradient(loss, [variable]))
        optimizer.apply_gradients(zip(gradients, [variable], strict=True))

    types = {op.type for op in step.get_concrete_function().graph.get_operations()}
    assert not types & {"SelectV2", "Select", "Minimum"}  # they stand in the branch that moves the scale


def test_hysteresis_waits_for_the_second_overflow_until_the_scale_grows_again():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8, growth_interval=2, hysteresis=2)
    assert scale_after(optimizer, "x.xx..xx") == [8, 8, 4, 2, 2, 4, 4, 2]


def test_static_scale_never_moves_and_still_skips():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic=False, initial_scale=8, growth_interval=1)
    assert scale_after(optimizer, "..xx.") == [8] * 5
    assert (int(optimizer.applied_steps), int(optimizer.skipped_steps), int(optimizer.consecutive_skips)) == (3, 2, 0)


@pytest.mark.parametrize(
    ("restored", "outcome", "expected"),
    [
        (2.0**30, ".", 64.0),
        (2.0**30, "x", 64.0),
        (np.inf, "x", 4.0),
        (np.nan, "x", 4.0),
        (0.0, "x", 4.0),
        (0.0, ".", 4.0),
        (-8.0, ".", 4.0),
    ],
)
def test_restored_scale_out_of_range_comes_back_into_it_with_the_next_update(restored, outcome, expected):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8, min_scale=4, max_scale=64)
    optimizer.state["loss_scale/loss_scale"].assign(restored)
    assert scale_after(optimizer, outcome) == [expected]


def test_scale_stops_at_a_ceiling_next_to_float32s_own():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**127, max_scale=3e38, growth_interval=1)
    assert scale_after(optimizer, "..") == [float(np.float32(3e38))] * 2


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_static_scale_is_the_configured_one_whatever_was_restored(scale):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic=False, initial_scale=scale)
    optimizer.state["loss_scale/loss_scale"].assign(2.0**10)
    assert float(optimizer.loss_scale) == float(optimizer.get_scaled_loss(tf.constant(1.0))) == scale
    assert float(optimizer.get_unscaled_gradients([tf.constant([scale])])[0]) == 1.0
    assert scale_after(optimizer, ".x") == [scale, scale]


def test_counter_restored_past_the_interval_grows_at_once():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8, growth_interval=2)
    optimizer.state["loss_scale/applied_in_a_row"].assign(100)
    assert scale_after(optimizer, ".") == [16]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("growth_factor", 1.0),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
        ("hysteresis", 0),
        ("hysteresis", -1),
        ("growth_factor", np.inf),
        ("growth_factor", np.nan),
        ("initial_scale", 0.0),
        ("initial_scale", -1.0),
        ("initial_scale", np.inf),
        ("initial_scale", 1e39),
        ("initial_scale", 2.0**30),
        ("min_scale", 0),
        ("min_scale", -1),
        ("min_scale", 2.0**25),
        ("max_scale", np.inf),
        ("max_scale", 0.5),
        ("max_consecutive_skips", 0),
        ("max_consecutive_skips", -1),
        ("accumulation_steps", 0),
        ("ema_momentum", 0.0),
        ("ema_momentum", 1.0),
        ("clip_norm", 0.0),
        ("clip_norm", -1.0),
        ("clip_norm", np.nan),
        ("clip_norm", np.inf),
        ("clip_norm", 1e39),
        ("clip_norm", 1e-46),
    ],
)
def test_number_out_of_range_is_refused_with_its_name(option, value):
    with pytest.raises(ValueError, match=rf"{option}\b.* must"):
        LossScaleOptimizer(keras.optimizers.SGD(1.0), **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dynamic", "no"),
        ("dynamic", 1),
        ("growth_interval", 1.5),
        ("growth_interval", None),
        ("hysteresis", True),
        ("max_consecutive_skips", None),
        ("accumulation_steps", 2.5),
        ("accumulation_steps", "2"),
        ("initial_scale", "dynamic"),
        ("initial_scale", None),
        ("min_scale", None),
        ("max_scale", "2"),
        ("growth_factor", True),
        ("backoff_factor", None),
        ("clip_norm", "1"),
        ("ema_momentum", "0.9"),
    ],
)
def test_argument_of_another_type_is_refused_with_its_name(option, value):
    with pytest.raises(TypeError, match=rf"^{option} is .* must be"):
        LossScaleOptimizer(keras.optimizers.SGD(1.0), **{option: value})


def test_range_is_checked_for_a_static_scale_too():
    with pytest.raises(ValueError, match="^min_scale is -1"):
        LossScaleOptimizer(keras.optimizers.SGD(1.0), dynamic=False, min_scale=-1)
    LossScaleOptimizer(keras.optimizers.SGD(1.0), dynamic=False, initial_scale=1, min_scale=128.0)


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


def tf_keras_checkpoint(folder, scale):
    theirs = tf_keras.mixed_precision.LossScaleOptimizer(tf_keras.optimizers.SGD())
    theirs._loss_scale._current_loss_scale.assign(scale)
    return tf.train.Checkpoint(optimizer=theirs).save(str(folder / "theirs"))


def test_imported_scale_is_moved_into_the_range(tmp_path):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.import_tf_keras_loss_scale(tf_keras_checkpoint(tmp_path, 2.0**30))
    assert float(optimizer.loss_scale) == 2.0**24


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_scale_that_cannot_be_one_is_not_imported(tmp_path, scale):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8)
    with pytest.raises(InputError, match="must be above 0 and finite"):
        optimizer.import_tf_keras_loss_scale(tf_keras_checkpoint(tmp_path, scale))
    assert float(optimizer.loss_scale) == 8


def test_static_scale_imports_none(tmp_path):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic=False, initial_scale=1)
    with pytest.raises(InputError, match="the loss scale stays 1, with dynamic=False"):
        optimizer.import_tf_keras_loss_scale(tf_keras_checkpoint(tmp_path, 8.0))


def test_loss_scale_of_a_tf_keras_saved_model_is_imported(tmp_path):
    model = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(2,))])
    inner = tf_keras.optimizers.SGD()
    model.compile(tf_keras.mixed_precision.LossScaleOptimizer(inner, initial_scale=2.0**9), "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    model.save(tmp_path / "model", save_format="tf")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.import_tf_keras_loss_scale(str(tmp_path / "model"))
    assert float(optimizer.loss_scale) == 2.0**9
