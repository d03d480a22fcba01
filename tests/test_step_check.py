"""What a step, or a loss, must not do is told in one line that says what and where, and what to write instead."""

import inspect
import random

import keras
import numpy as np
import pytest
import tensorflow as tf

from mptrain import InputError
from mptrain.errors import one_line
from tests.trainers import TinyModule, TinyTrainer


class HookedTrainer(TinyTrainer):
    """Calls `self.hook` in each step; a list that it returns holds what the step returns."""

    calls = 0

    def build_model(self):
        self.history, self.by_name = [], {"steps": 0}
        self.generator = np.random.default_rng(0)
        self.head = keras.layers.Dense(3)
        self.second = keras.optimizers.Adam()
        self.f1 = keras.metrics.F1Score(average="macro")
        self.teacher = TinyModule()
        self.teacher.calls = 0
        return super().build_model()

    def replica_train_step(self, batch):
        applied = super().replica_train_step(batch)
        found = self.hook(self, batch, tf.reduce_mean(batch["inputs"]))
        return found[0] if isinstance(found, list) else applied


@pytest.fixture(scope="module")
def told(module_config):
    """Returns the function that trains one step with a hook that it refuses, and returns the one line of its error."""
    trainer = HookedTrainer(module_config)

    def told(hook):
        trainer.hook = hook
        with pytest.raises(InputError) as caught:
            trainer.train(tf.constant(1))  # which is traced anew as long as no trace has succeeded
        for name in {"last", "cache", "calls"} & vars(trainer).keys():
            delattr(trainer, name)
        trainer.history.clear()
        return one_line(caught.value)

    return told


@pytest.fixture(scope="module")
def module_config():
    from mptrain import default_config

    config = default_config()
    config.trainer = "tests.trainers.TinyTrainer"
    config.precision.policy = "float32"
    config.data.batch_size = 12
    config.train.steps = 12
    return config


def keeps(self, batch, loss):
    self.last = loss


def counts(self, batch, loss):
    self.calls += 1


def counts_in_module(self, batch, loss):
    self.teacher.calls += 1


def counts_in_dict(self, batch, loss):
    self.by_name["steps"] += 1


def calls_numpy(self, batch, loss):
    print(loss.numpy())


@tf.autograph.experimental.do_not_convert
def branches(self, batch, loss):
    return [True] if loss > 1 else None


@tf.autograph.experimental.do_not_convert
def iterates(self, batch, loss):
    return [False for _ in loss]


@tf.autograph.experimental.do_not_convert
def casts(self, batch, loss):
    float(loss)


NO_VALUE = "on a tensor, which has no value while the step is traced: compute with TensorFlow, tf.print it"
ONCE = "once, while the step is traced, and never again: use a metric, or a tf.Variable made in build_model()"
KEEPS = "keeps a tensor of the traced step in"
INSTEAD = "return it, or use a metric, or a tf.Variable made in build_model()"
RANDOM = "once, while the step is traced, and never again: draw from self.randomness"


def line_of(function, offset):
    return f"(test_step_check.py, line {inspect.unwrap(function).__code__.co_firstlineno + offset})"


FAULTS = {
    "tensor kept": (keeps, f"{KEEPS} self.last: {INSTEAD}"),
    "tensor appended": (lambda self, batch, loss: self.history.append(loss), f"{KEEPS} self.history: {INSTEAD}"),
    "list": (lambda self, batch, loss: self.history.append(1), f"changes self.history {ONCE}"),
    "counter": (counts, f"changes self.calls {ONCE}"),
    "module": (counts_in_module, f"changes module tiny_module (TinyModule).calls {ONCE}"),
    "dict": (counts_in_dict, f"changes self.by_name['steps'] {ONCE}"),
    "np.random": (lambda *_: np.random.rand(), f"draws from np.random {RANDOM}"),
    "random": (lambda *_: random.random(), f"draws from random {RANDOM}"),
    "generator": (lambda self, *_: self.generator.normal(), f"draws from self.generator {RANDOM}"),
    "numpy": (calls_numpy, f"{line_of(calls_numpy, 1)} calls .numpy() {NO_VALUE}"),
    "NumPy function": (lambda self, batch, loss: np.mean(loss), "gives NumPy a tensor, which has no value while"),
    "if": (branches, f"{line_of(branches, 2)} takes a tensor for a Python bool where AutoGraph does not convert the code"),
    "for": (iterates, f"{line_of(iterates, 2)} iterates over a tensor where AutoGraph does not convert the code"),
    "float": (casts, f"{line_of(casts, 2)} calls float() {NO_VALUE}"),
    "variable": (lambda *_: tf.Variable(0.0, name="mine"), "creates the variable 'mine' while it is traced: make it in"),
    "layer": (
        lambda self, batch, loss: self.head(batch["inputs"]),
        "creates the variable 'kernel' of Dense self.head while it is traced: make it in build_model(), and build it there",
    ),
    "optimizer": (
        lambda self, batch, loss: self.second.apply_gradients([(tf.zeros_like(v), v) for v in self.trainable_variables]),
        "of Adam self.second while it is traced: wrap it in a LossScaleOptimizer and build() it in build_optimizer()",
    ),
    "metric": (
        lambda self, batch, loss: self.f1.update_state(tf.one_hot(batch["targets"], 3), tf.zeros([12, 3])),
        "of F1Score self.f1 while it is traced: call its update_state() once in build_metrics(), and then reset_state()",
    ),
    "global seed": (
        lambda *_: keras.random.normal([2]),
        "draws from Keras's global generator: give it seed=self.randomness.draw()",
    ),
    "strategy.run": (
        lambda self, *_: self.strategy.run(lambda: 1),
        "calls the strategy, which only works outside the replicas, and runs in one: call the function itself",
    ),
    "no gradient": (
        lambda self, *_: self.optimizer.apply_gradients([(None, v) for v in self.trainable_variables]),
        "gets no gradient for any trainable variable: compute model and loss inside `with tf.GradientTape()`",
    ),
    "returns a loss": (lambda self, batch, loss: [loss], "returns float32 (): end it with `return applied`, what"),
    "returns a tuple": (lambda self, batch, loss: [(loss, loss)], "returns a tuple: end it with `return applied`, what"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_step_that_does_what_it_must_not_is_told_in_one_line(told, fault):
    hook, message = FAULTS[fault]
    line = told(hook)
    assert line.startswith("HookedTrainer.replica_train_step() ")
    assert message in line
    assert "\n" not in line


def remembers_what_is_static(self, batch, loss):
    self.cache = {"size": batch["inputs"].shape[0]}
    self.width = batch["inputs"].shape[1]
    tf.print("step", self.global_step, output_stream="file:///dev/null")
    tf.random.stateless_normal([2], self.randomness.draw())


@pytest.mark.parametrize("hook", [lambda self, *_: None, remembers_what_is_static, lambda self, *_: [True]])
def test_step_that_may_is_trained(module_config, hook):
    trainer = HookedTrainer(module_config)
    trainer.hook = hook
    assert trainer.train(tf.constant(1))["applied_steps"] == 1


def test_faults_are_told_in_every_replica_and_in_evaluation(module_config, mirrored):
    trainer = HookedTrainer(module_config, mirrored(2))
    for fault in ("tensor kept", "layer", "numpy", "strategy.run"):
        hook, message = FAULTS[fault]
        trainer.hook = hook
        with pytest.raises(InputError) as caught:
            trainer.train(tf.constant(1))
        assert message in one_line(caught.value)
        vars(trainer).pop("last", None)
    trainer.update_metrics = lambda batch, outputs, loss: trainer.history.append(loss)
    with pytest.raises(InputError, match=r"HookedTrainer.replica_eval_step\(\) keeps a tensor .* self.history"):
        trainer.evaluate(tf.constant(1))


def squared(batch, outputs):
    return (tf.cast(batch["targets"], tf.float32) - outputs) ** 2


LOSSES = {
    "scalar": (
        lambda batch, outputs: tf.reduce_mean(outputs),
        "returns a scalar: return the loss of each example",
    ),
    "float16": (lambda batch, outputs: tf.cast(outputs[:, 0], tf.float16), "what Own.compute_loss() returns is float16"),
    "integers": (
        lambda batch, outputs: tf.argmax(outputs, -1),
        "returns int64, which has no gradient: return",
    ),
    "nothing": (lambda batch, outputs: None, "returns None: return one tensor, the loss of each example"),
    "a number": (lambda batch, outputs: 1.0, "returns 1.0: return one tensor, the loss of each example"),
    "too few": (lambda batch, outputs: outputs[:1, 0], "returns 1 losses for 2 examples: return one for each"),
    "a constant": (
        lambda batch, outputs: tf.fill([tf.shape(outputs)[0]], np.nan),
        "returns losses that do not depend on the outputs: they have no gradient",
    ),
    "broadcast": (
        lambda batch, outputs: squared(batch, outputs[:, :1]),
        "returns losses of shape (2, 2) for 2 examples, each with the targets of all: give targets and outputs the same shape",
    ),
    "numpy": (
        lambda batch, outputs: outputs.numpy(),
        ") calls .numpy() on a tensor, which has no value while the step is traced",
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_that_is_none_is_told_before_the_first_step(module_config, kind):
    loss, message = LOSSES[kind]
    with pytest.raises(InputError) as caught:
        type("Own", (TinyTrainer,), {"compute_loss": lambda self, batch, outputs: loss(batch, outputs)})(module_config)
    assert message in str(caught.value)
    assert "Own.compute_loss()" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_losses_of_more_dimensions_or_in_float64_are_welcome(module_config):
    def loss(self, batch, outputs):
        return tf.cast(squared({"targets": batch["targets"][:, None]}, outputs), tf.float64)

    trainer = type("Own", (TinyTrainer,), {"compute_loss": loss})(module_config)
    assert trainer.train(tf.constant(1))["loss"] > 0
