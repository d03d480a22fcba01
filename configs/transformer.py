"""Trains a byte-level language model on the source text of Python's own standard library, in mixed float16.

    python -m mptrain.main --config=configs/transformer.py[:small]

The text is what the Python that runs has in its library, without tests: 12 MB for 3.11, the last 2 % for evaluation. Bits per
byte compare between runs on one version of Python only; `config.data.dir` takes any other folder of text.

By default 4 layers of width 256 over 256 bytes (3.4 million parameters), 10,000 steps: for a GPU. `small` has 2 layers of width
128 over 128 bytes (0.5 million) and 300 steps, for a CPU; its results are in experiments/README.md.
"""

import sysconfig

from ml_collections import ConfigDict

from mptrain import InputError, default_config


def get_config(size: str = "default") -> ConfigDict:
    if size not in ("default", "small"):
        raise InputError(f"there is no size {size!r}: write small after the colon, or nothing")
    config = default_config()
    config.trainer = "experiments.transformer.TransformerTrainer"
    config.model = ConfigDict({"layers": 4, "width": 256, "heads": 4})
    config.precision.policy = "mixed_float16"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 500
    config.data.name = "bytes"
    config.data.dir = sysconfig.get_path("stdlib")
    config.data.pattern = "*.py"
    config.data.exclude = ("site-packages", "dist-packages", "test", "tests", "idle_test")
    config.data.context = 256
    config.data.eval_fraction = 0.02
    config.data.batch_size = 64
    config.data.eval_batch_size = 64
    config.train.steps = 10_000
    config.eval.every_steps = 1000
    if size == "small":
        config.model.update({"layers": 2, "width": 128})
        config.optimizer.learning_rate = 3e-3
        config.schedule.warmup_steps = 50
        config.data.update({"context": 128, "batch_size": 16})
        config.train.steps = config.eval.every_steps = 300
    return config
