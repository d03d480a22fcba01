"""Trains a generative adversarial network on MNIST with two optimizers, in mixed float16."""

from ml_collections import ConfigDict

from mptrain import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.trainer = "experiments.gan.GanTrainer"
    config.model = ConfigDict({"noise": 64, "width": 16})
    config.model.discriminator_rate = 0.3  # of its optimizer, as a share of the generator's
    config.precision.policy = "mixed_float16"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.ema_momentum = 0.99
    config.data.batch_size = 64
    config.train.steps = 2000
    return config
