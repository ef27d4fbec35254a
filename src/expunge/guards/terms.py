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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from expunge.guards.folding import Word, open_run, parted, uncovered, unspelt, words


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
        self._by_target: dict[str, list[tuple[bytes, int]]] = {}
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
        made = [(self.digest(letters), len(letters)) for letters in dict.fromkeys("".join(words(t)) for t in terms) if letters]
        with self._lock:
            self._drop(target)
            self._by_target[target] = made
            for digest, size in made:
                self._held[digest] = (*self._held.get(digest, ()), target)
                self._counts[size] += 1
            self._lengths = frozenset(self._counts)

    def drop(self, target: str) -> None:
        """Hold no terms of a target any more."""
        with self._lock:
            self._drop(target)
            self._lengths = frozenset(self._counts)

    def _drop(self, target: str) -> None:
        for digest, size in self._by_target.pop(target, ()):
            left = tuple(t for t in self._held[digest] if t != target)
            if left:
                self._held[digest] = left
            else:
                del self._held[digest]
            self._counts[size] -= 1
            if not self._counts[size]:
                del self._counts[size]

    def find(self, text: str, start: int = 0) -> list[Match]:
        """Every term in a text, from a character on."""
        if not self._held:
            return []
        found = list(self._plain(parted(text, start)))
        if self.encodings:
            for inner, first, last in uncovered(text, start):
                found += [Match(m.target, first, last, True) for m in self._plain(parted(inner))]
        return found

    def ending(self, text: str, start: int, targets: Collection[str]) -> bool:
        """Whether a term of some targets ends after a character. The cost grows with the longest term, not with the targets."""
        if not self._held:
            return False
        held = parted(text)
        for last in reversed(range(len(held))):
            if held[last].end <= start:
                break
            letters = ""
            for word in reversed(held[: last + 1]):
                letters = word.letters + letters
                if len(letters) > self.longest:
                    break
                if len(letters) in self._lengths and any(
                    t in targets for seen, _ in self._readings(letters) for t in self._held.get(self.digest(seen), ())
                ):
                    return True
        if not self.encodings:
            return False
        begin = max(text.rfind(" ", 0, start), text.rfind("\n", 0, start)) + 1  # what is encoded has no space in it
        inner = (found for found, _, end in uncovered(text, begin) if end > start)
        return any(m.target in targets for found in inner for m in self._plain(parted(found)))

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
                for seen, disguised in self._readings(letters):
                    for target in self._held.get(self.digest(seen), ()):
                        yield Match(target, first.start, word.end, disguised)

    def _readings(self, letters: str) -> Iterator[tuple[str, bool]]:
        yield letters, False
        if self.encodings:
            yield letters[::-1], True
            yield codecs.encode(letters, "rot13"), True
            if (spelt := unspelt(letters)) != letters:
                yield spelt, True

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
