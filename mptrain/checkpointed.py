"""What of a trainer a checkpoint holds: path -> variable."""

import tensorflow as tf

from mptrain import keras_compat


def state(trainer) -> dict[str, tf.Variable]:
    """Returns everything that a checkpoint must hold, by path: step, model, what is trained beside it, optimizers."""
    inner = keras_compat.variables(trainer.model)
    inside = {id(keras_compat.raw(variable)) for variable in inner}
    beside = [variable for variable in trainer.trainable_variables if id(keras_compat.raw(variable)) not in inside]
    window = trainer.optimizer.window.keys()
    optimizer = {path: variable for path, variable in trainer.optimizer.state.items() if path not in window}
    if trainer.learning_rate_factor is not None:
        optimizer["learning_rate_factor"] = trainer.learning_rate_factor
    parts = {
        "model": keras_compat.variables_by_path(inner),
        "trainer": keras_compat.variables_by_path(beside),
        "optimizer": optimizer,
    }
    return {"step": trainer.global_step} | {f"{part}/{path}": v for part, found in parts.items() for path, v in found.items()}


def weights(trainer) -> list[str]:
    """Returns the paths in `state` of the trainable variables."""
    trained = {id(keras_compat.raw(variable)) for variable in trainer.trainable_variables}
    return [path for path, variable in state(trainer).items() if id(variable) in trained]
