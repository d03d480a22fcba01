"""What an update that all replicas agree on asks of `tf.distribute`."""

from collections.abc import Iterable

import tensorflow as tf

from mptrain.autograph import as_written
from mptrain.errors import InputError

_SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
    tf.distribute.TPUStrategy,
)


def check_strategy(strategy: tf.distribute.Strategy, *, scaled: bool) -> None:
    """Raises an InputError if the replicas of the strategy do not step together, or a TPU's loss is to be scaled."""
    if tf.distribute.has_strategy() and not isinstance(strategy, _SUPPORTED):
        raise InputError(
            f"{type(strategy).__name__} is not supported: its replicas do not step together, so they cannot agree on skipping"
            " a step; use MirroredStrategy or MultiWorkerMirroredStrategy"
        )
    if isinstance(strategy, tf.distribute.TPUStrategy) and scaled:
        raise InputError("TPUs have no float16 arithmetic: use mixed_bfloat16, which needs no loss scale")


def check_same_scope(maker: tf.distribute.Strategy, variables: Iterable[tf.Variable], slots: Iterable[tf.Variable]) -> None:
    """Raises a RuntimeError unless an optimizer, the variables it trains and its slots belong to the strategy in scope.

    Args:
        maker: the strategy in whose scope the optimizer was made.
        variables: the variables that it trains.
        slots: the inner optimizer's own variables.
    """
    here = tf.distribute.get_strategy()
    homes = [each.distribute_strategy for each in variables if isinstance(each, tf.distribute.DistributedValues)]
    elsewhere = any(home is not here for home in homes)
    if here.num_replicas_in_sync > 1:  # with one replica, variables of no strategy do as well
        elsewhere |= maker is not here or any(not isinstance(each, tf.distribute.DistributedValues) for each in slots)
    if elsewhere:
        raise RuntimeError(
            "the optimizer and its variables belong to different strategies: create the model, the inner optimizer and the"
            " LossScaleOptimizer in one `with strategy.scope():`, and call build there"
        )


@as_written
def sum_over_replicas(replica: tf.distribute.ReplicaContext, gradients: list) -> list:
    """Returns the gradients summed over the replicas: one all-reduce of all of them."""
    if replica.num_replicas_in_sync == 1:
        return gradients
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)


def merged(replica: tf.distribute.ReplicaContext, function, *args):
    """Calls `function(strategy, *args)` once for all replicas, or in this one where there is nothing to merge.

    A branch of the graph must not hold a merge, so the replicas merge first and part again inside the branch.
    """
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        return function(replica.strategy, *args)
    return replica.merge_call(function, args=args)


@as_written
def set_aside(function):
    """Returns a function that is one operation of the graph, so that a step which does not take its branch passes over one.

    Where several replicas are written to, or there is no graph, it stays what it is.
    """
    if tf.executing_eagerly() or tf.distribute.get_strategy().num_replicas_in_sync > 1:
        return function
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})
