"""What the TensorFlow contestants share: the batches and the dtype policies."""

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from benchmarks import works
from benchmarks.frame import Case
from mptrain.hardware import hardware

BYTES_AT_ONCE = 2**20


def batches(case: Case, form=lambda inputs, targets: (inputs, targets)) -> tf.data.Dataset:
    """Returns the batches of all steps of a case, gathered from memory ahead of the step; small ones many at a time.

    To hand on a small batch from thread to thread takes longer than to gather it, and nobody shall win by that.

    Args:
        case: whose examples, in whose order.
        form: makes what a batch is of inputs and targets.
    """
    inputs, targets = (tf.constant(array) for array in works.data(case.work))
    options = tf.data.Options()
    options.autotune.enabled = False  # whose thread costs the small works more than it gives
    many = BYTES_AT_ONCE // (case.work.batch_size * inputs[0].shape.num_elements() * inputs.dtype.size)
    rows = tf.data.Dataset.from_tensor_slices(np.load(case.numbers)).repeat()

    def gathered(row):
        return form(tf.gather(inputs, row), tf.gather(targets, row))

    if many > 1:
        return rows.batch(many).map(gathered).prefetch(1).unbatch().with_options(options)
    return rows.map(gathered).prefetch(4).with_options(options)


def no_tf32() -> None:
    """Makes float32 on a GPU float32 for everybody, where TensorFlow would multiply TF32's 10 bits and PyTorch would not."""
    tf.config.experimental.enable_tensor_float_32_execution(False)


def set_policy(precision: str) -> None:
    """Makes layers of both Keras generations compute in the precision."""
    no_tf32()
    keras.config.set_dtype_policy(precision)
    tf_keras.mixed_precision.set_global_policy(precision)


def on_cpu() -> bool:
    return not tf.config.list_physical_devices("GPU")


def faster_with_xla(case: Case) -> bool:
    """Whether XLA makes a step faster on a CPU: where float16's kernels take the time, but for the smallest work.

    With avx512_fp16 TensorFlow's products of large matrices are fast, and XLA's take a hundred times as long; but it takes
    1.2 ms for every product with a bias, however small. Of convolutions XLA makes the small ones faster, not the large ones.
    """
    if not on_cpu() or case.precision != "mixed_float16":
        return False
    fast_products = "avx512_fp16" in hardware().cpu_features
    return case.work.name in (("mlp", "resnet") if fast_products else ("cnn", "resnet", "transformer"))
