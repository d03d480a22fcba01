"""Whether a Trainer's methods return what they must: model, metrics, optimizer and loss; told in one line where not."""

from collections.abc import Mapping

import keras
import tensorflow as tf

from mptrain import keras_compat, model_check, weight_decay
from mptrain.autograph import as_written
from mptrain.errors import InputError
from mptrain.loss_scale import LossScaleOptimizer
from mptrain.parameter_groups import GroupedOptimizer
from mptrain.several_optimizers import Optimizers, by_name


def create_variables(trainer) -> None:
    """Calls a model that has no variables yet on one example, as a subclassed Keras model needs.

    Raises:
        InputError: if `build_model` returned no model, or one without anything to train.
    """
    name = f"{type(trainer).__name__}.build_model()"
    if not callable(trainer.model):
        raise InputError(f"{name} returns {trainer.model!r}: return the model")
    if not keras_compat.is_built(trainer.model):
        inputs = trainer.inputs(trainer.train_source.first())
        trainer.model(trainer.precision.cast_to_compute(inputs), training=False)
    keras_compat.note_paths(trainer.model)
    weight_decay.note_biases_and_norms(trainer.model)
    if not trainer.trainable_variables:
        raise InputError(
            f"the model that {name} returned has no trainable variables: keep its layers and tf.Variables in attributes of the"
            " model"
        )


def other_metrics(trainer) -> dict[str, keras.metrics.Metric]:
    """Returns the metrics beside the loss.

    Raises:
        InputError: if one takes the loss's name.
    """
    metrics = trainer.build_metrics()
    if "loss" in metrics:
        raise InputError(f"{type(trainer).__name__}.build_metrics() returns a metric 'loss': give it another name")
    return metrics


def optimizer(trainer, own_step: bool) -> LossScaleOptimizer | Optimizers:
    """Returns the optimizer, or several.

    Args:
        trainer: the trainer.
        own_step: whether it has a `replica_train_step` of its own.

    Raises:
        InputError: if it is not wrapped, the step would not apply several, or nothing would heed the config's groups.
    """
    built, name = trainer.build_optimizer(), f"{type(trainer).__name__}.build_optimizer()"
    if not isinstance(built, (LossScaleOptimizer, Optimizers)):
        raise InputError(
            f"{name} returns a {type(built).__name__}: return mptrain.optimizers.wrap(optimizer, self.config,"
            " scaled=self.uses_float16)"
        )
    if isinstance(built, Optimizers) and not own_step:
        raise InputError(f"{name} returns several optimizers: override replica_train_step, which says what each one applies")
    own = any(not isinstance(each.inner, GroupedOptimizer) for each in by_name(built).values())
    if trainer.config.optimizer.groups and own:
        raise InputError(
            f"config.optimizer.groups is set, and {name} makes an optimizer of its own, which knows nothing of it: take that of"
            " super().build_optimizer(), or leave the groups out"
        )
    return built


@as_written
def check_scaled_loss(trainer, loss: tf.Tensor) -> None:
    """Checks the loss that a step of the researcher's own scales.

    Raises:
        InputError: if it is not float32.
    """
    what = f"the loss that {type(trainer).__name__}.replica_train_step() scales"
    model_check.check_is_float32(what, loss, "compute it from float32 outputs, as precision.cast_to_output() returns them")


def metric_results(metrics: Mapping[str, keras.metrics.Metric]) -> dict[str, float]:
    """Returns the results of metrics, on the host.

    Raises:
        InputError: if one is no scalar.
    """
    results = {name: tf.convert_to_tensor(metric.result()) for name, metric in metrics.items()}
    for name, result in results.items():
        if result.shape.rank != 0:
            raise InputError(f"metric {name!r} has the shape {result.shape}: give it a scalar result, as average='macro' does")
    return {name: float(result) for name, result in results.items()}
