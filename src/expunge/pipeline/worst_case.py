"""The rows of a table that are hardest to forget, for a model that is held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from expunge.core.errors import InputError, unknown
from expunge.data.rows import Table
from expunge.engine.worst_case import Progress, Selection, WorstCase, worst_case
from expunge.pipeline.rows import open_rows

Unit = Literal["row", "class", "subject"]


def worst_rows(
    model: Any,
    data: Table,
    count: int,
    *,
    by: Unit = "row",
    loss: Literal["l1", "mse"] = "l1",
    layers: Sequence[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> WorstCase:
    """A worst-case forget set: what stays known although it was left out; the model is left as it is.

    >>> found = expunge.worst_rows(model, data, 100)
    >>> done = expunge.unlearn_rows(model, data, ids=found.ids, holdout=unseen, method="scrub")

    Args:
        model: what :func:`expunge.unlearn_rows` takes.
        data: all rows that it was trained on.
        count: how many rows, classes or subjects to choose.
        by: what is chosen as a whole.
        loss: of a regression.
        layers: see :func:`expunge.unlearn_rows`.
        progress: called with (upper steps done, of how many).
        **settings: of :class:`~expunge.engine.worst_case.Selection`: ``outer``, ``epochs``, ``goal="easiest"``, ...

    Returns:
        Ids of the rows, weights, and what each upper step saw.

    Raises:
        InputError: the model does not fit the rows, there is nothing of that kind to choose, or too little of it.
    """
    unit = check_by(data, by, count, settings)
    how = Selection(**settings)
    owners = _owners(data, unit)
    adapter = open_rows(model, data, loss=loss, layers=layers, dropout=False)
    return worst_case(adapter, [adapter.encode(r) for r in data.rows()], count, how, groups=owners, progress=progress)


def check_by(data: Table, by: str, count: int, settings: Mapping[str, Any]) -> Unit:
    """Check a request before a model is trained for it.

    Raises:
        InputError: a setting is wrong, there is nothing of that kind to choose, or not more of it than is asked for.
    """
    Selection(**settings)
    if by not in get_args(Unit):
        raise unknown("kind of unit", by, get_args(Unit))
    owners = _owners(data, by)
    units = len(data) if owners is None else len(set(owners))
    if not 1 <= count < units:
        raise InputError(f"{count} of {units} units cannot be chosen.", f"Give a number in [1, {units - 1}].")
    found: Unit = by  # type: ignore[assignment]
    return found


def _owners(data: Table, by: str) -> Sequence[int] | None:
    if by == "row":
        return None
    if by == "class" and data.task == "classification":
        names = np.asarray(data.targets)
    elif by == "subject" and data.subjects:
        names = np.array([s or f"\0{i}" for s, i in zip(data.subjects, data.ids, strict=True)])  # no subject: the row itself
    else:
        raise InputError(
            f"The rows have no {by} to choose by.", "Choose row, class (of a classification), or subject (if named)."
        )
    return np.unique(names, return_inverse=True)[1].tolist()  # type: ignore[no-any-return]
