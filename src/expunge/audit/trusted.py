"""How far a metric can be trusted: what the meta-evaluation of metrics found, for reports to say.

The numbers are those of ``docs/results/metric-meta-evaluation.md``, kept beside the code in ``trusted.json``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

_CHANCE = 0.5


@functools.cache
def measured() -> Mapping[str, Any]:
    """What the meta-evaluation left; empty if nothing is there."""
    path = resources.files("expunge.audit") / "trusted.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def fails(row: Mapping[str, float], faithful: float) -> bool:
    """Whether a metric does not tell models that know from models that do not: by its area, or by an interval down to chance."""
    return row["auc"] < faithful or row["low"] <= _CHANCE


def warning(key: str) -> str:
    """One sentence on a number of a language model that did not pass; empty for one that passed or was not tried.

    Args:
        key: of the number, such as ``forget.probability``.
    """
    found = measured()
    row = found.get("metrics", {}).get(key)
    if row is None or not row["toward"] or not fails(row, found["faithful"]):
        return ""
    return (
        f"not to be trusted alone: it told small models that know from models that do not with an area of {row['auc']:.2f} "
        f"[{row['low']:.2f}, {row['high']:.2f}] under the ROC curve ({found['models']} models; 0.5 is chance)"
    )
