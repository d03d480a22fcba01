"""Trains a small convolutional network (226,000 parameters) on MNIST in mixed float16.

python -m mptrain.main --config=configs/mnist.py
"""

from ml_collections import ConfigDict

from mptrain import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.trainer = "experiments.mnist.MnistTrainer"
    config.model = ConfigDict({"dropout": 0.3, "shift": 1})
    config.precision.policy = "mixed_float16"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 200
    config.data.name = "mnist"
    config.data.batch_size = 128
    config.train.epochs = 6
    return config
