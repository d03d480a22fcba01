"""Several optimizers in one step: a skipped update takes back what is its own, and nothing of the others'."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mptrain
from mptrain import InputError, LossScaleOptimizer, Optimizers
from tests.runs import rows, tiny_config
from tests.trainers import TinyTrainer

TOO_HIGH = 1e30  # a loss scale at which every float16 gradient overflows


class Towers(tf.Module):
    """Two networks with BatchNorm, "left" and "right", and a scaling that both read and none owns."""

    def __init__(self):
        super().__init__(name="towers")
        self.left, self.right = self.tower("left"), self.tower("right")
        self.calls = tf.Variable(0.0, trainable=False, name="calls")

    @staticmethod
    def tower(name):
        layers = keras.layers
        inside = [layers.Flatten(), layers.Dense(4), layers.BatchNormalization(), layers.Dense(3, dtype="float32")]
        return keras.Sequential([keras.Input((6, 6, 1)), *inside], name=name)

    def __call__(self, inputs, training=False):
        if training:
            self.calls.assign_add(1.0)
        return self.left(inputs, training=training), self.right(inputs, training=training)


class TowersTrainer(TinyTrainer):
    """Each tower learns the same task with its own optimizer."""

    def build_model(self):
        return Towers()

    def build_optimizer(self):
        return Optimizers(
            left=(super().build_optimizer(), self.model.left), right=(super().build_optimizer(), self.model.right)
        )

    def build_metrics(self):
        return {}

    def compute_loss(self, batch, outputs):
        return sum(super(TowersTrainer, self).compute_loss(batch, logits) for logits in outputs)

    def replica_train_step(self, batch):
        with tf.GradientTape(persistent=True) as tape:
            inputs = self.precision.cast_to_compute(self.inputs(batch))
            outputs = dict(zip(("left", "right"), self.model(inputs, training=True), strict=True))
            losses = {name: self.reduce_loss(super(TowersTrainer, self).compute_loss(batch, x)) for name, x in outputs.items()}
            scaled = {name: self.optimizer[name].get_scaled_loss(loss) for name, loss in losses.items()}
        applied = {}
        for name, optimizer in self.optimizer.items():
            variables = self.optimizer.trainable_variables(name)
            gradients = optimizer.get_unscaled_gradients(tape.gradient(scaled[name], variables))
            applied[name] = optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.update_metrics(batch, None, tf.add_n(list(losses.values())))
        return applied


class OneVerdictTrainer(TowersTrainer):
    def replica_train_step(self, batch):
        return super().replica_train_step(batch)["left"]


def values(trainer):
    return {path: variable.numpy() for path, variable in trainer.state.items()}


def changed(trainer, before):
    return {path for path, value in values(trainer).items() if not np.array_equal(value, before[path])}


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("skipping", "other"), [("left", "right"), ("right", "left")])
def test_skipped_update_takes_back_its_own_part_and_leaves_the_others_applied(config, mirrored, skipping, other, window):
    config.optimizer.accumulation_steps = window
    config.optimizer.ema_momentum = 0.9
    trainer = TowersTrainer(config, mirrored(2))
    trainer.train(tf.constant(window))
    before, calls = values(trainer), trainer.model.calls.numpy()
    trainer.optimizer[skipping].state["loss_scale/loss_scale"].assign(TOO_HIGH)
    outputs = trainer.train(tf.constant(window))
    found = changed(trainer, before)
    assert {path for path in found if path.startswith(f"model/{other}/")} == {
        path for path in before if path.startswith(f"model/{other}/")
    }
    assert any("moving_mean" in path for path in found)
    assert any(path.startswith(f"optimizer/{other}/average/") for path in found)
    scaling = {path for path in before if path.startswith(f"optimizer/{skipping}/loss_scale/")}
    mine = {path for path in found if path.startswith((f"model/{skipping}/", f"optimizer/{skipping}/"))}
    assert mine <= scaling
    assert trainer.model.calls.numpy() == calls  # whose nobody's is, goes back with either
    assert np.isnan(outputs["loss"])
    assert (outputs[f"{skipping}/skipped_steps"], outputs[f"{other}/skipped_steps"]) == (1, 0)
    assert (outputs["applied_steps"], outputs["skipped_steps"]) == (3, 1)
    assert outputs[f"{skipping}/loss_scale"] == mptrain.default_config().loss_scale.max_scale
    assert outputs["loss_scale"] == outputs[f"{other}/loss_scale"] == 2.0**10


@pytest.mark.slow
def test_run_logs_both_loss_scales_names_who_skipped_and_looks_into_it(tmp_path):
    config = tiny_config()
    config.trainer = f"{__name__}.ImpatientTrainer"
    config.train.steps, config.eval.every_steps, config.devices.virtual_cpus = 20, 20, 2
    config.train.steps_per_loop = 1  # loops in which one optimizer skips all are no sign of a loss that stays NaN
    outputs = mptrain.run(config, tmp_path / "run")
    assert np.isfinite(outputs["loss"])
    last = rows(tmp_path / "run", split="train")[-1]
    assert last["right/loss_scale"] < 2.0**24
    assert last["left/loss_scale"] == 2.0**10
    assert last["left/skipped_steps"] == 0
    overflows = rows(tmp_path / "run", event="overflow")
    assert len(overflows) == last["right/skipped_steps"] == last["skipped_steps"] > 0
    assert {(event["optimizer"], event["layer"].split("/")[0]) for event in overflows} == {("right", "right")}
    (first, *_) = rows(tmp_path / "run", event="provenance")
    assert first["step"] == 0
    assert all(path.startswith("right/") for path in first["variables"])
    assert first["loss_scale"] == 2.0**24


class ImpatientTrainer(TowersTrainer):
    """The right tower's loss scale starts too high."""

    def build_optimizer(self):
        right = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**24)
        return Optimizers(left=(mptrain.Trainer.build_optimizer(self), self.model.left), right=(right, self.model.right))


def test_weights_are_averaged_for_the_evaluation_in_every_part(config):
    config.optimizer.ema_momentum = 0.9
    trainer = TowersTrainer(config)
    trainer.train(tf.constant(4))
    averages = {path.split("/average/")[1]: v for path, v in values(trainer).items() if "/average/" in path}
    own = values(trainer)
    with trainer.optimizer.averaged_weights():
        assert len(averages) == 12
        for path, average in averages.items():
            np.testing.assert_array_equal(values(trainer)[f"model/{path}"], average)
    assert not changed(trainer, own)


def test_stuck_optimizer_ends_the_run_though_the_other_goes_on(config):
    config.loss_scale.max_consecutive_skips = 3
    trainer = TowersTrainer(config)
    for _ in range(3):
        trainer.optimizer["right"].state["loss_scale/loss_scale"].assign(TOO_HIGH)
        outputs = trainer.train(tf.constant(1))
    assert outputs["left/applied_steps"] == 3
    with pytest.raises(mptrain.RunError, match="3 updates in a row were skipped.* right/"):
        trainer.optimizer.raise_if_stuck()


def test_one_verdict_for_several_optimizers_is_refused_by_name(config):
    trainer = OneVerdictTrainer(config)
    with pytest.raises(InputError, match=r"OneVerdictTrainer.*return \{name: applied\}.*for left and right"):
        trainer.train(tf.constant(1))


@pytest.mark.parametrize(("parts", "message"), [("left", "'right/.*no optimizer"), ("both", "'left/.*left and all")])
def test_variable_must_be_trained_by_one_optimizer(config, parts, message):
    class WronglyDivided(TowersTrainer):
        def build_optimizer(self):
            divided = super().build_optimizer()
            if parts == "left":
                return Optimizers(left=(divided["left"], self.model.left))
            return Optimizers(left=(divided["left"], self.model.left), all=(divided["right"], self.model))

    with pytest.raises(InputError, match=message):
        WronglyDivided(config)


def test_several_optimizers_need_a_step_that_applies_each(config):
    class WithoutStep(TowersTrainer):
        replica_train_step = mptrain.Trainer.replica_train_step
        build_model = TinyTrainer.build_model
        compute_loss = TinyTrainer.compute_loss

        def build_optimizer(self):
            return Optimizers(all=(mptrain.Trainer.build_optimizer(self), self.model))

    with pytest.raises(InputError, match=r"WithoutStep.build_optimizer\(\) returns several.*replica_train_step"):
        WithoutStep(config)


def test_groups_that_an_optimizer_of_ones_own_would_not_heed_are_refused(config):
    config.optimizer.groups = ({"match": "left/", "frozen": True},)
    with pytest.raises(
        InputError, match=r"groups is set, and ImpatientTrainer.build_optimizer\(\) makes an optimizer of its own"
    ):
        ImpatientTrainer(config)


def test_bare_optimizer_is_refused_with_what_wraps_it(config):
    class Bare(TinyTrainer):
        def build_optimizer(self):
            return keras.optimizers.SGD()

    with pytest.raises(InputError, match=r"Bare.build_optimizer\(\) returns a SGD: return mptrain.optimizers.wrap"):
        Bare(config)


def test_part_may_be_a_list_of_variables_and_windows_must_agree():
    variable = tf.Variable(1.0)
    one, two = (LossScaleOptimizer(keras.optimizers.SGD(0.1), accumulation_steps=n) for n in (1, 2))
    assert Optimizers(one=(one, [variable])).owner(variable) == "one"
    with pytest.raises(InputError, match=r"accumulation_steps \[1, 2\]"):
        Optimizers(one=(one, [variable]), two=(two, []))
    with pytest.raises(TypeError, match="one=.*write one="):
        Optimizers(one=one)
