"""`restore`: the trainer of a run that lies in a folder, to use its model in another run or in a notebook."""

import os

import tensorflow as tf

from mptrain import keras_compat, runner
from mptrain.checkpoints import Checkpoints
from mptrain.errors import RunError
from mptrain.run_folder import RunFolder, saved_config
from mptrain.trainer import Trainer


def restore(folder: str | os.PathLike, strategy: tf.distribute.Strategy | None = None) -> Trainer:
    """Returns the trainer of the run in `folder`, in the precision that it trained in, as its newest whole checkpoint has it.

    Its model holds the weights' moving averages where the run kept such. Nothing is written to the folder.

    Args:
        folder: a run's folder.
        strategy: for whose replicas the model is made; default: the one in scope.

    Raises:
        InputError: if it is no run's folder, or the run cannot be built here.
        RunError: if no whole checkpoint is in it.
    """
    config = saved_config(folder)
    with keras_compat.dtype_policy("float32"):  # for a run in "native", which takes what it finds
        trainer = runner.build_trainer(config, strategy or tf.distribute.get_strategy())
    checkpoints = Checkpoints(RunFolder(folder, read_only=True).checkpoints, trainer.state, keep=1, read_only=True)
    with trainer.strategy.scope():
        step = checkpoints.restore_newest(lambda damaged: None, put_aside=False)
    if step is None:
        raise RunError(f"{folder} holds no checkpoint: train that run first")
    with trainer.optimizer.averaged_weights():
        evaluated = [tf.identity(variable) for variable in trainer.trainable_variables]
    for variable, value in zip(trainer.trainable_variables, evaluated, strict=True):
        variable.assign(value)
    return trainer
