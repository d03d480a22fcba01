"""Whether a metric still gets better: functions of all evaluations so far.

`metrics.jsonl` holds these evaluations, and a resumed run keeps those up to its checkpoint. So nothing has to be saved, and a
run that was killed judges as one that was not, to the bit.
"""

from collections.abc import Iterable, Iterator


def sign(mode: str) -> int:
    """Returns what a metric is multiplied by so that higher is better, for the modes "min" and "max"."""
    return -1 if mode == "min" else 1


def improvements(ratings: Iterable[float], min_delta: float) -> Iterator[bool]:
    """Yields for each rating whether it is higher than the best before it by more than `min_delta`; a NaN never is."""
    best = None
    for rating in ratings:
        better = rating == rating and (best is None or rating > best + min_delta)
        best = rating if better else best
        yield better


def without_improvement(ratings: Iterable[float], min_delta: float) -> int:
    """Returns how many of the last ratings in a row brought no improvement."""
    count = 0
    for better in improvements(ratings, min_delta):
        count = 0 if better else count + 1
    return count


def reductions(ratings: Iterable[float], min_delta: float, patience: int, cooldown: int) -> int:
    """Returns how often a learning rate is reduced: after `patience` ratings in a row without improvement.

    Args:
        ratings: higher is better.
        min_delta: what a rating must be above the best one to count as an improvement.
        patience: ratings without improvement that reduce the rate.
        cooldown: ratings after a reduction that do not count.
    """
    count, stale, resting = 0, 0, 0
    for better in improvements(ratings, min_delta):
        stale = 0 if better or resting else stale + 1
        resting = max(resting - 1, 0)
        if stale >= patience:
            count, stale, resting = count + 1, 0, cooldown
    return count
