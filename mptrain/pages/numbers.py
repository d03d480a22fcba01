"""How numbers are written in pages, pictures and tables: short, and never so rounded that little looks like nothing."""

import math

NOTHING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(share: float | None) -> str:
    """A share (0..1) in percent without the sign: "0" and "100" are exact, "<0.1" and ">99.9" keep close ones apart."""
    if share is None:
        return NOTHING
    if share in (0, 1):
        return f"{100 * share:.0f}"
    if share < 0.0005:
        return "<0.1"
    tenths = math.floor(1000 * share + 0.5)  # halves go up, as in the pages' script
    return ">99.9" if tenths == 1000 else f"{tenths / 10:.1f}"


def magnitude(value: float | None) -> str:
    """A number of any size in about three digits."""
    if value is None:
        return NOTHING
    if value == 0 or 1000 <= abs(value) < 1e6 or (isinstance(value, int) and abs(value) < 1e6):
        return f"{value:,.0f}".replace("-", "−")
    if 0.01 <= abs(value) < 1000:
        return f"{value:.3g}".replace("-", "−")
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", "−")


def power(value: float | None) -> str:
    """A power of two as such, "2¹⁵"; any other number as it is."""
    if value is None:
        return NOTHING
    if value <= 0 or math.frexp(value)[0] != 0.5:
        return magnitude(value)
    return "2" + str(math.frexp(value)[1] - 1).translate(_SUPERSCRIPTS)


def power_steps(value: float | None) -> str:
    """A distance in powers of two with one decimal, "3.2" or "−1.4"."""
    return NOTHING if value is None else f"{value:.1f}".replace("-", "−")
