"""Trains the language model of configs/transformer.py as a plain `tf.Module` with explicit float16 casts.

    python -m mptrain.main --config=configs/transformer_module.py[:small]

Data, sizes and schedule are those of configs/transformer.py, and so is the result, but for other initial weights: both are in
experiments/README.md. `--config.model.compute_dtype=float32` (or bfloat16) computes in another dtype.
"""

from ml_collections import ConfigDict

from configs import transformer


def get_config(size: str = "default") -> ConfigDict:
    config = transformer.get_config(size)
    config.trainer = "experiments.transformer_module.ModuleTransformerTrainer"
    config.model.compute_dtype = "float16"
    config.precision.policy = "native"  # what the module casts is all that is cast
    config.export.precision = "as_trained"
    return config
