"""The checks of a config that come before any device is touched: names, types, ranges and contradictions, all at once."""

import difflib
import importlib.util
import json
import math
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from mptrain import durations, optimizer_check, time_span
from mptrain.config import (
    CLUSTERS,
    COMPARED,
    EXPORTED,
    FREE_GROUPS,
    LOGGERS,
    PRECISIONS,
    SCHEDULES,
    STRATEGIES,
    default_config,
    fields,
    from_fields,
    place,
    unknown_field,
)
from mptrain.errors import InputError

_POSITIVE = (
    "data.batch_size",
    "data.eval_batch_size",
    "train.steps",
    "train.epochs",
    "eval.every_steps",
    "eval.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.every_epochs",
    "checkpoint.keep",
    "data.examples",
    "data.classes",
    "data.context",
    "verify_resume.steps",
    "verify_resume.kills",
    "numerics.steps",
    "numerics.reference_every",
    "parity.steps",
    "parity.every_steps",
    "parity.bound",
    "loss_scale.growth_interval",
    "loss_scale.hysteresis",
    "loss_scale.max_consecutive_skips",
    "loss_scale.min_scale",
    "optimizer.learning_rate",
    "optimizer.accumulation_steps",
    "early_stop.patience",
    "plateau.patience",
    "plateau.factor",
    "devices.start_timeout",
    "devices.port",
)
_NOT_NEGATIVE = (
    "seed",
    "eval.timeout",
    "early_stop.min_delta",
    "plateau.cooldown",
    "plateau.min_delta",
    "plateau.min_learning_rate",
    "nan_guard.patience",
    "profile.start_step",
    "profile.steps",
    "eval.steps",
    "numerics.every_steps",
    "numerics.every_epochs",
    "schedule.warmup_steps",
    "schedule.warmup_epochs",
    "schedule.end_factor",
    "checkpoint.keep_best",
    "devices.virtual_cpus",
    "devices.workers",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.ema_momentum",
)


def validate(config: ConfigDict) -> None:
    """Checks names, types, ranges and contradictions.

    Raises:
        InputError: with every fault found, one a line.
    """
    refuse(list(faults(config)))


def faults(config: ConfigDict) -> list[str]:
    """Returns a line for each fault of the config: of names and types, and of the values of all other fields."""
    wrong = dict(_structure_faults(config))
    if not wrong:
        return list(_value_faults(config))
    sound = from_fields({path: value for path, value in fields(config) if path not in wrong})
    return [*wrong.values(), *(fault for fault in _value_faults(sound) if not any(path in fault for path in wrong))]


def refuse(faults: list[str]) -> None:
    """Raises an InputError that tells all faults, one a line; nothing where there are none."""
    if len(faults) > 1:
        raise InputError(f"{len(faults)} faults:\n  " + "\n  ".join(faults))
    if faults:
        raise InputError(faults[0])


def _structure_faults(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields (path, line) for each field that does not exist, is missing or has a value of another type."""
    expected, given = dict(fields(default_config())), dict(fields(config))
    types, optional = default_config(), {path for pair in durations.pairs() for path in pair if expected[path] != ()}
    for path in given.keys() - expected.keys():
        yield path, unknown_field(path)
    missing = sorted(expected.keys() - given.keys())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield missing[0], f"config field {missing[0]!r}{more} is missing: start from mptrain.default_config()"
    for path in sorted(given.keys() & expected.keys()):
        holder, leaf = place(types, path)
        wanted, value = dict if path in FREE_GROUPS else holder.get_type(leaf), given[path]
        if wanted is object or value is None and (expected[path] is None or path in optional):
            continue
        number = wanted is float and isinstance(value, int)
        if isinstance(value, bool) and wanted is not bool or not (isinstance(value, wanted) or number):
            yield path, f"config.{path} is {value!r}: write a value of type {wanted.__name__}"


def _value_faults(config: ConfigDict) -> Iterator[str]:
    yield from _choice_faults(config)
    yield from _range_faults(config)
    yield from _action_faults(config)
    yield from _logger_faults(config)
    if not config.trainer or "." not in config.trainer:
        yield (f"config.trainer is {config.trainer!r}: write the module path and class, as 'experiments.mnist.MnistTrainer'")
    yield from durations.faults(config)
    yield from optimizer_check.faults(config)
    for group, leaf in (("precision", "float32_layers"), ("numerics", "layers")):
        yield from (f"config.{group}.{leaf}: {fault}" for fault in optimizer_check.regex_faults(config[group][leaf]))
    loop = config.train.steps_per_loop
    if loop != "auto" and (isinstance(loop, bool) or not isinstance(loop, int) or loop < 1):
        yield f"config.train.steps_per_loop is {loop!r}: write a number of steps above 0, or 'auto'"
    scale = config.loss_scale
    if not scale.min_scale <= scale.initial_scale <= scale.max_scale:
        yield (
            f"config.loss_scale.initial_scale is {scale.initial_scale:g}: it must lie between min_scale"
            f" ({scale.min_scale:g}) and max_scale ({scale.max_scale:g})"
        )
    window = config.optimizer.accumulation_steps
    values = dict(fields(config))
    intervals = {steps for steps, _ in durations.pairs()} - durations.open_fields(config)
    if config.profile.steps:
        intervals |= {"profile.start_step", "profile.steps"}
    for path in sorted(intervals):
        if window > 1 and path.endswith((".steps", ".every_steps", ".start_step")) and (values[path] or 0) % window:
            yield (
                f"config.{path} is {values[path]}: write a multiple of optimizer.accumulation_steps ({window}), so that no"
                " checkpoint falls inside a window"
            )
    for group in FREE_GROUPS:
        for name, value in config[group].items():
            try:
                json.dumps(value.to_dict() if isinstance(value, ConfigDict) else value)
            except (TypeError, ValueError):
                what = f"config.{group}.{name} is a {type(value).__name__}"
                yield f"{what}, which config.json cannot hold: write numbers, text, lists or mappings"
    needed = {"idx": "the folder with the four IDX files", "npz": "an .npz file or a folder", "bytes": "a text or a folder"}
    if config.data.name in needed and not config.data.dir:
        yield f"config.data.dir is empty: data.name={config.data.name!r} needs {needed[config.data.name]}"
    if not 0 < config.data.eval_fraction < 1:
        yield f"config.data.eval_fraction is {config.data.eval_fraction}: write a number between 0 and 1"
    if config.export.onnx and config.export.precision != "float32":
        yield (
            f"config.export.onnx is True and export.precision is {config.export.precision!r}: ONNX runtimes leave roundings"
            " out, so write 'float32'"
        )
    for name in config.parity.precisions:
        if name not in COMPARED:
            yield f"config.parity.precisions names {name!r}: write some of {', '.join(COMPARED)}"
    if config.devices.strategy not in ("auto", "mirrored") and config.devices.virtual_cpus > 1:
        yield (
            f"config.devices.virtual_cpus is {config.devices.virtual_cpus} and devices.strategy is"
            f" {config.devices.strategy!r}: set strategy='mirrored' or virtual_cpus=0"
        )
    if config.devices.strategy == "tpu" and config.precision.policy == "mixed_float16":
        yield "config.precision.policy is 'mixed_float16' on a TPU, which has no float16 arithmetic: write 'mixed_bfloat16'"


def _action_faults(config: ConfigDict) -> Iterator[str]:
    try:
        time_span.seconds(config.train.time_limit)
    except ValueError as error:
        yield f"config.train.time_limit: {error}"
    for group in ("eval", "export"):
        chosen = config[group].checkpoint
        if chosen not in ("newest", "best") and (isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < 0):
            yield f"config.{group}.checkpoint is {chosen!r}: write newest, best, or the step of a checkpoint"
    if config.export.at_end and config.export.checkpoint == "best" and not config.checkpoint.keep_best:
        yield "config.export.checkpoint is 'best' and checkpoint.keep_best is 0, so none is rated: set that, or write newest"
    rate, floor = config.optimizer.learning_rate, config.plateau.min_learning_rate
    if config.plateau.metric and floor >= rate:
        yield (
            f"config.plateau.min_learning_rate is {floor:g}: write a number below optimizer.learning_rate ({rate:g}), which is"
            " to be reduced"
        )
    for path in ("nan_guard.metrics", "log.loggers", "log.tags"):
        group, leaf = path.split(".")
        if odd := [value for value in config[group][leaf] if not isinstance(value, str)]:
            yield f"config.{path} holds {odd[0]!r}: write texts, as ('loss',)"


def _logger_faults(config: ConfigDict) -> Iterator[str]:
    for name in config.log.loggers:
        if name in LOGGERS:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a folder of that name, as W&B makes one where it runs, is no package
                yield f"config.log.loggers names {name!r}, which is not installed: pip install 'mptrain[{name}]'"
        elif "." not in str(name):
            yield f"config.log.loggers names {name!r}: write {', '.join(LOGGERS)}, or 'package.module.Class'"


def _choice_faults(config: ConfigDict) -> Iterator[str]:
    choices = {
        "precision.policy": PRECISIONS,
        "schedule.name": SCHEDULES,
        "devices.strategy": STRATEGIES,
        "devices.cluster": CLUSTERS,
        "devices.communication": ("auto", "ring", "nccl"),
        "train.jit_compile": ("auto", True, False),
        "checkpoint.best_mode": ("min", "max"),
        "early_stop.mode": ("min", "max"),
        "plateau.mode": ("min", "max"),
        "log.wandb_mode": ("", "online", "offline"),
        "export.precision": EXPORTED,
    }
    values = dict(fields(config))
    for path, allowed in choices.items():
        if values[path] not in allowed or isinstance(values[path], int) and not isinstance(values[path], bool):
            close = difflib.get_close_matches(str(values[path]), [str(a) for a in allowed], 1, 0.6)
            hint = f"did you mean {close[0]!r}? " if close else ""
            if path == "devices.strategy" and re.search("param|ps|central", str(values[path]).lower()):
                hint = "parameter servers update without waiting for each other, so no step can be skipped by all; "
            yield f"config.{path} is {values[path]!r}: {hint}write one of {', '.join(map(str, allowed))}"


def _range_faults(config: ConfigDict) -> Iterator[str]:
    values = dict(fields(config))
    for path in _POSITIVE:
        if values[path] is not None and not 0 < values[path] < math.inf:
            yield f"config.{path} is {values[path]}: write a number above 0"
    for path in _NOT_NEGATIVE:
        if values[path] is not None and not 0 <= values[path] < math.inf:
            yield f"config.{path} is {values[path]}: write 0 or a number above"
    for path, value in values.items():
        if path not in _POSITIVE + _NOT_NEGATIVE and isinstance(value, float) and not math.isfinite(value):
            yield f"config.{path} is {value}: write a finite number"
    for path in ("data.shape",):
        if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in values[path]):
            yield f"config.{path} is {values[path]!r}: write whole numbers above 0"
    if values["devices.port"] >= 2**16:
        yield f"config.devices.port is {values['devices.port']}: write a port, 1 to 65535"
    if values["seed"] >= 2**31:
        yield f"config.seed is {values['seed']}: write a number below 2**31"
    if values["optimizer.ema_momentum"] >= 1:
        yield f"config.optimizer.ema_momentum is {values['optimizer.ema_momentum']}: write a number below 1"
    if values["plateau.factor"] >= 1:
        yield f"config.plateau.factor is {values['plateau.factor']}: write a number below 1"
    if not values["loss_scale.growth_factor"] > 1:
        yield f"config.loss_scale.growth_factor is {values['loss_scale.growth_factor']}: write a number above 1"
    if not 0 < values["loss_scale.backoff_factor"] < 1:
        yield f"config.loss_scale.backoff_factor is {values['loss_scale.backoff_factor']}: write a number between 0 and 1"
