"""What is done to gradients, be they dense tensors, `tf.IndexedSlices` or None; a sparse gradient is never made dense."""

import tensorflow as tf

from mptrain.autograph import as_written


@as_written
def to_float32(gradient):
    """Returns the gradient in float32."""
    return map_values(lambda values: tf.cast(values, tf.float32), gradient)


@as_written
def map_values(function, gradient):
    """Returns the gradient with `function` applied to its values; None stays None."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


@as_written
def add_gradients(left, right):
    """Returns the sum of two gradients of one variable: sparse if both are."""
    if not isinstance(left, tf.IndexedSlices):
        return add_to_dense(left, right)
    if not isinstance(right, tf.IndexedSlices):
        return add_to_dense(right, left)
    values, indices = tf.concat([left.values, right.values], 0), tf.concat([left.indices, right.indices], 0)
    return tf.IndexedSlices(values, indices, left.dense_shape)


def add_to_dense(total: tf.Tensor, gradient) -> tf.Tensor:
    """Returns a dense tensor plus a gradient, dense or sparse."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, tf.newaxis], gradient.values)
    return total + gradient


@as_written
def half_sum_of_squares(gradient) -> tf.Tensor:
    """Returns half the sum of the squares of a gradient's elements; a sparse one must have each row once."""
    return tf.nn.l2_loss(gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient)


@as_written
def with_each_row_once(gradient):
    """Returns a sparse gradient with the rows that stand several times added up; a dense one as it is.

    Keras 3 applies such rows one after another, which is not what their sum does to an optimizer with slots.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows, places = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)
