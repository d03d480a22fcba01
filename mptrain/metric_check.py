"""Whether the metrics that a config names, to rate and to watch a run by, are there; asked before anything is written."""

from collections.abc import Collection

from ml_collections import ConfigDict

from mptrain.errors import InputError


def check(config: ConfigDict, metrics: Collection[str]) -> None:
    """Checks the fields of the config that name metrics of an evaluation.

    Args:
        config: the run's config.
        metrics: the names that there are.

    Raises:
        InputError: for a field that names another one.
    """
    named = {f"{group}.metric": config[group].metric for group in ("early_stop", "plateau") if config[group].metric}
    if config.checkpoint.keep_best:
        named["checkpoint.best_metric"] = config.checkpoint.best_metric
    for path, name in [*named.items(), *(("nan_guard.metrics", name) for name in config.nan_guard.metrics)]:
        if name not in metrics:
            raise InputError(f"config.{path} names the metric {name!r}: write one of {', '.join(metrics)}")
