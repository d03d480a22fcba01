"""`--mode=numerics`: trains some steps of the user's config with all of them looked at, and reports on their ranges."""

import itertools
import json
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from mptrain.console import Console
from mptrain.errors import InputError
from mptrain.numerics import report
from mptrain.numerics.advice import Advice, advise
from mptrain.numerics.collection import Collection, Collector
from mptrain.numerics.page import write_page
from mptrain.numerics.picture import write_picture
from mptrain.numerics.table import table
from mptrain.numerics.verdicts import Layer, judge, layers, scales

_TRIED = 4  # batches on which advice is tried


def numerics(trainer, build, folder: pathlib.Path, console: Console) -> dict[str, float]:
    """Collects, judges, advises, tries the advice, and writes the report; trains `config.numerics.steps` steps.

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
    found, judged, fitting = _run(trainer, console, "numerics")
    whole = report.build(trainer, found, judged, fitting)
    if trainer.workers.is_chief:
        _write(whole, folder)  # what was found does not wait for what is advised
    before = report.outcome(found, judged)
    half = trainer
    if not trainer.uses_float16 and trainer.precision.name == "float32":
        half = _twin(trainer.config, build, start)
        before = report.outcome(*_run(half, console, "the same in mixed_float16")[:2])
    advice = advise(half, judged, fitting, _batches(half))
    if advice is not None:
        check = None
        if advice:
            after = report.outcome(*_run(_twin(half.config, build, start, advice), console, "with the advice")[:2])
            check = {"before": before, "after": after}
        whole["advice"] = _advice(half.config, advice, check)
    if trainer.workers.is_chief:
        _write(whole, folder)
    console.table(table(whole))
    for line in _closing(whole, folder):
        console.line(line)
    return {"layers": len(judged), "layers_at_risk": before["layers at risk"], "skipped_steps": len(found.skips)}


def _run(trainer, console: Console, what: str) -> tuple[Collection, list[Layer], object]:
    settings = trainer.config.numerics
    with console.counting(what, settings.steps) as done:
        found = Collector(trainer, settings.reference_every).train(settings.steps, done)
    dtype = trainer.precision.compute_dtype
    judged = layers(found, dtype.name if dtype else "float32")
    if not judged:
        raise InputError(
            f"{trainer.config.trainer} shows no layer: compute the model's parts in `with tf.name_scope(name):`, or hand"
            " tensors to mptrain.numerics.watch(name, tensor)"
        )
    fitting = scales(found, judged)
    scale = found.scales[-1][1] if trainer.uses_float16 else trainer.config.loss_scale.initial_scale
    judge(found, judged, fitting, scale)
    return found, judged, fitting


def _twin(config: ConfigDict, build, start: dict, advice: Advice | None = None):
    """Returns a trainer in mixed_float16, with the advised settings, that stands where the run began."""
    config = config.copy_and_resolve_references()
    config.precision.policy = "mixed_float16"
    if advice is not None:
        advice.apply(config)
    twin = build(config)
    scaled = twin.config.loss_scale.initial_scale
    for path, variable in twin.state.items():
        if path in start and not path.endswith("/loss_scale/loss_scale"):
            variable.assign(start[path])
    if twin.uses_float16:
        for optimizer in twin.optimizers.values():
            optimizer.state["loss_scale/loss_scale"].assign(scaled)
    return twin


def _batches(trainer) -> list:
    step = int(trainer.global_step.numpy())
    return list(itertools.islice(trainer.training_batches.open(step), _TRIED))


def _advice(config: ConfigDict, advice: Advice, check: dict | None) -> dict:
    return {
        "float32_layers": list(advice.float32_layers),
        "initial_scale": advice.initial_scale,
        "dynamic": config.loss_scale.dynamic,
        "text": advice.text(config.trainer),
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
    (folder / "numerics.json").write_text(json.dumps(whole, indent=1, allow_nan=False))
    write_page(whole, folder)
    write_picture(whole, folder / "numerics.png")
    if whole["advice"]:
        (folder / "float32_layers.py").write_text(whole["advice"]["text"])
