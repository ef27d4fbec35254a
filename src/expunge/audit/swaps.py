"""The same question about another subject, token for token: what activation patching calls the corrupted input.

Activations of two inputs can be compared only where both have the same tokens' places. So another subject's name is put into
the places of the own one: of as many tokens if there is one, else cut, or begun again, to fit. Where a record does not name its
subject, the most similar prompt of another subject tells which tokens stand for it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.tokenise import Tokens
from expunge.core.errors import InputError
from expunge.data.records import Record

_TRIES = 64  #: other subjects that are looked at for a name of as many tokens

Run = tuple[int, int]


@dataclass(frozen=True)
class Swap:
    """An example and its counterpart about another subject.

    Attributes:
        example: as it is.
        other: input ids of the counterpart, of the same length.
        counted: which targets are looked at, bool: those that stand for no exchanged token.
        how: ``subject`` where the subject's name was exchanged, ``prompt`` where the nearest other prompt was taken.
    """

    example: Example
    other: NDArray[np.int32]
    counted: NDArray[np.bool_]
    how: str


def swaps(
    adapter: LanguageAdapter, records: Sequence[Record], others: Sequence[Record], seed: int = 0, count: int = 1
) -> list[list[Swap]]:
    """Up to ``count`` counterparts of each record; none for plain text, and where no other prompt differs.

    Args:
        adapter: encodes them.
        records: what is looked at.
        others: records whose subjects or prompts take the place; those of a record's own cluster are left out.
        seed: of the choice among subjects.
        count: how many, at least 1.

    Raises:
        InputError: a record does not fit into the model's context.
    """
    held = {r.id: r for r in (*records, *others)}
    pool = _Pool([r for r in held.values() if not r.is_text], seed)
    return [pool.swaps(adapter, record, count) if not record.is_text else [] for record in records]


class _Pool:
    """Records whose subjects, or prompts, can take the place of others."""

    def __init__(self, records: Sequence[Record], seed: int) -> None:
        self.records, self.seed = records, seed
        self.names = sorted({r.subject for r in records if _names(r)})
        self.words = [Counter(_asked(r).split()) for r in records]

    def swaps(self, adapter: LanguageAdapter, record: Record, count: int) -> list[Swap]:
        """Counterparts of one record: about subjects of as many tokens before others; else those of the nearest prompts."""
        example = adapter.encode(record)
        held: Tokens = example.data
        named = _names(record)
        loose: list[Swap] = []
        out: list[Swap] = []
        for changed in self._renamed(record) if named else self._nearest(record):
            found = _aligned(adapter, held, changed)
            if found is not None:
                made = _made(example, held, found[0], "subject" if named else "prompt")
                (out if found[1] or not named else loose).append(made)
            if len(out) == count:
                break
        return [*out, *loose][:count]

    def _renamed(self, record: Record) -> Iterator[Record]:
        key = hashlib.blake2b(f"{self.seed}\0{record.id}".encode(), digest_size=8).digest()
        others = [n for n in self.names if n != record.subject]
        for i in np.random.default_rng(int.from_bytes(key, "big")).permutation(len(others))[:_TRIES]:
            turns = tuple((role, text.replace(record.subject, others[i])) for role, text in record.messages)
            yield replace(record, prompt=record.prompt.replace(record.subject, others[i]), messages=turns)

    def _nearest(self, record: Record) -> Iterator[Record]:
        own = Counter(_asked(record).split())

        def apart(i: int) -> tuple[float, str]:
            other = self.words[i]
            return -(own & other).total() / max(1, (own | other).total()), self.records[i].id

        for i in sorted((i for i, r in enumerate(self.records) if r.cluster != record.cluster), key=apart)[:_TRIES]:
            yield replace(record, prompt=self.records[i].prompt, messages=self.records[i].messages)


def _names(record: Record) -> bool:
    """Whether a record's prompt names its subject."""
    return bool(record.subject) and record.subject in _asked(record)


def _asked(record: Record) -> str:
    return record.prompt or "\n".join(text for _, text in record.messages)


def _aligned(adapter: LanguageAdapter, held: Tokens, changed: Record) -> tuple[dict[Run, list[int]], bool] | None:
    """Which runs of the prompt's tokens are exchanged, and for what; whether they fit as they are. None: nothing differs."""
    try:
        other: Tokens = adapter.encode(changed).data
    except InputError:  # the other prompt is too long
        return None
    own, new = held.ids[: held.start].tolist(), other.ids[: other.start].tolist()
    runs: dict[Run, list[int]] = {}
    exact = len(own) == len(new)
    for kind, a, b, c, d in SequenceMatcher(None, own, new, autojunk=False).get_opcodes():
        if kind == "replace":
            runs[a, b] = [new[c + i % (d - c)] for i in range(b - a)]
            exact = exact and b - a == d - c
    return (runs, exact) if runs else None


def _made(example: Example, held: Tokens, runs: dict[Run, list[int]], how: str) -> Swap:
    """Exchange the runs; where there is one (the subject's name), in the answer too."""
    ids = held.ids.copy()
    for (a, b), new in runs.items():
        ids[a:b] = new
    counted = np.ones(len(ids) - held.start, dtype=np.bool_)
    if len(runs) == 1:
        (((a, b), new),) = runs.items()
        own, at = held.ids[a:b], held.start
        while at + len(own) <= len(ids):
            if np.array_equal(held.ids[at : at + len(own)], own):
                ids[at : at + len(own)] = new
                counted[at - held.start : at - held.start + len(own)] = False
                at += len(own)
            else:
                at += 1
    return Swap(example, ids, counted if counted.any() else np.ones_like(counted), how)
