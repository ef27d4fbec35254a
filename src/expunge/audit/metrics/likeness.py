"""Likeness of two models' answers: for questions whose right answers nobody has written down."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import CONCEPT_VECTORS
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.metrics.rouge import answers, lacks_questions, rouge_l
from expunge.audit.metrics.words import Tokeniser, words
from expunge.core.access import Offer
from expunge.core.errors import MissingExtra
from expunge.core.results import Direction
from expunge.engine.parts import Paper

Score = Literal["rouge", "bleu"]


def likeness(said: str, before: str, score: Score = "rouge", tokeniser: Tokeniser = "rouge") -> float:
    """How much an answer is like the one that another model gave, in [0, 1].

    ``rouge``: ROUGE-L F1 over words. ``bleu``: BLEU of up to four words, over what stands between spaces, with the third
    smoothing of Chen and Cherry (2014). The same text is 1 by either (plain BLEU is below that for texts of fewer than four
    words), and so are two empty ones; an answer without a word and another are 0.

    Args:
        said: the answer of the model that is measured.
        before: the answer that it is compared with.
        score: rouge or bleu.
        tokeniser: of rouge; see :func:`~expunge.audit.metrics.words.words`.

    Raises:
        MissingExtra: the package of the score is not installed.
    """
    if said.strip() == before.strip():
        return 1.0
    if score == "bleu":
        return _bleu(said.split(), before.split())
    if not words(before, False, tokeniser) or not words(said, False, tokeniser):
        return 0.0
    return rouge_l(said, before, "f1", False, tokeniser)


def _bleu(said: list[str], before: list[str]) -> float:
    if not said or not before:
        return 0.0
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("BLEU", "llm") from None
    return float(sentence_bleu([before], said, smoothing_function=SmoothingFunction().method3))


@metric
class AnswersAsTarget(RecordMetric):
    """How much a model's greedy answers are like those that the target gave to the same questions.

    It needs no right answers. On what is to be forgotten lower is more forgotten, with the caution that a model which says the
    same in other words is low too; elsewhere higher is better kept. The target itself is at 1. ``of`` compares with the
    target's answers to another set with the same questions in the same order: those of a plain question, for one that is asked
    in a roundabout way.
    """

    name: ClassVar[str] = "answers-as-target"
    title: ClassVar[str] = "Answers as the target's"
    formula: ClassVar[str] = "ROUGE-L F1, or BLEU with smoothing, of the answer against the target's answer; mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = CONCEPT_VECTORS
    evaluate = staticmethod(likeness)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE})
    on_request: ClassVar[bool] = True

    score: Score = Field("rouge", description="rouge: ROUGE-L F1; bleu: BLEU with the third smoothing")
    max_new_tokens: int = Field(100, ge=1, description="longest answer in tokens")
    stops: tuple[str, ...] = Field((), description="texts at which an answer is cut")
    tokeniser: Tokeniser = Field("rouge", description="rouge: ASCII words only, as published; unicode: all scripts")
    of: str = Field("", description="the set whose answers by the target are compared with; none: the set itself")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target, a prompt, and the other set."""
        if name in ("holdout", self.of):
            return "answers are compared on other sets only"
        if not evidence.labels("target"):
            return "it needs the target model"
        if self.of and (self.of not in evidence.sets or len(evidence.records(self.of)) != len(evidence.records(name))):
            return f"it needs the same questions as the set {self.of!r}"
        return lacks_questions(evidence, name)

    def _said(self, evidence: Evidence, label: str, name: str) -> list[str]:
        return answers(evidence, label, name, self.max_new_tokens, stops=self.stops)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The likeness of each answer."""
        said = self._said(evidence, label, name)
        before = self._said(evidence, evidence.labels("target")[0], self.of or name)
        values = np.array([likeness(s, b, self.score, self.tokeniser) for s, b in zip(said, before, strict=True)])
        return Values(values, np.ones(len(values), dtype=bool))


def alike(said: list[str], before: list[str], **options: Any) -> float:
    """Mean :func:`likeness` of pairs of answers; NaN of none."""
    found = [likeness(s, b, **options) for s, b in zip(said, before, strict=True)]
    return float(np.mean(found)) if found else float("nan")
