"""BatchNorm by TensorFlow's fused kernel: one operation forward and one back, where Keras 3 writes a dozen each way.

The formulas are the same (Ioffe and Szegedy, "Batch Normalization", 2015), and mean and variance are float32 in both. What
changes is how often the activations are read and written, and that 16-bit ones are not cast to float32 for it. On a CPU that
is a third (float32) to a half (bfloat16) of a residual network's step.

Keras has no public place for this: a layer's `call` is replaced, that of the class itself alone. `tests/test_batch_norm.py`
fails when Keras computes anything else. tf_keras takes the fused kernel by itself, for images and volumes.
"""

import functools

import keras
import tensorflow as tf

from mptrain import keras_compat

_DTYPES = ("float32", "float16", "bfloat16")  # that the kernel takes
_LEAST_EPSILON = 1.001e-5  # that cuDNN takes


def prepare(model, *, synchronized: bool = False, compiled: bool = False) -> None:
    """Makes the BatchNorm layers in a model fused, or normalize over the batches of all replicas together.

    Args:
        model: a Keras model of either generation, or a `tf.Module` with Keras layers in it; its layers are there already.
        synchronized: whether over all replicas; the fused kernel knows its own only.
        compiled: whether XLA compiles the step. It fuses Keras's operations itself, into less than it makes of the kernel.
    """
    if synchronized:
        keras_compat.synchronize_batch_norm(model)
    elif not compiled:
        for layer in keras_compat.all_layers(model):
            if type(layer) is keras.layers.BatchNormalization:  # what a subclass changes is not known
                layer.call = functools.partial(_call, layer)


def _call(layer, inputs, training=None, mask=None):
    """What the layer's own `call` does, by the fused kernel where that can do what the layer is told to, and pays."""
    moves = bool(training and layer.trainable)
    if mask is not None or not _can_be_fused(layer, inputs) or not _pays(layer, inputs, moves):
        return type(layer).call(layer, inputs, training=training, mask=mask)
    channels = layer.moving_mean.shape[0]
    known = (tf.zeros([0]),) * 2 if moves else (layer.moving_mean, layer.moving_variance)
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs if inputs.shape.rank == 4 else tf.reshape(inputs, [1, 1, -1, channels]),
        scale=layer.gamma if layer.scale else tf.ones([channels]),
        offset=layer.beta if layer.center else tf.zeros([channels]),
        mean=known[0],
        variance=known[1],
        epsilon=layer.epsilon,
        is_training=moves,
    )
    if moves:
        # The kernel's variance is divided by one less than the number of values, Keras's by that number. Of one value alone
        # it is what the device makes of 0 / 0, and should be 0.
        number = tf.cast(tf.size(inputs) // channels, tf.float32)
        _move(layer.moving_mean, mean, layer.momentum)
        _move(layer.moving_variance, tf.math.multiply_no_nan(variance, (number - 1.0) / number), layer.momentum)
    return outputs if inputs.shape.rank == 4 else tf.reshape(outputs, tf.shape(inputs))


def _can_be_fused(layer, inputs) -> bool:
    last = layer.axis in (-1, inputs.shape.rank - 1)
    renormalizes = getattr(layer, "renorm", False)  # which came after Keras 3.12
    plain = not (renormalizes or layer.synchronized) and layer.epsilon >= _LEAST_EPSILON
    one_dtype = inputs.dtype.name == layer.compute_dtype and layer.compute_dtype in _DTYPES
    return last and plain and one_dtype and all(variable.dtype == "float32" for variable in layer.variables)


def _pays(layer, inputs, moves: bool) -> bool:
    """Whether the fused kernel is faster than Keras's operations.

    On a CPU it costs 0.1 ms for however little: of 32,768 numbers statistics take twice as long as by Keras, of 131,072 half as
    long. Where they are known the size is not asked: an export, which takes any number of examples, must give the bits of the
    evaluation. And oneDNN has no fast kernel where channels do not fill its vectors: in bfloat16 8, 24 or 50 of them take twice
    to three times as long.

    On a GPU it is left to Keras to apply known statistics: the kernel's gradient there is not deterministic.
    """
    if "CPU" not in keras_compat.raw(layer.moving_mean).device:
        return moves
    number = inputs.shape.num_elements()  # None: a batch of any size
    return layer.moving_mean.shape[0] % 16 == 0 and (not moves or number is None or number > 2**16)


def _move(average, value: tf.Tensor, momentum: float) -> None:
    average.assign(average * momentum + value * (1.0 - momentum))
