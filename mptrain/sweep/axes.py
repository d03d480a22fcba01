"""The axes of a sweep's parallel coordinates: one for each field and one for the metric, and where each trial crosses them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mptrain.pages import numbers

_DECADES = 1.5  # an axis that spans more is logarithmic
_MOST_LABELS = 6


def drawn(record: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what page and picture draw.

    Args:
        record: the sweep's.
        trials: the best first.

    Returns:
        "axes": name and labels (place, text), places from 0 (bottom) to 1; "lines": of each trial its number, its places, None
        where it has no value, its texts, its status, and its rank from 0 (best) to 1.
    """
    space = record["search"]["space"]
    columns = [
        (name, [t["parameters"][path] for t in trials]) for path, name in zip(space, short_names(list(space)), strict=True)
    ]
    columns.append((record["metric"], [trial["value"] for trial in trials]))
    made = [_axis(name, values) for name, values in columns]
    ranks = max(1, sum(trial["value"] is not None for trial in trials) - 1)
    lines = [
        {
            "number": trial["number"],
            "places": [axis["places"][row] for axis in made],
            "texts": [_text(values[row]) for _, values in columns],
            "status": trial["status"],
            "rank": row / ranks if trial["value"] is not None else None,
        }
        for row, trial in enumerate(trials)
    ]
    return {"axes": [{"name": axis["name"], "labels": axis["labels"]} for axis in made], "lines": lines}


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the last parts of field paths; whole ones where two end alike."""
    leaves = [path.rsplit(".", 1)[-1] for path in paths]
    return [leaf if leaves.count(leaf) == 1 else path for leaf, path in zip(leaves, paths, strict=True)]


def _axis(name: str, values: Sequence) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in known):
        return _named(name, values)
    if not known:
        return {"name": name, "places": [None] * len(values), "labels": []}
    low, high = min(known), max(known)
    log = low > 0 and math.log10(high / low) > _DECADES
    scale = math.log if log else float

    def place(value: float) -> float:
        return 0.5 if low == high else (scale(value) - scale(low)) / (scale(high) - scale(low))

    ticks = sorted(set(known)) if len(set(known)) <= _MOST_LABELS else _ticks(low, high, log)
    labels = [(place(tick), numbers.magnitude(tick)) for tick in ticks]
    return {"name": name, "places": [None if v is None else place(v) for v in values], "labels": _apart(labels)}


def _named(name: str, values: Sequence) -> dict[str, Any]:
    """An axis of names, in the order in which they come."""
    names = list(dict.fromkeys(map(str, values)))
    places = {text: 0.5 if len(names) == 1 else i / (len(names) - 1) for i, text in enumerate(names)}
    return {
        "name": name,
        "places": [places[str(value)] for value in values],
        "labels": _apart([(p, t) for t, p in places.items()]),
    }


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [low, *(10.0**k for k in decades if low * 1.3 < 10.0**k < high / 1.3), high]
    return [low, low + (high - low) / 3, low + 2 * (high - low) / 3, high]


def _apart(labels: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leaves out labels that would cover the one below them."""
    kept = []
    for place, text in sorted(labels):
        if not kept or place - kept[-1][0] > 0.045:
            kept.append((place, text))
    return kept


def _text(value: object) -> str:
    if value is None:
        return numbers.NOTHING
    return numbers.magnitude(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
