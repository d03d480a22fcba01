"""What weight decay leaves out: biases and norms, by what they are in either generation of Keras, and not by their names.

Keras looks for words in names, by which a kernel in a layer called "bias" would not decay, and a norm's factor called "scale"
would.
"""

import functools
import types

import keras
import tensorflow as tf
import tf_keras

from mptrain import keras_compat

_UNDECAYED = "_mptrain_undecayed"
_NORMS = tuple(
    getattr(home.layers, f"{kind}Normalization")
    for home in (keras, tf_keras)
    for kind in ("Batch", "Layer", "Group", "RMS", "Unit")
    if hasattr(home.layers, f"{kind}Normalization")
)


def note_biases_and_norms(model) -> None:
    """Notes on each variable of a bias or a norm that it is one, whatever it is called and of whatever rank.

    On the variable itself, as `keras_compat.note_paths` does. Shapes alone do not tell: a norm over two axes has factors of
    rank two, and so have the biases of attention and of GRUs.
    """
    for layer in keras_compat.all_layers(model):
        found = [*(layer.variables if isinstance(layer, _NORMS) else ()), getattr(layer, "bias", None)]
        for variable in (each for each in found if isinstance(each, (tf.Variable, keras.Variable))):
            setattr(keras_compat.raw(variable), _UNDECAYED, True)


def decays(variable) -> bool:
    """Whether weight decay is for a variable: not for biases, norms, and what else has less than two dimensions."""
    noted = getattr(keras_compat.raw(variable), _UNDECAYED, False)
    return len(variable.shape) > 1 and not noted and keras_compat.path(variable).rsplit("/", 1)[-1] != "bias"


def exclude(optimizer: keras.optimizers.Optimizer, variables: list) -> None:
    """Makes a Keras 3 optimizer that is not built yet decay all but these variables.

    Muon is put right on the way. It has a second number for what it leaves to Adam, 0.004 if not told otherwise, where the
    config has one for all; and it reads the paths of variables, which a plain `tf.Variable` has not.
    """
    optimizer.exclude_from_weight_decay(var_list=variables)
    if isinstance(optimizer, getattr(keras.optimizers, "Muon", ())):

        def should_use_adamw(variable):
            known = types.SimpleNamespace(shape=variable.shape, path=keras_compat.path(variable))
            return type(optimizer)._should_use_adamw(optimizer, known)

        optimizer._should_use_adamw = should_use_adamw
        optimizer._apply_weight_decay = functools.partial(keras.optimizers.Optimizer._apply_weight_decay, optimizer)
