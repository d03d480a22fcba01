"""The checks of a config that come before any device is touched: names, types, ranges and contradictions, all at once."""

import difflib
import json
import math
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from mptrain.config import (
    CLUSTERS,
    COMPARED,
    FREE_GROUPS,
    PRECISIONS,
    SCHEDULES,
    STRATEGIES,
    default_config,
    fields,
    unknown_field,
)
from mptrain.errors import InputError


def validate(config: ConfigDict) -> None:
    """Checks names, types, ranges and contradictions.

    Raises:
        InputError: with every fault found, one a line.
    """
    faults = list(_structure_faults(config)) or list(_value_faults(config))
    if len(faults) > 1:
        raise InputError(f"{len(faults)} faults in the config:\n  " + "\n  ".join(faults))
    if faults:
        raise InputError(faults[0])


def _structure_faults(config: ConfigDict) -> Iterator[str]:
    expected, given = dict(fields(default_config())), dict(fields(config))
    types = default_config()
    for path in given.keys() - expected.keys():
        yield unknown_field(path)
    missing = sorted(expected.keys() - given.keys())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield f"config field {missing[0]!r}{more} is missing: start from mptrain.default_config()"
    for path in given.keys() & expected.keys():
        group, _, leaf = path.rpartition(".")
        wanted = (types[group] if group else types).get_type(leaf)
        value = given[path]
        if path in FREE_GROUPS or wanted is object or value is None and expected[path] is None:
            continue
        number = wanted is float and isinstance(value, int)
        if isinstance(value, bool) and wanted is not bool or not (isinstance(value, wanted) or number):
            yield f"config.{path} is {value!r}: write a value of type {wanted.__name__}"


def _value_faults(config: ConfigDict) -> Iterator[str]:
    yield from _choice_faults(config)
    yield from _range_faults(config)
    if not config.trainer or "." not in config.trainer:
        yield (f"config.trainer is {config.trainer!r}: write the module path and class, as 'experiments.mnist.MnistTrainer'")
    steps, epochs = config.train.steps, config.train.epochs
    if (steps is None) == (epochs is None):
        state = "neither is" if steps is None else "both are"
        yield f"config.train.steps and config.train.epochs: {state} set; set exactly one of them"
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
    intervals = {f"{group}.every_steps": config[group].every_steps for group in ("checkpoint", "eval", "numerics")}
    for path, value in (*intervals.items(), ("train.steps", steps or 0)):
        if window > 1 and value % window:
            yield (
                f"config.{path} is {value}: write a multiple of optimizer.accumulation_steps ({window}), so that no checkpoint"
                " falls inside a window"
            )
    for name, value in config.model.items():
        try:
            json.dumps(value.to_dict() if isinstance(value, ConfigDict) else value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            yield f"config.model.{name} is a {kind}, which config.json cannot hold: write numbers, text, lists or mappings"
    needed = {"idx": "the folder with the four IDX files", "npz": "an .npz file or a folder", "bytes": "a text or a folder"}
    if config.data.name in needed and not config.data.dir:
        yield f"config.data.dir is empty: data.name={config.data.name!r} needs {needed[config.data.name]}"
    if not 0 < config.data.eval_fraction < 1:
        yield f"config.data.eval_fraction is {config.data.eval_fraction}: write a number between 0 and 1"
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


def _choice_faults(config: ConfigDict) -> Iterator[str]:
    choices = {
        "precision.policy": PRECISIONS,
        "schedule.name": SCHEDULES,
        "devices.strategy": STRATEGIES,
        "devices.cluster": CLUSTERS,
        "devices.communication": ("auto", "ring", "nccl"),
        "train.jit_compile": ("auto", True, False),
        "checkpoint.best_mode": ("min", "max"),
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
    positive = (
        "data.batch_size",
        "data.eval_batch_size",
        "train.steps",
        "train.epochs",
        "checkpoint.every_steps",
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
        "devices.start_timeout",
        "devices.port",
    )
    not_negative = (
        "seed",
        "eval.every_steps",
        "numerics.every_steps",
        "schedule.warmup_steps",
        "schedule.end_factor",
        "checkpoint.keep_best",
        "devices.virtual_cpus",
        "devices.workers",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "optimizer.ema_momentum",
    )
    values = dict(fields(config))
    for path in positive:
        if values[path] is not None and not 0 < values[path] < math.inf:
            yield f"config.{path} is {values[path]}: write a number above 0"
    for path in not_negative:
        if not 0 <= values[path] < math.inf:
            yield f"config.{path} is {values[path]}: write 0 or a number above"
    if values["devices.port"] >= 2**16:
        yield f"config.devices.port is {values['devices.port']}: write a port, 1 to 65535"
    if values["seed"] >= 2**31:
        yield f"config.seed is {values['seed']}: write a number below 2**31"
    if values["optimizer.ema_momentum"] >= 1:
        yield f"config.optimizer.ema_momentum is {values['optimizer.ema_momentum']}: write a number below 1"
    if not values["loss_scale.growth_factor"] > 1:
        yield f"config.loss_scale.growth_factor is {values['loss_scale.growth_factor']}: write a number above 1"
    if not 0 < values["loss_scale.backoff_factor"] < 1:
        yield f"config.loss_scale.backoff_factor is {values['loss_scale.backoff_factor']}: write a number between 0 and 1"
