"""The heat map as a picture for a paper: outputs, activation gradients and weight gradients side by side."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from mptrain.numerics import shown
from mptrain.pages import numbers

_WIDTH = 7.16  # inches: both columns of a two-column page
_TALLEST = 9.0  # inches, whatever the number of layers
_MOST_NAMES = 60  # more layers than these are not all named: the names would be smaller than 5 points
_SHARES = LogNorm(1e-4, 0.5)
_INK = "#1c2127"
_GREY = "#626b76"
_RISK = "#b3322a"


def _ramp(name: str, *colours: str) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(name, colours)


# The page's hues; each grows evenly darker, so that a copy in grey tells the same.
_NORMAL = _ramp("normal", "#deE9f5", "#7da9d4", "#336da9", "#0c3566")
_SUBNORMAL = _ramp("subnormal", "#f6ead0", "#d6ab49", "#9b7015", "#593d05")
_DANGER = _ramp("danger", "#fbe0da", "#e27c6a", "#b0352b", "#681010")


def write_picture(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the heat map as a PNG, 300 dots an inch; gradients stand where the run's loss scale puts them."""
    layers = report["layers"]
    figure = Figure(figsize=(_WIDTH, min(_TALLEST, 1.15 + 0.17 * len(layers))), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    kinds = [kind for kind in shown.KINDS if any(True for layer in layers for _ in shown.rows(layer, kind))]
    axes = figure.subplots(1, max(1, len(kinds)), sharex=True, sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=False):
        _panel(axis, report, kind)
    names = shown.short_paths([layer["path"] for layer in layers])
    step = math.ceil(len(layers) / _MOST_NAMES)
    axes[0].set_yticks(np.arange(0, len(layers), step) + 0.5, names[::step])
    axes[0].tick_params(axis="y", length=0, labelsize=7 if len(layers) <= 30 else 5)
    for label, layer in zip(axes[0].get_yticklabels(), layers[::step], strict=True):
        label.set_color(_RISK if layer["at_risk"] else _INK)
    bar = figure.colorbar(ScalarMappable(_SHARES, _NORMAL), ax=axes, fraction=0.02, pad=0.01, aspect=30)
    bar.set_label("share of a row’s values", fontsize=7, color=_INK)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    bar.ax.tick_params(which="both", labelsize=6, length=2, color=_GREY, labelcolor=_INK)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    figure.savefig(path, format="png")


def _panel(axis: Axes, report: Mapping[str, Any], kind: str) -> None:
    scale = report["loss_scale"]["now"]
    shift = 0 if kind == "output" else shown.exponent(scale)
    first, last = shown.columns(report)
    for name, low, high, colours in _zones(report, first, last):
        axis.axvspan(low, high, color=colours(0.0), alpha=0.28, linewidth=0)
        middle = ((low + high) / 2, 1.0)
        above = {"xytext": (0, 1), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axis.annotate(name, middle, xycoords=("data", "axes fraction"), fontsize=5.5, color=_GREY, **above)
        for at_layer, layer in enumerate(report["layers"]):
            _cells(axis, list(shown.rows(layer, kind)), at_layer, range(low, high), shift, colours)
    edges = [low for _, low, _, _ in _zones(report, first, last)][1:]
    for edge in edges:
        axis.axvline(edge, color=_GREY, linewidth=0.5, linestyle=(0, (2, 2)))
    axis.set_title(shown.KINDS[kind], fontsize=8, color=_INK, loc="left", pad=10)
    lifted = "" if kind == "output" else f" × loss scale {numbers.power(scale)}"
    axis.set_xlabel(f"magnitude{lifted}", fontsize=7, color=_INK)
    axis.set_xlim(first, last + 1)
    axis.set_ylim(len(report["layers"]), 0)
    axis.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([edges[0], edges[1], 0, edges[2]]))
    axis.xaxis.set_major_formatter(lambda exponent, _: numbers.power(2.0**exponent))
    axis.tick_params(axis="x", labelsize=6.5, length=2, color=_GREY, labelcolor=_INK)
    axis.tick_params(axis="y", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _zones(report: Mapping[str, Any], first: int, last: int) -> list[tuple[str, int, int, LinearSegmentedColormap]]:
    float16 = report["formats"]["float16"]
    lost, normal = float16["subnormal"] - 1, float16["normal"]
    return [
        ("", first, lost, _DANGER),
        ("subnormal", lost, normal, _SUBNORMAL),
        ("float16’s normal range", normal, 16, _NORMAL),
        ("", 16, last + 1, _DANGER),
    ]


def _cells(axis: Axes, rows: Sequence[shown.Row], top: int, columns: range, shift: int, colours) -> None:
    """Draws the rows of one layer into one line of the panel, and of them the columns of one zone."""
    for i, row in enumerate(rows):
        histogram = row.true["histogram"]
        shares = np.zeros(len(columns))
        for j, count in enumerate(histogram["counts"]):
            column = histogram["first"] + j + shift - columns.start
            if 0 <= column < len(columns):
                shares[column] = count / row.true["count"]
        edges = top + 0.08 + 0.84 * np.array([i, i + 1]) / len(rows)
        shown_shares = np.ma.masked_equal(shares, 0)[np.newaxis]
        axis.pcolormesh(np.arange(columns.start, columns.stop + 1), edges, shown_shares, cmap=colours, norm=_SHARES)
