"""Trains configs/mnist.py's network for two epochs with sharpness-aware minimisation, in mixed float16.

    python -m mptrain.main --config=configs/sam.py

A few minutes on a CPU: two forward and two backward passes a step. Reaches 99.23 % test accuracy, in float32 99.27 %, where
plain training (--config.trainer=experiments.mnist.MnistTrainer) reaches 99.17 %.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    config = mnist.get_config()
    config.trainer = "experiments.sam.SamTrainer"
    config.model.rho = 0.05  # radius of the ball; 0: plain training, at twice its cost
    config.train.epochs = 2.0
    return config
