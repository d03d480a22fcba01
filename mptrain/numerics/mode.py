"""`--mode=numerics`: trains some steps of the user's config with all of them looked at, and reports on their ranges."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

from mptrain import config as config_lib
from mptrain.console import Console
from mptrain.errors import InputError
from mptrain.numerics import report
from mptrain.numerics.advice import Advisor
from mptrain.numerics.collection import Collection, Collector
from mptrain.numerics.page import write_page
from mptrain.numerics.picture import write_picture
from mptrain.numerics.table import table
from mptrain.numerics.verdicts import Layer, Scales, Setting, judge, layers, scales

_TRIED = 4  # batches on which advice is tried


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Layers with their verdicts, the loss scales that fit them, and what the network did in 16 bits."""

    layers: list[Layer]
    fitting: Scales | None
    float16: Collection


def numerics(trainer, build, folder: pathlib.Path, console: Console) -> dict[str, float]:
    """Collects, judges, advises, tries the advice, and writes the report; trains `config.numerics.steps` steps.

    A run in float32 is trained once more in float16: what only happens there, no range in float32 tells.

    Args:
        trainer: the run's, restored or fresh.
        build: makes another trainer from a config.
        folder: gets numerics.json, numerics.html, numerics.png and, where something is at risk, float32_layers.py.
        console: gets progress, the table and the advice.

    Returns:
        "layers", "layers_at_risk", "skipped_steps".

    Raises:
        InputError: if there is no layer or scope to look at.
    """
    if trainer.workers.is_chief:
        folder.mkdir(parents=True, exist_ok=True)
    start = {path: variable.numpy() for path, variable in trainer.state.items()}
    half, collector = trainer, Collector(trainer, trainer.config.numerics.reference_every)
    try:
        _train(collector, trainer, console, "numerics")
    finally:  # what was found does not wait for what is advised, nor for the end, when a user ends it
        if (found := collector.found).observed:
            judged = _judge(trainer, found, found)
            whole = report.build(trainer, found, judged.layers, judged.fitting)
            if trainer.workers.is_chief:
                _write(whole, folder)
            if found.steps < trainer.config.numerics.steps:
                console.warn(f"ended after {found.steps} steps, which {folder / 'numerics.html'} shows")
    if trainer.precision.name == "float32" and not trainer.uses_float16:
        half = _float16_twin(trainer, build, start, console)
        if half is not None:
            collector = Collector(half, half.config.numerics.reference_every)
            _train(collector, half, console, "the same in mixed_float16")
            judged = _judge(half, found, collector.found)
            whole = report.build(trainer, found, judged.layers, judged.fitting)
    before = report.outcome(judged.float16, judged.layers)
    if half is not None:
        whole["advice"] = _advice(half, judged, collector, before, build, start, console)
    if trainer.workers.is_chief:
        _write(whole, folder)
    console.table(table(whole))
    for line in _closing(whole, folder):
        console.line(line)
    return {"layers": len(judged.layers), "layers_at_risk": before["layers at risk"], "skipped_steps": len(found.skips)}


def _train(collector: Collector, trainer, console: Console, what: str) -> Collection:
    """Trains the configured steps, and returns what they showed."""
    steps = trainer.config.numerics.steps
    with console.counting(what, steps) as done:
        found = collector.train(steps, done)
    if not found.observed:
        raise InputError(
            f"{trainer.config.trainer} shows no layer: compute the model's parts in `with tf.name_scope(name):`, or hand"
            " tensors to mptrain.numerics.watch(name, tensor)"
        )
    if found.no_reference:
        console.warn(f"there is no float32 to compare with, so true values are not known: {found.no_reference}")
    return found


def _judge(trainer, found: Collection, in_float16: Collection) -> _Judged:
    """Judges the layers of `found`; `trainer` is the one that made `in_float16`, or `found` where that is the same."""
    dtype, settings = trainer.precision.compute_dtype, trainer.config.loss_scale
    judged = layers(found, dtype.name if dtype and found is in_float16 else "float32")
    fitting = scales(found, judged)
    scale = in_float16.scales[-1][1] if trainer.uses_float16 else settings.initial_scale
    setting = Setting(scale, settings.dynamic and scale > settings.min_scale, in_float16)
    judge(found, judged, fitting, setting)
    return _Judged([layer for layer in judged if layer.at_risk or not layer.between], fitting, in_float16)


def _float16_twin(trainer, build, start: dict, console: Console):
    """Returns a trainer that does in float16 what the given one does in float32; None, and a warning, where none can."""
    config = config_lib.copied(trainer.config)
    config.precision.policy = "mixed_float16"
    try:
        return _started(build(config), start)
    except InputError as error:
        console.warn(f"what float16 would do is not tried: {error}")
        return None


def _started(trainer, start: dict):
    """Returns the trainer where the run began, but for the loss scale, which is its config's."""
    for path, variable in trainer.state.items():
        if path in start and not path.endswith("/loss_scale/loss_scale"):
            variable.assign(start[path])
    if trainer.uses_float16:
        for optimizer in trainer.optimizers.values():
            optimizer.state["loss_scale/loss_scale"].assign(trainer.config.loss_scale.initial_scale)
    return trainer


def _advice(trainer, judged: _Judged, collector: Collector, before: dict, build, start: dict, console: Console) -> dict | None:
    """Returns what the report says of the advice, with what a run that follows it came to; None where there is none."""
    if not any(layer.at_risk for layer in judged.layers):
        return None
    advice, check = Advisor(trainer, judged.layers, collector.trial(_TRIED)).advise(judged.fitting), None
    if advice:
        config = config_lib.copied(trainer.config)
        advice.apply(config)
        mended = _started(build(config), start)
        collector = Collector(mended, config.numerics.reference_every)
        after = _train(collector, mended, console, "with the advice")
        left = [] if advice.policy else _judge(mended, after, after).layers  # a run in float32 has no layer at risk
        check = {"before": before, "after": report.outcome(after, left)}
    return {
        "float32_layers": list(advice.float32_layers),
        "initial_scale": advice.initial_scale,
        "dynamic": trainer.config.loss_scale.dynamic,
        "policy": advice.policy,
        "text": advice.text(trainer.config.trainer),
        "check": check,
    }


def _closing(whole: dict, folder: pathlib.Path) -> Iterator[str]:
    yield whole["summary"]
    if whole["advice"]:
        yield whole["advice"]["text"]
        for name, values in (whole["advice"]["check"] or {}).items():
            yield f"{name:>6}: " + ", ".join(f"{what} {value:.4g}" for what, value in values.items() if value is not None)
    yield f"the report is {folder / 'numerics.html'}"


def _write(whole: dict, folder: pathlib.Path) -> None:
    """Writes the files of the report, over those of an earlier one."""
    advised = folder / "float32_layers.py"
    if whole["advice"]:
        advised.write_text(whole["advice"]["text"])
    else:
        advised.unlink(missing_ok=True)  # an earlier report's, which this one does not repeat
    (folder / "numerics.json").write_text(json.dumps(whole, indent=1, allow_nan=False))
    write_page(whole, folder)
    write_picture(whole, folder / "numerics.png")
