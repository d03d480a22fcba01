"""The report as one page: prepares what page.html writes out and what its scripts draw."""

import pathlib
from collections.abc import Mapping
from typing import Any

from mptrain import pages
from mptrain.numerics import shown
from mptrain.pages import numbers


def write_page(report: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes `numerics.html` into a folder that is there."""
    layers = shown.by_risk(report["layers"])
    names = shown.short_paths([layer["path"] for layer in layers])
    module, _, trainer = report["trainer"].rpartition(".")
    pages.write(
        folder / "numerics.html",
        "numerics/page.html",
        report=report,
        trainer=trainer,
        module=module,
        at_risk=sum(layer["at_risk"] for layer in layers),
        layers=[(layer, shown.worst(layer), name) for layer, name in zip(layers, names, strict=True)],
        shared=layers[0]["path"].removesuffix(names[0]) if layers else "",
        gradients=any(row.kind != "output" for layer in layers for row in shown.rows(layer)),
        compared=any(row.compared for layer in layers for row in shown.rows(layer)),
        checks=_checks(report["advice"]),
        history_words=_history_words(report["loss_scale"]),
        data=_drawn(report),
    )


def _checks(advice: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """What the check of the advice counted: name, before, after."""
    check = advice and advice["check"]
    if not check:
        return []
    return [(name, check["before"].get(name), check["after"].get(name)) for name in {**check["before"], **check["after"]}]


def _history_words(scale: Mapping[str, Any]) -> str:
    first, *changes = [numbers.power(value) for _, value in scale["history"]]
    if not scale["dynamic"]:
        words = f"Static: it is {first} throughout."
    elif not changes:
        words = f"It stayed at {first}."
    else:
        often = {1: "once", 2: "twice"}.get(len(changes), f"{len(changes):,} times")
        words = f"It began at {first}, changed {often} and ended at {changes[-1]}."
    skipped = scale["skipped_steps"]
    if not skipped:
        return f"{words} No step was skipped."
    named = ", ".join(f"{step:,}" for step in skipped[:8]) + (", …" if len(skipped) > 8 else "")
    return f"{words} Skipped: step{'s'[: len(skipped) != 1]} {named}."


def _drawn(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the scripts need: of every tensor one histogram, because a report of many layers holds megabytes."""
    scale = report["loss_scale"]
    names = shown.short_paths([layer["path"] for layer in report["layers"]])
    return {
        "columns": shown.columns(report),
        "normal": report["formats"]["float16"]["normal"],
        "subnormal": report["formats"]["float16"]["subnormal"],
        "exponent": shown.exponent(scale["now"]),
        "recommended": scale["recommended"] and [shown.exponent(end) for end in scale["recommended"]],
        "history": {
            "steps": [report["first_step"], report["last_step"]],
            "scales": scale["history"],
            "recommended": scale["recommended"] and [shown.exponent(end) for end in scale["recommended"]],
            "skipped": [[step, step, 1] for step in scale["skipped_steps"]],
        },
        "kinds": shown.KINDS,
        "layers": [
            {
                "name": name,
                "dtype": layer["compute_dtype"],
                "atRisk": layer["at_risk"],
                "rows": {kind: [_histogram(row) for row in shown.rows(layer, kind)] for kind in shown.KINDS},
            }
            for layer, name in zip(report["layers"], names, strict=True)
        ],
    }


def _histogram(row: shown.Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "count": row.true["count"],
        "first": row.true["histogram"]["first"],
        "counts": row.true["histogram"]["counts"],
        "zero": row.observed["zero"],
        "nonfinite": row.observed["nonfinite"],
    }
