"""How numbers, amounts and untrusted text are written for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from expunge.core.files import size
from expunge.core.results import Number

DASH = "\u2013"  #: stands for what was not measured
MINUS = "\u2212"

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BIDI = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """``text`` without characters that could break or disguise a page.

    Control characters and lone surrogates become U+FFFD; marks that reorder the line (bidirectional overrides) are spelt out.
    """
    text = _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _BIDI.sub(lambda m: f"⟨U+{ord(m.group()):04X}⟩", text)


def shorten(text: str, length: int) -> str:
    """``text`` cut in the middle to at most ``length`` characters: both ends of a name tell it from its siblings."""
    if len(text) <= length:
        return text
    tail = length // 3
    return text[: length - tail - 1] + "…" + text[-tail:]


def digits(numbers: Sequence[Number]) -> int:
    """Decimals for a row of like numbers: two significant digits of their (median) interval, at most 3 where one reaches 0.1.

    Without intervals 3 below ten, 2 below a hundred, then 1.
    """
    known = [n for n in numbers if n.value is not None]
    widths = sorted(n.high - n.low for n in known if n.low is not None and n.high is not None and n.high > n.low)
    largest = max((abs(n.value) for n in known if n.value is not None), default=0.0)
    if widths:
        return min(3 if largest >= 0.1 else 6, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))
    return 3 if largest < 10 else 2 if largest < 100 else 1


def figure(value: float, places: int = 3, minus: str = MINUS, *, exact: bool = True) -> str:
    """``value`` with ``places`` decimals.

    Args:
        value: what to write; 100,000 and more is written with an exponent.
        places: decimals.
        minus: the sign of negative values.
        exact: write what would round to zero with an exponent; False where an interval beside it tells how small it may be.
    """
    shown = f"{value:.{places}f}"
    zero = float(shown) == 0
    if (exact and zero and value != 0) or abs(value) >= 1e5:
        shown = f"{value:.1e}"
    elif zero:
        shown = shown.removeprefix("-")
    return shown.replace("-", minus)


def value_text(number: Number, places: int | None = None, minus: str = MINUS) -> str:
    """The value alone, or a dash."""
    if number.value is None:
        return DASH
    places = digits([number]) if places is None else places
    return figure(number.value, places, minus, exact=number.low is None or number.high is None)


def interval_text(number: Number, places: int | None = None, minus: str = MINUS) -> str:
    """``[low, high]``, or nothing where there is no interval."""
    if number.value is None or number.low is None or number.high is None:
        return ""
    places = digits([number]) if places is None else places
    return f"[{figure(number.low, places, minus, exact=False)}, {figure(number.high, places, minus, exact=False)}]"


def signed(value: float, places: int = 3) -> str:
    """A difference with its sign."""
    return ("+" if value > 0 else "") + figure(value, places)


def duration(seconds: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def amount(key: str, value: float) -> str:
    """One entry of a cost table, by the unit that its name tells."""
    if key.endswith("bytes"):
        return size(value)
    if key.endswith("seconds"):
        return duration(value)
    return f"{value:,.0f}" if float(value).is_integer() else figure(value)


def scalar(value: Any) -> str:
    """One value of a table of facts."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(scalar(v) for v in value)
    return str(value)


def yaml_text(values: Mapping[str, Any]) -> str:
    """JSON-like settings as YAML, in the order they were given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100).rstrip()


def moment(stamp: str) -> str:
    """An ISO 8601 time in UTC for people: ``2026-11-20 09:30 UTC``; what is no such time is returned as it is."""
    found = re.fullmatch(r"(\d{4}-\d{2}-\d{2})T(\d{2}:\d{2})(:\d{2}(\.\d+)?)?(Z|\+00:00)", stamp)
    return f"{found[1]} {found[2]} UTC" if found else stamp


def plural(count: int, noun: str) -> str:
    """``1 model``, ``2 models``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
