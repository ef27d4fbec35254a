"""SISA around any scikit-learn estimator: shards that are fitted apart, so that a deletion fits only its own shard again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor

from expunge.core.errors import InputError, nearest
from expunge.data.rows import Table, Task
from expunge.methods.prepared.dealing import deal, derived

_HIGHEST = 2**31  #: seeds of scikit-learn are below 2^32, some of its parts want a signed one


@dataclass(frozen=True)
class Refit:
    """What a deletion cost.

    Attributes:
        shards: those that were fitted again, counted from 0.
        rows: how many rows they were fitted on.
        total: how many all shards hold: a full retraining.
    """

    shards: tuple[int, ...]
    rows: int
    total: int


class ShardedEstimator:
    """One estimator for each shard of the rows (SISA with one slice: Bourtoule et al. 2021, arXiv 1912.03817).

    Rows are dealt into shards at random, once. A deletion fits the shards of the deleted rows again, without them and from
    nothing; the result is that of fitting the same shards without the rows in the first place, to the bit where the estimator is
    deterministic on the machine. Estimators that draw random numbers get a seed for each shard, so that they are. There are no
    slices: not every estimator can go on from where it stopped.

    Rows are not kept, only their ids and a hash of each, so a deletion takes the table again and notices if a row has changed.

    Args:
        estimator: any classifier or regressor; it is copied and stays as it is.
        data: the rows to fit.
        shards: how many; more make deletions cheaper and answers worse.
        seed: of the dealing and of the estimators.

    Attributes:
        task: classification or regression.
        classes: names of the classes; empty for regression.

    Raises:
        InputError: the estimator is of another task, there are too few rows, or a shard has rows of one class only.
    """

    def __init__(self, estimator: Any, data: Table, *, shards: int = 5, seed: int = 0) -> None:
        fits = is_classifier if data.task == "classification" else is_regressor
        if not isinstance(estimator, BaseEstimator) or not fits(estimator):
            raise InputError(f"{type(estimator).__name__} is no estimator for {data.task}.", "Give one of scikit-learn's for it.")
        if shards < 1:
            raise InputError(f"There must be at least one shard; got {shards}.")
        self.task: Task = data.task
        self.classes = data.classes
        self._estimator, self._seed = clone(estimator), seed
        place = deal(len(data), shards, 1, seed)[:, 0]
        self._held: list[dict[str, bytes]] = [{} for _ in range(shards)]
        for i, shard in enumerate(place.tolist()):
            self._held[shard][data.ids[i]] = _digest(data, i)
        self._models = self._fitted(data, dict(enumerate(self._held)))

    def __len__(self) -> int:
        return sum(map(len, self._held))

    def forget(self, data: Table, ids: Sequence[str]) -> Refit:
        """Fit the shards of some rows again, without these; all or, on an error, none.

        Args:
            data: holds at least the rows that stay in those shards.
            ids: of the rows to delete.

        Raises:
            InputError: an id that is not held, a row that is missing or has changed, or a shard that would be left without rows,
                or with rows of one class only.
        """
        wanted = dict.fromkeys(ids)
        known = {name for held in self._held for name in held}
        absent = next((name for name in wanted if name not in known), None)
        if absent is not None or not wanted:
            close = nearest(str(absent), known)
            raise InputError(
                f"No shard holds the row {absent!r}." if wanted else "Nothing says which rows to delete.",
                f"Nearest: {', '.join(close)}." if close else "Name rows that it was fitted on.",
            )
        left = {
            s: {name: digest for name, digest in held.items() if name not in wanted}
            for s, held in enumerate(self._held)
            if not wanted.keys().isdisjoint(held)
        }
        made = self._fitted(data, left)
        for (s, held), model in zip(left.items(), made, strict=True):
            self._held[s], self._models[s] = held, model
        return Refit(tuple(left), sum(map(len, left.values())), len(self))

    def predict_proba(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Mean of the shards' probabilities, ``[n, classes]``; of estimators without any, the share of votes for a class.

        Args:
            inputs: ``[n, ...]``, as in the table.

        Raises:
            InputError: it is a regression.
        """
        if self.task != "classification":
            raise InputError("A regression has no probabilities.", "Ask for predictions.")
        x = _flat(inputs)
        total = np.zeros((len(x), len(self.classes)))
        for model in self._models:
            own = np.asarray(model.classes_, dtype=np.int64)
            if hasattr(model, "predict_proba"):
                total[:, own] += model.predict_proba(x)
            else:
                total[np.arange(len(x)), np.asarray(model.predict(x), dtype=np.int64)] += 1
        return total / len(self._models)

    def predict(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Class numbers ``[n]``, of equals the first; or the mean of the shards' numbers ``[n]``."""
        if self.task == "classification":
            return np.asarray(self.predict_proba(inputs).argmax(axis=1))
        x = _flat(inputs)
        return np.asarray(np.mean([model.predict(x) for model in self._models], axis=0))

    def _fitted(self, data: Table, shards: dict[int, dict[str, bytes]]) -> list[Any]:
        """An estimator for each of some shards, after all of them were checked."""
        at = {name: i for i, name in enumerate(data.ids)}
        rows = {s: self._rows(data, at, s, held) for s, held in shards.items()}
        return [self._seeded(s).fit(_flat(data.inputs[i]), data.targets[i]) for s, i in rows.items()]

    def _rows(self, data: Table, at: dict[str, int], shard: int, held: dict[str, bytes]) -> npt.NDArray[np.int64]:
        if data.task != self.task or data.classes != self.classes:
            raise InputError("The rows are of another task, or of other classes.", "Read them as for the first fit.")
        for name, digest in held.items():
            if name not in at:
                raise InputError(f"The row {name!r} of shard {shard + 1} is missing.", "Give all rows that are to stay.")
            if _digest(data, at[name]) != digest:
                raise InputError(f"The row {name!r} of shard {shard + 1} has changed.", "Give the rows as they were fitted.")
        chosen = np.array([at[name] for name in held], dtype=np.int64)
        fewest = 2 if self.task == "classification" else 1
        if len(np.unique(data.targets[chosen])) < fewest:
            what = "no row" if not len(chosen) else "rows of one class only"
            raise InputError(f"Shard {shard + 1} would hold {what}.", "Fit anew with fewer shards.")
        return chosen

    def _seeded(self, shard: int) -> Any:
        """A fresh copy whose random parts that have no seed get one."""
        made = clone(self._estimator)
        names = [name for name, value in made.get_params().items() if name.split("__")[-1] == "random_state" and value is None]
        seed = derived(self._seed, shard + 1) % _HIGHEST
        return made.set_params(**dict.fromkeys(names, seed))


def _flat(inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return inputs.reshape(len(inputs), -1)


def _digest(data: Table, i: int) -> bytes:
    state = hashlib.blake2b(np.ascontiguousarray(data.inputs[i]).tobytes(), digest_size=16)
    state.update(data.targets[i].tobytes())
    return state.digest()
