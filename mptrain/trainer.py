"""`Trainer`: what a researcher subclasses. The model, the loss and the step are here; the outer loop is Orbit's."""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Collection, Mapping

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import (
    batch_norm,
    checkpointed,
    config_check,
    data,
    devices,
    durations,
    hardware,
    keras_compat,
    metric_check,
    model_check,
    optimizers,
    parameter_groups,
    precision,
    step_check,
    trainer_check,
    workers_check,
)
from mptrain.autograph import as_written
from mptrain.errors import InputError
from mptrain.eval_loop import EvalLoop
from mptrain.forward_graph import SIXTEEN_BITS
from mptrain.loss_scale import LossScaleOptimizer
from mptrain.orbit_import import orbit
from mptrain.randomness import StepRandomness
from mptrain.several_optimizers import Optimizers, by_name, telemetry
from mptrain.state_guard import StateGuard
from mptrain.train_loop import TrainLoop
from mptrain.workers import Workers


class Trainer(orbit.StandardTrainer, orbit.StandardEvaluator):
    """Trains and evaluates one model. Override `build_model` and `compute_loss`, and of the rest as little as wanted.

    Attributes:
        config: the run's config, its durations in steps.
        precision_warnings: lines about layers that compute in another dtype than was asked for, or round the logits.
        strategy: the `tf.distribute.Strategy` whose replicas share each global batch.
        precision: the casts of this run.
        model: what `build_model` returned.
        optimizer: a `LossScaleOptimizer`, or several: `Optimizers`.
        metrics: name -> Keras metric, "loss" among them.
        train_source: the training examples.
        training_batches: the stream of batches of them.
        eval_source: the evaluation examples.
        global_step: int64 variable; counts attempted steps, so it is also the number of the next batch.
        randomness: random numbers for the step, functions of (seed, step) and of the replica or the example.
        investigate: looks into skipped steps, where the runner wants that: see `numerics.provenance`.
        learning_rate_factor: what the schedule's rate is multiplied by, where `config.plateau.metric` is set; else None.
        marks_steps: whether each step is a call of the graph of its own, with its number, for a profile.
        stop_requested: asked between two pieces of a loop, about once a second, whether to end it there; in all workers alike.
        workers: the processes that train together; one, but under "multi_worker".

    Args:
        config: a config made from `mptrain.default_config()`.
        strategy: default: the one that `config.devices` asks for.

    Raises:
        InputError: if the config, the model or the data cannot be trained with.
    """

    def __init__(self, config: ConfigDict, strategy: tf.distribute.Strategy | None = None):
        config_check.validate(config)
        orbit.StandardTrainer.__init__(self, train_dataset=None)
        orbit.StandardEvaluator.__init__(self, None, orbit.StandardEvaluatorOptions(use_tf_while_loop=True))
        self.config = config
        self.strategy = strategy or devices.strategy(config.devices)
        self.workers = Workers(self.strategy)
        self.precision = precision.get(config.precision.policy, config.precision.float32_layers, hardware.of(self.strategy))
        workers_check.check_config(self)
        self.stop_requested: Callable[[], bool] = lambda: False
        self.investigate = None
        self.marks_steps = False
        self._train_loop = TrainLoop(self)
        self._eval_loop = EvalLoop(self)
        keras_compat.seed_everything(config.seed)  # also for a shuffle without a seed in a user's dataset
        self.train_source = data.as_source(self.build_source("train"))
        self.eval_source = data.as_source(self.build_source("eval"))
        self.training_batches = data.TrainingBatches(
            self.train_source, batch_size=config.data.batch_size, seed=config.seed, strategy=self.strategy
        )
        workers_check.check_examples(self)
        self.config = durations.resolve(config, lambda: len(self.train_source))
        keras_compat.seed_everything(config.seed)
        with self.strategy.scope():
            self.global_step = orbit.utils.create_global_step()
            self.randomness = StepRandomness(config.seed, self.global_step, config.data.batch_size)
            with self.precision.scope():
                self.model = self.build_model()
                trainer_check.create_variables(self)
                compiled = config.train.jit_compile is True
                batch_norm.prepare(self.model, synchronized=config.devices.sync_batch_norm, compiled=compiled)
            held = self.precision.hold_float32_layers(self.model)
            self.metrics = {"loss": keras.metrics.Mean("loss"), **trainer_check.other_metrics(self)}
        metric_check.check(config, self.metrics)
        self.randomness.bind(self.model)
        with self._kernels_for(SIXTEEN_BITS).scope():  # which only touches what is 16 bits wide
            own_step = type(self).replica_train_step is not Trainer.replica_train_step
            forward = model_check.forward(self, own_step=own_step)
        self.precision_warnings = model_check.check(self.precision, self.model, forward, held)
        self.sixteen_bits = model_check.sixteen_bits(self.precision, self.model, forward)
        self.kernels = self._kernels_for(self.sixteen_bits)
        with self.strategy.scope():
            parameter_groups.check(self.config.optimizer.groups, self.trainable_variables)
            self.optimizer = trainer_check.optimizer(self, own_step)
            self.learning_rate_factor = optimizers.learning_rate_factor(config, self.optimizers.values())
            self.optimizer.build(forward.in_order(self.trainable_variables))
            for each in self.optimizers.values():
                each.check_loss = functools.partial(trainer_check.check_scaled_loss, self)
            metric_variables = [variable for metric in self.metrics.values() for variable in metric.variables]
            self._guard = StateGuard(self.optimizer, keras_compat.statistics(self.model), metric_variables)

    # What a researcher overrides, from the most to the least often.

    def build_model(self):
        """Returns the model: a Keras 3 model, a tf_keras model, or a `tf.Module` with `__call__(inputs, training)`.

        Called once, in the strategy's scope, under the precision's dtype policy.
        """
        raise InputError(f"{type(self).__name__} must override build_model(self) and return a model")

    def compute_loss(self, batch: Mapping[str, tf.Tensor], outputs) -> tf.Tensor:
        """Returns the loss of each example, float32 [replica batch] (further dimensions are averaged); replica context.

        Args:
            batch: this replica's share of the global batch.
            outputs: what the model returned, in float32.
        """
        raise InputError(
            f"{type(self).__name__} must override compute_loss(self, batch, outputs) and return a loss per example"
        )

    def inputs(self, batch: Mapping[str, tf.Tensor]):
        """Returns what the model is called with; default: batch["inputs"]. Floating tensors are cast afterwards."""
        return batch["inputs"]

    def augment(self, batch: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        """Returns the training batch as the step shall see it; in each replica, never in evaluation.

        Take randomness from `self.randomness.per_example(count)`: a function of (seed, step, place in the global batch), so
        that an example looks the same on any number of replicas and after a restart.
        """
        return batch

    def build_metrics(self) -> dict[str, keras.metrics.Metric]:
        """Returns metrics beside the loss; each is updated with batch["targets"] and the outputs."""
        return {}

    def pictures(self) -> dict[str, tf.Tensor]:
        """Returns pictures for TensorBoard's "eval", name -> [height, width, channels], float in [0, 1] or uint8.

        In the graph, outside of replicas, after each evaluation and with the weights that were evaluated. `mptrain.grid` puts
        images side by side.
        """
        return {}

    def build_source(self, split: str):
        """Returns the examples of the split "train" or "eval"; default: those that `config.data` names.

        A mapping of arrays, a pair of arrays (inputs, targets), an object with len() and [i] that is read on demand, a
        `tf.data.Dataset` of global batches, or a source of `mptrain.data`.
        """
        return data.load(self.config.data, split)

    def build_optimizer(self) -> LossScaleOptimizer | Optimizers:
        """Returns the optimizer, or several as `mptrain.Optimizers`; default: the one that `config.optimizer` describes.

        Called once, in the strategy's scope, when the model is there.
        """
        return optimizers.build(self.config, self.total_steps, scaled=self.uses_float16)

    def build_actions(self) -> list[Callable[[int, Mapping[str, float]], object]]:
        """Returns callables `action(step, outputs)` that are called at the end of each loop, eagerly, in every worker.

        `outputs` are what the row of the loop in metrics.jsonl holds. An action that returns True or a reason in words, or
        raises `mptrain.StopRun(reason)`, ends the run: the step is saved and evaluated, the exit status is 0. What else it
        raises ends the run as an error, when the step is saved. What it changes in `state` is in the checkpoint of its step.
        Write files in one worker only: `if self.workers.is_chief`.
        """
        return []

    def build_eval_actions(self) -> list[Callable[[int, Mapping[str, float]], object]]:
        """Returns callables as `build_actions` does, that are called after each evaluation beside training, with its metrics.

        The checkpoint of the step is saved before its evaluation, and a resumed run does not evaluate again what is logged:
        what such an action changes in `state` a kill may undo.
        """
        return []

    def replica_train_step(self, batch: Mapping[str, tf.Tensor]) -> tf.Tensor | Mapping[str, tf.Tensor]:
        """Trains on one batch; runs in the graph, in each replica.

        Args:
            batch: this replica's share of the global batch.

        Returns:
            Whether the step was applied, a bool scalar; with several optimizers {name: bool scalar}. Where it was not,
            everything that the step has changed in the model and the metrics is put back by the caller (see `Optimizers`).
        """
        batch = self.augment(batch)
        with tf.GradientTape() as tape:
            inputs = self.precision.cast_to_compute(self.inputs(batch))
            outputs = self.model(inputs, training=True)
            outputs = self.precision.cast_to_output(outputs)  # float32 from here on
            loss = self.reduce_loss(self.compute_loss(batch, outputs)) + self.regularization_loss()
            scaled_loss = self.optimizer.get_scaled_loss(loss)
        scaled_gradients = tape.gradient(scaled_loss, self.trainable_variables)
        gradients = self.optimizer.get_unscaled_gradients(scaled_gradients)
        applied = self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.update_metrics(batch, outputs, loss)
        return applied

    def replica_eval_step(self, batch: Mapping[str, tf.Tensor]) -> None:
        """Evaluates one batch; runs in the graph, in each replica. Examples of weight 0 are padding and do not count."""
        inputs = self.precision.cast_to_compute(self.inputs(batch))
        outputs = self.precision.cast_to_output(self.model(inputs, training=False))
        self.update_metrics(batch, outputs, self._per_example(self.compute_loss(batch, outputs)))

    def update_metrics(self, batch: Mapping[str, tf.Tensor], outputs, loss: tf.Tensor) -> None:
        """Updates the metrics; runs in each replica, in training and in evaluation.

        Args:
            batch: this replica's share of the global batch; in evaluation with "weight", float32 [replica batch].
            outputs: the model's outputs, float32.
            loss: in training this replica's share of the global batch's loss, a scalar; in evaluation the loss of each
                example, [replica batch].
        """
        weight = batch.get("weight")
        if loss.shape.rank == 0:
            replicas = self.strategy.num_replicas_in_sync
            self.metrics["loss"].update_state(loss * replicas if replicas > 1 else loss)
        else:
            self.metrics["loss"].update_state(loss, sample_weight=weight)
        for name, metric in self.metrics.items():
            if name != "loss":
                metric.update_state(batch["targets"], outputs, sample_weight=weight)

    def serve(self, batch: Mapping[str, tf.Tensor]):
        """Returns what an exported model answers, [batch, ...] each: a tensor, or a tuple or mapping of them; in the graph.

        Default: the model's outputs, in float32. Traced once, in a replica context, for a batch of any size.

        Args:
            batch: what `serving_spec` describes; the data's elements, as `inputs` takes them.
        """
        inputs = self.precision.cast_to_compute(self.inputs(batch))
        return self.precision.cast_to_output(self.model(inputs, training=False))

    def serving_spec(self) -> dict[str, tf.TensorSpec]:
        """Returns name -> `tf.TensorSpec` of one example that an exported model is given.

        Default: the elements of the evaluation data, without "targets" and "weight"; what `serve` does not read is left out.
        """
        return {name: spec for name, spec in self.eval_source.spec.items() if name not in ("targets", "weight")}

    # What a researcher calls.

    @as_written
    def reduce_loss(self, losses: tf.Tensor) -> tf.Tensor:
        """Returns this replica's share of the mean loss over the *global* batch, float32 scalar.

        Args:
            losses: the loss of each example of this replica, [replica batch, ...].
        """
        return tf.reduce_sum(self._per_example(losses)) / self.config.data.batch_size

    @as_written
    def regularization_loss(self) -> tf.Tensor:
        """Returns this replica's share of what the model's regularizers and `add_loss` ask for, float32 scalar; or 0."""
        losses = getattr(self.model, "losses", None) or [0.0]
        return tf.add_n([tf.cast(loss, tf.float32) for loss in losses]) / self.strategy.num_replicas_in_sync

    @property
    def trainable_variables(self) -> list:
        """The variables that the optimizer trains; default: the model's."""
        return keras_compat.trainable_variables(self.model)

    @property
    def optimizers(self) -> dict[str, LossScaleOptimizer]:
        """name -> optimizer; an only one is called ""."""
        return by_name(self.optimizer)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training example is seen once, rounded up."""
        return math.ceil(len(self.train_source) / self.config.data.batch_size)

    @property
    def total_steps(self) -> int:
        """The length of the run in attempted steps."""
        return self.config.train.steps

    @property
    def eval_steps(self) -> int:
        """Batches in one evaluation."""
        return data.eval_steps(self.eval_source, self.config.data.eval_batch_size, at_most=self.config.eval.steps)

    @property
    def state(self) -> dict[str, tf.Variable]:
        """Everything that a checkpoint must hold, by path; checkpoints lie between accumulation windows."""
        return checkpointed.state(self)

    @property
    def weights(self) -> list[str]:
        """The paths in `state` of the trainable variables."""
        return checkpointed.weights(self)

    def save_position(self, folder: pathlib.Path) -> None:
        """Writes into a checkpoint's folder what the position in the data is, where it is more than the step."""
        self.training_batches.save(folder)

    def restore_position(self, folder: pathlib.Path) -> None:
        """The next loop opens the data where `save_position` was called; the step must be that one already."""
        self._train_loop.restore_position(folder)

    def first_batch(self, step: int, draws: int) -> int:
        """Returns the number of the first batch of a step of the loop in hand, if `train_step` draws so many each time."""
        return self._train_loop.first_batch(step, draws)

    # What Orbit calls.

    def train_loop_begin(self) -> None:
        self._train_loop.open()
        self._reset_metrics()
        self._loop_start = (int(self.global_step.numpy()), time.perf_counter(), self._applied())

    def train(self, num_steps: tf.Tensor) -> dict[str, float]:
        """Runs one loop in the graph, in pieces of about a second; `stop_requested` may end it after any of them."""
        self.train_loop_begin()
        with self.kernels.scope():
            self._train_loop.run(int(num_steps))
        return self.train_loop_end()

    def train_step(self, iterator) -> None:
        """Draws one global batch and trains on it in every replica; cross-replica context, in the graph."""
        batch = self.training_batches.of_this_worker(next(iterator))
        self.strategy.run(lambda batch: self._step_function(data.replica_share(batch, self.strategy)), args=(batch,))
        self.global_step.assign_add(1)

    def train_loop_end(self) -> dict[str, float]:
        outputs = trainer_check.metric_results(self.metrics)
        step = int(self.global_step.numpy())
        first, start, applied = self._loop_start
        if any(now == before for now, before in zip(self._applied(), applied, strict=True)):
            # Every step was skipped, by all optimizers or by one of several: there is nothing to take a mean of.
            outputs = dict.fromkeys(outputs, float("nan"))
        rate = (step - first) * self.config.data.batch_size / (time.perf_counter() - start)
        return outputs | telemetry(self.optimizer) | {"examples_per_second": rate}

    def eval_begin(self) -> None:
        if self.eval_dataset is None:
            self.eval_dataset = data.eval_dataset(
                self.eval_source, batch_size=self.config.data.eval_batch_size, strategy=self.strategy
            )
        self._reset_metrics()

    def evaluate(self, num_steps: tf.Tensor) -> dict[str, float]:
        """Evaluates `num_steps` batches, with the averaged weights where there are such.

        Raises:
            EvaluationStopped: if `stop_requested` said so before the end.
        """
        with self.kernels.scope(), self.optimizer.averaged_weights():
            return self._eval_loop.run(int(num_steps))

    def eval_step(self, iterator) -> None:
        """Evaluates one global batch in every replica; cross-replica context, in the graph."""
        batch = next(iterator)
        self.strategy.run(lambda batch: self._checked_eval_step(data.replica_share(batch, self.strategy)), args=(batch,))

    def eval_end(self) -> dict[str, float]:
        return trainer_check.metric_results(self.metrics)

    # The rest.

    @property
    def uses_float16(self) -> bool:
        """Whether gradients can underflow, so that the loss must be scaled: whether anything is computed in float16."""
        return tf.float16 in self.sixteen_bits

    def _kernels_for(self, dtypes: Collection[tf.DType]) -> precision.Kernels:
        return precision.kernels(dtypes, self.config.train.jit_compile, self.strategy)

    @functools.cached_property
    def _step_function(self):
        return tf.function(self.guarded_step, jit_compile=True) if self.kernels.jit_compile else self.guarded_step

    def guarded_step(self, batch: Mapping[str, tf.Tensor]) -> None:
        """Runs `replica_train_step`, and puts back what a skipped one did to statistics and metrics."""
        self.randomness.begin_step()
        self._guard(lambda: self._checked_step(batch))

    def _checked_step(self, batch: Mapping[str, tf.Tensor]) -> tf.Tensor:
        with step_check.watching(self, "replica_train_step"):
            applied = self.replica_train_step(batch)
        return step_check.applied(f"{type(self).__name__}.replica_train_step()", applied, self.optimizers)

    def _checked_eval_step(self, batch: Mapping[str, tf.Tensor]) -> None:
        with step_check.watching(self, "replica_eval_step"):
            self.replica_eval_step(batch)

    @as_written
    def _per_example(self, losses: tf.Tensor) -> tf.Tensor:
        return model_check.per_example(f"{type(self).__name__}.compute_loss()", losses)

    def _applied(self) -> list[int]:
        return [int(optimizer.applied_steps) for optimizer in self.optimizers.values()]

    def _reset_metrics(self) -> None:
        for metric in self.metrics.values():
            metric.reset_state()
