"""The parity report as one page: prepares what page.html writes out and what its scripts draw."""

import pathlib
from collections.abc import Mapping
from typing import Any

from mptrain import pages
from mptrain.numerics import shown
from mptrain.numerics.parity.run import REFERENCE
from mptrain.numerics.parity.table import cells, heads
from mptrain.numerics.parity.verdicts import running_mean

_COLOURS = {REFERENCE: "reference", "mixed_float16": "series-1", "mixed_bfloat16": "series-2", "native": "series-3"}
_LOG = 10  # a loss that spans so much is drawn on a logarithmic axis
_MOST_RAW = 2000  # values of a curve that are drawn one by one behind its running mean


def write_page(report: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes `parity.html` into a folder that is there."""
    module, _, trainer = report["trainer"].rpartition(".")
    pages.write(
        folder / "parity.html",
        "numerics/parity/page.html",
        report=report,
        trainer=trainer,
        module=module,
        heads=heads(report),
        rows=[(row, cells(report, row)) for row in report["runs"]],
        compared=[row for row in report["runs"] if row["precision"] in report["gradients"]],
        data=_drawn(report),
    )


def _drawn(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the scripts need."""
    return {
        "steps": report["steps"],
        "curves": [_curve(name, report["curves"][name]) for name in report["curves"]],
        "bound": report["bound"],
        "compared": report["compared_steps"],
        "layers": shown.short_paths(report["layers"]),
        "maps": [
            {
                "precision": row["precision"],
                "gradients": report["gradients"][row["precision"]],
                "weights": report["weights"][row["precision"]],
                "parting": _place(report, row["parting"]),
                "drift": _place(report, row["drift"]),
            }
            for row in report["runs"]
            if row["precision"] in report["gradients"]
        ],
    }


def _curve(metric: str, by_precision: Mapping[str, list]) -> dict[str, Any]:
    means = {name: _where_known(running_mean(values), values) for name, values in by_precision.items()}
    known = [value for values in by_precision.values() for value in values if value is not None]
    log = metric == "loss" and bool(known) and min(known) > 0 and max(known) > _LOG * min(known)
    series = [
        {
            "name": name,
            "kind": _COLOURS[name],
            "values": means[name],
            "raw": values if 10 < len(values) <= _MOST_RAW else None,
        }
        for name, values in by_precision.items()
    ]
    return {"name": metric, "log": log, "series": series}


def _where_known(means: list, values: list) -> list:
    """The running means without those that go on behind a run's last values."""
    return [None if value is None else mean for mean, value in zip(means, values, strict=True)]


def _place(report: Mapping[str, Any], parting: Mapping[str, Any] | None) -> list[int] | None:
    """The row and column of the cell in which a run parts; None where that is in no cell, as of a loss."""
    if parting is None or parting["layer"] not in report["layers"] or parting["step"] not in report["compared_steps"]:
        return None
    return [report["layers"].index(parting["layer"]), report["compared_steps"].index(parting["step"])]
