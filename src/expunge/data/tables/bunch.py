"""What scikit-learn's loaders return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from expunge.core.errors import InputError
from expunge.data.rows import Table, table
from expunge.data.tables.columns import read_columns
from expunge.data.tables.frames import frame_of
from expunge.data.tables.settings import Reading
from expunge.data.tables.values import labels, numbers


def is_bunch(source: Mapping[str, Any]) -> bool:
    """Whether a mapping is a scikit-learn ``Bunch`` of data and target."""
    return type(source).__name__ == "Bunch" and "data" in source and "target" in source


def read_bunch(bunch: Mapping[str, Any], reading: Reading) -> Table:
    """Data, target and the names of features and classes.

    Arrays take their place without a copy where they have the asked precision. A ``Bunch`` of data frames is read as its frame,
    in which ``id``, ``subject`` and ``columns`` can be named.

    Raises:
        InputError: the data are sparse, or a value is no number or no class.
    """
    data, target = bunch["data"], bunch["target"]
    if hasattr(data, "toarray"):
        raise InputError("The data are a sparse matrix.", "Reduce or densify them, for example with TruncatedSVD.")
    if hasattr(data, "iloc"):
        whole = bunch["frame"] if hasattr(bunch.get("frame"), "iloc") else data.assign(target=target)
        name = reading.target or str(getattr(target, "name", None) or "target")
        classes = reading.classes or (_names(bunch) if reading.task == "classification" else None)
        return read_columns(frame_of(whole), Reading(**{**dict(reading), "target": name, "classes": classes}), None)
    for part in ("target", "id", "subject", "features", "columns", "image", "text"):
        if getattr(reading, part) is not None:
            raise InputError(f"A Bunch of arrays has no columns, so {part} means nothing.", "Load it with as_frame=True.")
    x = np.asarray(data)
    given = bunch.get("feature_names")
    names = [str(n) for n in given] if given is not None else []
    named = names if x.ndim == 2 and len(names) == x.shape[1] else None
    values = np.asarray(target).tolist()
    known = reading.classes or _names(bunch)
    floats = x.astype(reading.precision, copy=False)
    y = numbers(values, "The target") if reading.task == "regression" else labels(values, known, "The target", indices=True)
    return table(
        floats, y, task=reading.task, classes=known if reading.task == "classification" else None, names=named,
        columns={n: floats[:, i] for i, n in enumerate(named or ())}, precision=reading.precision, source="scikit-learn",
    )  # fmt: skip


def _names(bunch: Mapping[str, Any]) -> tuple[str, ...] | None:
    found = bunch.get("target_names")
    values = np.asarray(bunch["target"])
    if found is None or (values.dtype.kind in "iuf" and values.size and values.max() >= len(found)):
        return None
    return tuple(str(n) for n in found)
