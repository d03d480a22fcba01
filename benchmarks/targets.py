"""What the measured ratios must not exceed, all in one place; ratios of median step times on two CPU cores."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from benchmarks import frame, works

Results = Mapping[
    tuple[str, str, str], list[frame.Turn]
]  # (work, precision, contestant) -> turns; those that failed are left out


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on one ratio.

    Attributes:
        what: is compared with what, in words.
        work: where.
        precision: in which precision `ours` runs.
        ours: the contestant whose time is the numerator.
        theirs: the contestant whose time is the denominator.
        bound: the ratio at most; 1.0 means faster.
        their_precision: of the denominator; default: the same.
    """

    what: str
    work: str
    precision: str
    ours: str
    theirs: str
    bound: float
    their_precision: str = ""

    def measured(self, results: Results) -> float | None:
        """Returns the median ratio; None where one of the two was not measured."""
        ours = results.get((self.work, self.precision, self.ours))
        theirs = results.get((self.work, self.their_precision or self.precision, self.theirs))
        if ours is None or theirs is None:
            return None
        if self.their_precision:  # not neighbours in time: medians of the two
            return float(np.median(frame.times(ours)[:, 0]) / np.median(frame.times(theirs)[:, 0]))
        return float(frame.ratio(ours, theirs)[0][1])


def _by_hand(work: str, precision: str) -> Target:
    return Target("mptrain against the loop by hand", work, precision, "mptrain", "hand", 1.03)


_FIT = "mptrain against Keras 3 fit"
_SCALING = "LossScaleOptimizer"
TARGETS = (
    *(_by_hand(work, precision) for work in works.WORKS for precision in works.PRECISIONS),
    Target(_FIT, "mlp", "float32", "mptrain", "keras", 0.35),
    Target(_FIT, "cnn", "float32", "mptrain", "keras", 0.75),
    Target(_FIT, "cnn", "mixed_bfloat16", "mptrain", "keras", 0.5),
    Target(_FIT, "cnn", "mixed_float16", "mptrain", "keras", 0.02),
    Target("mptrain against Lightning", "cnn", "float32", "mptrain", "lightning", 0.45),
    Target(f"{_SCALING} on against off", "cnn", "float32", "scaled", "unscaled", 1.03),
    Target(f"{_SCALING} against Keras 3's", "cnn", "float32", "scaled", "scaled_keras", 1.0),
    Target(f"{_SCALING} against tf_keras's", "cnn", "float32", "scaled", "scaled_tf_keras", 1.0),
    *(
        Target("mptrain in mixed_float16 against float32", work, "mixed_float16", "mptrain", "mptrain", 1.8, "float32")
        for work in ("cnn", "resnet", "transformer")
    ),
    Target("mptrain in mixed_bfloat16 against float32", "cnn", "mixed_bfloat16", "mptrain", "mptrain", 0.65, "float32"),
)


def rows(results: Results) -> list[tuple[Target, float | None, str]]:
    """Returns each target with what was measured and the verdict: "met", "missed" or "not measured"."""
    found: list[tuple[Target, float | None, str]] = []
    for target in TARGETS:
        value = target.measured(results)
        verdict = "not measured" if value is None else "met" if value <= target.bound else "missed"
        found.append((target, value, verdict))
    return found


def missed(results: Results) -> list[Target]:
    return [target for target, _, verdict in rows(results) if verdict == "missed"]
