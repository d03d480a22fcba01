"""The range of one place in the step over many steps: what a report says of it, in shares and powers of two."""

import math
from collections.abc import Iterable

import numpy as np

from mptrain.numerics.tally import EXPONENTS, FORMATS, LOWEST

_ROOM = 64  # true values may lie below what float32 holds: the scale has lifted them
_FIRST = LOWEST - _ROOM
_HALF, _BRAIN = FORMATS["float16"], FORMATS["bfloat16"]


class Range:
    """Counts of magnitudes, added up over steps.

    Of gradients twice: as they were in the step, multiplied by the loss scale, and divided by it, which are the true values.
    Shares are exact for any scale; the spread over exponents is where the scale is a power of two, as it is by default, and
    within half a power of two elsewhere.
    """

    def __init__(self):
        self.values = self.nonfinite = self.zeros = 0
        self._beyond = np.zeros([2, 2], np.int64)  # [vanishing, overflowing] in float16, [scaled, true]
        self._spreads = np.zeros([2, EXPONENTS + _ROOM], np.int64)
        self._largest = [0.0, 0.0]

    def add(self, counts: np.ndarray, largest: float, scale: float) -> None:
        """Adds a row of `tally.count`, the largest magnitude in it, and what the true values had been multiplied by."""
        values, nonfinite, zeros = (int(number) for number in counts[:3])
        largest, scale = float(largest), float(scale)
        shift = round(math.log2(scale))
        self.values += values
        self.nonfinite += nonfinite
        self.zeros += zeros
        self._beyond += counts[3:7].reshape(2, 2)
        spread = np.concatenate([np.zeros(_ROOM, np.int64), counts[7:]])
        self._spreads[0] += spread
        self._spreads[1] += np.roll(spread, -shift)
        self._largest = [max(self._largest[0], largest), max(self._largest[1], largest / scale)]

    @classmethod
    def sum(cls, ranges: Iterable["Range"]) -> "Range":
        """Returns the range of all values together."""
        whole = cls()
        for each in ranges:
            whole.values += each.values
            whole.nonfinite += each.nonfinite
            whole.zeros += each.zeros
            whole._beyond += each._beyond
            whole._spreads += each._spreads
            whole._largest = list(map(max, whole._largest, each._largest))
        return whole

    def largest(self, scaled: bool = False) -> float:
        """Returns the largest finite magnitude."""
        return self._largest[0 if scaled else 1]

    def vanishing(self, scaled: bool = False) -> float:
        """Returns the share, of what is neither zero nor non-finite, that rounds to zero in float16."""
        there = self.values - self.nonfinite - self.zeros
        return float(self._beyond[0, 0 if scaled else 1]) / there if there else 0.0

    def overflowing(self, scaled: bool = False) -> float:
        """Returns the share of all values that are finite and round to infinity in float16."""
        return self._share(self._beyond[1, 0 if scaled else 1])

    def zeroed(self, true: "Range") -> float:
        """Returns the share of what is not zero in `true` that is zero here; of the same place in the step."""
        own, meant = self._share(self.zeros), true._share(true.zeros)
        return max(own - meant, 0.0) / (1 - meant) if meant < 1 else 0.0

    def lost_at(self, exponent: int) -> float:
        """Returns the share of the sum of magnitudes that float16 loses if the true values are multiplied by 2**exponent."""
        magnitudes = self._spreads[1] * np.exp2(np.arange(len(self._spreads[1])) + _FIRST + 0.5)
        below = np.arange(len(magnitudes)) + _FIRST + exponent < -25
        return float(magnitudes[below].sum() / magnitudes.sum()) if magnitudes.sum() else 0.0

    def as_json(self, scaled: bool) -> dict:
        """Returns what the report says of it; `scaled`: also of the values as they were, multiplied by the loss scale."""
        own = {"count": self.values, "nonfinite": self._share(self.nonfinite), "zero": self._share(self.zeros)}
        return own | self._side(1) | {"scaled": self._side(0) if scaled else None}

    def _side(self, index: int) -> dict:
        spread, largest = self._spreads[index], self._largest[index]
        exponents = np.arange(len(spread)) + _FIRST
        used = np.flatnonzero(spread)
        first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (_ROOM, _ROOM)
        vanish, overflow = self._beyond[:, index]
        half = {"underflow": vanish, "subnormal": spread[exponents < -14].sum() - vanish, "overflow": overflow}
        lost = spread[exponents < -134].sum()
        brain = {"underflow": lost, "subnormal": spread[exponents < -126].sum() - lost, "overflow": 0}
        return {
            "largest": largest,
            "histogram": {"first": first + _FIRST, "counts": spread[first:end].tolist()},
            "float16": {name: self._share(count) for name, count in half.items()} | {"headroom": _headroom(_HALF, largest)},
            "bfloat16": {name: self._share(count) for name, count in brain.items()} | {"headroom": _headroom(_BRAIN, largest)},
        }

    def _share(self, count: int) -> float:
        return float(count) / self.values if self.values else 0.0


def _headroom(format, largest: float) -> float | None:
    return math.log2(format.largest) - math.log2(largest) if largest else None
