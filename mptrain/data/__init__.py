"""Data as a function of (seed, step): `load` finds a source; `TrainingBatches` and `eval_dataset` make batches of it.

A batch is a dict of tensors whose first dimension is the batch: "inputs" and "targets" from the sources here, and in
evaluation "weight", float32 [batch], 0 for the padding of the last batch.
"""

from mptrain.data.named import load
from mptrain.data.pipeline import TrainingBatches, eval_dataset, per_replica, replica_share
from mptrain.data.sources import AnySource, DatasetSource, IndexedSource, Source, as_source, eval_steps

__all__ = [
    "AnySource",
    "DatasetSource",
    "IndexedSource",
    "Source",
    "TrainingBatches",
    "as_source",
    "eval_dataset",
    "eval_steps",
    "load",
    "per_replica",
    "replica_share",
]
