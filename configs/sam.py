"""Trains configs/mnist.py's network with sharpness-aware minimisation, on a tenth of the digits, in mixed float16."""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    config = mnist.get_config()
    config.trainer = "experiments.sam.SamTrainer"
    config.model.rho = 0.05  # radius of the ball; 0: plain training, at twice its cost
    config.train.epochs = 2.0
    return config
