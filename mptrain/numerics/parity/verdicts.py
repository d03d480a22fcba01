"""What two runs that differ in precision alone say: whether one follows the other, where they part, or nothing at all."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence

LOSS, OUTPUT, GRADIENT = "loss", "output", "gradient"
_LEAST_MOVE = 0.01  # of the first losses, that float32's must have moved by
_LEAST_LOSS = 0.01  # of the first loss: a loss below is measured by that, since all it has left is noise


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Whether float32's loss moved; where it did not, a precision that loses everything follows it too.

    Attributes:
        moved: whether the means of its first and its last tenth differ by more than 1 %, and by more than twice the standard
            error of their difference.
        first, last: these means; None where one is not finite.
        words: why there is none; empty where it moved.
    """

    moved: bool
    first: float | None
    last: float | None
    words: str = ""

    @classmethod
    def of(cls, losses: Sequence[float | None], steps: Sequence[int], length: int) -> "Evidence":
        """Judges float32's loss of each update; `steps` are theirs, `length` is that of the run in steps."""
        for step, loss in zip(steps, losses, strict=True):
            if loss is None:
                return cls(False, None, None, f"no evidence: the float32 loss is not finite at step {step:,}")
        count = max(len(losses) // 10, min(5, len(losses) // 2), 1)
        ends = losses[:count], losses[-count:]
        first, last = map(statistics.fmean, ends)
        noise = 2 * math.sqrt(sum(statistics.pvariance(end) for end in ends) / count)
        if abs(last - first) > max(_LEAST_MOVE * abs(first), noise):
            return cls(True, first, last)
        run, moved = f"{length:,} step{'s' if length > 1 else ''}", f"from {first:#.3g} to {last:#.3g}"
        return cls(False, first, last, f"no evidence: the float32 loss did not move in {run} ({moved})")


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where a run is further from float32's than the bound for the first time.

    Attributes:
        step: of the batch.
        kind: "loss", "output", "gradient" or "weights".
        layer: its path; None of a loss.
        error: the relative error; None where something is not finite.
    """

    step: int
    kind: str
    layer: str | None
    error: float | None

    def __str__(self) -> str:
        what = f"{self.kind}, " + ("not finite" if self.error is None else f"{self.error:.2g} relative")
        return f"at step {self.step:,}, first in " + (f"{self.layer} ({what})" if self.layer else f"the {what}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is said of one precision.

    Attributes:
        status: "follows", "parts", "no evidence" or "failed".
        words: the same in a line.
        parting: where it parts, also where there is no evidence; None if it does not.
        drift: where weights part, which those of any two runs do in time, as rounding errors add up.
    """

    status: str
    words: str
    parting: Parting | None = None
    drift: Parting | None = None


def judge(
    run: dict, reference: dict, evidence: Evidence, steps: Sequence[int], compared: Sequence[int], bound: float
) -> Verdict:
    """Judges one precision's run by float32's.

    Who follows shows nothing where float32's run computed in 16 bits too; who parts does.

    Args:
        run, reference: as `run.train` returns them, with None for what is not finite.
        evidence: of float32's loss.
        steps: the first step of each update.
        compared: the steps at which weights and gradients were compared.
        bound: the relative error above which two runs have parted.
    """
    loss, wanted = run["curves"]["loss"], reference["curves"]["loss"]
    partings = [*_losses(loss, wanted, steps, bound), *_gradients(run, reference, steps, compared, bound)]
    parting = min(partings, key=lambda each: (each.step, (OUTPUT, LOSS, GRADIENT).index(each.kind)), default=None)
    drift = next(_weights(run, compared, bound), None)
    if not evidence.moved:
        return Verdict("no evidence", evidence.words, parting, drift)
    losses = f"loss {_last(loss)} against {_last(wanted)}"
    unseen = [path for path in run["layers"] if path not in run["gradients"][0]]
    unit = "updates" if reference["window"] > 1 else "steps"
    skipped = f"; skipped {len(run['skipped']):,} of {len(steps):,} {unit}" if run["skipped"] else ""
    if parting is not None:
        return Verdict("parts", f"parts from float32 {parting}; {losses}{skipped}", parting, drift)
    if reference["in_16_bits"] is not None:
        where = f"float32's own run computes {reference['in_16_bits']} in 16 bits, as the model asks"
        return Verdict("no evidence", f"no evidence: {where}", None, drift)
    worst = max((error for errors in run["weights"] for error in errors.values() if error is not None), default=0.0)
    apart = f"weights within {100 * worst:.2g} %"
    if drift is not None:
        apart = f"weights drift past {bound:g} at step {drift.step:,}, first in {drift.layer}"
    more = f" and {len(unseen) - 1} more layers" if len(unseen) > 1 else ""
    blind = f"; the gradients of {unseen[0]}{more} could not be seen" if unseen else ""
    return Verdict("follows", f"follows float32: {losses}, {apart}{skipped}{blind}", None, drift)


def running_mean(values: Sequence[float | None]) -> list[float | None]:
    """Returns the mean of each value and those before it, over a tenth of all; those that are None are left out."""
    count = _window(values)
    windows = [[value for value in values[max(end - count, 0) : end] if value is not None] for end in range(1, len(values) + 1)]
    return [statistics.fmean(window) if window else None for window in windows]


def _window(values: Sequence) -> int:
    return max(len(values) // 10, min(5, len(values)))


def _last(values: Sequence[float | None]) -> str:
    mean = running_mean(values)[-1]
    return "not finite" if mean is None else f"{mean:#.3g}".rstrip(".")


def _losses(loss: Sequence, wanted: Sequence, steps: Sequence[int], bound: float) -> Iterator[Parting]:
    """Yields where the running means, of the updates that neither skipped, part; or where all of a window were skipped."""
    least = _LEAST_LOSS * abs(wanted[0] or 0.0)
    both = [None if found is None else value for found, value in zip(loss, wanted, strict=True)]
    for number, (found, mean) in enumerate(zip(running_mean(loss), running_mean(both), strict=True), start=1):
        if found is not None and mean is not None:
            size = max(abs(mean), least)
            error = abs(found - mean) / size if size else float(found != mean)
            if error > bound:
                yield Parting(steps[number - 1], LOSS, None, error)
        elif found is None and number >= _window(loss):
            yield Parting(steps[number - 1], LOSS, None, None)


def _gradients(run: dict, reference: dict, steps: Sequence[int], compared: Sequence[int], bound: float) -> Iterator[Parting]:
    """Yields where gradients part, those of a step in backward order, in which they are computed and one spoils the next.

    Where a dynamic loss scale makes them infinite, the step is skipped and the scale goes down: no parting by itself, unless
    it does not help for a tenth of the run. An output that is not finite, and is in float32, comes before the gradients that
    it spoils, and does not count where it spoils none: a mask may well be infinite.
    """
    lasting = set(_lasting(run["skipped"], steps))
    for step, errors, found, known in zip(compared, run["gradients"], run["nonfinite"], reference["nonfinite"], strict=True):
        outputs = [path for path in found if path not in known]
        parting = [path for path in reversed(run["layers"]) if path in errors and not _within(errors[path], bound)]
        if outputs and (parting or step in run["skipped"]):
            yield Parting(step, OUTPUT, outputs[0], None)
        for path in parting:
            if errors[path] is not None or not run["dynamic"] or step in lasting:
                yield Parting(step, GRADIENT, path, errors[path])


def _lasting(skipped: Sequence[int], steps: Sequence[int]) -> Iterator[int]:
    """Yields the steps from which on all updates of a tenth of the run were skipped."""
    skipped, count = set(skipped), _window(steps)
    for place in range(len(steps) - count + 1):
        if skipped.issuperset(steps[place : place + count]):
            yield steps[place]


def _within(error: float | None, bound: float) -> bool:
    return error is not None and error <= bound


def _weights(run: dict, compared: Sequence[int], bound: float) -> Iterator[Parting]:
    for step, errors in zip(compared, run["weights"], strict=True):
        for path in run["layers"]:
            if not _within(errors[path], bound):
                yield Parting(step, "weights", path, errors[path])
