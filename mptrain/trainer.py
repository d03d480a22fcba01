"""`Trainer`: what a researcher subclasses. The model, the loss and the step are here; the outer loop is Orbit's."""

import functools
import math
import time
from collections.abc import Mapping

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import data, devices, keras_compat, optimizers, precision
from mptrain.errors import InputError
from mptrain.loss_scale import LossScaleOptimizer
from mptrain.orbit_import import orbit
from mptrain.randomness import StepRandomness
from mptrain.state_guard import StateGuard


class Trainer(orbit.StandardTrainer, orbit.StandardEvaluator):
    """Trains and evaluates one model. Override `build_model` and `compute_loss`, and of the rest as little as wanted.

    Attributes:
        config: the run's config.
        precision_warnings: lines about layers that compute in another dtype than was asked for.
        strategy: the `tf.distribute.Strategy` whose replicas share each global batch.
        precision: the casts of this run.
        model: what `build_model` returned.
        optimizer: a `LossScaleOptimizer`.
        metrics: name -> Keras metric, "loss" among them.
        train_source: the training examples.
        eval_source: the evaluation examples.
        global_step: int64 variable; counts attempted steps, so it is also the number of the next batch.
        randomness: seeds for random operations in the step, functions of (seed, step, replica).

    Args:
        config: a config made from `mptrain.default_config()`.
        strategy: default: the one that `config.devices` asks for.

    Raises:
        InputError: if the config, the model or the data cannot be trained with.
    """

    def __init__(self, config: ConfigDict, strategy: tf.distribute.Strategy | None = None):
        config_lib.validate(config)
        orbit.StandardTrainer.__init__(self, train_dataset=None)
        orbit.StandardEvaluator.__init__(self, None, orbit.StandardEvaluatorOptions(use_tf_while_loop=True))
        self.config = config
        self.strategy = strategy or devices.strategy(config.devices)
        self.precision = precision.get(config.precision.policy, config.precision.float32_layers)
        self._position = None  # the step whose batch the open train iterator yields next
        data.per_replica(config.data.batch_size, self.strategy)
        self.train_source = self.build_source("train")
        self.eval_source = self.build_source("eval")
        keras_compat.seed_everything(config.seed)
        with self.strategy.scope():
            self.global_step = orbit.utils.create_global_step()
            self.randomness = StepRandomness(config.seed, self.global_step)
            with self.precision.scope():
                self.model = self.build_model()
            self._create_variables()
            self.precision.hold_float32_layers(self.model)
            self.uses_float16 = precision.uses_float16(self.precision, self.model)
            self.kernels = precision.kernels(self.uses_float16, config.train.jit_compile, self.strategy)
            self.precision_warnings = precision.check(self.precision, self.model)
            self.optimizer = self.build_optimizer()
            self.optimizer.build(self.trainable_variables)
            self.metrics = {"loss": keras.metrics.Mean("loss"), **self._other_metrics()}
            metric_variables = [variable for metric in self.metrics.values() for variable in metric.variables]
            self._guard = StateGuard(self.optimizer, keras_compat.statistics(self.model), metric_variables)
        self.randomness.bind(self.model)
        if type(self).replica_train_step is Trainer.replica_train_step:
            self._check_loss()

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

        Take randomness from `self.randomness.draw()`, for stateless operations: a function of (seed, step, replica).
        """
        return batch

    def build_metrics(self) -> dict[str, keras.metrics.Metric]:
        """Returns metrics beside the loss; each is updated with batch["targets"] and the outputs."""
        return {}

    def build_source(self, split: str) -> data.Source:
        """Returns the examples of the split "train" or "eval"; default: those that `config.data` names."""
        return data.load(self.config.data, split)

    def build_optimizer(self) -> LossScaleOptimizer:
        """Returns the optimizer; default: the one that `config.optimizer` describes."""
        return optimizers.build(self.config, self.total_steps, scaled=self.uses_float16)

    def replica_train_step(self, batch: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Trains on one batch; runs in the graph, in each replica.

        Args:
            batch: this replica's share of the global batch.

        Returns:
            Whether the step was applied, a bool scalar. Where it was not, everything that the step has changed in the
            model and the metrics is put back by the caller.
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
            self.metrics["loss"].update_state(loss * self.strategy.num_replicas_in_sync)
        else:
            self.metrics["loss"].update_state(loss, sample_weight=weight)
        for name, metric in self.metrics.items():
            if name != "loss":
                metric.update_state(batch["targets"], outputs, sample_weight=weight)

    # What a researcher calls.

    def reduce_loss(self, losses: tf.Tensor) -> tf.Tensor:
        """Returns this replica's share of the mean loss over the *global* batch, float32 scalar.

        Args:
            losses: the loss of each example of this replica, [replica batch, ...].
        """
        return tf.reduce_sum(self._per_example(losses)) / self.config.data.batch_size

    def regularization_loss(self) -> tf.Tensor:
        """Returns this replica's share of what the model's regularizers and `add_loss` ask for, float32 scalar; or 0."""
        losses = getattr(self.model, "losses", None) or [0.0]
        return tf.add_n([tf.cast(loss, tf.float32) for loss in losses]) / self.strategy.num_replicas_in_sync

    @property
    def trainable_variables(self) -> list:
        """The variables that the optimizer trains; default: the model's."""
        return list(self.model.trainable_variables)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training example is seen once, rounded up."""
        return math.ceil(len(self.train_source) / self.config.data.batch_size)

    @property
    def total_steps(self) -> int:
        """The length of the run in attempted steps; epochs are rounded up to whole steps and accumulation windows."""
        train, window = self.config.train, self.config.optimizer.accumulation_steps
        if train.steps:
            return train.steps
        return math.ceil(train.epochs * len(self.train_source) / (self.config.data.batch_size * window)) * window

    @property
    def eval_steps(self) -> int:
        """Batches in one evaluation."""
        return data.eval_steps(self.eval_source, self.config.data.eval_batch_size)

    @property
    def state(self) -> dict[str, tf.Variable]:
        """Everything that a checkpoint must hold, by path."""
        model = {f"model/{path}": v for path, v in keras_compat.variables_by_path(self.model.variables).items()}
        optimizer = {f"optimizer/{path}": v for path, v in self.optimizer.state.items()}
        return {"step": self.global_step, **model, **optimizer}

    # What Orbit calls.

    def train_loop_begin(self) -> None:
        step = int(self.global_step.numpy())
        if self._position != step:
            self.train_dataset = data.train_dataset(
                self.train_source,
                batch_size=self.config.data.batch_size,
                seed=self.config.seed,
                start_step=step,
                strategy=self.strategy,
            )
        self._reset_metrics()
        self._loop_start = (step, time.perf_counter(), int(self.optimizer.applied_steps))

    def train(self, num_steps: tf.Tensor) -> dict[str, float]:
        with self.kernels.scope():
            return super().train(num_steps)

    def train_step(self, iterator) -> None:
        """Draws one global batch and trains on it in every replica; cross-replica context, in the graph."""
        batch = next(iterator)
        self.strategy.run(self._step_function, args=(batch,))
        self.global_step.assign_add(1)

    def train_loop_end(self) -> dict[str, float]:
        outputs = self._metric_results()
        step = self._position = int(self.global_step.numpy())
        first, start, applied = self._loop_start
        if int(self.optimizer.applied_steps) == applied:  # every step was skipped: there is nothing to take a mean of
            outputs = dict.fromkeys(outputs, float("nan"))
        if (rate := self.optimizer.learning_rate) is not None:
            outputs["learning_rate"] = float(rate)
        return outputs | {
            "loss_scale": float(self.optimizer.loss_scale),
            "gradient_norm": float(self.optimizer.gradient_norm),
            "applied_steps": int(self.optimizer.applied_steps),
            "skipped_steps": int(self.optimizer.skipped_steps),
            "examples_per_second": (step - first) * self.config.data.batch_size / (time.perf_counter() - start),
        }

    def eval_begin(self) -> None:
        if self.eval_dataset is None:
            self.eval_dataset = data.eval_dataset(
                self.eval_source, batch_size=self.config.data.eval_batch_size, strategy=self.strategy
            )
        self._reset_metrics()

    def evaluate(self, num_steps: tf.Tensor) -> dict[str, float]:
        with self.kernels.scope(), self.optimizer.averaged_weights():
            return super().evaluate(num_steps)

    def eval_step(self, iterator) -> None:
        """Evaluates one global batch in every replica; cross-replica context, in the graph."""
        batch = next(iterator)
        self.strategy.run(lambda batch: self.replica_eval_step(data.replica_share(batch, self.strategy)), args=(batch,))

    def eval_end(self) -> dict[str, float]:
        return self._metric_results()

    # The rest.

    def _create_variables(self) -> None:
        """Calls a model that has no variables yet on one example, as a subclassed Keras model needs."""
        if not callable(self.model):
            raise InputError(f"{type(self).__name__}.build_model() returns {self.model!r}: return the model")
        if not getattr(self.model, "built", True):
            example = {name: tf.constant(array[:1]) for name, array in self.train_source.arrays.items()}
            self.model(self.precision.cast_to_compute(self.inputs(example)), training=False)
        if not self.trainable_variables:
            raise InputError(f"the model that {type(self).__name__}.build_model() returned has no trainable variables")

    def _check_loss(self) -> None:
        """Traces the loss of one batch, without computing it, and checks the dtypes of outputs and loss.

        Raises:
            InputError: if one of them is 16 bits wide, or the loss is a scalar.
        """

        def loss(batch):
            inputs = self.precision.cast_to_compute(self.inputs(batch))
            outputs = self.precision.cast_to_output(self.model(inputs, training=False))
            what = f"what {type(self).__name__}.model returns"
            precision.check_is_float32(what, outputs, "give its last layer dtype='float32'")
            losses = self._per_example(self.compute_loss(batch, outputs))
            if losses.shape.rank is not None and losses.shape[:1] != [2]:
                raise InputError(
                    f"{type(self).__name__}.compute_loss() returns {losses.shape[0]} losses for 2 examples: return one for each"
                )

        arrays = self.train_source.arrays
        batch = {name: tf.TensorSpec([2, *array.shape[1:]], array.dtype) for name, array in arrays.items()}
        with self.kernels.scope():
            tf.function(loss, autograph=False).get_concrete_function(batch)

    @functools.cached_property
    def _step_function(self):
        return tf.function(self._guarded_step, jit_compile=True) if self.kernels.jit_compile else self._guarded_step

    def _guarded_step(self, batch: Mapping[str, tf.Tensor]) -> None:
        """Runs `replica_train_step`, and puts back what a skipped one did to statistics and metrics."""
        self.randomness.begin_step()
        batch = data.replica_share(batch, self.strategy)
        self._guard(lambda: self._checked_step(batch))

    def _checked_step(self, batch: Mapping[str, tf.Tensor]) -> tf.Tensor:
        applied = self.replica_train_step(batch)
        if applied is None:
            raise InputError(
                f"{type(self).__name__}.replica_train_step() returns nothing: end it with `return applied`, what"
                " optimizer.apply_gradients() returned"
            )
        return applied

    def _per_example(self, losses: tf.Tensor) -> tf.Tensor:
        name = f"{type(self).__name__}.compute_loss()"
        if not tf.is_tensor(losses):
            raise InputError(f"{name} returns {losses!r}: return one tensor, the loss of each example")
        precision.check_is_float32(f"what {name} returns", losses, "compute the loss from the outputs, which are float32")
        losses = tf.cast(losses, tf.float32)
        if losses.shape.rank == 0:
            raise InputError(
                f"{name} returns a scalar: return the loss of each example, shape [replica"
                " batch]; mptrain takes the mean over the global batch"
            )
        return tf.reduce_mean(losses, axis=list(range(1, losses.shape.rank)))

    def _other_metrics(self) -> dict[str, keras.metrics.Metric]:
        metrics = self.build_metrics()
        if "loss" in metrics:
            raise InputError(f"{type(self).__name__}.build_metrics() returns a metric 'loss': give it another name")
        return metrics

    def _reset_metrics(self) -> None:
        for metric in self.metrics.values():
            metric.reset_state()

    def _metric_results(self) -> dict[str, float]:
        results = {name: tf.convert_to_tensor(metric.result()) for name, metric in self.metrics.items()}
        for name, result in results.items():
            if result.shape.rank != 0:
                raise InputError(
                    f"metric {name!r} has the shape {result.shape}: give it a scalar result, as average='macro' does"
                )
        return {name: float(result) for name, result in results.items()}
