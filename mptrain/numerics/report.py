"""The range report as one dictionary, which page, picture, table and `numerics.json` all show."""

import math
from collections.abc import Sequence

from mptrain.numerics.collection import Collection
from mptrain.numerics.recorder import Site
from mptrain.numerics.tally import FORMATS
from mptrain.numerics.verdicts import Layer, Scales


def build(trainer, found: Collection, judged: Sequence[Layer], fitting: Scales | None) -> dict:
    """Returns the report of a collection, without advice; JSON-able, with every number finite or None.

    Args:
        trainer: the run's.
        found: what was collected.
        judged: its layers, in forward order.
        fitting: the loss scales that fit them.
    """
    at_risk = [layer for layer in judged if layer.at_risk]
    window = trainer.optimizer.accumulation_steps
    return {
        "version": 1,
        "trainer": trainer.config.trainer,
        "precision": trainer.precision.name,
        "first_step": found.first_step,
        "last_step": found.first_step + found.steps,
        "collected_steps": found.steps,
        "reference_steps": found.reference_steps,
        "summary": _summary(found, judged, at_risk),
        "formats": {name: _format(each) for name, each in FORMATS.items()},
        "loss_scale": {
            "dynamic": trainer.config.loss_scale.dynamic and trainer.uses_float16,
            "now": found.scales[-1][1] if found.scales else float(trainer.optimizer.loss_scale),
            "recommended": [2.0**fitting.lowest, 2.0**fitting.highest] if fitting and not fitting.unfit else None,
            "history": [list(pair) for pair in found.scales],
            "skipped_steps": [(skip.update + 1) * window - 1 for skip in found.skips],
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
    if not at_risk:
        skipped = f" {len(found.skips)} steps were skipped while the loss scale found its place." if found.skips else ""
        return f"All {len(judged)} layers fit.{skipped}"
    first = max(at_risk, key=lambda layer: layer.risk)
    more = f"; {len(at_risk) - 1} more of {len(judged)} layers are at risk" if len(at_risk) > 1 else ""
    return f"{first.path}: {first.verdict}{more}."


def _layer(found: Collection, layer: Layer) -> dict:
    def of(site: Site | None, scaled: bool) -> dict | None:
        if site is None:
            return None
        reference = found.reference.get(site)
        observed = found.observed[site].as_json(scaled)
        return {"observed": observed, "reference": reference.as_json(scaled) if reference else None}

    return {
        "path": layer.path,
        "compute_dtype": layer.dtype,
        "risk": layer.risk,
        "at_risk": layer.at_risk,
        "verdict": layer.verdict,
        "output": of(layer.output, scaled=False),
        "gradient": of(layer.gradient, scaled=True),
        "weights": [{"path": site.path, **of(site, scaled=True)} for site in layer.weights],
    }


def _format(each) -> dict:
    normal = round(math.log2(each.smallest_normal))
    return {"largest": each.largest, "normal": normal, "subnormal": round(math.log2(each.vanishing)) + 1}
