"""The parallel coordinates as a picture for a paper."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

_WIDTH = 7.16  # inches: both columns of a two-column page
_INK, _GREY, _BAD = "#1c2127", "#626b76", "#b3322a"
_RANKS = LinearSegmentedColormap.from_list("ranks", ["#0c3566", "#336da9", "#a5c5e3", "#deE9f5"])  # best to worst
_BEND = np.linspace(0, 1, 30)


def write_picture(drawn: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes what `axes.drawn` returned as a PNG, 300 dots an inch; the best trial is the darkest line and lies on top."""
    figure = Figure(figsize=(_WIDTH, 3.2), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for line in reversed(drawn["lines"]):
        _line(axis, line)
    for at, each in enumerate(drawn["axes"]):
        axis.plot([at, at], [0, 1], color=_GREY, linewidth=0.8, zorder=5)
        axis.text(at, 1.07, each["name"], ha="center", va="bottom", fontsize=7, color=_INK, weight="bold")
        for place, text in each["labels"]:
            box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            axis.text(at + 0.02, place, text, ha="left", va="center", fontsize=6, color=_GREY, zorder=6, bbox=box)
    axis.set_xlim(-0.15, len(drawn["axes"]) - 1 + 0.35)
    axis.set_ylim(-0.05, 1.16)
    axis.axis("off")
    figure.savefig(path, format="png")


def _line(axis: Axes, line: Mapping[str, Any]) -> None:
    places = [place for place in line["places"] if place is not None]
    failed = line["rank"] is None
    colour, width = (_BAD, 0.8) if failed else (_RANKS(line["rank"]), 1.8 if line["rank"] == 0 else 1.0)
    smooth = _BEND * _BEND * (3 - 2 * _BEND)
    for at, (left, right) in enumerate(zip(places, places[1:], strict=False)):
        axis.plot(at + _BEND, left + (right - left) * smooth, color=colour, linewidth=width, linestyle=":" if failed else "-")
