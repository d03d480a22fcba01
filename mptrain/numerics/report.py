"""The range report as one dictionary, which page, picture, table and `numerics.json` all show."""

import math
from collections.abc import Sequence

from mptrain.numerics.collection import Collection
from mptrain.numerics.faults import NO_CURE, where
from mptrain.numerics.places import OUTPUT, Site
from mptrain.numerics.ranges import Range
from mptrain.numerics.tally import FORMATS
from mptrain.numerics.verdicts import Layer, Scales

_NAMED = 8  # steps that the summary names


def build(trainer, found: Collection, judged: Sequence[Layer], fitting: Scales | None) -> dict:
    """Returns the report of a collection, without advice; JSON-able, with every number finite or None.

    Args:
        trainer: the run's.
        found: what was collected.
        judged: its layers, in forward order.
        fitting: the loss scales that fit them.
    """
    at_risk = [layer for layer in judged if layer.at_risk]
    return {
        "version": 1,
        "trainer": trainer.config.trainer,
        "precision": trainer.precision.name,
        "first_step": found.first_step,
        "last_step": found.first_step + found.steps,
        "collected_steps": found.steps,
        "reference_steps": found.reference_steps,
        "no_reference": found.no_reference,
        "not_finite_in_float32": [{"step": step, "first": where(fault.site)} for step, fault in found.broken()],
        "summary": _summary(found, judged, at_risk),
        "formats": {name: _format(each) for name, each in FORMATS.items()},
        "loss_scale": {
            "dynamic": trainer.config.loss_scale.dynamic and trainer.uses_float16,
            "now": found.scales[-1][1] if found.scales else float(trainer.optimizer.loss_scale),
            "recommended": [2.0**fitting.lowest, 2.0**fitting.highest] if fitting and not fitting.unfit else None,
            "history": [list(pair) for pair in found.scales],
            "skipped_steps": [(skip.update + 1) * found.window - 1 for skip in found.skips],
        },
        "layers": [_layer(found, layer) for layer in judged],
        "advice": None,
    }


def outcome(found: Collection, judged: Sequence[Layer]) -> dict[str, float | None]:
    """Returns what a run came to, to compare it with another one."""
    last = [loss for loss in found.losses[-max(len(found.losses) // 10, 1) :] if math.isfinite(loss)]
    return {
        "skipped steps": len(found.skips),
        "layers at risk": sum(layer.at_risk for layer in judged),
        "loss of the last steps": sum(last) / len(last) if last else None,
    }


def _summary(found: Collection, judged: Sequence[Layer], at_risk: Sequence[Layer]) -> str:
    return " ".join(filter(None, [_first_words(found, judged, at_risk), _broken(found)]))


def _first_words(found: Collection, judged: Sequence[Layer], at_risk: Sequence[Layer]) -> str:
    if at_risk:
        first = max(at_risk, key=lambda layer: layer.risk)
        more = f"; {len(at_risk) - 1} more of {len(judged)} layers are at risk" if len(at_risk) > 1 else ""
        return f"{first.path}: {first.verdict}{more}."
    skipped = len(found.skips) - len(found.broken())
    if skipped > 0:
        return f"All {len(judged)} layers fit. {skipped} steps were skipped while the loss scale found its place."
    return f"All {len(judged)} layers fit."


def _broken(found: Collection) -> str:
    """Says which steps no precision computes."""
    broken = found.broken()
    if not broken:
        return ""
    steps = ", ".join(str(step) for step, _ in broken[:_NAMED]) + (", …" if len(broken) > _NAMED else "")
    first = broken[0][1].site
    loss = "" if first.kind == OUTPUT else ", as the loss, though all outputs are"
    return (
        f"Step{'s'[: len(broken) != 1]} {steps}: not finite in float32 either, beginning with {where(first)}{loss}: {NO_CURE}."
        " Their values are left out here."
    )


def _layer(found: Collection, layer: Layer) -> dict:
    def of(sites: Sequence[Site], scaled: bool) -> dict | None:
        if not sites:
            return None
        observed = Range.sum(found.observed[site] for site in sites).as_json(scaled)
        reference = [found.reference[site] for site in sites if site in found.reference]
        return {"observed": observed, "reference": Range.sum(reference).as_json(scaled) if reference else None}

    return {
        "path": layer.path,
        "compute_dtype": layer.dtype,
        "calls": len(layer.outputs),
        "risk": layer.risk,
        "at_risk": layer.at_risk,
        "verdict": layer.verdict,
        "output": of(layer.outputs, scaled=False),
        "gradient": of(layer.gradients, scaled=True),
        "weights": [{"path": site.path, **of([site], scaled=True)} for site in layer.weights],
    }


def _format(each) -> dict:
    normal = round(math.log2(each.smallest_normal))
    return {"largest": each.largest, "normal": normal, "subnormal": round(math.log2(each.vanishing)) + 1}
