"""Rows of a table: what classifiers and regressors learn from, with stable ids, and the choice of those to forget."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError, nearest
from expunge.data.predicate import select as select_where
from expunge.data.records import RecordSet

Task = Literal["classification", "regression", "text"]
Indices = npt.NDArray[np.int64]
_SHOWN = 5


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row: what a model reads and what it should answer.

    Attributes:
        id: stable name of the row within its table.
        inputs: what the model reads, an array without the batch dimension (a view of the table's: nothing is copied).
        target: the class, counted from 0, or the number to predict.
        subject: the independent unit it belongs to (person, patient, device); empty: itself.
    """

    id: str
    inputs: npt.NDArray[Any]
    target: int | float
    subject: str = ""

    @property
    def cluster(self) -> str:
        """The subject, or the row itself."""
        return self.subject or self.id

    def content(self) -> dict[str, object]:
        """Hash of the inputs, the target and the subject."""
        state = hashlib.sha256(f"{self.inputs.dtype.str}{self.inputs.shape}".encode())
        state.update(np.ascontiguousarray(self.inputs).tobytes())
        return {"inputs": state.hexdigest(), "target": self.target, "subject": self.subject}


@dataclass(frozen=True)
class Table:
    """Labelled rows in columns; made and checked by :func:`table`.

    Attributes:
        ids: unique names (n).
        inputs: ``[n, ...]``, of one floating-point or integer type.
        targets: classes, int64 ``[n]``, or numbers, floats ``[n]``; of texts, the token ids to be learnt, int64 ``[n, T]``.
        task: classification or regression; text: token ids ``[n, T]``, padded (:mod:`expunge.methods.prepared.text_source`).
        classes: names of the classes; empty for regression and text.
        subjects: the independent unit of each row (n); empty: each row is its own.
        columns: further columns by name, for predicates (n each).
        source: where it came from.
    """

    ids: tuple[str, ...]
    inputs: npt.NDArray[Any]
    targets: npt.NDArray[Any]
    task: Task
    classes: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    source: str = "python"

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: Iterable[int] | None = None, name: str = "rows") -> RecordSet[Row]:
        """The rows at ``indices`` (all, if none are given), in that order."""
        chosen = range(len(self)) if indices is None else [int(i) for i in indices]
        targets = self.targets.tolist()
        subjects = self.subjects or ("",) * len(self)
        return RecordSet(name, tuple(Row(self.ids[i], self.inputs[i], targets[i], subjects[i]) for i in chosen), self.source)

    def select(
        self,
        *,
        ids: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        where: str | None = None,
        subjects: Sequence[str] | None = None,
    ) -> Indices:
        """Indices of the rows that a request names, ascending; of several conditions all must hold.

        Args:
            ids: row ids.
            classes: names of classes (of a class, all rows).
            where: a condition on the columns such as ``"age < 18 and city == 'Graz'"``; see :mod:`expunge.data.predicate`.
            subjects: subject ids (of a person, all rows).

        Raises:
            InputError: an id, class, column or subject that does not exist; or nothing, or everything, is chosen.
        """
        if ids is None and classes is None and where is None and subjects is None:
            raise InputError("Nothing says which rows to forget.", "Give ids, classes, a condition on columns, or subjects.")
        held = np.ones(len(self), dtype=bool)
        if ids is not None:
            held &= _among(np.array(self.ids, dtype=object), ids, "row id")
        if classes is not None:
            if self.task != "classification":
                raise InputError(
                    f"A {self.task} has no classes.", "Choose rows by ids, by a condition on columns, or by subjects."
                )
            names = np.array(self.classes, dtype=object)[self.targets]
            held &= _among(names, [str(c) for c in classes], "class")
        if subjects is not None:
            if not self.subjects:
                raise InputError("The data name no subjects.", "Name the column that holds them.")
            held &= _among(np.array(self.subjects, dtype=object), subjects, "subject")
        if where is not None:
            targets = np.array(self.classes, dtype=object)[self.targets] if self.classes else self.targets
            held &= select_where(where, {"target": targets, **self.columns})
        if not held.any():
            raise InputError("No row is chosen.", "Widen the conditions.")
        if held.all():
            raise InputError("Every row is chosen: nothing would be left to keep.", "Narrow the conditions.")
        return np.flatnonzero(held)

    def others(self, indices: Indices) -> Indices:
        """All other rows, ascending."""
        kept = np.ones(len(self), dtype=bool)
        kept[indices] = False
        return np.flatnonzero(kept)

    def subset(self, indices: Indices) -> Table:
        """The table of the rows at ``indices``, in that order, with all classes."""
        chosen = indices.tolist()
        return replace(
            self, ids=tuple(self.ids[i] for i in chosen), inputs=self.inputs[indices], targets=self.targets[indices],
            subjects=tuple(self.subjects[i] for i in chosen) if self.subjects else (),
            columns={name: values[indices] for name, values in self.columns.items()},
        )  # fmt: skip

    def emptied(self, indices: Indices) -> list[str]:
        """Names of the classes of which nothing is left without the rows at ``indices``: a report must say so."""
        if self.task != "classification":
            return []
        before = np.bincount(self.targets, minlength=len(self.classes))
        after = before - np.bincount(self.targets[indices], minlength=len(self.classes))
        return [c for c, b, a in zip(self.classes, before, after, strict=True) if b and not a]


def alike(held: Table, targets: npt.NDArray[Any], seed: int) -> Indices:
    """Indices of as many rows of ``held`` as have the classes of ``targets`` in the same proportions, drawn at random, ascending.

    Args:
        held: rows of a classification.
        targets: class numbers.
        seed: of the draw.

    Raises:
        InputError: a class of which there is no row.
    """
    wanted = np.bincount(targets.astype(np.int64), minlength=len(held.classes))
    there = np.bincount(held.targets.astype(np.int64), minlength=len(held.classes))
    empty = [held.classes[c] for c in np.flatnonzero((wanted > 0) & (there == 0))]
    if empty:
        raise InputError(f"Of the class {empty[0]!r} there is no row to compare with.", "Give held-out rows of every class.")
    used = wanted > 0
    times = float((there[used] / wanted[used]).min())
    order = np.random.default_rng([seed, 12]).permutation(len(held))
    chosen = [order[held.targets[order] == c][: max(1, int(times * wanted[c]))] for c in np.flatnonzero(used)]
    return np.sort(np.concatenate(chosen))


def table(
    inputs: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    task: Task = "classification",
    ids: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    subjects: Sequence[str] | None = None,
    columns: Mapping[str, npt.ArrayLike] | None = None,
    names: Sequence[str] | None = None,
    precision: Literal["float32", "float64"] = "float32",
    source: str = "python",
) -> Table:
    """Check arrays and join them to a table.

    Args:
        inputs: ``[n, ...]``; integers stay as they are (token ids).
        targets: for classification, names or class numbers in [0, C); for regression, finite numbers (n).
        task: what is predicted.
        ids: unique names; none: ``"0"``, ``"1"``, ...
        classes: names of the classes in the order of the model's outputs; none: class numbers as they are, or sorted names.
        subjects: the independent unit of each row.
        columns: further columns, for predicates.
        names: names of the features (the last dimension of two-dimensional inputs), for messages.
        precision: of inputs that are no integers, and of the targets of a regression.
        source: where the data came from.

    Raises:
        InputError: lengths that differ, ids that repeat, values that are not finite, or labels out of range.
    """
    x = np.asarray(inputs)
    n = len(x) if x.ndim else 0
    if n == 0 or x.ndim < 2:
        raise InputError(f"The inputs have the shape {list(x.shape)}.", "Give one row for each example: [rows, features...].")
    if x.dtype.kind not in "fiub":
        raise InputError(f"The inputs are of type {x.dtype}, not numbers.", "Encode text and categories as numbers first.")
    x = x.astype(precision, copy=False) if x.dtype.kind in "fb" else x
    _check_finite(x, names)
    labels: tuple[str, ...] = ()
    y: npt.NDArray[Any]
    if task == "classification":
        y, labels = _classes(np.asarray(targets), classes)
    else:
        y = _numbers(np.asarray(targets), precision)
    made = tuple(str(i) for i in (ids if ids is not None else range(n)))
    owners = tuple(str(s) for s in subjects) if subjects is not None else ()
    extra = {k: np.asarray(v) for k, v in (columns or {}).items()}
    for what, held in (("targets", y), ("ids", made), *([("subjects", owners)] if owners else []), *extra.items()):
        if len(held) != n:
            raise InputError(f"There are {n} rows of inputs and {len(held)} of {what}.", "Give one for each row.")
    if len(set(made)) < n:
        seen: set[str] = set()
        twice = next(i for i in made if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise InputError(f"The row id {twice!r} occurs twice.", "Make the ids unique.")
    return Table(made, x, y, task, labels, owners, extra, source)


def _check_finite(x: npt.NDArray[Any], names: Sequence[str] | None) -> None:
    if x.dtype.kind != "f" or np.isfinite(x).all():
        return
    row = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))[0])
    place = np.argwhere(~np.isfinite(x[row]))[0]
    column = names[int(place[-1])] if names is not None and x.ndim == 2 else ", ".join(map(str, place))
    raise InputError(
        f"The column {column!r} holds {x[row][tuple(place)]} in row {row + 1}.", "Fill in or leave out what is missing."
    )


def _classes(y: npt.NDArray[Any], classes: Sequence[str] | None) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if y.dtype.kind == "f" and (not np.isfinite(y).all() or (y != np.round(y)).any()):
        bad = y[~np.isfinite(y) | (y != np.round(y))][0]
        raise InputError(f"The target {bad} is no class.", "Give class numbers or names, or task=regression.")
    if y.dtype.kind in "iufb":
        numbers = y.astype(np.int64)
        names = tuple(map(str, classes)) if classes is not None else tuple(str(c) for c in range(int(numbers.max(initial=0)) + 1))
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(names)):
            bad = int(numbers.min()) if numbers.min() < 0 else int(numbers.max())
            raise InputError(f"The label {bad} is out of range: there are {len(names)} classes, counted from 0.", "Correct it.")
        return numbers, names
    text = y.astype(str)
    names = tuple(map(str, classes)) if classes is not None else tuple(sorted(set(text.tolist())))
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(text.tolist()) - set(names))
    if unknown:
        close = nearest(unknown[0], names)
        raise InputError(f"The label {unknown[0]!r} is none of the classes.", f"Nearest: {', '.join(close or names[:_SHOWN])}.")
    return np.array([number[t] for t in text.tolist()], dtype=np.int64), names


def _numbers(y: npt.NDArray[Any], precision: str) -> npt.NDArray[Any]:
    if y.dtype.kind not in "fiub":
        raise InputError(f"The targets are of type {y.dtype}, not numbers.", "Give numbers, or task=classification.")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise InputError(f"The targets have the shape {list(y.shape)}.", "Give one number for each row.")
    if not np.isfinite(y).all():
        raise InputError(f"The target of row {int(np.flatnonzero(~np.isfinite(y))[0]) + 1} is not finite.", "Fill it in.")
    with np.errstate(over="ignore"):  # what overflows is named below
        made = y.astype(precision)
    if not np.isfinite(made).all():
        row = int(np.flatnonzero(~np.isfinite(made))[0])
        raise InputError(f"The target {y[row]:g} of row {row + 1} is too large for {precision}.", "Ask for float64.")
    return made


def _among(values: npt.NDArray[Any], wanted: Sequence[str], what: str) -> npt.NDArray[np.bool_]:
    present = set(values.tolist())
    missing = [w for w in dict.fromkeys(wanted) if w not in present]
    if missing:
        close = nearest(missing[0], present)
        shown = ", ".join(map(repr, missing[:_SHOWN])) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        verb = "is" if len(missing) == 1 else "are"
        known = ", ".join(sorted(present)[:_SHOWN]) + (", ..." if len(present) > _SHOWN else ".")
        raise InputError(f"There {verb} no {what} {shown}.", f"Nearest: {', '.join(close)}." if close else f"There are: {known}")
    chosen = set(wanted)
    return np.fromiter((v in chosen for v in values.tolist()), dtype=bool, count=len(values))
