"""Which words of a text carry what it tells: nouns, found by a tagger that is at hand, or by a simple rule.

Nothing is downloaded: a tagger whose model is not on the machine is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from expunge.core.errors import InputError

Span = tuple[int, int]  #: first character, and the one after the last
Finder = Callable[[str], list[Span]]  #: the words of a text that are found, in order

LONG = 4  #: letters of a word from which on the rule ``long`` takes it
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_RULES = ("long", "capitalised", "nltk", "spacy:MODEL")


def finder(name: str) -> Finder:
    """The way to find words that is called ``name``.

    - ``long``: words of at least four letters, and everything with a digit. It takes nearly all nouns and many other words.
    - ``capitalised``: words that begin with a capital letter, and everything with a digit: names, dates, beginnings of sentences.
    - ``nltk``: the tags NN, NNS, NNP, NNPS of nltk's tagger for English, whose data must be on the machine.
    - ``spacy:MODEL``: the same tags of an installed spaCy pipeline, such as ``spacy:en_core_web_sm``.

    Raises:
        InputError: no such way, or its tagger is not on the machine.
    """
    if name == "long":
        return _rule(lambda w: len(w) >= LONG or any(c.isdigit() for c in w))
    if name == "capitalised":
        return _rule(lambda w: w[0].isupper() or any(c.isdigit() for c in w))
    if name == "nltk":
        return _tagged(_nltk())
    if name.startswith("spacy:"):
        return _spacy(name.removeprefix("spacy:"))
    raise InputError(f"There is no way to find words called {name!r}.", f"Choose one of: {', '.join(_RULES)}.")


def _rule(takes: Callable[[str], bool]) -> Finder:
    return lambda text: [m.span() for m in _WORD.finditer(text) if takes(m.group())]


def _tagged(tag: Callable[[Sequence[str]], list[tuple[str, str]]]) -> Finder:
    def find(text: str) -> list[Span]:
        words = list(_WORD.finditer(text))
        tags = tag([m.group() for m in words])
        return [m.span() for m, (_, kind) in zip(words, tags, strict=True) if kind.startswith("NN")]

    return find


def _nltk() -> Callable[[Sequence[str]], list[tuple[str, str]]]:
    try:
        import nltk  # type: ignore[import-untyped]  # no stubs
    except ImportError:
        raise InputError("nltk is not installed.", "Install it with its tagger's data, or choose nouns=long.") from None
    tag: Any = nltk.pos_tag
    try:
        tag(["word"])
    except LookupError:
        raise InputError(
            "The data of nltk's tagger are not on this machine, and nothing is downloaded.",
            "Put averaged_perceptron_tagger_eng into a folder of nltk_data, or choose nouns=long.",
        ) from None
    return lambda words: list(tag(list(words))) if words else []


def _spacy(model: str) -> Finder:
    try:
        import spacy
    except ImportError:
        raise InputError("spaCy is not installed.", "Install it with a pipeline, or choose nouns=long.") from None
    try:
        held: Any = spacy.load(model)
    except OSError:
        raise InputError(
            f"The spaCy pipeline {model!r} is not on this machine, and nothing is downloaded.",
            "Install it, or choose nouns=long.",
        ) from None
    return lambda text: [(t.idx, t.idx + len(t.text)) for t in held(text) if t.tag_.startswith("NN")]
