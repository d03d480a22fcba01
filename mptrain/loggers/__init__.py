"""Where rows and events go beside TensorBoard and metrics.jsonl: Weights & Biases, MLflow, or a class of the user's own.

Nothing of a service is imported unless `config.log.loggers` names it.
"""

from mptrain.loggers.base import Logger, RunInfo
from mptrain.loggers.fan_out import Logs, classes, start

__all__ = ["Logger", "Logs", "RunInfo", "classes", "start"]
