"""Which of many targets a text may be about: the few that are worth showing to a model, found by shared runs of letters."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from expunge.guards.folding import words
from expunge.guards.target import Target


class Candidates:
    """Targets, ranked by how much of a name, a topic or an example of theirs a text holds.

    The letters are folded first (:mod:`expunge.guards.folding`), and runs of three and four of them within words compared. What
    is meant without a word of it being said is not found.

    Args:
        limit: how many a text is given at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[str, tuple[Target, sp.csr_matrix]] = {}
        self._lock = threading.Lock()
        self._stacked: tuple[list[Target], sp.csr_matrix, Any, Any] | None = None

    def __len__(self) -> int:
        return len(self._held)

    def add(self, target: Target) -> None:
        """Rank one target more."""
        said = [*target.entities, *target.topics, *(f"{e.prompt} {e.answer}" for e in target.examples)]
        with self._lock:
            self._held = {**self._held, target.id: (target, self._vectors(said))}
            self._stacked = None

    def drop(self, target: str) -> None:
        """Rank one target less."""
        with self._lock:
            self._held = {k: v for k, v in self._held.items() if k != target}
            self._stacked = None

    def near(self, text: str) -> list[Target]:
        """The targets that share most with a text, the likeliest first; all of them where there are no more than ``limit``."""
        with self._lock:
            if self._stacked is None and self._held:
                self._stacked = self._stack()
            stacked = self._stacked
        if stacked is None:
            return []
        targets, rows, owner, sizes = stacked
        shared = np.asarray((rows @ self._vectors([text]).T).todense()).ravel() / sizes
        best = np.zeros(len(targets))
        np.maximum.at(best, owner, shared)
        order = np.argsort(-best, kind="stable")[: self.limit]
        return [targets[i] for i in order if best[i] > 0 or len(targets) <= self.limit]

    def _stack(self) -> tuple[list[Target], sp.csr_matrix, Any, Any]:
        held = list(self._held.values())
        rows = sp.vstack([v for _, v in held]).tocsr()
        owner = np.repeat(np.arange(len(held)), [v.shape[0] for _, v in held])
        return [t for t, _ in held], rows, owner, np.maximum(np.asarray(rows.sum(1)).ravel(), 1)

    @cached_property
    def _hasher(self) -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(
            analyzer="char_wb", ngram_range=(3, 4), n_features=2**18, norm=None, binary=True, alternate_sign=False
        )

    def _vectors(self, texts: Sequence[str]) -> sp.csr_matrix:
        return self._hasher.transform([" ".join(words(t)) for t in texts or [""]])
