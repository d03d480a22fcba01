"""Makes a curve of any length short enough to draw, without losing what is seen: its extremes."""

import numpy as np

MOST = 2000  # points of a curve
_SMOOTH = 50  # a mean is taken over this share of all points


def thinned(values: np.ndarray, most: int = MOST) -> np.ndarray:
    """Returns the places, in ascending order, of the points that stand for a curve: at most about `most`.

    Of each stretch its first and last point, its smallest and its largest; where a whole stretch is NaN, its first, so that
    the gap is seen.
    """
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), most // 4):
        known = stretch[~np.isnan(values[stretch])]
        if not known.size:
            kept.add(stretch[0])
            continue
        kept.update((known[0], known[-1], known[np.argmin(values[known])], known[np.argmax(values[known])]))
    return np.array(sorted(kept))


def smoothed(values: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """Returns, at these places, the mean over a fiftieth of all values that ends there; None of a curve of few values.

    NaN where the value is NaN; others' means leave NaN out.
    """
    count = len(values) // _SMOOTH
    if count < 2:
        return None
    means = np.full(len(places), np.nan)
    for number, place in enumerate(places):
        if not np.isnan(values[place]):
            means[number] = np.nanmean(values[max(place + 1 - count, 0) : place + 1])
    return means


def bucketed(spans: list[tuple[int, int, int]], most: int = MOST // 2) -> list[tuple[int, int, int]]:
    """Returns spans (from, to, how many) in ascending order as at most `most`: neighbours are joined, and none is lost."""
    if len(spans) <= most:
        return spans
    joined = []
    for part in np.array_split(np.array(spans), most):
        joined.append((int(part[:, 0].min()), int(part[:, 1].max()), int(part[:, 2].sum())))
    return joined
