"""n replicas train as one does."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainers import EvenTrainer, TfKerasTrainer


class TfKerasEvenTrainer(EvenTrainer):
    build_model = TfKerasTrainer.build_model


@pytest.fixture
def everything(config):
    """Clipping, accumulation, moving average, decay and synchronised BatchNorm, on batches that 1 to 4 replicas share."""
    config.precision.policy = "float32"  # in 16 bits a rounding that falls the other way is no rounding in float32
    config.data.batch_size = 24
    config.data.eval_batch_size = 36
    config.train.steps = 50
    config.optimizer.clip_norm = 1.0
    config.optimizer.accumulation_steps = 2
    config.optimizer.ema_momentum = 0.9
    config.optimizer.weight_decay = 1e-3
    config.devices.sync_batch_norm = True
    return config


def trained(trainer_class, config, strategy):
    """Returns the state after 50 steps, and the metrics of training and evaluation."""
    trainer = trainer_class(config, strategy)
    outputs = trainer.train(tf.constant(50))
    outputs |= {f"eval {name}": value for name, value in trainer.evaluate(tf.constant(trainer.eval_steps)).items()}
    del outputs["examples_per_second"]
    return {path: variable.numpy() for path, variable in trainer.state.items()}, outputs


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("trainer_class", [EvenTrainer, TfKerasEvenTrainer])
def test_fifty_steps_on_replicas_equal_those_on_one_with_everything_on(everything, mirrored, trainer_class, replicas):
    alone, outputs = trained(trainer_class, everything, mirrored(1))
    together, outputs_together = trained(trainer_class, everything, mirrored(replicas))
    assert alone.keys() == together.keys()
    for path, value in alone.items():
        scale = np.linalg.norm(value)
        assert np.linalg.norm(together[path].astype(np.float64) - value) <= 1e-5 * scale, path
    assert outputs_together == pytest.approx(outputs, rel=1e-5)
    assert outputs["applied_steps"] == 25


@pytest.mark.slow
def test_batch_norm_normalizes_each_replicas_share_alone_unless_told_otherwise(everything, mirrored):
    everything.devices.sync_batch_norm = False
    alone, _ = trained(EvenTrainer, everything, mirrored(1))
    together, _ = trained(EvenTrainer, everything, mirrored(2))
    kernel = next(path for path in alone if "conv2d/kernel" in path)
    assert np.linalg.norm(together[kernel] - alone[kernel]) > 1e-3 * np.linalg.norm(alone[kernel])


def test_synchronised_batch_norm_inside_nested_models_too(everything, mirrored):
    class NestedTrainer(EvenTrainer):
        def build_model(self):
            return keras.Sequential([keras.Input((6, 6, 1)), super().build_model()])

    alone, _ = trained(NestedTrainer, everything, mirrored(1))
    together, _ = trained(NestedTrainer, everything, mirrored(2))
    for path, value in alone.items():
        assert np.linalg.norm(together[path].astype(np.float64) - value) <= 1e-5 * np.linalg.norm(value), path
