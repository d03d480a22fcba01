import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import InputError, LossScaleOptimizer, Trainer, data, precision
from mptrain.checkpoints import Checkpoints
from mptrain.runner import build_trainer, run
from tests import trainers
from tests.runs import rows


def train(trainer, steps):
    for _ in range(steps):
        outputs = trainer.train(tf.constant(1))
    return outputs


def values(trainer):
    return {path: variable.numpy() for path, variable in trainer.state.items()}


def bring_back(trainer, state):
    """Gives a trainer the values of another moment, for another run without another trace."""
    for path, value in state.items():
        trainer.state[path].assign(value)
    log = trainer.optimizer._skips  # which is no part of the state: what it remembers must not pass for the next run's
    log._updates.assign(-tf.ones_like(log._updates))
    log._losses_finite.assign(tf.ones_like(log._losses_finite))


def assert_same_bits(left, right, *, but=()):
    assert left.keys() == right.keys()
    for path in left:
        if not path.endswith(but):
            np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_same_seed_gives_same_bits(config):
    first, second = trainers.TinyTrainer(config), trainers.TinyTrainer(config)
    train(first, 3), train(second, 3)
    assert_same_bits(values(first), values(second))


def test_another_seed_gives_other_weights(config):
    first = trainers.TinyTrainer(config)
    config.seed = 1
    second = trainers.TinyTrainer(config)
    assert not np.array_equal(first.model.get_weights()[0], second.model.get_weights()[0])


def test_steps_in_one_loop_equal_steps_one_by_one(config):
    first, second = trainers.TinyTrainer(config), trainers.TinyTrainer(config)
    first.train(tf.constant(5))
    train(second, 5)
    assert_same_bits(values(first), values(second))


@pytest.mark.parametrize("replicas", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16", "native"])
def test_loss_falls_in_every_precision_on_every_number_of_replicas(config, mirrored, precision, replicas):
    config.precision.policy = precision
    trainer = trainers.TinyTrainer(config, mirrored(replicas))
    first = train(trainer, 1)["loss"]
    assert train(trainer, 30)["loss"] < 0.8 * first


def test_replicas_hold_the_same_model_and_differ_in_dropout_only(config, mirrored):
    trainer = trainers.TinyTrainer(config, mirrored(2))
    train(trainer, 3)
    for variable in trainer.model.variables:
        local = trainer.strategy.experimental_local_results(variable.value)
        np.testing.assert_array_equal(local[0].numpy(), local[1].numpy(), err_msg=variable.path)


def test_two_replicas_without_dropout_and_batchnorm_train_like_one(config, mirrored):
    config.precision.policy = "float32"
    config.optimizer.clip_norm = 0.5
    one = trainers.ModuleTrainer(config, mirrored(1))
    two = trainers.ModuleTrainer(config, mirrored(2))
    left, right = train(one, 10), train(two, 10)
    for name in ("loss", "accuracy", "gradient_norm"):
        assert left[name] == pytest.approx(right[name], rel=1e-5)
    for path, value in values(one).items():
        np.testing.assert_allclose(value, values(two)[path], rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_overflow_on_any_replica_changes_nothing_anywhere(config, mirrored, replicas):
    config.model = ConfigDict({"poisoned_steps": [3], "poisoned_replica": 0})
    trainer = trainers.PoisonedTrainer(config, mirrored(replicas))
    beginning = values(trainer)
    for replica in range(replicas):
        bring_back(trainer, beginning)
        trainer.poisoned_replica.assign(replica)
        train(trainer, 3)
        before = values(trainer)
        outputs = train(trainer, 1)
        counters = ("step", "/skipped_steps", "/consecutive_skips", "/gradient_norm", "/loss_scale", "/applied_in_a_row")
        assert_same_bits(before, values(trainer), but=(*counters, "/hysteresis_left"))
        assert outputs["skipped_steps"] == 1
        assert outputs["applied_steps"] == 3
        assert outputs["loss_scale"] == 2.0**9
        assert np.isnan(outputs["loss"])  # no step was applied, so there is no mean
        assert np.isfinite(trainer.evaluate(tf.constant(trainer.eval_steps))["loss"])
        assert train(trainer, 1)["applied_steps"] == 4


def test_nonfinite_loss_is_skipped_in_float32_as_well(config):
    config.precision.policy = "float32"
    config.model = ConfigDict({"poisoned_steps": [1], "poisoned_replica": 0})
    trainer = trainers.PoisonedTrainer(config)
    outputs = train(trainer, 3)
    assert (outputs["applied_steps"], outputs["skipped_steps"], outputs["loss_scale"]) == (2, 1, 1.0)


def test_plain_module_with_explicit_casts_trains_in_float16(config):
    trainer = trainers.ModuleTrainer(config)
    assert train(trainer, 1)["loss"] > train(trainer, 20)["loss"]


@pytest.mark.parametrize("replicas", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch_size", [7, 32, 100, 128])
def test_evaluation_counts_every_example_once(config, mirrored, batch_size, replicas):
    config.data.eval_batch_size = batch_size
    trainer = trainers.ModuleTrainer(config, mirrored(replicas))
    outputs = trainer.evaluate(tf.constant(trainer.eval_steps))
    source = trainer.eval_source.arrays
    logits = trainer.model(tf.constant(source["inputs"], tf.float16)).numpy()
    assert outputs["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == source["targets"]), abs=1e-6)
    assert float(tf.convert_to_tensor(trainer.metrics["accuracy"].count.value)) == 100


def test_default_strategy_trains_and_evaluates(config):
    trainer = trainers.TinyTrainer(config, tf.distribute.get_strategy())
    first = train(trainer, 1)["loss"]
    assert train(trainer, 19)["loss"] < first
    assert trainer.evaluate(tf.constant(trainer.eval_steps))["loss"] > 0


def test_model_may_branch_on_tensors_as_in_any_traced_function(config):
    class Branching(trainers.TinyModule):
        def __call__(self, x, training=False):
            if tf.reduce_sum(x) > 0:
                x = x / 2
            return super().__call__(x)

    class BranchingTrainer(trainers.TinyTrainer):
        def build_model(self):
            return Branching()

    assert train(BranchingTrainer(config), 1)["applied_steps"] == 1


def test_own_step_may_call_the_model_as_it_likes(config):
    class TwoInputs(trainers.TinyModule):
        def __call__(self, x, factor):
            return super().__call__(x) * factor

    class OwnStep(trainers.TinyTrainer):
        def build_model(self):
            return TwoInputs()

        def replica_train_step(self, batch):
            inputs = self.precision.cast_to_compute(batch["inputs"])
            with tf.GradientTape() as tape:
                outputs = self.precision.cast_to_output(self.model(inputs, tf.cast(2.0, inputs.dtype)))
                scaled = self.optimizer.get_scaled_loss(self.reduce_loss(self.compute_loss(batch, outputs)))
            gradients = self.optimizer.get_unscaled_gradients(tape.gradient(scaled, self.trainable_variables))
            return self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))

    assert train(OwnStep(config), 2)["applied_steps"] == 2


def test_xla_compiles_the_whole_step(config):
    config.precision.policy = "float32"
    config.train.jit_compile = True
    trainer = trainers.TinyTrainer(config)
    first = train(trainer, 1)["loss"]
    assert train(trainer, 20)["loss"] < first


@pytest.mark.parametrize("replicas", [1, 2])
def test_xla_with_mirrored_cpus_is_refused(config, mirrored, replicas):
    config.train.jit_compile = True
    with pytest.raises(InputError, match="jit_compile"):
        trainers.TinyTrainer(config, mirrored(replicas))


def test_batch_that_replicas_cannot_share_is_refused(config, mirrored):
    config.data.batch_size = 10
    with pytest.raises(InputError, match="divisible by the 3 replicas, as 9 is"):
        trainers.TinyTrainer(config, mirrored(3))


def test_scalar_loss_is_refused_with_the_reason(config):
    with pytest.raises(InputError, match="returns a scalar: return the loss of each example"):
        trainers.ScalarLossTrainer(config).train(tf.constant(1))


def test_step_that_returns_nothing_is_refused_with_the_reason(config):
    with pytest.raises(InputError, match="return applied"):
        trainers.ForgetfulTrainer(config).train(tf.constant(1))


def test_build_model_that_returns_nothing_is_refused_with_the_reason(config):
    class Returnless(trainers.TinyTrainer):
        def build_model(self):
            super().build_model()

    with pytest.raises(InputError, match="returns None: return the model"):
        Returnless(config)


def test_float16_that_no_layer_computes_in_is_refused(config):
    with pytest.raises(InputError, match="no layer with parameters computes in float16"):
        trainers.Float32EverywhereTrainer(config)


def test_base_class_says_what_to_override(config):
    config.trainer = "mptrain.Trainer"
    config.data.name = "mnist"
    with pytest.raises(InputError, match="must override build_model"):
        build_trainer(config)


def test_source_without_examples_is_refused():
    with pytest.raises(InputError, match="at least one"):
        data.Source({"inputs": np.zeros([0, 2])})


def test_trainer_is_a_public_name():
    assert issubclass(trainers.TinyTrainer, Trainer)


def test_accumulated_window_equals_the_large_batch(config, mirrored):
    config.precision.policy = "float32"
    config.checkpoint.every_steps = config.train.steps = 12
    config.optimizer.clip_norm = 0.5
    config.optimizer.ema_momentum = 0.9
    large = trainers.ModuleTrainer(config, mirrored(1))
    train(large, 3)
    config.data.batch_size //= 4
    config.optimizer.accumulation_steps = 4
    for replicas in (1, 3):
        small = trainers.ModuleTrainer(config, mirrored(replicas))
        train(small, 12)
        for path, value in values(large).items():
            if path != "step":
                np.testing.assert_allclose(values(small)[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("replicas", [1, 2])
def test_overflow_inside_a_window_puts_back_the_statistics_of_all_its_steps(config, mirrored, replicas):
    config.optimizer.accumulation_steps, config.eval.every_steps = 3, 6
    config.model = ConfigDict({"poisoned_steps": [4], "poisoned_replica": replicas - 1})
    trainer = trainers.PoisonedTrainer(config, mirrored(replicas))
    train(trainer, 3)
    before = values(trainer)
    train(trainer, 3)
    after = values(trainer)
    for path in before:
        if path.startswith(("model/", "optimizer/inner/")):
            np.testing.assert_array_equal(before[path], after[path], err_msg=path)
    assert int(trainer.optimizer.skipped_steps) == 1
    assert np.isfinite(train(trainer, 3)["loss"])


def test_evaluation_uses_the_averaged_weights_and_leaves_the_own_ones(config):
    config.optimizer.ema_momentum = 0.99
    config.optimizer.learning_rate = 1.0
    trainer = trainers.ModuleTrainer(config)
    train(trainer, 5)
    before = values(trainer)
    with_average = trainer.evaluate(tf.constant(trainer.eval_steps))["loss"]
    assert_same_bits(before, values(trainer))
    trainer.optimizer._average = None
    assert trainer.evaluate(tf.constant(trainer.eval_steps))["loss"] != with_average


def test_frozen_weights_keep_their_bits_on_three_replicas(config, mirrored):
    trainer = trainers.FrozenTrainer(config, mirrored(3))
    before = values(trainer)
    train(trainer, 10)
    frozen = [path for path in before if "conv2d" in path and path.startswith("model/")]
    assert len(frozen) == 2
    for path in frozen:
        np.testing.assert_array_equal(before[path], values(trainer)[path])


@pytest.mark.parametrize("replicas", [1, 2])
def test_regularizers_count(config, mirrored, replicas):
    config.precision.policy = "float32"
    losses = {}
    for strength in (0.0, 1.0):
        config.model = ConfigDict({"strength": strength})
        trainer = trainers.RegularizedTrainer(config, mirrored(replicas))
        penalty = strength * float(tf.reduce_sum(trainer.model.trainable_variables[0].value ** 2))
        losses[strength] = train(trainer, 1)["loss"]
    assert losses[1.0] == pytest.approx(losses[0.0] + penalty, rel=1e-5)


def test_dropout_draws_anew_in_each_turn_of_a_graph_loop(config):
    trainer = trainers.LoopDropoutTrainer(config)
    train(trainer, 1)
    first = trainer.masks.numpy()
    assert 0.3 < np.mean(first[0] == first[1]) < 0.7
    assert 0.3 < np.mean(first[0] == first[2]) < 0.7
    train(trainer, 1)
    assert 0.3 < np.mean(first[0] == trainer.masks.numpy()[0]) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("kind", [trainers.TinyTrainer, trainers.TfKerasTrainer])
@pytest.mark.parametrize("replicas", [1, 2])
def test_state_brought_into_a_new_trainer_goes_on_with_the_same_bits(config, mirrored, tmp_path, kind, replicas):
    config.optimizer.ema_momentum = 0.9
    straight, first, second = (kind(config, mirrored(replicas)) for _ in range(3))
    train(straight, 6)
    train(first, 4)
    Checkpoints(tmp_path, first.state, keep=1).save(4)
    assert Checkpoints(tmp_path, second.state, keep=1).restore_newest(print) == 4
    train(second, 2)
    assert_same_bits(values(straight), values(second))


def test_native_float16_layers_get_their_loss_scaled(config):
    class Native(trainers.TinyTrainer):
        def build_model(self):
            with precision.get("mixed_float16").scope():
                return super().build_model()

    config.precision.policy = "native"
    trainer = Native(config)
    assert float(trainer.optimizer.loss_scale) == 2.0**10
    assert trainer.kernels.widen


def healthy_steps(config, strategy):
    """The steps 0, 2 and 5 alone, with metrics that run through."""
    config.model = ConfigDict({"poisoned_steps": [-1], "poisoned_replica": 0, "poison": 0.0})
    trainer = trainers.PoisonedTrainer(config, strategy)
    for step in (0, 2, 5):
        trainer.global_step.assign(step)
        trainer.train(tf.constant(1))
        trainer._reset_metrics = lambda: None
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_loop_with_overflows_ends_with_the_bits_of_a_run_without_those_steps(config, mirrored, replicas):
    config.loss_scale.dynamic = False  # another scale would round float16 gradients elsewhere
    config.optimizer.ema_momentum = 0.9
    expected = healthy_steps(config, mirrored(replicas))
    config.model.poisoned_steps = [1, 3, 4]
    trainer = trainers.PoisonedTrainer(config, mirrored(replicas))
    beginning = values(trainer)
    for replica, poison in itertools.product(range(replicas), (np.inf, np.nan)):
        bring_back(trainer, beginning)
        trainer.poisoned_replica.assign(replica)
        trainer.poison.assign(poison)
        trainer.train(tf.constant(6))
        counters = ("/skipped_steps", "/consecutive_skips")
        assert_same_bits(values(expected), values(trainer), but=counters)
        metrics = [[float(metric.result()) for metric in t.metrics.values()] for t in (expected, trainer)]
        assert metrics[0] == metrics[1]
        assert [skip.update for skip in trainer.optimizer.skips(0, 3)] == [1, 3, 4]
        assert not any(skip.loss_finite for skip in trainer.optimizer.skips(0, 3))


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_forward_and_backward_compiled_by_xla_and_applied_outside(mirrored, replicas):
    strategy = mirrored(replicas)
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))
        optimizer.build([variable])

    @tf.function(jit_compile=True)
    def gradients(x):
        with tf.GradientTape() as tape:
            scaled = optimizer.get_scaled_loss(tf.reduce_sum(tf.cast(variable, tf.float16) * tf.cast(x, tf.float16)) / replicas)
        return optimizer.get_unscaled_gradients(tape.gradient(scaled, [variable]))

    @tf.function
    def loop(xs):
        for x in xs:
            strategy.run(lambda x: optimizer.apply_gradients(zip(gradients(x), [variable], strict=True)), args=(x,))

    loop(tf.constant([0.5, np.inf, 0.25]))
    np.testing.assert_allclose(variable.numpy(), [0.25, 1.25], rtol=1e-3)
    assert [(skip.update, skip.loss_finite) for skip in optimizer.skips(0, 1)] == [(1, False)]


def test_trained_variable_outside_of_the_model_is_in_the_state(config, mirrored):
    class WithTemperature(trainers.TinyTrainer):
        def build_model(self):
            self.temperature = tf.Variable(2.0, name="temperature")
            return super().build_model()

        @property
        def trainable_variables(self):
            return [*super().trainable_variables, self.temperature]

        def compute_loss(self, batch, outputs):
            return super().compute_loss(batch, outputs * self.temperature)

    trainer = WithTemperature(config, mirrored(2))
    trainer.train(tf.constant(3))
    assert trainer.state["trainer/temperature"].numpy() == trainer.temperature.numpy() != 2.0
    assert all(not path.startswith("trainer/") for path in trainers.TinyTrainer(config, mirrored(2)).state)


def test_evaluations_fall_between_accumulation_windows(config, tmp_path):
    config.optimizer.accumulation_steps = 4
    config.train.steps, config.checkpoint.every_steps, config.eval.every_steps = 28, 28, None
    run(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", split="eval")] == [12, 24, 28]  # an epoch has 9 steps
