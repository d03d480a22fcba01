"""mptrain: custom training loops in mixed precision on TensorFlow that are fast and right.

Names are imported on first use, so that reading a config or refusing a bad flag does not wait for TensorFlow.
So Keras loads a saved model with `MixedPrecision` in it only once that name, or `mptrain.layers`, has been imported.
"""

import importlib
import os

# mptrain trains with TensorFlow; a Keras set to another backend by the user's keras.json would only fail later and darkly.
os.environ["KERAS_BACKEND"] = "tensorflow"

__version__ = "0.1.0"

_HOMES = {
    "Trainer": "mptrain.trainer",
    "Precision": "mptrain.precision",
    "MixedPrecision": "mptrain.layers",
    "StateGuard": "mptrain.state_guard",
    "LossScaleOptimizer": "mptrain.loss_scale",
    "Optimizers": "mptrain.several_optimizers",
    "default_config": "mptrain.config",
    "export": "mptrain.exports",
    "restore": "mptrain.earlier_run",
    "grid": "mptrain.pictures",
    "run": "mptrain.runner",
    "InputError": "mptrain.errors",
    "RunError": "mptrain.errors",
    "StopRun": "mptrain.errors",
    "Interrupted": "mptrain.errors",
    "Logger": "mptrain.loggers",
}
_ROOMS = (
    "config",
    "data",
    "devices",
    "errors",
    "layers",
    "loggers",
    "loss_scale",
    "numerics",
    "optimizers",
    "pictures",
    "precision",
    "runner",
    "sweep",
    "trainer",
)

__all__ = sorted((*_HOMES, *_ROOMS))


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"mptrain.{name}")
    raise AttributeError(f"module 'mptrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
