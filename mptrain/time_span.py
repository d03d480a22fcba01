"""Lengths of time as people write them: 5400, "90m", "2h30m"."""

import math
import re

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.IGNORECASE)


def seconds(value: float | str) -> float:
    """Returns the seconds in a number of seconds or a text such as "2h30m", "1d12h", "90m", "45".

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
        value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    match = _PARTS.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        raise ValueError(f"{value!r} is no length of time: write seconds, or days, hours, minutes and seconds as in '2h30m'")
    return sum(float(part) * unit for part, unit in zip(match.groups(), _SECONDS.values(), strict=True) if part)
