"""Is what the model writes still language? Degenerate texts, repetition, n-gram entropy, texts that do not end."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from typing import ClassVar

import numpy as np
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.generations import shorten
from expunge.audit.metrics.papers import DEGENERATION
from expunge.audit.metrics.registry import Metric, Need, Range, mean_number, metric
from expunge.audit.metrics.rouge import answers, lacks_questions
from expunge.core.results import Direction, Number
from expunge.engine.parts import Paper

_WORD = re.compile(r"\w+")
_COMPRESSION = 4.0  # prose shrinks to a half; only loops shrink to a quarter
_REPEATED = 0.5


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = _WORD.findall(text.lower())
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's word n-grams that occurred before in it, ``1 - distinct / all``, in [0, 1); 0 if it has none.

    The ``seq-rep-n`` of Welleck et al. 2019 (arXiv 1908.04319), on words instead of tokens so that models with different
    vocabularies compare.

    Args:
        text: what the model wrote.
        n: words per n-gram.
    """
    grams = _ngrams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def ngram_entropy(text: str) -> float:
    """Weighted entropy of a text's word bi- and trigrams in bits, ``(2/3 H_2 + 4/3 H_3) / 2``, in [0, inf).

    RWKU's fluency (there times 100). It grows with the length of the text: compare only under the same limit. The entropy of
    "the the the ..." is 0.
    """
    return (2 / 3 * _entropy(_ngrams(text, 2)) + 4 / 3 * _entropy(_ngrams(text, 3))) / 2


def degenerate(text: str) -> bool:
    """Whether a text is broken: no word in it, or a loop.

    A loop is a text of at least eight words of which half the word trigrams repeat earlier ones, or any text that zlib
    shrinks to less than a quarter of its bytes (loops of characters within one word). Word salad without repetition is *not*
    found: no statistic of the text alone tells it from terse prose.
    """
    if not _WORD.search(text):
        return True
    raw = text.encode()
    loop = len(_WORD.findall(text)) >= 8 and repetition(text, 3) >= _REPEATED
    return loop or len(raw) / len(zlib.compress(raw)) > _COMPRESSION


def _entropy(grams: list[tuple[str, ...]]) -> float:
    counts = np.array(list(Counter(grams).values()), dtype=np.float64)
    if not counts.size:
        return 0.0
    shares = counts / counts.sum()
    return float(-np.sum(shares * np.log2(shares))) + 0.0


@metric
class Fluency(Metric):
    """Four views of the generated answers: the share that is degenerate, their repetition, their n-gram entropy, the share
    that runs into the limit without an end.

    On forget prompts they show a model that was broken rather than made to forget, on the others lost usefulness. Short
    gold answers keep n-gram entropy low in healthy models too: compare with the target.
    """

    name: ClassVar[str] = "fluency"
    title: ClassVar[str] = "Fluency"
    formula: ClassVar[str] = "share of broken texts; 1 - distinct/all word 4-grams; (2/3 H_2 + 4/3 H_3)/2; share without an end"
    direction: ClassVar[Direction] = Direction.UTILITY_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = DEGENERATION
    evaluate = staticmethod(degenerate)

    max_new_tokens: int = Field(200, ge=1, description="longest text in tokens")
    n: int = Field(4, ge=1, le=10, description="words per n-gram of the repetition")

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``<set>.degenerate``, ``<set>.repetition``, ``<set>.ngram-entropy``, ``<set>.unended``."""
        out: dict[str, Number] = {}
        for name in evidence.sets:
            if name == "holdout":
                continue
            if lack := lacks_questions(evidence, name):
                evidence.miss(f"{self.title} was not measured on the {name} set: {lack}.")
                continue
            out |= self._on(evidence, label, name)
        return out

    def _on(self, evidence: Evidence, label: str, name: str) -> dict[str, Number]:
        texts = answers(evidence, label, name, self.max_new_tokens)
        made = [shorten(evidence.decoder(label), g, self.max_new_tokens) for g in evidence.generations(label, name)]
        views: dict[str, tuple[list[float], Direction, Range]] = {
            "degenerate": ([float(degenerate(t)) for t in texts], Direction.UTILITY_DOWN, (0.0, 1.0)),
            "repetition": ([repetition(t, self.n) for t in texts], Direction.UTILITY_DOWN, (0.0, 1.0)),
            "ngram-entropy": ([ngram_entropy(t) for t in texts], Direction.UTILITY_UP, (0.0, None)),
            "unended": ([float(not g.ended) for g in made], Direction.UTILITY_DOWN, (0.0, 1.0)),
        }
        everyone = np.ones(len(texts), dtype=bool)
        out = {}
        for key, (values, direction, bounds) in views.items():
            number = mean_number(evidence, name, Values(np.array(values), everyone), direction, bounds)
            if number is not None:
                out[f"{name}.{key}"] = number
        return out
