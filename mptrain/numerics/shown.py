"""What page, picture and terminal table show of a report, decided once for all three.

True values are shown where the report has them: the reference, which computed the same step in float32, and else what the run
itself computed. Only the shares of zeros and non-finite values are always the run's own, because they are its losses.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KINDS = {"output": "Outputs", "gradient": "Activation gradients", "weights": "Weight gradients"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One histogram: a layer's output, the gradient of its output, or the gradient of one of its variables."""

    kind: str
    name: str  # the variable's name within its layer; empty for the others
    true: Mapping[str, Any]
    observed: Mapping[str, Any]
    compared: bool  # whether `true` was computed in float32

    @property
    def label(self) -> str:
        return {"output": "output", "gradient": "gradient"}.get(self.kind) or f"{self.name} gradient"

    @property
    def in_run(self) -> Mapping[str, Any]:
        """Statistics of what the format had to hold: gradients times the run's loss scale."""
        return self.true.get("scaled") or self.true


@dataclasses.dataclass(frozen=True)
class Worst:
    """A layer's worst value of a column, and the row that it comes from."""

    value: float | None
    label: str = ""


def rows(layer: Mapping[str, Any], kind: str | None = None) -> Iterator[Row]:
    """A layer's histograms, of all kinds or of one; what the report lacks is left out."""
    for one in [kind] if kind else KINDS:
        tensors = layer[one] if one == "weights" else [layer[one]]
        for tensor in tensors or []:
            if tensor is not None:
                name = tensor.get("path", "").removeprefix(layer["path"] + "/")
                true = tensor["reference"] or tensor["observed"]
                yield Row(one, name, true, tensor["observed"], bool(tensor["reference"]))


def worst(layer: Mapping[str, Any]) -> dict[str, Worst]:
    """A layer's worst numbers over all that belongs to it, at the run's loss scale.

    `largest` is the magnitude with the least headroom, so that both speak of the same tensor. A layer that computes in float32
    is measured by float16, to tell what float16 would do there.
    """
    kind = "bfloat16" if layer["compute_dtype"] == "bfloat16" else "float16"
    all_rows = list(rows(layer))
    tightest = min(all_rows, key=lambda row: _headroom(row, kind), default=None)
    found = {
        "largest": Worst(tightest.in_run["largest"], tightest.label) if tightest else Worst(None),
        "headroom": Worst(tightest.in_run[kind]["headroom"], tightest.label) if tightest else Worst(None),
        "nonfinite": _most(all_rows, lambda row: row.observed["nonfinite"]),
    }
    for column in ("underflow", "overflow"):
        found[column] = _most(all_rows, lambda row, column=column: row.in_run[kind][column])
    return found


def by_risk(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers, the riskiest first; equal ones in forward order."""
    return sorted(layers, key=lambda layer: -layer["risk"])


def short_paths(paths: Sequence[str]) -> list[str]:
    """Paths without the leading components that all of them share; each keeps its last."""
    parts = [path.split("/") for path in paths]
    shared = 0
    while parts and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def exponent(scale: float) -> int:
    """The power of two nearest to a loss scale, within the slider's 2^0 to 2^24."""
    return min(24, max(0, round(math.log2(scale)))) if scale > 0 else 0


def columns(report: Mapping[str, Any]) -> tuple[int, int]:
    """First and last exponent to show: float16's range, some of what lies beside it, and what the run's values fill.

    Tails of under one value in ten thousand do not widen it, nor does what lies so far out that the middle would be crushed.
    """
    low, high = [], []
    for layer in report["layers"]:
        for row in rows(layer):
            shift = 0 if row.kind == "output" else exponent(report["loss_scale"]["now"])
            histogram = row.true["histogram"]
            filled = [i for i, count in enumerate(histogram["counts"]) if count > 1e-4 * row.true["count"]]
            if filled:
                low.append(histogram["first"] + filled[0] + shift)
                high.append(histogram["first"] + filled[-1] + shift)
    float16 = report["formats"]["float16"]
    first, last = float16["subnormal"], math.floor(math.log2(float16["largest"]))
    return max(first - 14, min([first - 6, *low])), min(last + 9, max([last + 4, *high]))


def _most(all_rows: Sequence[Row], value) -> Worst:
    known = [(value(row), row.label) for row in all_rows if value(row) is not None]
    return Worst(*max(known, key=lambda pair: pair[0])) if known else Worst(None)


def _headroom(row: Row, kind: str) -> float:
    headroom = row.in_run[kind]["headroom"]
    return math.inf if headroom is None else headroom
