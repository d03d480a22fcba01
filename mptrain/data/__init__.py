"""Data as a function of (seed, step): `load` finds a source, `train_dataset` and `eval_dataset` make batches of it.

A batch is a dict of tensors whose first dimension is the batch: "inputs" and "targets" from the sources here, and in
evaluation "weight", float32 [batch], 0 for the padding of the last batch.
"""

from mptrain.data.pipeline import eval_dataset, eval_steps, per_replica, replica_share, train_dataset
from mptrain.data.sources import Source, load

__all__ = ["Source", "eval_dataset", "eval_steps", "load", "per_replica", "replica_share", "train_dataset"]
