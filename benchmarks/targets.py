"""What the measured ratios must not exceed, all in one place; ratios of step times on two CPU cores."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from benchmarks import frame, works
from mptrain.hardware import Hardware

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
        bound: the ratio at most.
        faster: whether the ratio must be below the bound, not at most the bound.
        their_precision: of the denominator; default: the same.
        feature: what a name among the CPU's features must hold, for the target to be judged there.
    """

    what: str
    work: str
    precision: str
    ours: str
    theirs: str
    bound: float
    faster: bool = False
    their_precision: str = ""
    feature: str = ""

    def measured(self, results: Results) -> np.ndarray | None:
        """Returns the quartiles of the ratio, [3]; None where one of the two was not measured.

        Of one precision: quartiles of the ratios of neighbouring turns. Of two, which are not neighbours in time: the ratio
        of the medians, between the ratios of opposite quartiles.
        """
        ours = results.get((self.work, self.precision, self.ours))
        theirs = results.get((self.work, self.their_precision or self.precision, self.theirs))
        if ours is None or theirs is None:
            return None
        if self.their_precision:
            quartiles = [np.quantile(frame.times(turns)[:, 0], [0.25, 0.5, 0.75]) for turns in (ours, theirs)]
            return quartiles[0] / quartiles[1][::-1]
        return frame.ratio(ours, theirs)[0]

    def holds(self, ratio: float) -> bool:
        return ratio < self.bound if self.faster else ratio <= self.bound


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
    Target(f"{_SCALING} against Keras's Adam alone", "cnn", "float32", "scaled", "unscaled", 1.03),
    Target(f"{_SCALING}, dynamic scale against a fixed one of 1", "cnn", "float32", "scaled", "scaled_by_1", 1.03),
    *(
        Target(f"{_SCALING} against {name}'s", work, "float32", "scaled", theirs, 1.0, faster=True)
        for work in ("cnn", "mlp")
        for name, theirs in (("Keras 3", "scaled_keras"), ("tf_keras", "scaled_tf_keras"))
    ),
    *(
        Target(
            "mptrain in mixed_float16 against float32",
            work,
            "mixed_float16",
            "mptrain",
            "mptrain",
            1.8,
            their_precision="float32",
        )
        for work in ("cnn", "resnet", "transformer")
    ),
    Target(
        *("mptrain in mixed_bfloat16 against float32", "cnn", "mixed_bfloat16", "mptrain", "mptrain", 0.65),
        their_precision="float32",
        feature="bf16",
    ),
)


def rows(results: Results, here: Hardware) -> list[tuple[Target, np.ndarray | None, str]]:
    """Returns each target with the quartiles of what was measured and a verdict.

    The verdict is "met", "missed", "not measured", or says why the target is not judged on this hardware.
    """
    found: list[tuple[Target, np.ndarray | None, str]] = []
    for target in TARGETS:
        ratio = target.measured(results)
        if ratio is None:
            verdict = "not measured"
        elif here.gpus:
            verdict = "a CPU's target"
        elif target.feature and not any(target.feature in name for name in here.cpu_features):
            verdict = f"not judged: this CPU has no {target.feature}"
        else:
            verdict = "met" if target.holds(ratio[1]) else "missed"
        found.append((target, ratio, verdict))
    return found


def missed(results: Results, here: Hardware) -> list[Target]:
    return [target for target, _, verdict in rows(results, here) if verdict == "missed"]
