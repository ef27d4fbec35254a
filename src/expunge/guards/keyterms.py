"""What an answer tells: names, numbers and rare words, found without a tagger."""

from __future__ import annotations

import re
from collections.abc import Iterable

from expunge.guards.folding import words

_PIECE = re.compile(r"[^\W_]+(?:['\u2019.-][^\W_]+)*|[.!?;:]")
_LINKS = frozenset(
    {"of", "the", "de", "del", "la", "le", "van", "von", "der", "den", "bin", "ibn", "al", "el", "and", "da", "di", "y"}
)
_SHORT = 5  #: letters from which on a word without a capital counts as one that tells something
_NAME = 4  #: letters from which on a single word of a name counts


def common_words(texts: Iterable[str]) -> frozenset[str]:
    """Folded words that tell nothing: those of ordinary texts, and English function words (scikit-learn's list)."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(w for t in texts for w in words(t)) | {w for s in ENGLISH_STOP_WORDS for w in words(s)}


def key_terms(answer: str, question: str = "", common: frozenset[str] = frozenset()) -> list[str]:
    """The terms of an answer that must not be said, as they stand in it, each once.

    Runs of capitalised words (a name with *of* or *al* in it is one run), the words of such a run that are no common ones, what
    has a digit, and words of at least five letters that are no common ones. What the question says already is left out: to say a
    name that was asked about tells nothing.

    Args:
        answer: that is to be hidden.
        question: that it answers.
        common: folded words that tell nothing; see :func:`common_words`.
    """
    asked = words(question)
    found: dict[str, None] = {}
    for term in (*_names(answer, common), *_singles(answer, common)):
        letters = words(term)
        if letters and not _within(letters, asked):
            found[term] = None
    return list(found)


def _names(text: str, common: frozenset[str]) -> Iterable[str]:
    """Runs of at least two capitalised words; a common word at their beginning or end is no part of them."""
    run: list[re.Match[str]] = []
    for piece in [*_PIECE.finditer(text), None]:
        if piece is not None and (piece.group()[0].isupper() or (run and piece.group() in _LINKS)):
            run.append(piece)
            continue
        while run and (run[-1].group() in _LINKS or set(words(run[-1].group())) <= common):
            run.pop()
        while run and set(words(run[0].group())) <= common:
            run.pop(0)
        if len(run) > 1:
            yield text[run[0].start() : run[-1].end()]
        run = []


def _singles(text: str, common: frozenset[str]) -> Iterable[str]:
    for piece in _PIECE.finditer(text):
        word = piece.group()
        letters = "".join(words(word))
        if any(c.isdigit() for c in letters):
            if len(letters) > 1:
                yield word
        elif not set(words(word)) <= common and len(letters) >= (_NAME if word[0].isupper() else _SHORT):
            yield word


def _within(letters: list[str], asked: list[str]) -> bool:
    joined = "".join(letters)
    return any(
        "".join(asked[i:j]) == joined for i in range(len(asked)) for j in range(i + 1, min(len(asked), i + len(joined)) + 1)
    )
