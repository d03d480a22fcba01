"""The short table in the terminal: the riskiest layers and what is said of them."""

from collections.abc import Mapping
from typing import Any

import rich.box
import rich.table
import rich.text

from mptrain.numerics import shown
from mptrain.pages import numbers

_MOST = 12


def table(report: Mapping[str, Any]) -> rich.table.Table:
    """Up to twelve layers of a report, the riskiest first, each with its verdict."""
    layers = shown.by_risk(report["layers"])
    title = f"Numerics: {sum(layer['at_risk'] for layer in layers)} of {len(layers)} layers at risk"
    rest = f"and {len(layers) - _MOST} more with less risk" if len(layers) > _MOST else None
    made = rich.table.Table(title=title, caption=rest, box=rich.box.SIMPLE_HEAD)
    made.add_column("layer", overflow="fold")  # no least width: rich would cut off what is too wide then
    made.add_column("compute", no_wrap=True)
    made.add_column("risk", justify="right", no_wrap=True)
    made.add_column("headroom", justify="right", no_wrap=True)
    made.add_column("underflow", justify="right", no_wrap=True)
    made.add_column("verdict", overflow="fold")
    paths = shown.short_paths([layer["path"] for layer in layers])
    for layer, path in zip(layers[:_MOST], paths, strict=False):
        worst = shown.worst(layer)
        cells = (
            path,
            layer["compute_dtype"],
            f"{layer['risk']:.2f}",
            numbers.power_steps(worst["headroom"].value),
            _with_sign(numbers.percent(worst["underflow"].value)),
            layer["verdict"],
        )
        # As Text, because layer paths and verdicts may hold what rich would take for markup.
        made.add_row(*map(rich.text.Text, cells), style="bold" if layer["at_risk"] else None)
    return made


def _with_sign(percent: str) -> str:
    return percent if percent == numbers.NOTHING else f"{percent}%"
