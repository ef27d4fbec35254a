"""The retain record that is most like each forget record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class NearestRecords(Preparation):
    """Each forget record with the retain record that is most like it; the two go through the steps together (ICU, 2024).

    Likeness is the cosine of TF-IDF weights of character n-grams within words. The paper takes embeddings of a sentence encoder
    (MiniLM): give such as ``embeddings``, a NumPy archive (``.npz``) with ``ids``, the ids of all forget and retain records as
    text, and ``vectors``, one row for each. As published, the last 100 tokens are compared. Retain records that say the same as
    a forget record are left out; one retain record may serve several forget records, and those that serve none are not read.
    """

    name: ClassVar[str] = "nearest-records"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.RETAIN})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT})
    pairs: ClassVar[bool] = True

    embeddings: str | None = Field(None, description="NumPy archive with ids and vectors; none: TF-IDF of character n-grams")
    shortest: int = Field(3, ge=1, description="length of the shortest character n-grams")
    longest: int = Field(5, ge=1, description="length of the longest character n-grams")
    tail: int | None = Field(100, ge=1, description="last tokens of a record that are compared; none: all")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Pair them.

        Raises:
            InputError: no retain record is left, the file cannot be read, or it lacks a record.
        """
        forget = examples[Stream.FORGET]
        same = {adapter.text(e) for e in forget}
        pool = [e for e in examples[Stream.RETAIN] if adapter.text(e) not in same]
        if not pool:
            raise InputError("Every retain record says the same as a forget record.", "Give others to keep.")
        if self.embeddings is not None:
            ours, theirs = self._given(forget), self._given(pool)
        else:
            ours, theirs = self._counted([self._tail(adapter, e) for e in forget], [self._tail(adapter, e) for e in pool])
        from sklearn.neighbors import NearestNeighbors

        index = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(theirs)
        nearest = index.kneighbors(ours, return_distance=False)[:, 0]
        chosen = [pool[int(i)] for i in nearest]
        note = f"{len(forget)} forget records are paired with {len({int(i) for i in nearest})} of {len(pool)} retain records."
        return Prepared({Stream.RETAIN: chosen}, notes=(note,))

    def _tail(self, adapter: Adapter, example: Example) -> str:
        if self.tail is None or example.n_targets <= self.tail:
            return adapter.text(example)
        return adapter.decode(adapter.spoken(example)[-self.tail :])

    def _counted(self, ours: Sequence[str], theirs: Sequence[str]) -> tuple[Any, Any]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        if self.longest < self.shortest:
            raise InputError(f"preparation.longest is {self.longest}, less than preparation.shortest, {self.shortest}.")
        vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(self.shortest, self.longest), sublinear_tf=True)
        vectors.fit([*ours, *theirs])
        return vectors.transform(ours), vectors.transform(theirs)

    def _given(self, examples: Sequence[Example]) -> Any:
        try:
            with np.load(str(self.embeddings), allow_pickle=False) as data:
                ids, vectors = data["ids"].astype(str), data["vectors"].astype(np.float64)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"The file {self.embeddings!r} holds no embeddings: {error}.", "Write ids and vectors with numpy.savez."
            ) from None
        if ids.ndim != 1 or vectors.ndim != 2 or len(ids) != len(vectors) or not np.isfinite(vectors).all():
            raise InputError(
                f"The embeddings have ids {list(ids.shape)} and vectors {list(vectors.shape)}.",
                "Give one row of finite numbers for each record: ids [records], vectors [records, D].",
            )
        rows = {name: at for at, name in enumerate(ids.tolist())}
        missing = next((e.id for e in examples if e.id not in rows), None)
        if missing is not None:
            raise InputError(f"The embeddings in {self.embeddings!r} lack the record {missing!r}.", "Embed all records.")
        return vectors[[rows[e.id] for e in examples]]
