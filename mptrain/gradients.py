"""What is done to gradients, be they dense tensors, `tf.IndexedSlices` or None; a sparse gradient is never made dense."""

import tensorflow as tf


def sum_over_replicas(replica: tf.distribute.ReplicaContext, gradients: list) -> list:
    """Returns the gradients summed over the replicas: one all-reduce of all of them."""
    if replica.num_replicas_in_sync == 1:
        return gradients
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)


def to_float32(gradient):
    """Returns the gradient in float32; None stays None."""
    return gradient if gradient is None else map_values(lambda values: tf.cast(values, tf.float32), gradient)


def map_values(function, gradient):
    """Returns the gradient with `function` applied to its values."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


def sum_of_squares(gradient) -> tf.Tensor:
    """Returns the sum of the squares of a gradient's elements; a sparse one must have each row once."""
    return 2.0 * tf.nn.l2_loss(gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient)


def with_each_row_once(gradient):
    """Returns a sparse gradient with the rows that stand several times added up; a dense one as it is.

    Keras 3 applies such rows one after another, which is not what their sum does to an optimizer with slots.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows, places = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)
