"""Words of a text as ROUGE sees them, and the longest common subsequence of two word lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from expunge.core.errors import MissingExtra

Tokeniser = Literal["rouge", "unicode"]

# One word per run of letters and digits; scripts without spaces (kana, Han, Hangul is spaced) one per character.
_UNICODE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


class _CachedStemmer:
    """Porter's stemmer with a memory: audits stem the same few thousand words again and again."""

    def __init__(self, stem: Any) -> None:
        self.stem = lru_cache(maxsize=1 << 16)(stem)


@lru_cache(maxsize=1)
def _stemmer() -> _CachedStemmer:
    try:
        from nltk.stem import porter  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("ROUGE", "llm") from None
    return _CachedStemmer(porter.PorterStemmer().stem)


def words(text: str, stem: bool, tokeniser: Tokeniser = "rouge") -> list[str]:
    """The words of a text.

    ``rouge`` is the tokeniser of the rouge_score package, with which published numbers are made: lower case, everything but
    ``a-z0-9`` separates, words of more than three letters are stemmed if ``stem``. It sees *no* words in text of other
    scripts; ``unicode`` keeps letters and digits of all scripts, and stems ASCII words only.

    Raises:
        MissingExtra: rouge_score is not installed.
    """
    if tokeniser == "unicode":
        found = _UNICODE.findall(text.lower())
        return [_stemmer().stem(w) if stem and len(w) > 3 and w.isascii() else w for w in found]
    try:
        from rouge_score.tokenize import tokenize
    except ImportError:
        raise MissingExtra("ROUGE", "llm") from None
    return list(tokenize(text, _stemmer() if stem else None))


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one integer.

    The algorithm of Hyyro (2004): ``len(a)`` operations on ``len(b)``-bit numbers instead of ``len(a) * len(b)`` steps.
    """
    masks: dict[str, int] = {}
    for i, word in enumerate(b):
        masks[word] = masks.get(word, 0) | (1 << i)
    full = (1 << len(b)) - 1
    row = full
    for word in a:
        both = row & masks.get(word, 0)
        row = ((row + both) | (row - both)) & full
    return len(b) - row.bit_count()
