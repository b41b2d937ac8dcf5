"""Numbers and counts as people read them."""

import math
import re
from typing import Any


def number_text(value: float, digits: int = 2) -> str:
    """Prints a number: an em dash for what is undefined, ∞ for exact."""
    if math.isnan(value):
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}f}".replace("-", "−")


def interval_text(low: float, high: float, digits: int = 2) -> str:
    """Prints an interval's limits; nothing where they are undefined."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{number_text(low, digits)}, {number_text(high, digits)}]"


def percent_text(share: float, digits: int = 1) -> str:
    """Prints a share between 0 and 1 in percent."""
    return number_text(100 * share, digits) + ("%" if math.isfinite(share) else "")


def count_text(count: int, noun: str) -> str:
    """Prints a count with its noun: "1 seed", "32 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def is_undefined(value: Any) -> bool:
    """Whether a fact is not there: null, or a column's NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_folders(text: str) -> str:
    """Leaves of every absolute path its last name: the rest says whose machine it was."""
    text = re.sub(r"(['\"])(?:~|/)[^'\"]*/(?=[^'\"/])", r"\1", text)
    return re.sub(r"(?<![\w.:/-])(?:~|/)[^\s'\"]*/(?=[^\s'\"/])", "", text)
