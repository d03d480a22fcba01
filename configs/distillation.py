"""Trains a network with one hidden layer of 32 units on MNIST, with the help of a trained one, in mixed float16."""

from ml_collections import ConfigDict

from mptrain import default_config


def get_config(teacher: str = "") -> ConfigDict:
    config = default_config()
    config.trainer = "experiments.distillation.DistillationTrainer"
    config.model = ConfigDict({"teacher": teacher, "teacher_share": 0.9, "temperature": 4.0, "units": 32, "shift": 1})
    config.precision.policy = "mixed_float16"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 200
    config.data.batch_size = 128
    config.train.epochs = 3.0
    return config
