"""The checks of a config's optimizer, schedule and parameter groups, before any device is touched."""

import difflib
import inspect
import math
import re
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from mptrain.config import SCHEDULES

# What a class takes and the config says elsewhere.
_ELSEWHERE = {
    "learning_rate": "config.optimizer.learning_rate",
    "weight_decay": "config.optimizer.weight_decay",
    "adam_weight_decay": "config.optimizer.weight_decay",
    "global_clipnorm": "config.optimizer.clip_norm",
    "use_ema": "config.optimizer.ema_momentum",
    "ema_momentum": "config.optimizer.ema_momentum",
    "ema_overwrite_frequency": "config.optimizer.ema_momentum",
    "loss_scale_factor": "config.loss_scale",
    "gradient_accumulation_steps": "config.optimizer.accumulation_steps",
    "warmup_steps": "config.schedule.warmup_steps",
    "name": "config.optimizer.name",
}
# Clipping of each gradient by itself would come after the one decision on the norm of all of them, and change what was decided.
_REFUSED = ("clipnorm", "clipvalue", "kwargs", "self")
_GROUP = {"match": str, "learning_rate_factor": float, "weight_decay": float, "frozen": bool}


def faults(config: ConfigDict) -> Iterator[str]:
    """Yields a line for each fault; of a config whose fields all have their types."""
    yield from _schedule_faults(config.schedule)
    yield from _optimizer_faults(config.optimizer)
    for number, group in enumerate(config.optimizer.groups):
        yield from (f"config.optimizer.groups[{number}]{fault}" for fault in _group_faults(group))


def classes() -> dict[str, type]:
    """Returns {name in lower case: class} of every optimizer of Keras 3."""
    import keras  # and with it TensorFlow, which good and bad flags need not wait for

    wrappers = (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)
    found = {name.lower(): value for name, value in vars(keras.optimizers).items() if inspect.isclass(value)}
    return {
        name: value
        for name, value in sorted(found.items())
        if issubclass(value, keras.optimizers.Optimizer) and value not in wrappers
    }


def _schedule_faults(schedule: ConfigDict) -> Iterator[str]:
    if schedule.name not in SCHEDULES:
        return
    boundaries = schedule.boundaries_steps or schedule.boundaries_epochs
    unit = "steps" if schedule.boundaries_steps else "epochs"
    of_type = int if schedule.boundaries_steps else (int, float)
    name = f"config.schedule.boundaries_{unit}"
    if not all(_is_number(value, of_type) and value > 0 for value in boundaries):
        yield f"{name} is {boundaries!r}: write {'whole ' if of_type is int else ''}numbers above 0"
    elif any(later <= earlier for earlier, later in zip(boundaries, boundaries[1:], strict=False)):
        yield f"{name} is {boundaries!r}: write them in ascending order"
    if not all(_is_number(value) and value >= 0 for value in schedule.factors):
        yield f"config.schedule.factors is {schedule.factors!r}: write numbers, 0 or above"
    if len(boundaries) != len(schedule.factors):
        yield f"config.schedule.factors has {len(schedule.factors)} numbers for {len(boundaries)} boundaries: one for each"
    if bool(boundaries) != (schedule.name == "piecewise"):
        yield (
            f"{name} is {boundaries!r} and schedule.name is {schedule.name!r}: boundaries and factors belong to 'piecewise',"
            " which needs them"
        )


def _optimizer_faults(optimizer: ConfigDict) -> Iterator[str]:
    decays = [group.get("weight_decay") for group in optimizer.groups if isinstance(group, Mapping)]
    if optimizer.name.lower() == "adamw" and not any([optimizer.weight_decay, *decays]):
        yield "config.optimizer.weight_decay is 0 with optimizer 'adamw': set it, or write name='adam'"
    if optimizer.name.lower() in _WELL_KNOWN and not len(optimizer.options):
        return
    known = classes()
    chosen = known.get(optimizer.name.lower())
    if chosen is None:
        close = difflib.get_close_matches(optimizer.name.lower(), known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        yield f"config.optimizer.name is {optimizer.name!r}: {hint}write one of {', '.join(known)}"
        return
    takes = [name for name in inspect.signature(chosen).parameters if name not in _REFUSED and name not in _ELSEWHERE]
    for option, value in optimizer.options.items():
        if option in takes:
            yield from _option_faults(chosen, option, value)
        elif option in _ELSEWHERE:
            yield f"config.optimizer.options.{option}: write {_ELSEWHERE[option]} instead"
        else:
            close = difflib.get_close_matches(option, takes, 1)
            hint = f"did you mean {close[0]!r}? it takes" if close else "it takes"
            yield f"config.optimizer.options.{option}: {chosen.__name__} has no such argument; {hint} {', '.join(takes)}"


_WELL_KNOWN = ("sgd", "rmsprop", "adam", "adamw", "adadelta", "adagrad", "adamax", "adafactor", "nadam", "ftrl", "lion", "lamb")


def _option_faults(chosen: type, option: str, value: object) -> Iterator[str]:
    """Yields a line if the value is of another kind than the argument's default, or not finite."""
    path, default = f"config.optimizer.options.{option}", inspect.signature(chosen).parameters[option].default
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}: write a finite number"
    elif isinstance(default, bool) and not isinstance(value, bool):
        yield f"{path} is {value!r}: write True or False"
    elif isinstance(default, (int, float)) and not isinstance(default, bool) and value is not None and not _is_number(value):
        yield f"{path} is {value!r}: write a number"


def _group_faults(group: object) -> Iterator[str]:
    if not isinstance(group, Mapping):
        yield f" is {group!r}: write a mapping, such as {{'match': '^encoder/', 'learning_rate_factor': 0.1}}"
        return
    for name in group.keys() - _GROUP.keys():
        close = difflib.get_close_matches(str(name), _GROUP, 1)
        yield f" has {name!r}: " + (f"did you mean {close[0]!r}?" if close else f"write some of {', '.join(_GROUP)}")
    if "match" not in group:
        yield " has no 'match': write a regular expression that is found in the paths of its variables"
    for name, value in group.items():
        if name == "match":
            yield from (f".match: {fault}" for fault in regex_faults([value]))
        elif name == "frozen" and not isinstance(value, bool):
            yield f".frozen is {value!r}: write True or False"
        elif name in ("learning_rate_factor", "weight_decay") and not (_is_number(value) and value >= 0):
            yield f".{name} is {value!r}: write a number, 0 or above"
    if group.get("frozen") is True and len(group.keys() & {"learning_rate_factor", "weight_decay"}):
        yield " is frozen, which leaves no use for learning_rate_factor and weight_decay: leave them out"
    elif group.get("learning_rate_factor") == 0:
        yield ".learning_rate_factor is 0: write 'frozen': True, which keeps no slots and counts no gradient"


def regex_faults(patterns: object) -> Iterator[str]:
    """Yields the rest of a line for each element that is no regular expression."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            yield f"{pattern!r} is no text: write regular expressions"
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{pattern!r} is no regular expression: {error}"


def _is_number(value: object, kind: type | tuple = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
