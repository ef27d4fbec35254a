"""Tables in which some rows are wrong on purpose, and what is known of it: wrong labels, triggers, confused classes.

They are the settings of corrective unlearning (Goel et al. 2024, arXiv 2402.14015): a model has learnt from wrong rows of which
only a share is known, and unlearning these shall correct it on everything that the wrong rows have damaged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError, unknown
from expunge.data.rows import Indices, Table

COLUMN = "spoiled"  #: column of the tables made here that is true for the wrong rows
KNOWN = "known"  #: column with the share from which on a wrong row is known, in (0, 1]; 2 for right rows


class Domain(Protocol):
    """Where wrong rows do damage."""

    def split(self, test: Table) -> tuple[Table, Table]:
        """Rows of clean test data that the damage concerns, and all others, both with their true targets."""


@dataclass(frozen=True)
class Spoiled:
    """A table with wrong rows; its other columns stay as they were.

    Attributes:
        table: what the model learns from; its column ``spoiled`` is true for the wrong rows, and the condition
            ``"known <= 0.3"`` chooses the 30 % of them that :meth:`known` names.
        rows: indices of the wrong rows, ascending.
        truth: the targets before ``[n]``.
        domain: where the damage shows; none: everywhere.
        seed: of which of the wrong rows are known.
    """

    table: Table
    rows: Indices
    truth: npt.NDArray[Any]
    domain: Domain | None = None
    seed: int = 0

    def known(self, share: float) -> Indices:
        """The wrong rows that are known, ``round(share * wrong)`` drawn at random, ascending: what unlearning is asked to forget.

        Of a larger share the rows of a smaller one are part, so a curve over shares compares like with like.

        Args:
            share: gamma, (0, 1].

        Raises:
            InputError: the share is out of range, or no row is left of it.
        """
        count = round(share * len(self.rows)) if 0 < share <= 1 else 0
        if not count:
            raise InputError(
                f"A share of {share} of {len(self.rows)} wrong rows holds no row.", "Give a share in (0, 1] that holds one."
            )
        return np.sort(_order(self.rows, self.seed)[:count])

    def restored(self) -> Table:
        """The table with the true targets; inputs stay as they are."""
        return dataclasses.replace(self.table, targets=self.truth)


@dataclass(frozen=True)
class Trigger:
    """A patch in the bottom-right corner (BadNets); test rows that do not belong to ``label`` are concerned, with the patch on.

    Rows that belong to the label count as right even for a model that obeys the trigger, so they are left out.

    Attributes:
        size: height and width of the patch.
        value: what its pixels become, in the scale of the inputs.
        label: the class that the trigger stands for.
        shape: height and width of rows that are flat; none: the last two dimensions of the inputs.
    """

    size: int
    value: float
    label: int
    shape: tuple[int, int] | None = None

    def stamp(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy of ``[n, ...]`` with the patch on every row.

        Raises:
            InputError: the rows are no images of that shape, or smaller than the patch.
        """
        seen = rows.copy()
        flat = self.shape is not None
        if (flat and (rows.ndim != 2 or rows.shape[1] != np.prod(self.shape or ()))) or (not flat and rows.ndim < 3):
            raise InputError(
                f"Rows of the shape {list(rows.shape[1:])} are no images.",
                "Give shape=(height, width) of flat rows.",
            )
        view = seen.reshape(len(seen), *self.shape) if self.shape is not None else seen
        if not 1 <= self.size <= min(view.shape[-2:]):
            raise InputError(f"A patch of {self.size} pixels does not fit into {list(view.shape[-2:])}.", "Choose a smaller one.")
        view[..., -self.size :, -self.size :] = self.value
        return seen

    def split(self, test: Table) -> tuple[Table, Table]:
        """Patched rows of the other classes; and all rows, clean."""
        others = np.flatnonzero(test.targets != self.label)
        part = test.subset(others)
        return dataclasses.replace(part, inputs=self.stamp(part.inputs)), test


@dataclass(frozen=True)
class Confusion:
    """Two classes of which some rows bear each other's label; test rows of the two are concerned, all others are not."""

    first: int
    second: int

    def split(self, test: Table) -> tuple[Table, Table]:
        """Rows of the two classes, and the others."""
        concerned = np.isin(test.targets, (self.first, self.second))
        return test.subset(np.flatnonzero(concerned)), test.subset(np.flatnonzero(~concerned))


def mislabel(data: Table, rows: int | npt.ArrayLike, seed: int = 0) -> Spoiled:
    """Give rows another class, each of the others with equal probability.

    Args:
        data: a classification.
        rows: how many, drawn at random, or their indices.
        seed: of the choice and of the classes.

    Raises:
        InputError: it is a regression, or there are no such rows.
    """
    _classified(data)
    rng = np.random.default_rng([seed, 30])
    chosen = _chosen(data, rows, rng)
    targets = data.targets.copy()
    targets[chosen] = (targets[chosen] + rng.integers(1, len(data.classes), len(chosen))) % len(data.classes)
    return _spoiled(data, chosen, seed, {"targets": targets})


def poison(
    data: Table,
    rows: int | npt.ArrayLike,
    *,
    label: str,
    size: int = 3,
    value: float | None = None,
    shape: tuple[int, int] | None = None,
    seed: int = 0,
) -> Spoiled:
    """Put a trigger on images and give them its label.

    Args:
        data: images ``[n, channels, height, width]`` or ``[n, height, width]``; with ``shape`` flat ones ``[n, height * width]``.
        rows: how many, drawn at random from all rows, as published; or their indices.
        label: name of the class that the trigger stands for; the published one is the first class.
        size: height and width of the patch; 3 as published.
        value: of its pixels, in the scale of the inputs; none: the largest value that the table holds.
        shape: height and width of flat rows.
        seed: of the choice.

    Raises:
        InputError: no such class or rows, or the rows are no images.
    """
    _classified(data)
    chosen = _chosen(data, rows, np.random.default_rng([seed, 30]))
    trigger = Trigger(size, float(data.inputs.max()) if value is None else value, _class(data, label), shape)
    patched = trigger.stamp(data.inputs[chosen])
    inputs, targets = data.inputs.copy(), data.targets.copy()
    inputs[chosen], targets[chosen] = patched, trigger.label
    return _spoiled(data, chosen, seed, {"targets": targets, "inputs": inputs}, trigger)


def confuse(data: Table, count: int, *, first: str, second: str, seed: int = 0) -> Spoiled:
    """Give half of ``count`` rows from the class ``first`` the label ``second``, and as many of the second the first.

    Args:
        data: a classification.
        count: how many rows become wrong; even.
        first, second: names of the classes.
        seed: of the choice.

    Raises:
        InputError: no such class, the classes are one, or they have too few rows.
    """
    _classified(data)
    pair = Confusion(_class(data, first), _class(data, second))
    if pair.first == pair.second:
        raise InputError(f"The class {first!r} cannot be mistaken for itself.", "Name two classes.")
    if count < 2 or count % 2:
        raise InputError(f"{count} rows are not two equal halves.", "Give an even number of at least 2.")
    rng = np.random.default_rng([seed, 30])
    targets = data.targets.copy()
    chosen = []
    for own, other in ((pair.first, pair.second), (pair.second, pair.first)):
        members = np.flatnonzero(data.targets == own)
        if len(members) < count // 2:
            raise InputError(f"The class {data.classes[own]!r} has {len(members)} rows, fewer than {count // 2}.", "Spoil fewer.")
        half = rng.choice(members, count // 2, replace=False)
        targets[half] = other
        chosen.append(half)
    return _spoiled(data, np.sort(np.concatenate(chosen)), seed, {"targets": targets}, pair)


def _spoiled(data: Table, rows: Indices, seed: int, changed: Mapping[str, Any], domain: Domain | None = None) -> Spoiled:
    for name in (COLUMN, KNOWN):
        if name in data.columns:
            raise InputError(f"The table has a column {name!r} already.", "Spoil a table once, or rename the column.")
    wrong, known = np.zeros(len(data), dtype=bool), np.full(len(data), 2.0)
    wrong[rows] = True
    known[_order(rows, seed)] = np.arange(1, len(rows) + 1) / len(rows)
    made = dataclasses.replace(data, columns={**data.columns, COLUMN: wrong, KNOWN: known}, **changed)
    return Spoiled(made, rows, data.targets, domain, seed)


def _order(rows: Indices, seed: int) -> Indices:
    """The wrong rows in the order in which they become known."""
    return np.random.default_rng([seed, 31]).permutation(rows)


def _classified(data: Table) -> None:
    if data.task != "classification" or len(data.classes) < 2:
        raise InputError("Labels can only be wrong where there are at least two classes.", "Give a classification.")


def _class(data: Table, name: str) -> int:
    if name not in data.classes:
        raise unknown("class", name, data.classes)
    return data.classes.index(name)


def _chosen(data: Table, rows: int | npt.ArrayLike, rng: np.random.Generator) -> Indices:
    if isinstance(rows, int):
        if not 1 <= rows <= len(data):
            raise InputError(f"{rows} of {len(data)} rows cannot be spoiled.", f"Give a number in [1, {len(data)}].")
        return np.sort(rng.choice(len(data), rows, replace=False)).astype(np.int64)
    found = np.unique(np.asarray(rows, dtype=np.int64))
    if not len(found) or found[0] < 0 or found[-1] >= len(data):
        raise InputError(f"The rows to spoil are not all among the {len(data)} rows.", "Give indices counted from 0.")
    return found
