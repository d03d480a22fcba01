"""`--mode=sweep`: runs of one config with other values of some fields, one after another, and a report that ranks them.

A config file says what to try in a function `sweep()` beside `get_config()`; a mapping alone is a grid:

    def sweep():
        return {"optimizer.learning_rate": [1e-3, 1e-2], "model.width": [16, 32]}

    def sweep():
        return mptrain.sweep.random(trials=20, space={"optimizer.learning_rate": mptrain.sweep.log_uniform(1e-4, 1e-1)})

`mptrain.sweep.optuna` takes the same and lets each trial learn from those before. All of them take `metric` and `mode`, what to
rank by; without them it is `checkpoint.best_metric` and `checkpoint.best_mode` of the config.
"""

from mptrain.sweep.optuna_search import Optuna as optuna
from mptrain.sweep.search import Grid as grid
from mptrain.sweep.search import Random as random
from mptrain.sweep.search import choice, integers, log_uniform, uniform

__all__ = ["choice", "grid", "integers", "log_uniform", "optuna", "random", "uniform"]
