"""Terms of a text replaced by others, token by token, such that it is known where every token went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expunge.adapters.tokenise import Tokens

Spell = Callable[[str], list[int]]  #: ids of a text, without what a tokenizer puts before it
Read = Callable[[Sequence[int]], str]  #: text of ids, white space and all

_LEADS = ("", " ", '"')  #: what may stand before a word, for tokenizers that spell it in another way then


@dataclass(frozen=True)
class Mention:
    """A term where it stands in a text: tokens ``start`` to ``stop``, and the ids that take their place."""

    term: str
    start: int
    stop: int
    counterpart: tuple[int, ...]


@dataclass(frozen=True)
class Translation:
    """A text with its terms replaced.

    Attributes:
        tokens: the new text.
        place: for each token of the old text the token of the new one with the same text, translated, before it, int64
            ``[size]``; -1 where there is none: the second and further tokens of a term, and what no longer fits into the context.
        mentions: where terms stood in the old text, in order.
    """

    tokens: Tokens
    place: NDArray[np.int64]
    mentions: tuple[Mention, ...]


class Dictionary:
    """Terms and their counterparts as token ids.

    A term is found as a whole word, the longest first, wherever its own spelling occurs: as it is, after a space, after a
    quotation mark. Case matters, and other forms of a word are other terms.

    Args:
        terms: term to counterpart.
        spell: the tokenizer.
        read: its inverse.
    """

    def __init__(self, terms: Mapping[str, str], spell: Spell, read: Read) -> None:
        self.read = read
        self._by_first: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], str]]] = {}
        seen: set[tuple[int, ...]] = set()
        for term, counterpart in terms.items():
            for lead in _LEADS:
                ids, other = _after(spell, lead, term), _after(spell, lead, counterpart)
                if ids and other and ids not in seen:
                    seen.add(ids)
                    self._by_first.setdefault(ids[0], []).append((ids, other, term))
        for entries in self._by_first.values():
            entries.sort(key=lambda entry: -len(entry[0]))

    def translate(self, old: Tokens, limit: int | None = None) -> Translation:
        """Replace all terms; none across the border of prompt and answer.

        Args:
            old: a text.
            limit: longest sequence in tokens; what is longer is cut.
        """
        ids = old.ids.tolist()
        new: list[int] = []
        place = np.full(len(ids), -1, dtype=np.int64)
        mentions: list[Mention] = []
        start, at = 0, 0
        while at < len(ids):
            if at == old.start:
                start = len(new)
            place[at] = len(new)
            found = self._at(ids, at, old.start)
            if found is None:
                new.append(ids[at])
                at += 1
                continue
            known, other, term = found
            mentions.append(Mention(term, at, at + len(known), other))
            new += other
            at += len(known)
        size = len(new) if limit is None else min(len(new), limit)
        place[place >= size] = -1
        cut = Tokens(np.asarray(new[:size], dtype=np.int32), start, old.ends and size == len(new))
        return Translation(cut, place, tuple(mentions))

    def _at(self, ids: list[int], at: int, border: int) -> tuple[tuple[int, ...], tuple[int, ...], str] | None:
        for entry in self._by_first.get(ids[at], ()):
            stop = at + len(entry[0])
            if tuple(ids[at:stop]) == entry[0] and not at < border < stop and not self._inside(ids, at, stop):
                return entry
        return None

    def _inside(self, ids: list[int], at: int, stop: int) -> bool:
        """Whether a word goes on across one of the ends."""
        return (at > 0 and self._goes_on(ids[at - 1], ids[at])) or (stop < len(ids) and self._goes_on(ids[stop - 1], ids[stop]))

    def _goes_on(self, left: int, right: int) -> bool:
        first = self.read([left])
        rest = self.read([left, right])
        if not rest.startswith(first):
            return False
        return first[-1:].isalnum() and rest[len(first) :][:1].isalnum()


def _after(spell: Spell, lead: str, word: str) -> tuple[int, ...]:
    """Ids of a word after a lead; for a quotation mark without the mark's own."""
    ids = spell(lead + word)
    if lead != '"':
        return tuple(ids)
    mark = spell(lead)
    return tuple(ids[len(mark) :]) if ids[: len(mark)] == mark else ()
