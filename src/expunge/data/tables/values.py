"""Values of columns: classes, numbers, and what conditions compare."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError, nearest

_WHOLE = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d*)?(?:\.\d*)?(?:[eE][-+]?\d+)?")  # a leading zero, as of a postal code, makes it a text


def numbers(values: Sequence[Any], what: str) -> npt.NDArray[np.float64]:
    """Targets of a regression.

    Raises:
        InputError: a value is no finite number; the message names the row.
    """
    try:
        found = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        row = next(i for i, v in enumerate(values) if not _reads(v))
        raise InputError(
            f"{what} holds {shown(values[row])} in row {row + 1}, which is no number.",
            "Correct it, or ask for a class.",
        ) from None
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise InputError(f"{what} holds {found[row]} in row {row + 1}.", "Fill it in, or leave the row out.")
    return found


def labels(values: Sequence[Any], classes: Sequence[str] | None, what: str, *, indices: bool = False) -> npt.NDArray[Any]:
    """Classes as numbers, or as names.

    Whole numbers, also written as text, are class numbers counted from 0, unless the names of the classes are given and hold
    them; with ``indices`` numbers are never names. Without names every number up to the largest must occur.

    Raises:
        InputError: a label is out of range or no class, or a class has no row; the message names the row or the class.
    """
    named = set(classes or ())
    if all(isinstance(v, str) and v not in named and _WHOLE.fullmatch(v.strip()) for v in values):
        values = [int(v) for v in values]
    elif not named and all(isinstance(v, str) and _reads(v) for v in values):
        values = [float(v) for v in values]
    by_name = named and not indices and not _counted(classes) and all(str(v) in named for v in values)
    if by_name or any(isinstance(v, str) for v in values):
        texts = [text_of(v) for v in values]
        for row, text in enumerate(texts if named else ()):
            if text not in named:
                close = nearest(text, named) or sorted(named)[:5]
                raise InputError(
                    f"{what} holds {text!r} in row {row + 1}, which is none of the classes.", f"Nearest: {', '.join(close)}."
                )
        return np.array(texts)
    found = np.asarray([int(v) if isinstance(v, bool) else v for v in values])
    if found.dtype.kind not in "iuf" or found.ndim != 1:
        raise InputError(f"{what} holds {shown(values[0])} in row 1, which is no class.", "Give class numbers or names.")
    top = len(classes) if classes is not None else None
    bad = (found != np.round(found)) | (found < 0) | (found >= (top if top is not None else math.inf))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        holds = f"{what} holds the label {found[row]:g} in row {row + 1}, which is"
        if found[row] != np.round(found[row]):
            raise InputError(f"{holds} no class.", "Give classes, or ask for a regression.")
        count = f"there are {top} classes, counted from 0" if top is not None else "classes count from 0"
        raise InputError(f"{holds} out of range: {count}.", "Correct it.")
    whole = found.astype(np.int64)
    present = np.unique(whole)
    if top is None and present[-1] != len(present) - 1:
        empty = int(np.flatnonzero(present != np.arange(len(present)))[0])
        raise InputError(
            f"{what} has no row of the class {empty}: numbers of classes count from 0.",
            "Give the names of all classes, or correct the numbers; or is it a regression?",
        )
    return whole


def condition(values: list[Any]) -> npt.NDArray[Any] | None:
    """A column for conditions: truth values, numbers (a missing one is NaN, of which no comparison holds), or texts.

    None for what no condition can compare: pictures, lists, bytes.
    """
    present = [v for v in values if not missing(v)]
    if all(isinstance(v, bool) for v in values):
        return np.array(values, dtype=bool)
    if all(isinstance(v, (int, float)) for v in present):
        return np.array(values) if len(present) == len(values) else np.array([math.nan if missing(v) else v for v in values])
    if not all(np.isscalar(v) and not isinstance(v, bytes) for v in present):
        return None
    texts = [text_of(v) for v in values]
    if all(isinstance(v, str) for v in present) and all(any(c.isdigit() for c in t) and _NUMBER.fullmatch(t) for t in texts if t):
        read = [float(t) if t else math.nan for t in texts]
        return np.array([int(t) for t in texts]) if all(_WHOLE.fullmatch(t) for t in texts) else np.array(read)
    return np.array(texts)


def _counted(classes: Sequence[str] | None) -> bool:
    """Whether the names of the classes are their numbers: then a number means the same either way."""
    return classes is not None and list(classes) == [str(i) for i in range(len(classes))]


def missing(value: Any) -> bool:
    """Whether a value stands for nothing: none, an empty text, or NaN."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))


def _reads(value: Any) -> bool:
    try:
        return np.asarray(value, dtype=np.float64).ndim == 0
    except (ValueError, TypeError, OverflowError):
        return False


def text_of(value: Any) -> str:
    """A value as a name; what is missing has none."""
    return "" if missing(value) else str(value).strip()


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
