"""One of two real worker processes: overflow on one worker skips the step on both. Run by test_multi_worker.py."""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

from mptrain import LossScaleOptimizer

window = int(sys.argv[1])
strategy = tf.distribute.MultiWorkerMirroredStrategy()
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]

with strategy.scope():
    kernel, table = tf.Variable([1.0, 2.0]), tf.Variable(tf.zeros([4, 1]))
    optimizer = LossScaleOptimizer(
        keras.optimizers.Adam(0.1), initial_scale=8, clip_norm=1.0, accumulation_steps=window, ema_momentum=0.9
    )
    optimizer.build([kernel, table])


def replica_step(bad_worker):
    dense = tf.where(tf.equal(bad_worker, index), np.inf, 1.0) * tf.ones([2])
    sparse = tf.IndexedSlices(tf.constant([[1.0 + index]]), tf.constant([index + 1]), tf.constant([4, 1]))
    optimizer.get_scaled_loss(tf.constant(1.0))
    return optimizer.apply_gradients([(dense, kernel), (sparse, table)])


@tf.function
def loop(bad_workers):
    for bad in bad_workers:
        strategy.run(replica_step, args=(bad,))


bad_workers = tf.constant([-1] * window + [0] + [-1] * (window - 1) + [-1] * window + [1] + [-1] * (window - 1))
loop(bad_workers)
functions = loop.get_concrete_function(bad_workers).graph.as_graph_def().library.function
(body,) = [function.node_def for function in functions if "while_body" in function.signature.name]
with optimizer.averaged_weights():
    average = kernel.numpy().tolist()
print(
    json.dumps(
        {
            "kernel": kernel.numpy().tolist(),
            "table": table.numpy().ravel().tolist(),
            "average": average,
            "norm": float(optimizer.gradient_norm),
            "scale": float(optimizer.loss_scale),
            "applied": int(optimizer.applied_steps),
            "skipped": int(optimizer.skipped_steps),
            "all_reduces": sum(node.op == "CollectiveReduceV2" for node in body),  # of each step; branches are elsewhere
            "skips": [[skip.update, skip.loss_scale, list(skip.variables)] for skip in optimizer.skips(0, 2)],
        }
    )
)
