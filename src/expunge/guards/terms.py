"""Forbidden terms without the terms: keyed digests of their letters, found in a text in time linear in its length.

A process that must refuse a name need not hold it. What is held is ``BLAKE2b(key, letters)`` for the folded letters of each term
(:mod:`expunge.guards.folding`); of a text, the letters of every run of whole words whose length is that of a term are looked up.
So it does not matter how a name is spaced or broken ("J o h n", "john-smith"), and the cost does not grow with the number of
terms.
"""

from __future__ import annotations

import codecs
import hashlib
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expunge.guards.folding import RUN, Word, open_run, parted, uncovered, unspelt, words


@dataclass(frozen=True, slots=True)
class Match:
    """A term in a text.

    Attributes:
        target: whose it is.
        start, end: characters of the text that hold it.
        disguised: whether it stood there in an encoding, backwards, or spelt with digits.
    """

    target: str
    start: int
    end: int
    disguised: bool = False


class _Term(NamedTuple):
    plain: bytes
    turned: tuple[bytes, ...]
    size: int


class TermIndex:
    """Terms of targets, as keyed digests. Reading needs no lock; adding and dropping take one.

    Args:
        key: secret of the process or of its store, at least 16 bytes.
        encodings: also find what stands in Base64, hexadecimal or percent encoding, backwards, moved by 13 letters, or spelt with
            digits.
    """

    def __init__(self, key: bytes, *, encodings: bool = True) -> None:
        if len(key) < 16:
            raise ValueError("the key must have at least 16 bytes")
        self._key = hashlib.blake2b(key, digest_size=32, person=b"expunge-terms").digest()
        self.encodings = encodings
        self._held: dict[bytes, tuple[str, ...]] = {}
        self._turned: dict[bytes, tuple[str, ...]] = {}  # terms backwards, and moved by 13 letters
        self._by_target: dict[str, list[_Term]] = {}
        self._counts: Counter[int] = Counter()
        self._lengths: frozenset[int] = frozenset()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def longest(self) -> int:
        """Letters of the longest term; 0 without terms."""
        return max(self._lengths, default=0)

    def digest(self, letters: str) -> bytes:
        """The keyed digest of folded letters."""
        return hashlib.blake2b(letters.encode(), key=self._key, digest_size=16).digest()

    def add(self, target: str, terms: Iterable[str]) -> None:
        """Hold the terms of a target, in place of those that are held of it."""
        made = [self._term(letters) for letters in dict.fromkeys("".join(words(t)) for t in terms) if letters]
        with self._lock:
            self._drop(target)
            self._take(target, made)

    def _term(self, letters: str) -> _Term:
        turned = (letters[::-1], codecs.encode(letters, "rot13")) if self.encodings else ()
        return _Term(self.digest(letters), tuple(map(self.digest, turned)), len(letters))

    def _take(self, target: str, terms: list[_Term]) -> None:
        self._by_target[target] = terms
        for term in terms:
            self._held[term.plain] = (*self._held.get(term.plain, ()), target)
            for digest in term.turned:
                self._turned[digest] = (*self._turned.get(digest, ()), target)
            self._counts[term.size] += 1
        self._lengths = frozenset(self._counts)

    def drop(self, target: str) -> None:
        """Hold no terms of a target any more."""
        with self._lock:
            self._drop(target)
            self._lengths = frozenset(self._counts)

    def _drop(self, target: str) -> None:
        for term in self._by_target.pop(target, ()):
            _without(self._held, term.plain, target)
            for digest in term.turned:
                _without(self._turned, digest, target)
            self._counts[term.size] -= 1
            if not self._counts[term.size]:
                del self._counts[term.size]

    def find(self, text: str, start: int = 0) -> list[Match]:
        """Every term in a text, from a character on."""
        if not self._held:
            return []
        found = list(self._plain(parted(text, start)))
        if self.encodings:
            for inner, first, last in uncovered(text, start):
                found += [Match(m.target, first, last, True) for m in self._plain(parted(inner))]
        return found

    def part(self, targets: Collection[str]) -> TermIndex:
        """The terms of some targets as they are now, in an index of their own."""
        made = TermIndex(bytes(16), encodings=self.encodings)
        made._key = self._key
        with self._lock:
            held = {t: self._by_target[t] for t in targets if t in self._by_target}
        for target, terms in held.items():
            made._take(target, terms)
        return made

    def ending(self, text: str, start: int, held: Sequence[Word] | None = None) -> bool:
        """Whether a term ends after a character. The cost grows with the longest term, not with the number of terms.

        Args:
            text: is looked at from its end.
            start: the character.
            held: words of the text; none: they are looked for.
        """
        if not self._held:
            return False
        held = parted(text) if held is None else held
        longest = self.longest
        for last in reversed(range(len(held))):
            if held[last].end <= start:
                break
            letters = ""
            for at in range(last, -1, -1):
                letters = held[at].letters + letters
                if len(letters) > longest:
                    break
                if len(letters) in self._lengths and any(targets for targets, _ in self._whose(letters)):
                    return True
        if not self.encodings:
            return False
        begin = max(text.rfind(" ", 0, start), text.rfind("\n", 0, start)) + 1  # what is encoded has no space in it
        if len(text) - begin < RUN:
            return False
        inner = (found for found, _, end in uncovered(text, begin) if end > start)
        return any(True for found in inner for _ in self._plain(parted(found)))

    def _plain(self, held: list[Word]) -> Iterator[Match]:
        lengths, longest = self._lengths, self.longest
        for i, first in enumerate(held):
            letters = ""
            for word in held[i:]:
                letters += word.letters
                if len(letters) > longest:
                    break
                if len(letters) not in lengths:
                    continue
                for targets, disguised in self._whose(letters):
                    yield from (Match(target, first.start, word.end, disguised) for target in targets)

    def _whose(self, letters: str) -> Iterator[tuple[tuple[str, ...], bool]]:
        """Targets that have these letters as a term, and whether in disguise."""
        digest = self.digest(letters)
        yield self._held.get(digest, ()), False
        if self.encodings:
            yield self._turned.get(digest, ()), True
            if (spelt := unspelt(letters)) != letters:
                yield self._held.get(self.digest(spelt), ()), True

    def safe(self, text: str, start: int = 0) -> int:
        """How many characters of a text that goes on no term can hold any more, given that it holds none yet.

        Args:
            text: as far as it is known.
            start: characters that are known to be safe.
        """
        if not self._held:
            return len(text)
        held = parted(text, start)
        letters, at = 0, len(text)
        for word in reversed(held):
            if letters >= self.longest:
                break
            letters += len(word.letters)
            at = word.start
        return max(start, min(at, open_run(text) if self.encodings else at))


def _without(held: dict[bytes, tuple[str, ...]], digest: bytes, target: str) -> None:
    """Take a target from those of a digest."""
    left = tuple(t for t in held.get(digest, ()) if t != target)
    if left:
        held[digest] = left
    else:
        held.pop(digest, None)
