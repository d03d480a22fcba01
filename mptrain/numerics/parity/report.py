"""The parity run as one dictionary, which page, table and `parity.json` all show."""

import dataclasses
from collections.abc import Mapping, Sequence

from mptrain.numerics.parity.run import REFERENCE, Schedule
from mptrain.numerics.parity.verdicts import Evidence, Verdict, judge


def build(config, schedule: Schedule, reference: dict, others: Mapping[str, dict | str]) -> dict:
    """Returns the report; JSON-able, with None for every number that is not finite.

    Args:
        config: the run's.
        schedule: its steps.
        reference: float32's run.
        others: precision -> its run, or the line that it failed with.
    """
    steps, compared, bound = list(schedule.updates), schedule.compared, config.parity.bound
    evidence = Evidence.of(reference["curves"]["loss"], steps, schedule.steps)
    verdicts = {
        name: Verdict("failed", f"failed: {run}")
        if isinstance(run, str)
        else judge(run, reference, evidence, steps, compared, bound)
        for name, run in others.items()
    }
    trained = {REFERENCE: reference} | {name: run for name, run in others.items() if not isinstance(run, str)}
    against = {name: run for name, run in trained.items() if name != REFERENCE}
    return {
        "version": 1,
        "trainer": config.trainer,
        "first_step": schedule.first,
        "last_step": schedule.last,
        "accumulation_steps": schedule.window,
        "bound": bound,
        "evidence": dataclasses.asdict(evidence),
        "runs": [_row(REFERENCE, reference, reference, None)]
        + [_row(name, None if isinstance(run, str) else run, reference, verdicts[name]) for name, run in others.items()],
        "steps": steps,
        "curves": {metric: {name: run["curves"][metric] for name, run in trained.items()} for metric in reference["curves"]},
        "layers": reference["layers"],
        "compared_steps": compared,
        "gradients": {name: _rows(run["gradients"], reference["layers"]) for name, run in against.items()},
        "weights": {name: _rows(run["weights"], reference["layers"]) for name, run in against.items()},
    }


def _row(name: str, run: dict | None, reference: dict, verdict: Verdict | None) -> dict:
    row = {
        "precision": name,
        "status": verdict.status if verdict else "reference",
        "verdict": verdict.words if verdict else "what the others are compared with",
        "parting": verdict and verdict.parting and dataclasses.asdict(verdict.parting),
        "drift": verdict and verdict.drift and dataclasses.asdict(verdict.drift),
    }
    if run is None:
        return row | dict.fromkeys(("final", "skipped_steps", "ms_per_step", "ratio", "peak_memory", "peak_gpu_memory"))
    return row | {
        "final": run["final"],
        "skipped_steps": run["skipped"],
        "ms_per_step": run["ms_per_step"],
        "ratio": run["ms_per_step"] / reference["ms_per_step"],
        "peak_memory": run["peak_memory"],
        "peak_gpu_memory": run["peak_gpu_memory"],
    }


def _rows(errors: Sequence[Mapping[str, float | None]], layers: Sequence[str]) -> list[list[float | None] | None]:
    """Returns relative errors as [layers][compared steps]; None for a layer of which none was seen."""
    return [[at_step[path] for at_step in errors] if path in errors[0] else None for path in layers]
